"""Batches as a training loop wants them: tensors on its device, or the result of its collate function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import prefetch
from rayprune.errors import ConfigError
from rayprune.sources.datasets.columns import NUMBERS, is_ragged, object_array

CollateFn = Callable[[dict[str, NDArray[Any]]], Any]


@dataclass(frozen=True)
class BatchFormat:
    """The format of a loop's batches.

    Attributes:
        device: where tensors go; None leaves them on the host.
        dtypes: a dtype for all floating-point columns, or dtypes by name; id (int64) and weight (float32) keep theirs.
        collate_fn: called with the columns as NumPy arrays, including id and weight, instead of making tensors. A
            ragged column is a (B,) object array of NumPy arrays, text and other Python objects are a (B,) object array.
    """

    device: torch.device | None = None
    dtypes: torch.dtype | Mapping[str, torch.dtype] | None = None
    collate_fn: CollateFn | None = None

    def __post_init__(self) -> None:
        if self.collate_fn is not None and self.dtypes is not None:
            raise ConfigError("give iter_torch_batches either dtypes or collate_fn: a collate_fn sets its own dtypes")

    def __call__(self, batch: Batch) -> Any:
        """Return the loop's batch."""
        # Copies, so that a loop that changes its batch in place does not change the plan's ids and weights.
        columns: dict[str, Any] = {**batch.columns, "id": np.array(batch.ids), "weight": np.array(batch.weights)}
        if isinstance(self.dtypes, Mapping) and (unknown := self.dtypes.keys() - columns.keys()):
            raise ConfigError(f"dtypes has {sorted(unknown)}, but the columns are {sorted(columns)}: name only these")
        if self.collate_fn is None:
            return {name: self._tensor(name, column) for name, column in columns.items()}
        if batch.placed is not None:
            raise ConfigError(
                "collate_fn takes NumPy columns, and stream='device' has tensors on the device: leave collate_fn out "
                "and change the batch in the loop, or use prune(stream='local')"
            )
        return _to(self.device, self.collate_fn({name: _writable(column) for name, column in columns.items()}))

    def _tensor(self, name: str, column: NDArray[Any] | torch.Tensor) -> Any:
        if not isinstance(column, torch.Tensor):
            if is_ragged(column):
                raise ConfigError(
                    f"column {name!r} is ragged, its rows have several shapes: give iter_torch_batches a collate_fn "
                    "that pads it, as with torch.nn.utils.rnn.pad_sequence"
                )
            if column.dtype.kind not in NUMBERS:
                return column  # text and objects, which tensors cannot hold
            column = torch.from_numpy(_writable(column))
        if isinstance(self.dtypes, Mapping):
            dtype = self.dtypes.get(name)
        else:  # labels and tokens stay integers
            dtype = self.dtypes if column.is_floating_point() else None
        if dtype is not None and name not in ("id", "weight"):
            column = column.to(dtype)
        return _to(self.device, column)


def collated(batches: Iterator[Batch], batch_format: BatchFormat, num_prefetched: int) -> Iterator[tuple[Batch, Any]]:
    """Yield each batch with the loop's batch, made in a thread up to `num_prefetched` batches ahead."""
    is_finalizing = sys.is_finalizing  # a local name: those of modules go while the interpreter exits
    pairs = ((batch, batch_format(batch)) for batch in batches)
    if num_prefetched < 1:
        yield from pairs
        return
    try:
        yield from prefetch(pairs, num_prefetched, "rayprune-batch")
    finally:  # a loop that stops early also ends the readers behind the batches
        if not is_finalizing() and isinstance(batches, Generator):
            batches.close()


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    # Arrays from the object store are read-only: torch warns about them, and in-place code fails.
    if is_ragged(array):
        return object_array(row if row.flags.writeable else np.array(row) for row in array)
    return array if array.flags.writeable else np.array(array)


def _to(device: torch.device | None, value: Any) -> Any:
    """Move the tensors in a nested value to a device."""
    if device is None:
        return value
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(device, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        moved = [_to(device, inner) for inner in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
