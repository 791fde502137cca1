"""Copies of a state that training goes on changing, for the thread that writes it."""

from __future__ import annotations

import copy
from typing import Any

import torch
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
