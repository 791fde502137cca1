"""Methods that choose inside a batch: a forward pass scores the candidates, and the step trains on some of them only.

An epoch visits all samples. In each step, the train step `in_batch` scores the rows of the global batch without
gradients and asks the method which of them learn. Every rank asks with the same rows, in the order of their ids, and a
generator that depends on seed, epoch and step alone. So the choice depends neither on the number of ranks nor on the
order of the rows.

    @register("hardest_half")
    @dataclass(frozen=True)
    class HardestHalf(InBatchMethod):
        keeps, paper = "the higher losses of every batch", "…"
        def pick(self, signals, context):
            return np.argsort(-signals["loss"], kind="stable")[: context.num_rows // 2 or 1], None

Shapes: N samples, R rows of a global batch, B of them candidates, M chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import num_kept
from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError

# NumPy pads a seed with zeros: the last number keeps these generators apart from those of epochs and plans.
_STEP_PURPOSE, _PERMUTATION = 4, 5

Picked = tuple[Ids, NDArray[Any] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepContext:
    """Hold the position of a training step.

    Attributes:
        epoch, num_epochs: 0-based epoch e of E.
        step, num_steps: 0-based step of the epoch's training steps.
        num_samples: N.
        seed: the run's seed.
        facts: those of the epoch's Selection, by which `select` tells `pick` what it has seen in the table.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    num_samples: int
    seed: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """The share of the run that is done before this step, in [0, 1)."""
        return (self.epoch + self.step / self.num_steps) / self.num_epochs

    @cached_property
    def rng(self) -> np.random.Generator:
        """The step's generator; every draw of `pick` comes from it."""
        return self.derived_rng(_STEP_PURPOSE)

    def derived_rng(self, purpose: int) -> np.random.Generator:
        """Return a fresh generator of the step for one purpose, an integer from 6 on."""
        return np.random.default_rng([self.seed, self.epoch, self.step, purpose])

    def with_rows(
        self, ids: Ids, labels: NDArray[np.int64], columns: Mapping[str, NDArray[np.float32]]
    ) -> BatchContext:
        """Return the context of the step's rows."""
        step = {field.name: getattr(self, field.name) for field in fields(StepContext)}
        return BatchContext(**step, ids=ids, labels=labels, columns=columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchContext(StepContext):
    """Hold the position of a training step and the candidates of its batch.

    Attributes:
        ids: (B,) int64 sample ids; in `pick` and `update`, ascending.
        labels: (B,) int64 class of each row.
        columns: name → (B,) float32, the rows' values of the method's columns.
    """

    ids: Ids
    labels: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.ids.size)


