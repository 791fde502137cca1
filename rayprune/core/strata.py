"""A draw that covers the range of scores: the strata of CCS.

Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023, arXiv 2210.15809: S bins of equal
width from the lowest score to just above the highest, each with the same budget as far as it has samples, and a uniform
draw inside. Deviation: the reference's upper edge, max·1.0001, lies below the maximum where all scores are negative and
loses that sample; here the maximum is always in the last bin.

Shapes: R rows, M drawn, S strata.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def strata_budgets(sizes: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    """Return how many CCS draws from each stratum: min(size, rest // strata left), smallest stratum first.

    Args:
        sizes: (S,) integers; empty strata count as strata left.
        count: in [0, sum of sizes].

    Returns:
        (S,) int64 with sum `count`.

    >>> strata_budgets(np.array([1, 0, 9, 9]), 8).tolist()
    [1, 0, 3, 4]
    """
    budgets = np.zeros(len(sizes), dtype=np.int64)
    rest = count
    for position, stratum in enumerate(np.argsort(sizes, kind="stable")):
        budgets[stratum] = min(int(sizes[stratum]), rest // (len(sizes) - position))
        rest -= int(budgets[stratum])
    return budgets


def draw_strata(
    rows: NDArray[np.int64],
    values: NDArray[np.float64],
    count: int,
    num_strata: int,
    rng: np.random.Generator,
    reweigh: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw rows so that every part of the range of values is covered.

    Args:
        rows: (R,) ids, in ascending order of their values.
        values: (R,) finite numbers, ascending.
        count: M, in [1, R].
        num_strata: S.
        rng: the generator of the draw.
        reweigh: refuse strata with samples of which none is drawn.

    Returns:
        (M,) of the rows, and for each its stratum's size over the number drawn from it, (M,) float64.

    Raises:
        ValueError: a stratum that cannot be weighed, or values too far apart.
    """
    ends = _strata_ends(values, num_strata)
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    budgets = strata_budgets(sizes, count)
    if reweigh and (empty := np.count_nonzero((budgets == 0) & (sizes > 0))):
        raise ValueError(
            f"{count} samples leave {empty} of {np.count_nonzero(sizes)} strata with none, which no weight makes up "
            "for: take fewer strata, keep more, or leave reweigh out"
        )
    drawn = [
        start + (np.arange(size) if budget == size else rng.choice(size, budget, replace=False, shuffle=False))
        for start, size, budget in zip(starts, sizes, budgets, strict=True)
    ]
    weights = np.repeat(sizes / np.maximum(budgets, 1), budgets)
    return rows[np.concatenate(drawn)], weights


def _strata_ends(values: NDArray[np.float64], num_strata: int) -> NDArray[np.int64]:
    """Return where each stratum of ascending values ends, (S,)."""
    low, high = values[0], values[-1] + 1e-4 * abs(values[-1])
    with np.errstate(over="ignore"):
        width = (high - low) / num_strata
    if not np.isfinite(width):
        raise ValueError(f"scores from {low:g} to {high:g} are too far apart for strata: scale them down")
    # The last stratum has no upper edge: nothing lies above it, whatever rounding does to high.
    inner = np.searchsorted(values, low + width * np.arange(1, num_strata), "left")
    return np.concatenate([inner, [values.size]]).astype(np.int64)
