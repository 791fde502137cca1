"""Dyn-Unc: keep the samples whose predictions are most uncertain over training.

He et al., "Large-scale Dataset Pruning with Dynamic Uncertainty", CVPR Workshops 2024, arXiv 2306.05175. With p_t the
label's probability at a sample's visit in epoch t, and windows of J epochs, k … k+J−1:
    U_k = std(p_k, …, p_{k+J−1}), with J−1 in the denominator; the score is the mean of U_k over all T−J+1 windows.
The paper scores a whole training; the default T = 30 is ours, that of DUAL.

Deliberate deviations: the last window counts (a known program drops it), and there is no factor 10 (that of DUAL's
program).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.visits import WindowMethod
from rayprune.methods.registry import register


@register("dyn_unc")
@dataclass(frozen=True)
class DynUnc(WindowMethod):
    """Keep the samples whose label's probability varies most within J epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T, the number of epochs of the scoring run.
        window_size: J, the number of epochs in a window, in [2, T].
    """

    keeps = "the most uncertain over training"
    paper = "He et al., CVPR Workshops 2024, arXiv 2306.05175"

    def window_score(self, std: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return U_k."""
        return std
