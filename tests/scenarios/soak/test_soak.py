"""Long runs leak neither memory nor threads nor handles; `python -m benchmarks soak` is the longest form."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from rayprune.engine.train.driver import train
from tests.support.paths import ROOT
from tests.support.runs import run_config


def test_epochs_without_workers_leak_no_threads_and_no_handles(tmp_path: Path) -> None:
    epochs, process = 12, psutil.Process()
    samples: list[tuple[int, int]] = []
    config = run_config(tmp_path, train={"epochs": epochs, "batch_size": 32})
    train(config, on_epoch=lambda _: samples.append((threading.active_count(), process.num_fds())))
    (threads, handles), (last_threads, last_handles) = samples[2], samples[-1]
    # One leaked thread or handle per epoch would be nine more.
    assert last_threads - threads < 3, samples
    assert last_handles - handles < 3, samples


# A process of its own: a Ray that earlier tests have started would keep metrics of every execution.
SOAK = """
import pickle, sys
from pathlib import Path
from benchmarks.soak import fit_trends, sample_run
trends = fit_trends(sample_run(Path(sys.argv[1]), epochs=60, num_workers=1), warm_up=20)
Path(sys.argv[2]).write_bytes(pickle.dumps(trends))
"""


@pytest.mark.scenario
def test_epochs_with_a_worker_leak_no_memory_threads_and_handles(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SOAK, str(tmp_path), str(tmp_path / "trends")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    trends = pickle.loads((tmp_path / "trends").read_bytes())
    totals = [trend for trend in trends if trend.name.startswith("all")]
    assert len(totals) == 5
    assert [trend for trend in totals if trend.growth > trend.limit] == []
