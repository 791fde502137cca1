"""The kinds of fault. Each strikes at one moment of training and returns what it hit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .driver import Driver, is_alive, kill, title

_WRITE_S = 30.0
_FULL_S, _AWAY_S = (0.5, 3.0), (0.5, 4.0)
_FILE_SYSTEM_SIZE = "48m"


class Missed(Exception):
    """The fault found nothing to hit."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: its name in the table.
        strike: injects it; returns a word on what was hit.
        restarts: whether new workers must follow.
        needs_tmpfs: whether the storage must be its own file system.
    """

    name: str
    strike: Callable[[Driver, random.Random], str]
    restarts: bool = True
    needs_tmpfs: bool = False


def _worker(driver: Driver, rng: random.Random) -> str:
    ranks = driver.ranks()
    rank = rng.randrange(len(ranks))
    kill(ranks[rank])
    return f"rank {rank}"


def _all_workers(driver: Driver, rng: random.Random) -> str:
    kill(*driver.ranks())
    return "all ranks"


def _actor(driver: Driver, class_name: str) -> str:
    processes = [process for process in driver.processes() if title(process).startswith(f"ray::{class_name}")]
    if not processes:
        raise Missed(f"no process has the title ray::{class_name}")
    kill(*processes)
    return class_name


def _score_actor(driver: Driver, rng: random.Random) -> str:
    return _actor(driver, "ScoreActor")


def _split_coordinator(driver: Driver, rng: random.Random) -> str:
    return _actor(driver, "SplitCoordinator")


def _driver(driver: Driver, rng: random.Random) -> str:
    driver.kill()
    driver.start()
    return "driver"


def _while_writing(driver: Driver, rng: random.Random) -> str:
    """Kill rank 0, or rank 0 and the driver, during the write of a checkpoint; rank 0 is first stopped to be sure."""
    writer, end = driver.ranks()[0], time.monotonic() + _WRITE_S
    while time.monotonic() < end and is_alive(writer):
        if not _partial_checkpoint(driver.folder):
            time.sleep(0.0002)
            continue
        writer.suspend()
        time.sleep(0.002)  # a system call in progress still ends
        partial = _partial_checkpoint(driver.folder)
        if not partial:
            writer.resume()
            continue
        kill(writer)
        if rng.random() < 0.5:
            return f"rank 0 in {partial}"
        driver.kill()
        driver.start()
        return f"rank 0 and driver in {partial}"
    raise Missed("no checkpoint was being written")


def _partial_checkpoint(folder: Path) -> str:
    """Return the name of the unfinished checkpoint and its number of files; empty for none."""
    try:
        for name in os.listdir(folder / "checkpoints"):  # noqa: PTH208
            files = os.listdir(folder / "checkpoints" / name) if name.startswith("epoch-") else []  # noqa: PTH208
            if files and "manifest.json" not in files:
                return f"{name} ({len(files)} files)"
    except OSError:
        pass
    return ""


def _full_disk(driver: Driver, rng: random.Random) -> str:
    """Fill the file system of the storage to the last byte for a few seconds."""
    seconds, filler = rng.uniform(*_FULL_S), driver.storage.parent / "filler"
    end = time.monotonic() + seconds
    try:
        with filler.open("wb", buffering=0) as stream:
            while time.monotonic() < end:
                _fill(stream.fileno())
                time.sleep(0.005)
    finally:
        filler.unlink()
    return f"full for {seconds:.1f} s"


def _fill(handle: int) -> None:
    try:
        for block in (1 << 20, 1 << 12):
            while os.write(handle, bytes(block)) == block:
                pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _storage_vanishes(driver: Driver, rng: random.Random) -> str:
    """Move the storage path away for a few seconds; set aside whatever was written in its place."""
    seconds = rng.uniform(*_AWAY_S)
    away = driver.storage.with_name("away")
    driver.storage.rename(away)
    time.sleep(seconds)
    stray = driver.storage.exists()
    if stray:
        driver.storage.rename(driver.storage.with_name(f"stray-{time.monotonic_ns()}"))
    away.rename(driver.storage)
    return f"away for {seconds:.1f} s" + (", recreated meanwhile" if stray else "")


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("worker", _worker),
        Fault("all_workers", _all_workers),
        Fault("score_actor", _score_actor, restarts=False),
        Fault("split_coordinator", _split_coordinator, restarts=False),
        Fault("driver", _driver),
        Fault("while_writing", _while_writing),
        Fault("full_disk", _full_disk, restarts=False, needs_tmpfs=True),
        Fault("storage_vanishes", _storage_vanishes, restarts=False),
    )
}


@contextmanager
def small_file_system(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs on `folder` for the with-block, so that it can be filled; yield False without the right."""
    folder.mkdir(parents=True)
    mounted = False
    if shutil.which("mount"):
        command = ["mount", "-t", "tmpfs", "-o", f"size={_FILE_SYSTEM_SIZE}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
