"""A sweep on Ray Tune: many short runs over a space, which go on where an interrupted sweep left them.

What is to be done is read from the trials' own folders, not from Ray Tune's record of the experiment: a trial is an
ordinary run that finds its own checkpoint, a list of trials is a pure function of the config, and so a sweep that was
killed at any moment goes on with the same command (Tuner.restore wants a record that a kill may have left behind the
trials, and starts trials without a checkpoint of Tune's own from nothing). ASHA and Optuna are told of the trials
that ended before. Trials that failed are tried again by the same command.

One start of Ray Tune over the trials of a sweep that are left; how each ends is written down at once.

One trial of a sweep as Ray Tune runs it: an ordinary run of the engine in an actor, an epoch a step.

A class, not a function, because Tune leaves a stopped function's thread to be killed with its process; here the run
saves, closes its folder and lets its workers go before the actor ends.

Optuna as a search of Ray Tune: it proposes points by the results so far, those of an interrupted sweep included.

Not ray.tune's own OptunaSearch: it can't be told finished trials of two objectives, and does not number its trials.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayprune.config import Config, make_config
from rayprune.config.experiments import Axis
from rayprune.config.yaml import read_yaml
from rayprune.engine.cluster import ConcurrencyRequest, TrialResources, divide_resources, start_ray
from rayprune.engine.monitoring import error_line, on_sigterm
from rayprune.engine.storage.resume import SCORING, run_folder_of
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import Start, check, open_splits, train
from rayprune.errors import ConfigError, TrainingStopped
from rayprune.experiments.sweep.folder import (
    FAILED,
    FINISHED,
    STOPPED,
    UNFINISHED,
    Row,
    TrialState,
    check_sweep_folder,
    mark_front,
    open_sweep,
    read_states,
    result_row,
    write_results,
    write_state,
)
from rayprune.experiments.sweep.space import Point, check_space, probe_points, shown_point, trial_config, trial_name


def import_optuna() -> Any:
    """Return the module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep.search = 'optuna' needs Optuna: pip install 'rayprune[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class OptunaPoints(Searcher):
    """Propose points by a tree of Parzen estimators.

    Args:
        axes: the space.
        objectives: name of a reported figure → whether it is to be large.
        seed: of the sampler.
        spec: makes what a trial is given of the point; called once for each new trial.
    """

    def __init__(
        self, axes: Sequence[Axis], objectives: Mapping[str, bool], seed: int, spec: Callable[[Point], dict[str, Any]]
    ) -> None:
        super().__init__(metric=next(iter(objectives)), mode="max" if next(iter(objectives.values())) else "min")
        optuna = import_optuna()
        self._axes, self._objectives, self._spec = axes, objectives, spec
        self._distributions = {axis.key: _distribution(optuna, axis) for axis in axes}
        self._study = optuna.create_study(
            directions=["maximize" if large else "minimize" for large in objectives.values()],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self._trials: dict[str, Any] = {}
        self._waiting: list[tuple[Point, Callable[[], dict[str, Any]]]] = []

    def tell_finished(self, point: Point, result: Mapping[str, Any]) -> None:
        """Let the search know a trial of before."""
        optuna = import_optuna()
        values = self._values(result)
        if values is not None:
            trial = optuna.trial.create_trial(
                params=self._encoded(point), distributions=self._distributions, values=values
            )
            self._study.add_trial(trial)

    def go_on_with(self, trials: Sequence[tuple[Point, Callable[[], dict[str, Any]]]]) -> None:
        """Propose interrupted trials first: their points, and what makes what each is given."""
        self._waiting = list(trials)
        for point, _ in trials:
            self._study.enqueue_trial(self._encoded(point))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return what the next trial is given."""
        trial = self._study.ask(fixed_distributions=self._distributions)
        self._trials[trial_id] = trial
        if self._waiting:
            return self._waiting.pop(0)[1]()
        return self._spec(self._decoded(trial.params))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended."""
        values = None if error or not result or result.get("error") else self._values(result)
        state = import_optuna().trial.TrialState.FAIL if values is None else None
        if trial_id in self._trials:
            self._study.tell(self._trials.pop(trial_id), values, state=state)

    def _values(self, result: Mapping[str, Any]) -> list[float] | None:
        values = [result.get(name) for name in self._objectives]
        return (
            None if any(value is None for value in values) else [float(value) for value in values if value is not None]
        )

    def _encoded(self, point: Point) -> dict[str, Any]:
        return {a.key: a.values.index(point[a.key]) if a.is_discrete else point[a.key] for a in self._axes}

    def _decoded(self, params: Mapping[str, Any]) -> Point:
        return {a.key: a.values[params[a.key]] if a.is_discrete else params[a.key] for a in self._axes}

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: a sweep that goes on tells what has finished."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, likewise."""


def _distribution(optuna: Any, axis: Axis) -> Any:
    kinds = optuna.distributions
    if axis.is_discrete:  # by position: values may be mappings
        return kinds.CategoricalDistribution(tuple(range(len(axis.values))))
    if axis.form == "quniform" and all(isinstance(bound, int) for bound in (axis.low, axis.high, axis.step)):
        return kinds.IntDistribution(axis.low, axis.high, step=axis.step)
    step = axis.step if axis.form == "quniform" else None
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.form == "loguniform", step=step)


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
                return {**self._last, "error": error_line(self._failure), "done": True}
            raise RuntimeError(error_line(self._failure or RuntimeError("training ended without a word")))
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


