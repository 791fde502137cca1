"""The workers of a run and its ScoreActor: start them, follow them until they have trained, and name what ended them.

Workers report through the run folder and the actor; Ray restarts them after a failure.
"""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from rayprune.config import Config
from rayprune.engine.cluster import Resources
from rayprune.engine.data.device import DeviceStream
from rayprune.engine.data.ray_data import plan_dataset, task_rows
from rayprune.engine.data.transport import LocalStream, RayStream
from rayprune.engine.monitoring import RunListeners, Watcher, on_ctrl_c, on_sigterm
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import StopReason
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import forget_ray_records, remove_old_checkpoints
from rayprune.engine.train.build import (
    InputSpec,
    SelectionSetup,
    StepSettings,
    WorkerSpec,
    pick_device,
    recorded_signals,
)
from rayprune.engine.train.process_group import ProcessGroup
from rayprune.engine.train.worker import Worker
from rayprune.errors import RunFolderError, TrainingFailed, TrainingStopped
from rayprune.nn.augment import Augment
from rayprune.nn.device import pin_column
from rayprune.paths import ray_storage
from rayprune.sources import SampleSource, Splits
from rayprune.sources.base import shuffle_name

logger = logging.getLogger(__name__)

# How often Ray checks whether an elastic run can have more workers; a change costs the steps since the checkpoint.
_RESIZE_S = 15.0
# The most samples for which selections report each class's kept fraction; larger label columns are read only if needed.
_LABELED_SAMPLES = 2_000_000


