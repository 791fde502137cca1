"""The config sections `sweep` and `compare`: the search space of a sweep, and the arms of a comparison.

A key of the sweep's space is dotted (`method.prune_ratio`), or nested as elsewhere in a config; its value is a list, or
a mapping with one key: `choice`, `grid`, `uniform`, `loguniform` or `quniform`. Values may be whole subtrees.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator

from rayprune.config.schema import AutoCount, Section, absolute_method
from rayprune.config.yaml import flatten
from rayprune.core.references import closest
from rayprune.core.validation import UNBOUNDED, AtMost, short_repr
from rayprune.errors import ConfigError
from rayprune.methods import build_method

Form = Literal["choice", "grid", "uniform", "loguniform", "quniform"]
_FORMS: tuple[str, ...] = get_args(Form)
# All of a space's points are checked before the first trial, which takes milliseconds each.
MAX_TRIALS = 10_000
# Keys whose value decides which other keys there are.
NAMING = {"method.name", "model.name", "data.source"}
NAMED = {*NAMING, "method", "model", "data"}
# Sections that a sweep sets for its trials: they do not affect results, or say where a trial writes.
_SET_BY_SWEEP = {"run", "scaling", "sweep", "compare", "audit"}

# The baselines that a method has to beat, and two arms that isolate the sources of its gains and costs.
BASELINES = {
    "full": "all samples in all epochs",
    "full_time": "all samples, in as many epochs as fit into the method's seconds",
    "full_steps": "all samples, in as many epochs as have the method's samples trained",
    "random": "one fixed random subset with the method's samples trained",
    "random_epoch": "a fresh random subset every epoch with the method's samples trained",
    "random_annealed": "random_epoch with the method's final epochs on all samples",
    "least_confidence": "one fixed subset, the least confident samples after a short scoring run",
    "shuffled": "the method with its scores permuted across samples",
    "ratio_0": "the method with nothing to prune: the cost of its machinery",
}
_SHARED_BY_ARMS = ("train", "optim", "data", "model", "scaling", "epochs", "batch_size")


AUDIT_RULES = ("ensemble", "held_out", "probability", "margin", "loss_mixture", "confident_joint", "agreement")


class AuditSection(Section):
    """How `rayprune audit` scores the samples, and what counts as a suspect."""

    folds: Annotated[int, AtMost(1_000)] = Field(
        4, ge=1, description="runs that each leave out one part of the samples and predict it; 1: one run on all"
    )
    repeats: Annotated[int, AtMost(1_000)] = Field(
        1, ge=1, description="repeat all runs with the seeds train.seed, +1, …, and average: more exact, at its cost"
    )
    threshold_samples: bool = Field(
        False,
        description="give part of the samples an extra class, whose margins show which labels are wrong (AUM)",
    )
    window: int = Field(5, ge=1, description="last epochs whose predictions of the part left out are averaged")
    rule: Literal[AUDIT_RULES] = Field("ensemble", description="how the probability of a wrong label is estimated")  # type: ignore[valid-type]
    at: float = Field(0.5, gt=0, lt=1, description="the probability from which on a label counts as a suspect")
    duplicates: bool = Field(True, description="search near-duplicates, in the validation data as well")
    train: dict[str, Any] = Field(default_factory=dict, description="keys of train that differ in the audit's runs")
    optim: dict[str, Any] = Field(default_factory=dict, description="keys of optim that differ in the audit's runs")


class SweepSection(Section):
    """The search space of `rayprune sweep`, and how to search it."""

    space: dict[str, Any] = Field(default_factory=dict, description="dotted key → a list or a distribution")
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: all combinations; random: draws; optuna: proposals from the results so far"
    )
    num_trials: Annotated[int | None, AtMost(MAX_TRIALS)] = Field(
        None, ge=1, description="number of trials of random and optuna"
    )
    scheduler: Literal["none", "asha"] = Field("none", description="asha stops trials that are not among the best")
    grace_epochs: AutoCount = Field("auto", description="epochs before asha may stop a trial; auto: a fifth of all")
    reduction_factor: float = Field(3.0, gt=1, description="asha keeps one trial in so many at each rung")
    objective: Literal["accuracy", "samples", "compute", "seconds", "pareto"] = Field(
        "pareto", description="what optuna and asha optimize; pareto: accuracy and compute (asha: accuracy)"
    )
    hold_out: float = Field(
        0.1, ge=0, lt=1, description="share of the training samples to compare trials on; 0: the validation part"
    )
    amortise: int = Field(1, ge=1, description="trainings that share the cost of a static method's scoring run")
    max_concurrent: AutoCount = Field("auto", description="trials at a time; auto: as many as the cluster has room for")
    seed: int = Field(0, ge=0, lt=2**32, description="of the search; the trials' own is train.seed")
    max_failures: Annotated[int, UNBOUNDED] = Field(1, ge=0, description="restarts of a failed trial")

    @field_validator("space", mode="before")
    @classmethod
    def _flatten_space(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return value

        # Below a section's key, a mapping with an unknown key is a misspelled distribution, which `axis_of` reports.
        def is_section(key: str, inner: Any) -> bool:
            return "." not in key and isinstance(inner, Mapping) and bool(inner) and not set(inner) & set(_FORMS)

        return flatten(value, is_section)

    @model_validator(mode="after")
    def _check_combination(self) -> SweepSection:
        for axis in self.axes:
            section = axis.key.split(".")[0]
            if section in _SET_BY_SWEEP:
                raise ConfigError(f"sweep.space {axis.key!r}: a sweep sets {section} for its trials: leave it out")
            if self.search == "grid" and not axis.is_discrete:
                raise ConfigError(
                    f"sweep.space {axis.key!r} is {axis.form}: a grid takes lists, or set sweep.search=random"
                )
            if self.search == "optuna" and axis.form == "grid":
                raise ConfigError(f"sweep.space {axis.key!r} is a grid: sweep.search=optuna takes choice")
        self._check_size()
        if self.search == "grid" and self.num_trials is not None:
            raise ConfigError("sweep.num_trials: a grid has as many trials as points, leave it out")
        if self.search != "grid" and self.num_trials is None:
            raise ConfigError(f"sweep.search = {self.search!r} needs sweep.num_trials, such as sweep.num_trials=20")
        return self

    def _check_size(self) -> None:
        combined = [axis for axis in self.axes if self.search == "grid" or axis.form == "grid"]
        num_points = math.prod(len(axis.values) for axis in combined) * (self.num_trials or 1)
        # Every value is checked with each method, model and source.
        named = [axis for axis in self.axes if axis.key in NAMED]
        num_probes = math.prod(len(axis.probes) for axis in named) * sum(len(axis.probes) for axis in self.axes)
        if num_points > MAX_TRIALS:
            cure = "list fewer values, or draw some of them: sweep.search=random with sweep.num_trials"
            raise ConfigError(f"sweep.space has {num_points:,} points, above {MAX_TRIALS:,}: {cure}")
        if num_probes > MAX_TRIALS:
            raise ConfigError(
                f"sweep.space combines {math.prod(len(axis.probes) for axis in named):,} methods, models and sources "
                f"with too many values: sweep at most {MAX_TRIALS:,} of them, or sweep each method on its own"
            )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The keys that vary, in their order in the config."""
        return tuple(axis_of(key, value) for key, value in self.space.items())


