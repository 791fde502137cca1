"""k-center: keep samples such that every sample is near a kept one.

Sener, Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018, arXiv 1708.00489.
With h the last layer's inputs in a forward-only pass after T epochs, farthest-first traversal (Gonzalez 1985) takes the
sample with the largest min_{s kept} ‖h − h_s‖ again and again. The largest distance of a sample to its nearest kept one
is then at most twice the smallest possible with M kept samples.

Ours: the first sample is the one nearest the mean, so that nothing is drawn (the paper has labeled samples to start
from, DeepCore draws one). The order is exact however many samples there are: distances to the kept samples only fall,
so most of them need not be computed. Above 10^14 multiplications N·M·d the samples are divided into P random parts,
each with its share of M; the largest distance is then at most twice the smallest possible with one such share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.greedy import farthest_first
from rayprune.core.bases.embeddings import RankedMethod
from rayprune.core.table import Ids
from rayprune.methods.registry import register


@register("k_center")
@dataclass(frozen=True)
class KCenter(RankedMethod):
    """Keep the samples that farthest-first traversal of the embeddings takes.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        balance: `proportional` covers each class by itself and keeps the same share of it, `even` the same number;
            `none` ignores classes.
        parts: P, random parts of the samples (of each class, with a balance) that are covered by themselves; null is 1
            up to 10^14 multiplications N·M·d.
    """

    keeps = "samples spread over all embeddings"
    paper = "Sener, Savarese, ICLR 2018, arXiv 1708.00489"

    def order(self, points: Points, count: int, values: NDArray[np.float64]) -> Ids:
        """Return the traversal from the point nearest the mean."""
        return farthest_first(points, count)[0]
