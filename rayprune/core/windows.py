"""A windowed shuffle, for rows that are expensive to read one by one: rows of a group lie together in storage.

The groups are shuffled, the rows within each group too; then consecutive groups are mixed in windows of whole global
batches. Every window holds rows of at least MIN_GROUPS groups that begin in it (where so many have a kept row), and
the rows that do not fill its last batch go on into the next window: they are rows of its last group, so that only that
one is read for two windows.

Shapes: N samples, M kept, G groups, K groups with a kept row, V windows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_GROUPS = 8


def windowed(
    order: NDArray[Any], groups: NDArray[np.int64], batch_size: int, window_rows: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Shuffle kept ids in place, in windows of groups.

    Args:
        order: (M,) kept ids, ascending.
        groups: (G+1,) boundaries of the groups, from 0 to N.
        batch_size: windows end between global batches of this size.
        window_rows: a window takes as many groups as have together at most this many rows in storage, kept or not:
            that bounds what must be held to read each group once. At least MIN_GROUPS, however large they are.
        rng: of the order.

    Returns:
        (V,) where the windows end, ascending; the last is M, the others are multiples of batch_size. Empty for M = 0.
    """
    starts = np.searchsorted(order, groups)
    kept = np.flatnonzero(np.diff(starts))
    if kept.size == 0:
        return np.empty(0, dtype=np.int64)
    shuffled = kept[rng.permutation(kept.size)]
    ascending, filled = order.copy(), 0
    for group in shuffled:
        rows = order[filled : filled + starts[group + 1] - starts[group]]
        rows[:] = ascending[starts[group] : starts[group + 1]]
        rng.shuffle(rows)
        filled += rows.size
    stops = _window_stops(np.diff(starts)[shuffled], np.diff(groups)[shuffled], batch_size, window_rows)
    for start, stop in pairwise([0, *stops]):
        rng.shuffle(order[start:stop])
    return np.array(stops, dtype=np.int64)


def _window_stops(kept_K: NDArray[Any], stored_K: NDArray[Any], batch_size: int, window_rows: int) -> list[int]:
    """Return where the windows end, for the kept and the stored rows of each group in the shuffled order."""
    ends = np.cumsum(kept_K)
    begins = ends - kept_K
    stored = np.concatenate([[0], np.cumsum(stored_K)])
    stops: list[int] = []
    stop = 0
    while stop < ends[-1]:
        first = int(np.searchsorted(begins, stop))  # the first group that begins in this window
        fitting = int(np.searchsorted(stored, stored[first] + window_rows, side="right")) - 1
        last = min(max(first + MIN_GROUPS, fitting), ends.size) - 1
        # Whole batches, still with a row of the last group: where it is smaller than a batch, the next ones give some.
        whole = int(ends[last] - ends[last] % batch_size)
        stop = whole if whole > begins[last] else whole + batch_size
        if np.searchsorted(begins, stop) + MIN_GROUPS > ends.size:
            stop = int(ends[-1])  # too few groups are left for a window of their own
        stops.append(stop)
    return stops


def rows_of_groups(ids: NDArray[Any], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all rows of the groups that hold some of the ids, ascending.

    >>> rows_of_groups(np.array([5, 4]), np.array([0, 2, 4, 7])).tolist()
    [4, 5, 6]
    """
    touched = np.unique(np.searchsorted(groups, ids, side="right") - 1)
    return np.concatenate([np.arange(groups[group], groups[group + 1]) for group in touched])
