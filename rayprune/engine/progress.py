"""Follow a run from the driver: new lines of metrics.jsonl, and how far the running epoch is."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayprune.engine.client import ScoreClient
from rayprune.engine.stall import StallWatch

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
