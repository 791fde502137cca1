"""The driver of a run: check everything, score first where the method chooses one subset, train, write what is left."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from rayprune.config import Config
from rayprune.core.objects import USER_MODULE_PREFIX
from rayprune.core.selector import Selector
from rayprune.engine.checkpoint import load_selector_state, newest_position, remove_old_checkpoints
from rayprune.engine.device_stream import check_room
from rayprune.engine.gallery import write_gallery
from rayprune.engine.opening import adopt_scoring, check_folder, check_start, open_folder
from rayprune.engine.preparation import (
    check_memory,
    check_method,
    check_model,
    check_sizes,
    forward_flops,
    input_spec,
    notices,
)
from rayprune.engine.protocol import TrainingPaused
from rayprune.engine.resources import Resources, resolve_resources, start_ray
from rayprune.engine.run import Choice, EpochListener, ProgressListener, Run, TrainingFailed
from rayprune.engine.run_folder import read_metrics, write_scores
from rayprune.engine.setup import recorded_signals
from rayprune.engine.subset import Scored, check_subset, chosen_subset, keep_subset, score_samples
from rayprune.engine.trackers import check_trackers, failures
from rayprune.methods import Method
from rayprune.methods.fixed import Fixed
from rayprune.nn.signals import check_signals
from rayprune.sources import SampleSource, Splits, open_data

__all__ = ["Listeners", "RunResult", "Start", "TrainingFailed", "check", "open_splits", "score", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and the last metrics line of each epoch."""

    folder: Path
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """A run that begins, or goes on.

    Attributes:
        config: what it trains.
        resources: on what.
        folder: where it writes.
        first_epoch: the first epoch to train; E when it was finished before.
    """

    config: Config
    resources: Resources
    folder: Path
    first_epoch: int


@dataclass(frozen=True)
class Listeners:
    """Who hears of a run; see `train`."""

    on_epoch: EpochListener | None = None
    on_progress: ProgressListener | None = None
    on_start: Callable[[Start], None] | None = None
    on_scored: Callable[[Scored], None] | None = None
    on_notice: Callable[[str], None] = logger.warning
    pause: threading.Event | None = None


def train(
    config: Config,
    *,
    on_epoch: EpochListener | None = None,
    on_progress: ProgressListener | None = None,
    on_start: Callable[[Start], None] | None = None,
    on_scored: Callable[[Scored], None] | None = None,
    on_notice: Callable[[str], None] = logger.warning,
    pause: threading.Event | None = None,
    debug: bool = False,
) -> RunResult:
    """Run a config to its end, from where its run folder stands.

    A method that chooses one subset (`collect_epochs` above 0) scores the samples in a run of its own first, in the
    folder `collect` of the run's; then a new network is trained on the subset, and the costs of both are counted.

    Args:
        config: a resolved config (`load_config`), with `run.name` set.
        on_epoch: called with each new line of metrics.jsonl.
        on_progress: called about twice a second with (epoch, samples observed, samples planned).
        on_start: called when a run begins: twice where samples are scored first.
        on_scored: called between the two.
        on_notice: called with lines that a person should see: what the run cannot promise, and stalls (who waits for
            what, since when, after `run.stall_seconds`).
        pause: setting it, from any thread, has the same effect as SIGTERM.
        debug: show Ray's own logs.

    Raises:
        ValueError: the config cannot work, or the run folder is another run's; one line with the cure.
        TrainingStopped: too many NaN or infinite losses.
        TrainingPaused: SIGTERM came, or `pause` was set; the run has saved and left.
        TrainingFailed: anything else that ended training.
    """
    listeners = Listeners(on_epoch, on_progress, on_start, on_scored, on_notice, pause)
    splits = _open(config, debug)
    method = config.build_method()
    check_folder(config)
    choice = Choice(method, config.train.epochs)
    if isinstance(method, Fixed):
        choice = chosen_subset(config, splits.train)
    if not (method.collect_epochs and config.collect.fresh):
        _check(config, splits, choice)
        return _run(config, splits, choice, listeners)
    _check_training(config, splits, Fixed())
    if (done := check_start(config, splits.train)) is not None:
        return _finished(config, splits, done, listeners)
    adopt_scoring(config)
    scored = _scored(config, splits, listeners)
    if on_scored is not None:
        on_scored(scored)
    return _run(config, splits, scored.choice(config), listeners)


def check(config: Config, splits: Splits) -> None:
    """Refuse what cannot work with this data, before anything starts or is written.

    Args:
        config: a resolved config.
        splits: its data.

    Raises:
        ValueError: one line with the cure.
    """
    method = config.build_method()
    if isinstance(method, Fixed):
        _check(config, splits, chosen_subset(config, splits.train))
    elif method.collect_epochs and config.collect.fresh:
        _check_training(config, splits, Fixed())
    else:
        _check(config, splits, Choice(method, config.train.epochs))


def open_splits(config: Config) -> Splits:
    """Open the data that a config names, and let other processes read it.

    Raises:
        ValueError: it can't be opened; one line with the cure.
    """
    splits = _splits(config)
    _ship_user_modules()
    return splits


