"""Run a sweep: many short runs over a space of settings.

An interrupted sweep continues from the folders of its trials, not from Ray Tune's record: a trial is an ordinary run
that resumes from its own checkpoint, and the list of trials is a pure function of the config. After a kill at any
moment, the same command therefore continues the sweep. It also repeats failed trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayprune.config import Config
from rayprune.core.redaction import secrets_of, with_secrets
from rayprune.engine.cluster import ConcurrencyRequest, TrialResources, divide_resources, machine_resources, start_ray
from rayprune.engine.monitoring import on_sigterm
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import check, open_splits
from rayprune.errors import ConfigError
from rayprune.experiments.folder import ExperimentFolder
from rayprune.experiments.sweep.folder import (
    FAILED,
    FINISHED,
    STOPPED,
    UNFINISHED,
    Row,
    TrialState,
    mark_front,
    read_states,
    result_row,
    write_results,
    write_state,
)
from rayprune.experiments.sweep.search import OBJECTIVES, OptunaSearch, asha_scheduler, import_optuna
from rayprune.experiments.sweep.space import (
    Point,
    check_space,
    probe_points,
    shown_point,
    sweep_digest,
    trial_config,
    trial_name,
)
from rayprune.experiments.trials import Proposals, TrialListeners, ignore, report_of, run_trials, trial_spec
from rayprune.sources import Splits


@dataclass(frozen=True)
class SweepStart:
    """A sweep that starts or continues.

    Attributes:
        folder: the sweep's folder.
        num_trials: of the whole sweep.
        before: the rows of trials that ended in an earlier start.
        resources: how many trials run at a time, and the resources of each.
    """

    folder: Path
    num_trials: int
    before: list[Row]
    resources: TrialResources


@dataclass(frozen=True)
class SweepListeners:
    """Callbacks of a sweep, for its start, (trial, point, figures) of each epoch, and the row of each ended trial."""

    on_start: Callable[[SweepStart], None] = ignore
    on_epoch: Callable[[str, Point, Mapping[str, Any]], None] = ignore
    on_trial: Callable[[Row], None] = ignore


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its folder, and a row per trial as in results.parquet."""

    folder: Path
    rows: list[Row]


def sweep(base: Config, folder: Path, listeners: SweepListeners | None = None, *, debug: bool = False) -> SweepResult:
    """Run a sweep to its end, continuing its folder if it exists.

    Args:
        base: the config, with its section `sweep`.
        folder: `sweep_folder_of(base, …)`.
        listeners: callbacks.
        debug: show Ray's own logs.

    Raises:
        ConfigError: a key or value of the space is wrong, or a trial can't use its data. As with the next three, no
            trial has started.
        DataError: the samples can't be decoded, or the cache can't be written.
        RunFolderError: the folder is another sweep's, is in use, or can't be written.
        ClusterError: no Ray cluster answers, or it has too few resources for a trial.
        KeyboardInterrupt, TrainingPaused: SIGINT or SIGTERM arrived; the same call continues the sweep.
    """
    listeners = listeners or SweepListeners()
    points, section = check_space(base), base.sweep
    experiment = ExperimentFolder(folder, "sweep.yaml", sweep_digest)
    experiment.check(base)
    if section.search == "optuna":
        import_optuna()
    splits = _check_trials(base, points or list(probe_points(section)))
    # Needed only for Ray Train inside a trial: the dashboard's part of Ray releases the CPUs that it leaves reserved.
    start_ray(debug, dashboard=base.scaling.num_workers != 0, address=base.run.address)
    num_trials = len(points) or section.num_trials or 0
    request = ConcurrencyRequest(num_trials, section.max_concurrent)
    resources = divide_resources(base, splits.train, request, machine_resources())
    with experiment.open(base), on_sigterm():
        trials = _Trials(base, folder, resources, listeners)
        before = [result_row(folder, state, section.amortise) for state in trials.ended.values()]
        listeners.on_start(SweepStart(folder, num_trials, before, resources))
        complete = True
        if len(trials.ended) < num_trials:
            for split in (splits.train, splits.validation):
                if split is not None:
                    split.prepare()  # decode once, not in each trial
            complete = trials.run(points, debug)
        rows = mark_front([result_row(folder, state, section.amortise) for state in read_states(folder).values()])
        if rows:  # none if the sweep was interrupted immediately
            write_results(folder, base, rows)
        if not complete:
            raise KeyboardInterrupt
    return SweepResult(folder, rows)


