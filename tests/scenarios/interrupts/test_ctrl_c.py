"""Ctrl-C with two real workers; tests/unit/cli/test_train.py has the short form, without workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from rayprune.engine.storage.checkpoint import newest_position
from tests.support.command_line import rayprune, start_group

WORDS = [
    "train",
    "configs/digits_infobatch.yaml",
    "run.name=stopped",
    "model.name=mlp",
    "scaling.cpus_per_worker=0.5",
    "scaling.threads=1",
]
LIMIT_S = 30.0  # 5 s on two idle cores; other tests may share them


def press_ctrl_c(process: subprocess.Popen[str], until: str) -> tuple[str, float]:
    """Signal the group once the command has printed a pattern; return what it prints to stderr, and the seconds."""
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(until, line):
            break
    else:
        pytest.fail(f"the command has ended: {process.communicate()}")
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    _, err = process.communicate(timeout=120)
    return err, time.monotonic() - start


def processes_of(session: int) -> list[str]:
    """Return the command lines of the live processes that a command has left behind."""
    left = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.info["cmdline"]))
        except ProcessLookupError:
            continue
    return left


@pytest.mark.scenario
@pytest.mark.parametrize("stream", ["local", "ray"])
def test_ctrl_c_saves_the_workers_state_and_the_same_command_continues(tmp_path: Path, stream: str) -> None:
    words = [*WORDS, f"run.storage_path={tmp_path}", f"scaling.stream={stream}", "train.epochs=300"]
    process = start_group(*words, "scaling.num_workers=2")
    err, seconds = press_ctrl_c(process, until="  3/300")
    assert process.returncode == 130, err
    epoch, step = newest_position(tmp_path / "stopped")
    assert err == f"stopped at epoch {epoch + 1}, step {step}: the same command continues from there\n"
    assert epoch >= 3
    assert seconds < LIMIT_S
    deadline = time.monotonic() + 10
    while left := processes_of(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    again = rayprune(*words, "scaling.num_workers=0", f"train.stop_after={epoch + 1}")
    assert again.returncode == 0, again.stderr
    assert f"resumes at epoch {epoch + 1}" in again.stdout


@pytest.mark.scenario
def test_ctrl_c_while_the_workers_start_ends_the_command(tmp_path: Path) -> None:
    process = start_group(*WORDS, f"run.storage_path={tmp_path}", "scaling.num_workers=2")
    err, seconds = press_ctrl_c(process, until="2 workers, stream ray")
    assert process.returncode == 130
    assert err in {
        "stopped: the same command continues\n",  # the workers were not even requested
        "stopped before the first step: the same command starts again\n",
    }
    assert seconds < LIMIT_S
