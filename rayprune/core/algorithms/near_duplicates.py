"""Near-duplicates: all pairs of vectors within a distance, exact and far below N² distances.

Two samples are duplicates if their vectors are at most a radius τ apart. Groups are the connected components of these
pairs: along a chain of near-duplicates, the ends of a group may be further apart than τ. The representative of a group
is its lowest id.

The search drops pairs by lower bounds of their distance, and measures the few that are left in float64:
1.  Equal vectors are merged by a hash, so that 10,000 copies of one image are one vector and not 5·10⁷ pairs.
2.  Each vector is projected onto at most 48 principal directions, and the length of the rest is one number more. This
    map never lengthens a distance.
3.  k-means on a sample of the projections gives about √N centers, and every vector belongs to the cell of its nearest
    one. For x in cell a and y in cell b, the hyperplane between the centers separates the two, so
        ‖x − y‖ ≥ (‖x − b‖² − ‖x − a‖²) / (2‖a − b‖),
    and the same with x and y exchanged. Both bounds must be at most τ. (The first is at least half of
    ‖x − b‖ − ‖x − a‖, the bound by the triangle inequality, and far more than that where most of a vector's length is
    orthogonal to the centers.)
4.  The projections of the rest are compared in float32 matrix products. All these comparisons allow for rounding
    errors.
Distances are rounded to float32 before they are compared with τ, as in `geometry`. The result does not depend on the
cells or on the order of the rows.

Memory: about 450 bytes per sample, N·√N bits (1 GiB at most), and blocks of at most some 200 MiB.

Shapes: N samples, U of them with different vectors, d numbers of a vector, m of a projection, K cells, A and B rows of
two blocks, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, k_means, single, squared_lengths
from rayprune.core.table import Ids
from rayprune.errors import ConfigError, DataError

NONE, WITHIN, ACROSS = 0, 1, 2

_SAMPLE_ROWS = 4_096  # which give the principal directions
_DIRECTIONS = 48
_CELL_ROWS, _ROUNDS = 32, 5  # rows per cell that k-means is fitted on, and rounds of its iteration
_MAX_BITS = 1 << 33  # of the table that says which cells a row is compared with
_LEFT, _RIGHT = 1_024, 8_192  # rows of the factors of one matrix product
_SEPARATE = 1 << 17  # products of this size are worth a call of their own
_WAITING = 1 << 20  # pairs that wait for their exact distance
_PAIR_NUMBERS, _PAIRS = 1 << 21, 1 << 13  # numbers of the vectors, and pairs, that are measured at once
_LONGEST = 1e6  # of a vector, relative to the longest of the sample


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of near-duplicates among N vectors.

    Attributes:
        first: (N,) the lowest id of the sample's group; its own id if it has no duplicate.
        nearest: (N,) float32 distance to the nearest duplicate; infinite without one.
        sees: (N,) uint8, bit p set if a duplicate of the sample (not only of its group) belongs to another part, p.
    """

    first: Ids
    nearest: NDArray[np.float32]
    sees: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Near-duplicates in training and validation data; the ids of validation samples follow those of training samples.

    Attributes:
        of: (N,) the lowest id of the sample's group; -1 for that sample itself, and for samples without duplicates.
        split: (N,) int8: NONE without duplicates, ACROSS if one of them lies within the radius of the sample and in the
            other split, which is leakage, else WITHIN.
        similarity: (N,) float32, 1 − δ²/2 with the distance δ to the nearest duplicate, which is the cosine of vectors
            of length 1; NaN without duplicates.
        num_train: the number of training samples.
    """

    of: Ids
    split: NDArray[np.int8]
    similarity: NDArray[np.float32]
    num_train: int

    @property
    def leaked(self) -> Ids:
        """The training samples within the radius of a validation sample."""
        return np.flatnonzero(self.split[: self.num_train] == ACROSS)


def duplicates_of(points: Points, num_train: int, radius: float) -> Duplicates:
    """Find the near-duplicates among samples of which the first `num_train` are for training."""
    is_validation = (np.arange(len(points)) >= num_train).astype(np.uint8)
    groups = near_duplicates(points, radius, is_validation)
    found = np.isfinite(groups.nearest)
    other = np.where(is_validation, 1, 2).astype(np.uint8)
    split = np.where(found, np.where(groups.sees & other, ACROSS, WITHIN), NONE).astype(np.int8)
    of = np.where(groups.first == np.arange(len(points)), -1, groups.first)
    distances = np.where(found, groups.nearest, np.nan).astype(np.float64)
    return Duplicates(of, split, (1.0 - np.square(distances) / 2.0).astype(np.float32), num_train)


def near_duplicates(points: Points, radius: float, parts: NDArray[np.uint8] | None = None) -> Groups:
    """Group the points that are at most a radius apart.

    Args:
        points: N of them, N ≥ 1.
        radius: τ ≥ 0.
        parts: (N,) the part of the data that a point belongs to, in 0..7; None for one part.

    Raises:
        ConfigError: the radius is below 0 or not finite.
        DataError: a vector is NaN or infinite.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise ConfigError(f"the radius {radius!r} of near-duplicates must be a number of at least 0")
    bits = np.left_shift(1, np.zeros(len(points), np.uint8) if parts is None else parts).astype(np.uint8)
    rng = np.random.default_rng(0)  # decides how long the search takes, and not what it finds
    hashes, projections_Nm, scale = _project(points, rng)
    leader = _equal_vectors(points, hashes)
    unique = np.flatnonzero(leader == np.arange(len(points)))
    place = np.zeros(len(points), dtype=np.int64)  # of a leader among the unique
    place[unique] = np.arange(unique.size)
    leader = place[leader]
    search = _Search(points, unique, radius, leader, bits)
    if radius > 0 and unique.size > 1:
        projections_Nm = projections_Nm[unique] if unique.size < len(points) else projections_Nm
        for left, right, squares in _close_projections(projections_Nm, radius / scale, rng):
            search.add(left, right, single(np.sqrt(np.maximum(squares, 0.0, dtype=np.float64)) * scale))
        search.finish()
    return search.groups(leader)


