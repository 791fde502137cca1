"""RePB: compare losses of about the same network only, and weigh samples by how often they were included.

Zhou et al., "Inconsistency Biases in Dynamic Data Pruning", ICLR 2026 (RePB, Resolving Pruning Biases). The paper
decides within windows of a few batches, in which the network is nearly constant: a sample with a loss below the
window's mean is dropped from the next epoch with probability ρ; a dropped sample is admitted again with probability
1 − ρ. Losses are multiplied by E/N_i: the epochs so far over those that included sample i.

Windows are not visible to a method that chooses once per epoch. Ours: the window is an epoch. The losses of the newest
epoch are compared with their own mean, and with no older loss. A sample that the newest epoch did not visit was below
the mean when it was dropped, so it remains a candidate. In epoch e the kept samples have E = e + 1 and N_i with this
epoch included. Candidates are thinned to an exact number instead of one by one, with the same probabilities.

E/N_i is consistent, not unbiased: with a constant probability it tends to its inverse, but the first epochs weigh
candidates too little. `rescale: inverse`, ours, weighs candidates by 1/(1 − ρ), as InfoBatch does, and is unbiased in
every epoch. Also ours: samples without a loss are kept; full epochs have weight 1; δ and ρ, as we have not read the
authors' constants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import DynamicMethod
from rayprune.core.method import EpochContext
from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable, chunks
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_MAX_RATIO = 1.0 - 1e-6  # weights are 1/(1 − ρ): above this, single samples would outweigh an epoch


@register("repb")
@dataclass(frozen=True)
class RePB(DynamicMethod):
    """Thin the samples below the mean loss of their epoch, with weights by how often each was included.

    Args:
        prune_ratio: ρ, the probability to drop a candidate; a number in [0, 1) or a schedule.
        rescale: `cumulative` weighs by E/N_i, `inverse` candidates by 1/(1 − ρ), without bias.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "above the newest mean loss, some below"
    paper = "Zhou et al., ICLR 2026 (RePB)"

    prune_ratio: float | Schedule = 0.5
    rescale: Literal["cumulative", "inverse"] = "cumulative"
    anneal_start: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")
        object.__setattr__(self, "unbiased", self.rescale == "inverse")

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Thin the candidates."""
        ratio = Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        if ratio > _MAX_RATIO:
            raise ConfigError(f"prune_ratio {ratio!r} leaves weights of {1 / (1 - ratio):.3g}: lower it")
        if ratio == 0.0 and self.rescale == "inverse":
            return Selection.full(context.num_samples)
        thinned = context.thin(_candidates(table), np.array([1.0 - ratio]))
        if self.rescale == "inverse":
            return replace(thinned, requested=ratio)
        times = table.times_pruned
        codes = np.zeros(times.size, dtype=np.min_scalar_type(context.epoch + 2))
        most = 0
        for rows in chunks(times.size):
            codes[rows] = np.where(thinned.codes[rows] != 0, times[rows] + 1, 0)
            most = max(most, int(times[rows].max()))
        weights = (context.epoch + 1) / (context.epoch + 1 - np.arange(most + 1))
        return Selection(codes, weights.astype(np.float32), ratio, thinned.expected_drops)


def _candidates(table: ScoreTable) -> NDArray[np.uint8]:
    """Return (N,) 1 for samples below the mean loss of the newest epoch, or not visited in it; otherwise 0."""
    loss, visits = table["loss"], table.last_visit
    newest, total, count, highest = int(visits.max()), 0.0, 0, -np.inf
    for rows in chunks(loss.size):
        current = loss[rows][(visits[rows] == newest) & ~np.isnan(loss[rows])]
        if current.size:
            total, count = total + float(current.sum(dtype=np.float64)), count + current.size
            highest = max(highest, float(current.max()))
    # The float64 mean of equal numbers can round above them, which would make them all candidates.
    mean = min(total / count, highest) if count else -np.inf
    codes = np.zeros(loss.size, dtype=np.uint8)
    for rows in chunks(loss.size):
        older = (visits[rows] < newest) & ~np.isnan(loss[rows])
        codes[rows] = older | (loss[rows].astype(np.float64) < mean)
    return codes
