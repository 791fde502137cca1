"""Whether a long run grows: memory, file handles, threads and object store over 200 short epochs with two workers.

By name only (`python -m benchmarks soak`; some minutes): digits, ResNet-8, InfoBatch without annealing, rows through
Ray Data. After each epoch all processes below this one (driver, raylet and its services, ScoreActor, split coordinator,
workers) are looked at: RSS without what is shared, open file handles, threads; and what the object store holds.

A row is the least-squares slope an epoch after the first 20; its spread is the slope ± two standard errors (they take
epochs for independent, so that they are on the narrow side). "Flat" is a growth over the fitted epochs of at most 2 %
of the level, or of 1 MiB in the object store, which is nearly empty: the row below each total tells that growth, and
has the goal. A leak of one handle or thread an epoch would be ten times that.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import ray

from benchmarks.harness import Figure
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train

EPOCHS, LEFT_OUT = 200, 20
_ROLES = ("ScoreActor", "RayTrainWorker", "SplitCoordinator", "TrainController", "raylet", "gcs_server")
MOST_GROWTH, STORE_GROWTH = 0.02, 2.0**20


def figures() -> Iterator[Figure]:
    """Yield the slopes of all processes together and of each kind."""
    start_ray()
    seen: dict[int, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            {
                "data": {"source": "digits"},
                "model": {"name": "resnet8"},
                "method": {"name": "infobatch", "anneal_start": 1.0},
                "train": {"epochs": EPOCHS, "batch_size": 64},
                "scaling": {"num_workers": 2, "use_gpu": False, "stream": "ray"},
                "run": {"storage_path": folder, "name": "soak"},
            }
        )
        train(config, on_epoch=lambda line: seen.update({line["epoch"]: _look()}))
    kept = {epoch: sample for epoch, sample in seen.items() if epoch >= LEFT_OUT}
    names = sorted({name for sample in kept.values() for name in sample})
    for name in sorted(names, key=lambda name: (not name.startswith("all"), name)):
        yield from _slope(name, np.array(list(kept)), np.array([float(sample[name]) for sample in kept.values()]))


def _slope(name: str, epochs: np.ndarray, values: np.ndarray) -> Iterator[Figure]:
    centred = epochs - epochs.mean()
    slope = float(centred @ (values - values.mean()) / (centred @ centred))
    residuals = values - values.mean() - slope * centred
    error = float(np.sqrt((residuals @ residuals) / max(1, len(epochs) - 2) / (centred @ centred)))
    yield Figure(f"{name} an epoch", [slope - 2 * error, slope, slope + 2 * error])
    if name.startswith("all"):
        growth, level = slope * float(np.ptp(epochs)), float(np.median(values))
        most = max(MOST_GROWTH * level, 1.0, STORE_GROWTH if "object store" in name else 0.0)
        grown = f"  growth over {np.ptp(epochs)} epochs, level {level:.4g} (holds: flat)"
        yield Figure(grown, [growth], f"≤ {most:.4g}")


def _look() -> Counter[str]:
    """Return what the processes below this one and the object store hold now."""
    seen: Counter[str] = Counter()
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            memory: Any = process.memory_info()
            private = memory.rss - memory.shared
            role = "driver" if process.pid == own.pid else _role(process.cmdline())
            seen[f"{role}: bytes"] += private
            for name, value in (("bytes", private), ("handles", process.num_fds()), ("threads", process.num_threads())):
                seen[f"all processes: {name}"] += value
            seen["all processes: number"] += 1
    used = ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]
    seen["all nodes: object store bytes"] = int(used)
    return seen


def _role(command: list[str]) -> str:
    words = " ".join(command)
    named = next((role for role in _ROLES if role in words), None)
    if named is None and words.startswith("ray::"):  # a pool of processes whose title is the task that runs just now
        return "Ray's task workers and other actors"
    return named or "other processes (Ray's agents)"
