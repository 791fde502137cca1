"""The train steps that `train.step` can name, and their options; importing them needs no torch.

A step of the user's own is named by `module:Class` or `path/to/file.py:Class`; its class says what its options are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from rayprune.core.references import closest, is_reference, load_object
from rayprune.core.validation import AtMost, check_keys, plain, short_repr
from rayprune.errors import ConfigError


@dataclass(frozen=True)
class StepOptions:
    """The options of a train step, as keys of `train.step`; subclasses are frozen dataclasses with defaults."""

    # For `rayprune methods`: the paper, the cost of a sample in plain steps, and the published gain.
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "1"
    gain: ClassVar[str] = ""


@dataclass(frozen=True)
class PlainOptions(StepOptions):
    """The network's usual step; for a network with several exits, `exits` with its defaults."""


@dataclass(frozen=True)
class ExitsOptions(PlainOptions):
    """The plain step of a network with several exits.

    Args:
        score: the signals for selection methods: those of one exit (1..K, or last), their mean over the exits, or the
            depth at which a sample would exit.
        confident: the probability at which it would exit.
    """

    score: int | Literal["last", "mean", "depth"] = "last"
    confident: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.score, int) and self.score < 1:
            raise ConfigError(f"train.step.score = {self.score}: must be an exit from 1 on, last, mean or depth")
        if not 0.0 < self.confident <= 1.0:
            raise ConfigError(f"train.step.confident = {self.confident}: must be in (0, 1]")


@dataclass(frozen=True)
class L2wOptions(ExitsOptions):
    """The step that learns the weight of each sample at each exit (L2W-DEN).

    Args:
        input: the weight network's inputs for a sample: its K losses, its K confidences, or both.
        normalise: the weights have mean 1 over the half batch's samples (row), a sample's exits (col), or both (mat).
        epsilon: ε, the range of the weights: they differ from 1 by less than 2ε.
        p: 1..39, the distribution of samples over exits; 20: equal at every exit, lower: more exit early.
        meta_interval: batches between steps of the weight network.
        meta_lr: peak learning rate of the weight network's Adam; it follows the main optimizer's schedule.
        meta_weight_decay: weight decay of the weight network's Adam.
        hidden: width of the weight network's hidden layers.
        layers: number of the weight network's hidden layers.
        scope: the rows of the virtual step, the normalization and the exits: one worker's (local), as in the paper's
            program, or the whole batch's (global).
        gradient: how to compute the weight network's gradient; second_order is slower, with the same result.
        nonnegative: clip weights below 0 to 0.
    """

    paper: ClassVar[str] = "Han et al., ECCV 2022, arXiv 2209.08310 (L2W-DEN)"
    cost: ClassVar[str] = "3.7 in operations, 3.8 in time (MSDNet-5 on a CPU); with meta_interval 100: 1.03"
    gain: ClassVar[str] = "2.1 to 2.9 points at the five exits of an MSDNet on ImageNet, meta_interval 100"

    input: Literal["loss", "conf", "both"] = "loss"
    normalise: Literal["row", "col", "mat"] = "col"
    epsilon: float = 0.8
    p: int = 15
    meta_interval: int = 1
    meta_lr: float = 1e-4
    meta_weight_decay: float = 1e-4
    hidden: Annotated[int, AtMost(10_000)] = 500
    layers: Annotated[int, AtMost(100)] = 1
    scope: Literal["local", "global"] = "local"
    gradient: Literal["jvp", "second_order"] = "jvp"
    nonnegative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.p <= 39:
            raise ConfigError(f"train.step.p = {self.p}: must be in 1..39")
        for name in ("meta_interval", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.step.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("epsilon", "meta_lr", "meta_weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.step.{name} = {getattr(self, name)}: must be at least 0")


STEP_OPTIONS: dict[str, type[StepOptions]] = {"plain": PlainOptions, "exits": ExitsOptions, "l2w": L2wOptions}


def options_class(name: Any) -> type[StepOptions]:
    """Return the class of the options of a step that `train.step` names.

    Raises:
        ConfigError: an unknown name, or a reference to something other than a train step with options.
    """
    if not isinstance(name, str) or not is_reference(name):
        if name not in STEP_OPTIONS:
            raise ConfigError(f"unknown train.step {short_repr(name)}: {closest(str(name), STEP_OPTIONS)}")
        return STEP_OPTIONS[name]
    options = getattr(load_object(name), "options_class", None)
    if not (isinstance(options, type) and issubclass(options, StepOptions) and dataclasses.is_dataclass(options)):
        raise ConfigError(
            f"train.step {name!r} is not a train step with options: subclass rayprune.nn.steps.PlainStep, and set "
            "options_class to a frozen dataclass that subclasses StepOptions"
        )
    return options


def step_config(step: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's name and all its options, given its name or a mapping of its name and some options.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.

    >>> step_config("exits")
    {'name': 'exits', 'score': 'last', 'confident': 0.9}
    >>> step_config({"name": "exits", "scor": 1})
    Traceback (most recent call last):
    rayprune.errors.ConfigError: unknown key 'train.step.scor' of train step 'exits': did you mean 'score'? \
(valid: confident, score)
    """
    keys = {"name": step} if isinstance(step, str) else dict(step)
    name = keys.pop("name", None)
    if name is None:
        raise ConfigError("train.step has no name: write train.step: {name: exits}, or train.step: exits")
    options = options_class(name)
    check_keys(options, keys, "train.step", f"train step {name!r}")
    return {"name": name, **dataclasses.asdict(options(**{key: plain(value) for key, value in keys.items()}))}
