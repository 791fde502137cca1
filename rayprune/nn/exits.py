"""Networks with several exits: their forward returns a list (or tuple) of K ≥ 2 logits, the earliest exit first.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rayprune.nn.boundary import eval_mode


def num_exits_of(output: Any) -> int:
    """Return how many exits a forward's output is of: K, or 1 for one tensor.

    Raises:
        ValueError: one line: a list of less than two, of something else than (B, C) logits, or of different shapes.
    """
    if isinstance(output, Tensor):
        return 1
    if not isinstance(output, list | tuple):
        raise ValueError(f"it returns {type(output).__name__}, not logits (B, C) or a list of them")
    if len(output) < 2:
        raise ValueError(f"it returns a list of {len(output)}: a network of one exit returns its logits themselves")
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in output]
    if len(shapes[0]) != 2 or isinstance(shapes[0], str) or len(set(shapes)) > 1:
        raise ValueError(f"its exits return {', '.join(map(str, shapes))}: all must return logits (B, C) of one C")
    return len(output)


@torch.no_grad()
def count_exits(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return a network's number of exits, by one forward of zeros in eval mode: 1 where it returns one tensor.

    Raises:
        ValueError: as `num_exits_of`.
    """
    parameter = next(network.parameters())
    example = torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with eval_mode(network):
        return num_exits_of(network(example))
