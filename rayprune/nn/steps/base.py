"""What every train step is, whatever it does inside; see `TrainStep`.

Shapes: B rows of this worker's share of the batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TrainStep(Protocol):
    """One optimisation step that returns per-sample signals, and the forward that goes with it.

    A class of STEPS has besides a static `module_of(network, input_shape, **options) -> nn.Module`, the module to be
    wrapped in DDP where there are several ranks, and takes that module, the optimiser, and the options again.

    Attributes:
        model: what the step trains, DDP-wrapped or not.
        optimizer: over the model's parameters.
        num_exits: K of a multi-exit network, whose `evaluate` also returns `exit_loss` and `exit_correct`, (B, K);
            1 otherwise.
        parts: networks that `evaluate` can go through; "model" is the first and always there.
        train_cost: of one sample's step, relative to a plain one.
        meta_cost: what comes to it for each sample that weights are learned from.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    num_exits: int
    parts: tuple[str, ...]
    train_cost: float
    meta_cost: float

    def __call__(self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor) -> dict[str, Tensor]:
        """Update the model once; return the step's signals, (B, …) float32, detached, on the device.

        Where `loss` and `correct` are scores of another kind, metrics count `metric_loss` and `metric_correct`.
        """

    def evaluate(
        self,
        inputs: Tensor,
        targets_B: Tensor,
        *,
        smoothed: bool,
        signals: tuple[str, ...] = (),
        part: str = "model",
    ) -> dict[str, Tensor]:
        """Return loss, correct and the named signals of one part in eval mode, without an update."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the step holds beyond network and optimiser, in types that torch.load(weights_only=True) takes.

        The tensors are the step's own, not copies.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a like step returned."""

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers beyond the network's that all ranks must share before an evaluation."""

    def relative_cost(self, part: str = "model") -> float:
        """Return the multiply-adds of a forward through a part, relative to the model's."""
