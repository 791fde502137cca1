"""InfoBatch: drop a random part of the well-learned samples, weigh the rest of them up, stay unbiased.

Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024, arXiv 2303.04947.
The score s is a sample's last raw training loss; L = {i : s_i < mean(s)} is thinned to about k·|L| samples (k = 1 − r)
of weight 1/k; everything else is kept with weight 1; from epoch floor(δE) on all data is used with weight 1.

Deviations from the reference program, all on purpose: never-visited samples have no score, are kept and take no part in
the mean (there: an initial 3.0); the count k·|L| is rounded at random, so E[Σw·v] is exact (there: floored); weights
are 1 in every full epoch also when δE is no integer; the mean is taken in float64 and never above the maximum, so
constant scores prune nothing; NaN losses never reach the table.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.schedule import Schedule, check_ratio, check_share, first_full_epoch
from rayprune.core.selection import Selection
from rayprune.core.selector import EpochContext
from rayprune.core.table import ScoreTable, chunks
from rayprune.errors import ConfigError
from rayprune.methods.base import Method, warn_once
from rayprune.methods.registry import register

logger = logging.getLogger(__name__)
_LEAST_KEEP = 1e-6  # weights are 1/k: below this, single samples would outweigh an epoch


@register("infobatch")
@dataclass(frozen=True)
class InfoBatch(Method):
    """Thin the samples below the mean loss at random, with weights that keep the gradient unbiased.

    Args:
        prune_ratio: r, the share of the well-learned samples that is dropped; a number in [0, 1) or a schedule.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on everything.
        quantiles: percentiles q1 < … < qm of the scores, in (0, 100), that replace the mean as thresholds.
        keep: one keep ratio in [1e-6, 1] for each bucket below a threshold; the top bucket is kept whole.
            The paper's presets: [20, 85] with [.25, .5], and [64] with [.5].
        ema: momentum of the score in (0, 1]; 1 = the last loss.
        target_saving: share of all visits N·E that the whole run shall save, in (0, 1); replaces prune_ratio by the r
            that gets there from the share of candidates observed in each epoch.
        max_prune_ratio: the highest r that target_saving may choose; refused without it, unless at its default.
    """

    kind = "dynamic"
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
        if any(not 0 < q < 100 for q in self.quantiles) or any(not _LEAST_KEEP <= k <= 1 for k in self.keep):
            raise ConfigError(
                f"quantiles {self.quantiles} must lie in (0, 100), keep {self.keep} in [{_LEAST_KEEP:g}, 1]"
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

    def fold(self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int) -> None:
        """Keep the last loss, or its moving average from the second visit on."""
        loss = np.asarray(signals["loss"], dtype=np.float32)
        if self.ema < 1.0:
            old = table["loss"][ids]
            loss = np.where(np.isnan(old), loss, self.ema * loss + (1.0 - self.ema) * old).astype(np.float32)
        table["loss"][ids] = loss

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Thin the buckets below the thresholds; everything in the first and the full epochs."""
        end = first_full_epoch(self.anneal_start, context.num_epochs)
        if self.target_saving is not None:
            self._check_reachable(self.target_saving, end, context.num_epochs)
        elif context.epoch == 0 and end <= 1 and self._means_to_prune(context.num_epochs):
            warn_once(
                f"infobatch never prunes with num_epochs = {context.num_epochs}: epoch 0 is full, and from epoch {end} "
                f"on (anneal_start {self.anneal_start:g}) all data is used; raise train.epochs or anneal_start"
            )
        if not 0 < context.epoch < end:
            return Selection.full(context.num_samples)
        loss = table["loss"]
        total, count, highest = 0.0, 0, -np.inf
        for rows in chunks(loss.size):
            seen = loss[rows][~np.isnan(loss[rows])]
            if seen.size:
                total, count = total + float(seen.sum(dtype=np.float64)), count + seen.size
                highest = max(highest, float(seen.max()))
        if not count:
            return Selection.full(context.num_samples)
        # The float64 mean of equal numbers can round above them; nothing lies below the mean then.
        mean = min(total / count, highest)
        thresholds = np.nanpercentile(loss, self.quantiles) if self.quantiles else np.array([mean])
        strata = _buckets(loss, thresholds)
        keep = np.asarray(self.keep) if self.quantiles else np.array([1.0 - self._ratio(strata, end, context)])
        if (keep == 1.0).all():
            return Selection.full(context.num_samples)
        thinned = context.thin(strata, keep)
        # Under the mean the request is r, the share of the candidates; with quantiles it is a share of all samples.
        return thinned.with_requested(
            thinned.expected_drops / context.num_samples if self.quantiles else float(1.0 - keep[0])
        )

    def _means_to_prune(self, num_epochs: int) -> bool:
        if self.quantiles:
            return min(self.keep) < 1.0
        return any(Schedule.of(self.prune_ratio)(epoch, num_epochs) > 0 for epoch in range(num_epochs))

    def _ratio(self, strata: NDArray[np.uint8], end: int, context: EpochContext) -> float:
        if self.target_saving is None:
            return Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        saved = context.num_samples * context.epoch - context.visits_before
        wanted = self.target_saving * context.num_samples * context.num_epochs
        candidates = int(np.count_nonzero(strata))
        ratio = max(0.0, (wanted - saved) / (end - context.epoch)) / max(candidates, 1)
        if ratio > self.max_prune_ratio:
            asked = f"target_saving {self.target_saving:g} asks for prune ratio {ratio:.2f} of {candidates} candidates"
            logger.warning("epoch %d: %s; max_prune_ratio %g is used", context.epoch, asked, self.max_prune_ratio)
        return min(ratio, self.max_prune_ratio)

    def _check_reachable(self, target: float, end: int, num_epochs: int) -> None:
        most = max(0, end - 1) / num_epochs * self.max_prune_ratio
        if target > most:
            raise ConfigError(
                f"target_saving {target:g} cannot be reached: {max(0, end - 1)} of {num_epochs} epochs may "
                f"prune, which saves at most {most:.3f}; lower it, or raise anneal_start or train.epochs"
            )


def _buckets(loss: NDArray[np.float32], thresholds: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (N,) codes: j ≥ 1 = below the j-th threshold and no lower one, 0 = above all or never visited."""
    buckets = np.zeros(loss.size, dtype=np.uint8)
    for rows in chunks(loss.size):
        for code in range(len(thresholds), 0, -1):
            # A comparison with NaN is False: a sample without a score is never a candidate.
            buckets[rows][loss[rows].astype(np.float64) < thresholds[code - 1]] = code
    return buckets
