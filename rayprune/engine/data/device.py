"""The transport `stream: device`: the decoded rows lie on the worker's device, and a batch is an index into them.

For data that fit: every worker loads each of its sources once, whole, in the order of the ids, when it is first asked
for a batch of it. From then on a slice of the plan is one small copy of ids, weights and mask for tens of thousands of
rows, and an `index_select` a batch. Plans, batches, order and results are those of `stream: local`.

Shapes: N samples of a source, B rows of a batch, R rows of a share.

Put a batch's rows on the worker's device.

On a GPU everything is copied from pinned memory on a CUDA stream of its own. Nothing in a step waits for the device, so
that the host is steps ahead of it: a batch's copy passes while the device still works on the batches before. Ids,
weights and mask go as one buffer, because a small copy costs the same few µs whatever its size. Images go as the bytes
they are and are normalised on the device.

Shapes: B rows of a batch, R rows of any number of batches.

A plan's batches as a training loop wants them: tensors on its device, or what its collate function makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.engine.data.batch import Batch, PlacedRows
from rayprune.engine.data.transport import prefetch
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.errors import ConfigError
from rayprune.nn.device import Copies, host_tensor
from rayprune.sources import SampleSource, Schema

_ID_BYTES, _WEIGHT_BYTES = 8, 4


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the worker's device: inputs (B, …) as the source has them, targets (B,) int64, and the plan's rows.

    `draws` (B,) int64 is what the augmentation has drawn for them, if it has.
    """

    inputs: Tensor
    targets: Tensor
    rows: PlacedRows
    draws: Tensor | None = None


def packed(ids: NDArray[np.int64], weights: NDArray[np.float32], real: NDArray[np.bool_]) -> Tensor:
    """Return what the plan says of R rows as one (13 R,) uint8 tensor on the host; the widest numbers come first."""
    return torch.from_numpy(
        np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in (ids, weights, real)])
    )


def unpacked(buffer: Tensor) -> PlacedRows:
    """Return views of what `packed` made, on whatever device it is.

    >>> unpacked(packed(np.array([7, 2**60]), np.array([1, 0], np.float32), np.array([True, False]))).ids.tolist()
    [7, 1152921504606846976]
    """
    rows = buffer.numel() // (_ID_BYTES + _WEIGHT_BYTES + 1)
    weights_at, real_at = _ID_BYTES * rows, (_ID_BYTES + _WEIGHT_BYTES) * rows
    return PlacedRows(
        buffer[:weights_at].view(torch.int64),
        buffer[weights_at:real_at].view(torch.float32),
        buffer[real_at:].view(torch.bool),
    )


