"""Rows per second of both transports compared with a bare memory-map loop, and the start-up time of a warm epoch.

500,000 rows of 32×32×3 bytes in a memory-mapped file, one worker, batch 128. The loop, the local stream and the Ray
stream alternate in one worker process.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from ray.train.torch import TorchTrainer

from benchmarks.harness import Figure, alternate, ratios
from rayprune.engine.cluster import start_ray
from rayprune.engine.data.ray_data import plan_dataset, task_rows
from rayprune.engine.data.transport import LocalStream, RayStream, Transport
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.sources import SampleSource, open_data

ROWS, BATCH, EPOCHS = 500_000, 128, 5
START_ROWS = 2_000_000  # half of them are kept


def figures() -> Iterator[Figure]:
    """Yield rows per second, their ratios, and the seconds to the first batch of a warm epoch."""
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        rates = _run(Path(folder) / "rows", ROWS, (32, 32, 3), {"name": "full"}, EPOCHS, _throughput)
        yield Figure("bare memory-map loop, rows/s", rates["bare"])
        yield Figure("stream local, rows/s", rates["local"])
        yield Figure("stream ray, rows/s", rates["ray"])
        yield Figure("stream local ÷ bare loop", ratios(rates["local"], rates["bare"]), "≥ 0.7")
        yield Figure("stream ray ÷ bare loop", ratios(rates["ray"], rates["bare"]), "≥ 0.12")
        half = {"name": "random_epoch", "prune_ratio": 0.5}
        starts = _run(Path(folder) / "start", START_ROWS, (8, 8, 1), half, EPOCHS + 1, _starts)
        yield Figure("warm epoch, plan to first batch, 1e6 kept, stream local, s", starts["local"], "≤ 0.3")
        yield Figure("warm epoch, plan to first batch, 1e6 kept, stream ray, s", starts["ray"], "≤ 0.3")


def _run(
    folder: Path, rows: int, shape: tuple[int, ...], method: dict[str, Any], epochs: int, measure: Any
) -> dict[str, list[float]]:
    """Write random rows and run `measure` over them in one Ray Train worker."""
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "x_train.npy", "w+", np.uint8, (rows, *shape))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 50_000):
        size = min(50_000, rows - start)
        images[start : start + size] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    del images
    np.save(folder / "y_train.npy", np.arange(rows) % 10)
    source = open_data("arrays", path=str(folder), validation_fraction=0).train
    return in_worker(folder, source, method, epochs, measure)


def in_worker(
    folder: Path, source: SampleSource, method: dict[str, Any], epochs: int, measure: Any
) -> dict[str, list[float]]:
    """Return what `measure` returns in one Ray Train worker, to which Ray Data delivers the planned rows."""
    cpus = ray.cluster_resources()["CPU"]
    spec = ScoreSpec(method, source, 0, 3 * epochs + 3, 0, BATCH, "pad", source.schema.row_bytes, None, 0)
    scores, (handle,) = ScoreClient.start(replace(spec, task_rows=task_rows(source, cpus)), f"bench-{folder.name}")
    out = folder / "values.json"
    trainer = TorchTrainer(
        lambda: out.write_text(json.dumps(measure(scores, source, folder, epochs))),
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(folder), name="train"),
        datasets={"train": plan_dataset(scores, {"train": source})},
    )
    trainer.fit()
    ray.kill(handle)
    values: dict[str, list[float]] = json.loads(out.read_text())
    return values


class EpochTimer:
    """Time the streaming of one epoch after another."""

    def __init__(self, scores: ScoreClient) -> None:
        self.bytes_per_row = 0.0  # read from storage in the last epoch
        self._scores, self._epoch, self._generation = scores, -1, time.time_ns()

    def stream(self, via: Transport) -> tuple[float, float]:
        """Return (seconds from the request of a plan to its first batch, rows per second)."""
        self._epoch += 1
        start = time.perf_counter()
        session = ScoringSession(self._scores, self._generation, 0, 1)
        session.start_epoch(self._epoch)
        header = session.announce()
        rows, first, num_bytes = 0, 0.0, 0
        for batch in session.batches(header, via.batches):
            first = first or time.perf_counter() - start
            rows += batch.ids.size
            num_bytes += batch.num_bytes
        self.bytes_per_row = num_bytes / rows
        seconds = time.perf_counter() - start
        assert rows == header.num_steps * BATCH
        session.barrier("close", header.num_steps, with_state=False)
        return first, rows / seconds


def _throughput(scores: ScoreClient, source: SampleSource, folder: Path, epochs: int) -> dict[str, list[float]]:
    timer, seeds = EpochTimer(scores), itertools.count()
    measures = {"bare": lambda: _bare_loop(folder, next(seeds))}
    for name, stream in _transports(source).items():
        measures[name] = lambda stream=stream: timer.stream(stream)[1]
    return alternate(measures, epochs)


def _transports(source: SampleSource) -> dict[str, Transport]:
    return {"local": LocalStream({"train": source}), "ray": RayStream(ray.train.get_dataset_shard("train"))}


def _bare_loop(folder: Path, seed: int) -> float:
    """Return rows/s of a hand-written loop: shuffle, index the memory map, next batch."""
    start = time.perf_counter()
    images = np.load(folder / "x_train.npy", mmap_mode="r")
    labels = np.load(folder / "y_train.npy", mmap_mode="r")
    order = np.random.default_rng(seed).permutation(len(images))
    rows = 0
    for first in range(0, len(order) - BATCH + 1, BATCH):
        ids = order[first : first + BATCH]
        batch = {"image": images[ids], "label": labels[ids]}
        rows += len(batch["image"])
    return rows / (time.perf_counter() - start)


def _starts(scores: ScoreClient, source: SampleSource, folder: Path, epochs: int) -> dict[str, list[float]]:
    timer = EpochTimer(scores)
    return {name: [timer.stream(via)[0] for _ in range(epochs)][1:] for name, via in _transports(source).items()}
