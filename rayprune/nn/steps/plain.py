"""The plain train step: forward, weighted loss, backward, clip, update. The other steps replace parts of it.

Shapes: B rows of this worker's part of the batch, C classes, W workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayprune.core.references import closest
from rayprune.core.step_options import PlainOptions, StepOptions
from rayprune.errors import ConfigError
from rayprune.nn.boundary import PairDistances
from rayprune.nn.signals import BOUNDARY_SIGNALS, EMBEDDING_SIGNALS, compute_signals, per_sample_loss
from rayprune.nn.steps.registry import register_step

# The metrics of every run are made of these, whatever the method needs.
_METRIC_SIGNALS = ("loss", "correct")


@dataclass(frozen=True)
class BatchPlace:
    """Which rows of the run a training step gets, for steps that set `takes_place`.

    Attributes:
        epoch, step, num_steps: 0-based epoch, and 0-based step of the epoch's training steps.
        ids: (B,) int64 on the device, this rank's rows in the order of the global batch.
        real: (B,) bool on the host, False for padding.
        facts: what the method reports about the epoch's selection.
    """

    epoch: int
    step: int
    num_steps: int
    ids: Tensor
    real: NDArray[np.bool_]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowCounts:
    """How many rows a training step trained, how many of weight 0, and how many it scored by a forward pass alone."""

    trained: int
    padded: int
    forwarded: int = 0


@register_step("plain")
class PlainStep:
    """Take one optimization step on a weighted batch.

    Args:
        model: what `module_of` returned, DDP-wrapped or not: (B, …) inputs to (B, C) logits.
        optimizer: over the model's parameters.
        signals: names that the step returns besides loss and correct.
        label_smoothing: in [0, 1).
        accumulate: number of micro-batches that the rows are split into; gradients are synchronized once.
        clip_norm: largest gradient norm, or None.
        autocast: dtype of mixed precision, or None for full precision.
        head: name in the network of the nn.Linear whose output the logits are, as `last_linear` finds it; signals of
            decision boundaries and of embeddings need it.

    Raises:
        ConfigError: signals of embeddings in training; only `evaluate` has them.

    Class attributes:
        options_class: of its options in `train.step`, which it gets as keywords; None if only methods name it.
        run_facts: what else it gets as keywords: seed, num_epochs, num_samples (of the training split).
        takes_place: whether a call gets a BatchPlace as the keyword `place`.
        multi_exit: whether it is for networks with several exits, whose number it gets as num_exits.
        compilable: whether the network may be compiled: the step calls it as a whole and computes none of its
            derivatives by hand.
        parts: networks that `evaluate` can run; "model" is always the first.

    Attributes:
        num_exits: K of a network with several exits, whose step also returns `exit_loss` and `exit_correct`, (B, K);
            1 otherwise.
        train_cost: of a training step per sample, relative to a plain one.
        meta_cost: additional cost per sample that weights are learned from.
    """

    options_class: ClassVar[type[StepOptions] | None] = PlainOptions
    run_facts: ClassVar[tuple[str, ...]] = ()
    takes_place: ClassVar[bool] = False
    multi_exit: ClassVar[bool] = False
    compilable: ClassVar[bool] = True
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
        if embedded := [name for name in signals if name in EMBEDDING_SIGNALS]:
            raise ConfigError(
                f"signal {embedded[0]!r} needs a forward-only pass: name it in sweep_signals, not in signals or "
                "train.record"
            )
        self.model, self.optimizer = model, optimizer
        # Without DDP: an evaluation has no gradients to synchronize.
        self._module: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._network = self._module
        self.train_cost, self.meta_cost = 1.0, 0.0
        self._signals = tuple(dict.fromkeys((*_METRIC_SIGNALS, *signals)))
        self._label_smoothing, self._accumulate, self._clip_norm = label_smoothing, accumulate, clip_norm
        self._autocast, self._head = autocast, head
        self._pair_distances = {"model": PairDistances()}
        self._training: bool | None = None

    @staticmethod
    def module_of(network: nn.Module, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
        """Return the module to train, here the network; DDP wraps it if there are several ranks."""
        return network

    def __call__(self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor) -> dict[str, Tensor]:
        """Update the model once.

        The loss is Σ(w·l)/B with the constant B of this worker (global batch ÷ W), never Σw: DDP's mean over the ranks
        is then the weighted mean over the global batch, and padding at weight 0 adds nothing to it. (Batch statistics,
        if the network has them, do include padding rows.)

        Returns:
            Signal name → (B, …) float32, detached, on the device. Metrics use `metric_loss` and `metric_correct`
            where `loss` and `correct` are scores of another kind.
        """
        self._set_mode(training=True)
        self.optimizer.zero_grad(set_to_none=True)
        rows = targets_B.shape[0]
        size = rows // self._accumulate
        signals: list[dict[str, Tensor]] = []
        for start in range(0, rows, size):
            part = slice(start, start + size)
            last = start + size >= rows
            logits, losses = self._backward(inputs[part], targets_B[part], weights_B[part], rows, last=last)
            signals.append(self._compute_signals(self._signals, logits.detach(), targets_B[part], losses.detach()))
        self._update()
        if len(signals) == 1:
            return signals[0]
        return {name: torch.cat([part[name] for part in signals]) for name in signals[0]}

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
            smoothed: True for the training loss, comparable with the scores of training; False for the plain loss.
            signals: names of SIGNALS.
            part: one of `parts`.

        Raises:
            ConfigError: an unknown part or signal.
        """
        self._set_mode(training=False)
        return self._forward_only(inputs, targets_B, smoothed=smoothed, signals=signals, part=part)

    def _forward_only(
        self, inputs: Tensor, targets_B: Tensor, *, smoothed: bool, signals: tuple[str, ...], part: str = "model"
    ) -> dict[str, Tensor]:
        """Return the signals of `evaluate` in the network's current mode."""
        needs_distances = any(name in BOUNDARY_SIGNALS for name in signals)
        needs_embeddings = any(name in EMBEDDING_SIGNALS for name in signals)
        embeddings: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._mixed(inputs))
            if needs_distances:
                stack.enter_context(self._precise_head())
            if needs_embeddings:
                stack.enter_context(self._head_inputs(embeddings))
            logits = self._eval_logits(inputs, self._check_part(part))
        losses = self._losses(logits, targets_B, self._label_smoothing if smoothed else 0.0)
        names = tuple(dict.fromkeys((*_METRIC_SIGNALS, *signals)))
        return self._compute_signals(names, logits, targets_B, losses, part, embeddings[0] if embeddings else None)

    def row_counts(self, num_real: int, num_rows: int) -> RowCounts:
        """Return what the last training step did with this rank's rows.

        Args:
            num_real: rows without padding.
            num_rows: B.
        """
        return RowCounts(num_real, num_rows - num_real)

    def state_dict(self) -> dict[str, Any]:
        """Return the state beyond network and optimizer, not copied, in types that weights_only loading takes: none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            ConfigError: the state is another train step's.
        """
        self._check_state(state, set())

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers, beyond the network's, that all ranks must share before an evaluation: none."""
        return iter(())

    def relative_cost(self, part: str = "model") -> float:
        """Return the multiply-adds of a forward pass through a part, relative to the model's.

        Raises:
            ConfigError: an unknown part.
        """
        self._check_part(part)
        return 1.0

    def _set_mode(self, *, training: bool) -> None:
        # Only on a change: a walk through all modules in every step takes as long as some of their kernels.
        if not (self._training is self.model.training is self._module.training is training):
            self.model.train(training)
            self._training = training

    def _update(self) -> None:
        """Clip the gradients and take the optimizer's step."""
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()

    def _eval_logits(self, inputs: Tensor, part: str) -> Tensor:
        return self._logits(self._module(inputs))

    @contextlib.contextmanager
    def _precise_head(self) -> Iterator[None]:
        """Compute the last layer in float32 despite autocast: bf16 logits have 8 bits, so many distances would tie."""
        if self._autocast is None or self._head is None:
            yield
            return

        def logits_of(layer: Any, inputs: tuple[Tensor], _: Tensor) -> Any:
            with torch.autocast(inputs[0].device.type, enabled=False):
                return layer.forward(inputs[0].float())  # of a proxy, its narrow forward

        handle = self._network.get_submodule(self._head).register_forward_hook(logits_of)
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled network would not run the hook
                yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _head_inputs(self, found: list[Tensor]) -> Iterator[None]:
        """Add the inputs of the last layer, (B, D), to a list."""
        if self._head is None:
            yield
            return
        layer = self._network.get_submodule(self._head)
        handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled network would not run the hook
                yield
        finally:
            handle.remove()

    def _logits(self, output: Any) -> Tensor:
        """Return the model's output as one tensor."""
        return output

    def _losses(self, logits: Tensor, targets_B: Tensor, label_smoothing: float) -> Tensor:
        """Return each sample's losses, (B,), or (…, B) if there are several."""
        return per_sample_loss(logits, targets_B, label_smoothing=label_smoothing)

    def _backward(
        self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor, rows: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradients; return its logits and losses."""
        return self._pass(inputs, targets_B, weights_B, rows, synchronize=last)

    def _pass(
        self,
        inputs: Tensor,
        targets_B: Tensor,
        weights_B: Tensor,
        rows: float,
        *,
        synchronize: bool,
        factor: float = 1.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Go forward and backward once, with the module's `options` and the loss Σ(w·l)/rows times `factor`."""
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if not synchronize and isinstance(self.model, nn.parallel.DistributedDataParallel):
            context = self.model.no_sync()
        with context:
            with self._mixed(inputs):
                logits = self._logits(self.model(inputs, **options))
            losses = self._losses(logits, targets_B, self._label_smoothing)
            (factor * ((losses * weights_B).sum() / rows)).backward()
        return logits, losses

    def _compute_signals(
        self,
        names: tuple[str, ...],
        logits: Tensor,
        targets_B: Tensor,
        losses_B: Tensor,
        part: str = "model",
        embeddings_BD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        distances_CC = None
        if self._head is not None and any(name in BOUNDARY_SIGNALS for name in names):
            weight = self._network.get_submodule(self._head).weight
            assert isinstance(weight, Tensor)
            distances_CC = self._pair_distances[part](weight)
        return compute_signals(
            names, logits, targets_B, losses_B, distances_CC=distances_CC, embeddings_BD=embeddings_BD
        )

    def _check_part(self, part: str) -> str:
        if part not in self.parts:
            raise ConfigError(f"unknown part {part!r} of the train step: {closest(part, self.parts)}")
        return part

    @staticmethod
    def _check_state(state: dict[str, Any], keys: set[str]) -> None:
        if set(state) != keys:
            names = ", ".join(sorted(state)[:3]) or "nothing"
            raise ConfigError(f"the state is of another train step (it holds {names}): load one of this step")

    def _mixed(self, inputs: Tensor) -> Any:
        return torch.autocast(inputs.device.type, self._autocast, enabled=self._autocast is not None)
