"""Evolved sampling: train on rows of every batch that are drawn by their losses and the trends of their losses.

Cheng, Li, Bian, "Data-Efficient Training by Evolved Sampling", arXiv 2509.23461, 2025 (ES; `eswp` prunes the epoch's
set by the same weights). Every sample has a moving average s of its losses, 1/N before its first visit. With the
current loss l, its weight is w = β₁·s + (1 − β₁)·l, and then s ← β₂·s + (1 − β₂)·l; (β₁, β₂) = (0.2, 0.9). M rows of
the batch are drawn with probability ∝ w. All batches are whole in a first and a last part of training.

Where s is: each rank keeps s of all samples, 4 bytes each, and makes the same updates as the others, because it has the
signals of the whole batch. It is in every checkpoint. So s is never that of an older epoch, and nothing is sent.

Ours: the shares (a quarter of a batch; the first and last 5 % of training are whole); draws are without replacement,
and weights 1; candidates are scored in eval mode, and losses of whole batches are those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.in_batch import (
    BatchContext,
    InBatchMethod,
    Picked,
    StepContext,
    check_keep,
    check_window,
    num_picked,
)
from rayprune.core.draws import draw_weighted
from rayprune.core.table import Signals
from rayprune.core.validation import check_share
from rayprune.methods.registry import register


@register("es")
@dataclass(frozen=True)
class EvolvedSampling(InBatchMethod):
    """Train on rows of every batch that are drawn by their loss and the moving average of their earlier losses.

    Args:
        keep: the share of a batch to train on, in (0, 1].
        beta1: β₁ in [0, 1], how much the earlier losses count in the weight.
        beta2: β₂ in [0, 1], the momentum of the moving average.
        start: the share of training, in [0, 1], from which on batches are thinned.
        end: the share of training from which on they are whole again.
    """

    keeps = "drawn in every batch, by loss and its trend"
    paper = "Cheng et al., 2025, arXiv 2509.23461 (ES)"

    keep: float = 0.25
    beta1: float = 0.2
    beta2: float = 0.9
    start: float = 0.05
    end: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_share("beta1", self.beta1)
        check_share("beta2", self.beta2)
        check_window(self.start, self.end)

    def weights(self, averages: NDArray[Any], losses: NDArray[Any]) -> NDArray[np.float64]:
        """Return w of rows with these averages and current losses."""
        weights: NDArray[np.float64] = self.beta1 * averages.astype(np.float64) + (1.0 - self.beta1) * losses
        return weights

    def averages(self, averages: NDArray[Any], losses: NDArray[Any]) -> NDArray[np.float64]:
        """Return s after a visit with these losses."""
        updated: NDArray[np.float64] = self.beta2 * averages.astype(np.float64) + (1.0 - self.beta2) * losses
        return updated

    def picks(self, context: StepContext) -> bool:
        return self.start <= context.progress < self.end

    def state_columns(self, num_samples: int) -> Mapping[str, float]:
        return {"average": 1.0 / num_samples}

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        weights = self.weights(context.columns["average"], signals["loss"])
        return np.flatnonzero(draw_weighted(weights, num_picked(self.keep, context.num_rows), context.rng)), None

    def update(self, signals: Signals, context: BatchContext) -> Mapping[str, NDArray[Any]]:
        return {"average": self.averages(context.columns["average"], signals["loss"])}
