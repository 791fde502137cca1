"""Rows a second of both transports against a bare memory-map loop, and how fast a warm epoch starts.

500,000 rows of 32×32×3 bytes in a memory-mapped file, one worker, batch 128; the loop, the local stream and the Ray
stream run in the same worker process, in turns.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from ray.train.torch import TorchTrainer

from benchmarks.harness import Figure
from rayprune.engine.cluster import start_ray
from rayprune.engine.data.ray_data import plan_dataset
from rayprune.engine.data.transport import LocalStream, RayStream, Transport
from rayprune.engine.scoring.actor import ScoreSpec
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.session import ScoringSession
from rayprune.sources import SampleSource, open_data

ROWS, BATCH, EPOCHS = 500_000, 128, 5
START_ROWS = 2_000_000  # of which InfoBatch's first epochs keep everything: half of them is 1e6 kept


def figures() -> Iterator[Figure]:
    """Yield rows a second, their ratios, and the seconds to the first batch of a warm epoch."""
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        seen = _run(Path(folder) / "rows", ROWS, (32, 32, 3), {"name": "full"}, EPOCHS, _throughput)
        yield Figure("bare memory-map loop, rows/s", seen["bare"])
        yield Figure("stream local, rows/s", seen["local"])
        yield Figure("stream ray, rows/s", seen["ray"])
        yield Figure("stream local ÷ bare loop", _ratios(seen["local"], seen["bare"]), "≥ 0.7")
        yield Figure("stream ray ÷ bare loop", _ratios(seen["ray"], seen["bare"]), "≥ 0.12")
        half = {"name": "random_epoch", "prune_ratio": 0.5}
        seen = _run(Path(folder) / "start", START_ROWS, (8, 8, 1), half, EPOCHS + 1, _starts)
        yield Figure("warm epoch, plan to first batch, 1e6 kept, stream local, s", seen["local"], "≤ 0.3")
        yield Figure("warm epoch, plan to first batch, 1e6 kept, stream ray, s", seen["ray"], "≤ 0.3")


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _run(
    folder: Path, rows: int, shape: tuple[int, ...], method: dict[str, Any], epochs: int, measure: Any
) -> dict[str, list[float]]:
    """Run `measure` in one Ray Train worker over freshly written rows."""
    folder.mkdir()
    images = np.lib.format.open_memmap(folder / "x_train.npy", "w+", np.uint8, (rows, *shape))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 50_000):
        size = min(50_000, rows - start)
        images[start : start + size] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    del images
    np.save(folder / "y_train.npy", np.arange(rows) % 10)
    source = open_data("arrays", path=str(folder), validation_fraction=0).train
    spec = ScoreSpec(method, source, 0, 3 * epochs + 3, 0, BATCH, "pad", source.schema.row_bytes, None, 0)
    scores, handle = ScoreClient.start(spec, f"bench-{folder.name}")
    out = folder / "seen.json"
    trainer = TorchTrainer(
        lambda: out.write_text(json.dumps(measure(scores, source, folder, epochs))),
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(folder), name="train"),
        datasets={"train": plan_dataset(scores, {"train": source})},
    )
    trainer.fit()
    ray.kill(handle)
    seen: dict[str, list[float]] = json.loads(out.read_text())
    return seen


class Epochs:
    """Give out one plan after the other and time how it is streamed."""

    def __init__(self, scores: ScoreClient) -> None:
        self.bytes_a_row = 0.0  # read from storage in the epoch streamed last
        self._scores, self._epoch, self._generation = scores, -1, time.time_ns()

    def stream(self, via: Transport) -> tuple[float, float]:
        """Return (seconds to the first batch, rows a second after the plan was asked for)."""
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
        self.bytes_a_row = num_bytes / rows
        seconds = time.perf_counter() - start
        assert rows == header.num_steps * BATCH
        session.barrier("close", header.num_steps, with_state=False)
        return first, rows / seconds


def _throughput(scores: ScoreClient, source: SampleSource, folder: Path, epochs: int) -> dict[str, list[float]]:
    plans = Epochs(scores)
    streams = {"local": LocalStream({"train": source}), "ray": RayStream(ray.train.get_dataset_shard("train"))}
    seen: dict[str, list[float]] = {"bare": [], "local": [], "ray": []}
    for epoch in range(epochs + 1):
        rates = {"bare": _bare_loop(folder, epoch), **{name: plans.stream(via)[1] for name, via in streams.items()}}
        if epoch:  # the first one is warm-up
            for name, rate in rates.items():
                seen[name].append(rate)
    return seen


def _bare_loop(folder: Path, epoch: int) -> float:
    """Return rows/s of the loop that one would write: shuffle, index the memory map, next batch."""
    start = time.perf_counter()
    images = np.load(folder / "x_train.npy", mmap_mode="r")
    labels = np.load(folder / "y_train.npy", mmap_mode="r")
    order = np.random.default_rng(epoch).permutation(len(images))
    rows = 0
    for first in range(0, len(order) - BATCH + 1, BATCH):
        ids = order[first : first + BATCH]
        batch = {"image": images[ids], "label": labels[ids]}
        rows += len(batch["image"])
    return rows / (time.perf_counter() - start)


def _starts(scores: ScoreClient, source: SampleSource, folder: Path, epochs: int) -> dict[str, list[float]]:
    plans = Epochs(scores)
    streams = {"local": LocalStream({"train": source}), "ray": RayStream(ray.train.get_dataset_shard("train"))}
    seen = {name: [plans.stream(via)[0] for _ in range(epochs)][1:] for name, via in streams.items()}
    return seen
