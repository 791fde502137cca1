"""Moderate: keep the samples at a median distance from the center of their class.

Xia et al., "Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient Deep Learning", ICLR
2023. With h the last layer's inputs in a forward-only pass after T epochs and c_y the center of the class, the score is
‖h − c_y‖₂. Kept are the samples around the median of all scores in sorted order. (The port in D2's program drops these
and keeps the extremes.)

The center is the median of each coordinate, as in the authors' program; `mean` is the other usual one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Center, Points, class_center, rows_by_label
from rayprune.core.bases.embeddings import EmbeddingMethod
from rayprune.core.bases.static import ScoredMethod
from rayprune.core.method import EpochContext
from rayprune.core.table import ScoreTable
from rayprune.methods.registry import register


@register("moderate")
@dataclass(frozen=True)
class Moderate(EmbeddingMethod, ScoredMethod):
    """Keep the samples whose distance to their class center is around the median.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        center: the center of a class: the median of each coordinate, or the mean.
    """

    keeps = "a median distance from its class"
    paper = "Xia et al., ICLR 2023 (Moderate)"
    needs_labels = True
    keep = "middle"
    score_name = "class_distance"
    condensed = ("class_distance",)

    center: Center = "median"

    def condense_embeddings(
        self, embeddings: NDArray[Any], table: ScoreTable, context: EpochContext
    ) -> dict[str, NDArray[Any]]:
        """Return the Euclidean distance of each sample to the center of its class."""
        assert context.labels is not None
        distances = np.empty(len(table), dtype=np.float32)
        for rows in rows_by_label(context.labels):
            distances[rows] = Points(embeddings, rows).distances_to(class_center(embeddings, rows, self.center))
        return {"class_distance": distances}

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the distance, (N,) float32."""
        return table["class_distance"]
