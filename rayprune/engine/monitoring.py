"""Follow a run from the driver: new lines of metrics.jsonl, progress, stalls, the signal to leave, errors.

Workers run in other processes. A thread of each sends a pulse to the ScoreActor every second, also while training hangs
in a call: what the rank is doing, and for how long. The driver reads the pulses and reports each stall once, and its
end.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import Pulse
from rayprune.errors import TrainingPaused, redacted
from rayprune.paths import ObjectPath

logger = logging.getLogger(__name__)

_POLL_S, _PULSE_S = 0.2, 1.0
_REMOTE_LOOK_S = 2.0  # between two looks at metrics.jsonl on an object store, where each one is a request
_ANSWER_S = 2.0
_PATIENCE_S = 5.0  # of a person who has pressed Ctrl-C
# What a rank does before its first step, when there is nothing to save.
STARTING, FIRST_BATCH = "starting", "waiting for the first batch"
_TERMINAL_COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class RunListeners:
    """The callbacks of a run.

    Attributes:
        on_epoch: called with each new line of metrics.jsonl, parsed.
        on_progress: called during epochs with (epoch, samples observed, samples planned).
        on_notice: called with lines that a person should see, such as stalls.
        pause: setting it asks all ranks to save and leave.
    """

    on_epoch: Callable[[dict[str, Any]], None] | None = None
    on_progress: Callable[[int, int, int], None] | None = None
    on_notice: Callable[[str], None] = logger.warning
    pause: threading.Event | None = None


class Watcher:
    """Call the listeners while the with-block runs; the last epochs are delivered before it ends.

    Args:
        run_folder: whose metrics.jsonl is followed, from its present end.
        scores: the ScoreActor, which knows progress and pulses.
        listeners: whom to call.
        stall_s: seconds of silence or waiting that count as a stall.
    """

    def __init__(self, run_folder: Path, scores: ScoreClient, listeners: RunListeners, stall_s: float) -> None:
        self._file = run_folder / "metrics.jsonl"
        self._offset = self._size()
        self._look_s = _REMOTE_LOOK_S if isinstance(run_folder, ObjectPath) else 0.0
        self._scores, self._listeners, self._stalls = scores, listeners, StallWatch(stall_s)
        self._done, self._pause = threading.Event(), listeners.pause or threading.Event()
        self._interrupted_at: float | None = None
        self._thread = threading.Thread(target=self._follow, name="rayprune-watch", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._deliver()

    def request_pause(self, *_: object) -> None:
        """Ask all ranks to save and leave; a signal handler may call it, as the watching thread does the asking."""
        self._pause.set()

    def interrupt(self) -> None:
        """Ask all ranks to save and leave, because a person waits for it; a signal handler may call it."""
        self._interrupted_at = time.monotonic()
        self._pause.set()

    @property
    def is_interrupted(self) -> bool:
        """Whether `interrupt` was called."""
        return self._interrupted_at is not None

    def call(self, function: Callable[[], None]) -> None:
        """Call a function in a thread, and wait until it returns, or until Ctrl-C is pressed while no rank trains.

        Workers that start later find the request to leave, unless this process ends before.
        """
        outcome: Future[None] = Future()

        def settle() -> None:
            try:
                function()
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

        threading.Thread(target=settle, name="rayprune-fit", daemon=True).start()
        while not wait([outcome], _POLL_S).done:
            if self._interrupted_at is not None and not self._is_training(time.monotonic() - self._interrupted_at):
                return
        outcome.result()

    def _is_training(self, waited_s: float) -> bool:
        """Return whether a rank may have something to save, `waited_s` seconds after Ctrl-C."""
        pulses = self._scores.pulses(_ANSWER_S)
        # An older pulse of a rank that was starting says nothing: the rank may have trained since.
        return pulses is None or not all(
            pulse.doing == "nothing yet" or (pulse.doing in {STARTING, FIRST_BATCH} and pulse.silent_s < waited_s)
            for pulse in pulses.values()
        )

    def _follow(self) -> None:
        is_patient, next_look = True, 0.0
        while not self._done.wait(_POLL_S):
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + self._look_s
                self._deliver()
            if self._pause.is_set():
                self._scores.pause(_ANSWER_S)  # repeatedly: an actor that restarts forgets it
            if (
                is_patient
                and self._interrupted_at is not None
                and time.monotonic() > self._interrupted_at + _PATIENCE_S
            ):
                self._listeners.on_notice("saving before the next step; press Ctrl-C again to stop without saving")
                is_patient = False
            if not self._scores.is_local:  # an actor in this process can't answer while it trains
                self._watch_actor()

    def _watch_actor(self) -> None:
        if self._listeners.on_progress is not None:
            progress = self._scores.progress(_ANSWER_S)
            if progress is not None:
                self._listeners.on_progress(*progress)
        for line in self._stalls.update(self._scores.pulses(_ANSWER_S)):
            self._listeners.on_notice(line)

    def _size(self) -> int:
        try:
            return int(self._file.stat().st_size)
        except FileNotFoundError:
            return 0

    def _deliver(self) -> None:
        if self._listeners.on_epoch is None or (size := self._size()) == self._offset:
            return
        if size < self._offset:  # an incomplete line was removed
            self._offset = 0
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                content = stream.read()
        except FileNotFoundError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                self._listeners.on_epoch(json.loads(line))
            except Exception:  # a listener's error must not stop the thread that also watches for stalls and SIGTERM
                logger.exception("on_epoch failed; the run continues")


class StallWatch:
    """Turn pulses into lines on stalls.

    Args:
        limit_s: seconds of silence or waiting that count as a stall.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._answered_at = time.monotonic()
        self._reported: dict[str, str] = {}  # who → kind of stall

    def update(self, pulses: Mapping[int, Pulse] | None) -> list[str]:
        """Return a line for each stall that is new or of a new kind, and for each that is over.

        Args:
            pulses: rank → pulse, or None when the ScoreActor did not answer.
        """
        now = time.monotonic()
        stalls: dict[str, tuple[str, str]] = {}  # who → kind, text
        if pulses is None:
            stalls = {who: (kind, "") for who, kind in self._reported.items()}  # nothing new is known of the ranks
            silent_s = now - self._answered_at
            if silent_s > self._limit_s:
                stalls["the ScoreActor"] = ("silent", f"has not answered for {silent_s:.0f} s")
        else:
            self._answered_at = now
            for rank, pulse in sorted(pulses.items()):
                if pulse.silent_s > self._limit_s:
                    text = f"has been silent for {pulse.silent_s:.0f} s; last activity: {pulse.doing}"
                    stalls[f"rank {rank}"] = ("silent", text)
                elif pulse.doing_s > self._limit_s:
                    stalls[f"rank {rank}"] = (pulse.doing, f"has been {pulse.doing} for {pulse.doing_s:.0f} s")
        lines = [f"stall: {who} {text}" for who, (kind, text) in stalls.items() if self._reported.get(who) != kind]
        lines += [f"stall over: {who} continues" for who in sorted(self._reported.keys() - stalls.keys())]
        self._reported = {who: kind for who, (kind, _) in stalls.items()}
        return lines


