"""Cost of every method that keeps numbers per sample, at a million samples: folding, choosing, and bytes per sample.

A network of 1,000 classes is simulated (TDDS: 100, as it stores the probabilities): the margin of a sample's label has
heavy tails and grows over the epochs, and all signals follow from it. In each epoch all samples are observed, in pushes
of 65,536 rows sorted by id. A static method chooses after its scoring run, the others in the middle of a run. For
methods that choose inside batches, the choice in a global batch of 1,024 candidates is measured instead, with the new
values of their columns. Methods that read vectors are in `benchmarks.vectors`.

Times are CPU seconds with one thread in matrix products.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figure, Head, Row, cpu_seconds, one_thread
from rayprune import Selection, Selector
from rayprune.core.bases.in_batch import Candidates, InBatchMethod, StepContext
from rayprune.core.method import EpochContext, Method
from rayprune.core.vectors import VectorColumn
from rayprune.methods import METHODS

NUM_SAMPLES, NUM_CLASSES, NUM_STORED_CLASSES, NUM_FEW_CLASSES = 1_000_000, 1_000, 100, 10
LEAST_EPOCHS = 10  # before the choice
PUSH_ROWS = 1 << 16
BATCH, WIDTH = 1024, 512
REPETITIONS, NUM_PICKS = 5, 10
GOAL_S, GOAL_BYTES = "≤ 2", "≤ 64"


def figures() -> Iterator[Head | Row]:
    """Yield a row per method: first those that choose an epoch's samples, then those that choose inside batches."""
    for line in one_thread("benchmarks.methods"):
        values = json.loads(line)
        if "columns" in values:
            yield Head(values["columns"])
        else:
            yield Row(values["name"], [figure and Figure(**figure) for figure in values["figures"]])


def measure() -> Iterator[Head | Row]:
    """Measure the rows in this process."""
    methods = [METHODS[name]() for name in sorted(METHODS)]
    yield Head(("method", "fold, s", "fold of a sweep, s", "choose, s", "table, B/sample", "peak, B/sample"))
    for method in methods:
        if not isinstance(method, InBatchMethod) and not reads_vectors(method):
            yield _epoch_row(method)
    yield Head(("method", "fold, s", "choose in a batch, µs", "columns, B/sample"))
    for method in methods:
        if isinstance(method, InBatchMethod):
            by_gradients = "logit_gradient" in method.batch_signals
            for num_classes in (NUM_FEW_CLASSES, NUM_CLASSES) if by_gradients else (None,):
                yield _batch_row(method, num_classes)


def reads_vectors(method: Method) -> bool:
    """Return whether the method reads vectors of a forward-only pass."""
    return any(isinstance(spec, VectorColumn) for spec in method.columns().values())


def table_bytes(selector: Selector) -> float:
    """Return the bytes per sample of the method's columns."""
    return sum(column.nbytes for column in selector.table.columns.values()) / selector.num_samples


def _epoch_row(method: Method) -> Row:
    selector, folds, sweeps = _observed(method)
    epoch = selector.num_epochs // 2
    run = (epoch, selector.num_epochs, NUM_SAMPLES, selector.seed, selector.labels)

    def choose() -> Selection:
        context = EpochContext(*run, visits_before=epoch * NUM_SAMPLES, chosen=selector.chosen)
        return method.select(selector.table, context)

    assert (choose().num_kept < NUM_SAMPLES) == (method.name != "full")
    tracemalloc.start()
    choose()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = [cpu_seconds(choose) for _ in range(REPETITIONS + 1)][1:]
    return Row(
        method.name,
        (
            Figure("fold", folds),
            Figure("fold of a sweep", sweeps) if sweeps else None,
            Figure("choose", times, GOAL_S),
            Figure("table", [table_bytes(selector)]),
            Figure("peak", [peak / NUM_SAMPLES], GOAL_BYTES),
        ),
    )


def _batch_row(method: InBatchMethod, num_classes: int | None) -> Row:
    """Return the row of a method; the number of classes matters to those that read the gradients of a batch."""
    selector, folds, _ = _observed(method)
    epoch, rng = selector.num_epochs // 2, np.random.default_rng(1)
    states = method.state_columns(NUM_SAMPLES)
    columns = {name: np.full(BATCH, value, dtype=np.float32) for name, value in states.items()}
    ids = np.sort(rng.permutation(NUM_SAMPLES)[:BATCH])
    columns |= {name: _signals(epoch)["loss"][ids] / 2 for name in method.file_columns()}
    signals = {name: _batch_signal(name, ids, epoch, num_classes) for name in method.batch_signals}
    step = StepContext(
        epoch=epoch,
        num_epochs=selector.num_epochs,
        step=0,
        num_steps=NUM_SAMPLES // BATCH,
        num_samples=NUM_SAMPLES,
        seed=0,
        facts=selector.begin_epoch(epoch).facts,
    )

    def choose() -> None:
        for _ in range(NUM_PICKS):
            candidates = Candidates(signals, step.with_rows(ids, _labels()[ids], columns))
            rows, _ = candidates.pick(method)
            candidates.update(method)
        assert 0 < rows.size < BATCH

    times = [cpu_seconds(choose) / NUM_PICKS * 1e6 for _ in range(REPETITIONS + 1)][1:]
    num_bytes = table_bytes(selector) + 4 * len(columns)
    name = method.name if num_classes is None else f"{method.name}, {num_classes:,} classes × {WIDTH}"
    return Row(name, (Figure("fold", folds), Figure("choose", times), Figure("columns", [num_bytes])))


