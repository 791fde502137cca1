"""`ray job submit` on a real head node: a run and a sweep, with a model of the submitted folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.run_folder import read_metrics, read_selection

RAY = Path(sys.executable).with_name("ray")
CONFIG = """
data: {source: digits, limit: 300}
model: {name: net.py:small}
method: {name: infobatch, prune_ratio: 0.5, anneal_start: 1.0}
train: {epochs: 3, batch_size: 32}
optim: {lr: 0.05}
"""
MODEL = """
from rayprune.nn.models import build_model

def small(*, num_classes, input_shape):
    return build_model("mlp", num_classes=num_classes, input_shape=input_shape, hidden=[16])
"""


@dataclass(frozen=True)
class Head:
    """A head node's dashboard port on the loopback interface, and what its clients have to set."""

    dashboard: int
    environment: dict[str, str]


def free_ports(number: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture
def head() -> Iterator[Head]:
    """Start a head node of our own; `ray stop` would end every Ray of this machine."""
    port, dashboard, client, agent = free_ports(4)
    # A token of its own: with one in a file of this machine a head asks for it, and its clients do not send it.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, **token, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="rp", ignore_cleanup_errors=True) as folder:  # Ray's sockets: short paths
        command = [
            *(str(RAY), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={agent}",  # without it jobs find no agent beside another Ray
        ]
        with (Path(folder) / "head.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            head = Head(dashboard, environment)
            wait_for(head, process, Path(folder) / "head.log")
            yield head
        finally:
            process.terminate()  # it ends what it has started
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the head takes jobs."""
    deadline = time.monotonic() + 90
    address = f"http://127.0.0.1:{head.dashboard}"
    command = [str(RAY), "job", "submit", "--address", address, "--no-wait", "--", "true"]
    while (asked := subprocess.run(command, env=head.environment, capture_output=True, text=True)).returncode:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, asked.stdout[-1500:] + asked.stderr[-1500:]
        time.sleep(0.5)


def submit(head: Head, folder: Path, *words: str) -> subprocess.Popen[str]:
    address = f"http://127.0.0.1:{head.dashboard}"
    command = [str(RAY), "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable]
    return subprocess.Popen(
        [*command, "-m", "rayprune", *words],
        cwd=folder,
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_is_sent_to_a_head_node_is_complete(tmp_path: Path, head: Head) -> None:
    project, runs = tmp_path / "project", tmp_path / "runs"
    project.mkdir()
    (project / "run.yaml").write_text(CONFIG)
    (project / "net.py").write_text(MODEL)
    sweep = "scaling: {num_workers: 0}\nsweep: {space: {method.prune_ratio: [0.3, 0.6]}}\n"
    (project / "sweep.yaml").write_text(CONFIG + sweep)
    storage = f"run.storage_path={runs}"
    workers = ("scaling.num_workers=1", "scaling.cpus_per_worker=1", "scaling.threads=1", "scaling.stream=ray")
    jobs = {
        "train": submit(head, project, "train", "run.yaml", "run.name=job", storage, *workers),
        "sweep": submit(head, project, "sweep", "sweep.yaml", storage),
        "lost": submit(head, project, "train", "run.yaml"),
    }
    told = {name: job.communicate(timeout=240)[0] for name, job in jobs.items()}
    assert jobs["train"].returncode == 0, told["train"][-3000:]
    assert jobs["sweep"].returncode == 0, told["sweep"][-3000:]

    metrics = read_metrics(runs / "job")
    assert [line["epoch"] for line in metrics] == [0, 1, 2]
    assert newest_position(runs / "job") == (3, 0)
    assert read_selection(runs / "job", 2).num_kept == metrics[-1]["kept"] < 300
    assert len(pd.read_parquet(runs / "job" / "scores.parquet")) == 300
    for name in ("config.yaml", "environment.json", "tensorboard"):
        assert (runs / "job" / name).exists()

    (folder,) = runs.glob("*-sweep-*")
    assert list(pd.read_parquet(folder / "results.parquet")["status"]) == ["finished", "finished"]

    assert jobs["lost"].returncode != 0
    assert "'runs' lies in the working directory of a Ray job, which Ray deletes" in told["lost"]
