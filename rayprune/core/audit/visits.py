"""What the training visits of any run say about the labels: the evidence for an audit without runs of its own.

It is what `CrossFit` with one fold collects, beside the score table of whatever method prunes the run. Means are over
the visits in the second half of the epochs, in which labels are told apart better; a sample that was pruned there has
those of its earlier visits.

Shapes: N samples, B observed, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.audit.cross_fit import add_to_mean
from rayprune.core.audit.suspects import Evidence
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError

SIGNALS = ("probs", "loss", "logit_margin", "correct", "prob_label")
_MEANS = ("loss", "logit_margin", "prob_label")
_TOLERANCE = 0.01  # between two means of one probability, float32 each


class TrainingVisits:
    """Means over the training visits of a run.

    Args:
        num_samples: N.
        num_epochs: of the whole run.
    """

    def __init__(self, num_samples: int, num_epochs: int) -> None:
        columns = {"probs": (np.float32, (None,)), **dict.fromkeys((*_MEANS, "correct"), np.float32)}
        counts = dict.fromkeys(("visits", "mean_visits"), np.int32)
        self._late = num_epochs // 2
        self._table = ScoreTable(num_samples, {**columns, **counts}, num_epochs)

    def observe(self, ids: Ids, signals: Signals, epoch: int) -> None:
        """Add a visit of (B,) distinct ids; a second one in the same epoch, or one with a NaN, does not count."""
        table = self._table
        counts = table.last_visit[ids] != epoch
        for name in SIGNALS:
            counts &= np.isfinite(signals[name]).reshape(ids.size, -1).all(axis=1)
        ids, rows = ids[counts], {name: signals[name][counts] for name in SIGNALS}
        # The first late visit replaces the mean of the earlier ones.
        starts_again = (epoch >= self._late) & (table.last_visit[ids] < self._late)
        table.mark_visited(ids, epoch)
        table["visits"][ids] += 1
        add_to_mean(table["correct"], ids, rows["correct"], table["visits"][ids])
        table["mean_visits"][ids] = np.where(starts_again, 1, table["mean_visits"][ids] + 1)
        count = table["mean_visits"][ids]
        add_to_mean(table.widen("probs", rows["probs"].shape[1]), ids, rows["probs"], count)
        for name in _MEANS:
            add_to_mean(table[name], ids, rows[name], count)

    def evidence(self, labels: NDArray[np.int64]) -> Evidence:
        """Return the evidence on the labels; NaN for samples that were never visited.

        Raises:
            ConfigError: nothing was observed, or other labels than these.
        """
        table = self._table
        probs, visited = table["probs"], table["visits"] > 0
        if not visited.any():
            raise ConfigError("no training visit was recorded: call weigh on each batch, and audit() after an epoch")
        outside = visited & ((labels < 0) | (labels >= probs.shape[1]))
        own = probs[np.arange(labels.size), np.where(outside, 0, np.clip(labels, 0, probs.shape[1] - 1))]
        others = outside | (visited & ~(np.abs(own - table["prob_label"]) <= _TOLERANCE))
        if others.any():
            raise ConfigError(
                f"weigh got other targets than the data's labels for {np.count_nonzero(others)} samples, first ids "
                f"{np.flatnonzero(others)[:5].tolist()}: name the column of the targets by label_column="
            )
        columns = {"probs": probs, "loss": table["loss"], "margin": table["logit_margin"], "correct": table["correct"]}
        return Evidence.of_runs(labels, [columns])

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the state as arrays by name, not copied."""
        return self._table.to_arrays()

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a state of `state_dict`."""
        self._table.load_arrays(state)
