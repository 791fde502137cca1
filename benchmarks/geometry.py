"""Cost of choosing by embeddings: seconds of `condense` after the forward-only pass, and peak memory.

The embeddings are those of a network with ReLU: a hundred clusters, numbers below 0 set to 0, half of the numbers not
0. Each method runs in its own process, for the sake of its memory peak, which includes the mapped file of embeddings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figure, peak_bytes, seconds
from rayprune import Selector, build_method

METHODS = ("moderate", "ssp", "semdedup", "herding", "k_center", "d2", "infomax")
NUM_SAMPLES, WIDTH, STORAGE, PRUNE_RATIO = 100_000, 128, "float32", 0.9
NUM_CLUSTERS, PUSH_ROWS = 100, 1 << 15
REPETITIONS = 3


def figures() -> Iterator[Figure]:
    """Yield the figures of each method."""
    for name in METHODS:
        yield from method_figures(name, NUM_SAMPLES, WIDTH, STORAGE, REPETITIONS)


def method_figures(name: str, num_samples: int, width: int, storage: str, repetitions: int) -> Iterator[Figure]:
    """Yield seconds and peak bytes of one method's condensation, measured in processes of their own."""
    command = [sys.executable, "-m", "benchmarks.geometry", name, str(num_samples), str(width), storage]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repetitions)]
    runs = [json.loads(output) for output in outputs]
    size = f"{num_samples:,} × {width} {storage}"
    yield Figure(f"{name}, condensing {size}, {PRUNE_RATIO:.0%} pruned, s", [run["seconds"] for run in runs])
    peak = f"{name}, {size}: peak memory with the mapped file, MiB"
    yield Figure(peak, [run["bytes"] / 2**20 for run in runs])


def embeddings(num_samples: int, width: int, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """Yield (PUSH_ROWS, width) blocks of embeddings."""
    centers = rng.normal(size=(NUM_CLUSTERS, width)).astype(np.float32)
    for start in range(0, num_samples, PUSH_ROWS):
        clusters = rng.integers(NUM_CLUSTERS, size=min(PUSH_ROWS, num_samples - start))
        noise = rng.normal(size=(clusters.size, width)).astype(np.float32)
        yield np.maximum(centers[clusters] + noise, 0.0)


def _measure(name: str, num_samples: int, width: int, storage: str) -> dict[str, float]:
    before, rng = peak_bytes(), np.random.default_rng(0)
    options = {"name": name, "prune_ratio": PRUNE_RATIO, "score_epochs": 1, "storage": storage}
    selector = Selector(build_method(options), num_samples, 3, labels=np.arange(num_samples) % NUM_CLUSTERS)
    selector.begin_epoch(0)
    method, start = selector.method, 0
    for block in embeddings(num_samples, width, rng):
        ids = np.arange(start, start + len(block))
        numbers = {signal: rng.random(ids.size) for signal in (*method.signals, *method.sweep_signals)}
        selector.observe(ids, numbers, 0)
        selector.observe(ids, {**numbers, "embedding": block}, 0, sweep=True)
        start += len(block)
    condense = seconds(selector.end_sweep)
    assert selector.begin_epoch(1).num_kept == round((1 - PRUNE_RATIO) * num_samples)
    return {"seconds": condense, "bytes": peak_bytes() - before}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
