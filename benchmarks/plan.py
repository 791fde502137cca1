"""Seconds of a selection and of an ordered plan, and their peak memory per sample."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from benchmarks.harness import Figure, peak_bytes, seconds
from rayprune import InfoBatch, Plan, Selection, Selector

CASES = (
    (100_000, 9, "", ""),
    (1_000_000, 9, "≤ 0.06", ""),
    (10_000_000, 5, "", ""),
    (100_000_000, 3, "≤ 10", "≤ 24"),
)


def figures() -> Iterator[Figure]:
    """Yield the figures of each size; each size runs in its own process, for the sake of its memory peak."""
    for num_samples, count, goal_s, goal_bytes in CASES:
        command = [sys.executable, "-m", "benchmarks.plan", str(num_samples), str(count)]
        values = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = f"{num_samples:.0e} samples"
        yield Figure(f"ordered plan, everything kept, hash included, {size}, s", values["plan"], goal_s)
        yield Figure(f"InfoBatch selection, {size}, s", values["select"])
        peak = f"peak memory of plan + selection + score table, {size}, bytes per sample"
        yield Figure(peak, values["bytes"], goal_bytes)


def _measure(num_samples: int, count: int) -> dict[str, list[float]]:
    before = peak_bytes()
    full = Selection.full(num_samples)
    epochs = iter(range(count))

    def plan() -> None:
        assert len(Plan.of_selection(full, batch_size=1024, seed=0, epoch=next(epochs)).hash) == 32

    plans = [seconds(plan) for _ in range(count)]
    selector = Selector(InfoBatch(), num_samples, num_epochs=count + 20, seed=0)
    selector.begin_epoch(0)
    rng = np.random.default_rng(0)
    for start in range(0, num_samples, 1 << 20):
        ids = np.arange(start, min(start + (1 << 20), num_samples))
        selector.observe(ids, {"loss": rng.exponential(size=ids.size).astype(np.float32)}, epoch=0)
    selects = [seconds(lambda epoch=epoch: selector.begin_epoch(epoch)) for epoch in range(1, count + 1)]
    return {"plan": plans, "select": selects, "bytes": [(peak_bytes() - before) / num_samples]}


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]))))
