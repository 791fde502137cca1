"""What reaches all processes of a command at once, and what its own Ray listens on; the command has a real worker."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rayprune.config import make_config
from rayprune.engine.train.driver import train
from tests.support.command_line import environment, start_group
from tests.support.paths import ROOT
from tests.support.runs import assert_same_run, run_config

EPOCHS = 40
LIMIT_S = 30.0  # 4 s on two idle cores, and a minute without; other tests may share them
LOST_RAY = """
import os, signal, time
import psutil
from rayprune.engine.cluster import start_ray
start_ray(address="local")
(lost,) = [each for each in psutil.Process().children() if each.name() == {name!r}]
lost.kill()
time.sleep(60)
"""


@pytest.fixture(scope="module")
def cluster() -> None:
    """Start no Ray: the commands have their own."""


def processes_of(command: subprocess.Popen[str]) -> list[psutil.Process]:
    driver = psutil.Process(command.pid)
    return [driver, *driver.children(recursive=True)]


def open_to_the_network(processes: list[psutil.Process]) -> list[str]:
    """Return the process names of listening sockets that other machines can reach."""
    names = []
    for process in processes:
        for each in process.net_connections("tcp"):
            address = ipaddress.ip_address(each.laddr.ip.removeprefix("::ffff:"))
            if each.status == psutil.CONN_LISTEN and not address.is_loopback:
                names.append(" ".join(process.cmdline()).strip())
    return names


def test_sigterm_to_everything_saves_and_the_command_continues_to_the_same_result(tmp_path: Path) -> None:
    """As systemd and Slurm send it: not only to the group, but to Ray's workers too, which have groups of their own."""
    config = run_config(tmp_path, train={"epochs": EPOCHS}).model_dump(mode="json")
    scaling = {"num_workers": 1, "threads": 1, "stream": "local", "use_gpu": False}
    file = tmp_path / "it.yaml"
    file.write_text(yaml.safe_dump({**config, "scaling": scaling}))
    command = start_group("train", str(file))
    assert command.stdout is not None
    if not any(re.search(rf"  3/{EPOCHS}", line) for line in command.stdout):
        pytest.fail(f"the command has ended before its third epoch: {command.communicate()[1]}")
    processes = processes_of(command)
    # Of PyTorch's rendezvous store, the worker's; torch has no option for its address.
    assert open_to_the_network(processes) in ([], ["ray::RayTrainWorker"])
    start = time.monotonic()
    os.killpg(command.pid, signal.SIGTERM)
    for process in processes[1:]:
        process.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=60)
    seconds = time.monotonic() - start
    assert command.returncode == 1, err
    assert re.fullmatch(r"error: paused: saved before step \d+ of epoch \d+; run the same command to continue\n", err)
    assert seconds < LIMIT_S
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    in_process = {"num_workers": 0, "threads": 1}
    continued = train(make_config({**config, "scaling": in_process}))
    assert_same_run(continued, train(run_config(tmp_path, "undisturbed", train={"epochs": EPOCHS})))


def test_a_lost_raylet_ends_the_command_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST_RAY.format(name="raylet")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: Ray's process raylet was ended by SIGKILL, perhaps for lack of memory: the same command continues\n"
    )
