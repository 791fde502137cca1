"""Observations per second that the ScoreActor accepts through Ray, packed and sorted as workers send them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray

from benchmarks.harness import Figure, seconds
from rayprune.engine.cluster import start_ray
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, Barrier, PlanPass, Push, pack
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.sources import open_data

NUM_SAMPLES = 4_000_000
CALLS = ((4_096, ""), (65_536, ""), (262_144, "≥ 30"), (1_048_576, "≥ 30"))
REPETITIONS, EMPTY_CALLS = 7, 50


def figures() -> Iterator[Figure]:
    """Yield the intake for each call size."""
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        for rows, goal in CALLS:
            rates, _ = intake(Path(folder), rows)
            yield Figure(f"actor intake in calls of {rows:,}, million samples/s", rates, goal)


def intake(folder: Path, rows: int) -> tuple[list[float], list[float]]:
    """Return million samples per second in calls of `rows` samples, and the seconds of an empty call.

    Args:
        folder: an existing folder for the arrays that serve as the dataset.
        rows: samples per call.
    """
    features = folder / "x_train.npy"
    if not features.exists():
        np.save(features, np.zeros((NUM_SAMPLES, 1), np.float32))
        np.save(folder / "y_train.npy", np.arange(NUM_SAMPLES) % 10)
    source = open_data("arrays", path=str(folder), validation_fraction=0).train
    spec = ScoreSpec({"name": "infobatch"}, source, 0, REPETITIONS + 2, 0, 1024, "pad", 4, None, 0)
    client, (handle,) = ScoreClient.start(spec, f"bench-{rows}")
    generation = time.time_ns()
    rng = np.random.default_rng(0)
    order = rng.permutation(NUM_SAMPLES)
    losses = rng.exponential(size=NUM_SAMPLES).astype(np.float32)
    pushes = [np.sort(order[start : start + rows]) for start in range(0, NUM_SAMPLES, rows)]
    packed = [pack(ids, {"loss": losses[ids]}) for ids in pushes]
    rates, latencies, barrier = [], [], Barrier("close", 0, 1)
    for epoch in range(REPETITIONS + 1):
        key = AttemptKey(generation, epoch)
        client.announce(PlanPass(key, "train", 1))
        start = time.perf_counter()
        for sequence, (layout, buffer) in enumerate(packed):
            client.observe(key, Push(0, sequence, layout, buffer), wait=False)
        assert client.arrive(key, barrier, 0, len(packed)) == []
        rates.append(NUM_SAMPLES / (time.perf_counter() - start) / 1e6)
        latencies.append(seconds(lambda: [client.generation() for _ in range(EMPTY_CALLS)]) / EMPTY_CALLS)
        assert client.pass_barrier(key, barrier) is not None
    ray.kill(handle)
    return rates[1:], latencies[1:]
