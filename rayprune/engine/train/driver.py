"""The driver: check everything, score the samples if the method needs it, train, and write the results."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from rayprune.config import Config
from rayprune.core.bases.static import ScoredMethod
from rayprune.core.references import refusing_exit, user_modules
from rayprune.engine.cluster import Resources, resolve_resources, start_ray
from rayprune.engine.data.device import check_room
from rayprune.engine.monitoring import RunListeners
from rayprune.engine.storage.checkpoint import (
    checkpoint_path,
    newest_position,
    remove_old_checkpoints,
    restore_selector,
)
from rayprune.engine.storage.resume import adopt_scoring, check_folder, finished_folder, open_folder, where_stopped
from rayprune.engine.storage.run_folder import read_metrics, write_scores
from rayprune.engine.storage.trackers import check_trackers, failures
from rayprune.engine.train.build import (
    InputSpec,
    SelectionSetup,
    in_batch_method,
    recorded_signals,
)
from rayprune.engine.train.gallery import write_gallery
from rayprune.engine.train.preflight import (
    check_memory,
    check_method,
    check_model,
    check_shards,
    check_sizes,
    check_vectors,
    forward_flops,
    input_spec,
    notices,
)
from rayprune.engine.train.resumption import new_selector, try_checkpoint
from rayprune.engine.train.run import Run
from rayprune.engine.train.static_subset import Scored, check_subset, chosen_subset, keep_subset, score_samples
from rayprune.errors import ConfigError, TrainingPaused
from rayprune.methods import Method
from rayprune.methods.fixed import Fixed
from rayprune.nn.signals import check_signals
from rayprune.sources import SampleSource, Splits, open_data
from rayprune.sources.views import Relabeled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and the last metrics line of each epoch."""

    folder: Path
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """A run that starts or resumes.

    Attributes:
        config: its config.
        resources: the resources it trains on.
        folder: its run folder.
        first_epoch: the first epoch to train; E if only results remain to be written.
    """

    config: Config
    resources: Resources
    folder: Path
    first_epoch: int


@dataclass(frozen=True)
class Listeners(RunListeners):
    """The callbacks of `train`."""

    on_start: Callable[[Start], None] | None = None
    on_scored: Callable[[Scored], None] | None = None


@refusing_exit()
def train(
    config: Config,
    *,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
    on_start: Callable[[Start], None] | None = None,
    on_scored: Callable[[Scored], None] | None = None,
    on_notice: Callable[[str], None] = logger.warning,
    pause: threading.Event | None = None,
    debug: bool = False,
) -> RunResult:
    """Train a config to its end, from the newest checkpoint in its run folder.

    A method that selects one subset (`collect_epochs` above 0) first scores the samples in a separate run, in the
    subfolder `collect` of the run folder. Then a new network is trained on the subset. The cost includes both.

    Args:
        config: a resolved config (`load_config`), with `run.name` set.
        on_epoch: called with each new line of metrics.jsonl.
        on_progress: called about twice a second with (epoch, samples observed, samples planned).
        on_start: called when a run starts or resumes; the scoring run is a run, too. A finished run does not start.
        on_scored: called after the scoring run.
        on_notice: called with lines that a person should see: limits of this run, and stalls longer than
            `run.stall_seconds`.
        pause: setting it, from any thread, has the same effect as SIGTERM.
        debug: show Ray's own logs.

    Raises:
        ConfigError: the config cannot work; one line with the cure.
        DataError: the data cannot be used.
        RunFolderError: the run folder holds another run, or a file in it is damaged.
        TrainingStopped: too many losses were NaN or infinite.
        TrainingPaused: SIGTERM came, or `pause` was set; the run has saved its state.
        TrainingFailed: anything else that ended training.
        KeyboardInterrupt: Ctrl-C was pressed; the run has saved its state, and the message says where it continues. A
            second Ctrl-C interrupts without saving.
    """
    listeners = Listeners(on_epoch, on_progress, on_notice, pause, on_start, on_scored)
    splits = open_splits(config)
    check_folder(config)
    setup = _checked_setup(config, splits)
    if (folder := finished_folder(config, splits.train)) is not None:
        if setup is not None:
            check_subset(config, setup)
        return RunResult(folder, read_metrics(folder))
    _connect(config, debug)
    if setup is None:
        adopt_scoring(config)
        scored = _score(config, splits, listeners)
        if on_scored is not None:
            on_scored(scored)
        setup = scored.setup(config)
    return _run(config, splits, setup, listeners)


