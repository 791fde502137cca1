"""A score table in one actor and in four score shards: InfoBatch at 2e8 samples, with the memory of each process.

Runs only by name (`python -m benchmarks shards`): it takes some 5 minutes and 12 GB of memory. RAYPRUNE_SHARDS_ROWS
sets another number of samples.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from benchmarks.billion import run_epoch, spec_of
from benchmarks.harness import Figure
from rayprune.engine.cluster import start_ray
from rayprune.engine.scoring.client import ScoreClient

SAMPLES = int(os.environ.get("RAYPRUNE_SHARDS_ROWS", "200000000"))
SHARDS = 4


def figures() -> Iterator[Figure]:
    """Yield seconds and memory peaks, with one actor and with shards."""
    hashes = set()
    for num_shards in (1, SHARDS):
        title = f"infobatch, {SAMPLES:.0e} samples, {num_shards} score shard{'s' * (num_shards > 1)}"
        with tempfile.TemporaryDirectory() as folder:
            start_ray()
            client, handles = ScoreClient.start(spec_of("infobatch", SAMPLES, folder), "shards", num_shards)
            client.progress(60.0)  # all of them have started
            before = _peaks()
            snapshots, header, values = run_epoch(client, SAMPLES)
            assert snapshots.pop().state["table/last_visit"].size == SAMPLES
            hashes.add(header.hash)
            for name, value in values.items():
                yield Figure(f"{title}: {name}", [value])
            for name, peak in _peaks().items():
                yield Figure(f"{title}: peak memory of a {name}, bytes per sample", [(peak - before[name]) / SAMPLES])
            for handle in handles:
                ray.kill(handle)
            ray.shutdown()
    assert len(hashes) == 1, "the shards have another plan"


def _peaks() -> dict[str, int]:
    """Return the largest peak of the actors' memory by class; what they map of Ray's object store counts, too."""
    peaks: dict[str, int] = {}
    for process in psutil.process_iter(["cmdline"]):
        title = (process.info["cmdline"] or [""])[0]
        for name in ("ScoreActor", "ScoreShard"):
            if title.startswith(f"ray::{name}"):
                peaks[name] = max(peaks.get(name, 0), _peak(process.pid))
    return peaks


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
