"""ε-greedy: keep mostly the samples with the highest losses, and some drawn at random.

Raju, Daruwalla, Lipasti, "Accelerating Deep Learning with Dynamic Data Pruning", arXiv 2111.12621, 2021. The score is a
moving average of the loss, μ ← (1 − a)·μ + a·l. Of the M samples to keep, M − floor(ε·M) are those with the highest
scores; floor(ε·M) are drawn uniformly from the others, so that a low score of long ago does not exclude a sample for
good.

Ours: the first visit sets μ = l; the constants a and ε are options, as the original's are not confirmed; all samples
are used in epoch 0; an optional annealing phase; ties go to the lower id. Weights are 1: biased.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import PruneRatioMethod, check_ema, fold_moving_average
from rayprune.core.choosing import num_pruned
from rayprune.core.draws import draw_uniform, highest
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_share
from rayprune.methods.registry import register


@register("epsilon_greedy")
@dataclass(frozen=True)
class EpsilonGreedy(PruneRatioMethod):
    """Keep the samples with the highest moving average of the loss, and a share ε of random others.

    Args:
        prune_ratio: r, the share of all samples to drop; a number in [0, 1) or a schedule.
        epsilon: ε in [0, 1], the share of the kept samples that is drawn at random.
        ema: a in (0, 1], the share of the newest loss in the moving average; 1 = the last loss.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "the highest losses, some random ones"
    paper = "Raju et al., 2021, arXiv 2111.12621"
    folds_once = True

    epsilon: float = 0.1
    ema: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("epsilon", self.epsilon)
        check_ema(self.ema)

    def columns(self) -> dict[str, type[np.float32]]:
        """Return the column of the moving average."""
        return {"mean": np.float32}

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Move the average toward the loss."""
        fold_moving_average(table, ids, signals["loss"], self.ema)

    def choose(self, table: ScoreTable, context: EpochContext, count: int) -> NDArray[np.bool_]:
        """Take the highest averages, then draw from the rest."""
        num_random = num_pruned(self.epsilon, count)
        kept = highest(table["mean"], count - num_random)
        return kept | draw_uniform(~kept, num_random, context.rng)