def _project(points: Points, rng: np.random.Generator) -> tuple[NDArray[np.uint64], NDArray[np.float32], float]:
    """Return hashes of the vectors, (N,), their projections, (N, m + 1), and the unit of length of these.

    The last number of a projection is the length of what is orthogonal to the m directions. The vectors are relative to
    a center, and shortened to _LONGEST units: neither lengthens a distance.
    """
    drawn = np.sort(rng.permutation(len(points))[:_SAMPLE_ROWS])
    sample = points.read(drawn)
    _check_finite(sample, drawn)
    center = np.median(sample, axis=0)
    sample -= center
    unit = math.sqrt(squared_lengths(sample).max()) or 1.0
    directions = _principal_directions(sample / unit, min(_DIRECTIONS, points.width), rng)
    multipliers = rng.integers(2**63, size=points.width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = np.empty(len(points), dtype=np.uint64)
    projections = np.empty((len(points), directions.shape[1] + 1), dtype=np.float32)
    for rows in points.blocks():
        vectors = points.read(rows)
        vectors += 0.0  # -0.0 becomes 0.0
        hashes[rows] = _hashes(vectors, multipliers)
        vectors -= center
        vectors /= unit
        lengths = np.sqrt(squared_lengths(vectors))
        _check_finite(lengths[:, None], np.arange(rows.start, rows.stop))
        vectors *= np.where(lengths > _LONGEST, _LONGEST / np.maximum(lengths, 1.0), 1.0)[:, None]
        inside = vectors @ directions
        rest = np.maximum(squared_lengths(vectors) - squared_lengths(inside), 0.0)
        projections[rows, :-1], projections[rows, -1] = inside, np.sqrt(rest)
    return hashes, projections, unit


def _check_finite(vectors: NDArray[np.float64], ids: Ids) -> None:
    bad = ids[~np.isfinite(vectors).all(axis=1)]
    if bad.size:
        raise DataError(
            f"the vectors of samples {bad[:5].tolist()} are NaN or infinite: leave them out or correct them"
        )


def _principal_directions(sample: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return about the first principal directions of centered vectors, (d, m), orthonormal, by subspace iteration."""
    directions: NDArray[np.float64] = np.linalg.qr(rng.normal(size=(sample.shape[1], count)))[0]
    for _ in range(3):
        directions = np.linalg.qr(sample.T @ (sample @ directions))[0]
    return directions


def _hashes(vectors: NDArray[np.float64], multipliers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = vectors.view(np.uint64)
    words = words ^ (words >> np.uint64(32))  # the low bits of short numbers are 0
    hashes: NDArray[np.uint64] = np.einsum("ad,d->a", words, multipliers)
    return hashes


def _equal_vectors(points: Points, hashes: NDArray[np.uint64]) -> Ids:
    """Return the lowest id with the same vector, (N,); vectors that a collision of hashes hides stay apart."""
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, hashes[order][1:] != hashes[order][:-1]])
    first = np.empty(len(points), dtype=np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.r_[starts, order.size]))
    copies = np.flatnonzero(first != np.arange(first.size))
    size = max(1, _PAIR_NUMBERS // max(points.width, 1))
    for start in range(0, copies.size, size):
        rows = copies[start : start + size]
        differ = rows[(points.read(rows) != points.read(first[rows])).any(axis=1)]
        first[differ] = differ
    return first


class _Search:
    """The state of a search: components of pairs, and the nearest duplicate of each vector.

    Args:
        points: all N.
        unique: (U,) the ids of the different vectors.
        radius: τ.
        leader: (N,) positions in `unique`.
        bits: (N,) the bit of each point's part.
    """

    def __init__(self, points: Points, unique: Ids, radius: float, leader: Ids, bits: NDArray[np.uint8]) -> None:
        self._points, self._unique, self._radius = points, unique, np.float32(radius)
        self._parent = np.arange(unique.size)
        copies = np.bincount(leader, minlength=unique.size)
        self._nearest = np.where(copies > 1, 0.0, np.inf).astype(np.float32)
        self._parts = np.zeros(unique.size, dtype=np.uint8)  # the parts of the vector's own copies
        np.bitwise_or.at(self._parts, leader, bits)
        self._sees = np.where(copies > 1, self._parts, 0).astype(np.uint8)
        self._bits = bits
        self._waiting: list[tuple[Ids, Ids, NDArray[np.float32]]] = []
        self._num_waiting = 0

    def add(self, left: Ids, right: Ids, at_least: NDArray[np.float32]) -> None:
        """Add pairs, (P,) positions in `unique` and lower bounds of their distances."""
        needed = self._needed(left, right, at_least)
        if needed.any():
            self._waiting.append((left[needed], right[needed], at_least[needed]))
            self._num_waiting += int(needed.sum())
        if self._num_waiting >= _WAITING:
            self.finish()

    def finish(self) -> None:
        """Measure the pairs that wait, those with the lowest bounds first: they make most others needless."""
        if not self._waiting:
            return
        left, right, at_least = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        order = np.argsort(at_least, kind="stable")
        size = max(1, min(_PAIRS, _PAIR_NUMBERS // self._points.width))
        for start in range(0, order.size, size):
            rows = order[start : start + size]
            rows = rows[self._needed(left[rows], right[rows], at_least[rows])]
            if rows.size:
                self._measure(left[rows], right[rows])

    def groups(self, leader: Ids) -> Groups:
        """Return the groups of all points."""
        first = self._unique[self._roots(leader)]
        return Groups(first, self._nearest[leader], self._sees[leader] & ~self._bits)

    def _needed(self, left: Ids, right: Ids, at_least: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return whether a pair can change something: join two groups, be a nearest one, or show another part."""
        nearest, parts, sees = self._nearest, self._parts, self._sees
        needed = at_least < np.maximum(nearest[left], nearest[right])
        needed |= (parts[right] & ~sees[left]) > 0
        needed |= (parts[left] & ~sees[right]) > 0
        rest = np.flatnonzero(~needed)
        needed[rest] = self._roots(left[rest]) != self._roots(right[rest])
        return needed

    def _measure(self, left: Ids, right: Ids) -> None:
        apart = self._points.read(self._unique[left])
        apart -= self._points.read(self._unique[right])
        distances = single(np.sqrt(squared_lengths(apart)))
        close = distances <= self._radius
        left, right, distances = left[close], right[close], distances[close]
        for one, other in ((left, right), (right, left)):
            np.minimum.at(self._nearest, one, distances)
            np.bitwise_or.at(self._sees, one, self._parts[other])
        self._join(left, right)

    def _roots(self, members: Ids) -> Ids:
        """Return the lowest member of each one's component."""
        roots = self._parent[members]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[members] = roots
        return roots

    def _join(self, left: Ids, right: Ids) -> None:
        while left.size:
            left, right = self._roots(left), self._roots(right)
            apart = left != right
            left, right = left[apart], right[apart]
            # A component that several pairs hang elsewhere goes to the lowest; the others are joined in the next round.
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))


