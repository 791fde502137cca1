"""S2L: cluster the losses of all samples over training, and keep about as many samples of each cluster.

Yang, Mishra, Chiang, Mirzasoleiman, "SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models
by Summarizing Training Trajectories of Small Models", NeurIPS 2024, arXiv 2403.07384. The loss trajectory of sample i
is (l_i1, …, l_iT), its losses at T points of the training of a small model. k-means divides the trajectories into K
clusters. From the smallest cluster to the largest, with the budget B left and k clusters left, this one included, a
cluster gives min(|C|, B/k) samples, drawn uniformly without replacement; what a small cluster lacks, the larger ones
make up for. The large model trains on them. Samples with similar trajectories have similar gradients, so that the
subset has samples of every kind, rare ones included.

The small model is the one of the scoring run: set `collect.model`, or make the scoring run apart and train on the file
that it writes (`rayprune score`, method `fixed`). The paper has K = 100, and Pythia-70M as the small model.

Deliberate deviations: l_it is the loss of the training visit in epoch t, before that step's update, and not that of an
extra pass over all samples at a checkpoint, so that the trajectories cost nothing beside the training. B/k is rounded
down, and so the largest clusters get the remainder. Ours: k-means is fitted on at most 256 samples per cluster.

Shapes: N samples, B observed, T scoring epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, assign, k_means, rows_by_label
from rayprune.core.bases.static import StaticMethod, check_equal
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("s2l")
@dataclass(frozen=True)
class S2L(StaticMethod):
    """Keep about as many samples of each cluster of loss trajectories.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run, and the length of a trajectory.
        clusters: K ≥ 1, the number of clusters; at most N.
    """

    keeps = "as many of each course of the loss"
    paper = "Yang et al., NeurIPS 2024, arXiv 2403.07384 (S2L)"
    every_visit = True
    selection_fields = ("prune_ratio", "class_floor", "clusters")

    score_epochs: int = 10
    clusters: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 1:
            raise ConfigError(f"clusters {self.clusters} must be at least 1")

    @property
    def collect_epochs(self) -> int:
        """T."""
        return self.score_epochs

    def columns(self) -> Mapping[str, Any]:
        """Return the trajectories, (N, T) float32; NaN from the current epoch on."""
        return {"losses": ("float32", (self.score_epochs,))}

    def _check_repeats(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        check_equal(ids, signals["loss"].astype(np.float32), table["losses"][ids, epoch], "loss", epoch)

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Store this epoch's losses, (B,)."""
        table["losses"][ids, epoch] = signals["loss"]

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the mean of each trajectory so far, (N,) float32, for people: S2L itself has no score."""
        losses, visits = table["losses"], np.count_nonzero(~np.isnan(table["losses"]), axis=1)
        sums = np.where(visits > 0, np.nansum(losses, axis=1, dtype=np.float64), np.nan)
        return {"mean_loss": (sums / np.maximum(visits, 1)).astype(np.float32)}

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Draw from every cluster, the smallest first."""
        points, rng = Points(table["losses"]), context.rng_of(self.collect_epochs)
        clusters = list(rows_by_label(assign(points, k_means(points, self.clusters, rng))[0]))
        clusters.sort(key=len)  # stable: among equal ones the lower cluster comes first
        return draw_evenly(clusters, count, rng), None, {"clusters": len(clusters)}


def draw_evenly(clusters: list[Ids], count: int, rng: np.random.Generator) -> Ids:
    """Draw samples of each cluster in turn: an equal part of what is left, or all of a cluster that has no more.

    Args:
        clusters: the ids of each, (n,) int64, from the smallest to the largest.
        count: M, at most the ids of all.
        rng: of the draws.

    Returns:
        (M,) int64, not sorted.

    >>> clusters = [np.array([7]), np.array([1, 3, 5]), np.array([0, 2, 4, 6])]
    >>> ids = draw_evenly(clusters, 6, np.random.default_rng(0))
    >>> [np.isin(cluster, ids).sum().item() for cluster in clusters]
    [1, 2, 3]
    """
    drawn: list[Ids] = []
    for number, ids in enumerate(clusters):
        quota = min(ids.size, count // (len(clusters) - number))
        drawn.append(rng.choice(ids, quota, replace=False))
        count -= quota
    return np.concatenate(drawn)
