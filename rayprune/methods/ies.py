"""IES: instance-dependent early stopping: leave out samples whose loss has stopped bending.

Yuan, Lin, Feng, Han, Liu, "Instance-dependent Early Stopping", ICLR 2025, arXiv 2502.07547. A sample is mastered, and
dropped, while the mean of its last three |l_t − 2·l_{t−1} + l_{t−2}| is below a threshold: 1e-3 for CIFAR-10, 2e-3 for
CIFAR-100; 1e-5 to 1e-1 is the recommended range. As the reference program waits for four second differences, the rule
needs six losses. Dropped samples are scored again after every epoch by a forward pass, and can return. Weights are 1.

The losses of trained samples come from train mode with augmentation, those of dropped samples from eval mode: when a
sample is dropped or returns, part of its second difference is that change of mode.

Deliberate deviations from the reference program: where no sample is mastered any more, all are used (there, the last
exclusion stays in force); where all are mastered, the one with the largest mean is used. Ours: an optional annealing
phase; no forward pass where no later epoch reads it; a visit without a finite loss does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import DynamicMethod, drop_mastered
from rayprune.core.method import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals, chunks
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_NUM_LOSSES = 6
_NUM_DIFFERENCES = 3


@register("ies")
@dataclass(frozen=True)
class IES(DynamicMethod):
    """Drop the samples whose losses have second differences close to 0.

    Args:
        threshold: the mean of the last three absolute second differences of the loss below which a sample is dropped;
            above 0.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "those whose loss still bends"
    paper = "Yuan et al., ICLR 2025, arXiv 2502.07547"
    folds_once = True

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0.0:
            raise ConfigError(f"threshold {self.threshold!r} must be above 0: 1e-5 to 1e-1 is recommended")

    def columns(self) -> dict[str, Any]:
        """Return the column of the last six losses, oldest first."""
        return {"losses": (np.float32, (_NUM_LOSSES,))}

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Append the loss."""
        losses = np.asarray(signals["loss"], dtype=np.float32)
        table["losses"][ids] = np.concatenate([table["losses"][ids, 1:], losses[:, None]], axis=1)

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the mean second difference; NaN before the sixth loss."""
        losses, means = table["losses"], np.full(len(table), np.nan, dtype=np.float32)
        for rows in chunks(len(table), _NUM_LOSSES):
            bends = np.abs(np.diff(losses[rows].astype(np.float64), n=2, axis=1))
            means[rows] = np.minimum(bends[:, -_NUM_DIFFERENCES:].mean(axis=1), np.finfo(np.float32).max)
            means[rows][np.isnan(losses[rows, 0])] = np.nan
        return {"second_difference": means}

    @property
    def cost(self) -> str:
        """The re-scoring."""
        return "forward passes over the dropped samples"

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Drop the mastered samples, and score them again after the epoch."""
        means = self.scores(table)["second_difference"]
        selection = drop_mastered(~(means < self.threshold), means)
        return replace(selection, forward_only_ids=self.rescored(selection.codes == 0, context))
