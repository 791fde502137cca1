"""GradMatch: keep the samples whose weighted gradients add up to the gradient of all.

Killamsetty, Sivasubramanian, Ramakrishnan, De, Iyer, "GRAD-MATCH: Gradient Matching based Data Subset Selection for
Efficient Deep Model Training", ICML 2021, arXiv 2103.00123. With the last-layer gradients g_i of a class
(`rayprune.core.gradients`) and their sum b, orthogonal matching pursuit minimizes ‖b − Σ w_i g_i‖² + λ‖w‖² over w ≥ 0
with M weights above 0: it adds the sample with the largest ⟨g_i, b − Σ w g⟩ (not normalized by ‖g_i‖), and fits the
weights of the chosen ones again by non-negative least squares. λ is 0.5, as in the authors' experiments.

Scale: the weights w are not normalized; they sum to less than N (their sum is `weight_sum` in metrics.jsonl). Training
gets them over their mean, so that they sum to M. The authors' program divides by the sum over each batch, which has the
same scale up to the draw of the batch.

The chosen set can be exhausted before M samples are found: no other gradient points along the residual, or the residual
is 0. The authors' program adds random samples of weight 1, whatever the scale of the others. Here the pursuit starts
again on the samples that are left, with the same target b, as often as needed; the weights of each round are multiplied
by its share of the samples, so that their sum still matches b. Samples that no round takes, such as those without a
gradient, follow by their inner product with b, at the mean weight of the others.

More deliberate deviations: one subset after T epochs, where the paper chooses again every 20; the non-negative fit is
exact (Lawson, Hanson 1974), where the authors' program drops the smallest negative weight for good; λ also applies to
the first sample; a class of more than `partition_size` samples is split at random, and each part matches its own sum;
where nothing is dropped, all weights are 1. λ = 0 is computed as 1e-9 of the largest squared norm.

Cost: with D = C for logits and D = min(C·(d+1), n) for the last layer, a part of n samples takes n·D + D² operations
for each kept sample, and 8·(n·D + D²) bytes, besides 8n² for the last layer.

Shapes: n samples of a part, C classes, d inputs of the last layer, D numbers of a feature vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.gradients import GradientMethod, Gradients, first_largest
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_LEAST_RIDGE = 1e-9  # of the largest squared norm
_TOLERANCE = 1e-8  # of the largest inner product with the target
_BLOCK = 64  # rank-one updates until the inverse is written anew


@register("gradmatch")
@dataclass(frozen=True, kw_only=True)
class GradMatch(GradientMethod):
    """Keep the samples whose weighted last-layer gradients add up to the gradient of all.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        ridge: λ ≥ 0, the penalty on squared weights. At 0, samples with small gradients can get very large weights.
        own_class: compare only the part of the gradient that belongs to the output of the sample's own class, the
            paper's per-gradient approximation; it needs a balance other than none.
        gradient: `logits`, or `last_layer` for the gradients of the last layer's weight and bias.
        balance: `proportional` or `even` choose class by class; `none` ignores classes.
        partition_size: largest number of samples whose sum is matched at once, ≥ 2; null never splits a class.
        storage: how the gradients are stored on the disk: float32, or float16 in half the space.
    """

    keeps = "the gradients that add up to that of all"
    paper = "Killamsetty et al., ICML 2021, arXiv 2103.00123"

    ridge: float = 0.5
    own_class: bool = False
    partition_size: int | None = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ridge < 0.0:
            raise ConfigError(f"ridge {self.ridge!r} is below 0: use 0 for none")
        if self.own_class and self.balance == "none":
            raise ConfigError("own_class compares samples of one class: use balance=proportional or even with it")

    def pick(
        self, gradients: Gradients, count: int, label: int | None, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return the weights, (n,)."""
        if self.own_class and label is not None:
            num_classes = gradients.errors.shape[1]
            if label >= num_classes:
                raise ConfigError(f"label {label} has no logit: the model has {num_classes} classes")
            gradients = Gradients(gradients.errors[:, [label]], gradients.inputs)
        return match_sum(gradients.features(), count, self.ridge)


def match_sum(features: NDArray[np.float64], count: int, ridge: float) -> NDArray[np.float64]:
    """Return weights of exactly `count` rows of (n, D) features whose weighted sum is close to the sum of all, (n,).

    >>> g = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])
    >>> match_sum(g, 2, ridge=0.0).round(4).tolist()
    [0.0, 1.5, 0.0, 1.6667]
    """
    target, weights = features.sum(axis=0), np.zeros(features.shape[0])
    left, num_picked = np.arange(weights.size), 0
    while num_picked < count:
        of_round = pursue(features[left], target, count - num_picked, ridge)
        picked = of_round > 0.0
        size = int(np.count_nonzero(picked))
        if not size:
            break
        weights[left[picked]] = of_round[picked] * size
        left, num_picked = left[~picked], num_picked + size
    weights /= max(num_picked, 1)
    if num_picked < count:
        rest = left[first_largest(features[left] @ target, count - num_picked)]
        weights[rest] = weights.sum() / num_picked if num_picked else 1.0
    return weights


def pursue(features: NDArray[np.float64], target: NDArray[np.float64], count: int, ridge: float) -> NDArray[np.float64]:
    """Return the weights of non-negative orthogonal matching pursuit, (n,), at most `count` of them above 0.

    The weights minimize ‖target − Σ w f‖² + λ‖w‖² over the rows f with w > 0. With S = λ·1 + Σ f fᵀ over these rows and
    z = S⁻¹·target, the weights are ⟨f, z⟩ and the residual is λz: ⟨f, z⟩ also ranks the rows that may come next.
    """
    largest = float(np.einsum("ij,ij->i", features, features).max())
    if largest == 0.0:
        return np.zeros(features.shape[0])
    system = _Normal(features, target, max(ridge, _LEAST_RIDGE * largest))
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

    Attributes:
        active: (n,) bool, the rows in S.
        along: (n,) the inner products of all rows with z.
    """

    def __init__(self, features: NDArray[np.float64], target: NDArray[np.float64], ridge: float) -> None:
        self._features, self._target, self._ridge = features, target, ridge
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
        if self._num_updates == _BLOCK or sign < 0.0:
            self.refresh()

    def _solve(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        newest = self._updates[: self._num_updates]
        solution: NDArray[np.float64] = self._inverse @ vector
        solution -= newest.T @ (self._scales[: self._num_updates] * (newest @ vector))
        return solution

    def refresh(self) -> None:
        """Write the inverse anew, and take one step of iterative refinement."""
        newest = self._updates[: self._num_updates]
        self._inverse -= newest.T @ (self._scales[: self._num_updates, None] * newest)
        self._num_updates = 0
        error = self._target - self._ridge * self._solution - (self.along * self.active) @ self._features
        self._solution += self._inverse @ error
        self.along = self._features @ self._solution
