"""Put a batch's rows on the worker's device.

On a GPU everything is copied from pinned memory on a CUDA stream of its own. Nothing in a step waits for the device, so
that the host is steps ahead of it: a batch's copy passes while the device still works on the batches before. Ids,
weights and mask go as one buffer, because a small copy costs the same few µs whatever its size. Images go as the bytes
they are and are normalised on the device.

Shapes: B rows of a batch, R rows of any number of batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.engine.stream import Batch

_ID_BYTES, _WEIGHT_BYTES = 8, 4


@dataclass(frozen=True)
class PlacedRows:
    """What the plan says of rows, on a device: ids (R,) int64, weights (R,) float32, real (R,) bool."""

    ids: Tensor
    weights: Tensor
    real: Tensor

    def __getitem__(self, part: slice) -> PlacedRows:
        """Return some of the rows."""
        return PlacedRows(self.ids[part], self.weights[part], self.real[part])


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


def host_tensor(array: NDArray[Any] | Tensor, *, pin: bool = False) -> Tensor:
    """Return an array as a tensor, without a copy where that can be; pinned, of an array only, where asked for."""
    if isinstance(array, Tensor):
        return array
    # Arrays out of the object store are read-only; the copy is small beside the step that follows.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.pin_memory() if pin else tensor


def pinned(column: NDArray[Any]) -> NDArray[Any] | Tensor:
    """Return a column as a tensor in memory that a GPU copies from by itself; text and objects stay what they are."""
    return host_tensor(column, pin=True) if column.dtype.kind in "biufc" else column


class Copies:
    """Copy tensors of the host to one device, beside the work that it has."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors on the device, ready for what is launched there from now on."""
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            moved = [
                (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)
                for tensor in tensors
            ]
        working = torch.cuda.current_stream(self._device)
        working.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(working)  # its memory belongs to the copying stream, which must not reuse it yet
        return moved


class Placer:
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