def _observed(method: Method) -> tuple[Selector, list[float], list[float]]:
    """Return a selector that has observed half of a run, and the CPU seconds of each epoch's folds but the first's.

    The last of these epochs is observed by forward-only passes, too, so often that they make a median.
    """
    num_observed = max(method.collect_epochs, LEAST_EPOCHS)
    chosen = Selection.of_ids(np.arange(0, NUM_SAMPLES, 2), NUM_SAMPLES) if method.name == "fixed" else None
    selector = Selector(method, NUM_SAMPLES, 2 * num_observed, labels=_labels(), chosen=chosen)
    folds = [_fold(selector, epoch) for epoch in range(num_observed)]
    sweeps = []
    if method.sweep_signals:
        sweeps = [_fold(selector, num_observed - 1, sweep=True) for _ in range(REPETITIONS + 1)]
    return selector, folds[1:], sweeps[1:]


def _fold(selector: Selector, epoch: int, *, sweep: bool = False) -> float:
    """Return the CPU seconds to fold one observation of every sample."""
    names, taken = selector.method.sweep_signals if sweep else selector.method.signals, 0.0
    for ids in _pushes():
        if "probs" in names:
            signals = {"probs": _stored_probs(epoch)[: ids.size]}
        else:
            signals = {name: _signals(epoch)[name][ids] for name in names}
        taken += cpu_seconds(lambda signals=signals, ids=ids: selector.observe(ids, signals, epoch, sweep=sweep))
    return taken


@lru_cache
def _labels() -> NDArray[np.int64]:
    return np.random.default_rng(2).integers(NUM_CLASSES, size=NUM_SAMPLES)


@lru_cache
def _pushes() -> list[NDArray[np.int64]]:
    """Return the ids of each push: a random order of all samples in parts, each sorted."""
    order = np.random.default_rng(3).permutation(NUM_SAMPLES)
    return [np.sort(order[start : start + PUSH_ROWS]) for start in range(0, NUM_SAMPLES, PUSH_ROWS)]


@lru_cache
def _signals(epoch: int) -> dict[str, NDArray[np.float32]]:
    """Return the signals of all samples in an epoch, name → (N,).

    The label has probability p, and the other classes share 1 − p: 1 / u of them have (1 − p)·u each.
    """
    fixed, rng = np.random.default_rng(4), np.random.default_rng([5, epoch])
    margin = 1.0 + 0.3 * epoch + 1.5 * fixed.standard_t(3, NUM_SAMPLES) + 0.7 * rng.standard_normal(NUM_SAMPLES)
    rest = np.maximum(1.0 / (1.0 + np.exp(np.clip(margin, -30.0, 30.0))), 1e-12)
    p, share = 1.0 - rest, rng.uniform(0.3, 1.0, NUM_SAMPLES)
    runner = rest * share
    el2n = np.sqrt(rest**2 + rest**2 * share)
    signals = {
        "loss": -np.log1p(-rest),
        "prob_label": p,
        "correct": p > runner,
        "confidence": np.maximum(p, runner),
        "margin": p - runner,
        "top_gap": np.abs(p - runner),
        "entropy": -p * np.log(p) - rest * np.log(runner),
        "el2n": el2n,
        "grand": el2n * rng.lognormal(2.0, 0.3, NUM_SAMPLES),
        "boundary": np.abs(np.log(p) - np.log(runner)) * rng.uniform(0.1, 0.3, NUM_SAMPLES),
    }
    return {name: values.astype(np.float32) for name, values in signals.items()}


@lru_cache
def _stored_probs(epoch: int) -> NDArray[np.float32]:
    """Return the probabilities of one push, which stands for all others; the logits follow a random walk."""
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(PUSH_ROWS, NUM_STORED_CLASSES)).astype(np.float32)
    for _ in range(epoch):
        logits += rng.standard_normal(logits.shape, dtype=np.float32) * np.float32(0.3)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _batch_signal(name: str, ids: NDArray[np.int64], epoch: int, num_classes: int | None) -> NDArray[np.float32]:
    """Return a signal of a batch: (B,), or (B, C) or (B, d) for gradients and embeddings."""
    rng = np.random.default_rng(7)
    if name == "embedding":
        return np.maximum(rng.standard_normal((ids.size, WIDTH), dtype=np.float32), 0.0)
    if num_classes is not None:
        gradients = rng.dirichlet(np.full(num_classes, 0.1), ids.size)
        gradients[np.arange(ids.size), _labels()[ids] % num_classes] -= 1.0
        return gradients.astype(np.float32)
    return _signals(epoch)[name][ids]


if __name__ == "__main__":
    for line in measure():
        print(json.dumps(asdict(line)), flush=True)
