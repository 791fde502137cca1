"""Is pruning worth it here? Every arm with every seed is an ordinary run; what they reached is compared seed by seed.

<storage_path>/<name>/   compare.yaml, runs/<arm>-seed<k>/, compare.json, compare.csv

Runs come one after another, so that their seconds are those of a machine that does nothing else, and seed by seed, so
that a machine that slows down does so for full training and the methods alike. A finished run is not repeated.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprune.config import Config, make_config
from rayprune.core.comparison import ArmRuns, RunOutcome, summary
from rayprune.engine.arms import Arm, Spent, Terms, arms_of, digest_of, run_config, terms_of
from rayprune.engine.opening import check_folder, run_folder_of, sole_use
from rayprune.engine.run_folder import read_metrics
from rayprune.engine.train import check, open_splits, train
from rayprune.overrides import merge, read_yaml
from rayprune.sources import open_data

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 4
TIMING = "each run alone on the machine, one after another; seconds of training and selection, without validation"


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


def compare(config: Config, watching: Watching | None = None, *, debug: bool = False) -> Path:
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
    watching = watching or Watching()
    folder = run_folder_of(config)
    arms, notes = arms_of(config)
    fingerprint, resolution = _validated_data(config)
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
    folder.mkdir(parents=True, exist_ok=True)
    with sole_use(folder):
        _write(folder / "compare.yaml", config.to_yaml())
        runs = _Runs(config, folder / "runs", fingerprint, watching, debug)
        by_arm = runs.all_of(arms, config.compare.all_seeds)
        all_runs = [ArmRuns(arm.name, arm.baseline, arm.method_arm, by_arm[arm.name]) for arm in arms]
        report = {
            "digest": digest_of(config),
            "notes": notes,
            "timing": TIMING,
            "methods_compared": {arm.name: dict(arm.of) for arm in arms if arm.baseline == "method"},
            **summary(all_runs, config.compare.margin, config.compare.confidence, resolution),
            "environment": json.loads((folder / "runs" / by_arm["full"][0].folder / "environment.json").read_text()),
        }
        _write(folder / "compare.json", json.dumps(report, indent=1) + "\n")
        _write(folder / "compare.csv", _csv(all_runs))
    return folder


class _Runs:
    """Bring a comparison's runs about: read those that are finished, train the others."""

    def __init__(self, config: Config, storage: Path, fingerprint: str, watching: Watching, debug: bool) -> None:
        self._config, self._storage, self._fingerprint = config, storage, fingerprint
        self._watching, self._debug = watching, debug
        self._warm = config.scaling.num_workers != 0  # workers are started for every run, and warm up in every run
        self._num_samples = 0

    def all_of(self, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, list[RunOutcome]]:
        """Return every arm's outcomes, one a seed: first of full training and the methods, then of what follows."""
        done: dict[str, list[RunOutcome]] = {arm.name: [] for arm in arms}
        order = [(arm, seed) for derived in (False, True) for seed in seeds for arm in arms if arm.derived == derived]
        for number, (arm, seed) in enumerate(order, start=1):
            done[arm.name].append(self._outcome(arm, seed, done, f"{number}/{len(order)}"))
        return done

    def _outcome(self, arm: Arm, seed: int, done: Mapping[str, list[RunOutcome]], number: str) -> RunOutcome:
        place = len(done[arm.name])
        spent = [[self._spent(run) for run in done.get(name, ())] for name in ("full", arm.method_arm)]
        pairs = list(zip(*spent, strict=True)) if arm.derived else []
        terms = terms_of(arm, self._config, pairs, place)
        # Another length, found with other seeds, is another run.
        length = f"-{terms.epochs}epochs" if terms.epochs != self._config.train.epochs else ""
        name = f"{arm.name}{length}-seed{seed}"
        config = run_config(self._config, terms, name, seed, str(self._storage))
        finished = terms.same_as_full or self._is_finished(config)
        if self._watching.on_run is not None:
            self._watching.on_run(number, arm, seed, finished, terms)
        if terms.same_as_full:
            return dataclasses.replace(done["full"][place], matched=terms.matched)
        if not finished:
            self._warm_up()
            train(config, debug=self._debug, **self._watching.listeners)
        metrics = read_metrics(run_folder_of(config))
        self._num_samples = metrics[-1]["num_samples"]
        return _outcome(metrics, seed, name, terms)

    def _spent(self, outcome: RunOutcome) -> Spent:
        return Spent(outcome.epochs, self._num_samples, outcome.samples_trained, outcome.seconds)

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


def _outcome(metrics: list[dict[str, Any]], seed: int, folder: str, terms: Terms) -> RunOutcome:
    last = metrics[-1]
    times = [line["seconds"] for line in metrics] + [last.get("seconds_collected") or {}]
    seconds = sum(part.get("epoch", 0.0) - part.get("validate", 0.0) for part in times)
    classes = [value for value in last["val_class_accuracy"] if value is not None]
    return RunOutcome(
        seed=seed,
        folder=folder,
        epochs=len(metrics),
        matched=terms.matched,
        accuracy=100.0 * last["val_accuracy"],
        worst_class=100.0 * min(classes),
        samples_trained=last["samples_trained"],
        samples_forwarded=last["samples_forwarded"],
        compute=last["compute"],
        seconds=seconds,
    )


def _validated_data(config: Config) -> tuple[str, float]:
    """Return the data's fingerprint, and how many points one validation sample is.

    Raises:
        ValueError: there is nothing to validate on.
    """
    data = config.data
    splits = open_data(data.source, limit=data.limit, cache=data.cache, **data.source_keys)
    if splits.validation is None:
        raise ValueError(f"data source {data.source} has no validation part, and accuracies are compared on it")
    return splits.train.fingerprint, 100.0 / len(splits.validation)


def _check_folder(folder: Path, config: Config) -> None:
    """Refuse a folder that another comparison, or a run, has made.

    Raises:
        ValueError: it is.
    """
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds a run, no comparison: choose another run.name")
    stored = folder / "compare.yaml"
    if not stored.exists():
        return
    try:
        before = make_config(read_yaml(stored.read_text()) or {})
    except ValueError as error:
        raise ValueError(f"{stored} can't be read ({error}): restore it or choose another run.name") from None
    if digest_of(before) != digest_of(config):
        raise ValueError(
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


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)
