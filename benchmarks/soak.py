"""Growth of a long run: memory, file handles, threads and object store over 200 short epochs with two workers.

Runs only by name (`python -m benchmarks soak`; it takes minutes): digits, ResNet-8, InfoBatch without annealing, rows
through Ray Data. After each epoch it samples this process and all its descendants (raylet and its services, ScoreActor,
split coordinator, workers): memory (RSS without shared pages), open file handles, threads, and the bytes in the object
store.

A row is the least-squares slope per epoch after the first 20 epochs; its spread is the slope ± two standard errors.
These treat epochs as independent, so they are on the narrow side. "Flat" means a growth over the fitted epochs of at
most 2 % of the level, or 1 MiB in the object store, which is nearly empty. The row below each total shows that growth
and its goal. A leak of one handle or thread per epoch would be ten times the limit.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.harness import Figure
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train

EPOCHS, WARM_UP_EPOCHS = 200, 20
MAX_GROWTH, MAX_STORE_GROWTH = 0.02, 2.0**20
_ROLES = ("ScoreActor", "RayTrainWorker", "SplitCoordinator", "TrainController", "raylet", "gcs_server")


@dataclass(frozen=True)
class Trend:
    """Least-squares trend of one quantity.

    Attributes:
        name: the quantity.
        slope: change per epoch.
        error: standard error of the slope.
        num_epochs: span of the fitted epochs.
        level: median of the quantity.
    """

    name: str
    slope: float
    error: float
    num_epochs: int
    level: float

    @property
    def growth(self) -> float:
        """Growth over the fitted epochs."""
        return self.slope * self.num_epochs

    @property
    def limit(self) -> float:
        """The largest growth that counts as flat."""
        return max(MAX_GROWTH * self.level, 1.0, MAX_STORE_GROWTH if "object store" in self.name else 0.0)


def figures() -> Iterator[Figure]:
    """Yield the slopes of all processes together and of each kind of process."""
    with tempfile.TemporaryDirectory() as folder:
        samples = sample_run(Path(folder), EPOCHS, num_workers=2)
    for trend in fit_trends(samples, WARM_UP_EPOCHS):
        margin = 2 * trend.error
        yield Figure(f"{trend.name} per epoch", [trend.slope - margin, trend.slope, trend.slope + margin])
        if trend.name.startswith("all"):
            name = f"  growth over {trend.num_epochs} epochs, level {trend.level:.4g} (holds: flat)"
            yield Figure(name, [trend.growth], f"≤ {trend.limit:.4g}")


def sample_run(folder: Path, epochs: int, num_workers: int) -> dict[int, Counter[str]]:
    """Train in a run folder below `folder`; return the resources in use after each epoch."""
    start_ray()
    samples: dict[int, Counter[str]] = {}
    config = make_config(
        {
            "data": {"source": "digits"},
            "model": {"name": "resnet8"},
            "method": {"name": "infobatch", "anneal_start": 1.0},
            "train": {"epochs": epochs, "batch_size": 64},
            "scaling": {"num_workers": num_workers, "use_gpu": False, "stream": "ray"},
            "run": {"storage_path": str(folder), "name": "soak"},
        }
    )
    train(config, on_epoch=lambda line: samples.update({line["epoch"]: resources()}))
    return samples


def fit_trends(samples: Mapping[int, Counter[str]], warm_up: int) -> list[Trend]:
    """Fit each quantity over the epochs from `warm_up` on; totals come first."""
    epochs = np.array([epoch for epoch in samples if epoch >= warm_up])
    names = sorted({name for epoch in epochs for name in samples[epoch]})
    trends = []
    for name in sorted(names, key=lambda name: not name.startswith("all")):
        values = np.array([float(samples[epoch][name]) for epoch in epochs])
        centered = epochs - epochs.mean()
        slope = float(centered @ (values - values.mean()) / (centered @ centered))
        residuals = values - values.mean() - slope * centered
        error = float(np.sqrt((residuals @ residuals) / max(1, len(epochs) - 2) / (centered @ centered)))
        trends.append(Trend(name, slope, error, int(np.ptp(epochs)), float(np.median(values))))
    return trends


def resources() -> Counter[str]:
    """Return the resources that this process, its descendants, and the object store hold."""
    counts: Counter[str] = Counter()
    for process in (this := psutil.Process(), *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            memory: Any = process.memory_info()
            private = memory.rss - memory.shared
            role = "driver" if process.pid == this.pid else _role(process.cmdline())
            counts[f"{role}: bytes"] += private
            for name, value in (("bytes", private), ("handles", process.num_fds()), ("threads", process.num_threads())):
                counts[f"all processes: {name}"] += value
            counts["all processes: number"] += 1
    used = ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]
    counts["all nodes: object store bytes"] = int(used)
    return counts


def _role(command: list[str]) -> str:
    title = " ".join(command)
    known = next((role for role in _ROLES if role in title), None)
    if known is None and title.startswith("ray::"):  # pooled processes, whose title is that of their current task
        return "Ray's task workers and other actors"
    return known or "other processes (Ray's agents)"
