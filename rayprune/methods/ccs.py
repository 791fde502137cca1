"""CCS: drop the hardest samples, and keep the same number from every part of the range of scores.

Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023, arXiv 2210.15809. Drop the
floor(β·N) samples of the lowest AUM, which are often mislabeled; cut the range of the others into 50 strata of equal
width; divide the count among the strata, smallest first, in equal shares as far as each has samples; draw uniformly
inside each (`rayprune.core.choosing`). The published β (`drop_hardest`) is 0.3 at prune ratio 0.9 on CIFAR-10, and on
ImageNet 0.2 at 0.8 and 0.3 at 0.9; it was searched for each ratio and data set. The default 0 is ours.

Any other score can be the key: give the method of that score `rule: strata` and `drop_hardest`.

Deliberate deviations from the reference program: the highest score is always in the last stratum (there, one sample of
scores that are all negative is in none), and floor(β·N) is robust to rounding (there, 29 % of 100 is 28).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rayprune.core.choosing import Rule
from rayprune.methods.aum import AUM
from rayprune.methods.registry import register


@register("ccs")
@dataclass(frozen=True)
class CCS(AUM):
    """Keep an even draw from 50 strata of the mean margin in the first T epochs, without the hardest samples.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run; the paper has all 200 of CIFAR.
        margin_of: the margin of probabilities (`probs`), as in the paper, or of `logits`.
        drop_hardest: β, the share of all samples, those of the lowest margins, never kept.
        num_strata: the number of strata; the paper has 50.
        rule: `strata`; null keeps the lowest margins instead, as aum does.
    """

    keeps = "an even draw over the range of margins"
    paper = "Zheng et al., ICLR 2023, arXiv 2210.15809"
    score_name = "aum"

    rule: Rule | None = field(default="strata", kw_only=True)
