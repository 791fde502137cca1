"""A Selection laid out for an epoch: shuffled order, whole global batches, blocks.

Global batch s is rows [s·GB, (s+1)·GB) of the order, whatever the world size W; rank r's part of it is the r-th of W
equal slices. A block concatenates one rank's slices of consecutive global batches ("step-interleaved"), so a resume at
step s, with any W that divides GB, is only an offset.

Windows: where rows are expensive to read one by one, rows of a group are stored together. Groups and the rows within
each group are shuffled, and then consecutive groups are mixed in windows of whole global batches. Every window has rows
of at least MIN_GROUPS groups that begin in it (as far as so many have kept rows). Rows that do not fill the window's
last batch go to the next window; they belong to its last group, so only that group is read for two windows.

Meta batches: a step that learns sample weights (Zhang et al., ECCV 2022, arXiv 2209.08310) judges them on rows that it
does not train on. A pruned selection has only the hard samples; so an epoch that prunes carries, before every K-th
global batch of its selection, one global batch of *meta* rows drawn from all samples.

Shapes: N samples, M kept, P rows of a plan, GB rows of a global batch, S global batches of a selection, G groups, H
groups with a kept row, V windows, K batches from one meta batch to the next.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.selection import Selection
from rayprune.core.table import Ids, chunks
from rayprune.errors import ConfigError

LastBatch = Literal["pad", "drop"]
PADDING, TRAIN, META = range(3)  # the roles of a plan's rows
MIN_GROUPS = 8

# Ray splits blocks above its 128 MiB target, which would silently lose the interleaving: stay well below.
BLOCK_ROWS = 32_768
BLOCK_BYTES = 64 * 1024 * 1024
_FIRST_BLOCK_ROWS, _GROWTH = 1_024, 4

_NO_IDS: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Block:
    """One rank's rows of the global batches [start_step, stop_step)."""

    rank: int
    start_step: int
    stop_step: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold the order in which an epoch visits its samples.

    Attributes:
        order: (P,) integer ids, P a multiple of batch_size: the selection, the padding of its last batch, and meta
            batches in between.
        batch_size: GB, the global batch.
        num_rows: the number of rows to train on; padding and meta rows have weight 0.
        selection: holds the weights; None = all 1.
        window_stops: (V,) rows at which the windows of groups end, ascending; empty for a uniform shuffle.
        meta_every: K: a meta batch comes before every K-th batch of the selection; 0: none.
    """

    order: NDArray[Any]
    batch_size: int
    num_rows: int
    selection: Selection | None = None
    window_stops: Ids = field(default_factory=lambda: _NO_IDS)
    meta_every: int = 0

    @classmethod
    def of_selection(
        cls,
        selection: Selection,
        batch_size: int,
        seed: int,
        epoch: int,
        last_batch: LastBatch = "pad",
        *,
        groups: Ids | None = None,
        window_rows: int = BLOCK_ROWS,
        meta_every: int = 0,
    ) -> Plan:
        """Shuffle a selection, uniformly or by windows of groups, and complete its last global batch.

        Args:
            selection: the epoch's samples.
            batch_size: GB, at least 1.
            seed, epoch: set the order; its generator is independent of the method's.
            last_batch: "pad" completes the last batch with distinct other ids at weight 0 as far as N suffices;
                "drop" leaves out the incomplete batch (no step at all if less than a batch is kept).
            groups: (G+1,) boundaries, from 0 to N, of rows that are read together; padding then comes from the groups
                of the last window, if they have enough other rows.
            window_rows: maximum of stored rows in a window of groups, unless MIN_GROUPS groups have more.
            meta_every: put a meta batch before every so many batches, in an epoch that prunes.

        Raises:
            ConfigError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size!r} must be at least 1")
        # NumPy pads a seed with zeros: [seed, epoch, 0] would be the method's own generator.
        rng = np.random.default_rng([seed, epoch, 0, 1])
        rows = selection.num_kept
        padding = -rows % batch_size if last_batch == "pad" else 0
        order = np.empty(rows + padding, dtype=_id_dtype(selection.num_samples))
        filled = 0
        for chunk in chunks(selection.num_samples):
            ids = np.flatnonzero(selection.codes[chunk])
            order[filled : filled + ids.size] = ids + chunk.start
            filled += ids.size
        stops = shuffle(order[:rows], groups, batch_size, window_rows, rng)
        if padding:
            tail = order[rows - rows % batch_size : rows]
            near = _NO_IDS if groups is None else _others_in_groups(order[:rows], stops, tail, groups)
            if near.size >= padding:
                order[rows:] = rng.choice(near, size=padding, replace=False)
            else:
                order[rows:] = _padding(selection.num_samples, tail, padding, rng)
        if last_batch == "drop":
            rows -= rows % batch_size
            order = order[:rows]
        plan = cls(order, batch_size, rows, selection, stops)
        if not meta_every or rows == 0 or selection.num_kept == selection.num_samples:
            return plan
        return plan._with_meta(meta_every, np.random.default_rng([seed, epoch, 0, 2]), groups, window_rows)

    @classmethod
    def in_order(cls, num_samples: int, batch_size: int, ids: Ids | None = None) -> Plan:
        """Visit ids (default: all) in ascending order, padded with the first id, for a forward-only pass."""
        rows = np.arange(num_samples) if ids is None else np.sort(ids)
        order = np.empty(rows.size + -rows.size % batch_size, dtype=_id_dtype(num_samples))
        order[: rows.size] = rows
        order[rows.size :] = rows[0] if rows.size else 0
        return cls(order, batch_size, int(rows.size))

    def _with_meta(self, every: int, rng: np.random.Generator, groups: Ids | None, window_rows: int) -> Plan:
        """Return the plan with meta batches before every K-th batch; each sample comes once before any comes again."""
        assert self.selection is not None
        size, num_samples = self.batch_size, self.selection.num_samples
        num_meta = num_meta_batches(self.num_steps, every)
        passes = []
        for _ in range(-(-num_meta * size // num_samples)):
            passes.append(np.arange(num_samples, dtype=np.int64))
            shuffle(passes[-1], groups, size, window_rows, rng)
        order = np.empty((self.num_steps + num_meta, size), dtype=self.order.dtype)
        is_meta_step = np.arange(len(order)) % (every + 1) == 0
        order[is_meta_step] = np.concatenate(passes)[: num_meta * size].reshape(-1, size)
        order[~is_meta_step] = self.order.reshape(-1, size)
        stops = -(-self.window_stops // size)  # in batches of the selection
        stops = (stops + -(-stops // every)) * size
        return replace(self, order=order.ravel(), window_stops=stops, meta_every=every)

    @property
    def num_steps(self) -> int:
        """Global batches in the epoch."""
        return int(self.order.size // self.batch_size)

    @property
    def num_train_steps(self) -> int:
        """Global batches to train on."""
        return train_step_of(self.num_steps, self.meta_every)

    @cached_property
    def hash(self) -> str:
        """32 hexadecimal digits over ids, weights and order, padding included; equal on every platform."""
        meta = f",{self.meta_every}" if self.meta_every else ""
        digest = hashlib.sha256(f"{self.batch_size},{self.num_rows}{meta}".encode())
        for rows in chunks(self.order.size):
            digest.update(self.order[rows].astype("<i8"))
            digest.update(self.weights(rows.start, rows.stop).astype("<f4"))
        return digest.hexdigest()[:32]

    def roles(self, rows: Ids) -> NDArray[np.int8]:
        """Return the role of each row, PADDING, TRAIN or META; rows are positions in the order."""
        if not self.meta_every:
            return np.where(rows < self.num_rows, np.int8(TRAIN), np.int8(PADDING))
        steps = rows // self.batch_size
        meta_before = -(-steps // (self.meta_every + 1))
        trains = rows - meta_before * self.batch_size < self.num_rows
        return np.where(steps % (self.meta_every + 1) == 0, META, np.where(trains, TRAIN, PADDING)).astype(np.int8)

    def weights(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the float32 weights of rows [start, stop); 0 for padding and meta rows."""
        if self.selection is not None and self.selection.batch_mean_weights:
            return self._batch_mean_weights(start, stop)
        rows = np.arange(start, min(stop, self.order.size))
        return self._own_weights(self.order[start:stop], self.roles(rows) == TRAIN)

    def _own_weights(self, ids: NDArray[Any], trains: NDArray[np.bool_]) -> NDArray[np.float32]:
        weights = np.ones(ids.size, np.float32) if self.selection is None else self.selection.weights_of(ids)
        weights[~trains] = 0.0
        return weights

    def _batch_mean_weights(self, start: int, stop: int) -> NDArray[np.float32]:
        assert self.selection is not None
        size, stop = self.batch_size, min(stop, self.order.size)
        first, last = start // size * size, -(-stop // size) * size
        trains = (self.roles(np.arange(first, last)) == TRAIN).reshape(-1, size)
        own = self.selection.weights_of(self.order[first:last]).reshape(-1, size).astype(np.float64)
        mean = (own * trains).sum(axis=1, keepdims=True) / np.maximum(trains.sum(axis=1, keepdims=True), 1)
        weights: NDArray[np.float32] = (mean * trains).astype(np.float32).ravel()[start - first : stop - first]
        return weights

    def rank_rows(
        self, rank: int, world_size: int, start_step: int, stop_step: int
    ) -> tuple[Ids, NDArray[np.float32], NDArray[np.bool_]]:
        """Return one rank's rows of the global batches [start_step, stop_step), batch after batch.

        Returns:
            ids int64, weights float32, and True where the row is trained on (False: padding, meta rows); each
            ((stop − start)·GB/W,).
        """
        size = self._rows_per_rank(world_size)
        mine = slice(rank * size, (rank + 1) * size)
        ids = self.order.reshape(-1, self.batch_size)[start_step:stop_step, mine].astype(np.int64).ravel()
        starts = np.arange(start_step, start_step + ids.size // size) * self.batch_size + mine.start
        trains = self.roles((starts[:, None] + np.arange(size)).ravel()) == TRAIN
        if self.selection is not None and self.selection.batch_mean_weights:
            whole = self._batch_mean_weights(start_step * self.batch_size, stop_step * self.batch_size)
            return ids, whole.reshape(-1, self.batch_size)[:, mine].ravel(), trains
        # Only this rank's rows, so that the one actor's work for all ranks does not grow with their number.
        return ids, self._own_weights(ids, trains), trains

    def blocks(self, world_size: int, row_bytes: int, start_step: int = 0, max_rows: int = BLOCK_ROWS) -> list[Block]:
        """Cut the steps from start_step on into blocks of at most `max_rows` rows and BLOCK_BYTES bytes.

        A block ends with the last window of groups that fits whole. Without groups the first two blocks are small, so
        that the first rows arrive soon: a stream may need the second block before it yields the first. The blocks of a
        span of steps are in order of ranks and of equal size, so that a round-robin gives each rank its own.
        """
        size = self._rows_per_rank(world_size)
        max_steps = max(1, min(max_rows, block_rows(row_bytes)) // size)
        window_stops = self.window_stops // self.batch_size
        steps = max_steps if window_stops.size else max(1, min(max_rows, _FIRST_BLOCK_ROWS) // size)
        blocks: list[Block] = []
        first = start_step
        while first < self.num_steps:
            last = min(first + min(steps, max_steps), self.num_steps)
            steps *= _GROWTH if first > start_step else 1
            whole = np.searchsorted(window_stops, last, side="right") - 1
            if last < self.num_steps and whole >= 0 and window_stops[whole] > first:
                last = int(window_stops[whole])
            blocks += [Block(rank, first, last) for rank in range(world_size)]
            first = last
        return blocks

    def _rows_per_rank(self, world_size: int) -> int:
        if self.batch_size % world_size:
            raise ConfigError(f"batch_size {self.batch_size} must be a multiple of the world size {world_size}")
        return self.batch_size // world_size


def block_rows(row_bytes: int) -> int:
    """Return the maximum number of rows of this size in a block, at least 1."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(row_bytes, 1)))


def _id_dtype(num_samples: int) -> type[np.unsignedinteger[Any]]:
    # Half the memory of int64 and faster to shuffle; ids leave the plan as int64.
    return np.uint32 if num_samples <= 2**32 else np.uint64


def _padding(num_samples: int, tail: NDArray[Any], count: int, rng: np.random.Generator) -> Ids:
    """Draw `count` distinct ids outside the last batch; ids repeat only if N is too small."""
    if num_samples > 4 * (count + tail.size):
        # Far more ids than needed: draw extra ones and drop those of the batch, O(batch) instead of O(N).
        draws = rng.choice(num_samples, size=count + tail.size, replace=False)
        return draws[~np.isin(draws, tail)][:count]
    others = rng.permutation(np.setdiff1d(np.arange(num_samples), tail))
    return np.resize(np.concatenate([others, rng.permutation(num_samples)]), count)


def _others_in_groups(order: NDArray[Any], stops: Ids, tail: NDArray[Any], groups: Ids) -> Ids:
    """Return the rows outside the last batch in the groups of the last window, which are read anyway."""
    window = order[stops[-2] if stops.size > 1 else 0 :]
    return np.setdiff1d(rows_of_groups(window, groups), tail) if window.size else _NO_IDS


def rows_of_groups(ids: NDArray[Any], groups: Ids) -> Ids:
    """Return all rows of the groups that hold any of the ids, ascending.

    >>> rows_of_groups(np.array([5, 4]), np.array([0, 2, 4, 7])).tolist()
    [4, 5, 6]
    """
    touched = np.unique(np.searchsorted(groups, ids, side="right") - 1)
    return np.concatenate([np.arange(groups[group], groups[group + 1]) for group in touched])


def shuffle(
    order: NDArray[Any], groups: Ids | None, batch_size: int, window_rows: int, rng: np.random.Generator
) -> Ids:
    """Shuffle kept ids in place, uniformly or in windows of groups.

    Args:
        order: (M,) kept ids, ascending.
        groups: (G+1,) boundaries of the groups, from 0 to N; None shuffles uniformly.
        batch_size: windows end between global batches of this size.
        window_rows: a window takes as many groups as together have at most this many stored rows, kept or not, which
            bounds the memory for reading each group once; at least MIN_GROUPS groups of any size.
        rng: the generator of the order.

    Returns:
        (V,) where the windows end, ascending; the last is M, the others are multiples of batch_size. Empty for M = 0
        and without groups.
    """
    if groups is None:
        rng.shuffle(order)
        return _NO_IDS
    starts = np.searchsorted(order, groups)
    kept = np.flatnonzero(np.diff(starts))
    if kept.size == 0:
        return _NO_IDS
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


def _window_stops(kept_H: NDArray[Any], stored_H: NDArray[Any], batch_size: int, window_rows: int) -> list[int]:
    """Return where the windows end, for the kept and the stored rows of each group in shuffled order."""
    ends = np.cumsum(kept_H)
    begins = ends - kept_H
    stored = np.concatenate([[0], np.cumsum(stored_H)])
    stops: list[int] = []
    stop = 0
    while stop < ends[-1]:
        first = int(np.searchsorted(begins, stop))  # the first group that begins in this window
        fitting = int(np.searchsorted(stored, stored[first] + window_rows, side="right")) - 1
        last = min(max(first + MIN_GROUPS, fitting), ends.size) - 1
        # End at a whole batch that still has a row of the last group; a smaller group needs rows of the next ones.
        whole = int(ends[last] - ends[last] % batch_size)
        stop = whole if whole > begins[last] else whole + batch_size
        if np.searchsorted(begins, stop) + MIN_GROUPS > ends.size:
            stop = int(ends[-1])  # too few groups are left for another window
        stops.append(stop)
    return stops


def num_meta_batches(num_batches: int, meta_every: int) -> int:
    """Return how many meta batches come between the batches of a selection.

    >>> num_meta_batches(5, 2), num_meta_batches(4, 2), num_meta_batches(5, 0)
    (3, 2, 0)
    """
    return -(-num_batches // meta_every) if meta_every else 0


def is_meta(step: int, meta_every: int) -> bool:
    """Return whether a step of a plan is a meta batch.

    >>> [is_meta(step, 2) for step in range(6)]
    [True, False, False, True, False, False]
    """
    return meta_every > 0 and step % (meta_every + 1) == 0


def train_step_of(step: int, meta_every: int) -> int:
    """Return how many of a plan's steps before this one train.

    >>> [train_step_of(step, 2) for step in range(6)]
    [0, 0, 1, 2, 2, 3]
    """
    return step - num_meta_batches(step, meta_every + 1) if meta_every else step
