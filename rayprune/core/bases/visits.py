"""Base classes of static methods that score by the training visits: means of a signal, and windows of p_y.

Every sample must be visited in each of the T epochs (`StaticMethod.every_visit`). The table has a few numbers per
sample, whatever T is: a running mean in float64, so that equal values have exactly that mean, and the last value or the
last J values.

Shapes: N samples, B observed, J window.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.static import ScoredMethod, check_equal
from rayprune.core.table import Ids, ScoreTable, Signals, chunks
from rayprune.errors import ConfigError


def add_to_mean(column: NDArray[np.float64], ids: Ids, values: NDArray[Any], count: int) -> None:
    """Add the `count`-th values, (B,), of (B,) ids to running means.

    >>> means = np.full(2, np.nan)
    >>> add_to_mean(means, np.array([1]), np.array([4.0]), 1)
    >>> add_to_mean(means, np.array([1]), np.array([1.0]), 2)
    >>> means.tolist()
    [nan, 2.5]
    """
    before = column[ids] if count > 1 else np.zeros(ids.size)
    column[ids] = before + (values.astype(np.float64) - before) / count


@dataclass(frozen=True)
class MeanMethod(ScoredMethod):
    """Score by the mean of one signal, the first of `signals`, over the visits of some epochs."""

    every_visit = True

    @property
    def mean_epochs(self) -> range:
        """The epochs whose visits count, by default all T."""
        return range(self.score_epochs)

    def columns(self) -> Mapping[str, Any]:
        """Return the last value, which tells repeats, and the mean."""
        return {self.signals[0]: np.float32, f"mean_{self.signals[0]}": np.float64}

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Store this epoch's (B,) values, and add them to the means."""
        super().fold(table, ids, signals, epoch)
        name = self.signals[0]
        if epoch in self.mean_epochs:
            add_to_mean(table[f"mean_{name}"], ids, signals[name], epoch - self.mean_epochs.start + 1)

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the means so far, (N,) float32."""
        return table[f"mean_{self.signals[0]}"].astype(np.float32)


@dataclass(frozen=True)
class WindowMethod(ScoredMethod):
    """Score by a mean over all T−J+1 windows of J consecutive epochs of p_y, the label's probability.

    A subclass defines `window_score`.

    Args:
        window_size: J, the number of epochs in a window, in [2, T].
    """

    signals = ("prob_label",)
    every_visit = True

    score_epochs: int = 30
    window_size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size < 2:
            raise ConfigError(f"window_size {self.window_size} has no standard deviation: it must be at least 2")
        if self.window_size > self.score_epochs:
            raise ConfigError(
                f"window_size {self.window_size} is longer than score_epochs {self.score_epochs}: lower it, or raise "
                f"score_epochs to at least {self.window_size}"
            )

    @abc.abstractmethod
    def window_score(self, std: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a window's scores, (B,), from its standard deviations (with J−1) and means of p_y, (B,) each."""

    def columns(self) -> Mapping[str, Any]:
        """Return the ring of the last J values, and the mean over the windows."""
        return {"last_probs": ("float32", (self.window_size,)), "mean_window": np.float64}

    def _check_repeats(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        stored = table["last_probs"][ids, epoch % self.window_size]
        check_equal(ids, signals["prob_label"].astype(np.float32), stored, "prob_label", epoch)

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Store this epoch's (B,) values in the ring, and add the window that ends with it to the mean."""
        window, ring = self.window_size, table["last_probs"]
        ring[ids, epoch % window] = signals["prob_label"]
        if epoch < window - 1:
            return
        for rows in chunks(ids.size, window):
            values = ring[ids[rows]].astype(np.float64)
            # Two passes, as running sums of squares would cancel.
            scores = self.window_score(values.std(axis=1, ddof=1), values.mean(axis=1))
            add_to_mean(table["mean_window"], ids[rows], scores, epoch - window + 2)

    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the means over the windows so far, (N,) float32; NaN before the first."""
        return table["mean_window"].astype(np.float32)
