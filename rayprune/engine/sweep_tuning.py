"""One start of Ray Tune over the trials of a sweep that are left; how each ends is written down at once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from rayprune.config import Config
from rayprune.config_trials import Point, probe_points, trial_config, trial_name
from rayprune.engine.ending import on_sigterm, one_line
from rayprune.engine.run_folder import read_metrics
from rayprune.engine.shares import Share
from rayprune.engine.sweep_folder import (
    FAILED,
    FINISHED,
    STOPPED,
    UNFINISHED,
    Row,
    TrialState,
    result_row,
    write_state,
)
from rayprune.engine.sweep_search import OptunaPoints
from rayprune.engine.sweep_trial import Trial, report_of

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
    share: Share


@dataclass(frozen=True)
class SweepListeners:
    """Who hears of a sweep: its start; (trial, point, figures) of each epoch; the row of each trial that ended."""

    on_start: Callable[[SweepStart], None] | None = None
    on_epoch: Callable[[str, Point, Mapping[str, Any]], None] | None = None
    on_trial: Callable[[Row], None] | None = None


def run_trials(
    base: Config,
    folder: Path,
    share: Share,
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


def _spec(base: Config, folder: Path, share: Share, state: TrialState) -> dict[str, Any]:
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
        self._end(trial.config["trial"], FAILED, one_line(cause or RuntimeError("the trial's process ended")))

    def _end(self, spec: Mapping[str, Any], status: str, error: str | None = None) -> None:
        state = TrialState(spec["name"], spec["point"], status, error)
        write_state(self._folder, state)
        if self._listeners.on_trial is not None:
            self._listeners.on_trial(result_row(self._folder, state, self._amortise))
