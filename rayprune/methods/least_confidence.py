"""Least confidence: keep the samples whose predictions are least confident.

Coleman et al., "Selection via Proxy: Efficient Data Selection for Deep Learning", ICLR 2020, arXiv 1906.11829. The
score is 1 − max_c p_c, in a forward-only pass of the network after T epochs. (DeepCore uses the largest logit instead
of the probability, which is another order.) It is the simplest subset that uses scores, so `rayprune compare` trains on
it as a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("least_confidence")
@dataclass(frozen=True)
class LeastConfidence(ScoredMethod):
    """Keep the samples with the lowest top probability after T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
    """

    keeps = "the least confident after T epochs"
    paper = "Coleman et al., ICLR 2020, arXiv 1906.11829"
    sweep_signals = ("confidence",)

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return 1 − max p, (N,) float32."""
        scores: NDArray[Any] = 1.0 - table["confidence"]
        return scores
