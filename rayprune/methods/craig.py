"""CRAIG: keep the samples whose gradients represent those of all others.

Mirzasoleiman, Bilmes, Leskovec, "Coresets for Data-efficient Training of Machine Learning Models", ICML 2020, arXiv
1906.01827. With d_ij the Euclidean distance of the last-layer gradients of samples i and j (`core.bases.gradients`)
and D the largest distance, the kept set S maximizes the facility location Σ_i max_{j∈S} (D − d_ij), which minimizes the
distance of every sample to its nearest kept one. Greedy choice reaches 1 − 1/e of the optimum; it is evaluated lazily
(Minoux 1978), which changes nothing but the time. The weight of a kept sample is the number of samples that it
represents: the weights sum to N, less the classes and parts of which none is kept. Training gets them over their mean,
so that they sum to M.

Deliberate deviations: one subset after T epochs, where the paper chooses again every epoch. Every kept sample
represents itself, so that no weight is 0 where gradients are equal; a sample between two kept ones goes to the lower
id. Counts are exact. Distances are Euclidean as in the paper; a common library squares them, which gives another
subset, more of outliers.

Cost: a part of n samples takes n²·C multiplications (n²·(C+d) for the last layer) and 4n² bytes, and the parts take
turns. Classes of up to `partition_size` samples are solved exactly. Larger ones are split at random, and each part
keeps its quota, the first round of GreeDi (Mirzasoleiman, Karbasi, Sarkar, Krause, NIPS 2013, arXiv 1411.0541). Its
second round, over the union of all kept samples, is left out: it needs as large a matrix as the whole. The choice is
thus within 1 − 1/e of the best one that takes each part's quota and represents every sample inside its part; all
samples together are represented at least as well as that. What is lost against the best of all shrinks with the size
of the parts, as each part is a uniform sample of its class.

Shapes: n samples of a part, k kept.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.gradients import GradientMethod, Gradients
from rayprune.core.table import Ids, chunks
from rayprune.methods.registry import register


@register("craig")
@dataclass(frozen=True, kw_only=True)
class CRAIG(GradientMethod):
    """Keep the samples whose last-layer gradients represent those of all others.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        gradient: `logits`, or `last_layer` for the gradients of the last layer's weight and bias.
        balance: `proportional` or `even` choose class by class; `none` ignores classes.
        partition_size: largest number of samples that are compared with each other, ≥ 2; 8,192 take 256 MiB.
        storage: how the gradients are stored on the disk: float32, or float16 in half the space.
    """

    keeps = "the gradients that represent all"
    paper = "Mirzasoleiman et al., ICML 2020, arXiv 1906.01827"

    partition_size: int | None = 8192

    def pick(
        self, gradients: Gradients, count: int, label: int | None, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return the number of samples that each sample represents, (n,)."""
        distances = gradients.distances()
        return cluster_sizes(distances, facility_location(distances, count))


def facility_location(distances: NDArray[np.float32], count: int) -> Ids:
    """Choose samples greedily, so that the distances of all samples to the nearest chosen one become small.

    Args:
        distances: (n, n), symmetric, at least 0; with those of `Gradients.distances`, gains are exact.
        count: k in [1, n].

    Returns:
        (k,) positions in the order of choice; among equal gains the lower position comes first.

    >>> x = np.array([0, 1, 2, 3, 20], np.float32)
    >>> facility_location(np.abs(x[:, None] - x), 2).tolist(), facility_location((x[:, None] - x) ** 2, 2).tolist()
    ([2, 4], [3, 4])
    """
    num = distances.shape[0]
    nearest = np.full(num, distances.max(), dtype=np.float32)
    saved = np.empty(num, dtype=np.float32)
    gains = [np.maximum(nearest - distances[rows], 0.0).sum(axis=1, dtype=np.float64) for rows in chunks(num, num)]
    # Gains only shrink as more samples are chosen: an old gain is an upper bound.
    heap = list(zip((-np.concatenate(gains)).tolist(), range(num), strict=True))
    heapq.heapify(heap)
    evaluated_at = [0] * num
    chosen: list[int] = []
    while len(chosen) < count:
        position = heap[0][1]
        if evaluated_at[position] == len(chosen):
            heapq.heappop(heap)
            chosen.append(position)
            np.minimum(nearest, distances[position], out=nearest)
            continue
        np.subtract(nearest, distances[position], out=saved)
        np.maximum(saved, 0.0, out=saved)
        heapq.heapreplace(heap, (-float(saved.sum(dtype=np.float64)), position))
        evaluated_at[position] = len(chosen)
    return np.array(chosen, dtype=np.int64)


def cluster_sizes(distances: NDArray[np.float32], chosen: Ids) -> NDArray[np.float64]:
    """Return how many samples each chosen one is nearest to, (n,); a chosen one counts itself.

    >>> x = np.array([0, 1, 2, 3, 20], np.float32)
    >>> cluster_sizes(np.abs(x[:, None] - x), np.array([4, 2])).tolist()
    [0.0, 0.0, 4.0, 0.0, 1.0]
    """
    chosen, num = np.sort(chosen), distances.shape[0]
    owners = np.concatenate([chosen[distances[rows][:, chosen].argmin(axis=1)] for rows in chunks(num, num)])
    owners[chosen] = chosen
    return np.bincount(owners, minlength=num).astype(np.float64)
