"""Processes of this machine, by /proc: who descends from whom, who is alive, how they are titled."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def title(pid: int) -> str:
    """Return a process's title; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def identity(pid: int) -> str | None:
    """Return the start time of a living process, which tells it from a later one of the same number; else None."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def descendants(root: int) -> list[int]:
    """Return the living processes below `root`."""
    parents = {}
    for folder in Path("/proc").iterdir():
        fields = _stat(int(folder.name)) if folder.name.isdigit() else None
        if fields is not None and fields[0] not in "ZX":
            parents[int(folder.name)] = int(fields[1])
    found, front = [], [root]
    while front:
        front = [pid for pid, parent in parents.items() if parent in front]
        found += front
    return found


def titled(root: int, beginning: str) -> list[int]:
    """Return the processes below `root` whose title begins so."""
    return [pid for pid in descendants(root) if title(pid).startswith(beginning)]


def kill(*pids: int) -> None:
    """Send SIGKILL; a process that is gone already is left alone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(known: dict[int, str | None], seconds: float) -> dict[int, str | None]:
    """Wait for processes (pid → identity) to end; return those that have not."""
    end = time.monotonic() + seconds
    while True:
        known = {pid: one for pid, one in known.items() if one is not None and identity(pid) == one}
        if not known or time.monotonic() > end:
            return known
        time.sleep(0.05)


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat after the name, from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
