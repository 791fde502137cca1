"""The plain step of a network with several exits: it trains all exits at once, and every exit's loss counts the same.

Shapes: B rows of this worker's part of the batch, C classes, K exits.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rayprune.core.step_options import ExitsOptions, StepOptions
from rayprune.errors import ConfigError
from rayprune.nn.signals import compute_signals, max_probability, per_sample_loss
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.registry import register_step

Score = int | Literal["last", "mean", "depth"]


@register_step("exits")
class ExitStep(PlainStep):
    """Take one optimization step on Σ_k mean_b(w_b · l_bk).

    Selection methods see the signals of one exit, as if the network had no other, or their mean over the exits
    ("mean"; vectors entry by entry). With "depth" they see those of the last exit, with `loss` replaced by the number
    of the first exit whose confidence is at least `confident`, K + 1 if there is none. Metrics are always the last
    exit's.

    Args:
        model: (B, …) inputs to a list of K logits (B, C); DDP-wrapped or not.
        num_exits: K, at least 2.
        score: an exit in 1..K, "last", "mean" or "depth".
        confident: the probability in (0, 1] at which a sample leaves, for "depth".
        optimizer, **recipe: arguments of PlainStep.

    Raises:
        ConfigError: the network has no such exit.
    """

    options_class: ClassVar[type[StepOptions] | None] = ExitsOptions
    multi_exit = True

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

    def _logits(self, output: Any) -> Tensor:
        """Return (K, B, C)."""
        return torch.stack(tuple(output))

    def _losses(self, logits: Tensor, targets_B: Tensor, label_smoothing: float) -> Tensor:
        """Return (K, B), which broadcasts with weights (B,)."""
        return torch.stack([per_sample_loss(exit_BC, targets_B, label_smoothing=label_smoothing) for exit_BC in logits])

    def _compute_signals(
        self,
        names: tuple[str, ...],
        logits: Tensor,
        targets_B: Tensor,
        losses_B: Tensor,
        part: str = "model",
        embeddings_BD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hits = [compute_signals(("correct",), exit_BC, targets_B, losses_B[0])["correct"] for exit_BC in logits]
        losses_KB = losses_B.detach().float()
        return {
            **self._method_signals(names, logits, targets_B, losses_KB),
            "metric_loss": losses_KB[-1],
            "metric_correct": hits[-1],
            "exit_loss": losses_KB.T,
            "exit_correct": torch.stack(hits, dim=1),
        }

    def _method_signals(
        self, names: tuple[str, ...], logits_KBC: Tensor, targets_B: Tensor, losses_KB: Tensor
    ) -> dict[str, Tensor]:
        """Return the named signals of the exits that `score` names."""
        if self._score == "mean":
            exits = [
                compute_signals(names, logits_BC, targets_B, losses_B)
                for logits_BC, losses_B in zip(logits_KBC, losses_KB, strict=True)
            ]
            return {name: torch.stack([signals[name] for signals in exits]).mean(dim=0) for name in names}
        exit = self._score - 1 if isinstance(self._score, int) else -1
        signals = compute_signals(names, logits_KBC[exit], targets_B, losses_KB[exit])
        if self._score == "depth":
            depth_B = exit_depth(logits_KBC, self._confident)
            # A diverged sample has no depth: the recorder counts it as one whose loss is NaN.
            signals["loss"] = torch.where(losses_KB.isfinite().all(dim=0), depth_B, float("nan"))
        return signals


def exit_depth(logits_KBC: Tensor, confident: float) -> Tensor:
    """Return the number of the first exit whose largest probability is at least `confident`, K + 1 if there is none.

    Args:
        logits_KBC: (K, B, C) of any floating dtype.
        confident: in (0, 1].

    Returns:
        (B,) float32 in 1..K + 1.

    >>> exit_depth(torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]], [[0.0, 9.0], [0.0, 0.0], [0.0, 0.0]]]), 0.9)
    tensor([2., 1., 3.])
    """
    confident_KB = max_probability(logits_KBC.detach().float()) >= confident
    num_exits = logits_KBC.shape[0]
    numbers_K1 = torch.arange(1.0, num_exits + 1, device=logits_KBC.device)[:, None]
    return torch.where(confident_KB, numbers_K1, num_exits + 1.0).amin(dim=0)
