"""Cost of the search for near-duplicates: seconds, peak memory with the mapped file, and recall against brute force.

The vectors are embeddings as in `geometry`, divided by their lengths in the search. One sample in a hundred is a noisy
copy of another one, and one image has ten thousand equal copies. Each run has its own process, for its memory peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figure, peak_bytes
from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.near_duplicates import near_duplicates
from rayprune.core.algorithms.outliers import knn_distance

NUM_SAMPLES, WIDTH, STORAGE, RADIUS = 100_000, 128, "float32", 0.1
EQUAL_COPIES, PROBED = 10_000, 500
NUM_CLUSTERS, PUSH_ROWS = 100, 1 << 15
REPETITIONS = 3


def figures() -> Iterator[Figure]:
    """Yield the figures of 1e5 samples."""
    yield from size_figures(NUM_SAMPLES, WIDTH, STORAGE, REPETITIONS)


def million() -> Iterator[Figure]:
    """Yield the figures of a million embeddings of 512 numbers: minutes, and a gigabyte of disk in TMPDIR."""
    yield from size_figures(1_000_000, 512, "float16", repetitions=1)


def size_figures(num_samples: int, width: int, storage: str, repetitions: int) -> Iterator[Figure]:
    """Yield seconds, peak memory and recall, measured in processes of their own."""
    command = [sys.executable, "-m", "benchmarks.near_duplicates", str(num_samples), str(width), storage]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(repetitions)]
    runs = [json.loads(output) for output in outputs]
    size = f"{num_samples:,} × {width} {storage}"
    for name, key in (
        ("near-duplicates, SIZE, s", "search"),
        ("outliers (10th neighbor of 2,000), SIZE, s", "outliers"),
        ("near-duplicates, SIZE: peak memory with the mapped file, MiB", "mebibytes"),
        ("near-duplicates, SIZE: mapped file, MiB", "file"),
        ("near-duplicates, SIZE: samples with a duplicate", "found"),
        (f"near-duplicates, SIZE: agreement with brute force on {PROBED} samples", "agreement"),
    ):
        goal = "≥ 1.0" if key == "agreement" else ""
        yield Figure(name.replace("SIZE", size), [run[key] for run in runs], goal)


def embeddings(num_samples: int, width: int, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """Yield (PUSH_ROWS, width) blocks of embeddings as of a network with ReLU, in a hundred clusters."""
    centers = rng.normal(size=(NUM_CLUSTERS, width)).astype(np.float32)
    for start in range(0, num_samples, PUSH_ROWS):
        clusters = rng.integers(NUM_CLUSTERS, size=min(PUSH_ROWS, num_samples - start))
        noise = rng.normal(size=(clusters.size, width)).astype(np.float32)
        yield np.maximum(centers[clusters] + noise, 0.0)


def store(file: Any, num_samples: int, width: int, storage: str) -> NDArray[Any]:
    """Write the vectors, (N, width), into a memory-mapped file."""
    array = np.memmap(file, dtype=storage, mode="w+", shape=(num_samples, width))
    rng, start = np.random.default_rng(0), 0
    for block in embeddings(num_samples, width, rng):
        array[start : start + len(block)] = block
        start += len(block)
    chosen = rng.permutation(num_samples)
    copies, chosen = np.split(chosen, [num_samples // 100])
    noise = rng.normal(size=(copies.size, width)) * rng.uniform(0.0, 0.1, (copies.size, 1))
    array[copies] = np.maximum(array[chosen[: copies.size]] + noise, 0.0)
    array[chosen[-min(EQUAL_COPIES, num_samples // 10) :]] = array[chosen[0]]
    return array


def brute_force(points: Points, rows: NDArray[np.int64], radius: float) -> NDArray[np.float32]:
    """Return the distance of some points to their nearest duplicates; infinite without one."""
    left, nearest = points.read(rows), np.full(rows.size, np.inf)
    for block in points.blocks(max(points.width, rows.size)):
        right = points.read(block)
        squares = np.square(left).sum(1)[:, None] + np.square(right).sum(1) - 2.0 * (left @ right.T)
        own = np.flatnonzero((rows >= block.start) & (rows < block.stop))
        squares[own, rows[own] - block.start] = np.inf
        nearest = np.minimum(nearest, squares.min(axis=1))
    distances = np.sqrt(np.maximum(nearest, 0.0))
    return np.where(distances <= radius, distances, np.inf).astype(np.float32)


def _measure(num_samples: int, width: int, storage: str) -> dict[str, float]:
    with tempfile.TemporaryFile() as file:
        array = store(file, num_samples, width, storage)
        points = Points(array, unit=True)
        begin = time.perf_counter()
        groups = near_duplicates(points, RADIUS)
        search = time.perf_counter() - begin
        memory = peak_bytes()
        begin = time.perf_counter()
        knn_distance(points)
        outliers = time.perf_counter() - begin
        rows = np.sort(np.random.default_rng(1).permutation(num_samples)[:PROBED])
        expected = brute_force(points, rows, RADIUS)
        agreement = np.isclose(groups.nearest[rows], expected, rtol=1e-4, atol=1e-6).mean()
        mebi = 2.0**20
        found = int(np.isfinite(groups.nearest).sum())
        return {
            "search": search,
            "outliers": outliers,
            "mebibytes": memory / mebi,
            "file": array.nbytes / mebi,
            "found": found,
            "agreement": float(agreement),
        }


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
