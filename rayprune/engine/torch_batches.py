"""A plan's batches as a training loop wants them: tensors on its device, or what its collate function makes of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayprune.engine.ahead import ahead
from rayprune.engine.stream import Batch

Collate = Callable[[dict[str, NDArray[Any]]], Any]
_OWN = ("id", "weight")


@dataclass(frozen=True)
class BatchForm:
    """How batches come.

    Attributes:
        device: where tensors go; None leaves them on the host.
        dtypes: of all floating columns of the data, or of any by name; id (int64) and weight (float32) keep theirs.
        collate_fn: called with the columns as NumPy arrays, id and weight among them, instead of making tensors.
    """

    device: torch.device | None = None
    dtypes: torch.dtype | Mapping[str, torch.dtype] | None = None
    collate_fn: Collate | None = None

    def __post_init__(self) -> None:
        if self.collate_fn is not None and self.dtypes is not None:
            raise ValueError("give iter_torch_batches either dtypes or collate_fn: a collate_fn chooses its own dtypes")

    def __call__(self, batch: Batch) -> Any:
        """Return the loop's batch."""
        # Copies: what a loop does to its batch in place must not reach the plan's ids and weights.
        columns: dict[str, Any] = {**batch.columns, "id": np.array(batch.ids), "weight": np.array(batch.weights)}
        if isinstance(self.dtypes, Mapping) and (unknown := self.dtypes.keys() - columns.keys()):
            raise ValueError(f"dtypes names {sorted(unknown)}, the columns are {sorted(columns)}")
        if self.collate_fn is not None:
            if batch.placed is not None:
                raise ValueError(
                    "collate_fn is given NumPy columns, and stream='device' has tensors on the device: leave it out "
                    "and change the batch in the loop, or use prune(stream='local')"
                )
            # Arrays out of the object store are read-only, which torch warns about and in-place code trips over.
            return _moved(self.collate_fn({name: _writable(array) for name, array in columns.items()}), self.device)
        return {name: self._tensor(name, array) for name, array in columns.items()}

    def _tensor(self, name: str, column: NDArray[Any] | torch.Tensor) -> Any:
        if not isinstance(column, torch.Tensor):
            if column.dtype.kind not in "biufc":
                return column  # text and objects stay what they are; tensors cannot hold them
            column = torch.from_numpy(_writable(column))
        tensor = column
        if isinstance(self.dtypes, Mapping):
            dtype = self.dtypes.get(name)
        else:  # labels and tokens stay integers
            dtype = self.dtypes if tensor.is_floating_point() else None
        if dtype is not None and name not in _OWN:
            tensor = tensor.to(dtype)
        return _moved(tensor, self.device)


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.flags.writeable else np.array(array)


def _moved(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        moved = [_moved(inner, device) for inner in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def formed(batches: Iterator[Batch], form: BatchForm, num_ahead: int) -> Iterator[tuple[Batch, Any]]:
    """Yield each batch with its form, made in a thread up to `num_ahead` batches before it is asked for."""
    pairs = ((batch, form(batch)) for batch in batches)
    if num_ahead < 1:
        yield from pairs
        return
    try:
        yield from ahead(pairs, num_ahead, "rayprune-batch")
    finally:  # also where the loop stops early: the readers behind the batches end with it
        if isinstance(batches, Generator):
            batches.close()
