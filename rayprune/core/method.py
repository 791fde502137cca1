"""The base class of selection methods: a frozen dataclass of hyperparameters and pure array maths.

A method declares the signals it needs, folds observations into the ScoreTable and turns the table into a Selection. A
new method is one file in `rayprune/methods`:

    @register("keep_hard")
    @dataclass(frozen=True)
    class KeepHard(Method):
        kind, paper, signals = "dynamic", "…", ("loss",)
        prune_ratio: float = 0.5
        def select(self, table, context): ...

Shapes: N samples, B observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.thinning import thin, thin_with_class_floor
from rayprune.core.validation import check_fields, check_share, fields_to_yaml

Kind = Literal["baseline", "dynamic", "static", "in_batch", "control"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Turn observations into the next epoch's Selection; the base class of all methods.

    Class attributes:
        name: the registered name (external classes: their reference).
        kind: baseline | dynamic (chooses again every epoch) | static (one subset) | in_batch (chooses inside every
            batch) | control.
        keeps: which samples it keeps, in a few words.
        paper: authors, venue, arXiv number.
        signals: the signals that workers report for each visited sample.
        unbiased: the weighted sum over the selection has the full sum as its expectation.
        fixed: the subset is the same in every epoch.
        needs_labels: the method balances classes and needs labels.
        sweep_signals: the signals of forward-only passes if other than `signals`; `fold_sweep` takes them.
        sweep_part: the part of the network for forward-only passes, one of the train step's `parts`.
        selection_fields: hyperparameters that affect the selection but not the scores.
        path_fields: hyperparameters that are paths of files; a config makes them absolute.

    Args:
        class_floor: least share of every class that each epoch keeps, in [0, 1]; 0 = no floor.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = "dynamic"
    keeps: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    signals: ClassVar[tuple[str, ...]] = ()
    unbiased: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    sweep_signals: ClassVar[tuple[str, ...]] = ()
    sweep_part: ClassVar[str] = "model"
    selection_fields: ClassVar[tuple[str, ...]] = ()
    path_fields: ClassVar[tuple[str, ...]] = ("path",)

    class_floor: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_share("class_floor", self.class_floor)

    def columns(self) -> Mapping[str, Any]:
        """Return the table's columns, name → dtype: by default one float32 per signal, its last value.

        The value can also be (dtype, row shape), or a VectorColumn for long vectors of a forward-only pass.
        """
        return dict.fromkeys((*self.signals, *self.sweep_signals), np.float32)

    @property
    def collect_epochs(self) -> int:
        """Epochs on all samples that the method scores before it chooses its one subset; 0 for dynamic methods."""
        return 0

    @property
    def cost(self) -> str:
        """What scoring costs beside training on the kept samples, in words; "" if their training gives the scores."""
        return ""

    def chosen_at(self, context: EpochContext) -> int:
        """Return the epoch whose choice this epoch trains on: itself, or an earlier one if the choice holds longer."""
        return 0 if self.fixed else context.epoch

    def step(self) -> tuple[str, dict[str, Any]]:
        """Return the train step (a key of `rayprune.nn.steps.STEPS`) and its options."""
        return "plain", {}

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Return a (B,) mask of the rows to fold, None for all; called before anything is stored.

        Raises:
            ConfigError: the observations must not be stored at all.
        """
        return None

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Write finite signals, (B,) each, into the rows of (B,) distinct ids: by default the last value."""
        for name in self.signals:
            table[name][ids] = signals[name]

    def fold_sweep(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Write the `sweep_signals` of a forward-only pass: by default the last value."""
        for name in self.sweep_signals:
            values = signals[name]
            if name in table.vectors:
                table.vectors[name].put(ids, values)
                continue
            column = table.widen(name, values.shape[1]) if values.ndim == 2 else table[name]
            column[ids] = values

    def condense(self, table: ScoreTable, context: EpochContext) -> None:
        """Turn `table.vectors` into columns after the forward-only pass of the context's epoch; then they are deleted.

        A pure function of the vectors, the columns and the context. Only methods with a VectorColumn need it.
        """
        raise TypeError(f"{type(self).__name__} declares vectors and defines no condense()")

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Choose an epoch's samples; a pure function of table and context."""
        raise TypeError(f"{type(self).__name__} defines no select()")

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return name → (N,) scores for people and files: by default every one-dimensional column."""
        return {name: column for name, column in table.columns.items() if column.ndim == 1}

    def _set_schedule(self, field: str) -> None:
        """Replace a ratio field by its Schedule; for `__post_init__` of a frozen dataclass."""
        object.__setattr__(self, field, Schedule.of(getattr(self, field), f"method.{field}"))

    def to_config(self) -> dict[str, Any]:
        """Return `name` and the hyperparameters in plain YAML types, as `build_method` takes them."""
        return {"name": self.name, **fields_to_yaml(self)}


@dataclass(frozen=True, eq=False, repr=False)
class EpochContext:
    """Hold the run's position and the random generators for a method's selection.

    Attributes:
        epoch, num_epochs: 0-based epoch e of E.
        num_samples: N.
        seed: the run's seed.
        labels: (N,) class of each sample, or None.
        class_floor: the least share of every class that the epoch keeps; 0 = no floor.
        visits_before: samples kept in all earlier epochs together.
        chosen: the selection of a method that reads one from a file, or None.
        recalls: (C,) recall of each class on validation data in the scoring run, or None.
        averaged: name → (N,) scores averaged over several scoring runs, instead of the table's; usually empty.
    """

    epoch: int
    num_epochs: int
    num_samples: int
    seed: int
    labels: NDArray[Any] | None = None
    class_floor: float = 0.0
    visits_before: int = 0
    chosen: Selection | None = None
    recalls: NDArray[np.float64] | None = None
    averaged: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @cached_property
    def rng(self) -> np.random.Generator:
        """The epoch's generator, `default_rng([seed, epoch])`; every draw of the selection comes from it."""
        return self.rng_of(self.epoch)

    def rng_of(self, epoch: int) -> np.random.Generator:
        """Return a fresh generator of another epoch, for a choice that must be the same in several epochs."""
        return np.random.default_rng([self.seed, epoch])

    def derived_rng(self, purpose: int, epoch: int | None = None) -> np.random.Generator:
        """Return a generator for one purpose (an integer from 2), independent of `rng` and of the plan's."""
        return np.random.default_rng([self.seed, self.epoch if epoch is None else epoch, purpose])

    def thin(self, strata: NDArray[np.unsignedinteger[Any]], keep_ratios: ArrayLike) -> Selection:
        """Thin strata at random without bias, and above the class floor if there is one.

        Args:
            strata: (N,) unsigned integers; 0 = kept whole, s ≥ 1 = thinned to `keep_ratios[s - 1]`.
            keep_ratios: (S,) in (0, 1].
        """
        ratios = np.asarray(keep_ratios, dtype=np.float64)
        if self.class_floor > 0 and self.labels is not None:
            return thin_with_class_floor(strata, ratios, self.labels, self.class_floor, self.rng)
        return thin(strata, ratios, self.rng)
