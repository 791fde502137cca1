"""Static random pruning: one uniform subset, drawn once from the seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayprune.core.choosing import num_pruned
from rayprune.core.method import EpochContext, Method
from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """Keep a fixed random subset with weight 1.

    Args:
        prune_ratio: r, the share to drop, a number in [0, 1) or a schedule; under a schedule the subsets are nested.
    """

    kind = "baseline"
    keeps = "one random subset"
    paper = "static random subset"
    signals = ("loss",)
    fixed = True

    prune_ratio: float | Schedule = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep the first N − floor(r·N) of a permutation that depends on the seed alone."""
        ratio = Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        drops = num_pruned(ratio, context.num_samples)
        # At most half the memory of int64 ids.
        order = np.arange(context.num_samples, dtype=np.min_scalar_type(context.num_samples))
        context.rng_of(0).shuffle(order)
        kept = np.zeros(context.num_samples, dtype=bool)
        kept[order[: context.num_samples - drops]] = True
        return Selection.of_mask(kept, ratio, drops)
