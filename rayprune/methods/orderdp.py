"""OrderDP: draw a pool at random, then keep the samples with the highest losses in it.

Jin et al., "OrderDP: A Theoretically Guaranteed Lossless Dynamic Data Pruning Framework", ICLR 2026, arXiv 2606.08574.
Of N samples a uniform pool of s is drawn in every epoch, and of the pool the q with the highest last losses are kept.
The j-th largest loss (j from 1) is kept with probability Σ_{l=1..q} C(j−1, l−1)·C(N−j, s−l) / C(N, s). The paper's
unbiasedness is with respect to a surrogate loss with these probabilities, not to the mean loss. Weights are 1: biased.
CIFAR defaults of the authors: s = N/2, q = s/2, so a quarter is kept.

Ours: the prune ratio gives q, and the pool is a share of its own, by default such that both stages keep the same share;
all samples are used in epoch 0 (the reference program starts with equal losses of 3); samples without a loss are kept
first, within the pool; an optional annealing phase (the released program never anneals); ties go to the lower id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import PruneRatioMethod
from rayprune.core.choosing import num_kept
from rayprune.core.draws import draw_uniform, highest
from rayprune.core.method import EpochContext
from rayprune.core.schedule import Schedule
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("orderdp")
@dataclass(frozen=True)
class OrderDP(PruneRatioMethod):
    """Keep the highest losses of a random pool.

    Args:
        prune_ratio: r, the share of all samples to drop; q = N − floor(r·N); a number in [0, 1) or a schedule.
        pool: the share of all samples in the pool, in (0, 1] and at least 1 − r; null is sqrt(1 − r).
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "the highest losses of a random pool"
    paper = "Jin et al., ICLR 2026, arXiv 2606.08574"

    prune_ratio: float | Schedule = 0.75
    pool: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool is not None and not 0.0 < self.pool <= 1.0:
            raise ConfigError(f"pool {self.pool!r} is outside (0, 1]: 0.5 draws from half of the samples")

    def choose(self, table: ScoreTable, context: EpochContext, count: int) -> NDArray[np.bool_]:
        """Draw s samples, then take the q highest losses."""
        num = context.num_samples
        size = round(math.sqrt(count * num)) if self.pool is None else num_kept(float(self.pool), num)
        if size < count:
            raise ConfigError(
                f"epoch {context.epoch}: a pool of {size} samples cannot give the {count} that prune_ratio keeps: "
                "raise pool or prune_ratio"
            )
        pool = draw_uniform(np.ones(num, dtype=bool), size, context.rng)
        return highest(np.where(pool, table["loss"], np.float32(-np.inf)), count)
