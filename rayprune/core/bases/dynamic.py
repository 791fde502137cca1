"""Base classes of dynamic methods, which choose again in every epoch by the scores of the last visits.

`DynamicMethod` is for any rule between full epochs at both ends of the run; `PruneRatioMethod` for those that keep an
exact number of samples. Samples that were never visited have no score: they come first.

Shapes: N samples, M kept, B observed.
"""

from __future__ import annotations

import abc
import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import num_pruned
from rayprune.core.method import EpochContext, Method
from rayprune.core.schedule import Schedule, epoch_at
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError

logger = logging.getLogger(__name__)


@cache
def warn_once(line: str) -> None:
    """Log a warning once per process: a run tries its method out before it starts."""
    logger.warning("%s", line)


@dataclass(frozen=True)
class DynamicMethod(Method):
    """Prune in every epoch but the first, and up to the last full ones.

    Args:
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    kind = "dynamic"
    signals: ClassVar[tuple[str, ...]] = ("loss",)

    # A second observation of a sample in one epoch changes nothing; for scores that a fold moves instead of replacing.
    folds_once: ClassVar[bool] = False

    anneal_start: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("anneal_start", self.anneal_start)

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Mask second observations in one epoch if `folds_once`."""
        return table.last_visit[ids] != epoch if self.folds_once else None

    def pruning_epochs(self, num_epochs: int) -> range:
        """Return the epochs that may prune."""
        return range(1, epoch_at(self.anneal_start, num_epochs))

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples in the full epochs, and as long as none has a score."""
        may_prune = self.pruning_epochs(context.num_epochs)
        if context.epoch == 0 and not may_prune:
            warn_once(
                f"{self.name} never prunes with num_epochs = {context.num_epochs} and anneal_start "
                f"{self.anneal_start:g}: raise anneal_start, or train longer"
            )
        if context.epoch not in may_prune or table.last_visit.max(initial=-1) < 0:
            return self.full(context)
        return self.prune(table, context)

    def full(self, context: EpochContext) -> Selection:
        """Return the selection of an epoch that does not prune by the scores."""
        return Selection.full(context.num_samples)

    @abc.abstractmethod
    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Return the selection of an epoch that may prune."""

    def rescored(self, dropped: NDArray[np.bool_], context: EpochContext) -> Ids:
        """Return the ids of dropped samples to re-score: none if no later epoch reads the scores."""
        later = context.epoch + 1 in self.pruning_epochs(context.num_epochs)
        return np.flatnonzero(dropped) if later else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PruneRatioMethod(DynamicMethod):
    """Keep exactly N − floor(r·N) samples, at least one, in every epoch that may prune.

    Args:
        prune_ratio: r, the share of all samples to drop; a number in [0, 1) or a schedule.
    """

    prune_ratio: float | Schedule = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Choose M samples."""
        ratio, num = Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs), context.num_samples
        drops = min(num_pruned(ratio, num), num - 1)
        if not drops:
            return Selection.full(num)
        return Selection.of_mask(self.choose(table, context, num - drops), ratio, drops)

    @abc.abstractmethod
    def choose(self, table: ScoreTable, context: EpochContext, count: int) -> NDArray[np.bool_]:
        """Return a mask of exactly `count` samples, less than all."""


def drop_mastered(hard: NDArray[np.bool_], scores: NDArray[Any]) -> Selection:
    """Keep the samples where a rule finds them hard, or the one with the highest score if none is.

    Args:
        hard: (N,) the samples to keep.
        scores: (N,) floating, higher for harder samples.

    Returns:
        A Selection that requests what it drops, as the rule has no ratio of its own.
    """
    if not hard.any():
        hard = np.zeros_like(hard)
        hard[np.argmax(scores)] = True
    dropped = hard.size - int(np.count_nonzero(hard))
    return Selection.of_mask(hard, dropped / hard.size, dropped)


def check_ema(value: float) -> None:
    """Raise ConfigError unless the share of the newest loss in a moving average is in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"ema {value!r} is outside (0, 1]: 1 uses the last loss")


def fold_moving_average(table: ScoreTable, ids: Ids, losses: NDArray[Any], ema: float) -> None:
    """Move the column `mean`, and `variance` if there is one, toward the losses of (B,) distinct ids.

    With the share a of the newest loss l: v ← (1 − a)·v + a·(l − μ)², by the old mean; then μ ← (1 − a)·μ + a·l. The
    first visit sets μ = l and v = 0.
    """
    losses = np.asarray(losses, dtype=np.float64)
    old = table["mean"][ids].astype(np.float64)
    first = np.isnan(old)
    table["mean"][ids] = np.where(first, losses, (1.0 - ema) * old + ema * losses)
    if "variance" in table.columns:
        moved = (1.0 - ema) * table["variance"][ids].astype(np.float64) + ema * (losses - old) ** 2
        # An infinite variance would never fall again.
        table["variance"][ids] = np.where(first, 0.0, np.minimum(moved, np.finfo(np.float32).max))