@dataclass(frozen=True)
class Axis:
    """One key that a sweep varies.

    Attributes:
        key: dotted, such as "method.prune_ratio".
        form: a choice or a grid of `values`, or a distribution between `low` and `high`.
        step: for quniform, whose draws are multiples of it.
    """

    key: str
    form: Form
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0

    @property
    def is_discrete(self) -> bool:
        """Whether the axis lists all its values."""
        return self.form in {"choice", "grid"}

    @property
    def probes(self) -> tuple[Any, ...]:
        """All values, or a distribution's two ends: the values to check before a sweep starts."""
        return self.values if self.is_discrete else (self.low, self.high)

    def draw(self, rng: np.random.Generator) -> Any:
        """Return one value.

        >>> Axis("train.epochs", "quniform", low=4, high=10, step=2).draw(np.random.default_rng(0))
        8
        """
        if self.is_discrete:
            return self.values[int(rng.integers(len(self.values)))]
        share = float(rng.random())
        if self.form == "loguniform":
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        value = self.low + share * (self.high - self.low)
        if self.form == "uniform":
            return value
        rounded = round(value / self.step) * self.step  # an int if low, high and step are
        return min(max(rounded, self.low), self.high)


def axis_of(key: str, value: Any) -> Axis:
    """Return the axis for a key of the space and its value.

    Raises:
        ConfigError: the value is not a list or distribution, or its bounds do not ascend.

    >>> axis_of("optim.lr", {"loguniform": [0.01, 1.0]}).form
    'loguniform'
    """
    where = f"sweep.space {key!r}"
    if isinstance(value, list):
        value = {"choice": value}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{where} = {short_repr(value)}: must be a list, or a mapping of one of {', '.join(_FORMS)}")
    ((form, values),) = value.items()
    if form not in _FORMS:
        raise ConfigError(f"{where}: unknown distribution {form!r}: {closest(str(form), _FORMS)}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where} = {short_repr(values)}: {form} takes a list of values")
    if form in {"choice", "grid"}:
        if len(values) > MAX_TRIALS:
            raise ConfigError(f"{where} lists {len(values):,} values: give at most {MAX_TRIALS:,}")
        if len({repr(each) for each in values}) < len(values):  # 1 and 1.0 are two values
            raise ConfigError(f"{where}: a value appears twice in {short_repr(values)}, keep one")
        return Axis(key, form, tuple(values))
    numbers = ["low", "high", "step"][: 3 if form == "quniform" else 2]
    if len(values) != len(numbers) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
        raise ConfigError(f"{where} = {short_repr(values)}: {form} takes the numbers [{', '.join(numbers)}]")
    axis = Axis(key, form, (), *values)
    if not axis.low < axis.high or (form == "loguniform" and axis.low <= 0) or (form == "quniform" and axis.step <= 0):
        above = " above 0" if form == "loguniform" else ", step above 0" if form == "quniform" else ""
        raise ConfigError(f"{where} = {short_repr(values)}: {form} takes low below high{above}")
    return axis


