"""The driver of a run: check everything, start the ScoreActor, the stream and the workers, write what is left."""

from __future__ import annotations

import functools
import logging
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train.torch import TorchTrainer

from rayprune.config import Config
from rayprune.core.objects import USER_MODULE_PREFIX
from rayprune.core.selector import Selector
from rayprune.engine.actor import ScoreSpec
from rayprune.engine.checkpoint import forget_ray_records, load_selector_state, newest_position, remove_old_checkpoints
from rayprune.engine.client import LocalScores, RemoteScores, ScoreClient
from rayprune.engine.preparation import check_method, check_model, check_sizes, input_spec, open_folder, unkept_signals
from rayprune.engine.progress import Watcher
from rayprune.engine.protocol import TrainingPaused, TrainingStopped
from rayprune.engine.resources import Resources, resolve_resources, start_ray
from rayprune.engine.run_folder import read_metrics, write_scores
from rayprune.engine.setup import InputSpec, WorkerSpec
from rayprune.engine.stream import LocalStream, RayStream, plan_dataset, row_bytes, shuffle_name
from rayprune.engine.worker import Worker
from rayprune.sources import SampleSource, Splits, open_data

logger = logging.getLogger(__name__)

EpochListener = Callable[[dict[str, Any]], None]
ProgressListener = Callable[[int, int, int], None]


# How often Ray looks whether an elastic run can have more workers; a change costs the steps since the checkpoint.
_RESIZE_S = 15.0


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and the last metrics line of each epoch."""

    folder: Path
    metrics: list[dict[str, Any]]


class TrainingFailed(RuntimeError):
    """Training ended with an error that is not the configuration's; `__cause__` has the rest."""


