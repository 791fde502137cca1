"""A custom train step: the focal loss of Lin et al. (ICCV 2017, arXiv 1708.02002).

    rayprune train configs/digits_full.yaml \
        train.step.name=examples/focal_step.py:FocalStep train.step.gamma=1.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.nn.steps import PlainStep, StepOptions


@dataclass(frozen=True)
class FocalOptions(StepOptions):
    """The options are the keys of `train.step`.

    Args:
        gamma: γ, at least 0; the loss l counts (1 − e^−l)^γ times.
    """

    gamma: float = 2.0


class FocalStep(PlainStep):
    """Give well-learned samples less weight."""

    options_class = FocalOptions

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, gamma: float, **recipe: Any) -> None:
        super().__init__(model, optimizer, **recipe)
        self._gamma = gamma

    def _losses(self, logits: Tensor, targets_B: Tensor, label_smoothing: float) -> Tensor:
        losses_B = super()._losses(logits, targets_B, label_smoothing)
        return (1.0 - torch.exp(-losses_B)) ** self._gamma * losses_B
