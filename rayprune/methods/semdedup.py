"""SemDeDup: drop samples whose embeddings nearly equal that of another kept sample's.

Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", 2023, arXiv 2303.09540.
With h the last layer's inputs in a forward-only pass after T epochs, divided by their lengths, k-means forms clusters.
In each, the samples are ordered by their distance to its center, and
    M_j = max over all i before j of cos(h_i, h_j), at least 0; 0 for the first of a cluster
is the score. As in the authors' program, i goes over all samples before j, dropped ones too, so that of a chain of
near-duplicates only the first remains. The paper drops M_j > 1 − ε with an ε that leaves the wanted number of samples;
here prune_ratio is that number, and the lowest M_j are kept.

Ours: the number of clusters is √N by default (there: 50,000 for 440 million samples); k-means is fitted on at most 256
samples per cluster; in a cluster of more than 65,536 samples each is compared with the 65,536 before it; a vector of
zeros has cosine 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, assign, k_means, largest_cosines_before, rows_by_label
from rayprune.core.bases.embeddings import EmbeddingMethod
from rayprune.core.bases.static import ScoredMethod
from rayprune.core.method import EpochContext
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("semdedup")
@dataclass(frozen=True)
class SemDeDup(EmbeddingMethod, ScoredMethod):
    """Keep the samples that are least similar to those before them in their cluster.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        clusters: number of clusters; null is √N.
        first: which of near-duplicates comes first and is kept: `hard`, the farthest from the cluster's center,
            `easy`, the nearest, or a `random` one.
    """

    keeps = "one of each group of near-duplicates"
    paper = "Abbas et al., 2023, arXiv 2303.09540"
    keep = "bottom"
    score_name = "semdedup"
    condensed = ("duplicate",)

    clusters: int | None = None
    first: Literal["hard", "easy", "random"] = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"clusters {self.clusters} must be at least 1, or null")

    def condense_embeddings(
        self, embeddings: NDArray[Any], table: ScoreTable, context: EpochContext
    ) -> dict[str, NDArray[Any]]:
        """Return M, the largest cosine with a sample before it in the cluster."""
        points, rng = Points(embeddings, unit=True), self.draw(context)
        centers = k_means(points, self.clusters or round(math.sqrt(len(points))), rng)
        clusters, distances = assign(points, centers)
        if self.first == "random":
            distances = rng.random(len(points), dtype=np.float32)
        largest = np.empty(len(points), dtype=np.float32)
        for rows in rows_by_label(clusters):
            ordered = rows[np.argsort(distances[rows] * (-1 if self.first == "hard" else 1), kind="stable")]
            largest[ordered] = largest_cosines_before(points, ordered)
        return {"duplicate": largest}

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return M, (N,) float32 in [0, 1]."""
        return table["duplicate"]
