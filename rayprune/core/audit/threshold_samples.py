"""Threshold samples: from which margin on is a label wrong (AUM: Pleiss et al., NeurIPS 2020, arXiv 2001.10528)?

In every run of an audit, some N/(C + 1) samples get an extra class, C, which is wrong for all of them. Their margins
are those of labels that have to be memorized, and the 99th percentile is the threshold: a label whose margin is not
above it is probably wrong. Each run draws other samples, so that a sample has margins of its own label in most runs.

Ours: as many runs as the audit has folds, instead of two; margins are relative to the threshold of their run before
they are averaged.

Shapes: N samples, C classes, M threshold samples, R runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.table import Ids

_DRAW = 7  # keeps the generator apart from others of the seed
_PERCENTILE = 99.0


def draw_threshold_samples(num_samples: int, num_classes: int, seed: int, number: int = 0) -> Ids:
    """Return the ids of a run's threshold samples, (M,) ascending.

    Args:
        num_samples: N.
        num_classes: C, the extra class apart.
        seed: of all runs that divide the samples into the same folds.
        number: which of these runs; their threshold samples differ as long as there are enough.

    >>> draw_threshold_samples(8, 3, seed=0), draw_threshold_samples(8, 3, seed=0, number=1)
    (array([1, 3]), array([0, 7]))
    """
    size = max(1, num_samples // (num_classes + 1))
    order = np.random.default_rng([seed, 0, _DRAW]).permutation(num_samples)
    return np.sort(order[np.arange(number * size, (number + 1) * size) % num_samples])


def without_threshold_samples(columns: Mapping[str, NDArray[Any]], drawn: Ids) -> dict[str, NDArray[Any]]:
    """Return a run's columns of `CrossFit` for the C classes, with margins relative to the run's threshold.

    Threshold samples have no training visits; margins are NaN if the run trained on no threshold sample.

    Args:
        columns: `probs` and `held_out` (N, C + 1), `loss`, `margin` and `correct` (N,).
        drawn: (M,) the run's threshold samples.
    """
    found = {name: columns[name].copy() for name in ("probs", "loss", "margin", "correct")}
    known = found["margin"][drawn]
    known = known[~np.isnan(known)]
    found["margin"] -= np.percentile(known, _PERCENTILE).astype(np.float32) if known.size else np.float32(np.nan)
    for column in found.values():
        column[drawn] = np.nan
    found["probs"] = _without_last_class(found["probs"])
    return {**found, "held_out": _without_last_class(columns["held_out"])}


def rate_by_threshold_samples(margins: NDArray[np.float32]) -> float:
    """Return the share of samples whose mean margin, relative to the thresholds, is not above 0.

    Args:
        margins: (R, N) of R runs, NaN for none.
    """
    known = ~np.isnan(margins)
    means = np.where(known, margins, 0.0).sum(axis=0)[known.any(axis=0)]
    return float(np.mean(means <= 0.0)) if means.size else float("nan")


def _without_last_class(probs: NDArray[Any]) -> NDArray[Any]:
    rest = probs[:, :-1]
    sums = rest.sum(axis=1, keepdims=True)
    # Where the extra class has everything, the others are equally probable.
    return np.where(sums > 0, rest / np.where(sums > 0, sums, 1.0), np.where(np.isnan(sums), sums, 1 / rest.shape[1]))
