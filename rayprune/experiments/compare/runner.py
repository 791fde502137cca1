"""Is pruning worth it here? Every arm with every seed is an ordinary run; what they reached is compared seed by seed.

<storage_path>/<name>/   compare.yaml, runs/<arm>-seed<k>/, compare.json, compare.csv

Runs whose seconds count come one after another, so that they are those of a machine that does nothing else, and seed
by seed, so that a machine that slows down does so for full training and the methods alike. A finished run is not
repeated.

The runs of a comparison: those that are finished are read, the others trained, alone or side by side.

Seconds count where a run had the machine to itself. With several at a time, the runs of the first seeds
(`compare.timed_seeds`) still go alone, one after another, and give the seconds of their arms. Which runs have ever
had others beside them is kept in `shared_runs.json`: the same command with another `compare.parallel` must not take
their seconds for those of a run alone.

Several runs at a time, each in an actor of its own: whatever comes first, the others are told to save and leave.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from rayprune.config import Config, make_config
from rayprune.config.yaml import merge, read_yaml
from rayprune.engine.cluster import ConcurrencyRequest, TrialResources, cluster_address, divide_resources, start_ray
from rayprune.engine.monitoring import error_line, on_sigterm
from rayprune.engine.storage.costs import Costs, costs_of
from rayprune.engine.storage.resume import check_folder, lock_folder, run_folder_of
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.engine.train.driver import check, open_splits, train
from rayprune.errors import ConfigError, TrainingFailed
from rayprune.experiments.compare.arms import Arm, ArmSettings, Spent, arms_of, digest_of, run_config, terms_of
from rayprune.experiments.compare.statistics import ArmRuns, RunOutcome, summary
from rayprune.methods import build_method
from rayprune.sources import SampleSource, Splits, open_data

# How long a run that was told to stop may take to save.
_LEAVE_S = 60.0


class _Trainer:
    """The actor: one run at a time, and a pause that comes in beside it."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # relative paths of a config are the driver's
        self._pause = threading.Event()

    def train(self, config_yaml: str) -> str | None:
        """Run a config to its end; return what ended it otherwise, in one line."""
        try:
            train(make_config(read_yaml(config_yaml)), on_notice=lambda line: None, pause=self._pause)
        except Exception as error:
            return error_line(error)
        return None

    def pause(self) -> None:
        """Let the run save and leave."""
        self._pause.set()


def train_side_by_side(configs: Sequence[Config], share: TrialResources, on_start: Callable[[int], None]) -> None:
    """Train several runs, as many at a time as have room; Ray is connected.

    Args:
        configs: of the runs, each with a folder of its own.
        share: how many at a time, and what Ray reserves for each.
        on_start: called with the number of each run that begins.

    Raises:
        TrainingFailed: a run broke down; the others have saved and left.
        KeyboardInterrupt: SIGINT came; likewise.
    """
    reserved = {"num_cpus": share.reserved.get("CPU", 0.0), "num_gpus": share.reserved.get("GPU", 0.0)}
    make = ray.remote(_Trainer).options(max_concurrency=2, **reserved)  # type: ignore[attr-defined]
    actors: list[Any] = [make.remote(str(Path.cwd())) for _ in range(min(share.num_concurrent, len(configs)))]
    idle = list(actors)
    running: dict[Any, tuple[Any, Config]] = {}
    left = list(enumerate(configs))
    try:
        while left or running:
            while left and idle:
                (number, config), actor = left.pop(0), idle.pop()
                on_start(number)
                running[actor.train.remote(config.to_yaml())] = (actor, config)
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            actor, config = running.pop(done)
            _raise_for(done, str(config.run.name))
            idle.append(actor)
    finally:
        _end(actors, list(running))


def _raise_for(done: Any, name: str) -> None:
    try:
        problem = ray.get(done)
    except RayError as error:
        problem = f"its process ended ({error_line(error)})"
    if problem is not None:
        raise TrainingFailed(f"run {name}: {problem}")


def _end(actors: Sequence[Any], running: list[Any]) -> None:
    """Let what still runs save and leave, then end the processes."""
    if running:
        for actor in actors:
            actor.pause.remote()
        ray.wait(running, num_returns=len(running), timeout=_LEAVE_S)
    for actor in actors:
        ray.kill(actor)


logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class CompareListeners:
    """Who hears of a comparison.

    Attributes:
        on_run: called before each run with ("3/24", arm, seed, whether it was finished before, terms).
        on_notice: called with lines that a person should see.
        listeners: passed on to `train`.
    """

    on_run: Callable[[str, Arm, int, bool, ArmSettings], None] | None = None
    on_notice: Callable[[str], None] = logger.warning
    listeners: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One run to be had: arm, place of its seed, what it trains, its config."""

    arm: Arm
    place: int
    terms: ArmSettings
    config: Config
    finished: bool

    @property
    def name(self) -> str:
        """The run's folder."""
        return str(self.config.run.name)


class ComparedRuns:
    """Bring a comparison's runs about.

    Args:
        config: the comparison's.
        folder: its folder.
        fingerprint: of its data.
        watching: who hears of it.
        share: how many at a time; None for one after another.
        debug: show Ray's own logs.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        fingerprint: str,
        watching: CompareListeners,
        share: TrialResources | None,
        debug: bool,
    ) -> None:
        if share is not None:
            # Alone or not, every run computes with as many threads: the arms of a seed must be comparable to the bit.
            config = config.model_copy(update={"scaling": config.scaling.model_copy(update=share.scaling)})
        self._config, self._fingerprint, self._share = config, fingerprint, share
        self._storage, self._shared_file = folder / "runs", folder / "shared_runs.json"
        self._watching, self._debug = watching, debug
        self._warm = config.scaling.num_workers != 0  # workers are started for every run, and warm up in every run
        self._num_samples = self._begun = self._num_runs = 0
        self._done: dict[str, dict[int, RunOutcome]] = {}

    def all_of(self, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, list[RunOutcome]]:
        """Return every arm's outcomes, one a seed: first of full training and the methods, then of what follows."""
        self._done = {arm.name: {} for arm in arms}
        self._begun, self._num_runs = 0, len(arms) * len(seeds)
        places = list(enumerate(seeds))
        timed = len(seeds) if self._share is None else self._config.compare.timed_seeds
        for derived in (False, True):
            stage = [arm for arm in arms if arm.derived == derived]
            for place, seed in places[:timed]:
                for arm in stage:
                    self._alone(self._job(arm, place, seed))
            self._side_by_side([self._job(arm, place, seed) for place, seed in places[timed:] for arm in stage])
        return {arm.name: [self._done[arm.name][place] for place, _ in places] for arm in arms}

    def _job(self, arm: Arm, place: int, seed: int) -> _Job:
        terms = self._terms(arm, place)
        # Another length or share, found with other seeds or costs, is another run.
        config = run_config(self._config, terms, f"{arm.name}{terms.tag}-seed{seed}", seed, str(self._storage))
        return _Job(arm, place, terms, config, terms.same_as_full or self._is_finished(config))

    def _terms(self, arm: Arm, place: int) -> ArmSettings:
        if not arm.derived:
            return terms_of(arm, self._config)
        full, method = self._done["full"], self._done[arm.method_arm]
        pairs = [(self._spent(full[p]), self._spent(method[p])) for p in sorted(full)]
        alone = [p for p in sorted(full) if full[p].alone and method[p].alone] or sorted(full)
        return terms_of(arm, self._config, pairs, place, alone)

    def _alone(self, job: _Job) -> None:
        self._announce(job)
        if not job.finished:
            self._warm_up()
            train(job.config, debug=self._debug, **self._watching.listeners)
        self._keep(job)

    def _side_by_side(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            if job.finished:
                self._announce(job)
        left = [job for job in jobs if not job.finished]
        if left:
            assert self._share is not None
            ours = not ray.is_initialized() and self._config.scaling.num_workers == 0
            start_ray(self._debug, dashboard=self._config.scaling.num_workers != 0, address=self._config.run.address)
            with on_sigterm():  # anew: Ray's own handler, which aborts, has taken the place of an older one
                self._mark_shared(job.name for job in left)
                configs = [job.config for job in left]
                train_side_by_side(configs, self._share, lambda number: self._announce(left[number]))
            if ours:
                ray.shutdown()  # runs that are timed after this have the machine to themselves again
        for job in jobs:
            self._keep(job)

    def _announce(self, job: _Job) -> None:
        self._begun += 1
        if self._watching.on_run is not None:
            number = f"{self._begun}/{self._num_runs}"
            self._watching.on_run(number, job.arm, job.config.train.seed, job.finished, job.terms)

    def _keep(self, job: _Job) -> None:
        """Read what a finished run reached."""
        if job.terms.same_as_full:
            outcome = dataclasses.replace(self._done["full"][job.place], matched=job.terms.matched)
        else:
            metrics = read_metrics(run_folder_of(job.config))
            self._num_samples = metrics[-1]["num_samples"]
            alone = job.name not in self._shared()
            costs = costs_of(run_folder_of(job.config), metrics, self._config.compare.amortise)
            outcome = _outcome(metrics, costs, job, alone)
        self._done[job.arm.name][job.place] = outcome

    def _spent(self, outcome: RunOutcome) -> Spent:
        return Spent(outcome.epochs, self._num_samples, outcome.samples_trained, outcome.seconds)

    def _shared(self) -> list[str]:
        return list(json.loads(self._shared_file.read_text())) if self._shared_file.exists() else []

    def _mark_shared(self, names: Iterable[str]) -> None:
        write_whole(self._shared_file, json.dumps(sorted({*self._shared(), *names}), indent=1) + "\n")

    def _is_finished(self, config: Config) -> bool:
        check_folder(config)
        folder = run_folder_of(config)
        metrics = read_metrics(folder)
        if not (metrics and metrics[-1]["epoch"] + 1 == config.train.epochs and (folder / "scores.parquet").exists()):
            return False
        environment = folder / "environment.json"
        # A run on other data is given to `train`, which refuses it in its own words.
        return environment.exists() and json.loads(environment.read_text())["fingerprint"] == self._fingerprint

    def _warm_up(self) -> None:
        """Train a few steps first: what a process does once must not be counted against the first arm."""
        if self._warm:
            return
        self._warm = True
        limit = min(self._config.data.limit or 2**62, _WARM_UP_STEPS * self._config.train.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(self._config, ArmSettings({"name": "full"}, 1), "warm-up", 0, folder)
            tree = merge(config.model_dump(mode="json"), {"data": {"limit": limit}})
            train(make_config(tree), debug=self._debug, on_notice=lambda _: None)


def _outcome(metrics: list[dict[str, Any]], costs: Costs, job: _Job, alone: bool) -> RunOutcome:
    last = metrics[-1]
    classes = [value for value in last["val_class_accuracy"] if value is not None]
    return RunOutcome(
        seed=job.config.train.seed,
        folder=job.name,
        epochs=len(metrics),
        matched=job.terms.matched,
        accuracy=100.0 * last["val_accuracy"],
        worst_class=100.0 * min(classes),
        samples_trained=costs.samples_trained,
        samples_forwarded=costs.samples_forwarded,
        compute=costs.compute,
        flops=costs.flops,
        seconds=costs.seconds,
        alone=alone,
    )


_SECONDS = "seconds of training and selection, without validation"


def compare(config: Config, watching: CompareListeners | None = None, *, debug: bool = False) -> Path:
    """Run all arms with all seeds, from where the comparison's folder stands, and write what they say.

    Args:
        config: a resolved config, with `run.name` set to the name of the comparison's folder.
        watching: who hears of it.
        debug: show Ray's own logs.

    Returns:
        The folder, with compare.json and compare.csv.

    Raises:
        ValueError: the config can't be compared, or the folder is another comparison's; one line with the cure.
    """
    watching = watching or CompareListeners()
    folder = run_folder_of(config)
    arms, notes = arms_of(config)
    splits, resolution = _validated_data(config)
    if config.compare.margin < resolution:
        notes.append(
            f"the margin of {config.compare.margin:g} points is less than one sample ({resolution:.2g} points)"
        )
    if len(config.compare.all_seeds) == 1:
        notes.append("one seed: no interval can be given, and no verdict follows from it; set compare.seeds=3")
    for note in notes:
        watching.on_notice(note)
    _check_folder(folder, config)
    if not folder.exists():
        check(config, open_splits(config))  # a mistake shows before anything is written
    config = _settled(config, folder)
    share = _share(config, splits.train, len(arms), debug)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        write_whole(folder / "threads.json", json.dumps(_threads(config, share)) + "\n")
        write_whole(folder / "compare.yaml", config.to_yaml())
        runs = ComparedRuns(config, folder, splits.train.fingerprint, watching, share, debug)
        with on_sigterm():
            by_arm = runs.all_of(arms, config.compare.all_seeds)
        all_runs = [
            ArmRuns(arm.name, arm.baseline, arm.method_arm, by_arm[arm.name], _caveat(config, arm)) for arm in arms
        ]
        report = {
            "digest": digest_of(config),
            "notes": notes,
            "timing": _timing(all_runs),
            "amortise": config.compare.amortise,
            "methods_compared": {arm.name: dict(arm.of) for arm in arms if arm.baseline == "method"},
            **summary(all_runs, config.compare.margin, config.compare.confidence, resolution),
            "environment": json.loads((folder / "runs" / by_arm["full"][0].folder / "environment.json").read_text()),
        }
        write_whole(folder / "compare.json", json.dumps(report, indent=1) + "\n")
        write_whole(folder / "compare.csv", _csv(all_runs))
    return folder


def _share(config: Config, source: SampleSource, num_arms: int, debug: bool) -> TrialResources | None:
    """Return how many runs go at a time and what each gets; None for one after another, with all there is.

    Raises:
        ValueError: there is no room for so many.
    """
    section = config.compare
    num_shared = num_arms * max(0, len(section.all_seeds) - section.timed_seeds)
    if section.parallel == 1 or (section.parallel == "auto" and not num_shared):
        return None
    if isinstance(config.scaling.num_workers, tuple) and section.parallel == "auto":
        return None
    if config.scaling.num_workers == 0 and cluster_address(config.run.address) is None:
        # What Ray would find on this machine: it need not be started to see that one run at a time fits.
        total = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    else:
        start_ray(debug, dashboard=config.scaling.num_workers != 0, address=config.run.address)
        total = ray.cluster_resources()
    request = ConcurrencyRequest(max(1, num_shared), section.parallel, "compare.parallel", "run")
    share = divide_resources(config, source, request, total)
    return share if share.num_concurrent > 1 else None


def _caveat(config: Config, arm: Arm) -> str:
    """Say that a method's seconds hold a part of its scoring run only."""
    if config.compare.amortise == 1 or arm.baseline != "method" or not build_method(arm.of).collect_epochs:
        return ""
    return f" with a scoring run shared by {config.compare.amortise} trainings"


def _settled(config: Config, folder: Path) -> Config:
    """Return the config with the threads that the comparison began with: its runs must be comparable."""
    stored = folder / "threads.json"
    if config.scaling.threads != "auto" or not stored.exists():
        return config
    scaling = config.scaling.model_copy(update={"threads": json.loads(stored.read_text())})
    return config.model_copy(update={"scaling": scaling})


def _threads(config: Config, share: TrialResources | None) -> int | str:
    if share is not None:
        return int(share.scaling["threads"])
    one_process = config.scaling.threads == "auto" and config.scaling.num_workers == 0
    return len(os.sched_getaffinity(0)) if one_process else config.scaling.threads


def _timing(arms: list[ArmRuns]) -> str:
    """Say whose seconds these are."""
    alone = [all(arm.runs[place].alone for arm in arms) for place in range(len(arms[0].runs))]
    if all(alone):
        return f"each run alone, nothing else of this comparison beside it; {_SECONDS}"
    if not any(alone):
        return f"runs that had others beside them, so they say little (compare.parallel=1); {_SECONDS}"
    seeds = ", ".join(str(run.seed) for run, timed in zip(arms[0].runs, alone, strict=True) if timed)
    return f"runs of seed {seeds} alone, the others side by side and not timed; {_SECONDS}"


def _validated_data(config: Config) -> tuple[Splits, float]:
    """Return the data, and how many points one validation sample is.

    Raises:
        ValueError: there is nothing to validate on.
    """
    data = config.data
    splits = open_data(data.source, limit=data.limit, cache=data.cache, **data.source_keys)
    if splits.validation is None:
        raise ConfigError(f"data source {data.source} has no validation part, and accuracies are compared on it")
    return splits, 100.0 / len(splits.validation)


def _check_folder(folder: Path, config: Config) -> None:
    """Refuse a folder that another comparison, or a run, has made.

    Raises:
        ValueError: it is.
    """
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds a run, no comparison: choose another run.name")
    stored = folder / "compare.yaml"
    if not stored.exists():
        return
    try:
        before = make_config(read_yaml(stored.read_text()) or {})
    except ValueError as error:
        raise ConfigError(f"{stored} can't be read ({error}): restore it or choose another run.name") from None
    if digest_of(before) != digest_of(config):
        raise ConfigError(
            f"{folder} holds another comparison (of config {digest_of(before)}, this is {digest_of(config)}): "
            "choose another run.name, or leave it out"
        )


def _csv(arms: list[ArmRuns]) -> str:
    names = [field.name for field in dataclasses.fields(RunOutcome)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "baseline", *names])
    for arm in arms:
        writer.writerows([arm.name, arm.baseline, *(getattr(run, name) for name in names)] for run in arm.runs)
    return stream.getvalue()
