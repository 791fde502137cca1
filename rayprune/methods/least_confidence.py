"""Uncertainty sampling: keep the samples whose predictions are least confident.

The score is 1 − max_c p_c (Coleman et al., "Selection via Proxy: Efficient Data Selection for Deep Learning", ICLR
2020, arXiv 1906.11829), here from the last training visit in the scoring run. It is the simplest subset that uses
scores, so `rayprune compare` trains on it as a baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import choose, num_pruned
from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("least_confidence")
@dataclass(frozen=True)
class LeastConfidence(Method):
    """Keep the samples with the lowest top probability in the last of the first T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
    """

    kind = "static"
    keeps = "the least confident after T epochs"
    paper = "Coleman et al., ICLR 2020, arXiv 1906.11829"
    signals = ("confidence",)
    fixed = True
    selection_fields = ("prune_ratio", "class_floor")

    prune_ratio: float | Any = 0.5  # Any: __post_init__ refuses a schedule with its own message
    score_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_ratio(self.prune_ratio)
        if self.score_epochs < 1:
            raise ConfigError(f"score_epochs {self.score_epochs!r} must be at least 1")

    @property
    def collect_epochs(self) -> int:
        """T."""
        return self.score_epochs

    def check(self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, Any], epoch: int) -> Any:
        """Mask visits after the scoring run, which must not change the subset."""
        return np.full(ids.size, epoch < self.score_epochs)

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return `least_confidence`, 1 − max p, (N,) float32; NaN for samples that were never visited."""
        return {"least_confidence": 1.0 - table["confidence"]}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples for T epochs, then the N − floor(r·N) highest scores; among equal ones, the lower ids.

        Raises:
            ConfigError: the run is shorter than T epochs, or a sample was not visited in the last of them.
        """
        self._check_scored("score_epochs", table.last_visit, context)
        if context.epoch < self.score_epochs:
            return Selection.full(context.num_samples)
        scores, num = self.scores(table)["least_confidence"], context.num_samples
        drops = min(num_pruned(self.prune_ratio, num), num - 1)
        ids = choose(scores, num - drops).ids
        selection = Selection.of_ids(ids, num, requested=self.prune_ratio, expected_drops=drops)
        return selection.with_facts(score="least_confidence", threshold=float(scores[ids].min()))
