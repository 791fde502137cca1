"""A tortured run: the real command in a process of its own, its folders, its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .processes import descendants, identity, kill, title, wait_until_gone
from .steps import StepLog
from .watched_model import WATCH_FOLDER

_MODEL = Path(__file__).with_name("watched_model.py")
_GONE_S = 30.0
# Ray's own, which it leaves behind idle when a driver is killed; nothing of a run lives in them.
_LEFT_BY_RAY = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def configuration(epochs: int, stream: str = "ray") -> dict[str, Any]:
    """Return the run that is tortured: digits on two workers; the result is both streams', local starts sooner."""
    return {
        "data": {"source": "digits", "limit": 500, "augment": {"crop": 1}},
        "model": {"name": f"{_MODEL}:watched"},
        "method": {"name": "infobatch", "ema": 0.5},
        "train": {"epochs": epochs, "batch_size": 32},
        "optim": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "scaling": {"num_workers": 2, "stream": stream, "threads": 1, "use_gpu": False},
        "run": {"checkpoint_steps": 3, "keep_checkpoints": 2, "max_failures": -1},
    }


class Driver:
    """One run of `rayprune train`, which may take several processes one after the other.

    Args:
        home: for the watched steps, the config and the output.
        config: the run, but for its storage path and name.
        storage: the run's storage path, by default in `home`.
    """

    def __init__(self, home: Path, config: Mapping[str, Any], storage: Path | None = None) -> None:
        self.home, self.storage = home, storage or home / "storage"
        self.home.mkdir(parents=True)
        self.storage.mkdir(parents=True)
        self.folder = self.storage / "run"
        self.output = home / "output.txt"
        self.log = StepLog(home)
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        run = {**config.get("run", {}), "storage_path": str(self.storage), "name": "run"}
        (home / "config.yaml").write_text(yaml.safe_dump({**config, "run": run}))

    def start(self) -> None:
        """Give the command: the first time, and again after the driver ended."""
        self.starts += 1
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", WATCH_FOLDER: str(self.home)}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "rayprune", "train", str(self.home / "config.yaml")]
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def pid(self) -> int:
        """The driver's process."""
        assert self._process is not None
        return self._process.pid

    def ended(self) -> int | None:
        """Return the exit code, None while the driver runs."""
        assert self._process is not None
        return self._process.poll()

    def rank(self, rank: int) -> int:
        """Return the process of a rank."""
        return int((self.home / f"rank-{rank}.pid").read_text())

    def kill(self) -> None:
        """SIGKILL the driver and wait until its Ray processes are gone too; those that stay are killed."""
        if self._process is None or self._process.poll() is not None:
            return  # the number of an ended process may be another's by now
        below = {pid: identity(pid) for pid in descendants(self.pid)}
        agents = {pid: below.pop(pid) for pid in list(below) if title(pid).startswith(_LEFT_BY_RAY)}
        self._process.kill()
        self._process.wait()
        left = wait_until_gone(below, _GONE_S) | wait_until_gone(agents, 0.0)
        kill(*left)
        wait_until_gone(left, _GONE_S)

    def last_words(self) -> str:
        """Return the end of the command's output."""
        return self.output.read_text(errors="replace")[-2000:] if self.output.exists() else ""


@contextmanager
def running(driver: Driver) -> Iterator[Driver]:
    """Start a driver; leave none of its processes behind."""
    driver.start()
    try:
        yield driver
    finally:
        driver.kill()