@dataclass(frozen=True)
class InBatchMethod(Method):
    """Choose the rows of every batch that the network learns from; the base class of in-batch methods.

    Class attributes:
        batch_signals: the signals of the candidates that `pick` gets; `signals` go to the score table, as always.
        candidates_in_eval_mode: whether candidates are scored in eval mode. False scores them in train mode, where
            batch normalization uses the statistics of a rank's candidates. Running statistics never change while
            candidates are scored.
    """

    kind = "in_batch"
    signals: ClassVar[tuple[str, ...]] = ("loss",)

    batch_signals: ClassVar[tuple[str, ...]] = ("loss",)
    candidates_in_eval_mode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_floor > 0:
            raise ConfigError(
                f"class_floor = {self.class_floor}: {type(self).__name__} chooses inside batches, which may lack a "
                "class: leave it out"
            )

    @property
    def cost(self) -> str:
        """The scoring of the candidates."""
        return "a forward pass over every batch"

    def step(self) -> tuple[str, dict[str, Any]]:
        return "in_batch", {"method": self.to_config()}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples: every one of them is a candidate once an epoch."""
        return Selection.full(context.num_samples)

    def picks(self, context: StepContext) -> bool:
        """Return whether a step chooses; without, it is a plain step on the whole batch, and nothing is scored."""
        return True

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        """Choose among the candidates of a global batch; a pure function of its arguments.

        Args:
            signals: name → (B,) or (B, …) finite float32, the `batch_signals`.
            context: the candidates are in the order of their ids, so that ties go to the lower id.

        Returns:
            (M,) distinct rows in [0, B), and (M,) weights, or None for 1. The loss of the step is the mean over the
            M rows of weight · loss.
        """
        raise TypeError(f"{type(self).__name__} defines no pick()")

    def state_columns(self, num_samples: int) -> Mapping[str, float]:
        """Return the columns that `update` keeps, one float32 per sample: name → initial value."""
        return {}

    def file_columns(self) -> Mapping[str, tuple[str, str | None]]:
        """Return the columns that are read from files: name → (file of scores, name of the score there or None).

        The file is the value of the hyperparameter of the column's name; "" is refused when a run starts.
        """
        return {}

    def update(self, signals: Signals, context: BatchContext) -> Mapping[str, NDArray[Any]]:
        """Return new values of the state columns for all candidates, name → (B,), chosen or not.

        Plain steps update them, too, with the signals of their training pass.
        """
        return {}


class Candidates:
    """The rows of a global batch that a method may choose, in the order of their ids.

    Padding is none of them, nor are rows with a NaN or infinite signal, whose losses have diverged.

    Args:
        signals: name → (R,) or (R, …).
        context: of the R rows, in any order.
        real: (R,) bool, False for padding; None if there is none.

    Attributes:
        rows: (B,) int64 in [0, R), the row of each candidate.
        signals, context: of the candidates.
    """

    def __init__(self, signals: Signals, context: BatchContext, real: NDArray[np.bool_] | None = None) -> None:
        usable = np.ones(context.num_rows, dtype=bool) if real is None else real
        for array in signals.values():
            usable = usable & np.isfinite(array).reshape(context.num_rows, -1).all(axis=1)
        rows = np.flatnonzero(usable)
        self.rows: Ids = rows[np.argsort(context.ids[rows], kind="stable")]
        self.signals = {name: _taken(array, self.rows) for name, array in signals.items()}
        columns = {name: _taken(column, self.rows) for name, column in context.columns.items()}
        self.context = replace(context, ids=context.ids[self.rows], labels=context.labels[self.rows], columns=columns)

    def pick(self, method: InBatchMethod, *, permuted: bool = False) -> tuple[Ids, NDArray[np.float32]]:
        """Return the (M,) chosen rows, ascending, and their weights.

        Args:
            method: chooses.
            permuted: give the method the signals and columns of other rows, for a control.

        Raises:
            ConfigError: the method returns rows or weights that do not fit.
        """
        if not self.rows.size:
            return self.rows, np.empty(0, dtype=np.float32)
        signals, context = self.signals, self.context
        if permuted:
            order = context.derived_rng(_PERMUTATION).permutation(self.rows.size)
            signals = {name: _taken(array, order) for name, array in signals.items()}
            columns = {name: _taken(column, order) for name, column in context.columns.items()}
            context = replace(context, columns=columns)
        places, weights = checked(method.pick(signals, context), self.rows.size, method.name or type(method).__name__)
        order = np.argsort(self.rows[places])
        return self.rows[places][order], weights[order]

    def update(self, method: InBatchMethod) -> Mapping[str, NDArray[Any]]:
        """Return the new values of the candidates' state columns, name → (B,)."""
        return method.update(self.signals, self.context) if self.rows.size else {}


def _taken(array: NDArray[Any], rows: Ids) -> NDArray[Any]:
    """Return rows of an array, read-only: `pick` must not change what `update` gets."""
    taken: NDArray[Any] = array[rows]
    taken.flags.writeable = False
    return taken


def checked(picked: Picked, num_rows: int, name: str) -> tuple[Ids, NDArray[np.float32]]:
    """Return what a method picked of B rows, with weights of 1 if it gave none.

    Raises:
        ConfigError: rows repeat, are none, are out of range or not integers; weights do not fit or are not finite and
            at least 0.
    """
    rows, weights = np.asarray(picked[0]), picked[1]
    fault = ""
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.size == 0:
        fault = f"rows {rows.dtype} of shape {rows.shape} instead of one or more integers"
    elif rows.min() < 0 or rows.max() >= num_rows:
        fault = f"rows from {rows.min()} to {rows.max()} of {num_rows}"
    elif np.unique(rows).size < rows.size:
        fault = "a row twice"
    if not fault and weights is None:
        weights = np.ones(rows.size)
    if not fault:
        weights = np.asarray(weights, dtype=np.float32)
        if weights.shape != rows.shape:
            fault = f"{weights.size} weights for {rows.size} rows"
        elif not (np.isfinite(weights).all() and (weights >= 0).all()):
            fault = "weights that are not finite and at least 0"
    if fault:
        raise ConfigError(
            f"method {name!r} picked {fault}: pick() returns distinct rows in 0..B-1, and weights or None"
        )
    assert weights is not None
    return rows.astype(np.int64), weights


def num_picked(keep: float, num_rows: int) -> int:
    """Return how many of B candidates a share means: B − floor((1 − keep)·B), at least 1.

    >>> num_picked(0.1, 320), num_picked(0.5, 5), num_picked(0.1, 1)
    (32, 3, 1)
    """
    return num_kept(float(keep), num_rows)


def check_keep(keep: float) -> None:
    """Refuse a share outside (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep {keep!r} is outside (0, 1]: give the share of each batch to train on")


def check_window(start: float, end: float) -> None:
    """Refuse a window of training that is empty or outside [0, 1]."""
    check_share("start", start)
    check_share("end", end)
    if start >= end:
        raise ConfigError(f"start {start:g} must be below end {end:g}: they are shares of training")
