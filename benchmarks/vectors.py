"""Cost of the methods that read vectors of a forward-only pass: folding, choosing, and bytes per sample.

Embeddings are those of a network with ReLU: one cluster a class, numbers below 0 set to 0, half of the numbers not 0.
Gradients are those of a linear layer on such embeddings. Each run has a process of its own, for the sake of its memory
peak: that of choosing beyond what the process had before it, in which the mapped file of the vectors is not counted.
Choosing is all that comes after the forward-only pass: the condensation of the vectors, and the subset.

Times are CPU seconds with one thread in matrix products.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figure, Head, Row, cpu_seconds, one_thread, peak_bytes
from benchmarks.methods import PUSH_ROWS, table_bytes
from rayprune import Selector, build_method
from rayprune.core.vectors import VectorColumn

NUM_SAMPLES, PRUNE_RATIO = 1_000_000, 0.9
COLUMNS = (
    "method",
    "fold, s",
    "fold of a sweep, s",
    "choose, s",
    "table, B/sample",
    "disk, B/sample",
    "peak, B/sample",
)


@dataclass(frozen=True)
class Case:
    """A method and the size of its vectors.

    Attributes:
        method: its config, without score_epochs.
        num_samples: N.
        num_classes: C, the length of a gradient with respect to the logits.
        width: d, the length of an embedding.
        repetitions: number of runs.
    """

    method: dict[str, Any]
    num_samples: int = NUM_SAMPLES
    num_classes: int = 1000
    width: int = 64
    repetitions: int = 3

    @property
    def name(self) -> str:
        """The method's name, the options that differ from its defaults, and the vectors."""
        options = dict(self.method)
        name = options.pop("name")
        vectors = " + ".join(
            f"{self.width if signal == 'embedding' else self.num_classes}"
            for signal, spec in self.build().columns().items()
            if isinstance(spec, VectorColumn)
        )
        settings = "".join(f", {key} {value}" for key, value in options.items())
        return f"{name}{settings}; {self.num_samples:,} × {vectors}"

    def build(self) -> Any:
        """Return the method, with a scoring run of one epoch."""
        return build_method({"score_epochs": 1, "prune_ratio": PRUNE_RATIO, **self.method})


# Each takes less than half a minute. Where a method compares all samples of a part with each other, smaller parts than
# its default make the time linear in N.
CASES = (
    Case({"name": "moderate"}),
    Case({"name": "glister"}, num_classes=10),
    Case({"name": "gradmatch"}, num_classes=10),
    Case({"name": "herding", "parts": 100}),
)
SLOW = (
    Case({"name": "craig"}, num_classes=10, repetitions=1),
    Case({"name": "ssp"}, repetitions=1),
    Case({"name": "semdedup"}, repetitions=1),
    Case({"name": "k_center", "parts": 10}, repetitions=1),
    Case({"name": "d2", "parts": 100}, repetitions=1),
    Case({"name": "infomax", "parts": 100}, repetitions=1),
)


def figures() -> Iterator[Head | Row]:
    """Yield the rows of the fast methods."""
    return rows_of(CASES)


def slow() -> Iterator[Head | Row]:
    """Yield the rows of the methods that take minutes."""
    return rows_of(SLOW)


def k_center() -> Iterator[Head | Row]:
    """Yield the row of k_center over embeddings of 512 numbers, in its default one part; it needs 1 GB in TMPDIR."""
    return rows_of([Case({"name": "k_center", "storage": "float16"}, width=512, repetitions=1)])


def craig() -> Iterator[Head | Row]:
    """Yield the row of CRAIG over gradients of 512 numbers; it needs 2 GB in TMPDIR."""
    return rows_of([Case({"name": "craig"}, num_classes=512, repetitions=1)])


def rows_of(cases: Iterable[Case]) -> Iterator[Head | Row]:
    """Yield the row of each case."""
    yield Head(COLUMNS)
    for case in cases:
        runs = [
            json.loads(line)
            for _ in range(case.repetitions)
            for line in one_thread("benchmarks.vectors", json.dumps(asdict(case)))
        ]
        yield Row(case.name, [Figure(column, [run[column] for run in runs]) for column in COLUMNS[1:]])


def measure(case: Case) -> dict[str, float]:
    """Return the value of each column for one run."""
    rng, num = np.random.default_rng(0), case.num_samples
    labels = rng.integers(case.num_classes, size=num)
    selector = Selector(case.build(), num, 2, labels=labels)
    selector.begin_epoch(0)
    method, fold, sweep = selector.method, 0.0, 0.0
    centers = rng.normal(size=(case.num_classes, case.width)).astype(np.float32)
    for start in range(0, num, PUSH_ROWS):
        ids = np.arange(start, min(start + PUSH_ROWS, num))
        visited = {signal: rng.random(ids.size, dtype=np.float32) for signal in method.signals}
        swept = {signal: _vectors(signal, labels[ids], centers, rng) for signal in method.sweep_signals}
        fold += cpu_seconds(lambda ids=ids, visited=visited: selector.observe(ids, visited, 0))
        sweep += cpu_seconds(lambda ids=ids, swept=swept: selector.observe(ids, swept, 0, sweep=True))
    on_disk = sum(vectors.array.nbytes for vectors in selector.table.vectors.values())
    before = peak_bytes(reset=True)
    choose = cpu_seconds(lambda: selector.begin_epoch(1))
    growth = max(0, peak_bytes() - before)  # less than nothing if other memory was given back meanwhile
    values = (fold, sweep, choose, table_bytes(selector), on_disk / num, growth / num)
    assert selector.begin_epoch(1).num_kept == method.num_kept(num)
    return dict(zip(COLUMNS[1:], values, strict=True))


def _vectors(
    signal: str, labels: NDArray[np.int64], centers: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return a signal of some samples: (B, d), (B, C), or (B,) at random."""
    if signal not in ("embedding", "logit_gradient"):
        return rng.random(labels.size, dtype=np.float32)
    noise = rng.standard_normal((labels.size, centers.shape[1]), dtype=np.float32)
    if signal == "embedding":
        return np.maximum(centers[labels] + noise, 0.0)
    inputs = np.maximum(centers[labels] + 1.5 * noise, 0.0)
    logits = inputs @ centers.T * np.float32(4.0 / centers.shape[1] ** 0.5)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    probs[np.arange(labels.size), labels] -= 1.0
    return probs


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