_OBJECTIVES = {
    "accuracy": {"val_accuracy": True},
    "samples": {"samples_trained": False},
    "compute": {"compute": False},
    "seconds": {"seconds": False},
    "pareto": {"val_accuracy": True, "compute": False},
}


@dataclass(frozen=True)
class SweepStart:
    """A sweep that begins, or goes on.

    Attributes:
        folder: where it writes.
        num_trials: of the whole sweep.
        before: the rows of trials that ended in an earlier start.
        share: how many trials run at once, and what each gets.
    """

    folder: Path
    num_trials: int
    before: list[Row]
    share: TrialResources


@dataclass(frozen=True)
class SweepListeners:
    """Who hears of a sweep: its start; (trial, point, figures) of each epoch; the row of each trial that ended."""

    on_start: Callable[[SweepStart], None] | None = None
    on_epoch: Callable[[str, Point, Mapping[str, Any]], None] | None = None
    on_trial: Callable[[Row], None] | None = None


def run_trials(
    base: Config,
    folder: Path,
    share: TrialResources,
    listeners: SweepListeners,
    ended: Mapping[str, TrialState],
    todo: Sequence[TrialState],
) -> None:
    """Run the trials that are left, until all have ended or a signal came.

    Args:
        base: the sweep's config.
        folder: the sweep's.
        share: what each trial gets.
        listeners: who hears of it.
        ended: name → trial that ended in an earlier start; ASHA and Optuna are told of them.
        todo: the other trials; of Optuna's those that were interrupted.
    """
    section = base.sweep
    make_spec = functools.partial(_spec, base, folder, share)
    storage = folder / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    space: dict[str, Any] = {}
    search, num_samples = None, 1
    if section.search == "optuna":
        search = _search(base, folder, make_spec, ended, todo)
        num_samples = (section.num_trials or 0) - len(ended)
    else:
        space = {"trial": tune.grid_search([make_spec(state) for state in todo])}
    tuner = tune.Tuner(
        tune.with_resources(Trial, share.reserved),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=_asha(base, folder, ended) if section.scheduler == "asha" else None,
            num_samples=num_samples,
            max_concurrent_trials=share.num_concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name=storage.name,
            failure_config=tune.FailureConfig(max_failures=section.max_failures),
            callbacks=[_Endings(folder, listeners, section.amortise)],
            verbose=0,
        ),
    )
    with on_sigterm():
        tuner.fit()
    shutil.rmtree(storage, ignore_errors=True)


