"""From what the runs of an audit have observed to the probability that each label is wrong.

The default, `ensemble`, ranks the samples by the noise model's probability and by the margin during training, and gives
the k-th sample of this order the k-th largest of the model's probabilities: so the noise rate stays that of the model,
and the order is that of both. It was chosen by synthetic label noise (docs/auditing.md).

Where something was not observed, the rest decides: without margins, the losses, and without these the noise model
alone; a sample without predictions has the noise rate of its label.

Shapes: N samples, C classes, R runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.mixture import fit_mixture
from rayprune.core.audit.noise_model import NoiseModel, fit_noise
from rayprune.errors import ConfigError

_FIT = 5  # keeps the generator of the fit apart from others of the seed


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the runs of an audit have observed.

    Attributes:
        labels: (N,) the given labels.
        held_out: (N, C) probabilities of networks that did not train on the sample.
        probs: (N, C) mean probabilities over the training visits.
        losses, margins: (R, N) means over the training visits of each run, NaN where it left the sample out.
        correct: (N,) the share of training visits in which the label was predicted; NaN where it is not known.
    """

    labels: NDArray[np.int64]
    held_out: NDArray[np.float32]
    probs: NDArray[np.float32]
    losses: NDArray[np.float32]
    margins: NDArray[np.float32]
    correct: NDArray[np.float32]

    @classmethod
    def of_runs(cls, labels: NDArray[np.int64], runs: Iterable[Mapping[str, NDArray[Any]]]) -> Evidence:
        """Merge the columns of the runs' score tables (`rayprune.core.audit.cross_fit`), one run after the other.

        Each sample is left out of some of the runs; where none leaves any out, the training visits stand for the
        predictions.
        """
        means = {name: _Mean() for name in ("probs", "held_out", "correct")}
        columns = []
        for run in runs:
            for name, mean in means.items():
                if run.get(name) is not None and run[name].size:
                    mean.add(run[name])
            columns.append((run["loss"], run["margin"]))
        losses, margins = (np.stack(column) for column in zip(*columns, strict=True))
        probs = means["probs"].result()
        held_out = means["held_out"].result()
        correct = means["correct"].result()
        return cls(labels, held_out if held_out.size else probs, probs, losses, margins, correct)

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """(N,) whether there is a prediction of the sample."""
        return np.asarray(np.isfinite(self.held_out).all(axis=1))

    def of(self, rows: NDArray[np.bool_]) -> Evidence:
        """Return the evidence on some of the samples."""
        by_sample = (self.held_out[rows], self.probs[rows], self.losses[:, rows], self.margins[:, rows])
        return Evidence(self.labels[rows], *by_sample, self.correct[rows])


@dataclass(frozen=True, eq=False)
class Suspects:
    """How probable it is that each label is wrong.

    Attributes:
        p_wrong: (N,) float32 in [0, 1].
        suggested: (N,) int64, the most probable other class.
        model: the fitted noise model; its `noise_rate` and `joint` are the estimates for the whole data.
        statistics: name → (N,) float32: `held_out_probability` and `held_out_margin` of the label, `probability`,
            `loss` and `margin` in training, `correct`.
    """

    p_wrong: NDArray[np.float32]
    suggested: NDArray[np.int64]
    model: NoiseModel
    statistics: dict[str, NDArray[np.float32]]


def find_suspects(evidence: Evidence, rule: str = "ensemble", seed: int = 0) -> Suspects:
    """Estimate the probability that each label is wrong.

    A sample without predictions, such as one whose logits were never finite, gets the share of its label that is wrong.

    Args:
        evidence: what the runs have observed.
        rule: a key of RULES, by which the samples are ranked.
        seed: of the draw of samples to fit, where there are very many.

    Raises:
        ConfigError: no sample has a prediction, or the rule needs something that no sample has.
    """
    predicted = evidence.predicted
    if not predicted.all():
        if not predicted.any():
            raise ConfigError("no sample has finite predictions, nothing can be said of the labels: lower optim.lr")
        return _spread(find_suspects(evidence.of(predicted), rule, seed), evidence.labels, predicted)
    if (needed := _NEEDS.get(rule)) is not None and np.isnan(getattr(evidence, needed)).all():
        raise ConfigError(
            f"audit.rule {rule!r} needs the {needed} of the training visits, which were not recorded: use "
            "audit.rule=ensemble, or train with train.record=[loss,logit_margin,correct]"
        )
    labels, rows = evidence.labels, np.arange(evidence.labels.size)
    model = fit_noise(evidence.held_out, labels, np.random.default_rng([seed, 0, _FIT]))
    posterior = model.posterior(evidence.held_out, labels)
    by_model = 1.0 - posterior[rows, labels].astype(np.float64)
    posterior[rows, labels] = -1.0
    statistics = {
        "held_out_probability": evidence.held_out[rows, labels],
        "held_out_margin": label_margins(evidence.held_out, labels),
        "probability": evidence.probs[rows, labels],
        "loss": _mean(evidence.losses),
        "margin": _mean(evidence.margins),
        "correct": evidence.correct,
    }
    ranking = RULES[rule](evidence, by_model)
    if (unknown := np.isnan(ranking)).any():
        ranking = np.where(unknown, np.nanmedian(ranking), ranking)
    p_wrong = np.clip(_in_order(by_model, ranking), 0.0, 1.0).astype(np.float32)
    return Suspects(p_wrong, posterior.argmax(axis=1), model, statistics)


