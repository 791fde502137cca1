"""K-means of numbers: the partition into intervals with the least sum of squares, without random starts.

Dynamic programming over sorted values is exact (Wang and Song, The R Journal 2011). Up to 2,048 numbers are used as
they are. More are first put in bins of a relative width of 2^-11, or wider ones until at most 2,048 bins hold a number;
only the edges between groups are then rounded to edges of bins, as every bin's own sum of squares counts.

Shapes: N numbers, U bins that hold a number, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.table import chunks

_MAX_BINS = 2048
_SHIFT = np.uint32(12)  # float32 has 23 bits of mantissa: the upper 11 remain

_Binning = Callable[[NDArray[np.float32]], NDArray[Any]]


def kmeans_1d(values: NDArray[np.float32], num_groups: int) -> NDArray[np.uint8]:
    """Return the group of each number, (N,), counted from 0 in ascending order.

    Args:
        values: (N,) finite.
        num_groups: G, in [1, 255]; with fewer distinct numbers, every number is a group.

    >>> kmeans_1d(np.array([0.1, 9.0, 0.2, 5.0, 5.5], dtype=np.float32), 3).tolist()
    [0, 2, 0, 1, 1]
    """
    if not values.size:
        return np.zeros(0, dtype=np.uint8)
    bin_of, num_bins = _binning(values)
    counts, sums, squares = np.zeros((3, num_bins))
    # Small numbers instead of large ones with small differences, whose squares would cancel.
    center = values.mean(dtype=np.float64)
    for rows in chunks(values.size):
        bins, centered = bin_of(values[rows]), values[rows].astype(np.float64) - center
        counts += np.bincount(bins, minlength=num_bins)
        sums += np.bincount(bins, weights=centered, minlength=num_bins)
        squares += np.bincount(bins, weights=centered**2, minlength=num_bins)
    starts = _best_starts(counts, sums, squares, min(num_groups, num_bins))
    group_of_bin = np.searchsorted(starts, np.arange(num_bins), side="right").astype(np.uint8) - np.uint8(1)
    groups = np.empty(values.size, dtype=np.uint8)
    for rows in chunks(values.size):
        groups[rows] = group_of_bin[bin_of(values[rows])]
    return groups


def _binning(values: NDArray[np.float32]) -> tuple[_Binning, int]:
    """Return a function from numbers to their bins in ascending order, and the number of bins."""
    if values.size <= _MAX_BINS:
        distinct = np.unique(values)
        return lambda some: np.searchsorted(distinct, some), distinct.size
    used: NDArray[np.bool_] = np.zeros(1 << (32 - int(_SHIFT)), dtype=bool)
    for rows in chunks(values.size):
        used[_sortable(values[rows]) >> _SHIFT] = True
    shift = int(_SHIFT)
    while np.count_nonzero(used) > _MAX_BINS:
        used, shift = used[0::2] | used[1::2], shift + 1
    rank = np.cumsum(used) - 1
    return lambda some: rank[_sortable(some) >> np.uint32(shift)], int(np.count_nonzero(used))


def _sortable(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return integers in the order of the numbers; equal steps of them are about equal steps of the logarithm."""
    bits = (values + np.float32(0.0)).view(np.uint32)  # −0 becomes 0
    sign = np.uint32(1 << 31)
    ordered: NDArray[np.uint32] = np.where(bits & sign, ~bits, bits | sign)
    return ordered


def _best_starts(
    counts: NDArray[np.float64], sums: NDArray[np.float64], squares: NDArray[np.float64], num_groups: int
) -> NDArray[np.int64]:
    """Return the first bin of each group, (G,), for the least total sum of squares about the groups' means."""
    n, s, q = (np.concatenate([[0.0], np.cumsum(each)]) for each in (counts, sums, squares))
    starts, ends = np.arange(n.size - 1)[:, None], np.arange(1, n.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        # (U, U): the sum of squares of the bins from a start to an end, both included.
        costs = (q[ends] - q[starts]) - (s[ends] - s[starts]) ** 2 / (n[ends] - n[starts])
    costs = np.where(starts < ends, np.maximum(costs, 0.0), np.inf)
    best, firsts = costs[0], []
    for _ in range(1, num_groups):
        # A new group starts at `start`; all bins before it are in earlier groups.
        totals = np.concatenate([[np.inf], best[:-1]])[:, None] + costs
        firsts.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    found, end = [], n.size - 2
    for first in reversed(firsts):
        found.append(int(first[end]))
        end = found[-1] - 1
    return np.array([0, *reversed(found)], dtype=np.int64)