def _spec(base: Config, folder: Path, share: TrialResources, state: TrialState) -> dict[str, Any]:
    """Return what a trial's actor is given; write down that the trial has begun."""
    config = trial_config(base, state.point)
    run = {"storage_path": str(folder / "trials"), "name": state.name, "resume": "auto"}
    changed = {
        "run": config.run.model_copy(update=run),
        "scaling": config.scaling.model_copy(update=share.scaling),
    }
    write_state(folder, replace(state, status=UNFINISHED, error=None))
    about = {"name": state.name, "point": state.point, "epochs": config.last_epoch, "cwd": str(Path.cwd())}
    return {**about, "yaml": config.model_copy(update=changed).to_yaml()}


def _search(
    base: Config,
    folder: Path,
    make_spec: Callable[[TrialState], dict[str, Any]],
    ended: Mapping[str, TrialState],
    todo: Sequence[TrialState],
) -> OptunaPoints:
    number = len(ended) + len(todo)

    def new(point: Point) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"trial": make_spec(TrialState(trial_name(number - 1, point), point))}

    def again(state: TrialState) -> dict[str, Any]:
        return {"trial": make_spec(state)}

    section = base.sweep
    # A seed of its own for each start: the same one would propose again what has been tried.
    search = OptunaPoints(section.axes, _OBJECTIVES[section.objective], section.seed + number, new)
    for state in ended.values():
        metrics = read_metrics(folder / "trials" / state.name)
        if metrics:
            search.tell_finished(state.point, report_of(metrics[-1]))
    search.go_on_with([(state.point, functools.partial(again, state)) for state in todo])
    return search


