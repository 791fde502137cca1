"""Small networks with several exits, named in configs as `path/to/multi_exit_models.py:name`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


class Tower(nn.Module):
    """Layers with an exit after each."""

    def __init__(self, features: int, widths: list[int], num_classes: int, norm: bool, tuples: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in zip([features, *widths], widths, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if norm else nn.Identity() for width in widths)
        self.classifier = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)
        self._tuples = tuples

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor] | tuple[torch.Tensor, ...]:
        """Return one tensor of logits (B, C) per exit."""
        hidden, exits = inputs.flatten(1), []
        for block, norm, classifier in zip(self.blocks, self.norms, self.classifier, strict=True):
            hidden = torch.tanh(norm(block(hidden)))
            exits.append(classifier(hidden))
        return tuple(exits) if self._tuples else exits


def tower(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    exits: int = 3,
    width: int = 16,
    norm: bool = True,
    double: bool = False,
    tuples: bool = False,
) -> nn.Module:
    """Build a network of `exits` exits."""
    features = int(torch.Size(input_shape).numel())
    model = Tower(features, [width] * exits, num_classes, norm, tuples)
    return model.double() if double else model


def one_in_a_list(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build a network that returns a list of one."""
    return tower(num_classes=num_classes, input_shape=input_shape, exits=1)


def of_different_classes(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build a network whose first exit has one class more."""
    model = tower(num_classes=num_classes, input_shape=input_shape)
    assert isinstance(model, Tower)
    model.classifier[0] = nn.Linear(16, num_classes + 1)
    return model


def fails_once(*, num_classes: int, input_shape: tuple[int, ...], marker: str, passes: int) -> nn.Module:
    """Build a network that fails at the `passes`-th forward pass of a training, unless it has failed before."""
    model, count = tower(num_classes=num_classes, input_shape=input_shape), 0

    def fail(module: nn.Module, _: object) -> None:
        nonlocal count
        count += module.training
        if count == passes and not Path(marker).exists():
            Path(marker).touch()
            raise RuntimeError("failed on purpose")

    model.register_forward_pre_hook(fail)
    return model
