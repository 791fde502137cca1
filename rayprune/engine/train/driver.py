"""The driver of a run: check everything, score first where the method chooses one subset, train, write what is left.

One start of a run's workers, with its ScoreActor: until training ends, or something ends it.

What workers report comes back through the run folder and the actor; Ray restarts them after a failure.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from rayprune.config import Config
from rayprune.core.references import USER_MODULE_PREFIX
from rayprune.core.selector import Selector
from rayprune.engine.cluster import Resources, resolve_resources, start_ray
from rayprune.engine.data.device import DeviceStream, check_room
from rayprune.engine.data.ray_data import plan_dataset, task_rows
from rayprune.engine.data.transport import LocalStream, RayStream
from rayprune.engine.monitoring import RunListeners, Watcher, on_sigterm
from rayprune.engine.scoring.actor import ScoreSpec
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import StopReason
from rayprune.engine.storage.checkpoint import (
    forget_ray_records,
    load_selector_state,
    newest_position,
    remove_old_checkpoints,
)
from rayprune.engine.storage.resume import adopt_scoring, check_folder, check_start, open_folder
from rayprune.engine.storage.run_folder import read_metrics, write_scores
from rayprune.engine.storage.trackers import check_trackers, failures
from rayprune.engine.train.build import (
    InputSpec,
    SelectionSetup,
    StepSettings,
    WorkerSpec,
    pick_device,
    recorded_signals,
)
from rayprune.engine.train.gallery import write_gallery
from rayprune.engine.train.preflight import (
    check_memory,
    check_method,
    check_model,
    check_sizes,
    forward_flops,
    input_spec,
    notices,
)
from rayprune.engine.train.static_subset import Scored, check_subset, chosen_subset, keep_subset, score_samples
from rayprune.engine.train.worker import Worker
from rayprune.errors import ConfigError, TrainingFailed, TrainingPaused, TrainingStopped
from rayprune.methods import Method
from rayprune.methods.fixed import Fixed
from rayprune.nn.device import pin_column
from rayprune.nn.signals import check_signals
from rayprune.sources import SampleSource, Splits, open_data
from rayprune.sources.base import shuffle_name

EpochListener = Callable[[dict[str, Any]], None]
ProgressListener = Callable[[int, int, int], None]

# How often Ray looks whether an elastic run can have more workers; a change costs the steps since the checkpoint.
_RESIZE_S = 15.0
# Up to here the shares of each class that are kept are told; larger label columns are read only where needed.
_LABELLED_SAMPLES = 2_000_000


class Run:
    """One start of a run's workers, with its ScoreActor."""

    def __init__(
        self,
        config: Config,
        splits: Splits,
        spec: InputSpec,
        resources: Resources,
        folder: Path,
        choice: SelectionSetup,
    ) -> None:
        self._config, self._resources, self._folder = config, resources, folder
        method = choice.method
        needs_labels = method.class_floor > 0 or method.needs_labels
        self._sources = splits.by_name
        record = recorded_signals(config, spec)
        score_spec = ScoreSpec(
            method=method.to_config(),
            source=splits.train,
            num_validation=len(splits.validation) if splits.validation is not None else 0,
            num_epochs=choice.num_epochs,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            last_batch=config.train.last_batch,
            row_bytes=splits.train.schema.row_bytes,
            run_folder=str(folder),
            keep_selections=config.run.keep_selections,
            labelled=needs_labels or len(splits.train) <= _LABELLED_SAMPLES,
            chosen=choice.chosen,
            record=record,
            visits_collected=choice.prior_cost.samples_trained,
            meta_every=config.train.meta_interval,
        )
        self._handle: Any = None
        if resources.stream == "ray":
            cpus = ray.cluster_resources().get("CPU", 1.0)
            score_spec = replace(score_spec, task_rows=task_rows(splits.train, cpus))
        if resources.num_workers == 0:
            self.scores = ScoreClient.in_process(score_spec)
        else:
            name = f"rayprune-scores-{uuid.uuid4().hex[:8]}"
            self.scores, self._handle = ScoreClient.start(score_spec, name)
        self._worker_spec = WorkerSpec(
            config=config,
            scores=self.scores,
            input=spec,
            step=StepSettings.of(method, config.train, record),
            fingerprint=splits.train.fingerprint,
            shuffle=shuffle_name(splits.train),
            run_folder=str(folder),
            use_gpu=resources.use_gpu,
            threads=resources.threads,
            has_validation=splits.validation is not None,
            prior_cost=choice.prior_cost,
        )

    def fit(self, listeners: RunListeners) -> None:
        """Train to the end, or until `pause` is set; Ray restarts the workers after a failure."""
        failure: Exception | None = None
        try:
            watcher = Watcher(self._folder, self.scores, listeners, self._config.run.stall_seconds)
            with watcher, on_sigterm(watcher.request_pause):
                self._trainer().fit()
        except Exception as error:  # without workers the loop's own errors come through as they are
            failure = error
        finally:
            stop_reason = self._stop_reason()
            if self._handle is not None:
                ray.kill(self._handle)
        if stop_reason is not None:  # after a clean end, too: workers that Ray has restarted leave at once
            if stop_reason.failed:
                raise TrainingFailed(f"training failed {stop_reason.text}") from failure
            raise TrainingStopped(stop_reason.text) from failure
        if failure is not None:
            raise TrainingFailed(_first_cause(failure)) from failure

    def _stop_reason(self) -> StopReason | None:
        try:
            return self.scores.stop_reason()
        except ray.exceptions.RayError:  # the actor died with the run, whose own error says more
            return None

    def _trainer(self) -> TorchTrainer:
        resources = self._resources
        datasets = {}
        if resources.stream == "ray":
            datasets["train"] = plan_dataset(
                self.scores, self._sources, elastic=isinstance(resources.num_workers, tuple)
            )
            # The sources stay behind: rows reach these workers through Ray Data only.
            loop = functools.partial(_ray_loop, self._worker_spec)
        else:
            own = _device_loop if resources.stream == "device" else _local_loop
            loop = functools.partial(own, self._worker_spec, self._sources)
        forget_ray_records(self._folder)
        remove_old_checkpoints(self._folder, self._config.run.keep_checkpoints)
        each = {"CPU": resources.cpus_per_worker, **({"GPU": 1.0} if resources.use_gpu else {})}
        return TorchTrainer(
            loop,
            scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # typed as Train's first version
                num_workers=resources.num_workers,  # type: ignore[arg-type]
                use_gpu=resources.use_gpu,
                elastic_resize_monitor_interval_s=_RESIZE_S,
                resources_per_worker=each if resources.num_workers else None,
            ),
            run_config=ray.train.RunConfig(
                storage_path=str(self._folder),
                name="checkpoints",
                # Ray hears of the newest one only when the next epoch has ended.
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=max(1, self._config.run.keep_checkpoints - 1)),
                failure_config=ray.train.FailureConfig(max_failures=self._config.run.max_failures),
            ),
            datasets=datasets,
        )