def _check_trials(base: Config, points: Sequence[Point]) -> Splits:
    """Check the trials against their data; return the data of the base config."""
    opened: dict[str, Splits] = {}
    for point in points:
        try:
            config = trial_config(base, point)
            key = config.data.model_dump_json()
            if key not in opened:
                opened[key] = open_splits(config)
            check(config, opened[key])
        except ValueError as error:
            raise ConfigError(f"sweep.space at {shown_point(point)}: {error}") from None
    return opened.get(base.data.model_dump_json(), next(iter(opened.values())))


class _Trials:
    """The trials of a sweep; every change of a state is written to trial.json immediately.

    Attributes:
        ended: name → state of each trial that does not run again.
    """

    def __init__(self, base: Config, folder: Path, resources: TrialResources, listeners: SweepListeners) -> None:
        self._base, self._folder, self._resources, self._listeners = base, folder, resources, listeners
        self._secrets = secrets_of(base.model_dump(mode="json"))
        self._states = {
            name: replace(state, point=with_secrets(state.point, self._secrets))
            for name, state in read_states(folder).items()
        }
        self.ended = {name: state for name, state in self._states.items() if state.status in {FINISHED, STOPPED}}

    def run(self, points: Sequence[Point], debug: bool) -> bool:
        """Run the remaining trials; return whether all have ended.

        Args:
            points: all points of a grid or random search; empty if Optuna proposes them.
            debug: show Ray's own logs.
        """
        section = self._base.sweep
        asha = None
        if section.scheduler == "asha":
            asha = asha_scheduler(self._base, {name: self._reports(name) for name in self.ended})
        states = (TrialState(trial_name(number, point), point) for number, point in enumerate(points))
        remaining = [self._begin(state) for state in states if state.name not in self.ended]
        return run_trials(
            remaining if points else self._proposals(),
            self._resources,
            TrialListeners(self._on_end, on_epoch=self._on_epoch),
            folder=self._folder,
            secrets=self._secrets,
            scheduler=asha,
            max_failures=section.max_failures,
            debug=debug,
        )

    def _begin(self, state: TrialState) -> Config:
        """Record that a trial has begun; return the config of its run."""
        self._states[state.name] = replace(state, status=UNFINISHED, error=None)
        write_state(self._folder, self._states[state.name])
        config = trial_config(self._base, state.point)
        run = {"storage_path": str(self._folder / "trials"), "name": state.name, "resume": "auto"}
        changes = {
            "run": config.run.model_copy(update=run),
            "scaling": config.scaling.model_copy(update=self._resources.scaling),
        }
        return config.model_copy(update=changes)

    def _proposals(self) -> Proposals:
        """Return an Optuna search that knows the trials of earlier starts and resumes the interrupted ones first."""
        section, interrupted = self._base.sweep, [s for s in self._states.values() if s.name not in self.ended]

        def new_trial(point: Point) -> dict[str, Any]:
            return {"trial": trial_spec(self._begin(TrialState(trial_name(len(self._states), point), point)))}

        # Each start has its own seed: the same seed would propose the same points again.
        seed = section.seed + len(self._states)
        search = OptunaSearch(section.axes, OBJECTIVES[section.objective], seed, new_trial)
        for state in self.ended.values():
            for report in self._reports(state.name)[-1:]:
                search.add_finished(state.point, report)
        for state in interrupted:
            search.resume(state.point, {"trial": trial_spec(self._begin(state))})
        return Proposals(search, (section.num_trials or 0) - len(self.ended))

    def _reports(self, name: str) -> list[dict[str, Any]]:
        return [report_of(record) for record in read_metrics(self._folder / "trials" / name)]

    def _on_epoch(self, name: str, figures: Mapping[str, Any]) -> None:
        self._listeners.on_epoch(name, self._states[name].shown_point, figures)

    def _on_end(self, name: str, error: str | None, finished: bool) -> None:
        status = FAILED if error else FINISHED if finished else STOPPED
        state = replace(self._states[name], status=status, error=error)
        write_state(self._folder, state)
        self._listeners.on_trial(result_row(self._folder, state, self._base.sweep.amortise))
