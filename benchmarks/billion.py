"""The ScoreActor at 1e9 samples: observe, select, plan, save and restart, for three methods.

Runs only by name (`python -m benchmarks billion`): it takes some 20 minutes, 22 GB of memory and 11 GB of disk. With
less free memory it measures the largest size that fits and reports the sizes that it skipped. Each method runs in its
own process, and so does its restart, for the sake of the memory peaks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import POSITION, Figure, peak_bytes, seconds
from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, Barrier, EpochSnapshot, PlanHeader, PlanPass, Push, pack
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.errors import DataError
from rayprune.sources.base import Column, DescribedSource, Schema

SIZES = (1_000_000_000, 500_000_000, 200_000_000)
PEAK_BYTES_PER_SAMPLE = 21
NUM_EPOCHS, BATCH_SIZE, PUSH_ROWS = 20, 1024, 1 << 20
# Name → the method's config; without random ones, `epsilon_greedy` keeps the highest losses.
METHODS: dict[str, dict[str, Any]] = {
    "infobatch": {"name": "infobatch"},
    "random_epoch": {"name": "random_epoch"},
    "top-k": {"name": "epsilon_greedy", "epsilon": 0.0},
}


class Counted(DescribedSource):
    """Samples that nobody reads; only their number matters to the actor."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples, Schema({"x": Column((1,), "float32")}), "billion")

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return zeros."""
        return {"x": np.zeros((len(ids), 1), np.float32)}

    def _read_labels(self) -> np.ndarray:
        raise DataError("these samples have no labels")


def figures() -> Iterator[Figure]:
    """Yield the figures of the largest size that fits."""
    free = psutil.virtual_memory().available
    for size in SIZES:
        if size * PEAK_BYTES_PER_SAMPLE > free:
            needed = size * PEAK_BYTES_PER_SAMPLE / 1e9
            yield Figure(f"{size:.0e} samples skipped: {needed:.0f} GB needed; GB free", [free / 1e9])
            continue
        for method in METHODS:
            yield from _figures_of(method, size)
        return


def _figures_of(method: str, size: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        for part in ("run", "restart"):
            command = [sys.executable, "-m", "benchmarks.billion", part, method, str(size), folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message, as where memory is short"])[-1]
                yield Figure(f"{method}, {size:.0e} samples, {part} failed: {reason}; exit code", [done.returncode])
                return
            found[part] = json.loads(done.stdout)
    assert found["restart"].pop("hash") == found["run"].pop("hash"), "the restarted actor has another plan"
    for part, figures in found.items():
        for name, value in figures.items():
            yield Figure(f"{method}, {size:.0e} samples, {part}: {name}", [value])


def spec_of(method: str, num_samples: int, folder: str) -> ScoreSpec:
    """Return the spec of an actor over samples that nobody reads."""
    return ScoreSpec(METHODS[method], Counted(num_samples), 0, NUM_EPOCHS, 0, BATCH_SIZE, "pad", 4, folder, 0)


def run_epoch(
    actor: ScoreActor | ScoreClient, num_samples: int
) -> tuple[list[EpochSnapshot], PlanHeader, dict[str, Any]]:
    """Run an epoch of one rank and lay out the next one; return the state, the plan's header and the seconds."""
    first, second = (PlanPass(AttemptKey(1, epoch), "train", 1) for epoch in (0, 1))
    values = {"plan of all samples, ordered, with its hash, s": seconds(lambda: actor.announce(first))}
    losses = np.random.default_rng(0).exponential(size=PUSH_ROWS).astype(np.float32)
    observing, num_pushes = 0.0, 0
    for start in range(0, num_samples, PUSH_ROWS):
        ids = np.arange(start, min(start + PUSH_ROWS, num_samples))
        layout, buffer = pack(ids, {"loss": losses[: ids.size]})
        push = Push(0, num_pushes, layout, buffer)
        observing += seconds(lambda push=push: actor.observe(first.key, push))
        num_pushes += 1
    values["observing all losses, s"] = observing
    barrier = Barrier("close", 0, 1)
    assert actor.arrive(first.key, barrier, 0, num_pushes) == []
    snapshots: list[EpochSnapshot] = []
    values["selecting, s"] = seconds(lambda: snapshots.extend(filter(None, [actor.pass_barrier(first.key, barrier)])))
    headers: list[PlanHeader] = []
    values["plan of the kept samples, s"] = seconds(lambda: headers.append(actor.announce(second)))
    values["kept, share of all samples"] = headers[0].num_kept / num_samples
    values["rows of 100 batches, s"] = seconds(lambda: actor.rank_rows(second, 0, 1000, 1100))
    return snapshots, headers[0], values


def _run(method: str, num_samples: int, folder: str) -> dict[str, Any]:
    """Run an epoch of one rank, lay out the next one and save."""
    before = peak_bytes()
    actor = ScoreActor(spec_of(method, num_samples, folder))
    snapshots, header, values = run_epoch(actor, num_samples)
    parts: dict[str, Any] = {"model": {}, "trainer": {}, "selector": snapshots[0].state, "position": POSITION}
    values["saving, s"] = seconds(lambda: write_checkpoint(Path(folder), 1, **parts))
    saved = sum(file.stat().st_size for file in Path(folder, "checkpoints", "epoch-000001").iterdir())
    values["saved bytes per sample"] = saved / num_samples
    values["peak bytes per sample"] = (peak_bytes() - before) / num_samples
    return {**values, "hash": header.hash}


def _restart(method: str, num_samples: int, folder: str) -> dict[str, Any]:
    """Start the actor again, as Ray does after its process is lost: it loads its state and lays out the same plan."""
    before = peak_bytes()
    actor, again = ScoreActor(spec_of(method, num_samples, folder)), PlanPass(AttemptKey(2, 1), "train", 1)
    headers: list[Any] = []
    values = {"loading the state and planning, s": seconds(lambda: headers.append(actor.announce(again)))}
    values["peak bytes per sample"] = (peak_bytes() - before) / num_samples
    return {**values, "hash": headers[0].hash}


if __name__ == "__main__":
    part, method, size, folder = sys.argv[1:]
    print(json.dumps({"run": _run, "restart": _restart}[part](method, int(size), folder)))
