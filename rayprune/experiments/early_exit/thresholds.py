"""Early exit by thresholds: find the thresholds for a budget on held-out samples, and evaluate them on others.

Budgeted batch classification of MSDNet (Huang, Chen, Li, Wu, van der Maaten, Weinberger, ICLR 2018, arXiv 1703.09844),
as evaluated in Learning to Weight Samples for Dynamic Early-exiting Networks (Han, Pu, Lai, Wang, Song, Cao, Huang,
Deng, Huang, ECCV 2022, arXiv 2209.08310). A sample leaves at the first exit whose threshold its confidence reaches.

Two deliberate deviations from the reference program. Samples that tie with the last one of an exit's quota leave with
it, so fewer samples than its quota may remain for a later exit; all of them leave there, where the reference lets none
leave. A threshold that no sample reaches is +inf and one that all reach is −inf, where the reference uses ±1e8.

Shapes: K exits, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.errors import ConfigError

Floats = NDArray[np.float32]

BUDGETS = tuple(range(1, 40))  # p of the papers: from nearly all samples at the first exit to nearly all at the last
_EVEN = 20  # the p with equal shares


def exit_shares(budget: int, num_exits: int) -> Floats:
    """Return the share of samples intended for each exit, P_k ∝ q^k with q = p/20.

    Args:
        budget: p, at least 1; 20 gives all exits the same share, smaller values favor early exits.
        num_exits: K, at least 2.

    Returns:
        (K,) float32 with a sum of 1. Computed in single precision, as quotas are rounded down from these numbers; the
        reference's logarithm and exponential are not rounded correctly, so its shares differ in the last place.

    Raises:
        ConfigError: a value outside its range.

    >>> exit_shares(20, 4).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if budget < 1:
        raise ConfigError(f"budget must be at least 1, got {budget}")
    if num_exits < 2:
        raise ConfigError(f"num_exits must be at least 2, got {num_exits}")
    # Compute each step in float64, then round: NumPy's float32 functions differ between processors.
    log_q = np.float32(np.log(np.float64(np.float32(budget / _EVEN))))
    exponents = (log_q * np.arange(1, num_exits + 1, dtype=np.float32)).astype(np.float64)
    powers: Floats = np.exp(exponents).astype(np.float32)
    return powers / np.cumsum(powers)[-1]  # summed in order, as in the reference; `sum` adds pairwise


def exit_quotas(budget: int, num_exits: int, num_samples: int) -> NDArray[np.int64]:
    """Return how many of n samples are intended for each exit: floor(n·P_k), and the remainder for the last.

    Returns:
        (K,) int64, with a sum of n.

    >>> exit_quotas(15, 5, 512).tolist()
    [167, 125, 94, 70, 56]
    """
    quotas: NDArray[np.int64] = np.floor(np.float32(num_samples) * exit_shares(budget, num_exits)).astype(np.int64)
    quotas[-1] = num_samples - quotas[:-1].sum()
    return quotas


def find_thresholds(confidences_KN: Floats, budget: int) -> Floats:
    """Return the lowest confidence at which a sample leaves at each exit.

    At every exit but the last, the threshold is the confidence of the floor(n·P_k)-th most confident sample that has
    not left yet. Samples with the same confidence leave too. At an exit whose quota is 0, no sample leaves.

    Args:
        confidences_KN: (K, N) float32 largest softmax probabilities of samples that the network was not trained on.
        budget: p.

    Returns:
        (K,) float32: +inf where no sample leaves, −inf at the last exit.

    Raises:
        ConfigError: there is no sample, or a confidence is NaN.

    >>> find_thresholds(np.array([[0.9, 0.9, 0.9, 0.6]] * 2, np.float32), 10).tolist()
    [0.8999999761581421, -inf]
    """
    num_exits, num_samples = confidences_KN.shape
    if num_samples == 0:
        raise ConfigError("thresholds need at least one sample: hold out more with data.hold_out")
    if num_nan := int(np.isnan(confidences_KN).any(axis=0).sum()):
        raise ConfigError(
            f"the network returns NaN for {num_nan} of {num_samples} samples: train again with a lower learning rate"
        )
    quotas = exit_quotas(budget, num_exits, num_samples)
    thresholds = np.full(num_exits, np.inf, np.float32)
    remaining = np.arange(num_samples)
    for exit_, quota in enumerate(quotas[:-1]):
        confidences = confidences_KN[exit_, remaining]
        if num_leaving := min(int(quota), remaining.size):
            place = remaining.size - num_leaving
            thresholds[exit_] = np.partition(confidences, place)[place]
            remaining = remaining[confidences < thresholds[exit_]]
    thresholds[-1] = -np.inf
    return thresholds


def chosen_exits(confidences_KN: Floats, thresholds_K: Floats) -> NDArray[np.int64]:
    """Return the exit that classifies each sample: the first whose threshold it reaches, else the last.

    Args:
        confidences_KN: (K, N) float32.
        thresholds_K: (K,) float32.

    Returns:
        (N,) int64 in [0, K).
    """
    reached: NDArray[np.bool_] = confidences_KN >= thresholds_K[:, None]
    reached[-1] = True  # for any confidence, including NaN
    exits: NDArray[np.int64] = reached.argmax(axis=0)
    return exits


@dataclass(frozen=True)
class DynamicResult:
    """The result of thresholds on a set of samples.

    Attributes:
        accuracy: in [0, 1].
        shares: (K,) float64, the fraction of the samples that left at each exit.
        cost: mean cost of a sample, Σ share_k·cost_k.
    """

    accuracy: float
    shares: NDArray[np.float64]
    cost: float


def evaluate_dynamic(
    confidences_KN: Floats, correct_KN: NDArray[np.bool_], thresholds_K: Floats, costs_K: NDArray[np.float64]
) -> DynamicResult:
    """Return the accuracy, exit shares and mean cost of samples that leave by thresholds.

    Args:
        confidences_KN: (K, N) float32, N ≥ 1.
        correct_KN: (K, N) bool, whether each exit's prediction is correct.
        thresholds_K: (K,) float32, from `find_thresholds`.
        costs_K: (K,) float64, the cost of a sample that leaves at exit k, including the exits before it.

    >>> confidences = np.array([[0.9, 0.5], [0.9, 0.7]], np.float32)
    >>> correct = np.array([[True, False], [True, True]])
    >>> evaluate_dynamic(confidences, correct, np.array([0.8, -np.inf], np.float32), np.array([10.0, 30.0])).cost
    20.0
    """
    num_exits, num_samples = confidences_KN.shape
    exits = chosen_exits(confidences_KN, thresholds_K)
    shares = np.bincount(exits, minlength=num_exits) / num_samples
    accuracy = correct_KN[exits, np.arange(num_samples)].mean()
    return DynamicResult(float(accuracy), shares, float(shares @ costs_K))
