"""One start of a run's workers, with its ScoreActor: until training ends, or something ends it.

What workers report comes back through the run folder and the actor; Ray restarts them after a failure.
"""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from numpy.typing import NDArray
from ray.train.torch import TorchTrainer

from rayprune.config import Config
from rayprune.core.selection import Selection
from rayprune.engine.actor import ScoreSpec
from rayprune.engine.checkpoint import forget_ray_records, remove_old_checkpoints
from rayprune.engine.client import ScoreClient
from rayprune.engine.device_stream import DeviceStream
from rayprune.engine.ending import on_sigterm
from rayprune.engine.placing import pinned
from rayprune.engine.plan_dataset import plan_dataset, task_rows
from rayprune.engine.progress import Watcher
from rayprune.engine.protocol import TrainingStopped
from rayprune.engine.resources import Resources
from rayprune.engine.setup import Before, InputSpec, StepTerms, WorkerSpec, pick_device, recorded_signals
from rayprune.engine.stream import LocalStream, RayStream
from rayprune.engine.worker import Worker
from rayprune.methods import Method
from rayprune.sources import SampleSource, Splits
from rayprune.sources.base import shuffle_name

EpochListener = Callable[[dict[str, Any]], None]
ProgressListener = Callable[[int, int, int], None]

# How often Ray looks whether an elastic run can have more workers; a change costs the steps since the checkpoint.
_RESIZE_S = 15.0
# Up to here the shares of each class that are kept are told; larger label columns are read only where needed.
_LABELLED_SAMPLES = 2_000_000


class TrainingFailed(RuntimeError):
    """Training ended with an error that is not the configuration's; `__cause__` has the rest."""


@dataclass(frozen=True)
class Choice:
    """How a run chooses its samples.

    Attributes:
        method: what the Selector is made of.
        num_epochs: epochs that it may be asked for.
        chosen: the selection of a method with a file.
        before: what the run that scored the samples has cost.
        scores: name → (N,) what it found, for scores.parquet.
    """

    method: Method
    num_epochs: int
    chosen: Selection | None = None
    before: Before = field(default_factory=Before)
    scores: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Run:
    """One start of a run's workers, with its ScoreActor."""

    def __init__(
        self, config: Config, splits: Splits, spec: InputSpec, resources: Resources, folder: Path, choice: Choice
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
            visits_collected=choice.before.samples_trained,
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
            terms=StepTerms.of(method, config.train, record),
            fingerprint=splits.train.fingerprint,
            shuffle=shuffle_name(splits.train),
            run_folder=str(folder),
            use_gpu=resources.use_gpu,
            threads=resources.threads,
            has_validation=splits.validation is not None,
            before=choice.before,
        )

    def fit(
        self,
        on_epoch: EpochListener | None,
        on_progress: ProgressListener | None,
        on_notice: Callable[[str], None],
        pause: threading.Event | None = None,
    ) -> None:
        """Train to the end, or until `pause` is set; Ray restarts the workers after a failure."""
        failure: Exception | None = None
        try:
            stall_s = self._config.run.stall_seconds
            watcher = Watcher(self._folder, self.scores, on_epoch, on_progress, on_notice, stall_s, pause)
            with watcher, on_sigterm(watcher.request_pause):
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
            return self.scores.stopped()
        except ray.exceptions.RayError:  # the actor went down with what failed: that says more
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
    Worker(spec, RayStream(ray.train.get_dataset_shard("train"), pinned if spec.use_gpu else None)).run()


def _local_loop(spec: WorkerSpec, sources: Mapping[str, SampleSource]) -> None:
    Worker(spec, LocalStream(sources, pinned if spec.use_gpu else None)).run()


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
