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

Samples' probabilities from epoch to epoch: how they are kept, how much they changed, whether they are whole.

Shapes: N samples, B observed, C classes, W changes in a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import choose, num_pruned
from rayprune.core.selection import Selection
from rayprune.core.selector import EpochContext
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods import tdds as trajectory
from rayprune.methods.base import Method, check_static_ratio
from rayprune.methods.registry import register

Storage = Literal["float32", "float16"]

_EPSILON = np.float32(1e-8)
_HALF_SCALE = np.float32(2.0**15)  # float16 is precise down to 6e-5, and p·2^15 therefore to 2e-9, below ε
_CHUNK_NUMBERS = 1 << 16  # so that the temporaries of a chunk stay in the cache
_SUM_TOLERANCE = 1e-3


def row_chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield slices of rows that hold about 65,536 numbers each and cover [0, num_rows).

    >>> list(row_chunks(70_000, 2))
    [slice(0, 32768, None), slice(32768, 65536, None), slice(65536, 70000, None)]
    """
    size = max(1, _CHUNK_NUMBERS // max(num_columns, 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def stored(probs: NDArray[Any], storage: Storage) -> NDArray[np.floating[Any]]:
    """Return probabilities in [0, 1] as they are kept: float32, or p·2^15 as float16.

    >>> stored(np.array([1.0, 1e-8], np.float32), "float16")
    array([3.277e+04, 3.276e-04], dtype=float16)
    """
    single = np.asarray(probs, dtype=np.float32)
    return single if storage == "float32" else (single * _HALF_SCALE).astype(np.float16)


def restored(kept: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the float32 probabilities that `stored` was given, to its rounding."""
    if kept.dtype == np.float32:
        return kept
    return kept.astype(np.float32) / _HALF_SCALE


