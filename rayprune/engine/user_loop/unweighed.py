"""The rows of an epoch that wait to be weighed, found by their ids.

A loop may copy, move, split, join or reorder its batches, and a loader may fetch them ahead. A batch that comes back is
therefore matched by its ids with the rows that were given out. A batch with its original `id` tensor is recognized by
that object: reading ids from a GPU would make the host wait for the device.

Shapes: B rows of the loop's batch, W rows that wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayprune.engine.data.batch import Batch
from rayprune.errors import ConfigError

# A loop that never weighs must not fill the memory. Batches without ids are kept with their columns, so only a few are.
_MAX_BATCHES, _MAX_OBJECTS = 16_384, 16


@dataclass(frozen=True)
class FoundRows:
    """Rows of the plan in the order of the loop's batch.

    Attributes:
        batch: their ids, weights and mask; its columns are not used.
        number: the batch that they are, whole; None if they come from anywhere.
        index: (B,) where they are in the sorted index otherwise.
    """

    batch: Batch
    number: int | None = None
    index: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class _Sorted:
    """Rows sorted by id, real rows before padding: ids, weights, real and batch numbers, each (W,)."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    real: NDArray[np.bool_]
    numbers: NDArray[np.int64]

    def __getitem__(self, rows: Any) -> _Sorted:
        return _Sorted(self.ids[rows], self.weights[rows], self.real[rows], self.numbers[rows])

    def merged(self, batches: Mapping[int, Batch]) -> _Sorted:
        """Return these rows and those of the batches."""
        if not batches:
            return self
        new = batches.values()
        numbers = np.repeat(np.fromiter(batches, np.int64), [batch.ids.size for batch in new])
        rows = _Sorted(
            np.concatenate([self.ids, *(batch.ids for batch in new)]),
            np.concatenate([self.weights, *(batch.weights for batch in new)]),
            np.concatenate([self.real, *(batch.real for batch in new)]),
            np.concatenate([self.numbers, numbers]),
        )
        return rows[np.lexsort((rows.numbers, ~rows.real, rows.ids))]


