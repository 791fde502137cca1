"""User code for the tests: models, methods and a source, named in configs as `path/to/user_code.py:name`.

Most models are an MLP with a side effect in training. A side effect that must happen only once leaves a marker file.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from torch import nn

from rayprune.core import ScoreTable, Selection
from rayprune.core.bases.static import StaticMethod
from rayprune.core.choosing import choose
from rayprune.core.method import EpochContext
from rayprune.core.vectors import VectorColumn
from rayprune.engine.scoring import recorder
from rayprune.errors import ConfigError
from rayprune.methods import Method
from rayprune.nn.models import build_model
from rayprune.nn.steps import BatchPlace, PlainStep, StepOptions
from rayprune.sources import SampleSource, Schema, Splits, open_data


def _mlp(num_classes: int, input_shape: tuple[int, ...], act: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = build_model("mlp", num_classes=num_classes, input_shape=input_shape, hidden=[32])
    model.register_forward_hook(lambda module, _, logits: act(logits) if module.training else None)
    return model


def nan_rows(*, num_classes: int, input_shape: tuple[int, ...], rows: int) -> nn.Module:
    """Make the logits of the first `rows` samples of every training batch NaN; the other gradients stay intact."""

    def replace(logits: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(logits))[:, None] < rows, torch.full_like(logits, float("nan")), logits)

    return _mlp(num_classes, input_shape, replace)


def broken(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Raise an error of two lines in training."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("this model is broken\nand says so in two lines")

    return _mlp(num_classes, input_shape, fail)


def faulty(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    pause_s: float = 0.0,
    push_rows: int = 65_536,
    pid_folder: str = "",
    die_at: int = 0,
    marker: str = "",
) -> nn.Module:
    """Train slowly and die once.

    Args:
        num_classes, input_shape: given by the engine.
        pause_s: pause in every training step.
        push_rows: rows per push of observations.
        pid_folder: where every rank leaves its process id as `<pid_folder>/<rank>`; empty for nowhere.
        die_at: the training step of the process at which rank 1 dies; 0 for never.
        marker: file that records the death, so that it happens once.
    """
    recorder.PUSH_ROWS = push_rows  # the worker creates its Recorder after the network
    num_steps = 0

    def act(logits: torch.Tensor) -> torch.Tensor:
        nonlocal num_steps
        num_steps += 1
        if pid_folder and num_steps == 1:
            pid = Path(pid_folder) / str(_rank())
            partial = pid.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(pid)
        if num_steps == die_at and _rank() == 1 and not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)
        time.sleep(pause_s)
        return logits

    return _mlp(num_classes, input_shape, act)


def _rank() -> int:
    return int(ray.train.get_context().get_world_rank())


def noisy(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Draw from torch's global generator in every training step."""
    return _mlp(num_classes, input_shape, lambda logits: torch.dropout(logits, 0.2, train=True))


