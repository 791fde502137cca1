"""The lease of a run folder on an object store; a local folder's lock is the operating system's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayprune.engine.storage import lock
from rayprune.engine.storage.lock import LOCK, lock_folder
from rayprune.errors import RunFolderError
from rayprune.paths import as_path

LEASE_S = 0.6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, seconds in (("_LEASE_S", LEASE_S), ("_SETTLE_S", 0.1), ("_POLL_S", 0.05)):
        monkeypatch.setattr(lock, name, seconds)
    return as_path(f"memory://{tmp_path.name}/run")


def lease_of(machine: str, **changes: object) -> str:
    facts = {"owner": "other", "number": 7, "host": "far", "machine": machine, "pid": os.getpid(), "started": 1.0}
    return json.dumps({**facts, **changes})


def test_a_lease_lasts_as_long_as_the_block(folder: Path) -> None:
    with lock_folder(folder):
        first = json.loads((folder / LOCK).read_text())
        time.sleep(2 * LEASE_S)
        later = json.loads((folder / LOCK).read_text())
        assert (later["owner"], later["number"] > first["number"]) == (first["owner"], True)
        with (
            pytest.raises(RunFolderError, match=r"another process on .* is training in memory://"),
            lock_folder(folder),
        ):
            pass
    assert not (folder / LOCK).exists()
    with lock_folder(folder):
        pass


def test_the_lease_of_a_process_that_has_ended_is_void_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_LEASE_S", 60.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / LOCK).write_text(lease_of(lock._machine(), pid=ended.pid))
    start = time.monotonic()
    with lock_folder(folder):
        pass
    assert time.monotonic() - start < 10


def test_the_lease_of_another_machine_is_void_if_nobody_renews_it(folder: Path) -> None:
    (folder / LOCK).write_text(lease_of("elsewhere"))
    start = time.monotonic()
    with lock_folder(folder):
        assert time.monotonic() - start > LEASE_S


def test_the_lease_of_another_machine_holds_while_it_is_renewed(folder: Path) -> None:
    (folder / LOCK).write_text(lease_of("elsewhere"))
    renew = threading.Timer(LEASE_S / 2, lambda: (folder / LOCK).write_text(lease_of("elsewhere", number=8)))
    renew.start()
    with pytest.raises(RunFolderError, match="another process on far is training"), lock_folder(folder):
        pass
    renew.join()


def test_of_two_that_begin_at_once_one_wins(folder: Path) -> None:
    outcomes: list[str] = []
    ready = threading.Barrier(4)

    def take() -> None:
        ready.wait()
        try:
            with lock_folder(folder):
                outcomes.append("won")
                time.sleep(LEASE_S)
        except RunFolderError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "refused", "refused", "won"]


def test_who_loses_the_lease_saves_and_ends(folder: Path) -> None:
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        with lock_folder(folder):
            (folder / LOCK).write_text(lease_of("elsewhere"))
            assert told.wait(10 * LEASE_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads((folder / LOCK).read_text())["owner"] == "other"


def test_a_damaged_lease_counts_as_one_of_another_machine(folder: Path) -> None:
    (folder / LOCK).write_text("not json")
    with lock_folder(folder):
        pass
