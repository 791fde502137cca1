"""Samples' probabilities from epoch to epoch: how they are kept, how much they changed, whether they are whole.

Shapes: N samples, B observed, C classes, W changes in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
            raise ValueError(f"window_size {window} makes every score 0: it must be at least 3")
        if window > length:
            cure = f"lower it, or raise trajectory_len to at least {window}"
            raise ValueError(f"window_size {window} is longer than trajectory_len {length}: {cure}")
        if (length, window) in pairs[:number]:
            raise ValueError(f"also names [{length}, {window}], which is scored already: leave it out")


def check_probs(ids: NDArray[np.int64], probs: NDArray[Any], num_classes: int) -> None:
    """Raise ValueError unless `probs` are (B, C) probabilities of at least float32 that sum to 1.

    Args:
        ids: (B,) whose they are.
        probs: what was observed.
        num_classes: C of the epochs before, 0 in the first.
    """
    if probs.ndim != 2 or probs.shape[1] < 2:
        raise ValueError(f"probs of shape {probs.shape} must be (samples, classes), with at least two classes")
    if probs.shape[1] != (num_classes or probs.shape[1]):
        raise ValueError(f"probs are of {probs.shape[1]} classes, and were of {num_classes} before")
    if probs.dtype == np.float16:
        cure = "compute it in float32, softmax(logits.float())"
        raise ValueError(f"probs are float16, in which small probabilities become 0: {cure}")
    wrong = (probs.min(axis=1) < 0) | (np.abs(probs.sum(axis=1, dtype=np.float32) - 1.0) > _SUM_TOLERANCE)
    if wrong.any():
        row = probs[wrong][0]
        seen = f"lie in {row.min():.4g} … {row.max():.4g} and sum to {row.sum(dtype=np.float64):.6g}"
        cure = "they must be at least 0 and sum to 1; of logits take softmax(logits.float())"
        raise ValueError(f"probs of id {ids[wrong][0]} {seen}: {cure}")


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
        raise ValueError(f"id {ids[row]} was {seen} and now comes in epoch {epoch}: {_cure(length)}")
    past = last_visit > epoch
    if past.any() and epoch < length:
        row = int(np.argmax(past))
        raise ValueError(f"id {ids[row]} comes in epoch {epoch} and came in epoch {last_visit[row]} before: sort them")


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
        raise ValueError(f"{twice} with different probabilities: {cure}")


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
        raise ValueError(f"trajectory_len {length} needs at least {length} epochs, the run has {num_epochs}: {cure}")
    needed = min(epoch, length) - 1
    missing = np.flatnonzero(last_visit < needed)
    if missing.size:
        seen = f"{missing.size} of {last_visit.size} samples were not visited in epoch {needed}"
        raise ValueError(f"{seen}, ids {missing[:5].tolist()}: {_cure(length)}")


def _cure(length: int) -> str:
    return (
        f"every sample must be visited in each of the first {length} epochs; train.last_batch=drop leaves some out "
        "(take pad), and so do NaN logits (lower optim.lr)"
    )
