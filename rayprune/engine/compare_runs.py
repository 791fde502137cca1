"""The runs of a comparison: those that are finished are read, the others trained, alone or side by side.

Seconds count where a run had the machine to itself. With several at a time, the runs of the first seeds
(`compare.timed_seeds`) still go alone, one after another, and give the seconds of their arms. Which runs have ever
had others beside them is kept in `shared_runs.json`: the same command with another `compare.parallel` must not take
their seconds for those of a run alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rayprune.config import Config, make_config
from rayprune.core.comparison import RunOutcome
from rayprune.engine.arms import Arm, Spent, Terms, run_config, terms_of
from rayprune.engine.costs import Costs, costs_of
from rayprune.engine.ending import on_sigterm
from rayprune.engine.opening import check_folder, run_folder_of
from rayprune.engine.resources import start_ray
from rayprune.engine.run_folder import read_metrics, write_whole
from rayprune.engine.shares import Share
from rayprune.engine.side_by_side import train_side_by_side
from rayprune.engine.train import train
from rayprune.overrides import merge

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Watching:
    """Who hears of a comparison.

    Attributes:
        on_run: called before each run with ("3/24", arm, seed, whether it was finished before, terms).
        on_notice: called with lines that a person should see.
        listeners: passed on to `train`.
    """

    on_run: Callable[[str, Arm, int, bool, Terms], None] | None = None
    on_notice: Callable[[str], None] = logger.warning
    listeners: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One run to be had: arm, place of its seed, what it trains, its config."""

    arm: Arm
    place: int
    terms: Terms
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
        self, config: Config, folder: Path, fingerprint: str, watching: Watching, share: Share | None, debug: bool
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

    def _terms(self, arm: Arm, place: int) -> Terms:
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
            config = run_config(self._config, Terms({"name": "full"}, 1), "warm-up", 0, folder)
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
