"""Copies of a state that training goes on changing, for the thread that writes it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def host_copy(state: Any) -> Any:
    """Return a nested state with every tensor copied to the host.

    On the host, because a second optimiser state may not fit on a GPU beside the first. Tensors that share memory
    (tied weights) share it in the copy, as they do in what `torch.save` writes of the original.

    Args:
        state: a state_dict, of mappings, lists and tuples down to tensors and plain values.
    """
    return _copied(state, {})


def _copied(state: Any, seen: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(state, Tensor):
        if state.layout is not torch.strided or state.is_conj() or state.is_neg():
            return state.detach().to("cpu", copy=True)  # sparse ones have no address, lazy views that of their base
        place = (state.data_ptr(), state.device, state.dtype, tuple(state.shape), state.stride())
        if place not in seen:
            seen[place] = state.detach().to("cpu", copy=True)
        return seen[place]
    if isinstance(state, dict):
        return {key: _copied(value, seen) for key, value in state.items()}
    if isinstance(state, list | tuple):
        values = [_copied(value, seen) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    return copy.deepcopy(state)


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
