"""Cross-fitting: K runs, each of which trains on all folds but one and predicts the samples of that one.

So every sample is predicted by a network that has never seen its label (out of fold), as confident learning needs it
(Northcutt, Jiang, Chuang, JAIR 2021, arXiv 1911.00068), and trained on in K − 1 runs, whose dynamics say how well its
label fits the others (AUM: Pleiss et al., NeurIPS 2020, arXiv 2001.10528). With K = 1, one run trains on all samples,
and its training visits give everything.

The table keeps running means, so that its size does not depend on the number of epochs.

Shapes: N samples, B observed, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError

_FOLDS = 6  # keeps the generator of the folds apart from those of selections and plans


@dataclass(frozen=True)
class CrossFit(Method):
    """Train on all folds but one, and predict that one after each of the last epochs.

    Columns: `held_out` (N, C), the mean probabilities of the sweeps over the fold; `probs` (N, C), `loss` and `margin`
    (between the label's logit and the largest other one), means over the training visits after the first epochs;
    `correct`, the share of all training visits in which the label was predicted. A sample of the fold has only
    `held_out`, the others have all but that.

    Args:
        folds: K ≥ 1; 1 trains on all samples.
        left_out: which fold is left out, in [0, K).
        window: the number of last epochs after which the fold is predicted.
        skip: the number of first epochs whose visits count for `correct` alone; early ones tell labels apart less well.
        stratify: divide each class evenly among the folds; not where labels differ between the runs.
    """

    kind = "control"
    keeps = "all folds but one"
    paper = "Northcutt et al., JAIR 2021, arXiv 1911.00068"
    signals = ("probs", "loss", "logit_margin", "correct")
    sweep_signals = ("probs",)

    folds: int = 5
    left_out: int = 0
    window: int = 5
    skip: int = 0
    stratify: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 1 or not 0 <= self.left_out < self.folds:
            raise ConfigError(f"left_out {self.left_out} of {self.folds} folds: both count from 0, folds is at least 1")
        if self.window < 1 or self.skip < 0:
            raise ConfigError(f"window {self.window} must be at least 1, and skip {self.skip} at least 0")

    def columns(self) -> Mapping[str, Any]:
        """Return the columns; the first observation sets the length of the vectors, C."""
        vectors = dict.fromkeys(("held_out", "probs"), (np.float32, (None,)))
        means = dict.fromkeys(("loss", "margin", "correct"), np.float32)
        return {**vectors, **means, **dict.fromkeys(("visits", "late_visits", "sweeps"), np.int32)}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep the other folds; in the last epochs, predict the one left out.

        Raises:
            ConfigError: there are fewer samples than folds.
        """
        if context.num_samples < self.folds:
            raise ConfigError(f"{context.num_samples} samples do not fill {self.folds} folds: use fewer")
        if self.folds == 1:
            return Selection.full(context.num_samples)
        labels = context.labels if self.stratify else None
        left_out = folds_of(context.num_samples, self.folds, context.seed, labels) == self.left_out
        num = int(np.count_nonzero(left_out))
        selection = Selection.of_mask(~left_out, num / context.num_samples, num)
        predicts = context.epoch >= context.num_epochs - self.window
        return replace(selection, sweep=np.flatnonzero(left_out)) if predicts else selection

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Mask a visit that was folded already."""
        fresh: NDArray[np.bool_] = table.last_visit[ids] != epoch
        return fresh

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Add a training visit to the means."""
        table["visits"][ids] += 1
        count = table["visits"][ids]
        add_to_mean(table["correct"], ids, signals["correct"], count)
        if epoch < self.skip:
            return
        table["late_visits"][ids] += 1
        count = table["late_visits"][ids]
        add_to_mean(table.widen("probs", signals["probs"].shape[1]), ids, signals["probs"], count)
        for column, signal in (("loss", "loss"), ("margin", "logit_margin")):
            add_to_mean(table[column], ids, signals[signal], count)

    def fold_sweep(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Add a prediction of the fold to its mean."""
        table["sweeps"][ids] += 1
        column = table.widen("held_out", signals["probs"].shape[1])
        add_to_mean(column, ids, signals["probs"], table["sweeps"][ids])


def folds_of(
    num_samples: int, num_folds: int, seed: int, labels: NDArray[np.integer[Any]] | None = None
) -> NDArray[np.int64]:
    """Divide the samples at random into folds of equal size, or one more; with labels, each class as well.

    Returns:
        (N,) the fold of each sample, in [0, K).

    >>> np.bincount(folds_of(7, 3, seed=0)).tolist()
    [3, 2, 2]
    """
    order = np.random.default_rng([seed, 0, _FOLDS]).permutation(num_samples)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(num_samples, dtype=np.int64)
    folds[order] = np.arange(num_samples) % num_folds
    return folds


def add_to_mean(column: NDArray[Any], ids: Ids, values: NDArray[Any], count: NDArray[np.int32]) -> None:
    """Add (B, …) values to the running means of (B,) distinct ids, of which each has `count` values then."""
    count_B = count.reshape(-1, *[1] * (values.ndim - 1))
    before = np.where(count_B == 1, 0.0, column[ids])
    column[ids] = before + (values - before) / count_B