def format_value(value: Any) -> str:
    """Return a value in one line of YAML's flow style, with four significant digits.

    >>> format_value({"schedule": "linear", "end": 0.123456})
    '{schedule: linear, end: 0.1235}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {format_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(inner) for inner in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class CompareSection(Section):
    """The arms of `rayprune compare`, and the limits of its verdicts."""

    methods: tuple[dict[str, Any] | str, ...] = Field((), description="methods to compare; default: the config's own")
    seeds: Annotated[int, AtMost(1_000)] | tuple[Annotated[int, UNBOUNDED], ...] = Field(
        (0, 1, 2), description="the seeds of all arms, or their number, from 0 on"
    )
    baselines: tuple[str, ...] = Field(tuple(BASELINES), description="arms beside the methods; full always runs")
    margin: float = Field(0.2, ge=0, le=100, description="loss of accuracy, in points, that counts as none")
    rival_margin: float | None = Field(
        None, ge=0, le=100, description="advantage over a baseline, in points, that counts as none; default: the margin"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals at the first look at one method")
    parallel: AutoCount = Field("auto", description="runs at a time; auto: as many as the machine has room for")
    timed_seeds: int = Field(3, ge=0, description="seeds whose runs go one at a time, for their seconds")
    amortise: int = Field(1, ge=1, description="trainings that share the cost of a static method's scoring run")
    tune: Literal["auto"] | bool = Field(
        "auto", description="choose each arm's learning rate on held-out training samples; auto: if they are enough"
    )
    lr_factors: tuple[float, ...] = Field((0.7, 1.0, 1.4), description="on optim.lr; extended while an end is best")
    tune_seeds: Annotated[int, AtMost(1_000)] = Field(
        2, ge=1, description="seeds of the tuning runs, other than those of the judged runs"
    )

    @field_validator("lr_factors")
    @classmethod
    def _check_factors(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) < 2 or not all(0 < a < b for a, b in pairwise(value)):
            raise ConfigError(
                f"compare.lr_factors = {short_repr(list(value))}: give two or more, ascending and above 0"
            )
        return value

    @field_validator("methods")
    @classmethod
    def _resolve_methods(cls, value: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
        methods = tuple(compared_method(method, f"compare.methods[{number}]") for number, method in enumerate(value))
        for number, method in enumerate(methods):
            if method in methods[:number]:
                raise ConfigError(f"compare.methods[{number}] is the same as another one: leave it out")
        return methods

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, value: int | tuple[int, ...]) -> tuple[int, ...]:
        seeds = tuple(range(value)) if isinstance(value, int) else value
        if not seeds:
            raise ConfigError(f"compare.seeds = {short_repr(value)}: give at least one seed, better three")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ConfigError(f"compare.seeds = {short_repr(list(seeds))}: seeds are at least 0 and below 2^63")
        if duplicates := sorted(seed for seed, count in Counter(seeds).items() if count > 1):
            raise ConfigError(f"compare.seeds names {duplicates[0]} twice: a run counts once, name another seed")
        return seeds

    @field_validator("baselines")
    @classmethod
    def _check_baselines(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in BASELINES:
                raise ConfigError(f"compare.baselines: unknown baseline {name!r}: {closest(name, BASELINES)}")
            if value.count(name) > 1:
                raise ConfigError(f"compare.baselines names {name!r} twice: keep one")
        return tuple(name for name in BASELINES if name == "full" or name in value)

    @property
    def method_configs(self) -> tuple[dict[str, Any], ...]:
        """The whole configs of `methods`."""
        return tuple(method for method in self.methods if isinstance(method, dict))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of all arms."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def compared_method(method: Any, key: str) -> dict[str, Any]:
    """Return the whole config of a method to compare; messages name the setting `key`.

    Raises:
        ConfigError: it is not a method, is `full`, or has keys that all arms share.
    """
    if isinstance(method, dict):
        shared = [name for name in method if name.split(".")[0] in _SHARED_BY_ARMS]
        if shared:
            raise ConfigError(
                f"{key} has {shared[0]!r}: all arms share the config's own, so that only the selection differs; "
                "leave it out (full_steps and full_time are the shorter arms)"
            )
        if isinstance(method.get("name"), str):
            method = absolute_method(method)
    config = build_method(method, key).to_config()
    if config["name"] == "full":
        raise ConfigError(f"{key} is full, the baseline of all methods: name a method that prunes, such as infobatch")
    return config
