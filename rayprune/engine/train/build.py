"""Make a worker ready: device, threads, network, optimiser, step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from rayprune.config import Config
from rayprune.config.schema import TrainSection
from rayprune.core.references import closest
from rayprune.core.selection import Selection
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.storage.costs import PriorCost
from rayprune.errors import ConfigError
from rayprune.methods import Method
from rayprune.nn.augment import Augment
from rayprune.nn.boundary import last_linear
from rayprune.nn.early_exit import count_exits
from rayprune.nn.models import build_model
from rayprune.nn.optim import build_optimizer, learning_rate
from rayprune.nn.signals import BOUNDARY_SIGNALS
from rayprune.nn.steps import COMPILED_STEPS, MULTI_EXIT_STEPS, SEEDED_STEPS, STEPS, TrainStep
from rayprune.nn.steps.l2w import exit_weight_names


@dataclass(frozen=True)
class InputSpec:
    """What a sample looks like to the network.

    Attributes:
        column: the source's input column.
        shape: (C, H, W) or (F,).
        num_classes: C of the labels.
        augment: the batched augmentation with its statistics.
    """

    column: str
    shape: tuple[int, ...]
    num_classes: int
    augment: Augment


@dataclass(frozen=True)
class StepSettings:
    """What a method and `train.step` ask of the train step; plain values: workers may not have the method's code.

    Attributes:
        name, options: the step, a key of `STEPS`, and its options; a "plain" one may turn out as `exits`.
        signals, sweep_signals: what training visits and forward-only passes report.
        sweep_part: the part of the network that forward-only passes go through.
    """

    name: str
    options: dict[str, Any]
    signals: tuple[str, ...]
    sweep_signals: tuple[str, ...]
    sweep_part: str

    @classmethod
    def of(cls, method: Method, train: TrainSection, record: tuple[str, ...] = ()) -> StepSettings:
        """Return the terms of a method and the config's section `train`, with more signals to be recorded in training.

        Raises:
            ValueError: the method names no train step, or has one of its own and `train.step` names another.
        """
        name, options = method.step()
        if name not in STEPS:
            raise ConfigError(f"unknown train step {name!r} of method {method.name!r}: {closest(name, STEPS)}")
        if name == "plain":
            name, options = train.step_name, train.step_options
        elif train.step_name not in ("plain", name):
            raise ConfigError(
                f"method {method.name!r} trains by its own step {name!r}, and train.step is {train.step_name!r}: "
                "leave train.step out, or use another method"
            )
        signals = tuple(dict.fromkeys((*method.signals, *record)))
        return cls(name, options, signals, method.sweep_signals or signals, method.sweep_part)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs besides the config; picklable.

    Attributes:
        terms: what the method asks of the train step.
        before: what a run that scored the samples has cost.
    """

    config: Config
    scores: ScoreClient
    input: InputSpec
    terms: StepSettings
    fingerprint: str
    shuffle: str
    run_folder: str
    use_gpu: bool
    threads: int
    has_validation: bool
    before: PriorCost = field(default_factory=PriorCost)


def pick_device(use_gpu: bool) -> torch.device:
    """Return this worker's device, as Ray Train assigned it."""
    if not use_gpu:
        return torch.device("cpu")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return device


def pick_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype: bf16 on a GPU that has it unless fp32 is asked for; None = full precision."""
    if precision == "bf16":
        return torch.bfloat16
    wanted = precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wanted else None


def build_network(config: Config, spec: InputSpec, device: torch.device) -> nn.Module:
    """Build the seeded network on its device, in channels_last layout for images."""
    torch.manual_seed(config.train.seed)  # the initial weights are the same on every rank, whatever it drew before
    model = build_model(
        config.model.name, num_classes=spec.num_classes, input_shape=spec.shape, **config.model.options
    ).to(device)
    wanted = config.train.channels_last
    if len(spec.shape) == 3 and (wanted is True or wanted == "auto"):
        # Faster on the CPU too: 144 against 215 ms a ResNet-8 step at batch 128 on one core.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def recorded_signals(config: Config, spec: InputSpec) -> tuple[str, ...]:
    """Return the signals whose mean over the visits goes to scores.parquet: train.record, and the train step's own."""
    if config.train.step_name != "l2w":
        return config.train.record
    return (*config.train.record, *exit_weight_names(model_exits(config, spec)))


