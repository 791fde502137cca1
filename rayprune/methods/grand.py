"""GraNd: keep the samples with the largest gradients early in training.

Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS 2021,
arXiv 2107.07075. The score is the norm of the last layer's gradient, ‖p − onehot(y)‖₂·sqrt(1 + ‖h‖₂²) with the layer's
inputs h and its bias, in a forward-only pass of the network after T epochs. The paper takes the gradient of all weights
and averages ten networks; the last layer's is the usual approximation, which one forward pass gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("grand")
@dataclass(frozen=True)
class GraNd(ScoredMethod):
    """Keep the samples with the largest last-layer gradients after T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
    """

    keeps = "the largest last-layer gradients after T epochs"
    paper = "Paul et al., NeurIPS 2021, arXiv 2107.07075"
    sweep_signals = ("grand",)

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the norm of the last layer's gradient, (N,) float32."""
        return table["grand"]