class PulseSender:
    """Send this rank's pulse; `set_activity` is cheap enough for every step.

    Args:
        scores: the ScoreActor; one in this process needs no pulses.
        generation: this attempt's number.
        rank, world_size: of this worker.
    """

    def __init__(self, scores: ScoreClient, generation: int, rank: int, world_size: int) -> None:
        self._scores, self._generation, self._rank, self._world_size = scores, generation, rank, world_size
        self._activity = (STARTING, time.monotonic())
        self._done = threading.Event()
        if not scores.is_local:
            threading.Thread(target=self._send, name="rayprune-pulse", daemon=True).start()

    def set_activity(self, activity: str) -> None:
        """Say what the rank is doing from now on, such as "waiting for the stream"."""
        self._activity = (activity, time.monotonic())

    def stop(self) -> None:
        """Stop sending."""
        self._done.set()

    def _send(self) -> None:
        while True:
            activity, start = self._activity
            seconds = time.monotonic() - start
            self._scores.pulse(self._generation, self._rank, self._world_size, activity, seconds)
            if self._done.wait(_PULSE_S):
                return


def _interrupt(*_: object) -> None:
    # A shell starts background commands with SIGINT ignored, and raising it would do nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextmanager
def on_sigterm(handler: Callable[..., None] | None = None) -> Iterator[None]:
    """Let SIGTERM, which clusters send before they take a machine back, call a handler while the block runs.

    Args:
        handler: called with the signal's number and frame; by default, it interrupts like Ctrl-C.

    Raises:
        TrainingPaused: SIGTERM has interrupted the block, without a handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    is_terminated = False

    def receive(*args: Any) -> None:
        nonlocal is_terminated
        is_terminated = True
        _interrupt(*args)

    previous = signal.signal(signal.SIGTERM, receive if handler is None else handler)
    try:
        yield
    except KeyboardInterrupt:
        if is_terminated:
            raise TrainingPaused("interrupted; run the same command again to resume from the last checkpoint") from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def on_ctrl_c(handler: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C call a handler while the block runs; the next one does what it did before the block."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # only the main thread can set signal handlers, and background commands ignore Ctrl-C
        return

    def receive(*_: Any) -> None:
        signal.signal(signal.SIGINT, previous)
        handler()

    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def kept_handlers(*signals: signal.Signals) -> Iterator[None]:
    """Restore handlers that this process has set, or that ignore a signal, after the block; Ray replaces them.

    Ray's handlers stay in place of default ones: they shut Ray down.
    """
    previous = {each: signal.getsignal(each) for each in signals}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for each, handler in previous.items():
                if callable(handler) or handler is signal.SIG_IGN:
                    signal.signal(each, handler)


def error_line(error: BaseException) -> str:
    """Return an error of another process on one line, with its type unless the message is meant for users.

    >>> error_line(KeyError("cwd"))
    "KeyError: 'cwd'"
    """
    kind = type(error).__name__
    lines = [line.strip() for line in _TERMINAL_COLOR.sub("", str(error)).splitlines() if line.strip()] or [kind]
    # Ray's own errors hold a traceback, which ends with the message.
    line = lines[-1] if isinstance(error, RayError) else " ".join(lines)
    line = line if isinstance(error, ValueError | RuntimeError) or kind in line else f"{kind}: {line}"
    return redacted(line)
