"""The section `sweep` of a config: which keys a sweep varies, over what, and how it searches.

A key of the space is dotted (`method.prune_ratio`), or nested as elsewhere in a config; its value is a list, or a
mapping of one word: `choice`, `grid`, `uniform`, `loguniform`, `quniform`. Values may be whole sub-trees.

The `compare:` section of a config: which methods and baselines, over which seeds, and what counts as equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator

from rayprune.config.schema import Auto, Section, absolute_method
from rayprune.core.references import closest
from rayprune.core.validation import shown
from rayprune.errors import ConfigError
from rayprune.methods import build_method

Form = Literal["choice", "grid", "uniform", "loguniform", "quniform"]
_FORMS: tuple[str, ...] = get_args(Form)
# What decides no result, or where a trial writes: the sweep sets it itself.
_OWN = {"run", "scaling", "sweep", "compare"}


@dataclass(frozen=True)
class Axis:
    """One key that a sweep varies.

    Attributes:
        key: dotted, such as "method.prune_ratio".
        form: a choice or a grid of `values`, or a distribution between `low` and `high`.
        step: of quniform, the multiples that are drawn.
    """

    key: str
    form: Form
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0

    @property
    def listed(self) -> bool:
        """Whether all its values are known."""
        return self.form in {"choice", "grid"}

    @property
    def probes(self) -> tuple[Any, ...]:
        """All values, or a distribution's two ends: what can be checked before a sweep starts."""
        return self.values if self.listed else (self.low, self.high)

    def draw(self, rng: np.random.Generator) -> Any:
        """Return one value.

        >>> Axis("train.epochs", "quniform", low=4, high=10, step=2).draw(np.random.default_rng(0))
        8
        """
        if self.listed:
            return self.values[int(rng.integers(len(self.values)))]
        share = float(rng.random())
        if self.form == "loguniform":
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        value = self.low + share * (self.high - self.low)
        if self.form == "uniform":
            return value
        steps = round(value / self.step) * self.step  # stays an int where all three are
        return min(max(steps, self.low), self.high)


def axis_of(key: str, value: Any) -> Axis:
    """Return the axis that a key of the space and its value describe.

    Raises:
        ConfigError: the value is no list and no distribution, or its bounds do not ascend.

    >>> axis_of("optim.lr", {"loguniform": [0.01, 1.0]}).form
    'loguniform'
    """
    where = f"sweep.space {key!r}"
    if isinstance(value, list):
        value = {"choice": value}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{where} = {shown(value)}: must be a list, or a mapping of one of {', '.join(_FORMS)}")
    ((form, given),) = value.items()
    if form not in _FORMS:
        raise ConfigError(f"{where}: unknown distribution {form!r}: {closest(str(form), _FORMS)}")
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where} = {shown(given)}: {form} takes a list of values")
    if form in {"choice", "grid"}:
        if any(given[i] == given[j] and type(given[i]) is type(given[j]) for i in range(len(given)) for j in range(i)):
            raise ConfigError(f"{where}: a value stands twice in {shown(given)}, keep one")
        return Axis(key, form, tuple(given))
    numbers = ["low", "high", "step"][: 3 if form == "quniform" else 2]
    if len(given) != len(numbers) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in given):
        raise ConfigError(f"{where} = {shown(given)}: {form} takes the numbers [{', '.join(numbers)}]")
    axis = Axis(key, form, (), *given)
    if not axis.low < axis.high or (form == "loguniform" and axis.low <= 0) or (form == "quniform" and axis.step <= 0):
        above = " above 0" if form == "loguniform" else ", step above 0" if form == "quniform" else ""
        raise ConfigError(f"{where} = {shown(given)}: {form} takes low below high{above}")
    return axis


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key → list or distribution; sections may be given as mappings, as elsewhere in a config."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        # Below a section's key, a mapping of another word is a misspelt distribution: axis_of says so.
        is_section = "." not in key and isinstance(value, Mapping) and value and not set(value) & set(_FORMS)
        flat |= _flat(value, f"{key}.") if is_section else {key: value}
    return flat


