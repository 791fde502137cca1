"""Batches on the worker's device: copied as they come, or indexed from rows that stay there.

On a GPU, everything is copied from pinned memory on a CUDA stream of its own, and no step waits for the device, so the
host runs steps ahead: a batch is copied while the device still works on earlier ones. Ids, weights and mask travel as
one buffer, because a small copy costs a few µs whatever its size. Images travel as bytes and are normalized on the
device.

`DeviceStream` is the transport `stream: device`, for data that fit: each worker loads its sources once, whole, in the
order of the ids. Then a batch is an `index_select`, and tens of thousands of rows of the plan are one small copy.
Plans, batches, order and results are those of `stream: local`.

Shapes: N samples of a source, B rows of a batch, R rows of any number of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.engine.data.batch import Batch, PlacedRows
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.errors import ConfigError
from rayprune.nn.device import Copies, host_tensor
from rayprune.sources import SampleSource, Schema

_ID_BYTES, _WEIGHT_BYTES = 8, 4
LOAD_BYTES = 64 * 1024 * 1024
# The network, its gradients and activations need memory, too.
_USABLE_FRACTION = 0.8
_ALTERNATIVE = "use stream local"


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the worker's device.

    Attributes:
        inputs: (B, …) as the source delivers them.
        targets: (B,) int64.
        rows: the batch's rows of the plan.
        draws: (B, …) int64, the augmentation's random draws, if it made any.
    """

    inputs: Tensor
    targets: Tensor
    rows: PlacedRows
    draws: Tensor | None = None


class DevicePlacer:
    """Put batches on a device.

    Args:
        column: the name of the input column.
        device: the target device.
    """

    def __init__(self, column: str, device: torch.device) -> None:
        self._column, self._copies = column, Copies(device)

    def __call__(self, batch: Batch, draws: NDArray[np.int64] | None = None) -> DeviceBatch:
        """Return the batch and its draws on the device; a batch that a transport has put there is not copied."""
        inputs, targets = (host_tensor(batch.columns[name]) for name in (self._column, "label"))
        host_draws = [] if draws is None else [torch.from_numpy(draws)]
        if batch.placed is not None:
            return DeviceBatch(inputs, targets, batch.placed, *self._copies(*host_draws))
        packed = pack_rows(batch.ids, batch.weights, batch.real)
        inputs, targets, rows, *device_draws = self._copies(inputs, targets, packed, *host_draws)
        return DeviceBatch(inputs, targets, unpack_rows(rows), *device_draws)


def pack_rows(ids: NDArray[np.int64], weights: NDArray[np.float32], real: NDArray[np.bool_]) -> Tensor:
    """Pack R rows of a plan into one (13 R,) uint8 tensor on the host, the widest dtype first."""
    return torch.from_numpy(
        np.concatenate([np.ascontiguousarray(array).view(np.uint8) for array in (ids, weights, real)])
    )


def unpack_rows(buffer: Tensor) -> PlacedRows:
    """Return views of packed rows, on the buffer's device.

    >>> packed = pack_rows(np.array([7, 2**60]), np.array([1, 0], np.float32), np.array([True, False]))
    >>> unpack_rows(packed).ids.tolist()
    [7, 1152921504606846976]
    """
    num_rows = buffer.numel() // (_ID_BYTES + _WEIGHT_BYTES + 1)
    weights_at, real_at = _ID_BYTES * num_rows, (_ID_BYTES + _WEIGHT_BYTES) * num_rows
    return PlacedRows(
        buffer[:weights_at].view(torch.int64),
        buffer[weights_at:real_at].view(torch.float32),
        buffer[real_at:].view(torch.bool),
    )


def check_columns(schema: Schema) -> None:
    """Refuse columns that tensors cannot hold, such as text and ragged ones.

    Raises:
        ConfigError: names the first such column, with the cure.
    """
    for name, column in schema.columns.items():
        if column.is_ragged:
            raise ConfigError(
                f"stream device: column {name!r} is ragged, its rows have several shapes: {_ALTERNATIVE}, with a "
                "collate_fn that pads it"
            )
        try:
            torch.from_numpy(np.zeros(1, column.dtype)).index_select(0, torch.zeros(1, dtype=torch.int64))
        except (TypeError, RuntimeError):
            raise ConfigError(
                f"stream device: column {name!r} has dtype {column.dtype}, which tensors cannot hold: {_ALTERNATIVE}"
            ) from None


def check_room(sources: Mapping[str, SampleSource], device: torch.device) -> None:
    """Refuse data that do not fit into the free memory of a device.

    Raises:
        ConfigError: names the size and the cure.
    """
    needed = sum(len(source) * source.schema.row_bytes for source in sources.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > _USABLE_FRACTION * free:
        raise ConfigError(
            f"stream device: the decoded samples take {needed / 2**30:.3g} GiB, more than {_USABLE_FRACTION:.0%} of "
            f"the {free / 2**30:.3g} GiB that are free on {device}: {_ALTERNATIVE}, or fewer samples"
        )


class DeviceStream:
    """Indexes rows that stay on the device.

    Args:
        sources: "train" and, if there is one, "validation".
        device: where the rows and the batches are.
    """

    resumes_inside = True

    def __init__(self, sources: Mapping[str, SampleSource], device: torch.device) -> None:
        self._sources, self._device, self._copies = sources, device, Copies(device)
        self._resident: dict[str, dict[str, Tensor]] = {}

    def batches(self, plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport; the columns are tensors on the device, and `placed` is set."""
        columns, num_bytes = self._columns("validation" if plan_pass.phase == "validate" else "train")
        for ids, weights, real in spans:
            (packed,) = self._copies(pack_rows(ids, weights, real))
            span = unpack_rows(packed)
            for start in range(0, ids.size, batch_rows):
                rows = slice(start, start + batch_rows)
                placed = span[rows]
                batch = {name: column.index_select(0, placed.ids) for name, column in columns.items()}
                yield Batch(batch, ids[rows], weights[rows], real[rows], num_bytes, placed)
                num_bytes = 0

    def _columns(self, part: str) -> tuple[dict[str, Tensor], int]:
        """Return a source's columns, name → (N, …), and the bytes read to load them now."""
        if part in self._resident:
            return self._resident[part], 0
        if not self._resident:
            check_room(self._sources, self._device)  # for all sources at once
        source = self._sources[part]
        check_columns(source.schema)
        self._resident[part], num_bytes = _load(source, self._device)
        return self._resident[part], num_bytes


def _load(source: SampleSource, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Read a whole source in pieces; return its columns on the device and the bytes read."""
    columns: dict[str, Tensor] = {}
    for name, column in source.schema.columns.items():
        dtype = torch.from_numpy(np.zeros(0, column.dtype)).dtype
        columns[name] = torch.empty((len(source), *column.shape), dtype=dtype, device=device)
    num_bytes, num_rows = 0, max(1, LOAD_BYTES // max(1, source.schema.row_bytes))
    for start in range(0, len(source), num_rows):
        ids = np.arange(start, min(start + num_rows, len(source)), dtype=np.int64)
        piece, size = source.read(ids)
        num_bytes += size
        for name, column_N in columns.items():
            rows = host_tensor(piece[name], pin=device.type == "cuda")
            column_N[start : start + ids.size].copy_(rows, non_blocking=True)
    return columns, num_bytes
