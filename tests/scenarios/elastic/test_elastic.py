"""A run of one to two workers takes a machine that comes, goes on when it is lost, and its plans stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from rayprune.engine.storage.run_folder import read_metrics, read_selection
from rayprune.engine.train.driver import train
from tests.support.runs import results, run_config, scores_of, user

EPOCHS, BATCH = 8, 8


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of its own beside the session's: one machine with one CPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def wait(reached: Callable[[], bool], process: subprocess.Popen[bytes], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def test_machines_come_and_go_inside_epochs(tmp_path: Path, cluster: Cluster) -> None:
    log = tmp_path / "ranks"
    log.touch()
    sections: dict[str, dict[str, Any]] = {
        "train": {"epochs": EPOCHS, "batch_size": BATCH},
        "method": {"name": "infobatch", "ema": 0.5, "anneal_start": 1.0},
        "scaling": {"num_workers": [1, 2], "cpus_per_worker": 1, "threads": 1, "stream": "ray"},
        "run": {"checkpoint_steps": 2, "keep_selections": EPOCHS, "address": cluster.address},
    }
    config = run_config(
        tmp_path, "elastic", model={"name": user("grows"), "log": str(log), "pause_s": 0.15}, **sections
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "rayprune", "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait(lambda: log.stat().st_size > 3, process, "the first steps on one machine")
        second = cluster.add_node(num_cpus=1)
        wait(lambda: log.read_bytes().count(b"2") > 4, process, "the steps on two machines")
        cluster.remove_node(second, allow_graceful=False)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, out.decode()[-3000:]
    ranks = log.read_text()
    assert ranks.lstrip("1").rstrip("1").strip("2") == "", f"one, two, one: {ranks}"
    assert ranks.endswith("1"), "the run ended before the second machine was lost"

    metrics = read_metrics(tmp_path / "elastic")
    kept = [read_selection(tmp_path / "elastic", epoch) for epoch in range(EPOCHS)]
    assert [line["kept"] for line in metrics] == [selection.num_kept for selection in kept]
    assert [line["samples_trained"] for line in metrics] == np.cumsum([line["kept"] for line in metrics]).tolist()
    visits = np.max([np.where(selection.codes > 0, epoch, -1) for epoch, selection in enumerate(kept)], axis=0)
    assert scores_of(tmp_path / "elastic")["last_visit"].tolist() == visits.tolist()
    # Unbiased: the weights of what was kept stand for all samples, whoever trained on them.
    assert all(0.9 < selection.weights.sum() / 301 < 1.1 for selection in kept)
    # Up to the epoch of the first change every sum was rounded as on one machine.
    (log.with_name("alone.ranks")).write_bytes(b"2")
    model = {**config.model.options, "name": config.model.name, "log": str(log.with_name("alone.ranks"))}
    scaling = {"num_workers": 0, "threads": 1}
    alone = train(run_config(tmp_path, "alone", **{**sections, "model": model, "scaling": scaling}))
    ends = np.cumsum([-(-line["kept"] // BATCH) for line in metrics])
    same = 1 + int(np.searchsorted(ends, ranks.index("2") - sections["run"]["checkpoint_steps"], side="right"))
    # Lost inside an epoch: of it, only steps since the last checkpoint were done again, at each of the two changes.
    assert len(ranks) - ends[-1] <= 4 * sections["run"]["checkpoint_steps"], (len(ranks), ends.tolist())
    keys = ("plan_hash", "kept", "samples_trained")
    assert results(metrics[:same], keys) == results(alone.metrics[:same], keys)
