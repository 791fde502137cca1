"""A mixture of two distributions of numbers, normal or beta, fitted by expectation maximization (EM).

Dempster, Laird, Rubin, "Maximum Likelihood from Incomplete Data via the EM Algorithm", JRSS B 1977. With weights w_k
and densities f_k, the E-step is r_k(x) ∝ w_k f_k(x). The M-step takes the weight, mean and variance of each component
from the numbers weighted by r_k. For normal distributions this is the maximum of the likelihood. A beta distribution
gets α and β from mean and variance (Arazo et al., "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019,
arXiv 1904.11238); unlike a normal one, it can be skewed.

The start is deterministic: the sorted numbers are cut at 50, 75 and 90 %, and the fit with the highest likelihood wins.
Up to 4,096 numbers are used as they are. More are cut into 4,096 bins of equal counts, however long the tails; r_k is
that of a bin's mean, and the bin's own variance counts in the components' variances.

Ours: variances are at least 1e-6 of the variance of all numbers. Below the mean of the lower component the posterior of
the upper one is the one at that mean: a wide upper component would otherwise claim the lowest numbers, too.

Shapes: N numbers, U bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.table import chunks
from rayprune.errors import DataError

Family = Literal["normal", "beta"]
MAX_BINS = 4096
_STARTS = (0.5, 0.75, 0.9)
_MAX_ITERATIONS = 300
_TOLERANCE = 1e-9  # of the mean log-likelihood between iterations
_LEAST_VARIANCE = 1e-6  # of that of all numbers
_BETA_EDGE = 1e-4  # beta densities may be infinite at 0 and 1: numbers are moved this far inside


@dataclass(frozen=True)
class Mixture:
    """Two distributions, the one with the lower mean first.

    Attributes:
        weights: their shares of the numbers, which sum to 1.
        means, variances: of each.
        family: "normal" or "beta".
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    variances: tuple[float, float]
    family: Family = "normal"

    @property
    def separation(self) -> float:
        """Ashman's D, √2·(μ_1 − μ_0)/√(v_0 + v_1); above 2 the two are clearly apart, 0 if all numbers are equal."""
        spread = math.sqrt(sum(self.variances) / 2)
        return (self.means[1] - self.means[0]) / spread if spread > 0 else 0.0

    def posterior(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return the probability that each of (N,) numbers is of the upper component; NaN for NaN."""
        posterior = np.empty(values.size)
        parameters = (np.array(self.weights), np.array(self.means), np.array(self.variances))
        for rows in chunks(values.size):
            numbers = np.maximum(np.asarray(values[rows], dtype=np.float64), self.means[0])
            if 0.0 in self.weights:
                posterior[rows] = np.where(np.isnan(numbers), np.nan, self.weights[1])
                continue
            joint = _log_joint(_inside(numbers, self.family), *parameters, self.family)
            with np.errstate(invalid="ignore"):  # NaN stays NaN
                posterior[rows] = np.exp(joint[1] - np.logaddexp(joint[0], joint[1]))
        return posterior


def fit_mixture(values: NDArray[Any], family: Family = "normal") -> Mixture:
    """Fit two distributions to numbers.

    Equal numbers, or a single one, are all of the lower component.

    Args:
        values: (N,) finite numbers in the range of float32, N at least 1; in [0, 1] for beta distributions.
        family: "normal" or "beta".

    Raises:
        DataError: no numbers, or one that is NaN, infinite or out of range.

    >>> mixture = fit_mixture(np.array([0.0, 0.1, 0.2, 5.0, 5.1]))
    >>> np.round(mixture.weights, 3).tolist(), np.round(mixture.means, 3).tolist()
    ([0.6, 0.4], [0.1, 5.05])
    """
    if not values.size or not np.isfinite(values).all():
        raise DataError("a mixture is fitted to numbers: leave out samples whose value is NaN or infinite")
    if family == "beta" and not 0.0 <= values.min() <= values.max() <= 1.0:
        raise DataError("beta distributions are fitted to numbers in [0, 1]: scale the others")
    bins, variances_U, counts_U = _binned(np.sort(_inside(values.astype(np.float64), family)))
    shares = counts_U / counts_U.sum()
    center = float(shares @ bins)
    scale = math.sqrt(float(shares @ ((bins - center) ** 2 + variances_U)))
    if scale <= 1e-12 * max(abs(center), np.finfo(np.float64).tiny):
        return Mixture((1.0, 0.0), (center, center), (0.0, 0.0), family)
    if family == "beta":
        center, scale = 0.0, 1.0
    fits = [_em((bins - center) / scale, variances_U / scale**2, shares, cut, family) for cut in _STARTS]
    _, weights, means, variances = max(fits, key=lambda fit: fit[0])
    order = [0, 1] if means[0] <= means[1] else [1, 0]
    means, variances = means * scale + center, variances * scale**2
    pairs = [(float(each[order[0]]), float(each[order[1]])) for each in (weights, means, variances)]
    return Mixture(pairs[0], pairs[1], pairs[2], family)


def _inside(values: NDArray[np.float64], family: Family) -> NDArray[np.float64]:
    return np.clip(values, _BETA_EDGE, 1.0 - _BETA_EDGE) if family == "beta" else values


def _binned(ordered: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return mean, variance and count of at most MAX_BINS bins of sorted numbers, (U,) each."""
    if ordered.size <= MAX_BINS:
        return ordered, np.zeros(ordered.size), np.ones(ordered.size, dtype=np.int64)
    starts = np.arange(MAX_BINS, dtype=np.int64) * ordered.size // MAX_BINS
    counts = np.diff(starts, append=ordered.size)
    means = np.add.reduceat(ordered, starts) / counts
    variances = np.add.reduceat((ordered - np.repeat(means, counts)) ** 2, starts) / counts
    return means, variances, counts


_Fit = tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _em(
    bins: NDArray[np.float64], within: NDArray[np.float64], shares: NDArray[np.float64], cut: float, family: Family
) -> _Fit:
    """Return the mean log-likelihood, and weights, means and variances, (2,) each, from a start cut at a quantile."""
    upper = np.cumsum(shares) > cut
    upper[-1], upper[0] = True, False
    center = shares @ bins
    least = _LEAST_VARIANCE * float(shares @ ((bins - center) ** 2 + within))
    posteriors = np.stack([~upper, upper]).astype(np.float64)
    means, variances, last = np.zeros(2), np.ones(2), -np.inf
    for _ in range(_MAX_ITERATIONS):
        parts = posteriors * shares
        weights = parts.sum(axis=1)
        empty, divisors = weights < np.finfo(np.float64).eps, np.maximum(weights, np.finfo(np.float64).tiny)
        means = np.where(empty, means, parts @ bins / divisors)
        squares = (bins - means[:, None]) ** 2 + within
        variances = np.where(empty, variances, np.maximum((parts * squares).sum(axis=1) / divisors, least))
        joint = _log_joint(bins, weights / weights.sum(), means, variances, family)
        total = np.logaddexp(joint[0], joint[1])
        likelihood = float(shares @ total)
        if abs(likelihood - last) < _TOLERANCE:
            break
        posteriors, last = np.exp(joint - total), likelihood
    return likelihood, weights / weights.sum(), means, variances


def _log_joint(
    values: NDArray[np.float64], weights: NDArray[Any], means: NDArray[Any], variances: NDArray[Any], family: Family
) -> NDArray[np.float64]:
    """Return ln w_k + ln f_k(x), (2, U)."""
    with np.errstate(divide="ignore"):
        offsets = np.log(weights)
    joint: NDArray[np.float64]
    if family == "normal":
        offsets -= 0.5 * np.log(2 * np.pi * variances)
        joint = offsets[:, None] - (values - means[:, None]) ** 2 / (2 * variances[:, None])
        return joint
    total = np.maximum(means * (1 - means) / variances - 1, 1e-3)  # α + β
    alpha, beta = means * total, (1 - means) * total
    for k in range(2):
        offsets[k] += math.lgamma(total[k]) - math.lgamma(alpha[k]) - math.lgamma(beta[k])
    joint = offsets[:, None] + (alpha - 1)[:, None] * np.log(values) + (beta - 1)[:, None] * np.log1p(-values)
    return joint