class Run:
    """The workers of a run and its ScoreActor.

    Args:
        config: the run's config.
        splits: its data.
        spec: the network's inputs.
        setup: how it selects.
        resources: what it trains on.
        folder: its run folder.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        spec: InputSpec,
        setup: SelectionSetup,
        *,
        resources: Resources,
        folder: Path,
    ) -> None:
        self._config, self._resources, self._folder = config, resources, folder
        method = setup.method
        needs_labels = method.class_floor > 0 or method.needs_labels
        self._sources = splits.by_name
        record = recorded_signals(config, spec)
        score_spec = ScoreSpec(
            method=method.to_config(),
            source=splits.train,
            num_validation=len(splits.validation) if splits.validation is not None else 0,
            num_epochs=setup.num_epochs,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            last_batch=config.train.last_batch,
            row_bytes=splits.train.schema.row_bytes,
            run_folder=str(folder),
            keep_selections=config.run.keep_selections,
            labeled=needs_labels or len(splits.train) <= _LABELED_SAMPLES,
            chosen=setup.chosen,
            record=record,
            visits_collected=setup.prior_cost.samples_trained,
            meta_every=config.train.meta_interval,
            checkpoint_epochs=config.run.checkpoint_epochs,
        )
        self._handles: list[Any] = []
        if resources.stream == "ray":
            cpus = ray.cluster_resources().get("CPU", 1.0)
            score_spec = replace(score_spec, task_rows=task_rows(splits.train, cpus))
        num_shards = min(config.scaling.score_shards, len(splits.train))
        if resources.num_workers == 0:
            self.scores = ScoreClient.in_process(score_spec, num_shards)
        else:
            name = f"rayprune-scores-{uuid.uuid4().hex[:8]}"
            self.scores, self._handles = ScoreClient.start(score_spec, name, num_shards)
        step = StepSettings.of(method, config, record)
        self._worker_spec = WorkerSpec(
            config=config,
            scores=self.scores,
            # A pretrained network has statistics of its own.
            input=spec if step.trains else replace(spec, augment=Augment()),
            step=step,
            fingerprint=splits.train.fingerprint,
            shuffle=shuffle_name(splits.train),
            run_folder=str(folder),
            use_gpu=resources.use_gpu,
            threads=resources.threads,
            num_validation=score_spec.num_validation if step.trains else 0,
            prior_cost=setup.prior_cost,
        )

    def fit(self, listeners: RunListeners) -> bool:
        """Train to the end, or until `listeners.pause` is set or Ctrl-C is pressed.

        Returns:
            False if Ctrl-C was pressed.

        Raises:
            TrainingStopped: too many losses were NaN or infinite.
            RunFolderError: the run folder has disappeared.
            TrainingFailed: anything else that ended training.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """
        failure: Exception | None = None
        watcher = Watcher(self._folder, self.scores, listeners, self._config.run.stall_seconds)
        try:
            with watcher, on_sigterm(watcher.request_pause), on_ctrl_c(watcher.interrupt):
                # In the main thread, Ray Train would replace the handler of SIGINT and abort the run without saving.
                self._fit() if self.scores.is_local else watcher.call(self._fit)
        except Exception as error:  # without workers, the loop's own errors
            failure = error
        if watcher.is_interrupted:
            logger.debug("interrupted", exc_info=failure)
            return False
        stop_reason = self._stop_reason()
        for handle in self._handles:
            ray.kill(handle)
        if failure is not None and not (self._folder / "config.yaml").exists():
            raise RunFolderError(
                f"the run folder {self._folder} is gone: bring it or its storage back, then run the same command again"
            ) from failure
        if stop_reason is not None:  # even after a clean end: workers that Ray has restarted leave at once
            if stop_reason.failed:
                raise TrainingFailed(f"training failed {stop_reason.text}") from failure
            raise TrainingStopped(stop_reason.text) from failure
        if failure is not None:
            raise TrainingFailed(_first_cause(failure)) from failure
        return True

    def _fit(self) -> None:
        threads = torch.get_num_threads()
        try:
            self._trainer().fit()
        finally:
            torch.set_num_threads(threads)  # without workers, the loop has set its own in this process

    def _stop_reason(self) -> StopReason | None:
        try:
            return self.scores.stop_reason()
        except ray.exceptions.RayError:  # the actor died with the run; the run's error says more
            return None

    def _trainer(self) -> TorchTrainer:
        resources = self._resources
        datasets = {}
        if resources.stream == "ray":
            datasets["train"] = plan_dataset(
                self.scores, self._sources, elastic=isinstance(resources.num_workers, tuple)
            )
            # Without the sources: rows reach these workers only through Ray Data.
            loop = functools.partial(_ray_loop, self._worker_spec)
        else:
            reading_loop = _device_loop if resources.stream == "device" else _local_loop
            loop = functools.partial(reading_loop, self._worker_spec, self._sources)
        forget_ray_records(self._folder)
        remove_old_checkpoints(self._folder, self._config.run.keep_checkpoints)
        each = {"CPU": resources.cpus_per_worker, **({"GPU": 1.0} if resources.use_gpu else {})}
        return TorchTrainer(
            loop,
            torch_config=ProcessGroup(),
            scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # typed as Train's first version
                num_workers=resources.num_workers,  # type: ignore[arg-type]
                use_gpu=resources.use_gpu,
                elastic_resize_monitor_interval_s=_RESIZE_S,
                resources_per_worker=each if resources.num_workers else None,
            ),
            run_config=ray.train.RunConfig(
                **ray_storage(self._folder),
                name="checkpoints",
                # Ray learns of the newest checkpoint only when the next epoch ends.
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
    """Return one line on the first failure in Ray's nested errors."""
    where, cause = "training failed", error
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = sorted(failures.items())[0]
        where = f"training failed on rank {rank}"
    cause = getattr(cause, "cause", None) or getattr(cause, "controller_failure", None) or cause
    if isinstance(cause, ray.exceptions.RayActorError):
        who = "its process" if failures else "Ray Train's controller"
        return f"{where}: {who} has ended, perhaps for lack of memory: the same command continues"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
    # Ray's own errors begin with a traceback and end with the message.
    line = lines[-1] if isinstance(cause, ray.exceptions.RayError) else lines[0]
    return f"{where}: {type(cause).__name__}: {line}"
