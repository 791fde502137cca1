"""Which labels are wrong, and how often: a model of label noise, fitted to out-of-fold probabilities.

A network that is trained on noisy labels predicts the given label y, not the true class t. With T the probabilities
P(y | t) of the noise, the likelihood of the given labels is

    L(β, T) = Σ_i log Σ_t q_β(t | x_i) · T[t, y_i],    q_β = softmax(β · log p(· | x_i)),

where p are probabilities of networks that did not train on sample i, and β sharpens them: noise flattens what a network
predicts, and q must be what it would predict without. T is fitted by expectation maximization (Dawid and Skene, Applied
Statistics 1979) for every β, and the β of the highest likelihood is taken.

The likelihood alone cannot tell noise from doubt: probabilities of 0.65 and 0.35 for every sample of a class may be
35 % of wrong labels, or samples that are between two classes. Where the network is surest of a class, doubt is small,
and the labels show the noise (anchor points: Patrini et al., CVPR 2017, arXiv 1609.03683). So T has a Dirichlet prior,
ours: in each class that is predicted, the frequencies of the labels among the tenth of the samples with the highest
probability, at least 50, weigh as much as all samples of the class. A network that has learned little is not sure of
anything, and gives no such prior. The posterior

    P(t | x_i, y_i) ∝ q_β(t | x_i) · T[t, y_i]

gives the probability that the label is wrong, the likely label, the noise rate and the rate of each pair of classes.

The noise is assumed to depend on the true class alone. Where it depends on the sample as well, hard samples are
suspected too rarely or too often.

`confident_joint` is the estimate of confident learning (Northcutt, Jiang, Chuang, JAIR 2021, arXiv 1911.00068), for
comparison: it counts a sample for class j where p_j exceeds the mean p_j of the samples labeled j, so that a network
which is often wrong counts its own errors as label errors.

Shapes: N samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import rows_by_label
from rayprune.core.table import chunks

# Of the probabilities that are fitted, and samples per class: a random part of the samples where there are more.
_FIT_NUMBERS, _FIT_SAMPLES = 5_000_000, 20
_ITERATIONS = 60
_SHARPEST, _TOLERANCE = 6.0, 0.02  # of β
_ANCHOR_SHARE, _LEAST_ANCHORS = 0.1, 50  # of the samples predicted to be of a class: where the network is surest
_UNPREDICTED_DIAGONAL = 0.8  # of T, to start from, for a class that is never predicted
_LEAST_LEARNED = 0.4  # of a network whose predictions say much of labels
_TINY = 1e-12


@dataclass(frozen=True)
class NoiseModel:
    """A fitted model of label noise.

    Attributes:
        sharpness: β.
        transition: (C, C) float64, T: rows are true classes, columns given labels.
        joint: (C, C) float64, the share of samples with a given label (row) and a true class (column); sums to 1.
        learned: the share of the given labels that is predicted, from 0 at the share of the largest class to 1.
    """

    sharpness: float
    transition: NDArray[np.float64]
    joint: NDArray[np.float64]
    learned: float = 1.0

    @property
    def is_weak(self) -> bool:
        """Whether the predictions are right too rarely to tell wrong labels from hard samples."""
        return self.learned < _LEAST_LEARNED

    @property
    def noise_rate(self) -> float:
        """The share of wrong labels."""
        return float(1.0 - np.trace(self.joint))

    def posterior(self, probs: NDArray[Any], labels: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return P(t | x, y) of samples, (N, C) float32."""
        posterior = np.empty(probs.shape, dtype=np.float32)
        for rows in chunks(*probs.shape):
            posterior[rows] = _posterior(_sharpened(probs[rows], self.sharpness), labels[rows], self.transition)[0]
        return posterior