def _ray_loop(spec: WorkerSpec) -> None:
    Worker(spec, RayStream(ray.train.get_dataset_shard("train"), pin_column if spec.use_gpu else None)).run()


def _local_loop(spec: WorkerSpec, sources: Mapping[str, SampleSource]) -> None:
    Worker(spec, LocalStream(sources, pin_column if spec.use_gpu else None)).run()


def _device_loop(spec: WorkerSpec, sources: Mapping[str, SampleSource]) -> None:
    Worker(spec, DeviceStream(sources, pick_device(spec.use_gpu))).run()


def _first_cause(error: BaseException) -> str:
    """Return one line on what failed first, out of Ray's nested errors."""
    where, cause = "training failed", error
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = sorted(failures.items())[0]
        where = f"training failed on rank {rank}"
    cause = getattr(cause, "cause", None) or getattr(cause, "controller_failure", None) or cause
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
    # Ray's own errors begin with a traceback as text and end with what it says.
    line = lines[-1] if isinstance(cause, ray.exceptions.RayError) else lines[0]
    return f"{where}: {type(cause).__name__}: {line}"


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
class Listeners(RunListeners):
    """Who hears of a run; see `train`."""

    on_start: Callable[[Start], None] | None = None
    on_scored: Callable[[Scored], None] | None = None


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
    listeners = Listeners(on_epoch, on_progress, on_notice, pause, on_start, on_scored)
    splits = _open(config, debug)
    method = config.build_method()
    check_folder(config)
    choice = SelectionSetup(method, config.train.epochs)
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
    return _run(config, splits, scored.setup(config), listeners)


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
        _check(config, splits, SelectionSetup(method, config.train.epochs))


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
        raise ConfigError(
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
        raise ConfigError("collect.data changes which samples there are: only how they are augmented may differ")
    choice = SelectionSetup(scoring.build_method(), max(scoring.train.epochs, scoring.last_epoch + 1))
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


def _check(config: Config, splits: Splits, choice: SelectionSetup) -> None:
    """Refuse before anything starts what cannot work."""
    _check_training(config, splits, choice.method)
    check_method(config, splits.train, choice.method, choice.num_epochs)
    check_memory(choice.method, input_spec(config, splits.train).num_classes, len(splits.train))


def _check_training(config: Config, splits: Splits, method: Method) -> None:
    check_trackers(config)
    check_signals((*method.signals, *method.sweep_signals, *config.train.record))
    check_sizes(config, len(splits.train))
    check_model(config, input_spec(config, splits.train), method)


def _run(config: Config, splits: Splits, choice: SelectionSetup, listeners: Listeners) -> RunResult:
    spec = input_spec(config, splits.train)
    resources = resolve_resources(config, splits.train)
    if resources.stream == "device" and resources.num_workers == 0:  # workers look for themselves, where they are
        check_room(splits.by_name, torch.device("cuda" if resources.use_gpu else "cpu"))
    check_subset(config, choice)
    with open_folder(config, splits.train, **_environment(config, spec, resources)) as (folder, start_epoch):
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
                run.fit(listeners)
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


def _environment(config: Config, spec: InputSpec, resources: Resources) -> dict[str, Any]:
    """Return what environment.json says of the machine, and of the network's cost."""
    on_gpu = resources.use_gpu and torch.cuda.is_available()
    return {
        "num_workers": resources.num_workers,
        "threads": resources.threads,
        "stream": resources.stream,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "forward_flops_per_sample": forward_flops(config, spec),
    }


def _ship_user_modules() -> None:
    """Send modules loaded from `path/to/file.py` by value: other processes cannot import them by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(USER_MODULE_PREFIX):
            ray.cloudpickle.register_pickle_by_value(module)


def _write_scores(
    config: Config, source: SampleSource, folder: Path, choice: SelectionSetup, record: tuple[str, ...]
) -> None:
    labels = np.asarray(source.labels)
    run = (len(source), choice.num_epochs, config.train.seed)
    selector = Selector(choice.method, *run, labels, chosen=choice.chosen, record=record)
    selector.load_state_dict(load_selector_state(folder, config.last_epoch))
    own = selector.scores()
    extra = {f"collected_{name}" if name in own else name: column for name, column in choice.scores.items()}
    write_scores(folder, selector, labels, source.fingerprint, extra=extra, method=config.method)