@refusing_exit()
def score(config: Config, *, debug: bool = False, **listeners: Any) -> Scored:
    """Score the samples for a method that selects one subset: the first half of `train`.

    Args:
        config, debug: as for `train`.
        **listeners: on_epoch, on_progress, on_start, on_notice, as for `train`.

    Raises:
        ConfigError: the method selects during training, or as for `train`. Other errors are those of `train`.
    """
    method = config.build_method()
    if not method.collect_epochs:
        raise ConfigError(
            f"method {method.name!r} has no scoring run: rayprune train writes its scores.parquet; name a method that "
            "chooses one subset, such as method.name=tdds"
        )
    splits = open_splits(config)
    _connect(config, debug)
    return _score(config, splits, Listeners(**listeners))


@refusing_exit()
def forward_pass(config: Config, splits: Splits, listeners: Listeners, *, debug: bool = False) -> Path:
    """Make the forward-only pass of a method that needs nothing else, and return its run folder, with scores.parquet.

    Args:
        config: of one epoch, with a method of one scoring epoch and `collect.embedder`.
        splits: its data; validation data are not read.
        listeners, debug: as for `train`.

    Raises:
        As `train`.
    """
    splits = Splits(splits.train, None)
    setup = SelectionSetup(config.build_method(), config.last_epoch + 1)
    check_folder(config)
    _check_setup(config, splits, setup)
    if (folder := finished_folder(config, splits.train)) is not None:
        return folder
    _connect(config, debug)
    return _run(config, splits, setup, listeners).folder


def check(config: Config, splits: Splits) -> None:
    """Check a config against its data; nothing is started or written.

    Args:
        config: a resolved config.
        splits: its data.

    Raises:
        ConfigError, DataError: the config cannot work with this data; one line with the cure.
    """
    _checked_setup(config, splits)


@refusing_exit()
def open_splits(config: Config) -> Splits:
    """Open the data that a config names, ready to be sent to other processes.

    Raises:
        ConfigError, DataError: the data cannot be opened; one line with the cure.
    """
    splits = _splits(config)
    for module in user_modules():
        ray.cloudpickle.register_pickle_by_value(module)
    return splits


def _connect(config: Config, debug: bool) -> None:
    """Connect to Ray, if the run has workers."""
    if not debug:
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    if config.scaling.num_workers != 0:
        start_ray(debug, elastic=isinstance(config.scaling.num_workers, tuple), address=config.run.address)


def _splits(config: Config) -> Splits:
    data = config.data
    common = ("limit", "cache", "hold_out", "relabel", "relabel_at")
    return open_data(data.source, **{key: getattr(data, key) for key in common}, **data.source_keys)


def _checked_setup(config: Config, splits: Splits) -> SelectionSetup | None:
    """Check everything before a run starts; return how it selects, or None if the samples must be scored first."""
    method = config.build_method()
    if isinstance(method, ScoredMethod) and method.balance == "drop":
        left_out = [
            f"collect.{name}" for name in ("fresh", "trajectories") if getattr(config.collect, name) not in (True, None)
        ]
        if left_out:
            raise ConfigError(f"balance 'drop' needs the recalls of a scoring run: leave out {left_out[0]}")
        if splits.validation is None:
            raise ConfigError(
                "balance 'drop' needs validation data, to measure each class's recall: set data.hold_out=0.1"
            )
    if method.collect_epochs and config.collect.fresh:
        _check_training(config, splits, Fixed())
        return None
    setup = SelectionSetup(method, config.train.epochs)
    if isinstance(method, Fixed):
        setup = chosen_subset(config, splits.train)
    _check_setup(config, splits, setup)
    return setup


def _check_setup(config: Config, splits: Splits, setup: SelectionSetup) -> None:
    _check_training(config, splits, setup.method)
    check_method(config, splits.train, setup.method, setup.num_epochs)
    check_memory(setup.method, input_spec(config, splits.train).num_classes, len(splits.train))


def _check_training(config: Config, splits: Splits, method: Method) -> None:
    check_trackers(config)
    picking = in_batch_method(method)
    scored = () if picking is None else picking.batch_signals
    check_signals((*method.signals, *method.sweep_signals, *scored, *config.train.record))
    check_sizes(config, len(splits.train), splits.train.schema.row_bytes)
    check_model(config, input_spec(config, splits.train), method)


