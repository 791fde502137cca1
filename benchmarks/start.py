"""Seconds from the command to the first training step, and the parts due to Python, torch, Ray and rayprune.

This runs `python -m rayprune train` on the digits in its own process, for num_workers 0, 1 and 2. Its model
(`timed_model`) logs the time of its forward passes; the first one on a whole batch in training mode is the first step.
In alternation runs a reference program that does only what any such run must do: it imports torch, Ray, Ray Train and
Ray Data, starts Ray with the same options, and lets a TorchTrainer with as many workers run a function that creates an
optimizer (the first one in a process takes torch a second) and writes the time. The difference is rayprune's own part:
its imports, reading config and data, the checks, the run folder, the ScoreActor, the model, the first batch.
RAYPRUNE_START_PAIRS (2) sets the number of repetitions; Ray's start-up time varies in steps of half a second or more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure

BATCH, ROWS = 64, 512
REPETITIONS = int(os.environ.get("RAYPRUNE_START_PAIRS", "2"))
WORKERS = (0, 1, 2)
LOG = "RAYPRUNE_BENCH_LOG"
_ROOT = Path(__file__).parents[1]


def figures() -> Iterator[Figure]:
    """Yield the seconds for each number of workers, their parts, and rayprune's own part."""
    _command(0)  # fills the page cache
    for workers in WORKERS:
        totals: list[float] = []
        parts: list[dict[str, float]] = []
        for _ in range(REPETITIONS):
            totals.append(_command(workers))
            parts.append(_reference(workers))
        name = f"num_workers {workers}"
        yield Figure(f"command to first step, {name}, s", totals)
        for part in parts[0]:
            yield Figure(f"  of it: {part}, s", [each[part] for each in parts])
        own = [total - sum(part.values()) for total, part in zip(totals, parts, strict=True)]
        yield Figure(f"  of it: rayprune, {name}, s", own, "≤ 1")


def timed_model(num_classes: int, input_shape: tuple[int, ...]) -> Any:
    """Build the model of the command: an MLP that logs the time of each training forward pass to LOG."""
    import torch

    class TimedModel(torch.nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.training and torch.is_grad_enabled():
                with Path(os.environ[LOG]).open("a") as file:
                    file.write(f"{time.time()} {len(inputs)}\n")
            logits: torch.Tensor = super().forward(inputs)
            return logits

    size = 1
    for length in input_shape:
        size *= length
    return TimedModel(torch.nn.Flatten(), torch.nn.Linear(size, 64), torch.nn.ReLU(), torch.nn.Linear(64, num_classes))


def _command(workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder) / "start.yaml", Path(folder) / "log"
        environment = {**os.environ, LOG: str(log), "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode, as torch and Ray have
        config.write_text(
            json.dumps(
                {
                    "data": {"source": "digits", "limit": ROWS},
                    "model": {"name": "benchmarks.start:timed_model"},
                    "method": {"name": "infobatch"},
                    "train": {"epochs": 3, "batch_size": BATCH, "stop_after": 1},
                    "scaling": {"num_workers": workers, "use_gpu": False},
                    "run": {"storage_path": folder, "name": "run"},
                }
            )
        )
        start = time.time()
        command = [sys.executable, "-m", "rayprune", "train", str(config)]
        subprocess.run(command, check=True, capture_output=True, cwd=_ROOT, env=environment)
        steps = [line.split() for line in log.read_text().splitlines()]
        return min(float(at) for at, rows in steps if int(rows) == BATCH // max(1, workers)) - start


def _reference(workers: int) -> dict[str, float]:
    """Return the seconds of each part of the reference program."""
    last = time.time()
    command = [sys.executable, "-m", "benchmarks.start", str(workers)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT)
    marks: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    parts = {}
    for name, at in marks.items():
        parts[name], last = at - last, at
    return parts


def _reference_program(workers: int) -> dict[str, float]:
    """Run the reference program; return the time at the end of each part, in order."""
    marks = {"Python": time.time()}
    import torch

    marks["import torch"] = time.time()
    import ray

    marks["import ray"] = time.time()
    import ray.data
    import ray.train.torch

    marks["import ray.train, ray.data"] = time.time()
    if workers:
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
        ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
        marks["ray.init"] = time.time()
    with tempfile.TemporaryDirectory() as folder:
        first_step = Path(folder) / "first_step"

        def loop() -> None:
            torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
            if ray.train.get_context().get_world_rank() == 0:
                first_step.write_text(str(time.time()))

        scaling = ray.train.ScalingConfig(
            num_workers=workers,
            resources_per_worker={"CPU": 0.5} if workers else None,
        )
        run = ray.train.RunConfig(storage_path=folder, name="bare")
        ray.train.torch.TorchTrainer(loop, scaling_config=scaling, run_config=run).fit()
        marks["workers"] = float(first_step.read_text())
    return marks


if __name__ == "__main__":
    print(json.dumps(_reference_program(int(sys.argv[1]))))
