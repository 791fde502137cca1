"""What a worker writes and reads back: checkpoints, metrics.jsonl, reports to Ray Train; its lines go to trackers.

Every rank holds a Saver; only rank 0 writes. A checkpoint inside an epoch is copied at once and written by a thread:
training waits for the copy only.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.engine.checkpoint import (
    checkpoint_path,
    load_tensors,
    read_position,
    remove_old_checkpoints,
    remove_old_steps,
    write_checkpoint,
)
from rayprune.engine.run_folder import append_metrics, mend_metrics
from rayprune.engine.setup import Before
from rayprune.engine.trackers import Trackers
from rayprune.nn.steps import TrainStep

logger = logging.getLogger(__name__)

_COUNTS = ("samples_trained", "samples_forwarded", "samples_padded", "bytes_read", "samples_meta")


class Saver:
    """Keep a run's counts and files; restore them from a checkpoint."""

    def __init__(
        self, run_folder: Path, config: Config, fingerprint: str, shuffle: str, rank: int, before: Before | None = None
    ) -> None:
        before = before or Before()
        self._folder, self._config, self._rank = run_folder, config, rank
        self._fingerprint, self._shuffle = fingerprint, shuffle
        self._counts = {name: getattr(before, name) for name in _COUNTS}
        self._collected = {
            "samples_collected": before.samples_trained,
            "samples_forwarded_collected": before.samples_forwarded,
            "compute_collected": before.compute,
            "wall_time_collected": before.wall_time,
            "seconds_collected": dict(before.seconds),
        }
        self._wall_before = before.wall_time
        self._started = time.perf_counter()
        self._trackers = Trackers(run_folder, config)
        self._last_line: dict[str, Any] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rayprune-checkpoint")
        self._writing: Future[None] | None = None

    def restore(
        self, epoch: int, step: int, network: torch.nn.Module, train_step: TrainStep, device: torch.device
    ) -> list[float]:
        """Load the state before a step into network, train step and counts; return the epoch's sums so far.

        Raises:
            ValueError: the checkpoint is of another data set or configuration.
        """
        folder = checkpoint_path(self._folder, epoch, step)
        position = read_position(folder)
        for name, own in (("fingerprint", self._fingerprint), ("digest", self._config.digest())):
            if position[name] != own:
                raise ValueError(f"checkpoint {folder} is of another run: {name} {position[name]}, here {own}")
        network.load_state_dict(load_tensors(folder / "model.pt", device))
        trainer = load_tensors(folder / "trainer.pt", device)
        train_step.optimizer.load_state_dict(trainer["optimizer"])
        train_step.load_state_dict(trainer.get("step", {}))  # versions that knew plain steps only had none
        # A checkpoint of a version that did not count the bytes has 0 of them.
        self._counts = {name: int(position["counts"].get(name, 0)) for name in _COUNTS}
        self._wall_before = float(position["wall_time"])
        self._last_line = position["metrics"]
        if self._rank == 0:
            mend_metrics(self._folder, self._last_line)
        return [float(value) for value in position["sums"]]

    def count(self, trained: int, forwarded: int, padded: int, num_bytes: int, meta: int) -> dict[str, int]:
        """Add an epoch's rows and bytes and return the cumulative counts."""
        for name, more in zip(_COUNTS, (trained, forwarded, padded, num_bytes, meta), strict=True):
            self._counts[name] += more
        return dict(self._counts)

    @property
    def collected(self) -> dict[str, Any]:
        """What a run that scored the samples before has cost; its samples are in the counts already."""
        return self._collected

    def save(
        self,
        epoch: int,
        network: torch.nn.Module,
        train_step: TrainStep,
        selector: Mapping[str, NDArray[Any]],
        metrics: dict[str, Any],
        seconds: dict[str, float],
    ) -> None:
        """Write the checkpoint of the state before `epoch` (rank 0)."""
        self.wait()
        self._last_line = {**metrics, "seconds": _rounded(seconds), "wall_time": round(self._wall_time(), 3)}
        self._write(epoch, 0, network.state_dict(), _trainer_state(train_step), selector, self._position([]))

    def save_inside(
        self,
        epoch: int,
        step: int,
        network: torch.nn.Module,
        train_step: TrainStep,
        selector: Mapping[str, NDArray[Any]],
        sums: list[float],
        base_step: int,
    ) -> None:
        """Copy the state before a step of an epoch and write it behind training's back (rank 0).

        A write that fails is logged: the run goes on and tries again at the next one.
        """
        self.wait()
        model, trainer = copy.deepcopy((network.state_dict(), _trainer_state(train_step)))
        table = {name: np.array(array) for name, array in selector.items()}
        position = self._position(sums)  # made here: the counts go on while the thread writes

        def write() -> None:
            self._write(epoch, step, model, trainer, table, position)
            remove_old_steps(self._folder, epoch, self._config.run.keep_checkpoints, base_step)

        self._writing = self._writer.submit(write)

    def wait(self) -> None:
        """Wait until the checkpoint under way is on disk, or say why it is not."""
        if self._writing is not None:
            try:
                self._writing.result()
            except OSError as error:
                logger.warning("a checkpoint inside the epoch could not be written (%s); training goes on", error)
            self._writing = None

    def _position(self, sums: list[float]) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "digest": self._config.digest(),
            "shuffle": self._shuffle,
            "counts": dict(self._counts),
            "wall_time": self._wall_time(),
            "metrics": self._last_line,
            "sums": sums,
        }

    def _write(
        self,
        epoch: int,
        step: int,
        model: Mapping[str, Any],
        trainer: Mapping[str, Any],
        selector: Mapping[str, NDArray[Any]],
        position: Mapping[str, Any],
    ) -> None:
        write_checkpoint(
            self._folder,
            epoch,
            step,
            model=model,
            trainer=trainer,
            selector=selector,
            position=position,
        )

    def report(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Tell Ray Train (a barrier of all ranks); the files are in its folder already."""
        checkpoint = None
        if self._rank == 0:
            checkpoint = ray.train.Checkpoint.from_directory(str(checkpoint_path(self._folder, epoch)))
        ray.train.report(
            metrics, checkpoint=checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD
        )
        if self._rank == 0:
            remove_old_steps(self._folder, epoch, 0, 0)
        if self._config.scaling.num_workers == 0:  # Ray Train deletes old ones itself, but not in its local mode
            remove_old_checkpoints(self._folder, self._config.run.keep_checkpoints)

    def append_metrics(self, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Write the epoch's line to metrics.jsonl and pass it on to the trackers (rank 0)."""
        line = {**metrics, "seconds": _rounded(seconds), "wall_time": round(self._wall_time(), 3)}
        append_metrics(self._folder, line)
        self._trackers.log(line)

    def close(self) -> None:
        """Let the trackers end: no more epochs come."""
        self._trackers.close()

    def _wall_time(self) -> float:
        return self._wall_before + time.perf_counter() - self._started


def _trainer_state(train_step: TrainStep) -> dict[str, Any]:
    return {"optimizer": train_step.optimizer.state_dict(), "step": train_step.state_dict()}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in seconds.items()}
