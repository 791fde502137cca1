"""`ray job submit` to a real head node: a run and a sweep whose model comes with the submitted folder."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
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
    """A head node: its dashboard port on the loopback interface, and the token and environment of its clients."""

    dashboard: int
    token: str
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture
def head() -> Iterator[Head]:
    """Start a head node and stop it by its process; `ray stop` would end every Ray on this machine."""
    port, dashboard, client, agent = free_ports(4)
    # Where a file of this machine holds a token, a head node requires it, but its clients do not send it.
    token = uuid.uuid4().hex
    authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, **authentication, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="rp", ignore_cleanup_errors=True) as folder:  # sockets need short paths
        command = [
            *(str(RAY), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            f"--dashboard-agent-listen-port={agent}",  # the default port may be another Ray's
        ]
        with (Path(folder) / "head.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            head = Head(dashboard, token, environment)
            wait_for(head, process, Path(folder) / "head.log")
            yield head
        finally:
            process.terminate()  # this also ends its children
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the head node accepts jobs."""
    deadline = time.monotonic() + 90
    request = urllib.request.Request(head.address + "/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            if answer.status == 200:
                return
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


@pytest.mark.parametrize("with_workers_and_sweep", [False, pytest.param(True, marks=pytest.mark.scenario)])
def test_jobs_find_their_files_and_leave_complete_folders(
    tmp_path: Path, head: Head, with_workers_and_sweep: bool
) -> None:
    """The last command of the job must fail: its runs would vanish with the job's working directory."""
    project, runs = tmp_path / "project", tmp_path / "runs"
    project.mkdir()
    (project / "run.yaml").write_text(CONFIG)
    (project / "net.py").write_text(MODEL)
    sweep = "scaling: {num_workers: 0}\nsweep: {space: {method.prune_ratio: [0.3, 0.6]}}\n"
    (project / "sweep.yaml").write_text(CONFIG + sweep)
    rayprune, storage = f"{sys.executable} -m rayprune", f"run.storage_path={runs}"
    workers, sweep_command = "scaling.num_workers=0", ""
    if with_workers_and_sweep:
        workers = "scaling.num_workers=1 scaling.cpus_per_worker=1 scaling.threads=1 scaling.stream=ray"
        sweep_command = f"{rayprune} sweep sweep.yaml {storage} && "
    train = f"{rayprune} train run.yaml run.name=job {storage} {workers}"
    commands = f"{train} && {sweep_command}! {rayprune} train run.yaml"
    submit = [str(RAY), "job", "submit", "--address", head.address, "--working-dir", ".", "--", "sh", "-c", commands]
    job = subprocess.run(submit, cwd=project, env=head.environment, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "'runs' lies in the working directory of a Ray job, which Ray deletes" in job.stdout + job.stderr

    metrics = read_metrics(runs / "job")
    assert [line["epoch"] for line in metrics] == [0, 1, 2]
    assert newest_position(runs / "job") == (3, 0)
    assert read_selection(runs / "job", 2).num_kept == metrics[-1]["kept"] < 300
    assert len(pd.read_parquet(runs / "job" / "scores.parquet")) == 300
    for name in ("config.yaml", "environment.json", "tensorboard"):
        assert (runs / "job" / name).exists()

    if not with_workers_and_sweep:
        return
    (folder,) = runs.glob("*-sweep-*")
    assert list(pd.read_parquet(folder / "results.parquet")["status"]) == ["finished", "finished"]