def _finished(config: Config, splits: Splits, folder: Path, listeners: Listeners) -> RunResult:
    if listeners.on_start is not None:
        resources = resolve_resources(config, splits.train)
        listeners.on_start(Start(config, resources, folder, config.last_epoch))
    return RunResult(folder, read_metrics(folder))


def score(config: Config, *, debug: bool = False, **listeners: Any) -> Scored:
    """Score the samples for a method that chooses one subset, as the first half of `train` does.

    Args:
        config, debug: as for `train`.
        **listeners: on_epoch, on_progress, on_start, on_notice, as for `train`.

    Raises:
        ValueError: as `train`; or the method chooses anew while it trains.
    """
    method = config.build_method()
    if not method.collect_epochs:
        raise ValueError(
            f"method {method.name!r} has no scoring run: rayprune train writes its scores.parquet; name a method that "
            "chooses one subset, such as method.name=tdds"
        )
    splits = _open(config, debug)
    return _scored(config, splits, Listeners(**listeners))


def _scored(config: Config, splits: Splits, listeners: Listeners) -> Scored:
    if config.collect.trajectories is not None:
        check_memory(config.build_method(), input_spec(config, splits.train).num_classes, len(splits.train))
        return score_samples(config, splits.train, None)
    scoring = config.scoring()
    check_folder(scoring)
    theirs = _splits(scoring)
    if theirs.train.fingerprint != splits.train.fingerprint:
        raise ValueError("collect.data changes which samples there are: only how they are augmented may differ")
    choice = Choice(scoring.build_method(), max(scoring.train.epochs, scoring.last_epoch + 1))
    _check(scoring, theirs, choice)
    result = _run(scoring, theirs, choice, listeners)
    return score_samples(config, splits.train, result.folder)


def _open(config: Config, debug: bool) -> Splits:
    splits = open_splits(config)
    if not debug:
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    if config.scaling.num_workers != 0:
        start_ray(debug, elastic=isinstance(config.scaling.num_workers, tuple), address=config.run.address)
    return splits


def _splits(config: Config) -> Splits:
    data = config.data
    return open_data(data.source, limit=data.limit, cache=data.cache, hold_out=data.hold_out, **data.source_keys)


def _check(config: Config, splits: Splits, choice: Choice) -> None:
    """Refuse before anything starts what cannot work."""
    _check_training(config, splits, choice.method)
    check_method(config, splits.train, choice.method, choice.num_epochs)
    check_memory(choice.method, input_spec(config, splits.train).num_classes, len(splits.train))


def _check_training(config: Config, splits: Splits, method: Method) -> None:
    check_trackers(config)
    check_signals((*method.signals, *method.sweep_signals, *config.train.record))
    check_sizes(config, len(splits.train))
    check_model(config, input_spec(config, splits.train), method)


def _run(config: Config, splits: Splits, choice: Choice, listeners: Listeners) -> RunResult:
    spec = input_spec(config, splits.train)
    resources = resolve_resources(config, splits.train)
    if resources.stream == "device" and resources.num_workers == 0:  # workers look for themselves, where they are
        check_room(splits.by_name, torch.device("cuda" if resources.use_gpu else "cpu"))
    check_subset(config, choice)
    flops = forward_flops(config, spec)
    with open_folder(config, splits.train, resources, forward_flops_per_sample=flops) as (folder, start_epoch):
        for split in (splits.train, splits.validation):
            if split is not None:
                split.prepare()
        keep_subset(folder, config, choice, splits.train)
        if listeners.on_start is not None:
            listeners.on_start(Start(config, resources, folder, start_epoch))
        if start_epoch < config.last_epoch:
            for line in notices(config, spec, len(splits.train), choice.method, resources.use_gpu):
                listeners.on_notice(line)
            run = Run(config, splits, spec, resources, folder, choice)
            try:
                run.fit(listeners.on_epoch, listeners.on_progress, listeners.on_notice, listeners.pause)
            finally:  # also where training itself has failed
                for line in failures(folder, config):
                    listeners.on_notice(line)
            remove_old_checkpoints(folder, config.run.keep_checkpoints)
            epoch, step = newest_position(folder)
            if epoch < config.last_epoch:
                raise TrainingPaused(f"paused: saved before step {step} of epoch {epoch + 1}; the same command goes on")
        _write_scores(config, splits.train, folder, choice, recorded_signals(config, spec))
        if start_epoch < config.last_epoch or not (folder / "gallery").exists():
            write_gallery(config, splits.train, spec, folder, listeners.on_notice)
        return RunResult(folder, read_metrics(folder))


def _ship_user_modules() -> None:
    """Send modules loaded from `path/to/file.py` by value: other processes cannot import them by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(USER_MODULE_PREFIX):
            ray.cloudpickle.register_pickle_by_value(module)


def _write_scores(config: Config, source: SampleSource, folder: Path, choice: Choice, record: tuple[str, ...]) -> None:
    labels = np.asarray(source.labels)
    run = (len(source), choice.num_epochs, config.train.seed)
    selector = Selector(choice.method, *run, labels, choice.chosen, record)
    selector.load_state_dict(load_selector_state(folder, config.last_epoch))
    own = selector.scores()
    extra = {f"collected_{name}" if name in own else name: column for name, column in choice.scores.items()}
    write_scores(folder, selector, labels, source.fingerprint, extra, config.method)
