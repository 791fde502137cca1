"""Margin sampling: keep the samples whose two largest probabilities are closest.

Coleman et al., "Selection via Proxy: Efficient Data Selection for Deep Learning", ICLR 2020, arXiv 1906.11829. The
score is p_(1) − p_(2), the largest minus the second largest probability, in a forward-only pass of the network after T
epochs. Unlike the margin of `aum`, it does not look at the label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("margin")
@dataclass(frozen=True)
class Margin(ScoredMethod):
    """Keep the samples with the smallest gap between the two largest probabilities after T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
    """

    keeps = "the smallest gap of the two top classes"
    paper = "Coleman et al., ICLR 2020, arXiv 1906.11829"
    sweep_signals = ("top_gap",)
    keep = "bottom"

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return p_(1) − p_(2), (N,) float32 in [0, 1]."""
        return table["top_gap"]
