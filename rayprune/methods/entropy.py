"""Entropy: keep the samples whose predictions have the highest entropy.

Coleman et al., "Selection via Proxy: Efficient Data Selection for Deep Learning", ICLR 2020, arXiv 1906.11829. The
score is H = −Σ_c p_c ln p_c with 0 ln 0 = 0, in a forward-only pass of the network after T epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("entropy")
@dataclass(frozen=True)
class Entropy(ScoredMethod):
    """Keep the samples with the highest entropy of the prediction after T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
    """

    keeps = "the highest entropy after T epochs"
    paper = "Coleman et al., ICLR 2020, arXiv 1906.11829"
    sweep_signals = ("entropy",)

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the entropy in nats, (N,) float32."""
        return table["entropy"]
