"""What every selection method is: a frozen dataclass of hyperparameters and pure array maths.

Shapes: N samples, B observed. A method declares the signals it needs, folds observations into the ScoreTable and turns
the table into a Selection. Write one as one file in this package:

    @register("keep_hard")
    @dataclass(frozen=True)
    class KeepHard(Method):
        kind, paper, signals = "dynamic", "…", ("loss",)
        prune_ratio: float = 0.5
        def select(self, table, context): ...
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import num_pruned as num_pruned  # methods that take a ratio import it from here
from rayprune.core.schedule import Schedule, check_ratio, check_share
from rayprune.core.selection import Selection
from rayprune.core.selector import EpochContext
from rayprune.core.table import ScoreTable
from rayprune.core.validation import check_fields, make_fields_plain, shown, wrong_type
from rayprune.errors import ConfigError

logger = logging.getLogger(__name__)

Kind = Literal["baseline", "dynamic", "static", "control"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Turn what was observed into the next epoch's Selection; the base of all methods.

    Class attributes:
        name: the registered name (external classes: their reference).
        kind: baseline | dynamic (re-chosen every epoch) | static (one subset) | control.
        paper: authors, venue, arXiv number.
        signals: what the workers must report for each visited sample.
        unbiased: the weighted sum over the selection has the full sum as its expectation.
        fixed: the same subset in every epoch.
        needs_labels: the method balances classes and cannot do without them.
        sweep_signals: what forward-only passes report, where that is not `signals`; `fold_sweep` takes it.
        sweep_part: the part of the network that forward-only passes go through, one of the train step's `parts`.
        choosing: hyperparameters that decide what is kept, but no score.

    Args:
        class_floor: least share of every class that each epoch keeps, in [0, 1]; 0 = no floor.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = "dynamic"
    paper: ClassVar[str] = ""
    signals: ClassVar[tuple[str, ...]] = ()
    unbiased: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    sweep_signals: ClassVar[tuple[str, ...]] = ()
    sweep_part: ClassVar[str] = "model"
    choosing: ClassVar[tuple[str, ...]] = ()

    class_floor: float = 0.0

    def __post_init__(self) -> None:
        make_fields_plain(self)
        check_fields(self)
        check_share("class_floor", self.class_floor)

    def columns(self) -> Mapping[str, Any]:
        """Return the table's columns, name → dtype: by default one float32 a signal, its last value."""
        return dict.fromkeys((*self.signals, *self.sweep_signals), np.float32)

    @property
    def collect_epochs(self) -> int:
        """How many epochs on all samples the method scores before it chooses its one subset; 0 for dynamic methods."""
        return 0

    def step(self) -> tuple[str, dict[str, Any]]:
        """Return the train step (a key of `rayprune.nn.steps.STEPS`) and its options."""
        return "plain", {}

    def check(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> NDArray[np.bool_] | None:
        """Return the (B,) rows to fold, None for all; called before anything of the observations is stored.

        Raises:
            ValueError: the observations must not be stored at all.
        """
        return None

    def fold(self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int) -> None:
        """Write finite signals, (B,) each, into the rows of (B,) distinct ids: by default the last value."""
        for name in self.signals:
            table[name][ids] = signals[name]

    def fold_sweep(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> None:
        """Write `sweep_signals` of a forward-only pass, as `fold` does with `signals`: by default the last value."""
        for name in self.sweep_signals:
            seen = signals[name]
            column = table.widen(name, seen.shape[1]) if seen.ndim == 2 else table[name]
            column[ids] = seen

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
        """Return `name` and the hyperparameters in plain YAML types: what `build_method` takes."""
        return {"name": self.name, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}


@cache
def warn_once(line: str) -> None:
    """Log a warning, and nothing where this process has logged it before: a run tries its method out first."""
    logger.warning("%s", line)


def check_static_ratio(name: str, value: Any) -> None:
    """Raise ValueError unless value is a number in [0, 1): a subset that is chosen once takes no schedule."""
    if wrong_type(value, float):
        raise ConfigError(f"{name} = {shown(value)}: one subset takes no schedule: give a number in [0, 1)")
    check_ratio(name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule | Method):
        return value.to_config()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
