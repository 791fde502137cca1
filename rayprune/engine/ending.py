"""How what runs in other processes ends: by a signal, or by an error that crosses them as one line."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _interrupt(*_: object) -> None:
    # A shell starts what it puts into the background with Ctrl-C ignored: raising that signal would do nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextmanager
def on_sigterm(handler: Callable[..., None] = _interrupt) -> Iterator[None]:
    """Let SIGTERM, which a cluster sends before it takes a machine back, call a handler instead of ending the process.

    Args:
        handler: called with the signal's number and frame; without one, SIGTERM ends what runs here as Ctrl-C does:
            runs are told to save and leave.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in the main thread only
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line(error: BaseException) -> str:
    """Return what an error says in one line, its type where it says nothing.

    >>> one_line(KeyError("cwd"))
    "KeyError: 'cwd'"
    """
    kind = type(error).__name__
    # Ray's own errors hold a traceback as text and end with what it says.
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()] or [kind]
    line = lines[-1] if isinstance(error, RayError) else " ".join(lines)
    return line if isinstance(error, ValueError | RuntimeError) or kind in line else f"{kind}: {line}"
