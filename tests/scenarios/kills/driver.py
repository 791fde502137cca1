"""The run under test: the real command in its own process, its folders, its processes."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from .steps import StepLog
from .watched_model import WATCH_FOLDER

BATCH_SIZE = 32
_MODEL = Path(__file__).with_name("watched_model.py")
_EXIT_S = 30.0
# Ray leaves these idle when a driver is killed; they hold nothing of a run.
_LEFT_BY_RAY = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def configuration(epochs: int, *, num_workers: int = 2, stream: str = "ray") -> dict[str, Any]:
    """Return the run under test, on the digits; neither the stream nor the restarts change its result."""
    return {
        "data": {"source": "digits", "limit": 500, "augment": {"crop": 1}},
        "model": {"name": f"{_MODEL}:watched"},
        "method": {"name": "infobatch", "ema": 0.5},
        "train": {"epochs": epochs, "batch_size": BATCH_SIZE},
        "optim": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "scaling": {"num_workers": num_workers, "stream": stream, "threads": 1, "use_gpu": False},
        "run": {"checkpoint_steps": 3, "keep_checkpoints": 2, "max_failures": -1},
    }


class Driver:
    """One run of a command, over one or several processes in succession, each in a process group of its own.

    Args:
        home: folder of the step log, the config and the output.
        config: the run's config without storage path and name.
        storage: the run's storage path; by default inside `home`.
        command: train, sweep or compare.
    """

    def __init__(
        self, home: Path, config: Mapping[str, Any], storage: Path | None = None, command: str = "train"
    ) -> None:
        self.home, self.storage, self._command = home, storage or home / "storage", command
        self.home.mkdir(parents=True)
        self.storage.mkdir(parents=True)
        self.folder = self.storage / "run"
        self.log = StepLog(home)
        self.num_starts = 0
        self._output, self._errors = home / "output.txt", home / "errors.txt"
        self._process: subprocess.Popen[bytes] | None = None
        run = {**config.get("run", {}), "storage_path": str(self.storage), "name": "run"}
        (home / "config.yaml").write_text(yaml.safe_dump({**config, "run": run}))

    def start(self) -> None:
        """Run the command: the first time, and again after the driver ended."""
        self.num_starts += 1
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", WATCH_FOLDER: str(self.home)}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "rayprune", self._command, str(self.home / "config.yaml")]
        with self._output.open("ab") as output, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored in the background
            )

    def beside(self) -> Driver:
        """Start the command once more, with the same config and storage, while this one runs; return its driver."""
        other = copy.copy(self)
        other._errors = self.home / "errors-beside.txt"
        other.start()
        return other

    def exit_code(self) -> int | None:
        """Return the exit code, None while the driver runs."""
        assert self._process is not None
        return self._process.poll()

    def processes(self) -> list[psutil.Process]:
        """Return the driver's process and all its descendants."""
        assert self._process is not None
        driver = psutil.Process(self._process.pid)
        return [driver, *driver.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        """Return the worker processes by rank."""
        files = sorted(self.home.glob("rank-*.pid"))
        return [psutil.Process(int(file.read_text())) for file in files]

    def kill(self) -> None:
        """SIGKILL the driver and wait for its Ray processes to end; kill those that remain."""
        if self._process is None or self._process.poll() is not None:
            return  # the pid of an ended process may be in use again
        _, *below = self.processes()
        agents = [process for process in below if title(process).startswith(_LEFT_BY_RAY)]
        self._process.kill()
        self._process.wait()
        remaining = wait_for_exit([process for process in below if process not in agents], _EXIT_S)
        kill(*remaining, *agents)
        wait_for_exit([*remaining, *agents], _EXIT_S)

    def last_output(self) -> str:
        """Return the end of the command's output."""
        files = [file for file in (self._output, self._errors) if file.exists()]
        return "\n".join(file.read_text(errors="replace")[-2000:] for file in files)

    def errors(self) -> list[str]:
        """Return the lines that the command has printed to stderr, of all its starts."""
        return self._errors.read_text(errors="replace").splitlines() if self._errors.exists() else []


@contextmanager
def running(driver: Driver) -> Iterator[Driver]:
    """Start a driver; leave none of its processes behind."""
    driver.start()
    try:
        yield driver
    finally:
        driver.kill()


def title(process: psutil.Process) -> str:
    """Return a process's title; empty when it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; zombies do not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(*processes: psutil.Process) -> None:
    """Send SIGKILL; ignore processes that have ended."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for_exit(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that have not."""
    end = time.monotonic() + seconds
    while (remaining := [process for process in processes if is_alive(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    return remaining