class SweepSection(Section):
    """What a sweep varies and how it searches."""

    space: dict[str, Any] = Field(default_factory=dict, description="dotted key → a list or a distribution")
    search: Literal["grid", "random", "optuna"] = "grid"
    num_trials: int | None = Field(None, ge=1, description="trials that random and optuna draw")
    scheduler: Literal["none", "asha"] = "none"
    grace_epochs: Auto | int = Field("auto", description="asha stops no trial before; auto: a fifth of the epochs")
    reduction_factor: float = Field(3.0, gt=1, description="asha keeps one trial in so many at each rung")
    objective: Literal["accuracy", "samples", "compute", "seconds", "pareto"] = "pareto"
    hold_out: float = Field(
        0.1, ge=0, lt=1, description="share of the training samples that trials are compared on; 0: the validation part"
    )
    amortise: int = Field(1, ge=1, description="trainings that share the cost of a static method's scoring run")
    max_concurrent: Auto | int = "auto"
    seed: int = Field(0, ge=0, lt=2**32, description="of the search; the trials' own is train.seed")
    max_failures: int = Field(1, ge=0, description="how often a trial that broke down is started again")

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return _flat(value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else value

    @field_validator("grace_epochs", "max_concurrent")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and value < 1:
            raise ConfigError("must be at least 1, or auto")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> SweepSection:
        for axis in self.axes:
            section = axis.key.split(".")[0]
            if section in _OWN:
                raise ConfigError(
                    f"sweep.space {axis.key!r}: a sweep sets {section} for its trials itself, leave it out"
                )
            if self.search == "grid" and not axis.listed:
                raise ConfigError(
                    f"sweep.space {axis.key!r} is {axis.form}: a grid takes lists, or set sweep.search=random"
                )
            if self.search == "optuna" and axis.form == "grid":
                raise ConfigError(f"sweep.space {axis.key!r} is a grid: sweep.search=optuna takes choice")
        if self.search == "grid" and self.num_trials is not None:
            raise ConfigError("sweep.num_trials: a grid has as many trials as points, leave it out")
        if self.search != "grid" and self.num_trials is None:
            raise ConfigError(f"sweep.search = {self.search!r} needs sweep.num_trials, such as sweep.num_trials=20")
        return self

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The keys that vary, in the order given."""
        return tuple(axis_of(key, value) for key, value in self.space.items())


# What a method has to beat, and two arms that tell where its gains and its costs come from.
BASELINES = {
    "full": "everything, in all epochs",
    "full_time": "everything, in as many epochs as fit into the method's seconds",
    "full_steps": "everything, in as many epochs as have the method's samples trained",
    "random": "one fixed random subset with the method's samples trained",
    "random_epoch": "a fresh random subset every epoch with the method's samples trained",
    "shuffled": "the method with its scores permuted across samples",
    "ratio_0": "the method with nothing to prune: what its machinery costs",
}
_OF_ALL_ARMS = ("train", "optim", "data", "model", "scaling", "epochs", "batch_size")


class CompareSection(Section):
    """What `rayprune compare` runs and decides by."""

    methods: tuple[dict[str, Any] | str, ...] = Field((), description="methods to judge; default: the config's own")
    seeds: int | tuple[int, ...] = Field((0, 1, 2), description="seeds that all arms share, or how many from 0 on")
    baselines: tuple[str, ...] = Field(tuple(BASELINES), description="arms beside the methods; full always runs")
    margin: float = Field(0.2, ge=0, le=100, description="loss of accuracy, in points, that counts as none")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    parallel: Auto | int = Field("auto", description="runs at a time; auto: as many as the machine has room for")
    timed_seeds: int = Field(1, ge=1, description="seeds whose runs go alone, for their seconds, where others do not")

    amortise: int = Field(1, ge=1, description="trainings that share the cost of a static method's scoring run")

    @field_validator("methods")
    @classmethod
    def _judgeable(cls, value: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
        methods = tuple(judgeable(method, f"compare.methods[{number}]") for number, method in enumerate(value))
        for number, method in enumerate(methods):
            if method in methods[:number]:
                raise ConfigError(f"compare.methods[{number}] is the same as another one: leave it out")
        return methods

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: int | tuple[int, ...]) -> tuple[int, ...]:
        seeds = tuple(range(value)) if isinstance(value, int) else value
        if not seeds:
            raise ConfigError(f"compare.seeds = {shown(value)}: name at least one seed, better three")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ConfigError(f"compare.seeds = {shown(list(seeds))}: seeds are at least 0 and below 2^63")
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ConfigError(f"compare.seeds names {twice[0]} twice: a run counts once, name another seed")
        return seeds

    @field_validator("parallel")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"compare.parallel = {value}: must be at least 1, or auto")
        return value

    @field_validator("baselines")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in BASELINES:
                raise ConfigError(f"compare.baselines: unknown baseline {name!r}: {closest(name, BASELINES)}")
            if value.count(name) > 1:
                raise ConfigError(f"compare.baselines names {name!r} twice: keep one")
        return tuple(name for name in BASELINES if name == "full" or name in value)

    @property
    def asked(self) -> tuple[dict[str, Any], ...]:
        """The whole configs of `methods`."""
        return tuple(method for method in self.methods if isinstance(method, dict))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds, a count of them resolved."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def judgeable(method: Any, key: str) -> dict[str, Any]:
    """Return a method's whole config.

    Args:
        method: its name, or a mapping of name and hyperparameters.
        key: what messages call it.

    Raises:
        ConfigError: it is no method, is `full` itself, or brings keys that all arms share.
    """
    if isinstance(method, dict):
        shared = [name for name in method if name.split(".")[0] in _OF_ALL_ARMS]
        if shared:
            raise ConfigError(
                f"{key} has {shared[0]!r}: all arms share the config's own, so that only what they select differs; "
                "leave it out (full_steps and full_time are the shorter arms)"
            )
        if isinstance(method.get("name"), str):
            method = absolute_method(method)
    built = build_method(method, key).to_config()
    if built["name"] == "full":
        raise ConfigError(f"{key} is full, which everything is compared with: name a method that prunes, as infobatch")
    return built


def shown_value(value: Any) -> str:
    """Return a value in one line of YAML's flow style, numbers to four digits.

    >>> shown_value({"schedule": "linear", "end": 0.123456})
    '{schedule: linear, end: 0.1235}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown_value(inner) for inner in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
