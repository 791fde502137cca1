"""Evolved sampling: train on rows of every batch that are drawn by their losses and the trends of their losses.

Cheng, Li, Bian, "Data-Efficient Training by Evolved Sampling", 2025, arXiv 2509.23461 (ES; with pruning, ESWP). Every
sample has a moving average s of its losses, 1/N before its first visit. With the current loss l, its weight is
w = β1·s + (1 − β1)·l, and then s ← β2·s + (1 − β2)·l. M rows of the batch are drawn with probability ∝ w. All batches
are whole in a first and a last part of training. ESWP also leaves out a share of all samples in each epoch between
them, drawn by their last w.

Where s is: each rank keeps s of all samples, 4 bytes each, and all ranks make the same updates, because they all have
the signals of the whole batch. It is in every checkpoint. The score table holds s and w, too, from the same losses.
A sample has one visit in an epoch, so both are exact, not of an older epoch.

Ours: the shares (a quarter of a batch; the first and last 5 % of training are whole); draws are without replacement,
and weights 1; candidates are scored in eval mode, and losses of whole batches are those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import num_pruned
from rayprune.core.in_batch import (
    BatchContext,
    InBatchMethod,
    Picked,
    StepContext,
    check_keep,
    check_window,
    draw,
    num_picked,
)
from rayprune.core.method import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_ratio, check_share
from rayprune.methods.registry import register


@register("es")
@dataclass(frozen=True)
class EvolvedSampling(InBatchMethod):
    """Train on rows of every batch that are drawn by their loss and the moving average of their earlier losses.

    Args:
        keep: the share of a batch to train on, in (0, 1].
        beta1: β1 in [0, 1], how much the earlier losses count in the weight.
        beta2: β2 in [0, 1], the momentum of the moving average.
        start: the share of training, in [0, 1], from which on batches are thinned.
        end: the share of training from which on they are whole again.
        prune_ratio: the share of all samples that each epoch between them leaves out, in [0, 1) (ESWP); 0 for ES.
    """

    keeps = "drawn in every batch, by loss and its trend"
    paper = "Cheng, Li, Bian, 2025, arXiv 2509.23461 (ES, ESWP)"

    keep: float = 0.25
    beta1: float = 0.2
    beta2: float = 0.9
    start: float = 0.05
    end: float = 0.95
    prune_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_share("beta1", self.beta1)
        check_share("beta2", self.beta2)
        check_window(self.start, self.end)
        check_ratio("prune_ratio", self.prune_ratio)

    def columns(self) -> Mapping[str, Any]:
        return dict.fromkeys(("loss", "average", "weight"), np.float32)

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Mask a visit that was folded already: it must not count twice in the average."""
        fresh: NDArray[np.bool_] = table.last_visit[ids] != epoch
        return fresh

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Store the loss, s and w."""
        averages = table["average"][ids]
        averages = np.where(np.isnan(averages), np.float32(1.0 / len(table)), averages)
        table["loss"][ids] = signals["loss"]
        table["weight"][ids] = self.weights(averages, signals["loss"])
        table["average"][ids] = self.averages(averages, signals["loss"])

    def weights(self, averages: NDArray[Any], losses: NDArray[Any]) -> NDArray[np.float64]:
        """Return w of rows with these averages and current losses."""
        weights: NDArray[np.float64] = self.beta1 * averages.astype(np.float64) + (1.0 - self.beta1) * losses
        return weights

    def averages(self, averages: NDArray[Any], losses: NDArray[Any]) -> NDArray[np.float64]:
        """Return s after a visit with these losses."""
        updated: NDArray[np.float64] = self.beta2 * averages.astype(np.float64) + (1.0 - self.beta2) * losses
        return updated

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples; with a prune ratio, leave out a share in the epochs that begin inside the window."""
        drops = num_pruned(self.prune_ratio, context.num_samples)
        if not drops or not self.start <= context.epoch / context.num_epochs < self.end or not table.visited.any():
            return Selection.full(context.num_samples)
        # A sample that was never visited counts as much as the one with the highest weight.
        weights = np.nan_to_num(table["weight"], nan=float(np.nanmax(table["weight"])))
        ids = draw(weights, context.num_samples - drops, context.rng)
        return Selection.of_ids(ids, context.num_samples, requested=self.prune_ratio, expected_drops=drops)

    def picks(self, context: StepContext) -> bool:
        return self.start <= context.progress < self.end

    def state_columns(self, num_samples: int) -> Mapping[str, float]:
        return {"average": 1.0 / num_samples}

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        weights = self.weights(context.columns["average"], signals["loss"])
        return draw(weights, num_picked(self.keep, context.num_rows), context.rng), None

    def update(self, signals: Signals, context: BatchContext) -> Mapping[str, NDArray[Any]]:
        return {"average": self.averages(context.columns["average"], signals["loss"])}
