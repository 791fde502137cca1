"""DUAL: keep the samples that are uncertain and difficult early in training.

Cho et al., "Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction Uncertainty", ICML
2025, arXiv 2502.06905. With p_t the label's probability at a sample's visit in epoch t, and windows of J epochs:
    D_k = std(p_k, …, p_{k+J−1})·(1 − mean(p_k, …, p_{k+J−1})), with J−1 in the denominator of the std
The score S is the mean of D_k over all T−J+1 windows. J = 10; T = 30 for CIFAR and 60 for ImageNet.

Beta sampling, for high prune ratios r: draw without replacement with weights Beta(P; a, b)·S, where P is a sample's
mean p_t over the T epochs, b = 15(1 − μ)(1 − r^c), a = 16 − b, and μ the mean P of the ten highest S; c = 4.

Deliberate deviations from the reference program: no factor 10 in S; P is clipped to [1e-12, 1 − 1e-12], so that weights
are finite where b < 1; samples of weight 0 come last, by ascending id, where the others are too few (there an error).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod
from rayprune.core.bases.visits import WindowMethod, add_to_mean
from rayprune.core.choosing import choose
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_ANCHORS = 10
_LEAST_PROB = 1e-12


@register("dual")
@dataclass(frozen=True)
class DUAL(WindowMethod):
    """Keep the samples with the highest product of uncertainty and difficulty in the first T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T, the number of epochs of the scoring run; the paper has 30 for CIFAR and 60 for ImageNet.
        window_size: J, the number of epochs in a window, in [2, T].
        beta_sampling: draw the subset with weights that shift to easier samples as the prune ratio rises, instead of
            keeping the highest scores.
        beta_power: c above 0, the exponent of the prune ratio in beta sampling.
    """

    keeps = "the uncertain and difficult"
    paper = "Cho et al., ICML 2025, arXiv 2502.06905"
    selection_fields = (*ScoredMethod.selection_fields, "beta_sampling", "beta_power")

    beta_sampling: bool = False
    beta_power: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_sampling and (self.rule or self.drop_hardest):
            raise ConfigError("beta_sampling draws the subset by weights of its own: leave rule and drop_hardest out")
        if not self.beta_power > 0:
            raise ConfigError(f"beta_power {self.beta_power!r} must be above 0")

    def window_score(self, std: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return D_k."""
        return std * (1.0 - mean)

    def columns(self) -> Mapping[str, Any]:
        """Return those of the windows, and P."""
        return {**super().columns(), "mean_prob": np.float64}

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Update P as well."""
        super().fold(table, ids, signals, epoch)
        add_to_mean(table["mean_prob"], ids, signals["prob_label"], epoch + 1)

    def to_average(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return S and P."""
        return {**super().to_average(table), "mean_prob": table["mean_prob"]}

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Choose by the scores, or draw by them."""
        if not self.beta_sampling:
            return super().subset(table, context, count)
        scores, prob_N = self.final_score(table, context), context.averaged.get("mean_prob", table["mean_prob"])
        a, b = beta_parameters(prob_N, scores, self.prune_ratio, self.beta_power)
        # The highest of log w plus Gumbel noise are a draw without replacement in proportion to w.
        noise_N = context.rng_of(self.collect_epochs).gumbel(size=scores.size)
        keys_N = log_beta_weights(prob_N, scores, a, b) + noise_N
        ids = choose(keys_N, count, labels=context.labels, balance=self.balance, recalls=context.recalls).ids
        return ids, None, {"score": "dual", "beta_a": round(a, 6), "beta_b": round(b, 6)}


def beta_parameters(
    prob: NDArray[np.float64], scores: NDArray[Any], prune_ratio: float, power: float = 4.0
) -> tuple[float, float]:
    """Return a and b of (N,) mean probabilities and (N,) scores.

    >>> beta_parameters(np.array([0.2, 0.6]), np.array([1.0, 2.0]), 0.5)
    (7.5625, 8.4375)
    """
    anchors = choose(scores, min(_ANCHORS, scores.size)).ids
    b = 15.0 * (1.0 - float(prob[anchors].mean())) * (1.0 - prune_ratio**power)
    return 16.0 - b, b


def log_beta_weights(prob: NDArray[np.float64], scores: NDArray[Any], a: float, b: float) -> NDArray[np.float64]:
    """Return ln(Beta(P; a, b)·S) up to a constant, (N,); −inf where S is 0.

    >>> log_beta_weights(np.array([0.5, 0.25]), np.array([2.0, 0.0]), 2.0, 3.0).round(6)
    array([-1.386294,      -inf])
    """
    clipped = np.clip(prob, _LEAST_PROB, 1.0 - _LEAST_PROB)
    with np.errstate(divide="ignore"):
        weights: NDArray[np.float64] = (
            (a - 1.0) * np.log(clipped)
            + (b - 1.0) * np.log1p(-clipped)
            + np.log(np.maximum(scores, 0.0, dtype=np.float64))
        )
    return weights
