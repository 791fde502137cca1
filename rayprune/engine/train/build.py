"""Build what a run trains with: device, network, optimizer, train step, learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rayprune.config import Config
from rayprune.core.bases.in_batch import InBatchMethod
from rayprune.core.references import UserCode
from rayprune.core.selection import Selection
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.storage.costs import PriorCost
from rayprune.errors import ConfigError
from rayprune.methods import Method, build_method
from rayprune.nn.augment import Augment
from rayprune.nn.boundary import last_linear
from rayprune.nn.early_exit import count_exits
from rayprune.nn.models import build_model
from rayprune.nn.optim import build_optimizer, learning_rate
from rayprune.nn.signals import BOUNDARY_SIGNALS, EMBEDDING_SIGNALS
from rayprune.nn.steps import TrainStep, step_class
from rayprune.nn.steps.in_batch import PICKED
from rayprune.nn.steps.l2w import exit_weight_names
from rayprune.sources.tables.scores import ScoreFile, read_scores

_HEAD_SIGNALS = (*BOUNDARY_SIGNALS, *EMBEDDING_SIGNALS)


@dataclass(frozen=True)
class InputSpec:
    """The network's inputs.

    Attributes:
        column: the source's input column.
        shape: (C, H, W) of an image, (F,) of features.
        num_classes: the number of classes.
        augment: the batched augmentation, with the statistics of the training split.
        num_samples: of the training split.
    """

    column: str
    shape: tuple[int, ...]
    num_classes: int
    augment: Augment
    num_samples: int = 0


@dataclass(frozen=True)
class StepSettings:
    """The train step that a method and `train.step` ask for, in plain values: workers may not have the method's code.

    Attributes:
        name, options: a key of `STEPS` or a reference, and the step's options; "plain" becomes "exits" for a network
            with several.
        signals, sweep_signals: the signals of training visits and of forward-only passes.
        sweep_part: the part of the network that forward-only passes use.
    """

    name: str
    options: dict[str, Any]
    signals: tuple[str, ...]
    sweep_signals: tuple[str, ...]
    sweep_part: str

    @classmethod
    def of(cls, method: Method, config: Config, record: tuple[str, ...] = ()) -> StepSettings:
        """Return the settings for a method and a config.

        Args:
            method: the selection method.
            config: its `train.step`, and for a scoring run its `collect.embedder`.
            record: further signals to record in training.

        Raises:
            ConfigError: the method names an unknown step, or has its own step and `train.step` names another.
        """
        train = config.train
        if method.collect_epochs and config.collect.embedder is not None:
            return cls("embed", {"embedder": config.collect.embedder}, (), method.sweep_signals, "model")
        name, options = method.step()
        try:
            step_class(name)
        except ConfigError as error:
            raise ConfigError(f"method {method.name!r}: {error}") from None
        if name == "plain":
            name, options = train.step_name, train.step_options
        elif train.step_name not in ("plain", name):
            raise ConfigError(
                f"method {method.name!r} trains by its own step {name!r}, and train.step is {train.step_name!r}: "
                "leave train.step out, or use another method"
            )
        signals = tuple(dict.fromkeys((*method.signals, *record)))
        return cls(name, options, signals, method.sweep_signals or signals, method.sweep_part)

    @property
    def trains(self) -> bool:
        """Whether the step trains a network, and does not only embed the samples with a pretrained one."""
        return self.name != "embed"

    def fit_to(self, num_exits: int) -> tuple[str, dict[str, Any]]:
        """Return the step's name and options for a network with so many exits.

        Raises:
            ConfigError: the step or a signal does not work with such a network.
        """
        if not self.trains:
            return self.name, self.options
        if num_exits == 1:
            if step_class(self.name).multi_exit:
                raise ConfigError(
                    f"train.step {self.name} is for a network with several exits, and the model returns one tensor: "
                    "use train.step=plain, or a model that returns a list of logits"
                )
            return self.name, self.options
        if signals := [signal for signal in (*self.signals, *self.sweep_signals) if signal in _HEAD_SIGNALS]:
            raise ConfigError(
                f"signal {signals[0]!r} needs one last layer, and the model has {num_exits} exits: use a method or "
                "train.record without it"
            )
        name = "exits" if self.name == "plain" else self.name
        if not step_class(name).multi_exit:
            raise ConfigError(
                f"train step {name!r} is for a network with one exit, and the model has {num_exits}: use "
                "train.step=exits, or a model with one exit"
            )
        return name, {"num_exits": num_exits, **self.options}


@dataclass(frozen=True)
class SelectionSetup:
    """How a run selects its samples.

    Attributes:
        method: the selection method.
        num_epochs: the number of epochs to select for.
        chosen: the selection of a method that reads one from a file.
        prior_cost: the cost of the run that scored the samples.
        scores: name → (N,) the scores of that run, for scores.parquet.
    """

    method: Method
    num_epochs: int
    chosen: Selection | None = None
    prior_cost: PriorCost = field(default_factory=PriorCost)
    scores: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs; picklable.

    Attributes:
        config: the run's config.
        scores: the ScoreActor's client.
        input: the network's inputs.
        step: the train step to build.
        fingerprint, shuffle: the training source's, stored in checkpoints.
        run_folder: where the run writes.
        use_gpu, threads: what this worker computes on.
        num_validation: rows of the validation split, 0 without one.
        prior_cost: the cost of the run that scored the samples.
        user_code: the user's modules, for a worker on another machine.
    """

    config: Config
    scores: ScoreClient
    input: InputSpec
    step: StepSettings
    fingerprint: str
    shuffle: str
    run_folder: str
    use_gpu: bool
    threads: int
    num_validation: int
    prior_cost: PriorCost = field(default_factory=PriorCost)
    user_code: UserCode = field(default_factory=UserCode)


