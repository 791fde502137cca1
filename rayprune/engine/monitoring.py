"""Follow a run from the driver: new lines of metrics.jsonl, and how far the running epoch is.

Who waits for what, since when: workers pulse, the driver notices silence.

A pulse is what a rank is doing and for how long; a thread of the worker sends one a second to the ScoreActor, also
while training is stuck in a call. The driver reads them and reports each stall once, and its end.

How what runs in other processes ends: by a signal, or by an error that crosses them as one line.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import Pulse

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


_PULSE_S = 1.0


class Pulsing:
    """Send this rank's pulse; `doing` is cheap enough for every step.

    Args:
        scores: the ScoreActor; one in this process needs no pulses.
        generation: this attempt's number.
        rank, world_size: this worker, and how many there are.
    """

    def __init__(self, scores: ScoreClient, generation: int, rank: int, world_size: int) -> None:
        self._scores, self._generation, self._rank, self._world_size = scores, generation, rank, world_size
        self._doing = ("starts", time.monotonic())
        self._done = threading.Event()
        if not scores.is_local:
            threading.Thread(target=self._send, name="rayprune-pulse", daemon=True).start()

    def doing(self, what: str) -> None:
        """Say what the rank does from now on."""
        self._doing = (what, time.monotonic())

    def stop(self) -> None:
        """Send no more."""
        self._done.set()

    def _send(self) -> None:
        while True:
            doing, since = self._doing
            now = time.monotonic()
            self._scores.pulse(self._generation, self._rank, self._world_size, doing, now - since)
            if self._done.wait(_PULSE_S):
                return


class StallWatch:
    """Turn pulses into lines for a person.

    Args:
        limit_s: silence or waiting from which on it is a stall.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._answered_at = time.monotonic()
        self._reported: dict[str, str] = {}

    def look(self, pulses: Mapping[int, Pulse] | None) -> list[str]:
        """Return a line for each stall that is new or of a new kind, and for each that is over.

        Args:
            pulses: rank → pulse, or None when the ScoreActor did not answer.
        """
        now = time.monotonic()
        stalls: dict[str, tuple[str, str]] = {}  # who → kind, text
        if pulses is None:
            silent_s = now - self._answered_at
            if silent_s > self._limit_s:
                stalls["the ScoreActor"] = ("silent", f"has not answered for {silent_s:.0f} s")
            # Nothing is known of the ranks: what was reported of them stands.
            stalls |= {who: (kind, "") for who, kind in self._reported.items() if who not in stalls}
        else:
            self._answered_at = now
            for rank, pulse in sorted(pulses.items()):
                if pulse.silent_s > self._limit_s:
                    text = f"has been silent for {pulse.silent_s:.0f} s; it last said: {pulse.doing}"
                    stalls[f"rank {rank}"] = ("silent", text)
                elif pulse.doing_s > self._limit_s:
                    stalls[f"rank {rank}"] = (pulse.doing, f"{pulse.doing} since {pulse.doing_s:.0f} s")
        lines = [f"stall: {who} {text}" for who, (kind, text) in stalls.items() if self._reported.get(who) != kind]
        lines += [f"stall over: {who} goes on" for who in sorted(self._reported.keys() - stalls.keys())]
        self._reported = {who: kind for who, (kind, _) in stalls.items()}
        return lines


logger = logging.getLogger(__name__)

_POLL_S = 0.2
_ANSWER_S = 2.0


class Watcher:
    """Call back for each new epoch while the with-block runs; the last lines are delivered before it ends.

    Args:
        run_folder: whose metrics.jsonl is followed, from its present end.
        scores: the ScoreActor, asked for progress when `on_progress` is given.
        on_epoch: called with each new line, parsed.
        on_progress: called with (epoch, samples observed, samples planned).
        on_stall: called with a line on who waits for what, since when.
        stall_s: silence from which on it is reported.
        pause: setting it asks all ranks to save and leave, as `request_pause` does.
    """

    def __init__(
        self,
        run_folder: Path,
        scores: ScoreClient,
        on_epoch: Callable[[dict[str, Any]], None] | None,
        on_progress: Callable[[int, int, int], None] | None,
        on_stall: Callable[[str], None],
        stall_s: float,
        pause: threading.Event | None = None,
    ) -> None:
        self._file = run_folder / "metrics.jsonl"
        self._scores, self._on_epoch, self._on_progress = scores, on_epoch, on_progress
        self._read = self._file.stat().st_size if self._file.exists() else 0
        self._on_stall, self._stalls = on_stall, StallWatch(stall_s)
        self._done, self._pause = threading.Event(), pause or threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rayprune-watch", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._deliver()

    def request_pause(self, *_: object) -> None:
        """Ask all ranks to save and leave; fit for a signal handler, as the asking is left to the watching thread."""
        self._pause.set()

    def _follow(self) -> None:
        while not self._done.wait(_POLL_S):
            self._deliver()
            if self._pause.is_set():
                self._scores.pause(_ANSWER_S)  # again and again: an actor that restarts forgets it
            if not self._scores.is_local:  # in this process there is nobody to wait for
                self._look()

    def _look(self) -> None:
        if self._on_progress is not None:
            progress = self._scores.progress(_ANSWER_S)
            if progress is not None:
                self._on_progress(*progress)
        for line in self._stalls.look(self._scores.pulses(_ANSWER_S)):
            self._on_stall(line)

    def _deliver(self) -> None:
        if self._on_epoch is None or not self._file.exists():
            return
        with self._file.open("rb") as stream:
            if self._read > self._file.stat().st_size:  # a torn line was cut off before a new one was written
                self._read = 0
            stream.seek(self._read)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                self._on_epoch(json.loads(line))
            except Exception:  # a listener's mistake must not end what also watches for stalls and SIGTERM
                logger.exception("on_epoch failed; the run goes on")
