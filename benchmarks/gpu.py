"""On a GPU: the engine compared with a plain loop over data on the device, the cost of recording, the gain of pruning.

CIFAR-10, ResNet-18 with a 3×3 stem, bf16, channels_last, batch 512. RAYPRUNE_CIFAR10 names a folder with the Parquet
files (train-*.parquet, test-*.parquet); without it the images are random and accuracy is not measured. The accuracy
runs also read RAYPRUNE_GPU_SEEDS (3) and RAYPRUNE_GPU_EPOCHS (30). RAYPRUNE_GPU_COMPILE=1 turns torch.compile on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_steps import EngineSteps, elapsed_ms, idle_share, plain_epochs
from benchmarks.harness import Figure, ratios
from rayprune.config import Config, make_config
from rayprune.config.yaml import merge
from rayprune.engine.train.driver import train
from rayprune.experiments.compare.runner import compare
from rayprune.sources import SampleSource, open_data

_POINTS = 0.2


@dataclass(frozen=True)
class Setting:
    """Workload and amount of measurement.

    Attributes:
        device: the device to train on.
        data: the config's `data` section.
        model: name of the network.
        batch: global batch size.
        epochs: epochs of each throughput run; the first one is warm-up.
        rounds: runs of each stream, in alternation with the plain loop.
        steps: steps of each profile; a tenth as many precede as warm-up.
        repeats: repetitions of the profile, and of steps with and without recording.
        workers: Ray Train workers; 0 for this process.
        streams: transports to measure.
        compiled: whether to use torch.compile.
    """

    device: torch.device
    data: dict[str, Any]
    model: str = "resnet18"
    batch: int = 512
    epochs: int = 4
    rounds: int = 3
    steps: int = 60
    repeats: int = 5
    workers: int = 1
    streams: tuple[str, ...] = ("local", "ray", "device")
    compiled: bool = False

    def config(self, folder: Path, name: str, **sections: Any) -> Config:
        """Return the config of a run."""
        base: dict[str, Any] = {
            "data": self.data,
            "model": {"name": self.model},
            "method": {"name": "full"},
            "train": {
                "epochs": self.epochs,
                "batch_size": self.batch,
                "validate_every": self.epochs,
                "precision": "bf16" if self.device.type == "cuda" else "fp32",
                "compile": self.compiled,
            },
            "optim": {"lr": 0.2, "schedule": "onecycle"},
            "scaling": {"num_workers": self.workers, "use_gpu": self.device.type == "cuda"},
            "run": {"storage_path": str(folder), "name": name},
        }
        return make_config(merge(base, sections))


def figures() -> Iterator[Figure]:
    """Yield the figures, or print one line that says why there are none."""
    if not torch.cuda.is_available():
        print("gpu: skipped, there is no GPU that torch can use", flush=True)
        return
    print(f"gpu: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}", flush=True)
    path = os.environ.get("RAYPRUNE_CIFAR10")
    seeds, epochs = (int(os.environ.get(f"RAYPRUNE_GPU_{n}", d)) for n, d in (("SEEDS", "3"), ("EPOCHS", "30")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        augment = {"augment": {"crop": 4, "flip": True}}
        data = {"source": "parquet", "path": path} if path else write_random_arrays(folder / "images", 50_000)
        compiled = os.environ.get("RAYPRUNE_GPU_COMPILE", "0") == "1"
        setting = Setting(torch.device("cuda", 0), {**data, **augment}, compiled=compiled)
        yield from speed(setting, folder)
        if path is None:
            print("gpu: RAYPRUNE_CIFAR10 is not set: images are random, time to an accuracy is skipped", flush=True)
            return
        yield from to_accuracy(setting, folder, epochs, seeds)


def write_random_arrays(folder: Path, rows: int) -> dict[str, Any]:
    """Write random images of CIFAR-10's size; return their `data` section."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, size in (("train", rows), ("test", max(10, rows // 5))):
        np.save(folder / f"x_{part}.npy", rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8))
        np.save(folder / f"y_{part}.npy", np.arange(size) % 10)
    return {"source": "arrays", "path": str(folder)}


