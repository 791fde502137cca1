"""A Ray of this machine's own: on the loopback interface, out of reach of signals, and missed when it dies.

By default, Ray replaces 127.0.0.1 by the machine's public address and then listens on all interfaces. A signal to the
process group of a command, or to everything in its job, also ends Ray's processes, before the run has saved. And a
driver that loses them waits for a minute, or for ever. Ray 2.60 has no public options for any of this.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._private.worker import global_worker

_POLL_S = 0.5
# Without these, nothing can train or save; Ray does without its monitor, log monitor and dashboard.
_VITAL = ("gcs_server", "raylet")


def start(**options: Any) -> None:
    """Start Ray by ray.init("local"), and guard its processes until ray.shutdown.

    If one without which nothing can train ends before, this process prints a line and ends with exit code 1. Ray itself
    would end it after a minute, or leave it waiting.

    Args:
        **options: of ray.init.

    Raises:
        As ray.init.
    """
    with _on_loopback(), _sigterm_blocked():
        ray.init("local", _node_ip_address="127.0.0.1", **options)
    node = global_worker.node
    assert node is not None, "ray.init has started one"
    _LocalRay({name: infos[0].process for name, infos in node.all_processes.items()})


def listening() -> list[tuple[str, str]]:
    """Return what listens on the network among this process and those below it, Ray's included.

    Returns:
        (process, IP address) of each listening socket; :: and 0.0.0.0 mean all interfaces.
    """
    this, sockets = psutil.Process(), []
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            sockets += [
                (process.name(), each.laddr.ip.removeprefix("::ffff:"))
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN
            ]
    return sockets


def unblock_sigterm_in_forks() -> None:
    """Let processes that this one forks be ended by SIGTERM, as multiprocessing does; Ray's own processes block it."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}))


class _LocalRay:
    """The processes of a Ray that this process has started.

    Args:
        processes: name → process.
    """

    def __init__(self, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self._processes, self._stopping = processes, threading.Event()
        # The agents of the raylet, which outlive it for seconds.
        self._below = psutil.Process(processes["raylet"].pid).children(recursive=True)
        for process in processes.values():
            # ray.shutdown would wait a second for each, as they block SIGTERM.
            process.terminate = self._kill  # type: ignore[method-assign]
        threading.Thread(target=self._watch, name="rayprune-ray", daemon=True).start()

    def _kill(self) -> None:
        """End all of them, and the workers: one that loses its raylet while it exits may hang."""
        self._stopping.set()
        for process in self._processes.values():
            process.kill()
        for below in self._below:
            with suppress(psutil.Error):  # it has ended
                below.kill()
        raylet = str(self._processes["raylet"].pid)
        for other in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or is another user's
                if other.environ().get("RAY_RAYLET_PID") == raylet:
                    other.kill()

    def _watch(self) -> None:
        while not self._stopping.wait(_POLL_S):
            for name in _VITAL:
                code = self._processes[name].poll()
                if code is not None and not self._stopping.is_set():
                    self._lose(name, code)
                    return

    def _lose(self, name: str, code: int) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
        self._kill()
        sys.stdout.flush()
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        line = f"error: Ray's process {name} {how}, perhaps for lack of memory: the same command continues"
        os.write(2, f"{cursor}{line}\n".encode())
        os._exit(1)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Keep Ray from replacing 127.0.0.1 by the public address; all of its processes get the address that results."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Let processes that are started in the block, and theirs, block SIGTERM; one to this process comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
