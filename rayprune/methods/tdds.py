"""TDDS: keep the samples whose training dynamics vary most, scored while the model trains.

Zhang et al., "Spanning Training Progress: Temporal Dual-Depth Scoring (TDDS) for Enhanced Dataset Pruning", CVPR 2024,
arXiv 2311.13613. With p_t a sample's probabilities at its visit in epoch t, as the reference program computes them:
    change     D_t = Σ_c |p_t[c]·(ln(p_t[c]+ε) − ln(p_{t−1}[c]+ε))|, ε = 1e-8: absolute for each class, no KL divergence
    variation  R_k = sqrt(Σ (D − mean D)²) over the J−1 changes of window k, which covers the epochs k … k+J−1
    score      S = Σ_k β(1−β)^{K−1−k} R_k over the K = T−J+1 windows: the newest weighs most
No trajectory is kept: the table has a sample's last probabilities, a ring of its last J−1 changes and S, which every
epoch turns into (1−β)S + βR: 4C + 4(J−1) + 4 bytes a sample (2C with float16), whatever T is.

Epochs 0 … T−1 train on everything, epoch T and all later ones on the subset. The engine's two stages take the selection
of epoch T and train a fresh network on it; in a loop of one's own that goes on, the same network trains on the subset.

Deviations from the reference program, all on purpose: ties go to the lower id; refused are J < 3 (every score is 0),
float16 probabilities (NaN scores there), two different observations of a sample in one epoch, and a missing one (there
a NaN counts as most important); N − floor(r·N) samples are kept of any N; equal scores give weights of 1 (there 0/0).

Shapes: N samples, B observed, C classes, J window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core import trajectory
from rayprune.core.choosing import choose
from rayprune.core.context import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.methods.base import Method, check_static_ratio, num_pruned
from rayprune.methods.registry import register


@register("tdds")
@dataclass(frozen=True)
class TDDS(Method):
    """Keep the samples whose probabilities changed most unevenly in the first T epochs.

    Args:
        prune_ratio: r, the share of all samples that is dropped, in [0, 1); no schedule.
        trajectory_len: T, how many epochs are scored; the paper has (T, J) = (90, 10) for CIFAR-100 at 30 %.
        window_size: J, how many epochs a window has, in [3, T]; the paper has (10, 5) at 90 %.
        decay: β in (0, 1], the weight of the newest window.
        also: further (T, J) pairs that the same run scores; the main pair chooses the subset.
        storage: how the last probabilities are kept: float32, or float16 in half the memory.
        batch_mean_weights: weigh each batch by the mean of its min-max-normalised scores, as the reference does: one
            scalar a batch is a random learning rate and no weight of a sample, so off.
    """

    kind = "static"
    paper = "Zhang et al., CVPR 2024, arXiv 2311.13613"
    signals = ("probs",)
    fixed = True
    choosing = ("prune_ratio", "batch_mean_weights", "class_floor")

    prune_ratio: float | Any = 0.5  # Any: a schedule is refused in words of our own
    trajectory_len: int = 10
    window_size: int = 10
    decay: float = 0.9
    also: tuple[tuple[int, int], ...] = ()
    storage: trajectory.Storage = "float32"
    batch_mean_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_static_ratio("prune_ratio", self.prune_ratio)
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay {self.decay!r} is outside (0, 1]: 1 takes the last window alone")
        trajectory.check_pairs(self._pairs)

    @property
    def collect_epochs(self) -> int:
        """The largest T."""
        return max(self._pairs)[0]

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (T, J), the main one first."""
        return ((self.trajectory_len, self.window_size), *self.also)

    @property
    def _longest(self) -> dict[int, int]:
        """The largest T of each J."""
        return {window: length for length, window in sorted(self._pairs)}

    @property
    def _column_of(self) -> dict[tuple[int, int], str]:
        """The score column of each (T, J): S of its J, or a copy of it where S goes on to a larger T."""
        return {(t, j): f"running_J{j}" if t == self._longest[j] else f"score_T{t}_J{j}" for t, j in self._pairs}

    def columns(self) -> Mapping[str, Any]:
        """Return the last probabilities, one ring of changes for all pairs, and their scores."""
        scores = dict.fromkeys(self._column_of.values(), "float32")
        return {"previous": (self.storage, (None,)), "changes": ("float32", (max(self._longest) - 1,)), **scores}

    def check(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> NDArray[np.bool_]:
        """Refuse what is no probability or out of turn; leave out repeats and what comes after the trajectory."""
        last_B, probs_BC = table.last_visit[ids], signals["probs"]
        trajectory.check_turn(last_B, ids, epoch, self.collect_epochs)
        if epoch >= self.collect_epochs:
            return np.zeros(ids.size, dtype=bool)
        trajectory.check_probs(ids, probs_BC, table["previous"].shape[1])
        again: NDArray[np.bool_] = last_B == epoch
        if again.any():
            given_BC = trajectory.stored(probs_BC[again], self.storage)
            trajectory.check_repeats(ids[again], given_BC, table["previous"][ids[again]], epoch)
        return ~again

    def fold(self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int) -> None:
        """Carry changes and scores on to this epoch's (B, C) probabilities, and keep these for the next."""
        probs_BC, ring = signals["probs"], table["changes"].shape[1]
        previous_NC = table.widen("previous", probs_BC.shape[1])
        for rows in trajectory.row_chunks(*probs_BC.shape):
            part, now_BC = ids[rows], trajectory.stored(probs_BC[rows], self.storage)
            if epoch > 0:
                before_BC = trajectory.restored(previous_NC[part])
                table["changes"][part, (epoch - 1) % ring] = trajectory.changes(trajectory.restored(now_BC), before_BC)
                self._carry_on(table, part, epoch)
            previous_NC[part] = now_BC

    def _carry_on(self, table: ScoreTable, ids: NDArray[np.int64], epoch: int) -> None:
        """Add the window that ends with this epoch to S of every J, and copy S where a smaller T is reached."""
        ring_BW = table["changes"][ids]
        for window, length in self._longest.items():
            if window - 1 <= epoch < length:
                newest = np.arange(epoch - window + 1, epoch) % ring_BW.shape[1]
                running = table[f"running_J{window}"]
                before_B = running[ids].astype(np.float64) if epoch >= window else 0.0
                running[ids] = (1.0 - self.decay) * before_B + self.decay * trajectory.variation(ring_BW[:, newest])
                if (epoch + 1, window) in self._pairs and epoch + 1 < length:
                    table[self._column_of[epoch + 1, window]][ids] = running[ids]

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return `tdds` of the main pair and `tdds_T30_J10` of others, (N,) float32; NaN where visits are missing."""
        found: dict[str, NDArray[Any]] = {}
        for (length, window), column in self._column_of.items():
            name = f"tdds_T{length}_J{window}" if found else "tdds"
            found[name] = np.where(table.last_visit >= length - 1, table[column], np.float32(np.nan))
        return found

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep everything for T epochs, which miss no sample, and the N − floor(r·N) highest scores from then on."""
        trajectory.check_whole(table.last_visit, context.epoch, self.collect_epochs, context.num_epochs)
        if context.epoch < self.collect_epochs:
            return Selection.full(context.num_samples)
        scores, num = self.scores(table)["tdds"], context.num_samples
        drops = min(num_pruned(self.prune_ratio, num), num - 1)
        ids = choose(scores, num - drops).ids
        weights = trajectory.normalised(scores[ids]) if self.batch_mean_weights else None
        chosen = Selection.of_ids(ids, num, weights=weights, requested=self.prune_ratio, expected_drops=drops)
        pair = {"trajectory_len": self.trajectory_len, "window_size": self.window_size}
        chosen = chosen.telling(score="tdds", threshold=float(scores[ids].min()), **pair)
        return replace(chosen, batch_mean_weights=self.batch_mean_weights)
