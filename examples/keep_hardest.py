"""A custom selection method: keep the samples with the highest last loss.

    rayprune train configs/digits_full.yaml \
        method.name=examples/keep_hardest.py:KeepHardest method.prune_ratio=0.3
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayprune import EpochContext, Method, Schedule, ScoreTable, Selection


@dataclass(frozen=True)
class KeepHardest(Method):
    """Prune the share `prune_ratio` of samples with the lowest loss; keep samples without a loss.

    Args:
        prune_ratio: a number in [0, 1) or a schedule.
    """

    kind = "dynamic"
    paper = "an example"
    signals = ("loss",)  # reported by the workers; the table has a column of the same name

    prune_ratio: float | Schedule = 0.5

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep the N − floor(r·N) highest losses; break ties by id."""
        ratio = Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        loss = np.where(table.visited, table["loss"], np.inf)
        drops = min(int(ratio * context.num_samples), int(np.count_nonzero(table.visited)))
        kept = np.argsort(loss, kind="stable")[drops:]
        return Selection.of_ids(kept, context.num_samples, requested=ratio if drops else 0.0, expected_drops=drops)