def pick_device(use_gpu: bool) -> torch.device:
    """Return the device that Ray Train assigned to this worker."""
    if not use_gpu:
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return device


def pick_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype, None for full precision. `auto` is bf16 on a GPU that supports it."""
    if precision == "bf16":
        return torch.bfloat16
    use_bf16 = precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if use_bf16 else None


def new_model(config: Config, spec: InputSpec) -> nn.Module:
    """Build the config's model with whatever random weights come next."""
    model: nn.Module = build_model(
        config.model.name, num_classes=spec.num_classes, input_shape=spec.shape, **config.model.options
    )
    return model


def build_network(config: Config, spec: InputSpec, device: torch.device) -> nn.Module:
    """Build the seeded network on its device, in channels_last layout for images."""
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    model = new_model(config, spec).to(device)
    if len(spec.shape) == 3 and config.train.channels_last in (True, "auto"):
        # Faster on the CPU, too: 144 against 215 ms per ResNet-8 step at batch 128 on one core.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def model_exits(config: Config, spec: InputSpec) -> int:
    """Return the number of exits of the config's model."""
    return count_exits(build_network(config, spec, torch.device("cpu")), spec.shape)


def recorded_signals(config: Config, spec: InputSpec) -> tuple[str, ...]:
    """Return the signals whose means go to scores.parquet: `train.record` and those of the train step."""
    names = config.train.record
    if config.build_method().step()[0] == "in_batch":
        names = (*names, PICKED)
    if config.train.step_name == "l2w":
        names = (*names, *exit_weight_names(model_exits(config, spec)))
    return names


def in_batch_method(method: Method) -> InBatchMethod | None:
    """Return the method that picks in the train step of a method or control; None if none does."""
    name, options = method.step()
    if name != "in_batch":
        return None
    picking = build_method(options["method"])
    if not isinstance(picking, InBatchMethod):
        raise ConfigError(f"method {picking.name!r} can't pick inside batches: make it a subclass of InBatchMethod")
    return picking