def speed(setting: Setting, folder: Path) -> Iterator[Figure]:
    """Yield samples per second and their ratios, the device's idle share, and the cost of recording."""
    config = setting.config(folder, "steps")
    data = config.data
    source = open_data(data.source, limit=data.limit, cache=data.cache, **data.source_keys).train
    name = f"{setting.model}, batch {setting.batch}" + ", compiled" * setting.compiled
    yield from _throughput(setting, source, folder, name)
    steps = EngineSteps(config, source, setting.device)
    steps.take(max(2, setting.steps // 10))
    shares = [idle_share(setting.device, lambda: steps.take(setting.steps)) for _ in range(setting.repeats)]
    yield Figure("idle share of the device in steps, stream device", shares, "≤ 0.05")
    costs = []
    for _ in range(setting.repeats):
        recorded, bare = (
            elapsed_ms(setting.device, lambda keep=keep: steps.take(setting.steps, record=keep))  # type: ignore[misc]
            for keep in (True, False)
        )
        costs.append(recorded / bare - 1.0)
    yield Figure("recording ÷ step, on the device's clock", costs, "≤ 0.01")


def _throughput(setting: Setting, source: SampleSource, folder: Path, name: str) -> Iterator[Figure]:
    plain = plain_epochs(setting.config(folder, "plain"), source, setting.device)
    next(plain)
    rates: dict[str, list[float]] = {loop: [] for loop in ("plain", *setting.streams)}
    for number in range(setting.rounds):
        rates["plain"].append(next(plain))
        for stream in setting.streams:
            rates[stream].append(_engine_rate(setting, folder, stream, number))
    yield Figure(f"{name}: plain loop, data on the device, samples/s", rates["plain"])
    for stream in setting.streams:
        yield Figure(f"{name}: engine, stream {stream}, samples/s", rates[stream])
    for stream in setting.streams:
        goal = "≥ 0.95" if stream == "device" else ""
        yield Figure(f"engine, stream {stream} ÷ plain loop", ratios(rates[stream], rates["plain"]), goal)


def _engine_rate(setting: Setting, folder: Path, stream: str, number: int) -> float:
    """Return a run's training samples per second, without its first epoch."""
    lines = train(setting.config(folder, f"{stream}-{number}", scaling={"stream": stream})).metrics
    trained = lines[-1]["samples_trained"] - lines[0]["samples_trained"]
    return float(trained / sum(line["seconds"]["train"] for line in lines[1:]))


def to_accuracy(setting: Setting, folder: Path, epochs: int, seeds: int, **sections: Any) -> Iterator[Figure]:
    """Yield accuracy and seconds of full training, full training in the pruned time, random subsets, and InfoBatch.

    Args:
        setting: the workload.
        folder: parent of the run folders.
        epochs: epochs of every arm but the shortened one.
        seeds: number of seeds.
        **sections: config sections that override the setting's.
    """
    base: dict[str, Any] = {
        "method": {"name": "infobatch", "prune_ratio": 0.5},
        "train": {"epochs": epochs, "label_smoothing": 0.1},
        "scaling": {"stream": "device"},
        # One run at a time, so that the seconds of every seed count.
        "compare": {
            "seeds": seeds,
            "baselines": ["full_time", "random_epoch"],
            "margin": _POINTS,
            "parallel": 1,
            "tune": False,
        },
    }
    result = compare(setting.config(folder, "accuracy", **merge(base, sections)))
    arms = {arm["name"]: arm["runs"] for arm in json.loads((result / "compare.json").read_text())["arms"]}
    target = float(np.median([run["accuracy"] for run in arms["full"]])) - _POINTS
    for name, runs in arms.items():
        length = f"{runs[0]['epochs']} epochs"
        yield Figure(f"{name}, {length}: accuracy, %", [run["accuracy"] for run in runs])
        yield Figure(f"{name}, {length}: seconds", [run["seconds"] for run in runs])
        reached = [run["seconds"] for run in runs if run["accuracy"] >= target]
        if reached:
            yield Figure(f"{name}: seconds of the runs that reach {target:.2f} %", reached)
        else:
            print(f"{name}: no run reaches {target:.2f} % (full training's median minus {_POINTS})", flush=True)