def _score(config: Config, splits: Splits, listeners: Listeners) -> Scored:
    """Score the samples by a scoring run, or by the logits of another program."""
    if config.collect.trajectories is not None:
        check_memory(config.build_method(), input_spec(config, splits.train).num_classes, len(splits.train))
        return score_samples(config, splits.train, ())
    folders = []
    for number in range(config.collect.runs):
        scoring = config.scoring(number)
        check_folder(scoring)
        scoring_splits = _splits(scoring)
        if scoring_splits.train.fingerprint != splits.train.fingerprint:
            raise ConfigError("collect.data changes which samples there are: set only keys of collect.data.augment")
        setup = SelectionSetup(scoring.build_method(), max(scoring.train.epochs, scoring.last_epoch + 1))
        _check_setup(scoring, scoring_splits, setup)
        folders.append(_run(scoring, scoring_splits, setup, listeners).folder)
    return score_samples(config, splits.train, folders)


def _run(config: Config, splits: Splits, setup: SelectionSetup, listeners: Listeners) -> RunResult:
    """Train one run to its end and write its results."""
    spec = input_spec(config, splits.train)
    resources = resolve_resources(config, splits.train)
    if resources.stream == "device" and resources.num_workers == 0:  # workers check the room on their own machines
        check_room(splits.by_name, torch.device("cuda" if resources.use_gpu else "cpu"))
    check_subset(config, setup)
    check_shards(config, setup.method)
    attempt = functools.partial(try_checkpoint, config, splits.train, spec, setup)
    pause = listeners.pause or threading.Event()
    listeners = replace(listeners, pause=pause)
    environment = _environment(config, spec, resources)
    opened = open_folder(config, splits.train, attempt, on_lost=pause.set, **environment)
    with opened as (folder, start_epoch):
        for split in (splits.train, splits.validation):
            if split is not None:
                split.prepare()
        keep_subset(folder, config, setup, splits.train)
        if listeners.on_start is not None:
            listeners.on_start(Start(config, resources, folder, start_epoch))
        if start_epoch < config.last_epoch:
            check_vectors(config, spec, len(splits.train), setup.method)
            for line in notices(config, spec, len(splits.train), setup.method, resources.use_gpu):
                listeners.on_notice(line)
            if isinstance(splits.train, Relabeled):
                changed = f"{splits.train.num_changed:,} of {len(splits.train):,}"
                listeners.on_notice(f"data.relabel replaces the labels of {changed} training samples")
            try:
                is_whole = Run(config, splits, spec, setup, resources=resources, folder=folder).fit(listeners)
            finally:  # also if training has failed
                for line in failures(folder, config):
                    listeners.on_notice(line)
            remove_old_checkpoints(folder, config.run.keep_checkpoints)
            epoch, step = newest_position(folder)
            if not is_whole:
                raise KeyboardInterrupt(where_stopped(config, folder, epoch, step))
            if epoch < config.last_epoch:
                raise TrainingPaused(
                    f"paused: saved before step {step} of epoch {epoch + 1}; run the same command to continue"
                )
        _write_scores(config, splits.train, folder, setup, recorded_signals(config, spec))
        if start_epoch < config.last_epoch or not (folder / "gallery").exists():
            write_gallery(config, splits.train, spec, folder, listeners.on_notice)
        return RunResult(folder, read_metrics(folder))


def _environment(config: Config, spec: InputSpec, resources: Resources) -> dict[str, Any]:
    """Return the facts of the machine and of the network's cost for environment.json."""
    on_gpu = resources.use_gpu and torch.cuda.is_available()
    return {
        "num_workers": resources.num_workers,
        "threads": resources.threads,
        "stream": resources.stream,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "forward_flops_per_sample": forward_flops(config, spec),
    }


def _write_scores(
    config: Config, source: SampleSource, folder: Path, setup: SelectionSetup, record: tuple[str, ...]
) -> None:
    labels = np.asarray(source.labels)
    selector = new_selector(config, source, setup, record)
    restore_selector(selector, checkpoint_path(folder, config.last_epoch))
    own = selector.scores()
    extra = {f"collected_{name}" if name in own else name: column for name, column in setup.scores.items()}
    write_scores(folder, selector, labels, source.fingerprint, extra=extra, method=config.method)
