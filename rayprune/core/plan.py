"""A Selection laid out for an epoch: shuffled order, whole global batches, blocks.

Shapes: N samples, M kept, P = M + padding rows. Global batch s is rows [s·GB, (s+1)·GB) of the order, whatever the
world size W; rank r's share of it is the r-th of W equal slices. A block concatenates one rank's slices of consecutive
global batches ("step-interleaved"), so a resume at step s, with any W that divides GB, is an offset and nothing else.

A windowed shuffle, for rows that are expensive to read one by one: rows of a group lie together in storage.

The groups are shuffled, the rows within each group too; then consecutive groups are mixed in windows of whole global
batches. Every window holds rows of at least MIN_GROUPS groups that begin in it (where so many have a kept row), and
the rows that do not fill its last batch go on into the next window: they are rows of its last group, so that only that
one is read for two windows.

Shapes: N samples, M kept, G groups, K groups with a kept row, V windows.

Batches of the unpruned stream between those of a selection, for steps that learn from both.

A step that learns sample weights (Zhang et al., ECCV 2022, arXiv 2209.08310) judges them on rows that it does not train
on at that moment. Taken from a pruned selection these would be the hard samples only; so an epoch that prunes carries,
before every K-th global batch of its selection, one global batch of *meta* rows, drawn from all samples.

Shapes: N samples, P rows of a plan, S batches of a selection, GB rows of a global batch, K batches from meta to meta.
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
from rayprune.core.table import chunks
from rayprune.errors import ConfigError

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


# What a row of a plan is for.
PADDING, TRAIN, META = range(3)


def num_meta_batches(num_batches: int, meta_every: int) -> int:
    """Return how many meta batches stand between the batches of a selection.

    >>> num_meta_batches(5, 2), num_meta_batches(4, 2), num_meta_batches(5, 0)
    (3, 2, 0)
    """
    return -(-num_batches // meta_every) if meta_every else 0


def is_meta(step: int, meta_every: int) -> bool:
    """Tell whether a step of a plan is a meta batch.

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


