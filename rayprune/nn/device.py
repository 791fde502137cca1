"""Copies between host and device: states for the checkpoint writer, columns and tensors for the training step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def host_copy(state: Any) -> Any:
    """Return a nested state with every tensor copied to the host, for a writer thread while training changes it.

    On the host because a second optimizer state may not fit on a GPU beside the first. Tensors that share memory
    (tied weights) share it in the copy too, as in a file that `torch.save` writes.

    Args:
        state: a state_dict: mappings, lists and tuples down to tensors and plain values.
    """
    return _host_copy(state, {})


def _host_copy(state: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(state, Tensor):
        if state.layout is not torch.strided or state.is_conj() or state.is_neg():
            # Sparse tensors have no address, and lazy views have their base's.
            return state.detach().to("cpu", copy=True)
        memory = (state.data_ptr(), state.device, state.dtype, tuple(state.shape), state.stride())
        if memory not in copies:
            copies[memory] = state.detach().to("cpu", copy=True)
        return copies[memory]
    if isinstance(state, dict):
        return {key: _host_copy(value, copies) for key, value in state.items()}
    if isinstance(state, list | tuple):
        values = [_host_copy(value, copies) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    return copy.deepcopy(state)


def host_tensor(array: NDArray[Any] | Tensor, *, pin: bool = False) -> Tensor:
    """Return an array as a tensor, without a copy where possible; an array's memory is pinned if `pin`."""
    if isinstance(array, Tensor):
        return array
    # Arrays from the object store are read-only; the copy is cheap compared with a training step.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.pin_memory() if pin else tensor


def pin_column(column: NDArray[Any]) -> NDArray[Any] | Tensor:
    """Return a column of numbers as a pinned tensor, and any other column (text, objects) unchanged."""
    return host_tensor(column, pin=True) if column.dtype.kind in "biufc" else column


class Copies:
    """Copy tensors from the host to one device; on a GPU, on a stream of their own while other kernels run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors on the device, ready for every kernel launched from now on."""
        if self._stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            copies = [
                (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self._device, non_blocking=True)
                for tensor in tensors
            ]
        working_stream = torch.cuda.current_stream(self._device)
        working_stream.wait_stream(self._stream)
        for tensor in copies:
            # Their memory belongs to the copying stream, which must not reuse it before the work is done.
            tensor.record_stream(working_stream)
        return copies
