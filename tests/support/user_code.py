"""What a user would bring to a run, named in configs as `path/to/user_code.py:name`: models, methods, sources.

Models are an MLP that misbehaves while it trains; what happens once only leaves a marker file behind.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import ray.train
import torch
from torch import nn

from rayprune.core import ScoreTable, Selection
from rayprune.core.selector import EpochContext
from rayprune.engine.scoring import recorder
from rayprune.methods import Method
from rayprune.nn.models import build_model
from rayprune.sources import SampleSource, Schema, Splits, open_data


def _mlp(num_classes: int, input_shape: tuple[int, ...], act: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = build_model("mlp", num_classes=num_classes, input_shape=input_shape, hidden=[32])
    model.register_forward_hook(lambda module, _, logits: act(logits) if module.training else None)
    return model


def nan_rows(*, num_classes: int, input_shape: tuple[int, ...], rows: int) -> nn.Module:
    """Make the first `rows` logits of every training batch NaN, without harm to the gradient of the others."""

    def spoil(logits: torch.Tensor) -> torch.Tensor:
        spoilt = torch.arange(logits.shape[0])[:, None] < rows
        return torch.where(spoilt, torch.full_like(logits, float("nan")), logits)

    return _mlp(num_classes, input_shape, spoil)


def broken(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Raise in training."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("this model is broken\nand says so in two lines")

    return _mlp(num_classes, input_shape, fail)


def slow(*, num_classes: int, input_shape: tuple[int, ...], pause_s: float = 0.0, push_rows: int = 65_536) -> nn.Module:
    """Take `pause_s` longer a step, and have the worker push its observations every `push_rows`."""
    recorder.PUSH_ROWS = push_rows  # the Recorder of this worker is made after the network

    def pause(logits: torch.Tensor) -> torch.Tensor:
        time.sleep(pause_s)
        return logits

    return _mlp(num_classes, input_shape, pause)


def noisy(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Draw from torch's global generator at every training step."""
    return _mlp(num_classes, input_shape, lambda logits: torch.dropout(logits, 0.2, train=True))


def dies_once(*, num_classes: int, input_shape: tuple[int, ...], step: int, marker: str) -> nn.Module:
    """Kill rank 1's process at its `step`-th training step, unless it happened before."""
    seen = 0

    def die(logits: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == step and ray.train.get_context().get_world_rank() == 1 and not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)
        return logits

    return _mlp(num_classes, input_shape, die)


def counted(
    *, num_classes: int, input_shape: tuple[int, ...], log: str, kill_at: int = 0, pause_s: float = 0.0
) -> nn.Module:
    """Add a byte to `log` at every training step of rank 0; kill this process once, before its `kill_at`-th byte."""

    def count(logits: torch.Tensor) -> torch.Tensor:
        time.sleep(pause_s)
        if ray.train.get_context().get_world_rank() > 0:
            return logits
        done = Path(log).stat().st_size if Path(log).exists() else 0
        if done + 1 == kill_at and not Path(f"{log}.killed").exists():
            Path(f"{log}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(log).open("ab") as steps:
            steps.write(b".")
        return logits

    return _mlp(num_classes, input_shape, count)


def grows(*, num_classes: int, input_shape: tuple[int, ...], log: str, pause_s: float) -> nn.Module:
    """Write the number of ranks to `log` at every training step of rank 0; hurry once there have been two."""

    def tell(logits: torch.Tensor) -> torch.Tensor:
        ranks = ray.train.get_context().get_world_size()
        if ranks > 1 or b"2" not in Path(log).read_bytes():
            time.sleep(pause_s)
        if ray.train.get_context().get_world_rank() == 0:
            with Path(log).open("ab") as steps:
                steps.write(str(ranks).encode())
        return logits

    return _mlp(num_classes, input_shape, tell)


def wants_rgb(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Take images of three channels only."""
    return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def without_parameters(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Return the first inputs as logits."""

    class First(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.flatten(1)[:, :num_classes]

    return First()


def ends_softly(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Return logarithms of probabilities, which no linear layer gives."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes), nn.LogSoftmax(dim=1))


def with_slopes(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Have a layer with parameters that no proxy can slice."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.PReLU(8), nn.Linear(8, num_classes))


def writes_pid(*, num_classes: int, input_shape: tuple[int, ...], folder: str, pause_s: float) -> nn.Module:
    """Leave this process's id in `folder/<rank>` at the first training step; take `pause_s` longer a step."""

    def write(logits: torch.Tensor) -> torch.Tensor:
        file = Path(folder) / str(ray.train.get_context().get_world_rank())
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(file)
        time.sleep(pause_s)
        return logits

    return _mlp(num_classes, input_shape, write)


@dataclass(frozen=True)
class LowerHalf(Method):
    """Drop the upper half of the ids from epoch 1 on; in epoch 1 do what the fields say.

    Args:
        weight: of the kept samples.
        lr_scale: on the learning rate.
        looks: how many of the highest ids are scored without training.
    """

    signals = ("loss",)

    weight: float = 1.0
    lr_scale: float = 1.0
    looks: int = 0

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Choose by position alone."""
        num = context.num_samples
        kept = np.arange(num if context.epoch == 0 else num // 2)
        if context.epoch != 1:
            return Selection.of_ids(kept, num)
        return Selection.of_ids(
            kept,
            num,
            weights=np.full(kept.size, self.weight),
            forward_only_ids=np.arange(num - 1, num - 1 - self.looks, -1),
            lr_scale=self.lr_scale,
        )


@dataclass(frozen=True)
class TrainsBy(Method):
    """Keep everything, and train as the fields say.

    Args:
        train_step: its name.
        width: of the proxy, where the step has one.
        sweeps: the signal that a sweep would ask for.
    """

    signals = ("loss",)

    train_step: str = "plain"
    width: float = 0.5
    sweeps: str = "loss"

    @property
    def sweep_signals(self) -> tuple[str, ...]:
        """What a sweep would ask for."""
        return (self.sweeps,)

    def step(self) -> tuple[str, dict[str, float]]:
        """Name the step."""
        return self.train_step, {} if self.train_step == "plain" else {"width": self.width}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep everything."""
        return Selection.full(context.num_samples)


@dataclass(frozen=True)
class BrokenFold(Method):
    """Fail at the first observation."""

    signals = ("loss",)

    def fold(self, table: ScoreTable, ids: np.ndarray, signals: object, epoch: int) -> None:
        """Raise."""
        raise ValueError("this fold is broken")

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep everything."""
        return Selection.full(context.num_samples)


class NotInActors(SampleSource):
    """The digits, readable everywhere but in an actor: a Train worker is one, a task of Ray Data is not."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @property
    def schema(self) -> Schema:
        """The digits' columns."""
        return self._source.schema

    @property
    def fingerprint(self) -> str:
        """The digits'."""
        return self._source.fingerprint

    @property
    def labels(self) -> np.ndarray:
        """The digits'."""
        return self._source.labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Refuse to read in an actor."""
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            raise PermissionError("a worker opened the source")
        return self._source.take(ids)


def not_in_actors() -> Splits:
    """Open the digits behind the guard."""
    splits = open_data("digits")
    assert splits.validation is not None
    return Splits(NotInActors(splits.train), NotInActors(splits.validation))


def ends_in_a_convolution(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build a network without a last linear layer."""
    return nn.Sequential(nn.Conv2d(input_shape[0], num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
