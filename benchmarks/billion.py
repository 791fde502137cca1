"""InfoBatch's selection over 1e9 samples: seconds, and peak bytes per sample.

Runs only by name (`python -m benchmarks billion`): it takes a minute or two and up to 14 GB. With less free memory it
measures the largest size that fits and reports the sizes that it skipped. It runs in its own process, with one
repetition per epoch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import psutil

from benchmarks.harness import Figure, peak_bytes, seconds
from rayprune import InfoBatch, Selector

SIZES = (1_000_000_000, 500_000_000, 200_000_000)
FREE_BYTES_PER_SAMPLE = 14
COUNT, PUSH_ROWS = 2, 1 << 20


def figures() -> Iterator[Figure]:
    """Yield the figures of the largest size that fits."""
    free = psutil.virtual_memory().available
    for size in SIZES:
        if size * FREE_BYTES_PER_SAMPLE > free:
            needed = size * FREE_BYTES_PER_SAMPLE / 1e9
            yield Figure(f"{size:.0e} samples skipped: {needed:.0f} GB needed; GB free", [free / 1e9])
            continue
        command = [sys.executable, "-m", "benchmarks.billion", str(size)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            yield Figure(f"{size:.0e} samples failed (memory); exit code", [run.returncode])
            continue
        values = json.loads(run.stdout)
        yield Figure(f"InfoBatch selection, {size:.0e} samples, s", values["select"])
        yield Figure(f"folding all losses, {size:.0e} samples, s", values["fold"])
        yield Figure(f"score table and selection, {size:.0e} samples, peak bytes per sample", values["bytes"])
        return


def _measure(num_samples: int) -> dict[str, list[float]]:
    before = peak_bytes()
    selector = Selector(InfoBatch(), num_samples, num_epochs=COUNT + 20, seed=0)
    selector.begin_epoch(0)
    losses = np.random.default_rng(0).exponential(size=PUSH_ROWS).astype(np.float32)
    fold = 0.0
    for start in range(0, num_samples, PUSH_ROWS):
        ids = np.arange(start, min(start + PUSH_ROWS, num_samples))
        fold += seconds(lambda ids=ids: selector.observe(ids, {"loss": losses[: ids.size]}, epoch=0))
    selects = [seconds(lambda epoch=epoch: selector.begin_epoch(epoch)) for epoch in range(1, COUNT + 1)]
    return {"select": selects, "fold": [fold], "bytes": [(peak_bytes() - before) / num_samples]}


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