def row_roles(rows: NDArray[np.int64], batch_size: int, num_rows: int, meta_every: int) -> NDArray[np.int8]:
    """Return PADDING, TRAIN or META of rows of a plan.

    Args:
        rows: their positions in it.
        batch_size: GB.
        num_rows: rows of the selection; the padding of its last batch comes behind them.
        meta_every: K, 0 for none.
    """
    if not meta_every:
        return np.where(rows < num_rows, np.int8(TRAIN), np.int8(PADDING))
    steps = rows // batch_size
    before = -(-steps // (meta_every + 1))  # meta batches before each row's step
    real = rows - before * batch_size < num_rows
    return np.where(steps % (meta_every + 1) == 0, META, np.where(real, TRAIN, PADDING)).astype(np.int8)


def with_meta(order: NDArray[Any], meta: NDArray[np.int64], batch_size: int, meta_every: int) -> NDArray[Any]:
    """Put meta batches before every K-th batch of an order.

    Args:
        order: (S·GB,) the selection, its padding included.
        meta: rows of `num_meta_batches(S, K)` global batches.
        batch_size, meta_every: GB and K, K at least 1.

    Returns:
        (P,) of the order's dtype.
    """
    num_steps = order.size // batch_size + meta.size // batch_size
    laid = np.empty((num_steps, batch_size), dtype=order.dtype)
    metas = np.arange(num_steps) % (meta_every + 1) == 0
    laid[metas], laid[~metas] = meta.reshape(-1, batch_size), order.reshape(-1, batch_size)
    return laid.ravel()


def meta_rows(
    count: int,
    num_samples: int,
    batch_size: int,
    rng: np.random.Generator,
    groups: NDArray[np.int64] | None,
    window_rows: int,
) -> NDArray[np.int64]:
    """Draw rows of all samples, each one once before any comes again, in windows of groups where there are some.

    Args:
        count: of rows.
        num_samples: N.
        batch_size: GB.
        rng: the epoch's generator of meta rows.
        groups, window_rows: as for `Plan.of_selection`.

    Returns:
        (count,) ids.
    """
    passes = []
    for _ in range(-(-count // num_samples)):
        order = np.arange(num_samples, dtype=np.int64)
        if groups is None:
            rng.shuffle(order)
        else:
            windowed(order, groups, batch_size, window_rows, rng)
        passes.append(order)
    return np.concatenate([*passes, np.empty(0, dtype=np.int64)])[:count]


LastBatch = Literal["pad", "drop"]

# Ray splits blocks above its 128 MiB target and the interleaving would silently be lost: stay well below.
BLOCK_ROWS = 32_768
FIRST_ROWS, _GROWTH = 1_024, 4
BLOCK_BYTES = 64 * 1024 * 1024

_NO_WINDOWS: NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Block:
    """Name one rank's rows of the global batches [start_step, stop_step)."""

    rank: int
    start_step: int
    stop_step: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold the order in which an epoch visits its samples.

    Attributes:
        order: (P,) integer ids, P a multiple of batch_size: the selection, the padding of its last batch, and meta
            batches between them.
        batch_size: GB, the global batch.
        num_rows: rows that are trained on; padding and meta rows have weight 0.
        selection: where the weights come from; None = all 1.
        window_stops: (V,) rows before which the windows of groups end, ascending; empty for a uniform shuffle.
        meta_every: K: a meta batch stands before every K-th batch of the selection (`rayprune.core.plan`); 0: none.
    """

    order: NDArray[Any]
    batch_size: int
    num_rows: int
    selection: Selection | None = None
    window_stops: NDArray[np.int64] = field(default_factory=lambda: _NO_WINDOWS)
    meta_every: int = 0

    @classmethod
    def of_selection(
        cls,
        selection: Selection,
        batch_size: int,
        seed: int,
        epoch: int,
        last_batch: LastBatch = "pad",
        groups: NDArray[np.int64] | None = None,
        window_rows: int = BLOCK_ROWS,
        meta_every: int = 0,
    ) -> Plan:
        """Shuffle a selection, uniformly or by windows of groups, and complete its last global batch.

        Args:
            selection: the epoch's samples.
            batch_size: GB, at least 1.
            seed, epoch: fix the order; its generator is independent of the one that the method draws from.
            last_batch: "pad" completes the last batch with distinct other ids at weight 0 as far as N suffices;
                "drop" leaves the incomplete batch out (no step at all where less than a batch is kept).
            groups: (G+1,) boundaries, from 0 to N, of rows that are read together; padding then comes from the groups
                of the last window, where they have enough other rows.
            window_rows: rows in storage that a window of groups has at most, but at least 8 groups.
            meta_every: put a batch of the unpruned stream before every so many batches, where samples are pruned.

        Raises:
            ConfigError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size!r} must be at least 1")
        # NumPy pads a seed with zeros: [seed, epoch, 0] would be the very generator that the method draws from.
        rng = np.random.default_rng([seed, epoch, 0, 1])
        rows = selection.num_kept
        padding = -rows % batch_size if last_batch == "pad" else 0
        order = np.empty(rows + padding, dtype=_id_dtype(selection.num_samples))
        filled = 0
        for chunk in chunks(selection.num_samples):
            ids = np.flatnonzero(selection.codes[chunk])
            order[filled : filled + ids.size] = ids + chunk.start
            filled += ids.size
        stops = _NO_WINDOWS
        if groups is None:
            rng.shuffle(order[:rows])
        else:
            stops = windowed(order[:rows], groups, batch_size, window_rows, rng)
        if padding:
            tail = order[rows - rows % batch_size : rows]
            near = _NO_WINDOWS if groups is None else _others_in_groups(order[:rows], stops, tail, groups)
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
        rng = np.random.default_rng([seed, epoch, 0, 2])
        return plan._with_meta(meta_every, rng, groups, window_rows)

    @classmethod
    def in_order(cls, num_samples: int, batch_size: int, ids: NDArray[np.int64] | None = None) -> Plan:
        """Visit ids (all of 0..N−1 when left out) in ascending order, padded with the first id: a forward-only pass."""
        rows = np.arange(num_samples) if ids is None else np.sort(ids)
        order = np.empty(rows.size + -rows.size % batch_size, dtype=_id_dtype(num_samples))
        order[: rows.size] = rows
        order[rows.size :] = rows[0] if rows.size else 0
        return cls(order, batch_size, int(rows.size))

    def _with_meta(
        self, every: int, rng: np.random.Generator, groups: NDArray[np.int64] | None, window_rows: int
    ) -> Plan:
        assert self.selection is not None
        size = self.batch_size
        count = num_meta_batches(self.num_steps, every) * size
        meta = meta_rows(count, self.selection.num_samples, size, rng, groups, window_rows)
        stops = -(-self.window_stops // size)  # in batches of the selection
        stops = (stops + -(-stops // every)) * size
        return replace(self, order=with_meta(self.order, meta, size, every), window_stops=stops, meta_every=every)

    @property
    def num_steps(self) -> int:
        """Global batches in the epoch."""
        return int(self.order.size // self.batch_size)

    @property
    def num_train_steps(self) -> int:
        """Global batches that are trained on."""
        return train_step_of(self.num_steps, self.meta_every)

    @cached_property
    def hash(self) -> str:
        """32 hexadecimal digits over ids, weights and order, the padding included; equal on every platform."""
        meta = f",{self.meta_every}" if self.meta_every else ""
        digest = hashlib.sha256(f"{self.batch_size},{self.num_rows}{meta}".encode())
        for rows in chunks(self.order.size):
            digest.update(self.order[rows].astype("<i8"))
            digest.update(self.weights(rows.start, rows.stop).astype("<f4"))
        return digest.hexdigest()[:32]

    def weights(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the float32 weights of rows [start, stop); 0 for padding and meta rows."""
        if self.selection is not None and self.selection.batch_mean_weights:
            return self._batch_mean_weights(start, stop)
        return self._weights_of(self.order[start:stop], self.roles(start, stop) == TRAIN)

    def _weights_of(self, ids: NDArray[Any], trains: NDArray[np.bool_]) -> NDArray[np.float32]:
        weights = np.ones(ids.size, np.float32) if self.selection is None else self.selection.weights_of(ids)
        weights[~trains] = 0.0
        return weights

    def roles(self, start: int, stop: int) -> NDArray[np.int8]:
        """Return PADDING, TRAIN or META of rows [start, stop)."""
        return self._roles_of(np.arange(start, min(stop, self.order.size)))

    def _roles_of(self, rows: NDArray[np.int64]) -> NDArray[np.int8]:
        return row_roles(rows, self.batch_size, self.num_rows, self.meta_every)

    def _batch_mean_weights(self, start: int, stop: int) -> NDArray[np.float32]:
        assert self.selection is not None
        size = self.batch_size
        first, last = start // size, -(-stop // size)
        rows = self.order[first * size : last * size]
        real = (self.roles(first * size, last * size) == TRAIN).reshape(-1, size)
        own = self.selection.weights_of(rows).reshape(-1, size).astype(np.float64)
        mean = (own * real).sum(axis=1, keepdims=True) / np.maximum(real.sum(axis=1, keepdims=True), 1)
        weights: NDArray[np.float32] = (mean * real).astype(np.float32).ravel()[start - first * size :][: stop - start]
        return weights

    def share(
        self, rank: int, world_size: int, start_step: int, stop_step: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """Return one rank's rows of the global batches [start_step, stop_step), batch after batch.

        Returns:
            ids int64, weights float32, and True where a row is trained on (False: padding, meta rows); each
            ((stop − start)·GB/W,).
        """
        size = self._rows_of_rank(world_size)
        mine = slice(rank * size, (rank + 1) * size)
        ids = self.order.reshape(-1, self.batch_size)[start_step:stop_step, mine].astype(np.int64).ravel()
        starts = np.arange(start_step, start_step + ids.size // size) * self.batch_size + mine.start
        trains = self._roles_of((starts[:, None] + np.arange(size)).ravel()) == TRAIN
        if self.selection is not None and self.selection.batch_mean_weights:
            whole = self._batch_mean_weights(start_step * self.batch_size, stop_step * self.batch_size)
            return ids, whole.reshape(-1, self.batch_size)[:, mine].ravel(), trains
        # Of this rank's rows alone: what all ranks together ask of the one actor then does not grow with their number.
        return ids, self._weights_of(ids, trains), trains

    def blocks(self, world_size: int, row_bytes: int, start_step: int = 0, most_rows: int = BLOCK_ROWS) -> list[Block]:
        """Cut the steps from start_step on into blocks of at most `most_rows` rows and BLOCK_BYTES bytes.

        A block ends with the last window of groups that it can hold whole. Without groups the first two blocks are
        small, so that the first rows come soon: a stream may want the second before it gives out the first. The blocks
        of a span of steps stand in order of ranks, all of one size: a round-robin hands rank r its own.
        """
        size = self._rows_of_rank(world_size)
        most = max(1, min(most_rows, block_rows(row_bytes)) // size)
        window_stops = self.window_stops // self.batch_size
        steps = most if window_stops.size else max(1, min(most_rows, FIRST_ROWS) // size)
        blocks: list[Block] = []
        first = start_step
        while first < self.num_steps:
            last = min(first + min(steps, most), self.num_steps)
            steps *= _GROWTH if first > start_step else 1
            whole = np.searchsorted(window_stops, last, side="right") - 1
            if last < self.num_steps and whole >= 0 and window_stops[whole] > first:
                last = int(window_stops[whole])
            blocks += [Block(rank, first, last) for rank in range(world_size)]
            first = last
        return blocks

    def _rows_of_rank(self, world_size: int) -> int:
        if self.batch_size % world_size:
            raise ConfigError(f"batch_size {self.batch_size} does not divide by the world size {world_size}")
        return self.batch_size // world_size


def block_rows(row_bytes: int) -> int:
    """Return how many rows of this size a block has at most; 1 at least."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(row_bytes, 1)))


def _id_dtype(num_samples: int) -> type[np.unsignedinteger[Any]]:
    # Half the memory of int64 and faster to shuffle; ids leave the plan as int64.
    return np.uint32 if num_samples <= 2**32 else np.uint64


def _padding(num_samples: int, tail: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `count` distinct ids outside the last batch; only where N is too small do ids come again."""
    if num_samples > 4 * (count + tail.size):
        # Far more ids than needed: draw with some to spare and drop what is in the batch, O(batch) instead of O(N).
        drawn = rng.choice(num_samples, size=count + tail.size, replace=False)
        return drawn[~np.isin(drawn, tail)][:count]
    others = rng.permutation(np.setdiff1d(np.arange(num_samples), tail))
    return np.resize(np.concatenate([others, rng.permutation(num_samples)]), count)


def _others_in_groups(
    order: NDArray[Any], stops: NDArray[np.int64], tail: NDArray[Any], groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows outside the last batch in the groups of the last window, which are read anyway."""
    window = order[stops[-2] if stops.size > 1 else 0 :]
    return np.setdiff1d(rows_of_groups(window, groups), tail) if window.size else _NO_WINDOWS
