"""One trial of a sweep as Ray Tune runs it: an ordinary run of the engine in an actor, an epoch a step.

A class, not a function, because Tune leaves a stopped function's thread to be killed with its process; here the run
saves, closes its folder and lets its workers go before the actor ends.
"""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from typing import Any

from ray import tune

from rayprune.config import make_config
from rayprune.engine.ending import one_line
from rayprune.engine.opening import SCORING, run_folder_of
from rayprune.engine.protocol import TrainingStopped
from rayprune.engine.run_folder import read_metrics
from rayprune.engine.train import Start, train
from rayprune.overrides import read_yaml

# How long a run that was stopped may take to save; Ray ends the process afterwards.
_LEAVE_S = 60.0


def report_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a scheduler or search sees of a line of metrics.jsonl; what is not known is left out."""
    visits = record["num_samples"] * (record["epoch"] + 1)
    report = {
        "epoch": record["epoch"] + 1,
        "val_accuracy": record["val_accuracy"],
        "compute": record["compute"],
        "compute_share": record["compute"] / visits,
        "samples_trained": record["samples_trained"],
        "seconds": record["wall_time"],
    }
    return {key: value for key, value in report.items() if value is not None}


class Trial(tune.Trainable):
    """Train one point of the space; each step waits for an epoch and returns its figures.

    A run that goes on first reports the epochs that it has, so that the scheduler knows them.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start the run of `config["trial"]["yaml"]` in a thread."""
        spec = config["trial"]
        os.chdir(spec["cwd"])  # relative paths of a config are the driver's
        self._run_config = make_config(read_yaml(spec["yaml"]))
        self._epochs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._pause = threading.Event()
        self._failure: Exception | None = None
        self._scoring = False
        self._thread = threading.Thread(target=self._train, name="rayprune-trial", daemon=True)
        self._last: dict[str, Any] = {}
        folder = run_folder_of(self._run_config)
        for record in read_metrics(folder):
            if record["epoch"] + 1 < self._run_config.last_epoch:
                self._epochs.put(record)
        self._thread.start()

    def _train(self) -> None:
        try:
            result = train(
                self._run_config,
                on_epoch=self._heard,
                on_start=self._started,
                on_notice=lambda line: None,
                pause=self._pause,
            )
            if result.metrics:
                self._epochs.put(result.metrics[-1])
        except Exception as error:
            self._failure = error
        finally:
            self._epochs.put(None)

    def _started(self, start: Start) -> None:
        self._scoring = start.folder.name == SCORING  # its epochs are costs of the run that follows

    def _heard(self, record: dict[str, Any]) -> None:
        if not self._scoring and record["epoch"] + 1 < self._run_config.last_epoch:  # the last is reported at the end
            self._epochs.put(record)

    def step(self) -> dict[str, Any]:
        """Return the next epoch's figures; `done` with the last.

        Raises:
            RuntimeError: the run broke down, and may be tried again.
        """
        record = self._epochs.get()
        if record is None:
            self._thread.join()
            # What a config or its data cannot do, another attempt cannot either.
            if isinstance(self._failure, ValueError | TrainingStopped):
                return {**self._last, "error": one_line(self._failure), "done": True}
            raise RuntimeError(one_line(self._failure or RuntimeError("training ended without a word")))
        self._last = report_of(record)
        done = record["epoch"] + 1 >= self._run_config.last_epoch
        if done:
            self._thread.join()
        return {**self._last, "done": done}

    def cleanup(self) -> None:
        """Let a run that was stopped save and leave."""
        self._pause.set()
        self._thread.join(_LEAVE_S)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial on, in the process that has imported torch; False where the last one does not leave."""
        self.cleanup()
        if self._thread.is_alive():
            return False
        self.setup(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: the run folder has the run's own checkpoints."""
        Path(checkpoint_dir, "in-the-run-folder").touch()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing: the run has gone on from its own folder."""
