"""A small network that can run exit by exit, named in configs as `path/to/stepwise_model.py:ladder`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class Ladder(nn.Module):
    """Layers of growing width, with an exit after each."""

    def __init__(self, num_features: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([num_features, *widths]))
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)
        self.num_exits = len(widths)

    def begin(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the state before exit 0."""
        return inputs.flatten(1)

    def advance(self, exit: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits at an exit, and the next state."""
        state = self.layers[exit](state).relu()
        return self.heads[exit](state), state

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of all exits."""
        state, exits = self.begin(inputs), []
        for number in range(self.num_exits):
            logits, state = self.advance(number, state)
            exits.append(logits)
        return exits


def ladder(*, num_classes: int, input_shape: tuple[int, ...], widths: Sequence[int] = (8, 16, 32)) -> nn.Module:
    """Build a network with an exit after a layer of each width."""
    return Ladder(math.prod(input_shape), widths, num_classes)
