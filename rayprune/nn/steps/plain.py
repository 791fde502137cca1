"""The plain step: forward, weighted loss, backward, clip, optimiser.

Shapes: B rows of this worker's share of the batch, C classes, W workers.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.nn.losses import per_sample_loss
from rayprune.nn.signals import compute_signals

# What the metrics of every run are made of, whatever the method asks for.
_ALWAYS = ("loss", "correct")


class PlainStep:
    """Take one optimisation step on a weighted batch.

    Args:
        model: (B, …) inputs to (B, C) logits; DDP-wrapped or not.
        optimizer: over the model's parameters.
        signals: names that the step returns besides loss and correct.
        label_smoothing: in [0, 1).
        accumulate: micro-batches that the share is split into; gradients are synchronised once.
        clip_norm: largest gradient norm, or None.
        autocast: dtype of mixed precision, or None for full precision.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        signals: tuple[str, ...] = (),
        label_smoothing: float = 0.0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._signals = tuple(dict.fromkeys((*_ALWAYS, *signals)))
        self._label_smoothing, self._accumulate, self._clip_norm = label_smoothing, accumulate, clip_norm
        self._autocast = autocast

    def __call__(self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor) -> dict[str, Tensor]:
        """Update the model once.

        The loss is Σ(w·l)/B with the constant B of this worker's share (global batch ÷ W), never Σw: DDP's mean over
        the ranks is then the weighted mean over the global batch, and padding at weight 0 adds nothing to it (batch
        statistics, where a network has them, do see its rows).

        Returns:
            signal name → (B, …) float32, detached, on the device.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        rows = targets_B.shape[0]
        size = rows // self._accumulate
        seen: list[dict[str, Tensor]] = []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            last = start + size >= rows
            with contextlib.nullcontext() if last else _no_sync(self.model):
                logits, losses = self._forward(inputs[part], targets_B[part])
                ((losses * weights_B[part]).sum() / rows).backward()
            seen.append(compute_signals(self._signals, logits.detach(), targets_B[part], losses.detach()))
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()
        return seen[0] if len(seen) == 1 else {name: torch.cat([s[name] for s in seen]) for name in self._signals}

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets_B: Tensor, *, smoothed: bool) -> dict[str, Tensor]:
        """Return the same signals in eval mode, without an update.

        Args:
            smoothed: True for the training loss, whose scores go on with those of training; False for the plain loss.
        """
        self.model.eval()
        # Past DDP: an evaluation has no gradients to synchronise.
        module: nn.Module = getattr(self.model, "module", self.model)
        with self._mixed(inputs):
            logits = module(inputs)
        losses = per_sample_loss(logits, targets_B, label_smoothing=self._label_smoothing if smoothed else 0.0)
        return compute_signals(self._signals, logits, targets_B, losses)

    def _forward(self, inputs: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        with self._mixed(inputs):
            logits = self.model(inputs)
        return logits, per_sample_loss(logits, targets_B, label_smoothing=self._label_smoothing)

    def _mixed(self, inputs: Tensor) -> Any:
        return torch.autocast(inputs.device.type, self._autocast, enabled=self._autocast is not None)


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()  # type: ignore[no-any-return, operator]
    return contextlib.nullcontext()
