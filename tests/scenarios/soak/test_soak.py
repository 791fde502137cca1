"""Long runs leak neither memory nor threads nor handles; `python -m benchmarks soak` is the longest form."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest
import ray

from benchmarks.soak import fit_trends, sample_run
from rayprune.engine.train.driver import train
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


@pytest.mark.scenario
def test_epochs_with_a_worker_leak_no_memory_threads_and_handles(tmp_path: Path) -> None:
    try:
        samples = sample_run(tmp_path, epochs=60, num_workers=1)
    finally:
        ray.shutdown()
    totals = [trend for trend in fit_trends(samples, warm_up=20) if trend.name.startswith("all")]
    assert len(totals) == 5
    assert [trend for trend in totals if trend.growth > trend.limit] == []
