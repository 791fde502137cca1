"""KAKURENBO: hide well-learned samples for an epoch, and check them by a forward pass.

Nguyen et al., "KAKURENBO: Adaptively Hiding Samples in Deep Neural Network Training", NeurIPS 2023, arXiv 2310.10102.
The floor(F_e·N) samples with the lowest losses are candidates; a candidate is hidden if its last prediction was correct
with a largest probability of at least τ = 0.7, otherwise it moves back. F_e is F = 0.3 times 1, 0.8, 0.6 and 0.4 from
epochs 0, 30, 60 and 80 of 90 on, which is the default (CIFAR: 0, 60, 120 and 160 of 200, milestones 0.3, 0.6 and 0.8).
Hidden samples are scored again after the epoch, by a forward pass in eval mode. The learning rate is multiplied by
1/(1 − F_e), with the scheduled F_e, not with the share that is really hidden. Weights are 1.

Deliberate deviations from the reference program: probabilities sum to 1 over the classes (there, over the batch), and
the forward pass is in eval mode (there, in train mode); epoch 0 hides nothing and keeps its learning rate (there, it is
already scaled); samples without a loss are never candidates; among equal losses the higher ids are candidates first.
Ours: an optional annealing phase; no forward pass where no later epoch reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayprune.core.bases.dynamic import DynamicMethod
from rayprune.core.choosing import num_pruned
from rayprune.core.draws import highest
from rayprune.core.method import EpochContext
from rayprune.core.schedule import Schedule, epoch_at
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("kakurenbo")
@dataclass(frozen=True)
class Kakurenbo(DynamicMethod):
    """Hide the samples of low loss that are predicted correctly and with confidence.

    Args:
        prune_ratio: F, the largest share of all samples to hide; a number in [0, 1) or a schedule.
        milestones: ascending shares of the run, from each of which on F is multiplied by the factor beside it.
        factors: one factor in [0, 1] for each milestone; empty, with empty milestones, for F as it is.
        min_confidence: τ in [0, 1]; a less confident prediction moves a sample back.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "all but low losses predicted well"
    paper = "Nguyen et al., NeurIPS 2023, arXiv 2310.10102"
    signals = ("loss", "correct", "confidence")

    prune_ratio: float | Schedule = 0.3
    milestones: tuple[float, ...] = (1 / 3, 2 / 3, 8 / 9)
    factors: tuple[float, ...] = (0.8, 0.6, 0.4)
    min_confidence: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")
        check_share("min_confidence", self.min_confidence)
        if len(self.milestones) != len(self.factors) or list(self.milestones) != sorted(set(self.milestones)):
            raise ConfigError(f"milestones {self.milestones} must ascend, with one factor each, got {self.factors}")
        for name, values in (("milestone", self.milestones), ("factor", self.factors)):
            for value in values:
                check_share(name, value)

    def columns(self) -> dict[str, Any]:
        """Return the columns; 8 bits say whether the prediction was correct, 0 before the first visit."""
        return {"loss": np.float32, "correct": np.int8, "confidence": np.float32}

    def fraction(self, context: EpochContext) -> float:
        """Return F_e."""
        reached = sum(context.epoch >= epoch_at(share, context.num_epochs) for share in self.milestones)
        factor = (1.0, *self.factors)[reached]
        return Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs) * factor

    @property
    def cost(self) -> str:
        """The re-scoring."""
        return "forward passes over the hidden samples"

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Hide the candidates that pass, and score them again after the epoch."""
        fraction, num = self.fraction(context), context.num_samples
        hidden = ~highest(table["loss"], num - num_pruned(fraction, num)) & ~np.isnan(table["loss"])
        num_candidates = int(np.count_nonzero(hidden))
        hidden &= (table["correct"] == 1) & (table["confidence"] >= np.float32(self.min_confidence))
        selection = Selection.of_mask(~hidden, fraction, int(np.count_nonzero(hidden)))
        again = self.rescored(hidden, context)
        scaled = replace(selection, forward_only_ids=again, lr_scale=1.0 / (1.0 - fraction))
        return scaled.with_facts(candidates=num_candidates)
