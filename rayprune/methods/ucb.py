"""UCB: keep the samples whose loss is high or varies, by an upper confidence bound.

Raju, Daruwalla, Lipasti, "Accelerating Deep Learning with Dynamic Data Pruning", arXiv 2111.12621, 2021. The score is
μ + c·v with the moving average μ of the loss l and its moving variance v (not its square root), which is updated first,
by the old average: v ← (1 − a)·v + a·(l − μ)², μ ← (1 − a)·μ + a·l.

Ours: the first visit sets μ = l and v = 0; the constants a and c are options, as the original's are not confirmed; all
samples are used in epoch 0; an optional annealing phase; ties go to the lower id. Weights are 1: biased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import PruneRatioMethod, check_ema, fold_moving_average
from rayprune.core.draws import highest
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("ucb")
@dataclass(frozen=True)
class UCB(PruneRatioMethod):
    """Keep the samples with the highest mean loss plus c times its variance.

    Args:
        prune_ratio: r, the share of all samples to drop; a number in [0, 1) or a schedule.
        exploration: c in [0, 1e6], the weight of the variance.
        ema: a in (0, 1], the share of the newest loss in the moving average; 1 = the last loss.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "the highest mean + variance of loss"
    paper = "Raju et al., 2021, arXiv 2111.12621"
    folds_once = True

    exploration: float = 1.0
    ema: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ema(self.ema)
        if not 0.0 <= self.exploration <= 1e6:
            raise ConfigError(f"exploration {self.exploration!r} is outside [0, 1e6]: 0 ignores the variance")

    def columns(self) -> dict[str, type[np.float32]]:
        """Return the columns of the moving average and variance."""
        return {"mean": np.float32, "variance": np.float32}

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Move the variance and the average."""
        fold_moving_average(table, ids, signals["loss"], self.ema)

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the bound."""
        return {"ucb": self._bounds(table)}

    def choose(self, table: ScoreTable, context: EpochContext, count: int) -> NDArray[np.bool_]:
        """Take the highest bounds."""
        return highest(self._bounds(table), count)

    def _bounds(self, table: ScoreTable) -> NDArray[Any]:
        with np.errstate(over="ignore"):  # infinite bounds are the highest
            bounds: NDArray[Any] = table["mean"] + np.float32(self.exploration) * table["variance"]
        return bounds
