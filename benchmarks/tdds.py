"""Cost of TDDS: folding whole trajectories into the score table, selecting the subset, and bytes per sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figure, seconds
from rayprune import TDDS, Selector

NUM_SAMPLES, NUM_CLASSES, LENGTH, WINDOW = 50_000, 100, 10, 5
LONGER = 30
REPETITIONS = 5
_SIZES = {"float32": 4, "float16": 2}


def figures() -> Iterator[Figure]:
    """Yield seconds and bytes for both storage types and for a longer trajectory."""
    trajectory = list(_random_walk(LENGTH))
    size = f"{NUM_SAMPLES:,} × {NUM_CLASSES} classes, T={LENGTH}, J={WINDOW}"
    for storage, goal in (("float32", "≤ 1.5"), ("float16", "")):
        runs = [_run(trajectory, storage) for _ in range(REPETITIONS + 1)][1:]
        yield Figure(f"TDDS, {size}, {storage}, all {LENGTH} folds, s", [run[0] for run in runs], goal)
        yield Figure(f"TDDS, subset of half, {storage}, s", [run[1] for run in runs])
        formula = _SIZES[storage] * NUM_CLASSES + 4 * (WINDOW - 1) + 4
        yield Figure(f"TDDS, {storage}, bytes per sample", [run[2] for run in runs], f"≤ {formula}")
    longer = [_run(trajectory * (LONGER // LENGTH), "float32") for _ in range(REPETITIONS)]
    yield Figure(f"TDDS, T={LONGER}: a fold, s", [run[0] / LONGER for run in longer])
    formula = 4 * NUM_CLASSES + 4 * (WINDOW - 1) + 4
    yield Figure(
        f"TDDS, T={LONGER}: bytes per sample, same as for T={LENGTH}", [run[2] for run in longer], f"≤ {formula}"
    )


def _run(trajectory: list[NDArray[np.float32]], storage: str) -> tuple[float, float, float]:
    """Return the seconds of all folds, the seconds of the selection, and the table's bytes per sample."""
    length, ids = len(trajectory), np.arange(NUM_SAMPLES)
    method = TDDS(trajectory_len=length, window_size=WINDOW, storage=storage)
    selector = Selector(method, NUM_SAMPLES, length + 1)
    fold = 0.0
    for epoch, probs in enumerate(trajectory):
        selector.begin_epoch(epoch)
        fold += seconds(lambda probs=probs, epoch=epoch: selector.observe(ids, {"probs": probs}, epoch))
    select = seconds(lambda: selector.begin_epoch(length))
    num_bytes = sum(column.nbytes for column in selector.table.columns.values())
    return fold, select, num_bytes / NUM_SAMPLES


def _random_walk(num_epochs: int) -> Iterator[NDArray[np.float32]]:
    """Yield the probabilities of logits that follow a random walk."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(NUM_SAMPLES, NUM_CLASSES)).astype(np.float32)
    for _ in range(num_epochs):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        yield powers / powers.sum(axis=1, keepdims=True)
        logits += rng.normal(scale=0.3, size=logits.shape).astype(np.float32)
