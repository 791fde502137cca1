"""ESWP: draw every epoch's samples in proportion to an evolved weight, a loss with its recent change.

Cheng, Li, Bian, "Data-Efficient Training by Evolved Sampling", arXiv 2509.23461, 2025. Every visit with loss l sets
w ← β₁·s + (1 − β₁)·l by the old s, then s ← β₂·s + (1 − β₂)·l, from s = 1/N; (β₁, β₂) = (0.2, 0.9). ES draws each
mini-batch from a larger one that is loaded and forwarded, with probabilities in proportion to w; ESWP first prunes the
epoch's set by w. The first and the last few epochs use all samples.

This is the pruning of the epoch's set: a method that chooses once per epoch sees no batches. We know the update and the
idea, not the details of the pruning; ours are the draw of M samples without replacement with p ∝ w (`rule: top` takes
the highest instead), the ratio, 5 % of the run at each end, and that samples without a weight come first. Weights in
the loss are 1: biased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import PruneRatioMethod
from rayprune.core.draws import draw_weighted, highest
from rayprune.core.method import EpochContext
from rayprune.core.schedule import epoch_at
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("eswp")
@dataclass(frozen=True)
class ESWP(PruneRatioMethod):
    """Draw samples in proportion to the evolved weight of their losses, which must not be negative.

    Args:
        prune_ratio: r, the share of all samples to drop; a number in [0, 1) or a schedule.
        beta1: β₁ in [0, 1], the share of the average s in the weight.
        beta2: β₂ in [0, 1], how much of the average a visit keeps.
        rule: `draw` draws in proportion to the weights, `top` keeps the highest.
        warmup: share of the run, in [0, 1], that starts with all samples; at least epoch 0 does.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "a draw by the evolved loss"
    paper = "Cheng et al., 2025, arXiv 2509.23461"
    folds_once = True

    beta1: float = 0.2
    beta2: float = 0.9
    rule: Literal["draw", "top"] = "draw"
    warmup: float = 0.05
    anneal_start: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2", "warmup"):
            check_share(name, getattr(self, name))

    def columns(self) -> dict[str, type[np.float32]]:
        """Return the columns of the weight w and the average s."""
        return {"weight": np.float32, "average": np.float32}

    def pruning_epochs(self, num_epochs: int) -> range:
        """Return the epochs between the full ones at both ends."""
        return range(max(1, epoch_at(self.warmup, num_epochs)), epoch_at(self.anneal_start, num_epochs))

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Refuse negative losses, and mask second observations in one epoch."""
        if (least := np.min(signals["loss"], initial=0.0)) < 0.0:
            raise ConfigError(
                f"eswp draws in proportion to losses, and one is {least:g}: use a loss that is never below 0, or "
                "another method"
            )
        return super().check(table, ids, signals, epoch)

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Set the weight by the old average, then move the average."""
        loss, old = np.asarray(signals["loss"], dtype=np.float64), table["average"][ids].astype(np.float64)
        old = np.where(np.isnan(old), 1.0 / table.num_samples, old)
        table["weight"][ids] = self.beta1 * old + (1.0 - self.beta1) * loss
        table["average"][ids] = self.beta2 * old + (1.0 - self.beta2) * loss

    def choose(self, table: ScoreTable, context: EpochContext, count: int) -> NDArray[np.bool_]:
        """Draw by the weights, or take the highest."""
        weights = table["weight"]
        return highest(weights, count) if self.rule == "top" else draw_weighted(weights, count, context.rng)