def changes(now: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return D, (B,): Σ_c |p[c]·(ln(p[c]+ε) − ln(q[c]+ε))| of (B, C) p now and q before, ε = 1e-8; 0 where they agree.

    >>> changes(np.array([[0.8, 0.2]], np.float32), np.array([[0.5, 0.5]], np.float32)).round(6)
    array([0.559261], dtype=float32)
    """
    # Order "C" whatever the input's: sums over rows of another layout would round otherwise.
    logs = np.add(now, _EPSILON, order="C")
    np.log(logs, out=logs)
    old = np.add(before, _EPSILON, order="C")
    np.log(old, out=old)
    logs -= old
    logs *= now
    total: NDArray[np.float32] = np.abs(logs, out=logs).sum(axis=1)
    return total


def variation(window: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return R, (B,): sqrt(Σ (D − mean D)²) over the columns of (B, W) D, in two passes; running sums would cancel.

    >>> variation(np.array([[1.0, 3.0]], np.float32)).round(6)
    array([1.414214])
    """
    wide = window.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    root: NDArray[np.float64] = np.sqrt(np.square(wide, out=wide).sum(axis=1))
    return root


def normalised(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Return scores stretched to [0, 1], the lowest at 0 and the highest at 1; ones where all are equal.

    >>> normalised(np.array([3.0, 1.0, 2.0])).tolist(), normalised(np.array([2.0, 2.0])).tolist()
    ([1.0, 0.0, 0.5], [1.0, 1.0])
    """
    wide = scores.astype(np.float64)
    span = wide.max(initial=-np.inf) - wide.min(initial=np.inf)
    return (wide - wide.min()) / span if span > 0 else np.ones(wide.size)


def check_pairs(pairs: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError unless (T, J) are distinct, with 3 ≤ J ≤ T: trajectories of T epochs in windows of J."""
    for number, (length, window) in enumerate(pairs):
        if window < 3:
            raise ConfigError(f"window_size {window} makes every score 0: it must be at least 3")
        if window > length:
            cure = f"lower it, or raise trajectory_len to at least {window}"
            raise ConfigError(f"window_size {window} is longer than trajectory_len {length}: {cure}")
        if (length, window) in pairs[:number]:
            raise ConfigError(f"also names [{length}, {window}], which is scored already: leave it out")


def check_probs(ids: NDArray[np.int64], probs: NDArray[Any], num_classes: int) -> None:
    """Raise ValueError unless `probs` are (B, C) probabilities of at least float32 that sum to 1.

    Args:
        ids: (B,) whose they are.
        probs: what was observed.
        num_classes: C of the epochs before, 0 in the first.
    """
    if probs.ndim != 2 or probs.shape[1] < 2:
        raise ConfigError(f"probs of shape {probs.shape} must be (samples, classes), with at least two classes")
    if probs.shape[1] != (num_classes or probs.shape[1]):
        raise ConfigError(f"probs are of {probs.shape[1]} classes, and were of {num_classes} before")
    if probs.dtype == np.float16:
        cure = "compute it in float32, softmax(logits.float())"
        raise ConfigError(f"probs are float16, in which small probabilities become 0: {cure}")
    wrong = (probs.min(axis=1) < 0) | (np.abs(probs.sum(axis=1, dtype=np.float32) - 1.0) > _SUM_TOLERANCE)
    if wrong.any():
        row = probs[wrong][0]
        seen = f"lie in {row.min():.4g} … {row.max():.4g} and sum to {row.sum(dtype=np.float64):.6g}"
        cure = "they must be at least 0 and sum to 1; of logits take softmax(logits.float())"
        raise ConfigError(f"probs of id {ids[wrong][0]} {seen}: {cure}")


def check_turn(last_visit: NDArray[np.int32], ids: NDArray[np.int64], epoch: int, length: int) -> None:
    """Raise ValueError where a sample was not visited in the epoch before, or has been visited in a later one.

    Args:
        last_visit: (B,) the epochs of the samples' last visits, -1 for none.
        ids: (B,) of the samples.
        epoch: of the visit that is to be stored.
        length: T, how many epochs the trajectory has; what comes later is not looked at.
    """
    gap = last_visit < min(epoch, length) - 1
    if gap.any():
        row = int(np.argmax(gap))
        seen = f"last visited in epoch {last_visit[row]}" if last_visit[row] >= 0 else "never visited before"
        raise ConfigError(f"id {ids[row]} was {seen} and now comes in epoch {epoch}: {_cure(length)}")
    past = last_visit > epoch
    if past.any() and epoch < length:
        row = int(np.argmax(past))
        raise ConfigError(f"id {ids[row]} comes in epoch {epoch} and came in epoch {last_visit[row]} before: sort them")


def check_repeats(ids: NDArray[np.int64], given: NDArray[Any], kept: NDArray[Any], epoch: int) -> None:
    """Raise ValueError where samples that were visited in this epoch before come with other probabilities.

    Args:
        ids: (B,) of the samples.
        given, kept: (B, C) as they are stored: the new ones, and those of the visit before.
        epoch: of both visits.
    """
    differ = np.flatnonzero((given != kept).any(axis=1))
    if differ.size:
        cure = "a sampler that pads repeats samples, and two samples may share an id: give every sample its own"
        twice = f"id {ids[differ[0]]} was observed twice in epoch {epoch}"
        raise ConfigError(f"{twice} with different probabilities: {cure}")


def check_whole(last_visit: NDArray[np.int32], epoch: int, length: int, num_epochs: int) -> None:
    """Raise ValueError where an epoch begins and samples lack a visit in the trajectory's epochs before it.

    Args:
        last_visit: (N,) the epochs of the samples' last visits; `check_turn` has seen to those before.
        epoch: which begins.
        length: T, how many epochs the trajectory has.
        num_epochs: how many epochs the run has.
    """
    if num_epochs < length:
        cure = "lower it, or raise train.epochs"
        raise ConfigError(f"trajectory_len {length} needs at least {length} epochs, the run has {num_epochs}: {cure}")
    needed = min(epoch, length) - 1
    missing = np.flatnonzero(last_visit < needed)
    if missing.size:
        seen = f"{missing.size} of {last_visit.size} samples were not visited in epoch {needed}"
        raise ConfigError(f"{seen}, ids {missing[:5].tolist()}: {_cure(length)}")


def _cure(length: int) -> str:
    return (
        f"every sample must be visited in each of the first {length} epochs; train.last_batch=drop leaves some out "
        "(take pad), and so do NaN logits (lower optim.lr)"
    )


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
            raise ConfigError(f"decay {self.decay!r} is outside (0, 1]: 1 takes the last window alone")
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
        chosen = chosen.with_facts(score="tdds", threshold=float(scores[ids].min()), **pair)
        return replace(chosen, batch_mean_weights=self.batch_mean_weights)
