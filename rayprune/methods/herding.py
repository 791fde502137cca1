"""Herding: keep samples whose mean is that of all samples.

Welling, "Herding Dynamical Weights to Learn", ICML 2009; as a selection of samples by their features in Rebuffi et al.,
"iCaRL", CVPR 2017, arXiv 1611.07725. With h the last layer's inputs in a forward-only pass after T epochs and μ their
mean, the (i+1)-th sample is argmin_x ‖(i+1)·μ − Σ_{s kept} h_s − h_x‖, without replacement. (DeepCore takes the argmax,
which keeps outliers.)

Each step looks at all samples, N·M·d multiplications together. Ours: above 2·10^11 the samples are divided into P
random parts that take turns; a part has N/P samples, takes M/P of them, and herds on from the sum that those before it
left. The mean of all samples remains the target, only the choice at each step is smaller. The same holds where N·d
numbers in float64 would be above 1.6 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.greedy import herding
from rayprune.core.bases.embeddings import RankedMethod
from rayprune.core.table import Ids
from rayprune.methods.registry import register


@register("herding")
@dataclass(frozen=True)
class Herding(RankedMethod):
    """Keep the samples that herding takes from the embeddings.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        balance: `proportional` matches the mean of each class and keeps the same share of it, `even` the same number;
            `none` matches the mean of all samples.
        parts: P, random parts of the samples (of each class, with a balance) that take turns; null is 1 up to 2·10^11
            multiplications N·M·d.
    """

    keeps = "samples whose mean is that of all"
    paper = "Welling, ICML 2009"
    max_work = 2e11

    def work(self, size: int, count: int, width: int) -> float:
        """Return N·M·d, with at least 1,000 for M, as the embeddings of a part are in memory."""
        return super().work(size, max(count, 1000), width)

    def order(self, points: Points, count: int, values: NDArray[np.float64]) -> Ids:
        """Return the order of one share."""
        return next(herding(points, [(points.ids, count)]))

    def orders(self, points: Points, shares: list[tuple[Ids, int]], values: NDArray[np.float64]) -> Iterator[Ids]:
        """Yield the order of each share, which goes on from those before it."""
        return herding(points, shares)