def _close_projections(
    projections_Um: NDArray[np.float32], radius: float, rng: np.random.Generator
) -> Iterator[tuple[Ids, Ids, NDArray[np.float32]]]:
    """Yield all pairs whose projections may be within the radius: positions, and lower bounds of squared distances."""
    num, width = projections_Um.shape
    num_cells = max(1, min(round(math.sqrt(num)), _MAX_BITS // num))
    drawn = np.sort(rng.permutation(num)[: _CELL_ROWS * num_cells])
    centers = k_means(Points(projections_Um[drawn]), num_cells, rng, _ROUNDS).astype(np.float32)
    centers = np.unique(centers, axis=0)
    cells = _nearest_centers(projections_Um, centers)
    order = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells[order], np.arange(len(centers) + 1))
    # A scalar product of `right` rows gives both squared lengths less 2x·y, less a bound on the rounding errors.
    right_Un = np.empty((num, width + 2), dtype=np.float32)
    right_Un[:, :width] = projections_Um[order]
    squares = np.einsum("um,um->u", right_Un[:, :width], right_Un[:, :width])
    right_Un[:, width], right_Un[:, width + 1] = squares * np.float32(1.0 - _rounding(width)), 1.0
    bits_KU = _reachable(right_Un[:, :width], squares, cells[order], centers, radius)
    limit = np.float32((radius * (1.0 + 1e-5)) ** 2)
    for left, right in _blocks_of_pairs(starts, cells[order], bits_KU):
        left_An = right_Un[left]
        left_An[:, :width] *= -2.0
        left_An[:, [width, width + 1]] = left_An[:, [width + 1, width]]
        squares_AB = left_An @ right_Un[right].T
        flat = np.flatnonzero(squares_AB.ravel() <= limit)
        if flat.size:
            row, column = left[flat // right.size], right[flat % right.size]
            once = row < column  # within a cell, a pair is seen from both sides
            yield order[row[once]], order[column[once]], squares_AB.ravel()[flat[once]]


def _rounding(width: int) -> float:
    """Return a bound on the error of ‖x‖² + ‖y‖² − 2x·y in float32, relative to ‖x‖² + ‖y‖²."""
    return (width + 32) * 2.0**-22


def _nearest_centers(projections_Um: NDArray[np.float32], centers_Km: NDArray[np.float32]) -> Ids:
    cells = np.empty(len(projections_Um), dtype=np.int64)
    squares_K = np.einsum("km,km->k", centers_Km, centers_Km)
    for start in range(0, len(cells), _LEFT):
        rows = slice(start, start + _LEFT)
        cells[rows] = (squares_K - 2.0 * (projections_Um[rows] @ centers_Km.T)).argmin(axis=1)
    return cells


def _reachable(
    rows_Um: NDArray[np.float32],
    squares_U: NDArray[np.float32],
    cells_U: Ids,
    centers_Km: NDArray[np.float32],
    radius: float,
) -> NDArray[np.uint8]:
    """Return which cells may hold a point within the radius of each row, as (K, ⌈U/8⌉) packed bits."""
    squares_K = np.einsum("km,km->k", centers_Km, centers_Km)
    between_KK = squares_K[:, None] + squares_K - 2.0 * (centers_Km @ centers_Km.T)
    error = np.float32(4.0 * _rounding(rows_Um.shape[1]))
    between_KK = np.sqrt(np.maximum(between_KK, 0.0) + error * (squares_K[:, None] + squares_K))
    bits_KU = np.empty((len(centers_Km), -(-len(rows_Um) // 8)), dtype=np.uint8)
    for start in range(0, len(rows_Um), _LEFT):  # a multiple of 8
        rows = slice(start, start + _LEFT)
        to_BK = rows_Um[rows] @ (-2.0 * centers_Km).T
        to_BK += squares_K
        to_BK -= np.take_along_axis(to_BK, cells_U[rows, None], axis=1)
        to_BK -= error * (squares_U[rows] + squares_K[cells_U[rows]])[:, None]
        to_BK -= error * squares_K
        near_BK = to_BK <= np.float32(2.0 * radius * (1.0 + 1e-5)) * between_KK[cells_U[rows]]
        bits_KU[:, start // 8 : -(-(start + len(near_BK)) // 8)] = np.packbits(near_BK, axis=0).T
    return bits_KU


def _blocks_of_pairs(starts: Ids, cells_U: Ids, bits_KU: NDArray[np.uint8]) -> Iterator[tuple[Ids, Ids]]:
    """Yield blocks of rows to compare with each other, positions in the order of the cells: (A,) and (B,)."""
    for cell in range(len(starts) - 1):
        begin, end = int(starts[cell]), int(starts[cell + 1])
        if begin == end:
            continue
        own = np.arange(begin, end)
        later = _set_rows(bits_KU[cell], end, len(cells_U))
        edges = np.searchsorted(later, starts[cell + 1 :])
        together = [own]
        for place in np.flatnonzero(np.diff(edges)):
            rows = later[edges[place] : edges[place + 1]]
            if rows.size * own.size >= _SEPARATE:
                yield from _tiles(_set_rows(bits_KU[cell + 1 + place], begin, end), rows)
            else:
                together.append(rows)
        yield from _tiles(own, np.concatenate(together))


def _set_rows(bits_U: NDArray[np.uint8], begin: int, end: int) -> Ids:
    """Return the rows in [begin, end) whose bit is set."""
    first = begin // 8
    found = np.flatnonzero(np.unpackbits(bits_U[first : -(-end // 8)])) + first * 8
    return found[np.searchsorted(found, begin) : np.searchsorted(found, end)]


def _tiles(left: Ids, right: Ids) -> Iterator[tuple[Ids, Ids]]:
    for start in range(0, left.size, _LEFT):
        for begin in range(0, right.size, _RIGHT):
            yield left[start : start + _LEFT], right[begin : begin + _RIGHT]
