"""The lock of a folder that one command may use at a time: of the operating system, or a lease on an object store."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from rayprune.errors import RunFolderError
from rayprune.paths import ObjectPath

logger = logging.getLogger(__name__)

LOCK = ".lock"
# A lease is renewed every third of this. A process that finds one waits this long for a sign of life; clocks are not
# compared.
_LEASE_S = 30.0
# The longest time from a look at a free folder to the end of the write that takes it; of two, the later write wins.
_SETTLE_S = 2.0
_POLL_S = 2.0
_CLOCK_S = 5.0


def _end_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def lock_folder(folder: Path, on_lost: Callable[[], None] = _end_process) -> Iterator[None]:
    """Lock the folder while the block runs.

    The operating system releases a local folder's lock however the process ends. On an object store, the lease of a
    killed command on this machine is void at once; that of another machine after 30 s, for which this waits.

    Args:
        folder: the folder.
        on_lost: called, from another thread, when another process has taken the folder over, because this one has not
            renewed its lease for 30 s. By default, it sends this process SIGTERM.

    Raises:
        RunFolderError: another process has locked it.
    """
    if isinstance(folder, ObjectPath):
        with _lease(folder, on_lost):
            yield
        return
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        yield


def _in_use(folder: Path, where: str = "") -> RunFolderError:
    return RunFolderError(f"another process{where} is training in {folder}: wait for it, or choose another run.name")


@contextlib.contextmanager
def _lease(folder: ObjectPath, on_lost: Callable[[], None]) -> Iterator[None]:
    file, owner = folder / LOCK, uuid.uuid4().hex
    _wait_until_free(file)
    looked = time.monotonic()
    _renew(file, owner, 0)
    # After a slow write, another process may have the folder already; it leaves when it next renews its own lease.
    time.sleep(_SETTLE_S if time.monotonic() - looked < _SETTLE_S else _LEASE_S)
    if (winner := _read(file)).get("owner") != owner:
        raise _in_use(folder, f" on {winner.get('host')}")
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(file, owner, ended, on_lost), name="rayprune-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LEASE_S)
        try:
            if _read(file).get("owner") == owner:
                file.unlink(missing_ok=True)
        except OSError as error:  # the work is done, and the lease ends by itself
            logger.warning("the lease of %s could not be given back (%s)", folder, error)


def _keep(file: ObjectPath, owner: str, ended: threading.Event, on_lost: Callable[[], None]) -> None:
    number = 0
    while not ended.wait(_LEASE_S / 3):
        number += 1
        try:
            lease = _read(file)
            if not lease or lease.get("owner", owner) != owner:  # gone: another process took over and has ended
                host = lease.get("host", "another machine")
                logger.error("a process on %s has taken over %s: this one saves and ends", host, file.parent)
                on_lost()
                return
            _renew(file, owner, number)
        except (OSError, ValueError) as error:  # the store may answer again before others give this lease up
            logger.warning("the lease of %s could not be renewed (%s): trying again", file.parent, error)


def _wait_until_free(file: ObjectPath) -> None:
    first = _read(file)
    if not first or (is_alive := _is_alive(first)) is False:
        return
    if not is_alive:
        host = first.get("host")
        logger.warning("%s was in use on %s: waiting up to %.0f s for a sign of life", file.parent, host, _LEASE_S)
    deadline = time.monotonic() + _LEASE_S
    while not is_alive and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        now = _read(file)
        if not now:
            return
        is_alive = now != first
    if is_alive:
        raise _in_use(file.parent, f" on {first.get('host')}")


def _is_alive(lease: dict[str, Any]) -> bool | None:
    """Return whether the process that holds a lease runs; None if it is one of another machine."""
    if lease.get("machine") != _machine():
        return None
    try:
        # The clock may have been set since; a process with the same pid that has started at the same time is unlikely.
        return bool(abs(psutil.Process(lease["pid"]).create_time() - lease["started"]) < _CLOCK_S)
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _machine() -> str:
    """Return what tells apart the process tables of machines, of their starts, and of their containers."""
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:  # not Linux
        parts = [str(psutil.boot_time())]
    return " ".join([socket.gethostname(), *map(str.strip, parts)])


def _renew(file: ObjectPath, owner: str, number: int) -> None:
    process = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
    started = psutil.Process().create_time()
    file.write_text(json.dumps({"owner": owner, "number": number, **process, "started": started}))


def _read(file: ObjectPath) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"host": "an unknown machine"}
