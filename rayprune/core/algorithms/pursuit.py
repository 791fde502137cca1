"""Non-negative orthogonal matching pursuit: few vectors whose weighted sum is close to a target.

This is the active-set method of Lawson and Hanson for non-negative least squares ("Solving Least Squares Problems",
1974), stopped when enough weights are above 0: both add the vector with the largest inner product with the residual and
fit all weights again. The normal equations are updated by one vector at a time, so that a step takes n·D + D²
operations, and none the cube of the number of chosen vectors.

Shapes: n vectors of D numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.gradients import first_largest

_LEAST_RIDGE = 1e-8  # of the largest squared norm; rank-one updates lose their digits below
_SMALL_RIDGE = 1e-5  # of the largest squared norm
_TOLERANCE = 1e-7  # of the largest inner product with the target
_DRIFT = 1e-6  # of the target's norm, until the inverse is computed from the rows
_BLOCK = 64  # rank-one updates until the inverse is written anew


def pursue(features: NDArray[np.float64], target: NDArray[np.float64], count: int, ridge: float) -> NDArray[np.float64]:
    """Return weights that minimize ‖target − Σ w f‖² + λ‖w‖² over w ≥ 0 and the chosen rows f, (n,).

    With S = λ·1 + Σ f fᵀ over the rows with w > 0 and z = S⁻¹·target, the weights are ⟨f, z⟩ and the residual is λz:
    ⟨f, z⟩ also ranks the rows that may come next.

    Args:
        features: (n, D), one vector a row.
        target: (D,).
        count: at most so many weights are above 0; fewer if no other row has an inner product with the residual above
            1e-7 of the first one.
        ridge: λ, raised to 1e-8 of the largest squared norm.

    >>> pursue(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), np.array([6.0, 2.0]), 2, ridge=0.0).round(6).tolist()
    [0.0, 1.0, 2.0]
    """
    largest = float(np.einsum("ij,ij->i", features, features).max())
    if largest == 0.0:
        return np.zeros(features.shape[0])
    ridge = max(ridge, _LEAST_RIDGE * largest)
    system = _Normal(features, target, ridge, refine_each=ridge < _SMALL_RIDGE * largest)
    weights, barred = np.zeros(features.shape[0]), np.zeros(features.shape[0], dtype=bool)
    least = _TOLERANCE * float(system.along.max())
    for _ in range(3 * count):  # rounding could make it cycle
        candidates = np.where(system.active | barred, -np.inf, system.along)
        if system.num_active == count or not candidates.max() > max(least, 0.0):
            break
        new = int(first_largest(candidates, 1)[0])
        system.change(new, 1.0)
        while (wrong := system.active & (system.along <= 0.0)).any():
            # Go from the old weights towards the new ones until the first of them is 0, and leave that row out.
            old, fitted, rows = weights[wrong], system.along[wrong], np.flatnonzero(wrong)
            steps = np.divide(old, old - fitted, out=np.zeros_like(old), where=old > fitted)
            weights = np.where(system.active, weights + steps.min() * (system.along - weights), 0.0)
            leaving = wrong & (weights <= 1e-12 * weights.max())
            leaving[rows[steps.argmin()]] = True
            barred[new] |= steps.min() == 0.0 and leaving[new]
            for row in np.flatnonzero(leaving).tolist():
                system.change(row, -1.0)
                weights[row] = 0.0
        weights = np.where(system.active, system.along, 0.0)
    system.refresh()
    return np.where(system.active, np.maximum(system.along, 0.0), 0.0)


class _Normal:
    """The equations S·z = target, solved again after each row that joins or leaves S.

    Args:
        features: (n, D).
        target: (D,).
        ridge: λ > 0.
        refine_each: refine the solution after each change, and not only after every 64; for a small λ.

    Attributes:
        active: (n,) bool, the rows in S.
        along: (n,) the inner products of all rows with z.
    """

    def __init__(
        self, features: NDArray[np.float64], target: NDArray[np.float64], ridge: float, refine_each: bool
    ) -> None:
        self._features, self._target, self._ridge, self._refine_each = features, target, ridge, refine_each
        size = features.shape[1]
        self._inverse = np.eye(size) / ridge
        # S⁻¹ is the inverse less the sum of scale·u·uᵀ over the newest changes.
        self._updates, self._scales, self._num_updates = np.empty((_BLOCK, size)), np.empty(_BLOCK), 0
        self._solution = target / ridge
        self.active, self.num_active = np.zeros(features.shape[0], dtype=bool), 0
        self.along: NDArray[np.float64] = features @ self._solution

    def change(self, row: int, sign: float) -> None:
        """Add a row to S (sign 1), or remove it (−1)."""
        feature = self._features[row]
        update = self._solve(feature)
        scale = sign / (1.0 + sign * float(feature @ update))
        self._solution -= scale * float(self._target @ update) * update
        self._updates[self._num_updates], self._scales[self._num_updates] = update, scale
        self._num_updates += 1
        self.active[row] = sign > 0.0
        self.num_active += int(sign)
        self.along = self._features @ self._solution
        if self._num_updates == _BLOCK or sign < 0.0 or self._refine_each:
            self.refresh()

    def _solve(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        newest = self._updates[: self._num_updates]
        solution: NDArray[np.float64] = self._inverse @ vector
        solution -= newest.T @ (self._scales[: self._num_updates] * (newest @ vector))
        return solution

    def refresh(self) -> None:
        """Write the inverse anew, and take a step of iterative refinement."""
        newest = self._updates[: self._num_updates]
        self._inverse -= newest.T @ (self._scales[: self._num_updates, None] * newest)
        self._num_updates = 0
        enough = _DRIFT * float(np.linalg.norm(self._target))
        self._solution += self._inverse @ self._error()
        if not float(np.linalg.norm(self._error())) <= enough:
            rows = self._features[self.active]
            self._inverse[:] = np.linalg.inv(rows.T @ rows + self._ridge * np.eye(rows.shape[1]))
            self._solution = self._inverse @ self._target
            self._solution += self._inverse @ self._error()
        self.along = self._features @ self._solution

    def _error(self) -> NDArray[np.float64]:
        """Return target − S·z, (D,)."""
        rows = self._features[self.active]
        error: NDArray[np.float64] = self._target - self._ridge * self._solution - (rows @ self._solution) @ rows
        return error
