"""Clean subset: drop the share of samples that is estimated to be mislabeled, those with the highest losses.

The schedule of co-teaching (Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
Labels", NeurIPS 2018, arXiv 1804.06872): after t epochs the share R(t) = 1 − min(t/T_k·τ, τ) of the samples with the
lowest losses is kept, with the noise rate τ and T_k = 10. Networks fit clean labels before noisy ones, so that in the
first epochs all samples are used, and a high loss later is a sign of a wrong label.

τ is given, or estimated once, from the losses at the end of the warm-up: as the weight of the upper one of two beta
distributions (Arazo et al., "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019, arXiv 1904.11238).

Deliberate deviations from co-teaching: one network, whose own losses choose, instead of two that choose for each other;
the choice is among all samples and before an epoch, by a moving average of the loss μ ← (1 − a)·μ + a·l, instead of
among a batch by its losses. Ours: the losses of dropped samples are renewed after each epoch by a forward pass in eval
mode, so that they can come back; the distributions are those of 1 − exp(−μ) instead of the loss scaled to [0, 1]; the
estimate is at most 0.9, and 0 where the two are not clearly apart (Ashman's D of at most 2) or the upper mean is at
most 1/2, as two distributions always fit better than one; with `per_class`, each class drops its own share; an
optional annealing phase; samples without a loss are kept; among equal losses the lower ids are kept. Weights are 1.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.mixture import fit_mixture
from rayprune.core.bases.dynamic import DynamicMethod, check_ema, fold_moving_average
from rayprune.core.choosing import num_pruned
from rayprune.core.draws import highest, highest_by_class
from rayprune.core.method import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_LEAST_SEPARATION = 2.0  # Ashman's D, below which two distributions are not apart
_LEAST_IMPROBABLE = 0.5  # labels whose mean probability is above a half are no wrong ones
_MAX_RATE = 0.9
_MOST_FITTED = 1_000_000  # of more samples, evenly spaced ones are fitted


@register("clean_subset")
@dataclass(frozen=True)
class CleanSubset(DynamicMethod):
    """Drop the samples with the highest mean losses, as many as labels are estimated to be wrong.

    Args:
        noise_rate: τ in [0, 1), the share of wrong labels; null estimates it from the losses after the warm-up.
        ramp_epochs: T_k, the epochs until the whole share τ is dropped, at least 1.
        warmup_epochs: epochs on all samples before the noise rate is estimated, at least 1; the network must have
            learned most clean samples by then, or the estimate is too high. Not used with a number.
        per_class: estimate and drop a share of each class for itself; a number is then the share of every class.
        ema: a in (0, 1], the share of the newest loss in the moving average; 1 = the last loss.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "all but the noise rate's share of highest losses"
    paper = "Han et al., NeurIPS 2018, arXiv 1804.06872"
    folds_once = True

    noise_rate: float | None = None
    ramp_epochs: int = 10
    warmup_epochs: int = 10
    per_class: bool = False
    ema: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ema(self.ema)
        if self.noise_rate is not None and not 0.0 <= self.noise_rate < 1.0:
            raise ConfigError(
                f"noise_rate {self.noise_rate!r} is outside [0, 1): give the share of wrong labels, or null"
            )
        for name in ("ramp_epochs", "warmup_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        object.__setattr__(self, "needs_labels", self.per_class)

    @property
    def cost(self) -> str:
        """The re-scoring."""
        return "forward passes over the dropped samples"

    def columns(self) -> dict[str, type[np.float32]]:
        """Return the moving average, and the one at the end of the warm-up if the noise rate is estimated."""
        return {"mean": np.float32} | ({} if self.noise_rate is not None else {"warm_mean": np.float32})

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Move the average; until the end of the warm-up also the one that the estimate uses."""
        fold_moving_average(table, ids, signals["loss"], self.ema)
        if self.noise_rate is None and epoch < self.warmup_epochs:
            table["warm_mean"][ids] = table["mean"][ids]

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the moving average of the loss."""
        return {"clean_subset": table["mean"]}

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Drop the highest mean losses, and score them again after the epoch."""
        if self.noise_rate is None and context.epoch < self.warmup_epochs:
            return self.full(context)
        reached, labels = min(context.epoch / self.ramp_epochs, 1.0), context.labels if self.per_class else None
        sizes = np.array([context.num_samples]) if labels is None else np.bincount(labels)
        rates = self._rates(table, labels, sizes)
        quotas = np.array([_num_kept(reached * rate, size) for rate, size in zip(rates, sizes.tolist(), strict=True)])
        clean = -table["mean"]
        kept = highest(clean, int(quotas[0])) if labels is None else highest_by_class(clean, labels, quotas)
        rate = float(np.dot(rates, sizes) / context.num_samples)
        selection = Selection.of_mask(kept, reached * rate, context.num_samples - int(quotas.sum()))
        again = self.rescored(~kept, context)
        return replace(selection, forward_only_ids=again).with_facts(noise_rate=round(rate, 4))

    def _rates(self, table: ScoreTable, labels: NDArray[Any] | None, sizes: NDArray[np.int64]) -> list[float]:
        """Return the noise rate of each class, or of all samples without labels."""
        if self.noise_rate is not None:
            return [self.noise_rate] * sizes.size
        losses = table["warm_mean"]
        if labels is None:
            return [estimated_rate(losses)]
        return [estimated_rate(part) for part in np.split(losses[np.argsort(labels)], np.cumsum(sizes)[:-1])]


def _num_kept(ratio: float, size: int) -> int:
    """Return n − floor(r·n), at least 1 of any."""
    return max(size - num_pruned(ratio, size), min(size, 1))


def estimated_rate(losses: NDArray[Any]) -> float:
    """Return the share of wrong labels among (N,) samples by their mean losses; NaN for those without one.

    >>> round(estimated_rate(np.repeat([0.01, 0.02, 3.0, 4.0, np.nan], [40, 40, 10, 10, 7])), 2)
    0.2
    """
    known = losses[~np.isnan(losses)]
    known = known[:: -(-known.size // _MOST_FITTED) or 1].astype(np.float64)
    if not known.size:
        return 0.0
    mixture = fit_mixture(1.0 - np.exp(-np.maximum(known, 0.0)), "beta")
    is_apart = mixture.separation > _LEAST_SEPARATION and mixture.means[1] > _LEAST_IMPROBABLE
    return round(min(mixture.weights[1], _MAX_RATE), 6) if is_apart else 0.0