def _asha(base: Config, folder: Path, ended: Mapping[str, TrialState]) -> TrialScheduler:
    section = base.sweep
    epochs = max(trial_config(base, point).last_epoch for point in probe_points(section))
    grace = max(1, epochs // 5) if section.grace_epochs == "auto" else min(section.grace_epochs, epochs)
    metric, large = next(iter(_OBJECTIVES[section.objective].items()))
    asha: Any = ASHAScheduler(
        time_attr="epoch",
        metric=metric,
        mode="max" if large else "min",
        max_t=epochs,
        grace_period=grace,
        reduction_factor=section.reduction_factor,
    )
    for state in ended.values():
        known = SimpleNamespace(trial_id=state.name)
        asha.on_trial_add(None, known)
        for record in read_metrics(folder / "trials" / state.name):
            asha.on_trial_result(None, known, report_of(record))
        asha.on_trial_remove(None, known)
    return asha  # type: ignore[no-any-return]


class _Endings(tune.Callback):
    """Write down how each trial ends, and tell the listeners."""

    def __init__(self, folder: Path, listeners: SweepListeners, amortise: int) -> None:
        self._folder, self._listeners, self._amortise = folder, listeners, amortise

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its callbacks for a restore that a sweep does without

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Hand an epoch on."""
        spec = trial.config["trial"]
        if self._listeners.on_epoch is not None and "epoch" in result:
            self._listeners.on_epoch(spec["name"], spec["point"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write down a trial that came to its end, or was stopped by the scheduler."""
        spec, last = trial.config["trial"], trial.last_result or {}
        if last.get("error"):
            self._end(spec, FAILED, str(last["error"]))
        else:
            self._end(spec, FINISHED if last.get("epoch", 0) >= spec["epochs"] else STOPPED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write down a trial whose attempts are used up."""
        error = trial.get_pickled_error() or trial.get_error()
        cause = getattr(error, "cause", None) or error
        self._end(trial.config["trial"], FAILED, error_line(cause or RuntimeError("the trial's process ended")))

    def _end(self, spec: Mapping[str, Any], status: str, error: str | None = None) -> None:
        state = TrialState(spec["name"], spec["point"], status, error)
        write_state(self._folder, state)
        if self._listeners.on_trial is not None:
            self._listeners.on_trial(result_row(self._folder, state, self._amortise))


__all__ = ["SweepListeners", "SweepResult", "SweepStart", "sweep"]

_GIVE_BACK_S = 20.0


@dataclass(frozen=True)
class SweepResult:
    """A sweep that ended: its folder, and a row a trial as in results.parquet."""

    folder: Path
    rows: list[Row] = field(default_factory=list)


def sweep(base: Config, folder: Path, listeners: SweepListeners | None = None, *, debug: bool = False) -> SweepResult:
    """Run a sweep to its end, from where its folder stands.

    Args:
        base: the config, with its section `sweep`.
        folder: `sweep_folder_of(base, …)`.
        listeners: who hears of it.
        debug: show Ray's own logs.

    Raises:
        ValueError: a key or value of the space is wrong, the folder is another sweep's, or no trial can have the
            resources; one line, and no trial has started.
        KeyboardInterrupt: SIGINT or SIGTERM came; the same call goes on.
    """
    listeners = listeners or SweepListeners()
    points = check_space(base)
    check_sweep_folder(base, folder)
    optuna = base.sweep.search == "optuna"
    if optuna:
        import_optuna()
    splits = _check_trials(base, points or list(probe_points(base.sweep)))
    _quiet_tune(debug)
    # Only a Ray Train inside of a trial leaves CPUs behind that the dashboard's part of Ray cleans up.
    start_ray(debug, dashboard=base.scaling.num_workers != 0, address=base.run.address)
    names = [trial_name(number, point) for number, point in enumerate(points)]
    num_trials = base.sweep.num_trials or 0 if optuna else len(points)
    request = ConcurrencyRequest(num_trials, base.sweep.max_concurrent)
    share = divide_resources(base, splits.train, request, ray.cluster_resources())
    with open_sweep(base, folder):
        states = read_states(folder)
        ended = {name: state for name, state in states.items() if state.status in {FINISHED, STOPPED}}
        if listeners.on_start is not None:
            before = [result_row(folder, state, base.sweep.amortise) for state in ended.values()]
            listeners.on_start(SweepStart(folder, num_trials, before, share))
        if optuna:
            todo = [state for name, state in states.items() if name not in ended]
        else:
            todo = [TrialState(n, p) for n, p in zip(names, points, strict=True) if n not in ended]
        if len(ended) < num_trials:
            for split in (splits.train, splits.validation):
                if split is not None:
                    split.prepare()  # decoded once, not by each trial
            with _cpus_given_back():
                run_trials(base, folder, share, listeners, ended, todo)
        states = read_states(folder)
        rows = mark_front([result_row(folder, state, base.sweep.amortise) for state in states.values()])
        write_results(folder, base, rows)
        if len(states) < num_trials or any(state.status == UNFINISHED for state in states.values()):
            raise KeyboardInterrupt
        return SweepResult(folder, rows)


def _check_trials(base: Config, points: Sequence[Point]) -> Any:
    """Refuse trials that cannot work with their data; return the base config's data."""
    opened: dict[str, Any] = {}
    for point in points:
        try:
            config = trial_config(base, point)
            key = config.data.model_dump_json()
            if key not in opened:
                opened[key] = open_splits(config)
            check(config, opened[key])
        except ValueError as error:
            raise ConfigError(f"sweep.space at {shown_point(point)}: {error}") from None
    key = base.data.model_dump_json()
    return opened[key] if key in opened else next(iter(opened.values()))


def _quiet_tune(debug: bool) -> None:
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # One record of a trial is enough: its own folder.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # An epoch without a validation has no accuracy to report.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    if not debug:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints at verbose=0 too
        for name in ("ray.tune", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _cpus_given_back() -> Iterator[None]:
    """Wait until Ray has back what the trials had: their actors end a little after Ray Tune does."""
    before = ray.available_resources().get("CPU", 0.0)
    yield
    deadline = time.monotonic() + _GIVE_BACK_S
    while ray.available_resources().get("CPU", 0.0) < before and time.monotonic() < deadline:
        time.sleep(0.1)