def _in_order(values: NDArray[np.float64], ranking: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values in the order of a ranking, the lowest to the lowest; equal ranks share their mean.

    >>> _in_order(np.array([0.9, 0.1, 0.5]), np.array([1.0, 2.0, 2.0])).round(2).tolist()
    [0.1, 0.7, 0.7]
    """
    _, inverse, counts = np.unique(ranking, return_inverse=True, return_counts=True)
    ordered = np.sort(values)
    sums = np.add.reduceat(ordered, np.cumsum(counts) - counts) if ordered.size else ordered
    shared: NDArray[np.float64] = (sums / counts)[inverse]
    return shared


def _spread(found: Suspects, labels: NDArray[np.int64], predicted: NDArray[np.bool_]) -> Suspects:
    """Return the suspects among all samples, of which only some have predictions."""
    joint = found.model.joint
    sizes = joint.sum(axis=1)
    right = np.divide(joint.diagonal(), sizes, out=np.full(sizes.size, 1.0 - found.model.noise_rate), where=sizes > 0)
    p_wrong, suggested = np.clip(1.0 - right[labels], 0.0, 1.0).astype(np.float32), labels.copy()
    p_wrong[predicted], suggested[predicted] = found.p_wrong, found.suggested
    statistics = {name: np.full(labels.size, np.nan, dtype=np.float32) for name in found.statistics}
    for name, values in found.statistics.items():
        statistics[name][predicted] = values
    return Suspects(p_wrong, suggested, found.model, statistics)


def label_margins(probs: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the probability of each label minus the largest other one, (N,) in [-1, 1]; 1 with a single class."""
    rows = np.arange(labels.size)
    others = probs.copy()
    others[rows, labels] = -1.0
    margins: NDArray[np.float32] = probs[rows, labels] - np.maximum(others.max(axis=1), 0.0)
    return margins


def _ensemble(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    own, margins, losses = normal_scores(by_model), -_mean(evidence.margins), _mean(evidence.losses)
    observed = losses if np.isnan(margins).all() else margins
    known = ~np.isnan(observed)
    other = own.copy()
    other[known] = normal_scores(observed[known])
    return own + other


def _held_out(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    return by_model


def _probability(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    return -evidence.probs[np.arange(evidence.labels.size), evidence.labels].astype(np.float64)


def _margin(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    return -_mean(evidence.margins).astype(np.float64)


def _loss_mixture(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability of the upper component of the losses of the same label (Arazo et al., ICML 2019)."""
    losses = _mean(evidence.losses).astype(np.float64)
    known = ~np.isnan(losses)
    upper = np.full(losses.size, np.nan)
    for label in np.unique(evidence.labels[known]):
        rows = np.flatnonzero((evidence.labels == label) & known)
        upper[rows] = fit_mixture(losses[rows]).posterior(losses[rows])
    return upper + 1e-9 * normal_scores(losses)  # among equal ones, the higher loss


def _confident_joint(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    """Confident learning's order: the margins of the label, those that disagree with the joint's class first."""
    return -label_margins(evidence.held_out, evidence.labels).astype(np.float64)


def _agreement(evidence: Evidence, by_model: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lowest rank of the loss among the runs: a suspect has a high loss in all of them."""
    ranks = np.stack([normal_scores(np.nan_to_num(losses, nan=np.inf)) for losses in evidence.losses])
    lowest: NDArray[np.float64] = np.where(np.isnan(evidence.losses).all(axis=0), np.nan, ranks.min(axis=0))
    return lowest


def normal_scores(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the normal quantiles of the ranks of (N,) values; equal values have their mean rank.

    >>> normal_scores(np.array([5.0, 1.0, 5.0])).round(2).tolist()
    [0.43, -0.97, 0.43]
    """
    from scipy.special import ndtri

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle_ranks = np.cumsum(counts) - counts / 2.0
    scores: NDArray[np.float64] = ndtri(middle_ranks / values.size)[inverse]
    return scores


class _Mean:
    """The mean of arrays of one shape, of what is not NaN; NaN where nothing is known."""

    def __init__(self) -> None:
        self._sum, self._count = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int16)

    def add(self, values: NDArray[Any]) -> None:
        if not self._sum.size:
            self._sum, self._count = np.zeros(values.shape, np.float32), np.zeros(values.shape, np.int16)
        known = ~np.isnan(values)
        np.add(self._sum, values, out=self._sum, where=known)
        self._count += known

    def result(self) -> NDArray[np.float32]:
        """Return the mean, an array of size 0 if none was added; no more can be added then."""
        self._sum[self._count == 0] = np.nan
        return np.divide(self._sum, np.maximum(self._count, 1), out=self._sum)


def _mean(columns: Iterable[NDArray[Any]]) -> NDArray[np.float32]:
    mean = _Mean()
    for column in columns:
        mean.add(column)
    return mean.result()


# How samples are ranked by each rule: the higher, the more probably wrong.
RULES: dict[str, Callable[[Evidence, NDArray[np.float64]], NDArray[np.float64]]] = {
    "ensemble": _ensemble,
    "held_out": _held_out,
    "probability": _probability,
    "margin": _margin,
    "loss_mixture": _loss_mixture,
    "confident_joint": _confident_joint,
    "agreement": _agreement,
}
# The evidence that a rule cannot do without.
_NEEDS = {"margin": "margins", "loss_mixture": "losses", "agreement": "losses"}
