"""Train several runs at once on Ray Tune: each is an ordinary run in an actor of its own, an epoch a step of Tune.

A run resumes from its own run folder. Tune therefore keeps no checkpoints, and its record of the experiment is deleted:
`Tuner.restore` needs a record that a kill may have left behind the runs, and restarts runs without a Tune checkpoint
from scratch. To resume, pass the unfinished configs again.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from rayprune.config import Config, make_config
from rayprune.config.yaml import read_yaml
from rayprune.engine.cluster import TrialResources
from rayprune.engine.monitoring import error_line, kept_handlers, on_sigterm
from rayprune.engine.storage.resume import SCORING, run_folder_of
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import Start, train
from rayprune.errors import TrainingStopped

# How long a run that was stopped may take to save; Ray ends the process afterwards.
_SAVE_S = 60.0
_RELEASE_S = 20.0


@dataclass(frozen=True)
class TrialListeners:
    """Who hears of the runs, by name.

    Attributes:
        on_end: called with (name, error, finished) when a run ends; error is one line or None, finished is False where
            the scheduler stopped the run. An exception that it raises stops all runs, which save first.
        on_start: called with the name when a run starts.
        on_epoch: called with (name, figures of `report_of`) after each epoch.
    """

    on_end: Callable[[str, str | None, bool], None]
    on_start: Callable[[str], None] | None = None
    on_epoch: Callable[[str, dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class Proposals:
    """Configs that a search proposes while the runs go.

    Attributes:
        search: whose suggestions are `{"trial": trial_spec(config)}`.
        num_trials: how many to ask for.
    """

    search: Searcher
    num_trials: int


def run_trials(
    trials: Sequence[Config] | Proposals,
    share: TrialResources,
    listeners: TrialListeners,
    *,
    folder: Path,
    scheduler: TrialScheduler | None = None,
    max_failures: int = 0,
    debug: bool = False,
) -> bool:
    """Train runs, as many at once as have room; Ray is connected.

    Args:
        trials: the runs' configs, with names and `run.resume=auto`, or a search that proposes them.
        share: how many at once, and what Ray reserves for each.
        listeners: who hears of it.
        folder: where Tune may write while the runs go; all machines of the cluster see it.
        scheduler: stops runs early.
        max_failures: how often a run that breaks down is started again.
        debug: show Ray's own logs.

    Returns:
        Whether all runs have ended; if not, a signal came, and they have saved.
    """
    if isinstance(trials, Proposals):
        search, num_trials, space = trials.search, trials.num_trials, {}
    else:
        search, num_trials = None, len(trials)
        space = {"trial": tune.grid_search([trial_spec(config) for config in trials])}
    _quiet_tune(debug)
    record = folder / ".tune"
    shutil.rmtree(record, ignore_errors=True)
    events = _Events(listeners)
    tuner = tune.Tuner(
        tune.with_resources(Trial, share.reserved),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=1 if search is None else num_trials,
            max_concurrent_trials=share.num_concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name=record.name,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has the run's own
            callbacks=[events],
            verbose=0,
        ),
    )
    try:
        # Tune replaces these two handlers and restores them only after an interrupt.
        with _cpus_released(), on_sigterm(), kept_handlers(signal.SIGINT, signal.SIGUSR1):
            tuner.fit()
    finally:
        shutil.rmtree(record, ignore_errors=True)
    return events.num_ended == num_trials


def trial_spec(config: Config) -> dict[str, str]:
    """Return what `Trial` needs of a config."""
    return {"name": str(config.run.name), "yaml": config.to_yaml(), "cwd": str(Path.cwd())}


def report_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what schedulers and searches see of a line of metrics.jsonl, without the values that are null."""
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
    """Train one run; each step waits for an epoch and returns its figures.

    A class, not a function: Tune kills a stopped function's thread with its process, whereas `cleanup` lets the run
    save, close its folder and release its workers. A resumed run reports its earlier epochs first, for the scheduler.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start the run of `config["trial"]`, a `trial_spec`, in a thread."""
        spec = config["trial"]
        os.chdir(spec["cwd"])  # relative paths of a config are the driver's
        self._run_config = make_config(read_yaml(spec["yaml"]))
        self._records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._pause = threading.Event()
        self._failure: Exception | None = None
        self._is_scoring = False
        self._report: dict[str, Any] = {}
        for record in read_metrics(run_folder_of(self._run_config)):
            self._on_epoch(record)
        self._thread = threading.Thread(target=self._train, name="rayprune-trial", daemon=True)
        self._thread.start()

    def _train(self) -> None:
        try:
            result = train(
                self._run_config,
                on_epoch=self._on_epoch,
                on_start=self._on_start,
                on_notice=lambda line: None,
                pause=self._pause,
            )
            self._records.put(result.metrics[-1])
        except Exception as error:
            self._failure = error
        finally:
            self._records.put(None)

    def _on_start(self, start: Start) -> None:
        self._is_scoring = start.folder.name == SCORING  # its epochs are costs of the run that follows

    def _on_epoch(self, record: dict[str, Any]) -> None:
        if not self._is_scoring and not self._is_last(record):  # the last epoch is reported when the run has ended
            self._records.put(record)

    def _is_last(self, record: Mapping[str, Any]) -> bool:
        return bool(record["epoch"] + 1 >= self._run_config.last_epoch)

    def step(self) -> dict[str, Any]:
        """Return the next epoch's figures; the last have `finished` and `done`.

        Raises:
            RuntimeError: the run broke down, and may be started again.
        """
        record = self._records.get()
        if record is None:
            assert self._failure is not None, "a run that does not fail ends with its last epoch"
            # What a config or its data cannot do, another attempt cannot either.
            if isinstance(self._failure, ValueError | TrainingStopped):
                return {**self._report, "error": error_line(self._failure), "done": True}
            raise RuntimeError(error_line(self._failure))
        self._report, finished = report_of(record), self._is_last(record)
        if finished:
            self._thread.join()
        return {**self._report, "finished": finished, "done": finished}

    def cleanup(self) -> None:
        """Let a run that was stopped save and leave."""
        self._pause.set()
        self._thread.join(_SAVE_S)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another run in this process, which has imported torch; False if the previous one does not leave."""
        self.cleanup()
        if self._thread.is_alive():
            return False
        self.setup(new_config)
        return True


class _Events(tune.Callback):
    """Pass Tune's events on to the listeners."""

    def __init__(self, listeners: TrialListeners) -> None:
        self._listeners = listeners
        self._ends: list[tuple[str, str | None, bool]] = []
        self.num_ended = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore, which is never used

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._listeners.on_start is not None:
            self._listeners.on_start(trial.config["trial"]["name"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._listeners.on_epoch is not None and "epoch" in result:
            self._listeners.on_epoch(trial.config["trial"]["name"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._ends.append((trial.config["trial"]["name"], result.get("error"), result.get("finished", False)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Tune's own get_pickled_error looks where the file is only copied later.
        file = trial.pickled_error_file
        error = ray.cloudpickle.loads(Path(file).read_bytes()) if file else RuntimeError("its process ended")
        line = error_line(getattr(error, "cause", None) or error)
        line = f"its process ended ({line})" if isinstance(error, RayActorError) else line
        self._ends.append((trial.config["trial"]["name"], line, False))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # Only here does an exception stop Tune: where a trial ends, Tune takes it for one of that trial's.
        while self._ends:
            self.num_ended += 1
            self._listeners.on_end(*self._ends.pop(0))


def _quiet_tune(debug: bool) -> None:
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # One record of a run is enough: its own folder.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # An epoch without a validation has no accuracy to report.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    if not debug:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints at verbose=0 too
        for name in ("ray.tune", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _cpus_released() -> Iterator[None]:
    """Wait until Ray has the runs' CPUs back: their actors end a little after Tune does."""
    before = ray.available_resources().get("CPU", 0.0)
    yield
    deadline = time.monotonic() + _RELEASE_S
    while ray.available_resources().get("CPU", 0.0) < before and time.monotonic() < deadline:
        time.sleep(0.1)
