"""The plain step: forward, weighted loss, backward, clip, optimiser.

Shapes: B rows of this worker's share of the batch, C classes, W workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.core.references import closest
from rayprune.errors import ConfigError
from rayprune.nn.boundary import PairDistances
from rayprune.nn.signals import BOUNDARY_SIGNALS, compute_signals, per_sample_loss

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
        head: name in the network of the nn.Linear whose output the logits are, as `last_linear` finds it; None where
            no signal of decision boundaries is asked for.
    """

    parts: tuple[str, ...] = ("model",)
    num_exits = 1

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
        head: str | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        # Past DDP: an evaluation has no gradients to synchronise.
        self._module: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._network = self._module
        self.train_cost, self.meta_cost = 1.0, 0.0
        self._signals = tuple(dict.fromkeys((*_ALWAYS, *signals)))
        self._label_smoothing, self._accumulate, self._clip_norm = label_smoothing, accumulate, clip_norm
        self._autocast, self._head = autocast, head
        self._tables = {"model": PairDistances()}
        self._training: bool | None = None

    @staticmethod
    def module_of(network: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
        """Return what is to be trained: the network itself."""
        return network

    def __call__(self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor) -> dict[str, Tensor]:
        """Update the model once.

        The loss is Σ(w·l)/B with the constant B of this worker's share (global batch ÷ W), never Σw: DDP's mean over
        the ranks is then the weighted mean over the global batch, and padding at weight 0 adds nothing to it (batch
        statistics, where a network has them, do see its rows).

        Returns:
            signal name → (B, …) float32, detached, on the device.
        """
        self._mode(training=True)
        self.optimizer.zero_grad(set_to_none=True)
        rows = targets_B.shape[0]
        size = rows // self._accumulate
        seen: list[dict[str, Tensor]] = []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            last = start + size >= rows
            logits, losses = self._backward(inputs[part], targets_B[part], weights_B[part], rows, last=last)
            seen.append(self._compute(self._signals, logits.detach(), targets_B[part], losses.detach()))
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()
        return seen[0] if len(seen) == 1 else {name: torch.cat([s[name] for s in seen]) for name in seen[0]}

    @torch.no_grad()
    def evaluate(
        self,
        inputs: Tensor,
        targets_B: Tensor,
        *,
        smoothed: bool,
        signals: tuple[str, ...] = (),
        part: str = "model",
    ) -> dict[str, Tensor]:
        """Return loss, correct and the named signals in eval mode, without an update.

        Args:
            smoothed: True for the training loss, whose scores go on with those of training; False for the plain loss.
            signals: names of SIGNALS.
            part: one of `parts`.

        Raises:
            ValueError: an unknown part or signal.
        """
        self._mode(training=False)
        with self._mixed(inputs):
            logits = self._evaluated(inputs, self._known(part))
        losses = self._losses(logits, targets_B, self._label_smoothing if smoothed else 0.0)
        return self._compute(tuple(dict.fromkeys((*_ALWAYS, *signals))), logits, targets_B, losses, part)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: network and optimiser are all the state there is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned: nothing.

        Raises:
            ValueError: the state is of a step that holds some.
        """
        if state:
            raise ConfigError(f"the state of another train step (it holds {', '.join(sorted(state)[:3])}): not taken")

    def buffers(self) -> Iterator[Tensor]:
        """Yield nothing: the network's own buffers are all there are."""
        return iter(())

    def relative_cost(self, part: str = "model") -> float:
        """Return the multiply-adds of a forward through a part, relative to the model's: 1 for the model.

        Raises:
            ValueError: an unknown part.
        """
        self._known(part)
        return 1.0

    def _mode(self, *, training: bool) -> None:
        # Only where it changes: a walk through all modules at every step takes as long as some of their kernels.
        if not (self._training is self.model.training is self._module.training is training):
            self.model.train(training)
            self._training = training

    def _evaluated(self, inputs: Tensor, part: str) -> Tensor:
        return self._logits(self._module(inputs))

    def _logits(self, output: Any) -> Tensor:
        """Return what the model gave as one tensor."""
        logits: Tensor = output
        return logits

    def _losses(self, logits: Tensor, targets_B: Tensor, label_smoothing: float) -> Tensor:
        """Return each sample's losses, (B,), or (…, B) where it has several."""
        return per_sample_loss(logits, targets_B, label_smoothing=label_smoothing)

    def _backward(
        self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor, rows: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradients; return its logits and losses."""
        return self._pass(inputs, targets_B, weights_B, rows, synchronise=last)

    def _pass(
        self,
        inputs: Tensor,
        targets_B: Tensor,
        weights_B: Tensor,
        rows: int,
        *,
        synchronise: bool,
        factor: float = 1.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Go forward and backward once; `options` are the module's, and the loss counts `factor` times."""
        with contextlib.nullcontext() if synchronise else _no_sync(self.model):
            with self._mixed(inputs):
                logits = self._logits(self.model(inputs, **options))
            losses = self._losses(logits, targets_B, self._label_smoothing)
            (factor * ((losses * weights_B).sum() / rows)).backward()
        return logits, losses

    def _compute(
        self, names: tuple[str, ...], logits: Tensor, targets_B: Tensor, losses_B: Tensor, part: str = "model"
    ) -> dict[str, Tensor]:
        distances_CC = None
        if any(name in BOUNDARY_SIGNALS for name in names):
            if self._head is None:
                raise ConfigError("signals of decision boundaries need the step's head: give head=last_linear(…)")
            weight = self._network.get_submodule(self._head).weight
            assert isinstance(weight, Tensor)
            distances_CC = self._tables[part](weight)
        return compute_signals(names, logits, targets_B, losses_B, distances_CC=distances_CC)

    def _known(self, part: str) -> str:
        if part not in self.parts:
            raise ConfigError(f"unknown part {part!r} of the train step: {closest(part, self.parts)}")
        return part

    def _mixed(self, inputs: Tensor) -> Any:
        return torch.autocast(inputs.device.type, self._autocast, enabled=self._autocast is not None)


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()  # type: ignore[no-any-return, operator]
    return contextlib.nullcontext()
