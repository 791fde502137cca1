"""Follow a run from the driver: new lines of metrics.jsonl, and how far the running epoch is."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayprune.engine.client import LocalScores, ScoreClient

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class Watcher:
    """Call back for each new epoch while the with-block runs; the last lines are delivered before it ends.

    Args:
        run_folder: whose metrics.jsonl is followed, from its present end.
        scores: the ScoreActor, asked for progress when `on_progress` is given.
        on_epoch: called with each new line, parsed.
        on_progress: called with (epoch, samples observed, samples planned).
    """

    def __init__(
        self,
        run_folder: Path,
        scores: ScoreClient,
        on_epoch: Callable[[dict[str, Any]], None] | None,
        on_progress: Callable[[int, int, int], None] | None,
    ) -> None:
        self._file = run_folder / "metrics.jsonl"
        self._scores, self._on_epoch, self._on_progress = scores, on_epoch, on_progress
        self._read = self._file.stat().st_size if self._file.exists() else 0
        self._done, self._pause = threading.Event(), threading.Event()
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
                self._ask("pause")  # again and again: an actor that restarts forgets it
            # An in-process actor is not made for two threads; its epochs still come through the file.
            if self._on_progress is not None and not isinstance(self._scores, LocalScores):
                progress = self._ask("progress")
                if progress is not None:
                    self._on_progress(*progress)

    def _ask(self, method: str) -> Any:
        try:
            return self._scores.call(method)
        except Exception as error:  # the actor may just be restarting, or be gone at the end
            logger.debug("%s is not answered: %s", method, error)
            return None

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
            self._on_epoch(json.loads(line))