def counted(
    *, num_classes: int, input_shape: tuple[int, ...], log: str, kill_at: int = 0, pause_s: float = 0.0
) -> nn.Module:
    """Append a byte to `log` in every training step of rank 0; kill the process once, before the `kill_at`-th byte."""

    def count(logits: torch.Tensor) -> torch.Tensor:
        time.sleep(pause_s)
        if _rank() > 0:
            return logits
        num_steps = Path(log).stat().st_size if Path(log).exists() else 0
        if num_steps + 1 == kill_at and not Path(f"{log}.killed").exists():
            Path(f"{log}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(log).open("ab") as steps:
            steps.write(b".")
        return logits

    return _mlp(num_classes, input_shape, count)


def grows(
    *, num_classes: int, input_shape: tuple[int, ...], log: str, pause_s: float, grown_pause_s: float
) -> nn.Module:
    """Append the number of ranks to `log` in every training step of rank 0.

    Args:
        num_classes, input_shape: given by the engine.
        log: the file.
        pause_s: pause in each step until two ranks have trained a step.
        grown_pause_s: pause in each step of two ranks.
    """

    def note(logits: torch.Tensor) -> torch.Tensor:
        ranks = ray.train.get_context().get_world_size()
        if ranks > 1:
            time.sleep(grown_pause_s)
        elif b"2" not in Path(log).read_bytes():
            time.sleep(pause_s)
        if _rank() == 0:
            with Path(log).open("ab") as steps:
                steps.write(str(ranks).encode())
        return logits

    return _mlp(num_classes, input_shape, note)


def wants_rgb(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Accept only images with three channels."""
    return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def without_parameters(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Use the first inputs as logits."""

    class First(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.flatten(1)[:, :num_classes]

    return First()


def ends_softly(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """End in a log-softmax instead of a linear layer."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes), nn.LogSoftmax(dim=1))


def with_slopes(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Contain a PReLU, whose parameters a proxy cannot slice."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.PReLU(8), nn.Linear(8, num_classes))


def ends_in_a_convolution(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """End in a convolution instead of a linear layer."""
    return nn.Sequential(nn.Conv2d(input_shape[0], num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class LowerHalf(Method):
    """Drop the upper half of the ids from epoch 1 on; the fields apply to epoch 1.

    Args:
        weight: weight of the kept samples.
        lr_scale: factor on the learning rate.
        looks: number of the highest ids that are scored without training.
    """

    signals = ("loss",)

    weight: float = 1.0
    lr_scale: float = 1.0
    looks: int = 0

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep the lower half of the ids."""
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
    """Keep everything and train with a given step.

    Args:
        train_step: name of the step.
        width: width of the proxy, for steps that have one.
        sweeps: the signal that a sweep would record.
    """

    signals = ("loss",)

    train_step: str = "plain"
    width: float = 0.5
    sweeps: str = "loss"

    @property
    def sweep_signals(self) -> tuple[str, ...]:
        """The signal that a sweep would record."""
        return (self.sweeps,)

    def step(self) -> tuple[str, dict[str, float]]:
        """Return the step and its options."""
        return self.train_step, {} if self.train_step == "plain" else {"width": self.width}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep everything."""
        return Selection.full(context.num_samples)


@dataclass(frozen=True)
class ScaledOptions(StepOptions):
    """The plain step on scaled losses.

    Args:
        factor: of the losses, above 0.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ConfigError(f"train.step.factor = {self.factor}: must be above 0")


class Scaled(PlainStep):
    """Scale the losses, and check what the run tells the step."""

    options_class = ScaledOptions
    run_facts = ("seed", "num_epochs", "num_samples")
    takes_place = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        factor: float,
        seed: int,
        num_epochs: int,
        num_samples: int,
        **recipe: Any,
    ) -> None:
        super().__init__(model, optimizer, **recipe)
        assert seed == 0
        self._factor, self._num_epochs, self._num_samples = factor, num_epochs, num_samples

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, targets_B: torch.Tensor, weights_B: torch.Tensor, place: BatchPlace
    ) -> dict[str, torch.Tensor]:
        """Train on the scaled losses."""
        assert 0 <= place.step < place.num_steps
        assert 0 <= place.epoch < self._num_epochs
        assert int(place.ids.max()) < self._num_samples
        assert place.real.tolist() == (weights_B > 0).tolist()
        return super().__call__(inputs, targets_B, weights_B * self._factor)


@dataclass(frozen=True)
class NearTheMean(StaticMethod):
    """Keep the samples whose embeddings are nearest to the mean embedding after T epochs.

    Args:
        score_epochs: T.
        storage: of the embeddings.
    """

    paper = "none"
    sweep_signals = ("embedding",)

    score_epochs: int = 1
    storage: str = "float32"

    @property
    def collect_epochs(self) -> int:
        """T."""
        return self.score_epochs

    def columns(self) -> dict[str, object]:
        """Return the distance to the mean; the embeddings are deleted before the next epoch."""
        return {"loss": np.float32, "distance": np.float32, "embedding": VectorColumn(self.storage)}

    def condense(self, table: ScoreTable, context: EpochContext) -> None:
        """Compute the distances."""
        embeddings = np.array(table.vectors["embedding"].array, dtype=np.float64)
        table["distance"][:] = np.linalg.norm(embeddings - embeddings.mean(axis=0), axis=1)

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[np.ndarray, None, dict[str, object]]:
        """Choose the nearest."""
        return choose(table["distance"], count, "bottom").ids, None, {}


class Doubled(nn.Module):
    """Return twice the inputs as embeddings."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Double."""
        return 2.0 * inputs.flatten(1)


def embedder() -> nn.Module:
    """Return a network for collect.embedder."""
    return Doubled()


class Faulty(nn.Module):
    """Return what `make` makes of the inputs."""

    def __init__(self, make: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, inputs: torch.Tensor) -> object:
        """Make."""
        return self.make(inputs)


def flat_embedder() -> nn.Module:
    """Return one number, and no vector, for each sample."""
    return Faulty(lambda inputs: inputs.flatten(1).sum(1))


def empty_embedder() -> nn.Module:
    """Return vectors of length 0."""
    return Faulty(lambda inputs: inputs.flatten(1)[:, :0])


def nan_embedder() -> nn.Module:
    """Return NaN for the first sample."""
    return Faulty(lambda inputs: inputs.flatten(1).index_fill(0, torch.tensor([0]), float("nan")))


def picky_embedder() -> nn.Module:
    """Take no inputs."""
    return Faulty(lambda inputs: torch.einsum("bcdef->bc", inputs))


@dataclass(frozen=True)
class BrokenFold(Method):
    """Fail on the first observation."""

    signals = ("loss",)

    def fold(self, table: ScoreTable, ids: np.ndarray, signals: object, epoch: int) -> None:
        """Raise."""
        raise ValueError("this fold is broken")

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep everything."""
        return Selection.full(context.num_samples)


class NotInActors(SampleSource):
    """The digits, readable everywhere but in an actor. A Train worker is an actor; a task of Ray Data is not."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @property
    def schema(self) -> Schema:
        """The columns of the digits."""
        return self._source.schema

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the digits."""
        return self._source.fingerprint

    @property
    def labels(self) -> np.ndarray:
        """The labels of the digits."""
        return self._source.labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Refuse to read in an actor."""
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            raise PermissionError("a worker read from the source\nin an actor")
        return self._source.take(ids)


def not_in_actors() -> Splits:
    """Open the digits, guarded against reads in actors."""
    splits = open_data("digits")
    assert splits.validation is not None
    return Splits(NotInActors(splits.train), NotInActors(splits.validation))