def fit_noise(probs: NDArray[Any], labels: NDArray[np.integer[Any]], rng: np.random.Generator) -> NoiseModel:
    """Fit the model of label noise.

    Args:
        probs: (N, C) probabilities of networks that did not train on the sample; rows with NaN are left out.
        labels: (N,) the given labels, in [0, C).
        rng: draws the samples to fit where there are very many.
    """
    num_classes = probs.shape[1]
    rows = np.flatnonzero(np.isfinite(probs).all(axis=1))
    most = max(_FIT_NUMBERS // num_classes, _FIT_SAMPLES * num_classes)
    if rows.size > most:
        rows = np.sort(rng.choice(rows, size=most, replace=False))
    logs, given = np.log(np.maximum(probs[rows].astype(np.float64), _TINY)), labels[rows]
    learned = _learned(logs, given)
    start, prior = _anchors(logs, given) if learned >= _LEAST_LEARNED else _uninformed(num_classes)
    fits: dict[float, tuple[float, NDArray[np.float64], NDArray[np.float64]]] = {}

    def likelihood(log_sharpness: float) -> float:
        if log_sharpness not in fits:
            fits[log_sharpness] = _fit_transition(_softmax(logs * math.exp(log_sharpness)), given, start, prior)
        return fits[log_sharpness][0]

    best = _maximum(likelihood, 0.0, math.log(_SHARPEST))
    _, transition, joint = fits[best]
    return NoiseModel(math.exp(best), transition, joint, learned)


def _learned(logs: NDArray[np.float64], labels: NDArray[np.integer[Any]]) -> float:
    """Return how many of the labels are predicted, from 0 at the share of the largest class to 1."""
    if not labels.size:
        return 0.0
    right = float(np.mean(logs.argmax(axis=1) == labels))
    chance = float(np.bincount(labels).max() / labels.size)
    return (right - chance) / (1.0 - chance) if chance < 1.0 else right


def _uninformed(num_classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a T to start from, and no weight of it, (C, C) each."""
    transition = np.full((num_classes, num_classes), (1 - _UNPREDICTED_DIAGONAL) / max(1, num_classes - 1))
    np.fill_diagonal(transition, _UNPREDICTED_DIAGONAL if num_classes > 1 else 1.0)
    return transition, np.zeros_like(transition)


def _anchors(
    logs: NDArray[np.float64], labels: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return T by the labels of the samples of which the network is surest, and its weight in samples, (C, C) each."""
    num_classes = logs.shape[1]
    transition, prior = _uninformed(num_classes)
    predicted = logs.argmax(axis=1)
    for label, rows in zip(np.unique(predicted), rows_by_label(predicted), strict=True):
        count = max(_LEAST_ANCHORS, int(_ANCHOR_SHARE * rows.size))
        surest = rows[np.argsort(-logs[rows, label], kind="stable")[:count]]
        transition[label] = np.bincount(labels[surest], minlength=num_classes) / surest.size
        prior[label] = transition[label] * rows.size
    return transition, prior


def _fit_transition(
    beliefs: NDArray[np.float64],
    labels: NDArray[np.integer[Any]],
    start: NDArray[np.float64],
    prior: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the log-likelihood per sample, T and the joint of given labels and true classes."""
    num, num_classes = beliefs.shape
    transition = start
    order = np.argsort(labels, kind="stable")
    beliefs, labels = beliefs[order], labels[order]
    present, starts = np.unique(labels, return_index=True)
    for _ in range(_ITERATIONS):
        posterior, likelihood = _posterior(beliefs, labels, transition)
        counts = np.zeros((num_classes, num_classes))  # given, true
        counts[present] = np.add.reduceat(posterior, starts, axis=0)
        # One sample's worth of noise in every row, so that no transition is impossible for being rare.
        smoothed = counts.T + prior + 1.0 / num_classes
        transition = smoothed / smoothed.sum(axis=1, keepdims=True)
    return float(np.log(likelihood).mean()), transition, counts / num


def _posterior(
    beliefs: NDArray[np.float64], labels: NDArray[np.integer[Any]], transition: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    posterior = beliefs * transition[:, labels].T
    likelihood = np.maximum(posterior.sum(axis=1), 1e-300)
    return posterior / likelihood[:, None], likelihood


def _sharpened(probs: NDArray[Any], sharpness: float) -> NDArray[np.float64]:
    return _softmax(np.log(np.maximum(probs.astype(np.float64), _TINY)) * sharpness)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return softmax


def _maximum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one maximum in an interval is largest, by golden sections."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    while high - low > _TOLERANCE:
        if function(left) >= function(right):
            high, right, left = right, left, right - ratio * (right - low)
        else:
            low, left, right = left, right, left + ratio * (high - left)
    return left if function(left) >= function(right) else right


def confident_joint(probs: NDArray[Any], labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the joint distribution of given labels (rows) and true classes (columns) by confident learning, (C, C).

    Rows are calibrated to the numbers of given labels; a class whose samples are all unconfident counts as correct.
    Samples with NaN are left out.

    >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    >>> confident_joint(probs, np.array([0, 0, 0, 1])).tolist()
    [[0.5, 0.25], [0.0, 0.25]]
    """
    num_classes = probs.shape[1]
    known = np.isfinite(probs).all(axis=1)
    if not known.all():
        probs, labels = probs[known], labels[known]
    own = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0].astype(np.float64)
    sizes = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=own, minlength=num_classes)
    thresholds = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
    counts = np.zeros((num_classes, num_classes))
    for rows in chunks(*probs.shape):
        confident = np.where(probs[rows] >= thresholds, probs[rows], -1.0)
        likely = confident.argmax(axis=1)
        some = np.take_along_axis(confident, likely[:, None], axis=1)[:, 0] >= 0.0
        np.add.at(counts, (labels[rows][some], likely[some]), 1.0)
    empty = counts.sum(axis=1) == 0
    counts[empty, empty] = 1.0
    joint = counts / counts.sum(axis=1, keepdims=True) * sizes[:, None]
    shares: NDArray[np.float64] = joint / max(1, labels.size)
    return shares
