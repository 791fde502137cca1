"""Train on all samples: the baseline of every saving."""

from __future__ import annotations

from dataclasses import dataclass

from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Keep every sample with weight 1 in every epoch; record the loss, so that a full run has scores too."""

    kind = "baseline"
    keeps = "all samples"
    paper = "no selection"
    signals = ("loss",)
    unbiased = True
    fixed = True

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        return Selection.full(context.num_samples)
