"""Write a run's checkpoints, its lines of metrics.jsonl, and its reports to Ray Train and the trackers.

Every rank holds a CheckpointWriter; only rank 0 writes. The state is copied at once and written by a thread, so
training waits for the copy only. An epoch's line follows its checkpoint, and Ray Train hears of both when the next
epoch ends: nothing is reported before it is on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray.train
import torch
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import (
    checkpoint_path,
    load_tensors,
    read_position,
    remove_old_checkpoints,
    remove_old_steps,
    write_checkpoint,
)
from rayprune.engine.storage.costs import PriorCost
from rayprune.engine.storage.run_folder import append_metrics, mend_metrics
from rayprune.engine.storage.trackers import Trackers
from rayprune.errors import RunFolderError
from rayprune.nn.device import host_copy
from rayprune.nn.steps import TrainStep

logger = logging.getLogger(__name__)

# A score table is copied where this many of it would fit into the memory that is free.
_ROOM = 4
_COUNTS = ("samples_trained", "samples_forwarded", "samples_padded", "bytes_read", "samples_meta")


@dataclass(frozen=True)
class StateCopy:
    """A state for the thread that writes it.

    Attributes:
        model, trainer: network, and optimiser and step, on the host.
        selector: the Selector's arrays.
        changing: whether those are its own, too large for a copy: training waits until they are written.
    """

    model: dict[str, Any]
    trainer: dict[str, Any]
    selector: Mapping[str, NDArray[Any]]
    changing: bool = False


class CheckpointWriter:
    """Keep a run's counts and files; restore them from a checkpoint."""

    def __init__(
        self,
        run_folder: Path,
        config: Config,
        fingerprint: str,
        shuffle: str,
        rank: int,
        before: PriorCost | None = None,
    ) -> None:
        before = before or PriorCost()
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
        self._untold: tuple[int, dict[str, Any]] | None = None

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
                raise RunFolderError(f"checkpoint {folder} is of another run: {name} {position[name]}, here {own}")
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

    def copied(
        self, network: torch.nn.Module, train_step: TrainStep, selector: Mapping[str, NDArray[Any]]
    ) -> StateCopy:
        """Copy what training changes from here on, when the copy before it has been written."""
        self.wait()
        trainer = {"optimizer": train_step.optimizer.state_dict(), "step": train_step.state_dict()}
        # What came from another process is nobody's but ours already.
        own = {name: array for name, array in selector.items() if array.flags.writeable}
        too_large = sum(array.nbytes for array in own.values()) > psutil.virtual_memory().available / _ROOM
        table = selector if too_large else {**selector, **{name: np.array(array) for name, array in own.items()}}
        return StateCopy(host_copy(network.state_dict()), host_copy(trainer), table, changing=too_large)

    def save(self, epoch: int, metrics: dict[str, Any], seconds: Mapping[str, float], state: StateCopy | None) -> None:
        """Let the state before `epoch` be written, then the line of the epoch before it.

        Args:
            epoch: the epoch that comes.
            metrics, seconds: the line.
            state: on rank 0.
        """
        self._untold = (epoch, metrics)
        if state is None:
            return
        line = {**metrics, "seconds": _rounded(seconds), "wall_time": round(self._wall_time(), 3)}
        self._last_line = line
        position = self._position([])  # made here: the counts go on while the thread writes

        def write() -> None:
            self._write(epoch, 0, state, position)
            append_metrics(self._folder, line)
            self._trackers.log(line)
            remove_old_steps(self._folder, epoch, 0, 0)
            keep = self._config.run.keep_checkpoints
            # Ray Train deletes old ones itself, but not in its local mode, and not what it has not heard of where
            # workers were restarted; what it may still delete must be there.
            remove_old_checkpoints(self._folder, keep if self._config.scaling.num_workers == 0 else 2 * keep + 3)

        self._submit(write, state)

    def save_inside(self, epoch: int, step: int, state: StateCopy, sums: list[float], resume_step: int) -> None:
        """Let the state before a step of an epoch be written (rank 0).

        A write that fails is logged: the run goes on and tries again at the next one.
        """
        position = self._position(sums)

        def write() -> None:
            try:
                self._write(epoch, step, state, position)
            except OSError as error:
                logger.warning("a checkpoint inside the epoch could not be written (%s); training goes on", error)
            else:
                remove_old_steps(self._folder, epoch, self._config.run.keep_checkpoints, resume_step)

        self._submit(write, state)

    def _submit(self, write: Callable[[], None], state: StateCopy) -> None:
        self._writing = self._writer.submit(write)
        if state.changing:
            self.wait()

    def look(self) -> None:
        """Raise what writing raised, if it has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what is under way is on disk.

        Raises:
            OSError: the checkpoint of an epoch's end could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def report(self) -> None:
        """Tell Ray Train of the epoch that was saved last, if it does not know (a barrier of all ranks)."""
        self.wait()
        if self._untold is None:
            return
        (epoch, metrics), self._untold = self._untold, None
        checkpoint = None
        if self._rank == 0:
            checkpoint = ray.train.Checkpoint.from_directory(str(checkpoint_path(self._folder, epoch)))
        ray.train.report(  # the files are in its folder already
            metrics, checkpoint=checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD
        )

    def close(self) -> None:
        """End the writing and let the trackers end: no more epochs come."""
        self._writer.shutdown()
        if self._writing is not None and (error := self._writing.exception()) is not None:  # beside what ended the run
            logger.warning("the last checkpoint could not be written: %s", error)
        self._trackers.close()

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

    def _write(self, epoch: int, step: int, state: StateCopy, position: Mapping[str, Any]) -> None:
        write_checkpoint(
            self._folder,
            epoch,
            step,
            model=state.model,
            trainer=state.trainer,
            selector=state.selector,
            position=position,
        )

    def _wall_time(self) -> float:
        return self._wall_before + time.perf_counter() - self._started


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in seconds.items()}