class DevicePlacer:
    """Put batches on a device.

    Args:
        column: the source's input column.
        device: where to.
    """

    def __init__(self, column: str, device: torch.device) -> None:
        self._column, self._copies = column, Copies(device)

    def __call__(self, batch: Batch, draws: NDArray[np.int64] | None = None) -> DeviceBatch:
        """Return the batch on the device, and what was drawn for it; what a transport has put there stays as it is."""
        inputs, targets = (host_tensor(batch.columns[name]) for name in (self._column, "label"))
        drawn = [] if draws is None else [torch.from_numpy(draws)]
        if batch.placed is not None:
            return DeviceBatch(inputs, targets, batch.placed, *self._copies(*drawn))
        plan = packed(batch.ids, batch.weights, batch.real)
        inputs, targets, rows, *placed = self._copies(inputs, targets, plan, *drawn)
        return DeviceBatch(inputs, targets, unpacked(rows), *placed)


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
            raise ConfigError(
                "give iter_torch_batches either dtypes or collate_fn: a collate_fn chooses its own dtypes"
            )

    def __call__(self, batch: Batch) -> Any:
        """Return the loop's batch."""
        # Copies: what a loop does to its batch in place must not reach the plan's ids and weights.
        columns: dict[str, Any] = {**batch.columns, "id": np.array(batch.ids), "weight": np.array(batch.weights)}
        if isinstance(self.dtypes, Mapping) and (unknown := self.dtypes.keys() - columns.keys()):
            raise ConfigError(f"dtypes names {sorted(unknown)}, the columns are {sorted(columns)}")
        if self.collate_fn is not None:
            if batch.placed is not None:
                raise ConfigError(
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


def collated(batches: Iterator[Batch], form: BatchForm, num_ahead: int) -> Iterator[tuple[Batch, Any]]:
    """Yield each batch with its form, made in a thread up to `num_ahead` batches before it is asked for."""
    pairs = ((batch, form(batch)) for batch in batches)
    if num_ahead < 1:
        yield from pairs
        return
    try:
        yield from prefetch(pairs, num_ahead, "rayprune-batch")
    finally:  # also where the loop stops early: the readers behind the batches end with it
        if isinstance(batches, Generator):
            batches.close()


LOAD_BYTES = 64 * 1024 * 1024
# The network, its gradients and activations need room too.
_SHARE_OF_FREE = 0.8
_ELSE = "use stream local or auto"


def check_columns(schema: Schema) -> None:
    """Refuse columns that no tensor holds, such as text.

    Raises:
        ConfigError: the first of them, with the cure.
    """
    for name, column in schema.columns.items():
        try:
            torch.from_numpy(np.zeros(1, column.dtype)).index_select(0, torch.zeros(1, dtype=torch.int64))
        except (TypeError, RuntimeError):
            raise ConfigError(
                f"stream device: column {name!r} is of type {column.dtype}, which tensors do not hold: {_ELSE}"
            ) from None


def check_room(sources: Mapping[str, SampleSource], device: torch.device) -> None:
    """Refuse data that do not fit into the memory that is free on a device.

    Raises:
        ConfigError: they do not, with their size and the cure.
    """
    needed = sum(len(source) * source.schema.row_bytes for source in sources.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > _SHARE_OF_FREE * free:
        raise ConfigError(
            f"stream device: decoded, the samples take {needed / 2**30:.3g} GiB, and of the {free / 2**30:.3g} GiB "
            f"that are free on {device} {_SHARE_OF_FREE:.0%} may be used: {_ELSE}, or fewer samples (data.limit)"
        )


class DeviceStream:
    """Index rows that lie on the device.

    Args:
        sources: "train" and, where there is one, "validation".
        device: where batches are wanted.
    """

    resumes_inside = True

    def __init__(self, sources: Mapping[str, SampleSource], device: torch.device) -> None:
        self._sources, self._device, self._copies = sources, device, Copies(device)
        self._resident: dict[str, dict[str, Tensor]] = {}

    def batches(self, plan_pass: PlanPass, shares: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport; a batch's columns are tensors on the device, and `placed` is set."""
        columns, num_bytes = self._loaded("validation" if plan_pass.phase == "validate" else "train")
        for ids, weights, real in shares:
            (buffer,) = self._copies(packed(ids, weights, real))
            rows = unpacked(buffer)
            for start in range(0, ids.size, batch_rows):
                part = slice(start, start + batch_rows)
                placed = rows[part]
                cut = {name: column.index_select(0, placed.ids) for name, column in columns.items()}
                yield Batch(cut, ids[part], weights[part], real[part], num_bytes, placed)
                num_bytes = 0

    def _loaded(self, part: str) -> tuple[dict[str, Tensor], int]:
        """Return a source's columns, name → (N, …), and the bytes that were read for them just now."""
        if part in self._resident:
            return self._resident[part], 0
        if not self._resident:
            check_room(self._sources, self._device)  # of all that will lie there
        source = self._sources[part]
        check_columns(source.schema)
        self._resident[part], num_bytes = _load(source, self._device)
        return self._resident[part], num_bytes


def _load(source: SampleSource, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Read a source from its first row to its last, in pieces; return its columns on the device and the bytes read."""
    columns: dict[str, Tensor] = {}
    for name, column in source.schema.columns.items():
        dtype = torch.from_numpy(np.zeros(0, column.dtype)).dtype
        columns[name] = torch.empty((len(source), *column.shape), dtype=dtype, device=device)
    num_bytes, rows = 0, max(1, LOAD_BYTES // max(1, source.schema.row_bytes))
    for start in range(0, len(source), rows):
        ids = np.arange(start, min(start + rows, len(source)), dtype=np.int64)
        read, size = source.read(ids)
        num_bytes += size
        for name, column_N in columns.items():
            piece = host_tensor(read[name], pin=device.type == "cuda")
            column_N[start : start + ids.size].copy_(piece, non_blocking=True)
    return columns, num_bytes
