"""Write a run's checkpoints and metrics lines, and report them to Ray Train and the trackers.

Every rank holds a CheckpointWriter; only rank 0 writes. Training waits while the state is copied; a thread writes the
copy. An epoch's line is written after its checkpoint, if it has one, and Ray Train gets both when the next epoch ends,
so everything that is reported is on disk.
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
    load_weights,
    read_position,
    refusing,
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
from rayprune.paths import ObjectPath

logger = logging.getLogger(__name__)

# The score table is copied if the available memory is at least this many times its size.
_COPY_HEADROOM = 4


@dataclass(frozen=True)
class StateCopy:
    """A state to write.

    Attributes:
        model, trainer: on the host; the network, and the optimizer with the train step.
        selector: the Selector's arrays.
        is_shared: whether they are the Selector's own, too large to copy: training waits until they are written.
    """

    model: dict[str, Any]
    trainer: dict[str, Any]
    selector: Mapping[str, NDArray[Any]]
    is_shared: bool = False


def load_state(folder: Path, network: torch.nn.Module, train_step: TrainStep, device: torch.device) -> None:
    """Load a checkpoint's tensors into a network, its optimizer and its train step.

    Raises:
        RunFolderError: they do not fit; network and step may have been changed in part.
    """
    load_weights(folder, network, device)
    with refusing(folder):
        trainer = load_tensors(folder / "trainer.pt", device)
        train_step.optimizer.load_state_dict(trainer["optimizer"])
        train_step.load_state_dict(trainer["step"])


class CheckpointWriter:
    """Keep a run's counts and files; restore them from a checkpoint.

    Args:
        run_folder, config, rank: of this worker's run.
        fingerprint: of the training source.
        shuffle: the name of the order of samples (`shuffle_name`).
        prior_cost: what the counts start from.
    """

    def __init__(
        self,
        run_folder: Path,
        config: Config,
        rank: int,
        *,
        fingerprint: str,
        shuffle: str,
        prior_cost: PriorCost | None = None,
    ) -> None:
        prior_cost = prior_cost or PriorCost()
        self._folder, self._config, self._rank = run_folder, config, rank
        self._identity = {"fingerprint": fingerprint, "digest": config.digest()}
        self._shuffle = shuffle
        self._counts = prior_cost.counts
        self._earlier_s = prior_cost.wall_time
        self._started = time.perf_counter()
        self._trackers = Trackers(run_folder, config)
        self._last_line: dict[str, Any] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rayprune-checkpoint")
        self._pending: Future[None] | None = None
        # The epoch of the checkpoint to report, if there is one, and the figures.
        self._unreported: tuple[int | None, dict[str, Any]] | None = None

    def restore(
        self, epoch: int, step: int, network: torch.nn.Module, train_step: TrainStep, device: torch.device
    ) -> list[float]:
        """Load the state before a step into network, train step and counts; return the epoch's metric sums so far.

        Raises:
            RunFolderError: the checkpoint is of another dataset or configuration, or can't be applied.
        """
        folder = checkpoint_path(self._folder, epoch, step)
        position = read_position(folder)
        for name, own in self._identity.items():
            if position[name] != own:
                raise RunFolderError(
                    f"checkpoint {folder} is of another run: {name} {position[name]}, here {own}: use another run.name"
                )
        load_state(folder, network, train_step, device)
        self._counts = dict(position["counts"])
        self._earlier_s = position["wall_time"]
        self._last_line = position["metrics"]
        if self._rank == 0:
            mend_metrics(self._folder, self._last_line)
        return list(position["sums"])

    def add_counts(self, **counts: int) -> dict[str, int]:
        """Add an epoch's counts, named as in `PriorCost.counts`; return the totals."""
        for name, count in counts.items():
            self._counts[name] += count
        return dict(self._counts)

    def copy_state(
        self, network: torch.nn.Module, train_step: TrainStep, selector: Mapping[str, NDArray[Any]]
    ) -> StateCopy:
        """Wait for the previous write, then copy everything that training changes."""
        self.wait()
        trainer = {"optimizer": train_step.optimizer.state_dict(), "step": train_step.state_dict()}
        # Read-only arrays came from another process; nothing changes them.
        mutable = {name: array for name, array in selector.items() if array.flags.writeable}
        num_bytes = sum(array.nbytes for array in mutable.values())
        is_shared = num_bytes > psutil.virtual_memory().available / _COPY_HEADROOM
        arrays = selector if is_shared else {**selector, **{name: np.array(array) for name, array in mutable.items()}}
        return StateCopy(host_copy(network.state_dict()), host_copy(trainer), arrays, is_shared)

    def save(self, epoch: int, metrics: dict[str, Any], seconds: Mapping[str, float], state: StateCopy | None) -> None:
        """Start to write the state before `epoch`, then the line of the epoch before it.

        Args:
            epoch: the next epoch.
            metrics, seconds: the line.
            state: on rank 0; None on the others, and for an epoch that ends without a checkpoint.
        """
        self._unreported = (epoch if state is not None else None, metrics)
        if self._rank > 0:
            return
        rounded = {name: round(value, 6) for name, value in seconds.items()}
        line = {**metrics, "seconds": rounded, "wall_time": round(self._wall_time(), 3)}
        self._last_line = line
        position = self._position([])  # now: the counts change while the thread writes

        def write() -> None:
            if state is not None:
                self._write(epoch, 0, state, position)
            append_metrics(self._folder, line)
            self._trackers.log(line)
            if state is None:  # a checkpoint inside the epoch may be the newest
                return
            remove_old_steps(self._folder, epoch, 0, 0)
            keep = self._config.run.keep_checkpoints
            # Ray Train deletes old checkpoints itself, but not in its local mode, and not those that it never heard of
            # because workers restarted. Those that it may still delete must exist, so keep more than it does.
            remove_old_checkpoints(self._folder, keep if self._config.scaling.num_workers == 0 else 2 * keep + 3)

        self._submit(write, state is not None and state.is_shared)

    def save_mid_epoch(self, epoch: int, step: int, state: StateCopy, sums: list[float], resume_step: int) -> None:
        """Start to write the state before a step of an epoch (rank 0).

        A write that fails is only logged, as the next one may succeed.
        """
        position = self._position(sums)

        def write() -> None:
            try:
                self._write(epoch, step, state, position)
            except OSError as error:
                logger.warning("a mid-epoch checkpoint could not be written (%s); training continues", error)
            else:
                remove_old_steps(self._folder, epoch, self._config.run.keep_checkpoints, resume_step)

        self._submit(write, state.is_shared)

    def _submit(self, write: Callable[[], None], waits: bool) -> None:
        self._pending = self._executor.submit(write)
        if waits:
            self.wait()

    def _write(self, epoch: int, step: int, state: StateCopy, position: Mapping[str, Any]) -> None:
        parts: dict[str, Any] = {"model": state.model, "trainer": state.trainer, "selector": state.selector}
        write_checkpoint(self._folder, epoch, step, **parts, position=position)

    def _position(self, sums: list[float]) -> dict[str, Any]:
        return {
            **self._identity,
            "shuffle": self._shuffle,
            "counts": dict(self._counts),
            "wall_time": self._wall_time(),
            "metrics": self._last_line,
            "sums": sums,
        }

    def _wall_time(self) -> float:
        return self._earlier_s + time.perf_counter() - self._started

    def raise_failure(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the pending write is on disk.

        Raises:
            OSError: the checkpoint at an epoch's end could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def report(self) -> None:
        """Report the epoch that was saved last to Ray Train, once (a barrier of all ranks)."""
        self.wait()
        if self._unreported is None:
            return
        (epoch, metrics), self._unreported = self._unreported, None
        checkpoint = None
        if epoch is not None:
            folder = checkpoint_path(self._folder, epoch)
            if isinstance(folder, ObjectPath):
                checkpoint = ray.train.Checkpoint(folder.key, folder.filesystem)
            else:
                checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(  # its files are already where Ray Train keeps them
            metrics, checkpoint=checkpoint, checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD
        )

    def close(self) -> None:
        """Finish the pending write and close the trackers."""
        self._executor.shutdown()
        if self._pending is not None and (error := self._pending.exception()) is not None:
            # Logged, not raised: another error may be on its way out of the training loop.
            logger.warning("the last checkpoint could not be written: %s", error)
        self._trackers.close()