def read_column(method: InBatchMethod, column: str, num_samples: int) -> tuple[ScoreFile, NDArray[np.float32]]:
    """Read a column of an in-batch method, (N,).

    Args:
        method: the method.
        column: one of its `file_columns`.
        num_samples: N.

    Raises:
        RunFolderError: the file cannot be read.
        ConfigError: there is no file, it is of other data, or a sample has no finite value.
    """
    path, name = method.file_columns()[column]
    if not path:
        raise ConfigError(f"method {method.name!r} needs a file: set method.{column}=scores.parquet")
    file = read_scores(path)
    values = file.scores[file.score_name(name)]
    if file.num_samples != num_samples:
        raise ConfigError(
            f"{file.path} has {file.num_samples} samples, the training split {num_samples}: give a score for each"
        )
    if (missing := np.flatnonzero(~np.isfinite(values))).size:
        raise ConfigError(
            f"{file.path} has no finite {file.score_name(name)} for {missing.size} samples, first ids "
            f"{missing[:5].tolist()}: score them, too"
        )
    return file, values.astype(np.float32)


def network_optimizer(config: Config, network: nn.Module, is_trial: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer of a network's parameters; `is_trial` as for `build_optimizer`."""
    optim = config.optim
    return build_optimizer(
        optim.name,
        network,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
        betas=optim.betas,
        is_trial=is_trial,
    )


def build_step(
    config: Config,
    network: nn.Module,
    spec: InputSpec,
    settings: StepSettings,
    *,
    device: torch.device,
    world_size: int = 1,
    is_trial: bool = False,
) -> TrainStep:
    """Build the train step with its optimizer, wrapped in DDP for several ranks.

    Args:
        config: the run's config.
        network: on its device, not wrapped.
        spec: the network's inputs.
        settings: the step to build.
        device: where the step runs.
        world_size: the number of ranks.
        is_trial: whether the step is built to try it: without `train.compile`, and without importing the compiler.

    Raises:
        ConfigError: the step does not work with the network.
    """
    train = config.train
    name, options = settings.fit_to(count_exits(network, spec.shape))
    step = step_class(name)
    facts = {"seed": train.seed, "num_epochs": train.epochs, "num_samples": spec.num_samples}
    options = {**options, **{fact: facts[fact] for fact in step.run_facts}}
    signals = (*settings.signals, *settings.sweep_signals)
    if name == "in_batch":
        method = build_method(options["method"])
        assert isinstance(method, InBatchMethod)
        columns = {column: read_column(method, column, spec.num_samples)[1] for column in method.file_columns()}
        options = {**options, "method": method, "columns": columns}
        signals = (*signals, *method.batch_signals)
    needs_head = settings.trains and any(signal in _HEAD_SIGNALS for signal in signals)
    head = last_linear(network, torch.zeros(2, *spec.shape, device=device)) if needs_head else None
    module = step.module_of(network, spec.shape, **options)
    if train.compile:
        if not step.compilable:
            raise ConfigError(f"train.compile = True: train step {name!r} cannot be compiled: leave it out")
        if not is_trial:
            module.compile()  # type: ignore[no-untyped-call]  # in place: the names in checkpoints stay
    if world_size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(module, device_ids=device_ids)
    return step(
        module,
        network_optimizer(config, network, is_trial),
        signals=settings.signals,
        label_smoothing=train.label_smoothing,
        accumulate=train.accumulate,
        clip_norm=train.clip_norm,
        autocast=pick_precision(train.precision, device),
        head=head,
        **options,
    )


def rate_at(config: Config, epoch: int, step: int, num_steps: int, lr_scale: float) -> float:
    """Return the learning rate of a step, a function of the fraction of training done."""
    optim = config.optim
    options: dict[str, Any] = {"milestones": optim.milestones, "gamma": optim.gamma} if optim.schedule == "step" else {}
    # The middle of the step, so that no step of a warm-up or an annealing has a rate of 0.
    progress = (epoch + (step + 0.5) / num_steps) / config.train.epochs
    return learning_rate(optim.schedule, progress, peak=optim.lr, warmup=optim.warmup, **options) * lr_scale
