"""AUM, the area under the margin: keep the samples with the smallest margins over training.

Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020, arXiv 2001.10528.
The score is the mean over T epochs of z_y − max_{c≠y} z_c at the sample's visit, with the label y. The paper's z are
logits; the default here are probabilities, as in the programs of CCS (arXiv 2210.15809) and of pruning papers since,
which sum where this takes the mean. The paper finds mislabeled samples by the lowest AUM. Used for pruning, the lowest
are also the hardest, and are kept: drop_hardest leaves out those that are probably mislabeled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayprune.core.bases.visits import MeanMethod
from rayprune.methods.registry import register


@register("aum")
@dataclass(frozen=True)
class AUM(MeanMethod):
    """Keep the samples with the lowest mean margin in the first T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        margin_of: the margin of probabilities (`probs`) or of `logits`.
    """

    keeps = "the smallest margins over training"
    paper = "Pleiss et al., NeurIPS 2020, arXiv 2001.10528"
    signals = ("margin",)
    keep = "bottom"

    margin_of: Literal["probs", "logits"] = "probs"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "signals", ("margin",) if self.margin_of == "probs" else ("logit_margin",))
