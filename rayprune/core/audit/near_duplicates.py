"""A method that condenses embeddings to near-duplicates and outliers, for audits of data; it is not registered.

Shapes: N samples, d numbers of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, Standardized
from rayprune.core.algorithms.near_duplicates import duplicates_of
from rayprune.core.algorithms.outliers import knn_distance, robust_z
from rayprune.core.bases.embeddings import EmbeddingMethod
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable
from rayprune.errors import ConfigError

# The largest distance of near-duplicates, for vectors whose lengths are about 1. That of images is measured (see
# `rayprune.nn.descriptors`). Rows of numbers are equal but for rounding. Of texts, 9 of 10 words and word pairs agree.
RADIUS = {"image": 0.2, "features": 1e-3, "text": 0.45}
# Images of one data set may all be alike. In CIFAR-10, 0.2 is this share of the median distance to the 10th neighbor.
_RELATIVE = 0.26


def settings_of(kind: str, num_train: int, radius: float | None = None) -> dict[str, Any]:
    """Return the hyperparameters of NearDuplicates for samples of a kind, a key of RADIUS."""
    return {
        "radius": RADIUS[kind] if radius is None else radius,
        "num_train": num_train,
        "standardize": kind == "features",
        "relative": _RELATIVE if kind == "image" else None,
        "storage": "float32" if kind == "features" else "float16",
    }


@dataclass(frozen=True)
class NearDuplicates(EmbeddingMethod):
    """Find near-duplicates and outliers; as a selection, drop near-duplicates first, and then the highest ids.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        radius: τ, the largest distance of near-duplicates.
        num_train: how many samples, from the first on, are training samples; the others validate. null for all.
        standardize: give each number of the embeddings the same variance, as for features; else embeddings are divided
            by their lengths.
        relative: τ is at most this share of the median distance to the k-th nearest sample, so that data that are all
            alike, such as digits, are not all duplicates; null for no such bound.
        neighbor: k of the distance to the k-th nearest sample, by which outliers are measured.
    """

    keeps = "one of each group of near-duplicates"
    paper = "ours: an exact search"

    prune_ratio: float | Any = 0.0
    radius: float = 0.2
    num_train: int | None = None
    standardize: bool = False
    relative: float | None = None
    neighbor: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radius >= 0:
            raise ConfigError(f"radius {self.radius} must be at least 0")
        if self.relative is not None and not self.relative > 0:
            raise ConfigError(f"relative {self.relative} must be above 0, or null")
        if self.neighbor < 1:
            raise ConfigError(f"neighbor {self.neighbor} must be at least 1")

    @property
    def collect_epochs(self) -> int:
        """One pass."""
        return 1

    def columns(self) -> Mapping[str, Any]:
        """Return the columns of the pass, and duplicate_of, duplicate_split, duplicate_similarity and outlier."""
        integers = {"duplicate_of": np.int64, "duplicate_split": np.int8}
        return {**super().columns(), **integers, "duplicate_similarity": np.float32, "outlier": np.float32}

    def condense_embeddings(
        self, embeddings: NDArray[Any], table: ScoreTable, context: EpochContext
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of `Duplicates`, and the outlier score, a robust z-score in the sample's class."""
        points = Standardized(embeddings) if self.standardize else Points(embeddings, unit=True)
        num_train = len(points) if self.num_train is None else self.num_train
        distances = knn_distance(points, self.neighbor, seed=context.seed)
        bound = math.inf if self.relative is None else self.relative * float(np.nanmedian(distances))
        found = duplicates_of(points, num_train, min(self.radius, bound))
        return {
            "duplicate_of": found.of,
            "duplicate_split": found.split,
            "duplicate_similarity": found.similarity,
            "outlier": robust_z(distances, context.labels),
        }

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Keep samples that are no duplicate of a kept one, as far as the number allows."""
        order = np.argsort(table["duplicate_of"] >= 0, kind="stable")
        return np.sort(order[:count]), None, {}
