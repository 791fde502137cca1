"""A network cable whose delay can be set: this process carries the frames between two TAP devices. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
_FRAME_BYTES = 1 << 16
_IDLE_S = 0.1


def in_network_of(pid: int, function: Callable[[], T]) -> T:
    """Call a function in a thread of this process that is in another process's network namespace."""
    results: list[Any] = []

    def call() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/proc/{pid}/ns/net").open() as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:  # of this thread alone
                raise OSError(ctypes.get_errno(), "setns")
        results.append(function())

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    result: T = results[0]
    return result


class SlowCable(threading.Thread):
    """Carries frames between a device of one network namespace and a device of another.

    Args:
        ends: (process, name of the new device) at each end.

    Attributes:
        delay_s: how long a frame takes, in either direction; 0 at first.
    """

    def __init__(self, *ends: tuple[int, str]) -> None:
        super().__init__(daemon=True)
        self.delay_s = 0.0
        self._devices = [in_network_of(pid, lambda name=name: _tap(name)) for pid, name in ends]  # type: ignore[misc]
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Carry frames until `close`."""
        first, second = self._devices
        other = {first: second, second: first}
        waiting: deque[tuple[float, int, bytes]] = deque()
        while not self._done.is_set():
            pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else _IDLE_S
            for device in select.select(self._devices, [], [], pause_s)[0]:
                waiting.append((time.monotonic() + self.delay_s, other[device], os.read(device, _FRAME_BYTES)))
            while waiting and waiting[0][0] <= time.monotonic():
                _, device, frame = waiting.popleft()
                with contextlib.suppress(OSError):  # the device is still down, or its machine has ended
                    os.write(device, frame)

    def close(self) -> None:
        """Unplug both ends, whose devices disappear."""
        self._done.set()
        self.join()
        for device in self._devices:
            os.close(device)


def _tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return device
