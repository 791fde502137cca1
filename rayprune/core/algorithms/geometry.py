"""Distances, nearest neighbors, clusters and class centers of vectors, block by block.

The vectors of a forward-only pass are an (N, d) memory map of float16 or float32. Blocks of its rows are converted to
float64, so nothing here needs memory for all N·d numbers or for N² distances.

Distances come from matrix products, ‖x‖² + ‖y‖² − 2x·y, in float64. Two rules keep rounding errors out of the choices:
a distance that is below the product's error bound is 0, and distances are rounded to float32 before they are compared.
Equal vectors are therefore equally far from any third one, and ties go to the lower position.

Shapes: N samples, n of them as Points, d numbers of a vector, k neighbors or clusters, A and B rows of two blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.table import Ids

Center = Literal["median", "mean"]

_BLOCK_NUMBERS = 1 << 20  # of float64 in one block: 8 MiB
_MEDIAN_NUMBERS = 1 << 24  # of float64, whose medians are taken at once
_COLUMNS = 1024  # rows of the second factor in one matrix product
_QUARTILE_ROWS = 1 << 14  # whose quartiles are taken
_QUARTILES = 1.349  # the distance of the quartiles of a normal distribution, in standard deviations
_WINDOW = 1 << 16  # rows of a cluster that a row is compared with
_SEED_ROWS, _FIT_ROWS = 16, 256  # rows per cluster that k-means draws its first centers from, and is fitted on
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Points:
    """Some rows of an (N, d) array, read as float64.

    Args:
        array: (N, d) floating, usually a memory map; finite.
        rows: (n,) positions in the array, ascending; None for all.
        unit: divide every vector by its length; a vector of zeros stays.
    """

    def __init__(self, array: NDArray[Any], rows: Ids | None = None, *, unit: bool = False) -> None:
        # A range of all rows reads slices of the array instead of single rows.
        everything = rows is not None and rows.size == array.shape[0]
        self.array, self.rows, self.unit = array, None if everything else rows, unit

    def __len__(self) -> int:
        return int(self.array.shape[0] if self.rows is None else self.rows.size)

    @property
    def ids(self) -> Ids:
        """(n,) the rows."""
        return np.arange(len(self)) if self.rows is None else self.rows

    @property
    def width(self) -> int:
        """d."""
        return int(self.array.shape[1])

    def read(self, where: slice | Ids) -> NDArray[np.float64]:
        """Return the vectors at positions in [0, n), (A, d)."""
        vectors = np.array(self.array[where if self.rows is None else self.rows[where]], dtype=np.float64)
        if self.unit:
            vectors /= np.where((lengths := np.sqrt(squared_lengths(vectors))) > 0, lengths, 1.0)[:, None]
        return vectors

    def as_unit(self) -> Points:
        """Return the points divided by their lengths."""
        return Points(self.array, self.rows, unit=True)

    def subset(self, where: Ids) -> Points:
        """Return the points at ascending positions."""
        return Points(self.array, where if self.rows is None else self.rows[where], unit=self.unit)

    def blocks(self, width: int | None = None) -> Iterator[slice]:
        """Yield slices that cover [0, n), of few enough rows for a block of `width` columns, d by default."""
        size = max(1, _BLOCK_NUMBERS // max(width or self.width, 1))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def mean(self) -> NDArray[np.float64]:
        """Return the mean vector, (d,)."""
        total = np.zeros(self.width)
        for rows in self.blocks():
            total += self.read(rows).sum(axis=0)
        return total / max(len(self), 1)

    def distances_to(self, center: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the Euclidean distance of every point to one vector, (n,)."""
        distances = np.empty(len(self), dtype=np.float32)
        for rows in self.blocks():
            distances[rows] = single(np.sqrt(squared_lengths(self.read(rows) - center)))
        return distances


