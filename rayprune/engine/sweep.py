"""A sweep on Ray Tune: many short runs over a space, which go on where an interrupted sweep left them.

What is to be done is read from the trials' own folders, not from Ray Tune's record of the experiment: a trial is an
ordinary run that finds its own checkpoint, a list of trials is a pure function of the config, and so a sweep that was
killed at any moment goes on with the same command (Tuner.restore wants a record that a kill may have left behind the
trials, and starts trials without a checkpoint of Tune's own from nothing). ASHA and Optuna are told of the trials
that ended before. Trials that failed are tried again by the same command.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from rayprune.config import Config
from rayprune.config_trials import Point, check_space, probe_points, shown_point, trial_config, trial_name
from rayprune.engine.resources import start_ray
from rayprune.engine.shares import Asked, share_resources
from rayprune.engine.sweep_folder import (
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
)
from rayprune.engine.sweep_search import import_optuna
from rayprune.engine.sweep_tuning import SweepListeners, SweepStart, run_trials
from rayprune.engine.train import check, open_splits

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
    share = share_resources(base, splits.train, num_trials, Asked(base.sweep.max_concurrent), ray.cluster_resources())
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
            raise ValueError(f"sweep.space at {shown_point(point)}: {error}") from None
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
