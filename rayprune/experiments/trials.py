"""Train several runs at once on Ray Tune: each one is an ordinary run in its own actor, and an epoch is a Tune step.

A run resumes from its own run folder. Tune therefore keeps no checkpoints, and its record of the experiment is deleted:
after a kill, the record that `Tuner.restore` needs may be older than the runs, and Tune restarts runs without a Tune
checkpoint from scratch. To resume, pass the unfinished configs again.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from rayprune.core.redaction import check_secrets, with_secrets
from rayprune.core.references import UserCode
from rayprune.engine.cluster import TrialResources
from rayprune.engine.monitoring import error_line, kept_handlers
from rayprune.engine.storage.resume import is_scoring_run, run_folder_of
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import Start, train
from rayprune.errors import TrainingStopped
from rayprune.paths import ray_storage, remove_tree

_SAVE_S = 60.0  # for a stopped run to save; then Ray ends its process
_RELEASE_S = 20.0


def ignore(*_: object) -> None:
    """Do nothing; the default of callbacks."""


@dataclass(frozen=True)
class TrialListeners:
    """Callbacks of several runs.

    Attributes:
        on_end: called with (name, error, finished) when a run ends. The error is one line or None; finished is False if
            the scheduler stopped the run. An exception in the callback stops all runs, after they have saved.
        on_start: called with the name when a run starts.
        on_epoch: called with (name, figures from `report_of`) after each epoch.
    """

    on_end: Callable[[str, str | None, bool], None]
    on_start: Callable[[str], None] = ignore
    on_epoch: Callable[[str, dict[str, Any]], None] = ignore


@dataclass(frozen=True)
class Proposals:
    """Configs that a search proposes during the runs.

    Attributes:
        search: suggests `{"trial": trial_spec(config)}`.
        num_trials: number of suggestions to request.
    """

    search: Searcher
    num_trials: int


def run_trials(
    trials: Sequence[Config] | Proposals,
    resources: TrialResources,
    listeners: TrialListeners,
    *,
    folder: Path,
    secrets: Mapping[str, Any],
    scheduler: TrialScheduler | None = None,
    max_failures: int = 0,
    debug: bool = False,
) -> bool:
    """Train runs on the connected Ray cluster, several at a time.

    Args:
        trials: the configs of the runs, with names and `run.resume=auto`, or a search that proposes them.
        resources: how many runs to train at a time, and what Ray reserves for each.
        listeners: callbacks.
        folder: for Tune's temporary files; all machines of the cluster must see it.
        secrets: `secrets_of` the config that the trials' configs are made of.
        scheduler: stops runs early.
        max_failures: how often to restart a failed run.
        debug: show Ray's own logs.

    Returns:
        Whether all runs have ended. If not, a signal arrived, and the runs have saved.
    """
    if isinstance(trials, Proposals):
        search, num_trials, space = trials.search, trials.num_trials, {}
    else:
        search, num_trials = None, len(trials)
        space = {"trial": tune.grid_search([trial_spec(config) for config in trials])}
    _quiet_tune(debug)
    record = folder / ".tune"
    remove_tree(record)
    events = _Events(listeners)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(Trial, secrets=dict(secrets), user_code=UserCode()), resources.reserved
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=1 if search is None else num_trials,
            max_concurrent_trials=resources.num_concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=tune.RunConfig(
            **ray_storage(folder),
            name=record.name,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run has its own
            callbacks=[events],
            verbose=0,
        ),
    )
    try:
        # Tune replaces these two handlers and restores them only after an interrupt.
        with _cpus_released(), kept_handlers(signal.SIGINT, signal.SIGUSR1):
            tuner.fit()
    finally:
        remove_tree(record)
    return events.num_ended == num_trials


def trial_spec(config: Config) -> dict[str, str]:
    """Return the Tune config of a run: its name, its config as YAML, and the folder of relative paths.

    Tune writes it to files, so that it has no secrets; the trials get them apart.
    """
    return {"name": str(config.run.name), "yaml": config.to_yaml(), "cwd": str(Path.cwd())}


def report_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures for schedulers and searches from a line of metrics.jsonl, without null values."""
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

    A class, as Tune kills the thread of a stopped function with its process, whereas `cleanup` lets the run save, close
    its folder and release its workers. A resumed run first reports its earlier epochs, for the scheduler.
    """

    def setup(
        self, config: dict[str, Any], secrets: Mapping[str, Any] | None = None, user_code: UserCode | None = None
    ) -> None:
        """Start the run of `config["trial"]`, a `trial_spec`, in a thread; Tune adds the other arguments."""
        spec = config["trial"]
        with suppress(OSError):  # on another machine
            os.chdir(spec["cwd"])  # relative paths in a config refer to the driver's folder
        tree = with_secrets(read_yaml(spec["yaml"]), secrets or {})
        check_secrets(tree, f"trial {spec['name']}")
        self._run_config = make_config(tree)
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
                on_notice=ignore,
                pause=self._pause,
            )
            self._records.put(result.metrics[-1])
        except Exception as error:
            self._failure = error
        finally:
            self._records.put(None)

    def _on_start(self, start: Start) -> None:
        self._is_scoring = is_scoring_run(start.folder)  # its epochs are part of the cost of the run that follows

    def _on_epoch(self, record: dict[str, Any]) -> None:
        if not self._is_scoring and not self._is_last(record):  # reported when the run has ended
            self._records.put(record)

    def _is_last(self, record: Mapping[str, Any]) -> bool:
        return bool(record["epoch"] + 1 >= self._run_config.last_epoch)

    def step(self) -> dict[str, Any]:
        """Return the next epoch's figures; those of the last epoch have `finished` and `done`.

        Raises:
            RuntimeError: the run failed, and may be restarted.
        """
        record = self._records.get()
        if record is None:
            assert self._failure is not None, "a run without a failure ends with its last epoch"
            # An error of the config or the data would occur in every attempt.
            line = error_line(self._failure)
            if isinstance(self._failure, ValueError):  # its type tells the command line that the text has a cure
                return {**self._report, "error": f"{type(self._failure).__name__}: {line}", "done": True}
            if isinstance(self._failure, TrainingStopped):
                return {**self._report, "error": line, "done": True}
            raise RuntimeError(line)
        self._report, finished = report_of(record), self._is_last(record)
        if finished:
            self._thread.join()
        return {**self._report, "finished": finished, "done": finished}

    def cleanup(self) -> None:
        """Let a stopped run save and end."""
        self._pause.set()
        self._thread.join(_SAVE_S)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another run in this process, which has imported torch; False if the previous run does not end."""
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
        return {}  # Tune pickles callbacks for `Tuner.restore`, which is not used

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._listeners.on_start(trial.config["trial"]["name"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "epoch" in result:
            self._listeners.on_epoch(trial.config["trial"]["name"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._ends.append((trial.config["trial"]["name"], result.get("error"), result.get("finished", False)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Tune's get_pickled_error reads another path, to which the file is only copied later.
        file = trial.pickled_error_file
        error = ray.cloudpickle.loads(Path(file).read_bytes()) if file else RuntimeError("its process ended")
        line = error_line(getattr(error, "cause", None) or error)
        if isinstance(error, RayActorError):  # whose own text is a list of what may have happened
            line = "its process has ended, perhaps for lack of memory"
        self._ends.append((trial.config["trial"]["name"], line, False))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        # Only here does an exception stop Tune; in the callbacks of a trial's end, it counts as an error of that trial.
        while self._ends:
            self.num_ended += 1
            self._listeners.on_end(*self._ends.pop(0))


def _quiet_tune(debug: bool) -> None:
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a run writes its own metrics
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # an epoch without validation has no accuracy
    if not debug:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints even at verbose=0
        for name in ("ray.tune", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _cpus_released() -> Iterator[None]:
    """After the block, wait until the actors of the runs have released their CPUs, slightly after Tune returns."""
    before = ray.available_resources().get("CPU", 0.0)
    yield
    deadline = time.monotonic() + _RELEASE_S
    while ray.available_resources().get("CPU", 0.0) < before and time.monotonic() < deadline:
        time.sleep(0.1)