def model_exits(config: Config, spec: InputSpec) -> int:
    """Return the number of exits of the config's model."""
    return count_exits(build_network(config, spec, torch.device("cpu")), spec.shape)


def wrap_for_ranks(model: nn.Module, world_size: int, device: torch.device) -> nn.Module:
    """Wrap in DDP where there is more than one rank."""
    if world_size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


def network_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of a network's parameters."""
    optim = config.optim
    return build_optimizer(
        optim.name,
        network,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
        betas=optim.betas,
    )


def build_step(
    config: Config,
    network: nn.Module,
    spec: InputSpec,
    terms: StepSettings,
    world_size: int,
    device: torch.device,
    *,
    compiled: bool = True,
) -> TrainStep:
    """Build the train step with its optimiser, wrapped in DDP where there is more than one rank.

    Args:
        config: precision, optimiser and the like.
        network: on its device, not wrapped.
        spec: what its inputs look like.
        terms: what the method asks for.
        world_size: the number of ranks.
        device: where the step runs.
        compiled: as `train.compile` says; False for a look at the step.

    Raises:
        ValueError: the step does not fit the network.
    """
    train = config.train
    name, options = _fitting(terms, count_exits(network, spec.shape))
    if name in SEEDED_STEPS:
        options = {**options, "seed": train.seed}
    step = STEPS[name]
    needs_head = any(signal in BOUNDARY_SIGNALS for signal in (*terms.signals, *terms.sweep_signals))
    head = last_linear(network, torch.zeros(2, *spec.shape, device=device)) if needs_head else None
    module = step.module_of(network, spec.shape, **options)
    if train.compile:
        if name not in COMPILED_STEPS:
            raise ConfigError(f"train.compile = True: train step {name!r} is not for compiled networks: leave it out")
        if compiled:
            module.compile()  # type: ignore[no-untyped-call]  # in place, when first called: names in checkpoints stay
    return step(
        wrap_for_ranks(module, world_size, device),
        network_optimizer(config, network),
        signals=terms.signals,
        label_smoothing=train.label_smoothing,
        accumulate=train.accumulate,
        clip_norm=train.clip_norm,
        autocast=pick_precision(train.precision, device),
        head=head,
        **options,
    )


def _fitting(terms: StepSettings, num_exits: int) -> tuple[str, dict[str, Any]]:
    """Return the step and its options for a network with so many exits.

    Raises:
        ValueError: the step is for networks of the other kind, or a signal is.
    """
    if num_exits == 1:
        if terms.name in MULTI_EXIT_STEPS:
            raise ConfigError(
                f"train.step {terms.name} is for a network with several exits, and the model returns one tensor: "
                "use train.step=plain, or a model that returns a list of logits"
            )
        return terms.name, terms.options
    if wanted := [signal for signal in (*terms.signals, *terms.sweep_signals) if signal in BOUNDARY_SIGNALS]:
        raise ConfigError(
            f"signal {wanted[0]!r} is of the decision boundaries of one last layer, and the model has {num_exits} "
            "exits: use a method or train.record without it"
        )
    name = "exits" if terms.name == "plain" else terms.name
    if name not in MULTI_EXIT_STEPS:
        raise ConfigError(f"train step {name!r} is for a network with one exit, and the model has {num_exits}")
    return name, {"num_exits": num_exits, **terms.options}


def rate_at(config: Config, epoch: int, step: int, num_steps: int, lr_scale: float) -> float:
    """Return the learning rate of a step: a function of the fraction of training done, whatever the steps an epoch."""
    optim = config.optim
    shape: dict[str, Any] = {"milestones": optim.milestones, "gamma": optim.gamma} if optim.schedule == "step" else {}
    # The middle of the step: neither the first step of a warm-up nor the last of an annealing is one at rate 0.
    progress = (epoch + (step + 0.5) / num_steps) / config.train.epochs
    return learning_rate(optim.schedule, progress, peak=optim.lr, warmup=optim.warmup, **shape) * lr_scale


@dataclass(frozen=True)
class SelectionSetup:
    """How a run chooses its samples.

    Attributes:
        method: what the Selector is made of.
        num_epochs: epochs that it may be asked for.
        chosen: the selection of a method with a file.
        before: what the run that scored the samples has cost.
        scores: name → (N,) what it found, for scores.parquet.
    """

    method: Method
    num_epochs: int
    chosen: Selection | None = None
    before: PriorCost = field(default_factory=PriorCost)
    scores: Mapping[str, NDArray[Any]] = field(default_factory=dict)