class UnweighedRows:
    """The rows that one rank was given in an epoch and has not weighed.

    Args:
        where: such as "epoch 3 on rank 0", for messages.

    Attributes:
        num_weighed: batches of which every row was weighed.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._num_given = self.num_weighed = 0
        self._newest_weighed = -1
        self._rows_left: dict[int, int] = {}
        # A batch waits here whole, or in the index row by row.
        self._whole: dict[int, Batch] = {}
        empty = np.empty(0, np.int64)
        self._index = _Sorted(empty, empty.astype(np.float32), empty.astype(bool), empty)
        # Copies of whole batches are found by a hash of their ids, other rows in the index.
        self._hashes: dict[int, int] = {}
        # Number → what the batch is recognized by, and id() of that → number. Kept objects keep their id().
        self._tokens: dict[int, tuple[Any, int]] = {}  # with the version of a tensor
        self._numbers: dict[int, int] = {}
        self._objects: deque[int] = deque()

    def add(self, batch: Batch, loop_batch: Any) -> None:
        """Add a batch as it came, with the loop's form of it."""
        number, self._num_given = self._num_given, self._num_given + 1
        self._whole[number], self._rows_left[number] = batch, batch.ids.size
        self._hashes[_hash(batch.ids)] = number
        ids = _ids_in(loop_batch)
        token = loop_batch if ids is None else ids
        self._tokens[number], self._numbers[id(token)] = (token, _version(token)), number
        if ids is None:
            self._objects.append(number)
            if len(self._objects) > _MAX_OBJECTS:
                self._forget_token(self._objects.popleft())
        if len(self._whole) > _MAX_BATCHES:
            self._forget_batch(next(iter(self._whole)))

    def find(self, loop_batch: Any) -> FoundRows:
        """Return the waiting rows of a batch of the loop.

        Args:
            loop_batch: a batch that was added; any mapping with the key `id`; or integer ids (B,) alone.

        Raises:
            ConfigError: it has no ids, or some of them do not wait.
        """
        ids = _ids_in(loop_batch)
        token = loop_batch if ids is None else ids
        number = self._numbers.get(id(token), -1)
        if number in self._whole and self._is_unchanged(token, number):
            return FoundRows(self._whole[number], number)
        if ids is None:
            raise ConfigError(
                f"weigh got a {type(loop_batch).__name__} without ids that {self._where} did not yield, or that was "
                "weighed before: let collate_fn keep the column 'id', or give weigh the ids in the batch's place"
            )
        return self._by_value(_host_ids(ids))

    def remove(self, found: FoundRows) -> None:
        """Count found rows as weighed."""
        if found.number is not None:
            counts = {found.number: found.batch.ids.size}
        else:
            numbers, sizes = np.unique(self._index.numbers[found.index], return_counts=True)
            counts = dict(zip(numbers.tolist(), sizes.tolist(), strict=True))
            waits = np.ones(self._index.ids.size, dtype=bool)
            waits[found.index] = False
            self._index = self._index[waits]
        for number, rows in counts.items():
            self._rows_left[number] -= rows
            if not self._rows_left[number]:
                self.num_weighed += 1
                self._forget_batch(number)
        self._newest_weighed = max(self._newest_weighed, *counts)

    @property
    def num_ahead(self) -> int:
        """Batches that were given out after the newest one with a weighed row."""
        return self._num_given - 1 - self._newest_weighed

    @property
    def num_skipped(self) -> int:
        """Batches with rows that wait, given out before the newest one with a weighed row."""
        return sum(number < self._newest_weighed for number in self._rows_left)

    @property
    def is_inside_batch(self) -> bool:
        """Whether the newest batch with a weighed row also has rows that wait."""
        return self._newest_weighed in self._rows_left

    @property
    def rows_weighed(self) -> bool:
        """Whether any row was weighed."""
        return self._newest_weighed >= 0

    def _forget_batch(self, number: int) -> None:
        del self._rows_left[number]
        batch = self._whole.pop(number, None)
        if batch is not None and self._hashes.get(_hash(batch.ids)) == number:
            del self._hashes[_hash(batch.ids)]
        self._forget_token(number)

    def _forget_token(self, number: int) -> None:
        token, _ = self._tokens.pop(number, (None, 0))
        if token is not None and self._numbers.get(id(token)) == number:
            del self._numbers[id(token)]

    def _is_unchanged(self, token: Any, number: int) -> bool:
        """Return whether a batch's ids were not changed in place."""
        if isinstance(token, np.ndarray):
            return np.array_equal(token, self._whole[number].ids)
        return _version(token) == self._tokens[number][1]

    def _by_value(self, ids: NDArray[np.int64]) -> FoundRows:
        number = self._hashes.get(_hash(ids), -1)
        if number in self._whole and np.array_equal(self._whole[number].ids, ids):
            return FoundRows(self._whole[number], number)
        self._index, self._whole, self._hashes = self._index.merged(self._whole), {}, {}
        order = np.argsort(ids, kind="stable")
        wanted = ids[order]
        # The k-th of equal ids takes the k-th row that waits with this id.
        repeats = np.arange(ids.size) - np.searchsorted(wanted, wanted)
        rows = np.searchsorted(self._index.ids, wanted) + repeats
        is_waiting = rows < np.searchsorted(self._index.ids, wanted, side="right")
        if not is_waiting.all():
            strange = ids[np.sort(order[~is_waiting])]
            raise ConfigError(
                f"weigh got {strange.size} of {ids.size} ids that do not wait in {self._where} ({_shown(strange)}): "
                "they were weighed before, or belong to another epoch or worker; weigh each row of a batch once, in "
                "its epoch"
            )
        index = np.empty(ids.size, dtype=np.int64)
        index[order] = rows
        found = self._index[index]
        return FoundRows(Batch({}, found.ids, found.weights, found.real), index=index)


def _ids_in(loop_batch: Any) -> Any:
    """Return the ids of a batch as they are: its `id`, or itself if it is ids alone; None if it has none."""
    if isinstance(loop_batch, Mapping):
        return loop_batch.get("id")
    if isinstance(loop_batch, list) and loop_batch and all(isinstance(each, int | np.integer) for each in loop_batch):
        return loop_batch
    is_array = isinstance(loop_batch, torch.Tensor | np.ndarray)
    return loop_batch if is_array and loop_batch.ndim == 1 else None


def _version(token: Any) -> int:
    """Return the counter of a tensor's in-place changes; 0 for anything that has none."""
    return token._version if isinstance(token, torch.Tensor) and not token.is_inference() else 0


def _host_ids(ids: Any) -> NDArray[np.int64]:
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"weigh got ids of shape {array.shape} and dtype {array.dtype}: call weigh(batch, losses) with `id` as it "
            "came, (B,) integers"
        )
    return array.astype(np.int64, copy=False)


def _hash(ids: NDArray[np.int64]) -> int:
    return hash(ids.tobytes())


def _shown(ids: NDArray[np.int64]) -> str:
    return f"{', '.join(map(str, ids[:5].tolist()))}{', …' if ids.size > 5 else ''}"
