"""SSP, self-supervised prototypes: keep the samples far from every cluster center.

Sorscher et al., "Beyond neural scaling laws: beating power law scaling via data pruning", NeurIPS 2022, arXiv
2206.14486. With h the last layer's inputs in a forward-only pass after T epochs, divided by their lengths, k-means
forms clusters, and the score is 1 − cos(h, nearest center). The farthest samples are kept, which is right if data is
plentiful; if it is scarce, keep the nearest (rule=bottom).

The paper embeds with SwAV, here the scored network does, so the scores are self-supervised only if its training is. It
takes as many clusters as classes and finds that any number within a factor of ten does. Ours: √N clusters by default,
as labels are not needed otherwise; k-means is fitted on at most 256 samples per cluster. The paper keeps at least half
as many samples of every class as proportional pruning would on ImageNet: class_share=0.5, which needs labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, cosine_distances, k_means, rows_by_label
from rayprune.core.bases.embeddings import EmbeddingMethod
from rayprune.core.bases.static import ScoredMethod
from rayprune.core.choosing import choose
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("ssp")
@dataclass(frozen=True)
class SSP(EmbeddingMethod, ScoredMethod):
    """Keep the samples with the lowest cosine to the nearest cluster center.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        clusters: number of clusters; null is √N.
        class_share: keep at least this share, in [0, 1], of what proportional pruning would keep of each class; it
            goes with the rules top and bottom over all samples.
    """

    keeps = "the farthest from all cluster centers"
    paper = "Sorscher et al., NeurIPS 2022, arXiv 2206.14486"
    score_name = "ssp"
    condensed = ("ssp",)
    selection_fields: ClassVar[tuple[str, ...]] = (*ScoredMethod.selection_fields, "class_share")

    clusters: int | None = None
    class_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"clusters {self.clusters} must be at least 1, or null")
        check_share("class_share", self.class_share)
        if self.class_share and (
            self.balance != "none" or self.drop_hardest or self.rule not in (None, "top", "bottom")
        ):
            raise ConfigError(
                f"class_share {self.class_share} goes with the rules top and bottom, without balance and drop_hardest: "
                "leave one out"
            )
        object.__setattr__(self, "needs_labels", self.needs_labels or self.class_share > 0)

    def condense_embeddings(
        self, embeddings: NDArray[Any], table: ScoreTable, context: EpochContext
    ) -> dict[str, NDArray[Any]]:
        """Return 1 − the cosine to the nearest center."""
        points = Points(embeddings, unit=True)
        centers = k_means(points, self.clusters or round(math.sqrt(len(points))), self.draw(context))
        return {"ssp": cosine_distances(points, centers)}

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return 1 − the cosine, (N,) float32 in [0, 2]."""
        return table["ssp"]

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Choose each class's own share first, then the rest among all other samples."""
        if not self.class_share or context.labels is None:
            return super().subset(table, context, count)
        scores, rule, chosen = self.final_score(table, context), self.rule or "top", np.zeros(len(table), dtype=bool)
        for rows in rows_by_label(context.labels):
            if own := math.floor(self.class_share * count * rows.size / len(table) + 1e-9):
                chosen[rows[choose(scores[rows], own, rule).ids]] = True
        rest = np.flatnonzero(~chosen)
        if missing := count - int(np.count_nonzero(chosen)):
            chosen[rest[choose(scores[rest], missing, rule).ids]] = True
        return np.flatnonzero(chosen), None, {"score": self.score_name}
