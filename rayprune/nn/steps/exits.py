"""The plain step of a network with several exits: all exits are trained at once, each loss counts the same.

Shapes: B rows of this worker's share of the batch, C classes, K exits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rayprune.errors import ConfigError
from rayprune.nn.signals import BOUNDARY_SIGNALS, compute_signals, per_sample_loss
from rayprune.nn.steps.plain import PlainStep

Score = int | Literal["last", "mean", "depth"]


class ExitStep(PlainStep):
    """Take one optimisation step on Σ_k mean_b(w_b · l_bk).

    The signals that selection methods see are one exit's, as if the network had no other; or their mean over the exits
    ("mean", vectors entry by entry); or, for "depth", those of the last exit with `loss` replaced by the number of the
    first exit whose confidence is at least `confident`, K + 1 where none is. Metrics are the last exit's, always.

    Args:
        model: (B, …) inputs to a list of K logits (B, C); DDP-wrapped or not.
        optimizer: over the model's parameters.
        num_exits: K, at least 2.
        score: an exit in 1..K, "last", "mean" or "depth".
        confident: the probability in (0, 1] at which a sample leaves, for "depth".
        **recipe: as PlainStep takes it.

    Raises:
        ConfigError: there is no such exit, or a signal is none of an exit's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_exits: int,
        score: Score = "last",
        confident: float = 0.9,
        **recipe: Any,
    ) -> None:
        super().__init__(model, optimizer, **recipe)
        if isinstance(score, int) and not 1 <= score <= num_exits:
            raise ConfigError(f"train.step.score = {score}: the model has exits 1 to {num_exits}")
        self.num_exits, self._score, self._confident = num_exits, score, confident

    @staticmethod
    def module_of(network: nn.Module, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
        """Return what is to be trained: the network itself."""
        return network

    def _logits(self, output: Any) -> Tensor:
        """Return (K, B, C)."""
        return torch.stack(tuple(output))

    def _losses(self, logits: Tensor, targets_B: Tensor, label_smoothing: float) -> Tensor:
        """Return (K, B), so that weights (B,) go with it as they are."""
        return torch.stack([per_sample_loss(exit_BC, targets_B, label_smoothing=label_smoothing) for exit_BC in logits])

    def _compute(
        self, names: tuple[str, ...], logits: Tensor, targets_B: Tensor, losses_B: Tensor, part: str = "model"
    ) -> dict[str, Tensor]:
        if any(name in BOUNDARY_SIGNALS for name in names):
            raise ConfigError(
                f"signals of decision boundaries need one last layer, the model has {self.num_exits} exits"
            )
        hits = [compute_signals(("correct",), exit_BC, targets_B, losses_B[0])["correct"] for exit_BC in logits]
        losses_KB = losses_B.detach().float()
        return {
            **self._scored(names, logits, targets_B, losses_KB),
            "metric_loss": losses_KB[-1],
            "metric_correct": hits[-1],
            "exit_loss": losses_KB.T,
            "exit_correct": torch.stack(hits, dim=1),
        }

    def _scored(
        self, names: tuple[str, ...], logits_KBC: Tensor, targets_B: Tensor, losses_KB: Tensor
    ) -> dict[str, Tensor]:
        """Return the named signals as `score` says."""
        if self._score == "mean":
            each = [
                compute_signals(names, logits_KBC[place], targets_B, losses_KB[place])
                for place in range(self.num_exits)
            ]
            return {name: torch.stack([seen[name] for seen in each]).mean(dim=0) for name in names}
        place = self._score - 1 if isinstance(self._score, int) else self.num_exits - 1
        seen = compute_signals(names, logits_KBC[place], targets_B, losses_KB[place])
        if self._score == "depth":
            depth_B = exit_depth(logits_KBC, self._confident)
            # What diverged has no depth: the recorder counts it as it counts a NaN loss.
            seen["loss"] = torch.where(losses_KB.isfinite().all(dim=0), depth_B, float("nan"))
        return seen


def exit_depth(logits_KBC: Tensor, confident: float) -> Tensor:
    """Return the number of the first exit whose largest probability is at least `confident`; K + 1 where none is.

    Args:
        logits_KBC: (K, B, C) of any floating dtype.
        confident: in (0, 1].

    Returns:
        (B,) float32 in 1..K + 1.

    >>> exit_depth(torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]], [[0.0, 9.0], [0.0, 0.0], [0.0, 0.0]]]), 0.9)
    tensor([2., 1., 3.])
    """
    sure_KB = logits_KBC.detach().float().softmax(dim=2).amax(dim=2) >= confident
    num_exits = logits_KBC.shape[0]
    numbers_K1 = torch.arange(1.0, num_exits + 1, device=logits_KBC.device)[:, None]
    return torch.where(sure_KB, numbers_K1, num_exits + 1.0).amin(dim=0)