class Standardized(Points):
    """Vectors whose numbers have standard deviation 1/√d and median 0, so that lengths are about 1.

    The deviation is that of a normal distribution with the same quartiles: a single huge value must not make all others
    equal. Where the quartiles are equal, it is that of all values. A number that is the same in all vectors becomes 0.

    Args:
        array: (N, d) floating.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        super().__init__(array)
        drawn = np.unique(np.linspace(0, len(self) - 1, _QUARTILE_ROWS).astype(np.int64))
        low, self._center, high = np.percentile(super().read(drawn), (25, 50, 75), axis=0)
        self._scale = np.ones(self.width)
        squares = sum(np.square(self.read(rows)).sum(axis=0) for rows in self.blocks())
        deviation = np.where(high > low, (high - low) / _QUARTILES, np.sqrt(squares / len(self)))
        constant = deviation <= 1e-12 * np.abs(self._center)
        self._scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation)) / math.sqrt(self.width)

    def read(self, where: slice | Ids) -> NDArray[np.float64]:
        values: NDArray[np.float64] = (super().read(where) - self._center) * self._scale
        return values


def single(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round to float32; what is beyond its range becomes its largest number."""
    return np.minimum(values, _FLOAT32_MAX).astype(np.float32)


def nearest(left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[Ids, NDArray[np.float32]]:
    """Return the position of the nearest row of `right`, (A,), and its distance, (A,), for each row of `left`.

    Args:
        left: (A, d).
        right: (B, d), B ≥ 1.

    >>> nearest(np.array([[0.0, 1.0]]), np.array([[3.0, 1.0], [0.0, 3.0]]))
    (array([1]), array([2.], dtype=float32))
    """
    left_A, right_B = squared_lengths(left), squared_lengths(right)
    where_A = np.zeros(left_A.size, dtype=np.int64)
    best_A = np.full(left_A.size, np.inf)
    for start in range(0, right_B.size, _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        partial_AB = left @ (-2.0 * right[columns]).T
        partial_AB += right_B[columns]
        found_A = partial_AB.argmin(axis=1)
        value_A = np.take_along_axis(partial_AB, found_A[:, None], axis=1)[:, 0]
        better_A = value_A < best_A
        best_A[better_A], where_A[better_A] = value_A[better_A], found_A[better_A] + start
    return where_A, _distance(best_A + left_A, left_A, right_B[where_A], left.shape[1])


def distances_to_row(vectors: NDArray[np.float64], squares: NDArray[np.float64], row: int) -> NDArray[np.float32]:
    """Return the distances of (A, d) vectors, whose squared lengths are known, to one of them, (A,)."""
    apart = squares + squares[row] - 2.0 * (vectors @ vectors[row])
    return _distance(apart, squares, squares[row], vectors.shape[1])


def squared_lengths(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared lengths of (A, d) vectors, (A,)."""
    squares: NDArray[np.float64] = np.einsum("ad,ad->a", vectors, vectors)
    return squares


def _distance(squares: NDArray[np.float64], left: NDArray[np.float64], right: Any, width: int) -> NDArray[np.float32]:
    """Return the square roots of squared distances; 0 where they are within the product's rounding error."""
    return single(np.sqrt(np.where(squares > _error(left, right, width), squares, 0.0)))


def _error(left: NDArray[np.float64], right: Any, width: int) -> NDArray[np.float64]:
    """Return a bound on the rounding error of ‖x‖² + ‖y‖² − 2x·y.

    A scalar product of d numbers is exact up to d·2⁻⁵³·‖x‖‖y‖, and ‖x‖‖y‖ is at most the mean of ‖x‖² and ‖y‖².
    """
    error: NDArray[np.float64] = (width + 8) * 2.0**-52 * (left + right)
    return error


def nearest_neighbors(points: Points, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the nearest other points of each point: exact, in n²·d steps.

    Args:
        points: n of them.
        count: k; fewer if there are not so many other points.

    Returns:
        Positions (n, k) and distances (n, k), nearest first; of equally near points the lower ones.

    >>> nearest_neighbors(Points(np.array([[0.0], [1.0], [3.0]], np.float32)), 1)[0].tolist()
    [[1], [0], [1]]
    """
    num, count = len(points), min(count, len(points) - 1)
    ids = np.zeros((num, count), dtype=np.int32)
    distances = np.zeros((num, count), dtype=np.float32)
    if count:
        for rows in points.blocks(max(points.width, _COLUMNS)):
            ids[rows], distances[rows] = _neighbors_of(points, rows, count)
    return ids, distances


def nearest_cosines(points: Points, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the other points of the largest cosines, as `nearest_neighbors` does, and the cosines, (n, k)."""
    ids, distances = nearest_neighbors(points.as_unit(), count)
    cosines = 1.0 - np.square(distances.astype(np.float64)) / 2
    zero = np.concatenate([~points.read(rows).any(axis=1) for rows in points.blocks()])
    cosines[zero] = 0.0
    cosines[zero[ids]] = 0.0
    return ids, cosines.astype(np.float32)


def _neighbors_of(points: Points, rows: slice, count: int) -> tuple[Ids, NDArray[np.float32]]:
    left = points.read(rows)
    left_A = squared_lengths(left)
    # The k nearest among the columns so far, in ascending (distance, position).
    best_Ak = np.full((left_A.size, count), np.inf, dtype=np.float32)
    ids_Ak = np.full((left_A.size, count), len(points), dtype=np.int64)
    for start in range(0, len(points), _COLUMNS):
        right = points.read(slice(start, min(start + _COLUMNS, len(points))))
        right_B = squared_lengths(right)
        partial_AB = left @ (-2.0 * right).T
        partial_AB += right_B
        limit_A = best_Ak[:, -1].astype(np.float64) ** 2 - left_A
        if np.isinf(limit_A).any() and right_B.size > count:  # one more than k, as the point itself may be among them
            limit_A = np.minimum(limit_A, np.partition(partial_AB, count, axis=1)[:, count])
        # The margin covers rounding to float32 and to 0; what does not improve the list is sorted out afterward.
        limit_A += (left_A + np.abs(limit_A)) * 2.0**-20 + _error(left_A, right_B.max(), left.shape[1])
        limit_A[best_Ak[:, -1] == 0] = -np.inf
        near_A = np.flatnonzero(partial_AB.min(axis=1) <= limit_A)  # few rows, from the second block on
        row, column = np.nonzero(partial_AB[near_A] <= limit_A[near_A, None])
        row = near_A[row]
        squares = partial_AB[row, column] + left_A[row]
        found = _distance(squares, left_A[row], right_B[column], left.shape[1])
        # Later columns have higher positions, so an equal distance is no improvement.
        better = (found < best_Ak[row, -1]) & (row + rows.start != column + start)
        _merge(best_Ak, ids_Ak, row[better], column[better] + start, found[better])
    return ids_Ak, best_Ak


def _merge(best_Ak: NDArray[np.float32], ids_Ak: Ids, row: Ids, ids: Ids, distances: NDArray[np.float32]) -> None:
    """Insert candidates into the lists of the k nearest; `row` is ascending."""
    changed, size = np.unique(row, return_counts=True)
    count = best_Ak.shape[1]
    owner = np.concatenate([np.repeat(np.arange(changed.size), count), np.repeat(np.arange(changed.size), size)])
    values = np.concatenate([best_Ak[changed].ravel(), distances])
    all_ids = np.concatenate([ids_Ak[changed].ravel(), ids])
    order = np.lexsort((all_ids, values, owner))
    starts = np.cumsum(size + count) - (size + count)
    kept = order[starts[:, None] + np.arange(count)]
    best_Ak[changed], ids_Ak[changed] = values[kept], all_ids[kept]


def largest_cosines_before(points: Points, order: Ids) -> NDArray[np.float32]:
    """Return for each point in an order the largest cosine with those before it, at least 0; 0 for the first.

    Each is compared with the 65,536 before it at least, and with no more than a thousand others.

    Args:
        points: of unit length.
        order: (m,) positions.

    Returns:
        (m,) in [0, 1].
    """
    largest = np.zeros(order.size, dtype=np.float64)
    for start in range(0, order.size, _COLUMNS):
        right = points.read(order[start : start + _COLUMNS])
        for begin in range(start, min(order.size, start + _WINDOW + 1), _COLUMNS):
            rows = slice(begin, begin + _COLUMNS)
            cosines_AB = points.read(order[rows]) @ right.T
            if begin == start:
                cosines_AB = np.tril(cosines_AB, -1)
            largest[rows] = np.maximum(largest[rows], cosines_AB.max(axis=1))
    return single(np.minimum(largest, 1.0))


def cosine_distances(points: Points, centers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return 1 − the largest cosine of each point with one of the centers, (n,) in [0, 2].

    Args:
        points: of unit length.
        centers: (k, d) of any length.
    """
    directions = Points(centers, unit=True).read(slice(None))
    distances = np.empty(len(points), dtype=np.float32)
    for rows in points.blocks(max(points.width, len(centers))):
        distances[rows] = 1.0 - (points.read(rows) @ directions.T).max(axis=1)
    # Rounding errors of the product, so that a point on a center's ray is at 0.
    distances[np.abs(distances) < 1e-12] = 0.0
    return distances


def k_means(points: Points, count: int, rng: np.random.Generator, num_rounds: int = 20) -> NDArray[np.float64]:
    """Return the centers of k-means clusters, (k, d), by k-means++ seeding and Lloyd's iteration.

    The centers are fitted on at most 256·k points, drawn without replacement; the first centers are chosen among 16·k
    of those. A cluster that loses all its points keeps its center.

    Args:
        points: n of them.
        count: k; fewer if there are not so many points.
        rng: of the draws.
        num_rounds: the most rounds of Lloyd's iteration, which ends when no point changes its cluster.
    """
    count = min(count, len(points))
    drawn = rng.permutation(len(points))[: count * _FIT_ROWS]
    seeds = points.read(np.sort(drawn[: count * _SEED_ROWS]))
    centers = seeds[_spread(seeds, count, rng)]
    sample, before = points.subset(np.sort(drawn)), np.full(drawn.size, -1)
    for _ in range(num_rounds):
        clusters, sums, sizes = _lloyd_round(sample, centers)
        if np.array_equal(clusters, before):
            break
        before, filled = clusters, sizes > 0
        centers[filled] = sums[filled] / sizes[filled, None]
    return centers


def _spread(vectors: NDArray[np.float64], count: int, rng: np.random.Generator) -> Ids:
    """Draw k rows one by one, in proportion to the squared distance to the nearest drawn one (k-means++)."""
    chosen = np.zeros(count, dtype=np.int64)
    chosen[0] = rng.integers(len(vectors))
    lengths, apart = squared_lengths(vectors), np.full(len(vectors), np.inf)
    for number in range(1, count):
        distances = distances_to_row(vectors, lengths, int(chosen[number - 1]))
        apart = np.minimum(apart, distances.astype(np.float64) ** 2)
        total = np.cumsum(apart)
        # Where all rows equal drawn ones, the last row is drawn again and its cluster stays empty.
        position = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        chosen[number] = min(position, len(vectors) - 1)
    return chosen


def _lloyd_round(points: Points, centers: NDArray[np.float64]) -> tuple[Ids, NDArray[np.float64], NDArray[np.float64]]:
    """Return each point's cluster, and the clusters' sums (k, d) and sizes (k,)."""
    clusters = np.empty(len(points), dtype=np.int64)
    sums, sizes = np.zeros_like(centers), np.zeros(len(centers))
    for rows in points.blocks(max(points.width, min(len(centers), _COLUMNS))):
        block = points.read(rows)
        clusters[rows], _ = nearest(block, centers)
        order = np.argsort(clusters[rows], kind="stable")
        present, starts, size = np.unique(clusters[rows][order], return_index=True, return_counts=True)
        sums[present] += np.add.reduceat(block[order], starts, axis=0)
        sizes[present] += size
    return clusters, sums, sizes


def assign(points: Points, centers: NDArray[np.float64]) -> tuple[Ids, NDArray[np.float32]]:
    """Return the position of each point's nearest center, (n,), and its distance, (n,)."""
    clusters, distances = np.empty(len(points), dtype=np.int64), np.empty(len(points), dtype=np.float32)
    for rows in points.blocks(max(points.width, min(len(centers), _COLUMNS))):
        clusters[rows], distances[rows] = nearest(points.read(rows), centers)
    return clusters, distances


def rows_by_label(labels: NDArray[np.integer[Any]]) -> Iterator[Ids]:
    """Yield the ascending positions of each label that occurs, lower labels first.

    >>> [rows.tolist() for rows in rows_by_label(np.array([2, 0, 2]))]
    [[1], [0, 2]]
    """
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    yield from np.split(order, starts[1:])


def class_center(array: NDArray[Any], rows: Ids, center: Center) -> NDArray[np.float64]:
    """Return the median, coordinate by coordinate, or the mean of some rows of an (N, d) array, (d,)."""
    if center == "mean":
        return Points(array, rows).mean()
    median = np.empty(array.shape[1])
    size = max(1, _MEDIAN_NUMBERS // rows.size)
    for start in range(0, median.size, size):
        columns = slice(start, start + size)
        median[columns] = np.median(array[rows, columns].astype(np.float64), axis=0)
    return median
