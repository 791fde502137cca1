"""TDDS: keep the samples whose training dynamics vary most, scored while the model trains.

Zhang et al., "Spanning Training Progress: Temporal Dual-Depth Scoring (TDDS) for Enhanced Dataset Pruning", CVPR 2024,
arXiv 2311.13613. With p_t a sample's probabilities at its visit in epoch t, as the reference program computes them:
    change     D_t = Σ_c |p_t[c]·(ln(p_t[c]+ε) − ln(p_{t−1}[c]+ε))|, ε = 1e-8: absolute per class, not a KL divergence
    variation  R_k = sqrt(Σ (D − mean D)²) over the J−1 changes of window k, which covers the epochs k … k+J−1
    score      S = Σ_k β(1−β)^{K−1−k} R_k over the K = T−J+1 windows: the newest has the most weight
No trajectory is stored: the table has a sample's last probabilities, a ring of its last J−1 changes, and S, which each
epoch updates to (1−β)S + βR: 4C + 4(J−1) + 4 bytes per sample (2C with float16), whatever T is.

Epochs 0 … T−1 train on all samples, epoch T and all later ones on the subset. The engine's two stages take the
selection of epoch T and train a fresh network on it; in a custom loop the same network continues on the subset.

Deliberate deviations from the reference program: ties go to the lower id; J < 3 (every score is 0), float16
probabilities (NaN scores there), two different observations of a sample in one epoch, and a missing one (there a NaN
counts as most important) are refused; N − floor(r·N) samples are kept for any N; equal scores give weights of 1
(there 0/0).

Shapes: N samples, B observed, C classes, J window, W changes in a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.static import StaticMethod, check_equal
from rayprune.core.choosing import choose
from rayprune.core.method import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals, chunks
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

Storage = Literal["float32", "float16"]

_EPSILON = np.float32(1e-8)
_HALF_SCALE = np.float32(2.0**15)  # float16 is precise down to 6e-5, and p·2^15 therefore to 2e-9, below ε
_SUM_TOLERANCE = 1e-3


@register("tdds")
@dataclass(frozen=True)
class TDDS(StaticMethod):
    """Keep the samples whose probabilities changed most unevenly in the first T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        trajectory_len: T, the number of epochs to score; the paper has (T, J) = (90, 10) for CIFAR-100 at 30 %.
        window_size: J, the number of epochs in a window, in [3, T]; the paper has (10, 5) at 90 %.
        decay: β in (0, 1], the weight of the newest window.
        also: further (T, J) pairs to score in the same run; the main pair chooses the subset.
        storage: how the last probabilities are stored: float32, or float16 in half the memory.
        batch_mean_weights: weigh each batch by the mean of its scores, min-max-normalized over all N samples, as the
            reference does. One scalar per batch acts as a random learning rate and not as a weight of samples, so the
            default is off.
    """

    keeps = "the most uneven in their predictions"
    paper = "Zhang et al., CVPR 2024, arXiv 2311.13613"
    signals = ("probs",)
    every_visit = True
    selection_fields = ("prune_ratio", "batch_mean_weights", "class_floor")
    _length_field = "trajectory_len"

    trajectory_len: int = 10
    window_size: int = 10
    decay: float = 0.9
    also: tuple[tuple[int, int], ...] = ()
    storage: Storage = "float32"
    batch_mean_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"decay {self.decay!r} is outside (0, 1]: 1 uses the last window alone")
        _check_pairs(self._pairs)

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
        """The score column of each (T, J): S of its J, or a copy of it if S continues to a larger T."""
        return {(t, j): f"running_J{j}" if t == self._longest[j] else f"score_T{t}_J{j}" for t, j in self._pairs}

    def columns(self) -> Mapping[str, Any]:
        """Return the last probabilities, one ring of changes for all pairs, and the scores."""
        scores = dict.fromkeys(self._column_of.values(), "float32")
        return {"previous": (self.storage, (None,)), "changes": ("float32", (max(self._longest) - 1,)), **scores}

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Refuse invalid probabilities and visits out of order; mask repeats and visits after the trajectory."""
        if epoch < self.collect_epochs:
            _check_probs(ids, signals["probs"], table["previous"].shape[1])
        return super().check(table, ids, signals, epoch)

    def _check_repeats(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        new_BC = encode_probs(signals["probs"], self.storage)
        check_equal(ids, new_BC, table["previous"][ids], "probabilities", epoch)

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Update changes and scores with this epoch's (B, C) probabilities, and store these for the next epoch."""
        probs_BC, ring = signals["probs"], table["changes"].shape[1]
        previous_NC = table.widen("previous", probs_BC.shape[1])
        for rows in chunks(*probs_BC.shape):
            part, now_BC = ids[rows], encode_probs(probs_BC[rows], self.storage)
            if epoch > 0:
                before_BC = decode_probs(previous_NC[part])
                table["changes"][part, (epoch - 1) % ring] = changes(decode_probs(now_BC), before_BC)
                self._update_scores(table, part, epoch)
            previous_NC[part] = now_BC

    def _update_scores(self, table: ScoreTable, ids: Ids, epoch: int) -> None:
        """Add the window that ends with this epoch to S of every J, and copy S where a smaller T is reached."""
        ring_BW = table["changes"][ids]
        for window, length in self._longest.items():
            if window - 1 <= epoch < length:
                newest = np.arange(epoch - window + 1, epoch) % ring_BW.shape[1]
                running = table[f"running_J{window}"]
                before_B = running[ids].astype(np.float64) if epoch >= window else 0.0
                running[ids] = (1.0 - self.decay) * before_B + self.decay * variation(ring_BW[:, newest])
                if (epoch + 1, window) in self._pairs and epoch + 1 < length:
                    table[self._column_of[epoch + 1, window]][ids] = running[ids]

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return `tdds` of the main pair, and `tdds_T30_J10` of others, (N,) float32; NaN where visits are missing."""
        scores: dict[str, NDArray[Any]] = {}
        for (length, window), column in self._column_of.items():
            name = f"tdds_T{length}_J{window}" if scores else "tdds"
            scores[name] = np.where(table.last_visit >= length - 1, table[column], np.float32(np.nan))
        return scores

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples for T epochs, which must visit each of them, then the N − floor(r·N) highest scores."""
        selection = super().select(table, context)
        if context.epoch < self.collect_epochs:
            return selection
        return replace(selection, batch_mean_weights=self.batch_mean_weights)

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Choose the highest scores."""
        scores = self.scores(table)["tdds"]
        ids = choose(scores, count).ids
        weights = _min_max_normalize(scores)[ids].astype(np.float32) if self.batch_mean_weights else None
        pair = {"trajectory_len": self.trajectory_len, "window_size": self.window_size}
        return ids, weights, {"score": "tdds", "threshold": float(scores[ids].min()), **pair}


def changes(now: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return D, (B,), of (B, C) probabilities now and before; 0 where they agree.

    >>> changes(np.array([[0.8, 0.2]], np.float32), np.array([[0.5, 0.5]], np.float32)).round(6)
    array([0.559261], dtype=float32)
    """
    # Order "C" whatever the input's: row sums of another layout would round differently.
    logs = np.add(now, _EPSILON, order="C")
    np.log(logs, out=logs)
    old = np.add(before, _EPSILON, order="C")
    np.log(old, out=old)
    logs -= old
    logs *= now
    total: NDArray[np.float32] = np.abs(logs, out=logs).sum(axis=1)
    return total


def variation(window: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return R, (B,), over the columns of (B, W) D, in two passes: running sums would cancel.

    >>> variation(np.array([[1.0, 3.0]], np.float32)).round(6)
    array([1.414214])
    """
    wide = window.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    root: NDArray[np.float64] = np.sqrt(np.square(wide, out=wide).sum(axis=1))
    return root


def encode_probs(probs: NDArray[Any], storage: Storage) -> NDArray[np.floating[Any]]:
    """Return probabilities in [0, 1] in their stored form: float32, or p·2^15 as float16.

    >>> encode_probs(np.array([1.0, 1e-8], np.float32), "float16")
    array([3.277e+04, 3.276e-04], dtype=float16)
    """
    single = np.asarray(probs, dtype=np.float32)
    return single if storage == "float32" else (single * _HALF_SCALE).astype(np.float16)


def decode_probs(encoded: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the float32 probabilities that `encode_probs` encoded, up to rounding."""
    if encoded.dtype == np.float32:
        return encoded
    return encoded.astype(np.float32) / _HALF_SCALE


def _min_max_normalize(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Return scores scaled to [0, 1]; ones if all are equal.

    >>> _min_max_normalize(np.array([3.0, 1.0, 2.0])).tolist(), _min_max_normalize(np.array([2.0, 2.0])).tolist()
    ([1.0, 0.0, 0.5], [1.0, 1.0])
    """
    wide = scores.astype(np.float64)
    span = np.ptp(wide)
    return (wide - wide.min()) / span if span > 0 else np.ones(wide.size)


def _check_pairs(pairs: tuple[tuple[int, int], ...]) -> None:
    for number, (length, window) in enumerate(pairs):
        if window < 3:
            raise ConfigError(f"window_size {window} makes every score 0: it must be at least 3")
        if window > length:
            cure = f"lower it, or raise trajectory_len to at least {window}"
            raise ConfigError(f"window_size {window} is longer than trajectory_len {length}: {cure}")
        if (length, window) in pairs[:number]:
            raise ConfigError(f"also names [{length}, {window}], which is scored already: leave it out")


def _check_probs(ids: Ids, probs: NDArray[Any], num_classes: int) -> None:
    """Raise ConfigError unless `probs` are (B, C) probabilities; `num_classes` is C of earlier epochs, 0 before any."""
    if probs.ndim != 2 or probs.shape[1] < 2:
        raise ConfigError(f"probs of shape {probs.shape} must be (samples, classes), with at least two classes")
    if probs.shape[1] != (num_classes or probs.shape[1]):
        raise ConfigError(f"probs are of {probs.shape[1]} classes, and were of {num_classes} before: use one model")
    if probs.dtype == np.float16:
        cure = "compute it in float32, softmax(logits.float())"
        raise ConfigError(f"probs are float16, in which small probabilities become 0: {cure}")
    wrong = (probs.min(axis=1) < 0) | (np.abs(probs.sum(axis=1, dtype=np.float32) - 1.0) > _SUM_TOLERANCE)
    if wrong.any():
        row = probs[wrong][0]
        values = f"lie in {row.min():.4g} … {row.max():.4g} and sum to {row.sum(dtype=np.float64):.6g}"
        cure = "they must be at least 0 and sum to 1; of logits take softmax(logits.float())"
        raise ConfigError(f"probs of id {ids[wrong][0]} {values}: {cure}")
