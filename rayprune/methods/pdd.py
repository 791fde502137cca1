"""PDD: progressive data dropout: train less and less, and on all samples at the end.

Shriram M S et al., "Progressive Data Dropout: An Embarrassingly Simple Approach to Faster Training", NeurIPS 2025,
arXiv 2505.22342. Three variants: DBPD keeps the samples with p_y < τ = 0.3, the label's probability (τ = 0: the
misclassified ones); SRD keeps ceil(γ^e·N) random ones in epoch e, with γ = 0.99; SMRD keeps as many random samples as
DBPD would. The last epoch, 29 of 30 from 0, is full. Weights are 1: biased.

The original decides in every batch after forwarding it, so it forwards all samples in every epoch, and kept ones twice,
in train mode; its "effective epochs" count backward passes only. Ours is the same rule once per epoch: p_y is that of
the sample's last visit, and with `rescore` the dropped samples of DBPD and SMRD are scored again after the epoch, by a
forward pass in eval mode, which counts in `compute`. Batch sizes stay whole. Also ours: epoch 0 is full, as no sample
has a p_y; where no sample is below τ, the one with the lowest p_y is used; the last 1/30 of a longer run is full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rayprune.core.bases.dynamic import DynamicMethod, drop_mastered
from rayprune.core.choosing import num_pruned
from rayprune.core.draws import draw_uniform
from rayprune.core.method import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("pdd")
@dataclass(frozen=True)
class PDD(DynamicMethod):
    """Drop the samples that the network predicts well, or ever more at random.

    Args:
        variant: `dbpd` keeps the samples of low p_y, `srd` a random share γ^e, `smrd` as many random ones as dbpd.
        threshold: τ in [0, 1], for dbpd and smrd; samples with p_y of at least τ are dropped; 0 drops those that are
            predicted correctly.
        gamma: γ in (0, 1], for srd.
        rescore: score dropped samples of dbpd and smrd again after each epoch; without it, dbpd does not keep a dropped
            sample again before the full epochs.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "those still predicted poorly"
    paper = "Shriram M S et al., NeurIPS 2025, arXiv 2505.22342"

    variant: Literal["dbpd", "srd", "smrd"] = "dbpd"
    threshold: float = 0.3
    gamma: float = 0.99
    rescore: bool = True
    anneal_start: float = 29 / 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("threshold", self.threshold)
        if not 0.0 < self.gamma <= 1.0:
            raise ConfigError(f"gamma {self.gamma!r} is outside (0, 1]: 1 keeps all samples")
        score = "correct" if self.threshold == 0.0 else "prob_label"
        object.__setattr__(self, "signals", ("loss",) if self.variant == "srd" else (score,))

    @property
    def cost(self) -> str:
        """The re-scoring."""
        return "forward passes over the dropped samples" if self.rescore and self.variant != "srd" else ""

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Apply the variant."""
        everyone = np.ones(context.num_samples, dtype=bool)
        if self.variant == "srd":
            drops = min(num_pruned(1.0 - self.gamma**context.epoch, everyone.size), everyone.size - 1)
            kept = draw_uniform(everyone, everyone.size - drops, context.rng)
            return Selection.of_mask(kept, drops / everyone.size, drops)
        # A sample without a score is never dropped: comparisons with NaN are False.
        known = table[self.signals[0]]
        selection = drop_mastered(~(known >= np.float32(self.threshold or 1.0)), -known)
        if self.variant == "smrd":
            kept = draw_uniform(everyone, selection.num_kept, context.rng)
            selection = Selection.of_mask(kept, selection.requested, selection.expected_drops)
        if not self.rescore:
            return selection
        return replace(selection, forward_only_ids=self.rescored(selection.codes == 0, context))
