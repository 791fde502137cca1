"""The kinds of disturbance; each takes the run at one moment of training and says what it did."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .driver import Driver
from .processes import identity, kill, titled

_WRITING_S = 30.0
_FULL_S, _AWAY_S = (0.5, 3.0), (0.5, 4.0)


class Missed(Exception):
    """The disturbance found nothing to disturb."""


@dataclass(frozen=True)
class Kind:
    """One kind of disturbance.

    Attributes:
        name: how it is called in the table.
        act: does it; returns a word on what was hit.
        restarts: whether new workers must follow.
        needs_tmpfs: whether the storage has to be a file system of its own.
    """

    name: str
    act: Callable[[Driver, random.Random], str]
    restarts: bool = True
    needs_tmpfs: bool = False


def _worker(driver: Driver, rng: random.Random) -> str:
    rank = rng.randrange(2)
    kill(driver.rank(rank))
    return f"rank {rank}"


def _all_workers(driver: Driver, rng: random.Random) -> str:
    kill(driver.rank(0), driver.rank(1))
    return "both ranks"


def _actor(driver: Driver, class_name: str) -> str:
    found = titled(driver.pid, f"ray::{class_name}")
    if not found:
        raise Missed(f"no process is titled ray::{class_name}")
    kill(*found)
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
    """Kill rank 0, or it and the driver, while a checkpoint's files are being written; it is stopped to make sure."""
    writer, end = driver.rank(0), time.monotonic() + _WRITING_S
    while time.monotonic() < end and identity(writer):
        if not _partial(driver.folder):
            time.sleep(0.0002)
            continue
        os.kill(writer, signal.SIGSTOP)
        time.sleep(0.002)  # a call of the kernel that is under way still ends
        written = _partial(driver.folder)
        if not written:
            os.kill(writer, signal.SIGCONT)
            continue
        kill(writer)
        if rng.random() < 0.5:
            return f"rank 0 in {written}"
        driver.kill()
        driver.start()
        return f"rank 0 and driver in {written}"
    raise Missed("no checkpoint was being written")


def _partial(folder: Path) -> str:
    """Return the unfinished checkpoint and how many files it has."""
    try:
        for name in os.listdir(folder / "checkpoints"):  # noqa: PTH208
            files = os.listdir(folder / "checkpoints" / name) if name.startswith("epoch-") else []  # noqa: PTH208
            if files and "manifest.json" not in files:
                return f"{name} ({len(files)} files)"
    except OSError:
        pass
    return ""


def _full_disk(driver: Driver, rng: random.Random) -> str:
    """Fill the storage's file system to the last byte for some seconds."""
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
    """Take the storage path away for some seconds; what was written in its place meanwhile is put aside."""
    seconds = rng.uniform(*_AWAY_S)
    away = driver.storage.with_name("away")
    driver.storage.rename(away)
    time.sleep(seconds)
    stray = driver.storage.exists()
    if stray:
        driver.storage.rename(driver.storage.with_name(f"stray-{time.monotonic_ns()}"))
    away.rename(driver.storage)
    return f"away for {seconds:.1f} s" + (", written anew meanwhile" if stray else "")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("worker", _worker),
        Kind("all_workers", _all_workers),
        Kind("score_actor", _score_actor, restarts=False),
        Kind("split_coordinator", _split_coordinator, restarts=False),
        Kind("driver", _driver),
        Kind("while_writing", _while_writing),
        Kind("full_disk", _full_disk, restarts=False, needs_tmpfs=True),
        Kind("storage_vanishes", _storage_vanishes, restarts=False),
    )
}
