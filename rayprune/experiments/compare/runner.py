"""Run a comparison: every arm with every seed is an ordinary run, and the results are compared seed by seed.

<storage_path>/<name>/   compare.yaml, runs/<arm>-seed<k>/, tuning/, compare.json, compare.csv, threads.json,
                         shared_runs.json

Finished runs are read, the others are trained. The seconds of a run count only if it ran alone. Such runs are trained
one after another in this process, seed by seed, so that a slowdown of the machine affects full training and the methods
equally. If `compare.parallel` allows several runs at a time, those of the first `compare.timed_seeds` seeds still run
alone, and the others on Ray Tune. `shared_runs.json` lists the runs that were trained beside others, so that their
seconds do not count when the command is repeated with another `compare.parallel`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from numpy.typing import NDArray

from rayprune.config import Config, make_config
from rayprune.config.experiments import CompareSection
from rayprune.config.yaml import merge
from rayprune.core.redaction import secrets_of
from rayprune.engine.cluster import (
    ConcurrencyRequest,
    TrialResources,
    cluster_address,
    divide_resources,
    machine_resources,
    start_ray,
)
from rayprune.engine.monitoring import on_sigterm
from rayprune.engine.storage.costs import costs_of
from rayprune.engine.storage.resume import check_folder, run_folder_of
from rayprune.engine.storage.run_folder import read_json, read_metrics, read_validation, write_whole
from rayprune.engine.train.driver import check, open_splits, train
from rayprune.errors import ConfigError, RunFolderError, TrainingFailed, TrainingStopped, one_line
from rayprune.experiments.compare.arms import (
    METHOD,
    Arm,
    ArmSettings,
    arm_settings,
    arms_of,
    digest_of,
    equal_steps,
    run_config,
)
from rayprune.experiments.compare.looks import Looks, criteria_of
from rayprune.experiments.compare.statistics import LEAST_TIMED, ArmRuns, RunOutcome, timed_places
from rayprune.experiments.compare.tuning import best_factor, next_factor, tuning_config, tuning_seeds, why_not_tuned
from rayprune.experiments.compare.verdicts import summary
from rayprune.experiments.folder import ExperimentFolder
from rayprune.experiments.trials import TrialListeners, ignore, run_trials
from rayprune.methods import build_method
from rayprune.sources import SampleSource, Splits

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 4
_SECONDS = "seconds of training and selection, without validation"


@dataclass(frozen=True)
class CompareListeners:
    """Callbacks of a comparison.

    Attributes:
        on_run: called when a run starts with ("3/24", arm, seed, whether the run had already finished, settings).
        on_notice: called with one-line notices for the user.
    """

    on_run: Callable[[str, Arm, int, bool, ArmSettings], None] = ignore
    on_notice: Callable[[str], None] = logger.warning


def compare(config: Config, listeners: CompareListeners | None = None, *, debug: bool = False) -> Path:
    """Run all arms with all seeds, continuing the comparison's folder if it exists, and write the results.

    Args:
        config: a resolved config, with `run.name` set to the name of the comparison's folder.
        listeners: callbacks.
        debug: show Ray's own logs.

    Returns:
        The folder, with compare.json and compare.csv.

    Raises:
        ConfigError: the config can't be compared or trained.
        DataError: the data can't be used.
        RunFolderError: the folder is another comparison's, is in use, is damaged, or can't be written.
        ClusterError: no Ray cluster answers, or it has too few resources for the runs.
        TrainingFailed, TrainingStopped: a run failed; the other active runs have saved checkpoints.
        KeyboardInterrupt, TrainingPaused: SIGINT or SIGTERM arrived; the same call continues the comparison.
    """
    listeners = listeners or CompareListeners()
    section, folder = config.compare, run_folder_of(config)
    arms, notes = arms_of(config)
    splits = open_splits(config)
    if splits.validation is None:
        raise ConfigError(f"data.source {config.data.source!r} has no validation part: set data.hold_out=0.1")
    tuned = not (reason := why_not_tuned(config, len(splits.train)))
    experiment = ExperimentFolder(folder, "compare.yaml", digest_of)
    experiment.check(config)
    looks = Looks(folder, section)
    criteria = criteria_of(section, sum(arm.baseline == METHOD for arm in arms))
    num_samples = len(splits.validation)
    notes += _limits(section, num_samples, reason)
    for note in (*notes, *looks.notices(criteria, num_samples)):
        listeners.on_notice(note)
    if not folder.exists():
        _check_runs(config, splits, arms if tuned else ())
    config = _with_stored_threads(config, folder)
    num_tuning = len(arms) * len(section.lr_factors) * section.tune_seeds if tuned else 0
    num_shared = max(num_tuning, len(arms) * (len(section.all_seeds) - section.timed_seeds), 0)
    resources = _trial_resources(config, splits.train, num_shared, debug)
    with experiment.open(config), on_sigterm():
        write_whole(folder / "threads.json", json.dumps(_threads(config, resources)) + "\n")
        runs = _Runs(config, folder, splits, listeners, resources=resources, debug=debug)
        results = runs.train_all(arms, section.all_seeds, tuned)
        environment = folder / "runs" / results[0].runs[0].folder / "environment.json"
        criteria, record = looks.judge(criteria, results)
        report = {
            "digest": digest_of(config),
            "notes": notes,
            "timing": _timing(results),
            "looks": record,
            "first_confidence": section.confidence,
            "amortise": section.amortise,
            "tuning": {name: _tuning_row(accuracies) for name, accuracies in runs.tuning.items()},
            "methods_compared": {arm.name: dict(arm.of) for arm in arms if arm.baseline == "method"},
            **summary(results, criteria),
            "environment": read_json(environment),
        }
        _write(folder, report, results)
    return folder


def _limits(section: CompareSection, num_samples: int, not_tuned: str) -> Iterator[str]:
    """Yield a line for each limit of what a comparison can show, with V validation samples."""
    resolution = 100.0 / num_samples  # points that one sample is worth
    if not_tuned:
        yield f"learning rates are not tuned ({not_tuned}): arms of a method's cost take steps of its mean size"
    if section.margin < resolution:
        yield f"the margin of {section.margin:g} points is less than one sample ({resolution:.2g} points)"
    if len(section.all_seeds) == 1:
        yield "one seed gives no interval, so the verdict will be undecided; set compare.seeds=3"
    elif min(section.timed_seeds, len(section.all_seeds)) < LEAST_TIMED:
        yield f"fewer than {LEAST_TIMED} seeds are timed, so no verdict will rest on seconds; set compare.timed_seeds=3"


def _write(folder: Path, report: Mapping[str, Any], arms: Sequence[ArmRuns]) -> None:
    write_whole(folder / "compare.json", json.dumps(report, indent=1) + "\n")
    rows = [{"arm": arm.name, "baseline": arm.baseline, **dataclasses.asdict(run)} for arm in arms for run in arm.runs]
    write_whole(folder / "compare.csv", pd.DataFrame(rows).to_csv(index=False))


def _check_runs(config: Config, splits: Splits, tuned: Sequence[Arm]) -> None:
    """Report a mistake in the config, or in the tuning runs of these arms, before anything is written."""
    check(config, splits)
    for arm in tuned:
        if not arm.derived:
            trial = tuning_config(config, arm_settings(arm, config), "tuning", 0, str(run_folder_of(config)))
            check(trial, open_splits(trial))


def _with_stored_threads(config: Config, folder: Path) -> Config:
    """Return the config with the number of threads that the comparison began with, so that its runs are comparable."""
    stored = folder / "threads.json"
    if config.scaling.threads != "auto" or not stored.exists():
        return config
    scaling = config.scaling.model_copy(update={"threads": read_json(stored)})
    return config.model_copy(update={"scaling": scaling})


def _threads(config: Config, resources: TrialResources | None) -> int | str:
    if resources is not None:
        return int(resources.scaling["threads"])
    one_process = config.scaling.threads == "auto" and config.scaling.num_workers == 0
    return len(os.sched_getaffinity(0)) if one_process else config.scaling.threads


def _trial_resources(config: Config, source: SampleSource, num_shared: int, debug: bool) -> TrialResources | None:
    """Return how many runs to train at a time and the resources of each; None to train them one after another.

    Raises:
        ClusterError: there are too few resources for `compare.parallel`.
    """
    section = config.compare
    request = ConcurrencyRequest(max(1, num_shared), section.parallel, "compare.parallel", "run")
    elastic = isinstance(config.scaling.num_workers, tuple)
    if section.parallel == 1 or (section.parallel == "auto" and (elastic or not num_shared)):
        return None
    if config.scaling.num_workers == 0 and cluster_address(config.run.address) is None:
        # The resources that Ray would find on this machine, without starting it: one run at a time may be enough.
        machines = [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]
    else:
        start_ray(debug, dashboard=config.scaling.num_workers != 0, address=config.run.address)
        machines = machine_resources()
    resources = divide_resources(config, source, request, machines)
    return resources if resources.num_concurrent > 1 else None


def _caveat(config: Config, arm: Arm) -> str:
    """Return a note for a method whose seconds include only a part of its scoring run; "" for other arms."""
    if config.compare.amortise == 1 or arm.baseline != "method" or not build_method(arm.of).collect_epochs:
        return ""
    return f" with a scoring run shared by {config.compare.amortise} trainings"


def _timing(arms: Sequence[ArmRuns]) -> str:
    """Describe which seconds count."""
    seeds = [run.seed for run in arms[0].runs]
    alone = [seed for place, seed in enumerate(seeds) if all(arm.runs[place].alone for arm in arms)]
    if alone == seeds:
        return f"each run trained alone; {_SECONDS}"
    if not alone:
        return f"runs trained side by side, so do not rely on them (compare.parallel=1); {_SECONDS}"
    names = ", ".join(map(str, alone))
    return f"runs of seed {names} trained alone, the others side by side and not timed; {_SECONDS}"


@dataclass(frozen=True)
class _Job:
    """A run: its arm, the position of its seed, its settings and config, whether it has finished, or only tunes."""

    arm: Arm
    place: int
    settings: ArmSettings
    config: Config
    finished: bool
    tuning: bool = False

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return str(self.config.run.name)


class _Runs:
    """The runs of a comparison.

    Args:
        config: the comparison's config.
        folder: the comparison's folder.
        splits: the data.
        listeners: callbacks.
        resources: how many runs to train at a time; None: one after another.
        debug: show Ray's own logs.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        splits: Splits,
        listeners: CompareListeners,
        *,
        resources: TrialResources | None,
        debug: bool,
    ) -> None:
        if resources is not None:
            # The same number of threads, alone or not: the arms of a seed must be comparable bit by bit.
            config = config.model_copy(update={"scaling": config.scaling.model_copy(update=resources.scaling)})
        self._config, self._folder, self._source, self._resources = config, folder, splits.train, resources
        self._num_validation = len(splits.validation) if splits.validation is not None else 0
        self._shared_file = folder / "shared_runs.json"
        self._listeners, self._debug = listeners, debug
        self._warm = config.scaling.num_workers != 0  # with workers, every run starts its own, which warm up
        self._num_started = self._num_runs = 0
        self._outcomes = defaultdict[str, dict[int, RunOutcome]](dict)  # arm → position of the seed → outcome
        self._correct = dict[str, NDArray[np.bool_]]()  # run folder → (V,)
        self.tuning: dict[str, dict[float, float]] = {}  # arm → factor on the learning rate → held-out accuracy
        self._failures: dict[str, str] = {}  # tuning run → its error
        self._tuning_source: SampleSource | None = None

    def train_all(self, arms: Sequence[Arm], seeds: Sequence[int], tuned: bool) -> list[ArmRuns]:
        """Return every arm's runs, one per seed. Derived arms run after full training and the methods.

        Args:
            arms: the arms.
            seeds: of the judged runs.
            tuned: whether each arm chooses its learning rate first.
        """
        self._num_runs = len(arms) * len(seeds)
        places = list(enumerate(seeds))
        num_timed = len(seeds) if self._resources is None else self._config.compare.timed_seeds
        for derived in (False, True):
            stage = [arm for arm in arms if arm.derived == derived]
            if tuned:
                self._tune(stage)
            for place, seed in places[:num_timed]:
                for arm in stage:
                    job = self._job(arm, place, seed)
                    self._train_alone(job)
                    self._keep(job)
            jobs = [self._job(arm, place, seed) for place, seed in places[num_timed:] for arm in stage]
            self._train_at_once(jobs)
            for job in jobs:
                self._keep(job)
        outcomes = {arm.name: [self._outcomes[arm.name][place] for place, _ in places] for arm in arms}
        timed = timed_places(outcomes.values())
        return [self._results(arm, outcomes[arm.name], timed) for arm in arms]

    def _results(self, arm: Arm, outcomes: Sequence[RunOutcome], timed: Sequence[int]) -> ArmRuns:
        correct_SV = np.stack([self._correct[outcome.folder] for outcome in outcomes])
        caveat = _caveat(self._config, arm)
        return ArmRuns(arm.name, arm.baseline, arm.method_arm, outcomes, correct_SV, timed, caveat)

    def _tune(self, stage: Sequence[Arm]) -> None:
        """Find the factor on the learning rate with the best accuracy on held-out samples, for each arm of a stage."""
        first, seeds = self._config.compare.lr_factors, tuning_seeds(self._config)
        # The overhead of a method, ratio_0, is measured on full training as it is.
        own = {arm.name: arm for arm in stage if arm.baseline != "ratio_0"}
        waiting = {name: list(first) for name, arm in own.items() if not self._settings(arm, 0, 1.0).same_as_full}
        while waiting:
            jobs = {
                (name, factor): [self._tuning_job(own[name], factor, seed) for seed in seeds]
                for name, factors in waiting.items()
                for factor in factors
            }
            every = [job for several in jobs.values() for job in several]
            if self._resources is None:
                for job in every:
                    self._try_alone(job)
            else:
                self._train_at_once(every)
            for (name, factor), several in jobs.items():
                self.tuning.setdefault(name, {})[factor] = self._tuned_accuracy(several)
            for name in waiting:
                if max(self.tuning[name].values()) == -math.inf:
                    failed = next(job.name for job in every if job.arm.name == name and job.name in self._failures)
                    raise TrainingFailed(f"no learning rate works for {name}: {self._failures[failed]}")
            further = {name: next_factor(self.tuning[name], first) for name in waiting}
            waiting = {name: [factor] for name, factor in further.items() if factor is not None}

    def _tuning_job(self, arm: Arm, factor: float, seed: int) -> _Job:
        settings = self._settings(arm, 0, factor)
        name, storage = f"{arm.name}{settings.tag}-seed{seed}", str(self._folder / "tuning")
        config = tuning_config(self._config, settings, name, seed, storage)
        if self._tuning_source is None:
            self._tuning_source = open_splits(config).train  # the same samples are held out of all tuning runs
        return _Job(arm, 0, settings, config, self._is_finished(config, self._tuning_source), tuning=True)

    def _try_alone(self, job: _Job) -> None:
        try:
            self._train_alone(job)
        except (ConfigError, TrainingFailed, TrainingStopped) as error:
            self._failures[job.name] = one_line(error)

    def _tuned_accuracy(self, jobs: Sequence[_Job]) -> float:
        """Return the mean accuracy of the runs with one factor; −inf if one failed, as a rate too large can make it."""
        if any(job.name in self._failures for job in jobs):
            return -math.inf
        return 100.0 * mean(read_metrics(run_folder_of(job.config))[-1]["val_accuracy"] for job in jobs)

    def _job(self, arm: Arm, place: int, seed: int) -> _Job:
        settings = self._settings(arm, place, self._factor(arm))
        # A length or ratio that was matched with other seeds or costs is another run.
        name = f"{arm.name}{settings.tag}-seed{seed}"
        config = run_config(self._config, settings, name, seed, str(self._folder / "runs"))
        return _Job(arm, place, settings, config, settings.same_as_full or self._is_finished(config, self._source))

    def _factor(self, arm: Arm) -> float | None:
        """Return the tuned factor on the learning rate; None if the arms are not tuned."""
        # ratio_0, and an arm that is full training with the first seed, have the rate of full training.
        accuracies = self.tuning.get(arm.name, self.tuning.get("full"))
        return best_factor(accuracies) if accuracies else None

    def _settings(self, arm: Arm, place: int, factor: float | None) -> ArmSettings:
        """Return what an arm trains; without a factor, a derived arm takes steps of its method's size."""
        if not arm.derived:
            settings = arm_settings(arm, self._config)
            return settings if factor is None else settings.at_rate(factor)
        full, method = self._outcomes["full"], self._outcomes[arm.method_arm]
        pairs = [(full[number], method[number]) for number in sorted(full)]
        settings = arm_settings(arm, self._config, pairs, place, num_samples=len(self._source))
        if factor is not None:
            return settings.at_rate(factor)
        return equal_steps(arm, settings, [outcome for _, outcome in pairs], place)

    def _is_finished(self, config: Config, source: SampleSource) -> bool:
        check_folder(config)
        folder = run_folder_of(config)
        metrics = read_metrics(folder)
        if not (metrics and metrics[-1]["epoch"] + 1 == config.train.epochs and (folder / "scores.parquet").exists()):
            return False
        environment = folder / "environment.json"
        # Pass a run on other data to `train`, which reports the error.
        return environment.exists() and read_json(environment)["fingerprint"] == source.fingerprint

    def _train_alone(self, job: _Job) -> None:
        self._announce(job)
        if not job.finished:
            self._warm_up()
            train(job.config, debug=self._debug, on_notice=self._listeners.on_notice)

    def _warm_up(self) -> None:
        """Train a few steps, so that the start-up costs of the process do not count against the first arm."""
        if self._warm:
            return
        self._warm = True
        limit = min(self._config.data.limit or 2**62, _WARM_UP_STEPS * self._config.train.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(self._config, ArmSettings({"name": "full"}, 1), "warm-up", 0, folder)
            tree = merge(config.model_dump(mode="json"), {"data": {"limit": limit}})
            train(make_config(tree), debug=self._debug, on_notice=ignore)

    def _train_at_once(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            if job.finished:
                self._announce(job)
        remaining = {job.name: job for job in jobs if not job.finished}
        if remaining:
            assert self._resources is not None, "without shared resources, all runs are trained alone"
            in_process = self._config.scaling.num_workers == 0
            ours = in_process and not ray.is_initialized()
            start_ray(self._debug, dashboard=not in_process, address=self._config.run.address)
            self._mark_shared(name for name, job in remaining.items() if not job.tuning)

            def on_end(name: str, error: str | None, finished: bool) -> None:
                if error is not None and not remaining[name].tuning:
                    raise TrainingFailed(f"run {name}: {error}")
                if error is not None:
                    self._failures[name] = error

            events = TrialListeners(on_end, on_start=lambda name: self._announce(remaining[name]))
            configs = [job.config for job in remaining.values()]
            secrets = secrets_of(self._config.model_dump(mode="json"))
            if not run_trials(
                configs, self._resources, events, folder=self._folder, secrets=secrets, debug=self._debug
            ):
                raise KeyboardInterrupt
            if ours:
                ray.shutdown()  # the next timed runs need the machine to themselves

    def _announce(self, job: _Job) -> None:
        self._num_started += not job.tuning
        number = "tuning" if job.tuning else f"{self._num_started}/{self._num_runs}"
        self._listeners.on_run(number, job.arm, job.config.train.seed, job.finished, job.settings)

    def _keep(self, job: _Job) -> None:
        """Read the outcome of a finished run."""
        if job.settings.same_as_full:
            outcome = dataclasses.replace(self._outcomes["full"][job.place], matched=job.settings.matched)
        else:
            folder = run_folder_of(job.config)
            metrics = read_metrics(folder)
            if "mean_weight" not in metrics[-1]:
                raise RunFolderError(f"{folder} is of an earlier version of rayprune: choose another run.name")
            self._correct[job.name] = read_validation(folder, self._num_validation)
            last, costs = metrics[-1], costs_of(folder, metrics, self._config.compare.amortise)
            outcome = RunOutcome(
                seed=job.config.train.seed,
                folder=job.name,
                epochs=len(metrics),
                matched=job.settings.matched,
                accuracy=100.0 * last["val_accuracy"],
                worst_class=100.0 * min(value for value in last["val_class_accuracy"] if value is not None),
                samples_trained=costs.samples_trained,
                samples_forwarded=costs.samples_forwarded,
                compute=costs.compute,
                flops=costs.flops,
                seconds=costs.seconds,
                learning_rate=job.config.optim.lr,
                mean_step_scale=job.settings.lr_factor * _step_scale(job.config, metrics),
                alone=job.name not in self._shared(),
            )
        self._outcomes[job.arm.name][job.place] = outcome

    def _shared(self) -> list[str]:
        return list(read_json(self._shared_file)) if self._shared_file.exists() else []

    def _mark_shared(self, names: Iterable[str]) -> None:
        write_whole(self._shared_file, json.dumps(sorted({*self._shared(), *names}), indent=1) + "\n")


def _tuning_row(accuracies: Mapping[float, float]) -> dict[str, float | None]:
    """Return factor → held-out accuracy, None if a run failed, as plain JSON types."""
    return {f"{factor:g}": value if math.isfinite(value) else None for factor, value in sorted(accuracies.items())}


def _step_scale(config: Config, metrics: Sequence[dict[str, Any]]) -> float:
    """Return the mean size of a run's steps relative to steps with weights of 1."""
    visits = sum(line["kept"] for line in metrics)
    weighted = config.optim.name == "sgd"  # AdamW normalizes gradients
    scales = ((line["mean_weight"] if weighted else 1.0) * line["lr_scale"] * line["kept"] for line in metrics)
    return float(sum(scales) / visits)