def train(
    config: Config,
    *,
    on_epoch: EpochListener | None = None,
    on_progress: ProgressListener | None = None,
    on_start: Callable[[Resources, Path, int], None] | None = None,
    on_notice: Callable[[str], None] = logger.warning,
    debug: bool = False,
) -> RunResult:
    """Run a config to its end, from where its run folder stands.

    Args:
        config: a resolved config (`load_config`), with `run.name` set.
        on_epoch: called with each new line of metrics.jsonl.
        on_progress: called about twice a second with (epoch, samples observed, samples planned).
        on_start: called once with the resources, the run folder and the first epoch to train.
        on_notice: called with lines that a person should see: what the run cannot promise, and stalls (who waits for
            what, since when, after `run.stall_seconds`).
        debug: show Ray's own logs.

    Raises:
        ValueError: the config cannot work, or the run folder is another run's; one line with the cure.
        TrainingStopped: too many NaN or infinite losses.
        TrainingPaused: SIGTERM came; the run has saved and left.
        TrainingFailed: anything else that ended training.
    """
    splits = open_data(config.data.source, limit=config.data.limit, cache=config.data.cache, **config.data.source_keys)
    _ship_user_modules()
    spec = input_spec(config, splits.train)
    check_sizes(config, len(splits.train))
    check_method(config, splits.train)
    check_model(config, spec)
    if not debug:
        logging.getLogger("ray.train").setLevel(logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    if config.scaling.num_workers != 0:
        start_ray(debug, elastic=isinstance(config.scaling.num_workers, tuple))
    resources = resolve_resources(config, splits.train)
    with open_folder(config, splits.train, resources) as (folder, start_epoch):
        for split in (splits.train, splits.validation):
            if split is not None:
                split.prepare()
        if on_start is not None:
            on_start(resources, folder, start_epoch)
        if start_epoch < config.train.epochs:
            for line in unkept_signals(config, spec, len(splits.train)):
                on_notice(line)
            _Run(config, splits, spec, resources, folder).fit(on_epoch, on_progress, on_notice)
            remove_old_checkpoints(folder, config.run.keep_checkpoints)
            epoch, step = newest_position(folder)
            if epoch < config.train.epochs:
                raise TrainingPaused(f"paused: saved before step {step} of epoch {epoch + 1}; the same command goes on")
        _write_scores(config, splits.train, folder)
        return RunResult(folder, read_metrics(folder))


class _Run:
    """One start of a run's workers, with its ScoreActor."""

    def __init__(self, config: Config, splits: Splits, spec: InputSpec, resources: Resources, folder: Path) -> None:
        self._config, self._resources, self._folder = config, resources, folder
        method = config.build_method()
        self._sources: dict[str, SampleSource] = {"train": splits.train}
        if splits.validation is not None:
            self._sources["validation"] = splits.validation
        score_spec = ScoreSpec(
            method=config.method,
            source=splits.train,
            num_validation=len(splits.validation) if splits.validation is not None else 0,
            num_epochs=config.train.epochs,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            last_batch=config.train.last_batch,
            row_bytes=row_bytes(splits.train.schema),
            run_folder=str(folder),
            keep_selections=config.run.keep_selections,
        )
        self._handle: Any = None
        self.scores: ScoreClient
        if resources.num_workers == 0:
            self.scores = LocalScores(score_spec)
        else:
            name = f"rayprune-scores-{uuid.uuid4().hex[:8]}"
            self.scores, self._handle = RemoteScores.create(score_spec, name)
        self._worker_spec = WorkerSpec(
            config=config,
            scores=self.scores,
            input=spec,
            signals=method.signals,
            fingerprint=splits.train.fingerprint,
            shuffle=shuffle_name(splits.train),
            run_folder=str(folder),
            use_gpu=resources.use_gpu,
            threads=resources.threads,
            has_validation=splits.validation is not None,
        )

    def fit(
        self,
        on_epoch: EpochListener | None,
        on_progress: ProgressListener | None,
        on_notice: Callable[[str], None],
    ) -> None:
        """Train to the end; Ray restarts the workers after a failure."""
        failure: Exception | None = None
        try:
            stall_s = self._config.run.stall_seconds
            watcher = Watcher(self._folder, self.scores, on_epoch, on_progress, on_notice, stall_s)
            with watcher, _on_sigterm(watcher.request_pause):
                self._trainer().fit()
        except Exception as error:  # without workers the loop's own errors come through as they are
            failure = error
        finally:
            stopped = self._stopped_because()
            if self._handle is not None:
                ray.kill(self._handle)
        if stopped is not None:  # also after a clean end: workers that Ray started again leave at once
            reason, failed = stopped
            raise (TrainingFailed(f"training failed {reason}") if failed else TrainingStopped(reason)) from failure
        if failure is not None:
            raise TrainingFailed(_first_cause(failure)) from failure

    def _stopped_because(self) -> tuple[str, bool] | None:
        try:
            stopped: tuple[str, bool] | None = self.scores.call("stopped")
        except ray.exceptions.RayError:  # the actor went down with what failed: that says more
            stopped = None
        return stopped

    def _trainer(self) -> TorchTrainer:
        resources = self._resources
        datasets = {}
        if resources.stream == "ray":
            assert isinstance(self.scores, RemoteScores)
            datasets["train"] = plan_dataset(
                self.scores, self._sources, elastic=isinstance(resources.num_workers, tuple)
            )
            # The sources stay behind: rows reach these workers through Ray Data only.
            loop = functools.partial(_ray_loop, self._worker_spec)
        else:
            loop = functools.partial(_local_loop, self._worker_spec, self._sources)
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
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=self._config.run.keep_checkpoints),
                failure_config=ray.train.FailureConfig(max_failures=self._config.run.max_failures),
            ),
            datasets=datasets,
        )


@contextmanager
def _on_sigterm(pause: Callable[..., None]) -> Iterator[None]:
    """Let SIGTERM, which a cluster sends before it takes a machine back, pause the run instead of ending it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in the main thread only
        return
    before = signal.signal(signal.SIGTERM, pause)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ray_loop(spec: WorkerSpec) -> None:
    Worker(spec, RayStream(ray.train.get_dataset_shard("train"))).run()


def _local_loop(spec: WorkerSpec, sources: Mapping[str, SampleSource]) -> None:
    Worker(spec, LocalStream(sources)).run()


def _ship_user_modules() -> None:
    """Send modules loaded from `path/to/file.py` by value: other processes cannot import them by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(USER_MODULE_PREFIX):
            ray.cloudpickle.register_pickle_by_value(module)


def _write_scores(config: Config, source: SampleSource, folder: Path) -> None:
    method = config.build_method()
    labels = np.asarray(source.labels)
    epochs, seed = config.train.epochs, config.train.seed
    selector = Selector(method, len(source), epochs, seed, labels=labels if method.class_floor > 0 else None)
    selector.load_state_dict(load_selector_state(folder, epochs))
    write_scores(folder, selector, labels, source.fingerprint)


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
