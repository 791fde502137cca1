"""InfoBatch: drop a random part of the well-learned samples and weigh up the rest of them, without bias.

Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024, arXiv 2303.04947.
The score s is a sample's last raw training loss; L = {i : s_i < mean(s)} is thinned to about k·|L| samples (k = 1 − r)
of weight 1/k; everything else is kept with weight 1; from epoch floor(δE) on all data is used with weight 1.

Deliberate deviations from the reference program: never-visited samples have no score, are kept and do not enter the
mean (there: an initial score of 3.0); the count k·|L| is rounded at random, so E[Σw·v] is exact (there: rounded down);
weights are 1 in every full epoch, even if δE is not an integer; the mean is in float64 and at most the maximum, so
constant scores prune nothing; NaN losses never enter the table.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import warn_once
from rayprune.core.method import EpochContext, Method
from rayprune.core.schedule import Schedule, epoch_at
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals, chunks
from rayprune.core.validation import check_ratio, check_share
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

logger = logging.getLogger(__name__)
_MIN_KEEP = 1e-6  # weights are 1/k: below this, single samples would outweigh an epoch


@register("infobatch")
@dataclass(frozen=True)
class InfoBatch(Method):
    """Thin the samples below the mean loss at random, with weights that keep the gradient unbiased.

    Args:
        prune_ratio: r, the share of the well-learned samples to drop; a number in [0, 1) or a schedule.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples.
        quantiles: percentiles q1 < … < qm of the scores, in (0, 100), as thresholds instead of the mean.
        keep: one keep ratio in [1e-6, 1] for each bucket below a threshold; the top bucket is kept whole.
            The paper's presets: [20, 85] with [.25, .5], and [64] with [.5].
        ema: momentum of the score in (0, 1]; 1 = the last loss.
        target_saving: the share of all N·E visits for the whole run to save, in (0, 1); chooses r in each epoch from
            the share of candidates in it, instead of prune_ratio.
        max_prune_ratio: the highest r that target_saving may choose; only valid together with it.
    """

    kind = "dynamic"
    keeps = "all above the mean loss, some below"
    paper = "Qin et al., ICLR 2024, arXiv 2303.04947"
    signals = ("loss",)
    unbiased = True

    prune_ratio: float | Schedule = 0.5
    anneal_start: float = 0.875
    quantiles: tuple[float, ...] = ()
    keep: tuple[float, ...] = ()
    ema: float = 1.0
    target_saving: float | None = None
    max_prune_ratio: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")
        check_share("anneal_start", self.anneal_start)
        check_ratio("max_prune_ratio", self.max_prune_ratio)
        if not 0.0 < self.ema <= 1.0:
            raise ConfigError(f"ema {self.ema!r} is outside (0, 1]: 1 uses the last loss")
        if len(self.quantiles) != len(self.keep) or list(self.quantiles) != sorted(set(self.quantiles)):
            raise ConfigError(f"quantiles {self.quantiles} must ascend, with one keep ratio each, got {self.keep}")
        if any(not 0 < q < 100 for q in self.quantiles) or any(not _MIN_KEEP <= k <= 1 for k in self.keep):
            raise ConfigError(
                f"quantiles {self.quantiles} must lie in (0, 100), keep {self.keep} in [{_MIN_KEEP:g}, 1]"
            )
        if self.target_saving is None:
            if self.max_prune_ratio != type(self).max_prune_ratio:
                raise ConfigError(
                    f"max_prune_ratio {self.max_prune_ratio!r} does nothing without target_saving: set both"
                )
        elif not 0.0 < self.target_saving < 1.0:
            raise ConfigError(f"target_saving {self.target_saving!r} is outside (0, 1)")
        elif self.quantiles:
            raise ConfigError("target_saving chooses prune_ratio and does not go with quantiles: leave one out")

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Store the last loss, or its moving average from the second visit on."""
        loss = np.asarray(signals["loss"], dtype=np.float32)
        if self.ema < 1.0:
            old = table["loss"][ids]
            loss = np.where(np.isnan(old), loss, self.ema * loss + (1.0 - self.ema) * old).astype(np.float32)
        table["loss"][ids] = loss

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Thin the buckets below the thresholds; keep all samples in the first and the full epochs."""
        end = epoch_at(self.anneal_start, context.num_epochs)
        if self.target_saving is not None:
            self._check_reachable(self.target_saving, end, context.num_epochs)
        elif context.epoch == 0 and end <= 1 and self._requests_pruning(context.num_epochs):
            warn_once(
                f"infobatch never prunes with num_epochs = {context.num_epochs}: epoch 0 is full, and from epoch {end} "
                f"on (anneal_start {self.anneal_start:g}) all data is used: raise anneal_start, or train longer"
            )
        if not 0 < context.epoch < end:
            return Selection.full(context.num_samples)
        loss = table["loss"]
        if (mean := _mean(loss)) is None:
            return Selection.full(context.num_samples)
        thresholds = np.nanpercentile(loss, self.quantiles) if self.quantiles else np.array([mean])
        strata = _buckets(loss, thresholds)
        keep = np.asarray(self.keep) if self.quantiles else np.array([1.0 - self._ratio(strata, end, context)])
        if (keep == 1.0).all():
            return Selection.full(context.num_samples)
        thinned = context.thin(strata, keep)
        # With the mean as threshold, `requested` is r, a share of the candidates; with quantiles, of all samples.
        requested = thinned.expected_drops / context.num_samples if self.quantiles else float(1.0 - keep[0])
        return replace(thinned, requested=requested)

    def _requests_pruning(self, num_epochs: int) -> bool:
        if self.quantiles:
            return min(self.keep) < 1.0
        return any(Schedule.of(self.prune_ratio)(epoch, num_epochs) > 0 for epoch in range(num_epochs))

    def _ratio(self, strata: NDArray[np.uint8], end: int, context: EpochContext) -> float:
        if self.target_saving is None:
            return Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        saved = context.num_samples * context.epoch - context.visits_before
        target = self.target_saving * context.num_samples * context.num_epochs
        candidates = int(np.count_nonzero(strata))
        ratio = max(0.0, (target - saved) / (end - context.epoch)) / max(candidates, 1)
        if ratio > self.max_prune_ratio:
            need = f"target_saving {self.target_saving:g} needs prune ratio {ratio:.2f} of {candidates} candidates"
            logger.warning("epoch %d: %s; max_prune_ratio %g is used", context.epoch, need, self.max_prune_ratio)
        return min(ratio, self.max_prune_ratio)

    def _check_reachable(self, target: float, end: int, num_epochs: int) -> None:
        max_saving = max(0, end - 1) / num_epochs * self.max_prune_ratio
        if target > max_saving:
            raise ConfigError(
                f"target_saving {target:g} cannot be reached: {max(0, end - 1)} of {num_epochs} epochs may "
                f"prune, which saves at most {max_saving:.3f}; lower it, raise anneal_start, or train longer"
            )


def _mean(loss: NDArray[np.float32]) -> float | None:
    """Return the mean of the scores that are not NaN, in float64; None without any."""
    total, count, highest = 0.0, 0, -np.inf
    for rows in chunks(loss.size):
        known = loss[rows][~np.isnan(loss[rows])]
        if known.size:
            total, count = total + float(known.sum(dtype=np.float64)), count + known.size
            highest = max(highest, float(known.max()))
    # The float64 mean of equal numbers can round above them, which would make them all candidates.
    return min(total / count, highest) if count else None


def _buckets(loss: NDArray[np.float32], thresholds: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (N,) codes: j ≥ 1 = below the j-th threshold but no lower one; 0 = above all, or never visited."""
    buckets = np.zeros(loss.size, dtype=np.uint8)
    for rows in chunks(loss.size):
        for code in range(len(thresholds), 0, -1):
            # Comparisons with NaN are False, so a sample without a score is never a candidate.
            buckets[rows][loss[rows].astype(np.float64) < thresholds[code - 1]] = code
    return buckets
