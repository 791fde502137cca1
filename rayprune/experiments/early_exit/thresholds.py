"""Leaving a network early: thresholds for a budget, found on samples held out, and what they give on others.

Budgeted batch classification of MSDNet (Huang, Chen, Li, Wu, van der Maaten, Weinberger, ICLR 2018, arXiv 1703.09844),
as Learning to Weight Samples for Dynamic Early-exiting Networks evaluates it (Han, Pu, Lai, Wang, Song, Cao, Huang,
Deng, Huang, ECCV 2022, arXiv 2209.08310). A sample leaves at the first exit that is as confident as its threshold.

Two deliberate differences: samples that tie with the last one of an exit's quota leave with it, so that fewer than the
quota may be left for a later exit; there all of them leave, where the reference then lets nobody out. And "nobody" is
+inf and "everybody" −inf, where the reference has ±1e8.

Shapes: P budgets, K exits, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.errors import ConfigError

Floats = NDArray[np.float32]

BUDGETS = tuple(range(1, 40))  # p of the papers: from nearly all at the first exit to nearly all at the last
_EVEN = 20  # the p with as many samples at every exit


def exit_shares(budget: int, num_exits: int) -> Floats:
    """Return the share of samples that each exit is to answer, P_k ∝ q^k with q = p/20.

    Args:
        budget: p, at least 1; 20 gives all exits the same share, less favours early ones.
        num_exits: K, at least 2.

    Returns:
        (K,) float32, with a sum of 1, computed in single precision: quotas are cut from such numbers. The reference's
        logarithm and exponential are not rounded correctly, so that its shares differ in the last place.

    Raises:
        ConfigError: a value outside its range.

    >>> exit_shares(20, 4).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if budget < 1:
        raise ConfigError(f"budget must be at least 1, got {budget}")
    if num_exits < 2:
        raise ConfigError(f"num_exits must be at least 2, got {num_exits}")
    # Each step in float64 and then rounded: NumPy's own float32 functions differ from one processor to another.
    log_q = np.float32(np.log(np.float64(np.float32(budget / _EVEN))))
    exponents = (log_q * np.arange(1, num_exits + 1, dtype=np.float32)).astype(np.float64)
    powers: Floats = np.exp(exponents).astype(np.float32)
    total = np.float32(0)
    for power in powers:
        total += power
    return powers / total


def exit_quotas(budget: int, num_exits: int, num_samples: int) -> NDArray[np.int64]:
    """Return how many of n samples each exit is to answer: floor(n·P_k), and what is left for the last.

    Returns:
        (K,) int64, with a sum of n.

    >>> exit_quotas(15, 5, 512).tolist()
    [167, 125, 94, 70, 56]
    """
    quotas: NDArray[np.int64] = np.floor(np.float32(num_samples) * exit_shares(budget, num_exits)).astype(np.int64)
    quotas[-1] = num_samples - quotas[:-1].sum()
    return quotas


def find_thresholds(confidences_KN: Floats, budget: int) -> Floats:
    """Return the confidence from which on a sample leaves at each exit.

    At every exit but the last, the threshold is the confidence of the floor(n·P_k)-th most confident of the samples
    that have not left yet; whoever is as confident leaves, ties included. An exit whose quota is 0 lets nobody out.

    Args:
        confidences_KN: (K, N) float32 largest softmax probabilities of samples that the network was not trained on.
        budget: p.

    Returns:
        (K,) float32: +inf lets nobody out, the last is −inf.

    Raises:
        ConfigError: no sample, or a confidence that is NaN.

    >>> find_thresholds(np.array([[0.9, 0.9, 0.9, 0.6]] * 2, np.float32), 10).tolist()
    [0.8999999761581421, -inf]
    """
    num_exits, num_samples = confidences_KN.shape
    if num_samples == 0:
        raise ConfigError("thresholds need at least one sample that was held out")
    if not_numbers := int(np.isnan(confidences_KN).any(axis=0).sum()):
        raise ConfigError(f"the network is NaN for {not_numbers} of {num_samples} samples: train again at a lower rate")
    quotas = exit_quotas(budget, num_exits, num_samples)
    thresholds = np.full(num_exits, np.inf, np.float32)
    left = np.arange(num_samples)
    for exit_, quota in enumerate(quotas[:-1]):
        confidences = confidences_KN[exit_, left]
        taken = min(int(quota), left.size)
        if taken:
            place = left.size - taken
            thresholds[exit_] = np.partition(confidences, place)[place]
            left = left[confidences < thresholds[exit_]]
    thresholds[-1] = -np.inf
    return thresholds


def chosen_exits(confidences_KN: Floats, thresholds_K: Floats) -> NDArray[np.int64]:
    """Return the exit that answers each sample: the first whose threshold it reaches, else the last.

    Args:
        confidences_KN: (K, N) float32.
        thresholds_K: (K,) float32.

    Returns:
        (N,) int64 in [0, K).
    """
    reached: NDArray[np.bool_] = confidences_KN >= thresholds_K[:, None]
    reached[-1] = True  # whatever its confidence, one that is NaN included
    exits: NDArray[np.int64] = reached.argmax(axis=0)
    return exits


@dataclass(frozen=True)
class Dynamic:
    """What thresholds give on a set of samples.

    Attributes:
        accuracy: in [0, 1].
        shares: (K,) float64, what part of the samples left at each exit.
        cost: the mean of what the samples cost, Σ share_k·cost_k.
    """

    accuracy: float
    shares: NDArray[np.float64]
    cost: float


def evaluate_dynamic(
    confidences_KN: Floats, correct_KN: NDArray[np.bool_], thresholds_K: Floats, costs_K: NDArray[np.float64]
) -> Dynamic:
    """Return accuracy, exit shares and mean cost of samples that leave by thresholds.

    Args:
        confidences_KN: (K, N) float32, N ≥ 1.
        correct_KN: (K, N) bool, whether each exit's answer is right.
        thresholds_K: (K,) float32, of `find_thresholds`.
        costs_K: (K,) float64, cumulative: what a sample has cost that leaves at exit k.

    >>> confidences = np.array([[0.9, 0.5], [0.9, 0.7]], np.float32)
    >>> correct = np.array([[True, False], [True, True]])
    >>> evaluate_dynamic(confidences, correct, np.array([0.8, -np.inf], np.float32), np.array([10.0, 30.0])).cost
    20.0
    """
    num_exits, num_samples = confidences_KN.shape
    exits = chosen_exits(confidences_KN, thresholds_K)
    shares = np.bincount(exits, minlength=num_exits) / num_samples
    accuracy = correct_KN[exits, np.arange(num_samples)].mean()
    return Dynamic(float(accuracy), shares, float(shares @ costs_K))
