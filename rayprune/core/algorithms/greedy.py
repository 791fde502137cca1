"""Greedy orders of vectors: farthest-first traversal, herding, and highest value with discounts for neighbors.

Each takes one point after the other, and the lowest of equally good ones. `by_class` and `at_random` divide the samples
and the number to take, so that the orders can be made part by part.

Shapes: N samples, n of them as Points, d numbers of a vector, m to take, K points of a pool, k neighbors.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, distances_to_row, nearest, rows_by_label, single, squared_lengths
from rayprune.core.choosing import Balance, quotas
from rayprune.core.table import Ids

_POOL_NUMBERS = 1 << 19  # of float64 in the pool of farthest-first traversal: 4 MiB
_ROWS = 1024  # rows of each factor in one matrix product
_WIDER = 4
_TAKEN = np.float32(-1.0)


def by_class(rows: Ids, count: int, labels: NDArray[np.integer[Any]] | None, balance: Balance) -> list[tuple[Ids, int]]:
    """Divide a count among classes.

    Args:
        rows: (n,) ids, ascending.
        count: m ≤ n.
        labels: (N,) integers, needed to balance.
        balance: "proportional" or "even" quotas; "none" leaves the samples together.

    Returns:
        The ascending ids of each class and its count, at least 1; classes without a count are left out.

    >>> [(ids.tolist(), m) for ids, m in by_class(np.arange(4), 2, np.array([1, 0, 1, 0]), "even")]
    [([1, 3], 1), ([0, 2], 1)]
    """
    if balance == "none" or labels is None:
        return [(rows, count)]
    groups = [rows[own] for own in rows_by_label(labels[rows])]
    return _with_counts(groups, quotas(np.array([group.size for group in groups]), count, balance))


def at_random(size: int, count: int, num_parts: int, rng: np.random.Generator) -> list[tuple[Ids, int]]:
    """Divide positions in [0, size) into equal parts at random, and a count in proportion.

    Returns:
        The ascending positions of each part and its count, at least 1; parts without a count are left out.
    """
    if num_parts < 2:
        return [(np.arange(size), count)]
    parts = [np.sort(part) for part in np.array_split(rng.permutation(size), min(num_parts, size))]
    return _with_counts(parts, quotas(np.array([part.size for part in parts]), count, "proportional"))


def _with_counts(groups: list[Ids], counts: NDArray[np.int64]) -> list[tuple[Ids, int]]:
    return [(group, count) for group, count in zip(groups, counts.tolist(), strict=True) if count]


def farthest_first(points: Points, count: int, start: int | None = None) -> tuple[Ids, NDArray[np.float32]]:
    """Take the point that is farthest from all taken ones, again and again (Gonzalez 1985).

    The exact order, without a pass over all points for each one taken. Distances to the taken points only fall, so an
    old distance is an upper bound. A pool holds the points with the largest bounds, brought up to date; while its
    farthest point is at least as far as every bound outside, it is the farthest of all. Each distance is computed at
    most about once: n·m·d steps in products of matrices at worst.

    Args:
        points: n of them.
        count: m, in [1, n].
        start: the position to take first; by default the point nearest the mean.

    Returns:
        (m,) positions in the order in which they are taken, and (m,) the distance of each to the nearest one before it,
        which never grows; infinity for the first.

    >>> farthest_first(Points(np.array([[0.0], [1.0], [5.0], [3.0]], np.float32)), 3, start=0)[0].tolist()
    [0, 2, 3]
    """
    num = len(points)
    order, radii = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)
    order[0] = int(points.distances_to(points.mean()).argmin()) if start is None else start
    radii[0] = np.inf
    # An upper bound on the distance to the points taken so far, and how many of them it takes into account.
    bound = np.full(num, np.inf, dtype=np.float32)
    known = np.zeros(num, dtype=np.int32)
    bound[order[0]] = _TAKEN
    taken, pool_size = 1, max(1, _POOL_NUMBERS // points.width)
    size = wide = num  # every bound is infinite
    while taken < count:
        pool, outside, rival = _farthest(bound, size)
        _update(points, pool[known[pool] < taken], bound, known, order[:taken])
        if size > pool_size:
            size = pool_size
            continue
        before, block, current = taken, points.read(pool), bound[pool]
        squares = squared_lengths(block)
        while taken < count:
            best = int(current.argmax())
            if current[best] < outside or (current[best] == outside and pool[best] > rival):
                break
            order[taken], radii[taken] = pool[best], current[best]
            taken += 1
            current = np.minimum(current, distances_to_row(block, squares, best))
            current[best] = _TAKEN
        bound[pool], known[pool] = current, taken
        # Most bounds are out of date when none of the pool is far enough: bring more of them up to date at once.
        size = wide = pool_size if taken > before else wide * _WIDER
    return order, radii


def _farthest(bound: NDArray[np.float32], size: int) -> tuple[Ids, float, int]:
    """Return the ascending positions of the largest bounds, the largest bound outside, and its lowest position."""
    left = np.flatnonzero(bound >= 0)
    if left.size <= size:
        return left, -1.0, bound.size
    values = bound[left]
    level = np.partition(values, left.size - size)[left.size - size]
    above, tied = values > level, np.flatnonzero(values == level)
    room = size - int(np.count_nonzero(above))
    above[tied[:room]] = True
    rest = np.where(above, _TAKEN, values)
    rival = int(rest.argmax())
    return left[above], float(rest[rival]), int(left[rival])


def _update(points: Points, rows: Ids, bound: NDArray[np.float32], known: NDArray[np.int32], taken: Ids) -> None:
    """Bring the bounds of some rows up to date with the taken points."""
    for first in range(0, rows.size, _ROWS):
        part = rows[first : first + _ROWS]
        block = points.read(part)
        for start in range(int(known[part].min()), taken.size, _ROWS):
            stop = min(start + _ROWS, taken.size)
            behind = known[part] < stop
            distances = nearest(block[behind], points.read(taken[start:stop]))[1]
            bound[part[behind]] = np.minimum(bound[part[behind]], distances)
        known[part] = taken.size


def herding(points: Points, shares: list[tuple[Ids, int]]) -> Iterator[Ids]:
    """Take the points whose sum stays nearest a multiple of the mean (Welling, ICML 2009).

    The (i+1)-th point is argmin_x ‖(i + 1)·μ − Σ_{s taken} s − x‖, without replacement, in n·d steps for each point.

    Args:
        points: n of them, with mean μ.
        shares: ascending positions that take turns and how many of each to take. With one share of all points, this is
            herding itself; with more, each looks at its own points only, and makes up for what those before it left.

    Yields:
        The positions of each share, in the order in which they are taken.
    """
    mean = points.mean()
    rest = np.zeros(points.width)  # i·μ less the sum of the taken points
    for rows, count in shares:
        block = points.read(rows) - mean
        squares, taken = squared_lengths(block), np.zeros(rows.size, dtype=bool)
        order = np.empty(count, dtype=np.int64)
        for position in range(count):
            apart = single(np.sqrt(np.maximum(squares - 2.0 * (block @ rest) + rest @ rest, 0.0)))
            apart[taken] = np.inf  # above the largest number, to which `single` rounds
            best = int(np.argmin(apart))
            order[position], taken[best] = rows[best], True
            rest -= block[best]
        yield order


def highest_with_discounts(
    values: NDArray[np.float64],
    count: int,
    starts: NDArray[np.int64],
    neighbors: NDArray[np.integer[Any]],
    discounts: NDArray[np.float64],
    *,
    relative: bool,
) -> Ids:
    """Take the point of the highest value, lower the values of its neighbors, and so on.

    Args:
        values: (n,) finite.
        count: m ≤ n.
        starts: (n + 1,) where each point's neighbors start in the next two arrays.
        neighbors: positions.
        discounts: what a neighbor's value falls by when the point is taken.
        relative: discounts are shares of the taken point's current value.

    Returns:
        (m,) positions in the order in which they are taken.

    >>> edges = np.array([0, 1, 1, 1]), np.array([1]), np.array([0.5])
    >>> highest_with_discounts(np.array([3.0, 2.8, 2.5]), 2, *edges, relative=False).tolist()
    [0, 2]
    """
    current, order = values.copy(), np.empty(count, dtype=np.int64)
    taken = np.zeros(values.size, dtype=bool)
    # An entry of the heap may be too high: it is put back with its current value when it comes up.
    heap = list(zip((-current).tolist(), range(values.size), strict=True))
    heapq.heapify(heap)
    for position in range(count):
        while True:
            value, best = heapq.heappop(heap)
            if taken[best]:
                continue
            if -value == current[best]:
                break
            heapq.heappush(heap, (-float(current[best]), best))
        order[position], taken[best] = best, True
        edges = slice(starts[best], starts[best + 1])
        near, change = neighbors[edges], discounts[edges] * (current[best] if relative else 1.0)
        current[near] -= change
        for other in near[(change < 0) & ~taken[near]]:  # values that rise need an entry at once
            heapq.heappush(heap, (-float(current[other]), int(other)))
    return order
