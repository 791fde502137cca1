"""RS2: a fresh uniform subset every epoch.

Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning", ICLR 2024,
arXiv 2305.18424. The baseline that most selection methods do not beat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayprune.core.choosing import num_pruned
from rayprune.core.method import EpochContext, Method
from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.core.thinning import thin
from rayprune.methods.registry import register


@register("random_epoch")
@dataclass(frozen=True)
class RandomEpoch(Method):
    """Keep a fresh random subset with weight 1 in every epoch.

    Args:
        prune_ratio: r, the share to drop, a number in [0, 1) or a schedule.
        replacement: True draws every epoch independently; False draws without replacement across epochs: no sample
            comes a second time before all have come once (the paper's RS2 without replacement).
    """

    kind = "baseline"
    keeps = "a new random subset in every epoch"
    paper = "Okanovic et al., ICLR 2024, arXiv 2305.18424 (RS2)"
    signals = ("loss",)

    prune_ratio: float | Schedule = 0.5
    replacement: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Draw N − floor(r·N) samples; without replacement, start with those drawn least often."""
        ratio = Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        drops = num_pruned(ratio, context.num_samples)
        to_draw = context.num_samples - drops
        kept = np.zeros(context.num_samples, dtype=bool)
        # Each epoch either prunes or draws a sample, so the samples pruned most often were drawn least often.
        levels = np.unique(table.times_pruned)[::-1] if not self.replacement else [None]
        for level in levels:
            waiting = np.ones_like(kept) if level is None else table.times_pruned == level
            count = int(np.count_nonzero(waiting))
            share = min(to_draw, count) / count
            if share > 0:
                kept |= thin(waiting.view(np.uint8), np.array([share]), context.rng).codes > 1
            to_draw -= min(to_draw, count)
        return Selection.of_mask(kept, ratio, drops)
