"""Forgetting events: keep the samples that training unlearns most often.

Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning", ICLR 2019, arXiv
1812.05159. With a_t = 1 if the network classifies the sample correctly at its visit in epoch t, before that batch's
update, and else 0, the score is the number of epochs with a_{t−1} = 1 and a_t = 0 among T. A sample with a_t = 0 in
every epoch has no such event; the authors' program counts T for it, more than the floor(T/2) events that are possible,
so that it is the most forgettable. Programs of other papers, such as that of CCS (arXiv 2210.15809), count 0.

Ours: a visit whose `correct` is a share (of tokens, pixels or labels) is correct from a half on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("forgetting")
@dataclass(frozen=True)
class Forgetting(ScoredMethod):
    """Keep the samples with the most forgetting events in the first T epochs.

    Events are few, so many samples are equal; of those at the threshold the lower ids are kept.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 2, the number of epochs of the scoring run; the paper has 200 for CIFAR-10.
        never_learned: samples that no epoch classified correctly are the `most_forgettable`, as in the paper, or have
            `zero` events.
    """

    keeps = "forgotten most often, or never learned"
    paper = "Toneva et al., ICLR 2019, arXiv 1812.05159"
    signals = ("correct",)
    every_visit = True

    never_learned: Literal["most_forgettable", "zero"] = "most_forgettable"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_epochs < 2:
            raise ConfigError(f"score_epochs {self.score_epochs} has no forgetting events: it must be at least 2")

    def columns(self) -> Mapping[str, Any]:
        """Return the last visit's `correct`, the number of events, and whether any visit was correct."""
        return {"correct": np.float32, "events": np.int32, "learned": np.int8}

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Count an event where the visit before was correct and this one is not."""
        correct_B = signals["correct"] >= 0.5
        table["events"][ids] += (table["correct"][ids] >= 0.5) & ~correct_B
        table["learned"][ids] |= correct_B
        super().fold(table, ids, signals, epoch)

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the number of events, (N,) float32; T for samples that were never learned."""
        never = self.score_epochs if self.never_learned == "most_forgettable" else 0
        scores = np.where(table["learned"] == 0, never, table["events"])
        return np.where(table.visited, scores, np.nan).astype(np.float32)
