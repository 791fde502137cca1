"""What a worker writes and reads back: checkpoints, metrics.jsonl, TensorBoard, reports to Ray Train.

Every rank holds a Saver; only rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
from numpy.typing import NDArray
from ray.train.v2.api.report_config import CheckpointUploadMode

from rayprune.config import Config
from rayprune.engine.checkpoint import (
    checkpoint_path,
    load_tensors,
    newest_checkpoint,
    read_position,
    remove_old_checkpoints,
    write_checkpoint,
)
from rayprune.engine.run_folder import append_metrics, mend_metrics

_COUNTS = ("samples_trained", "samples_forwarded", "samples_padded")


class Saver:
    """Keep a run's counts and files; restore them from a checkpoint."""

    def __init__(self, run_folder: Path, config: Config, fingerprint: str, rank: int) -> None:
        self._folder, self._config, self._fingerprint, self._rank = run_folder, config, fingerprint, rank
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._wall_before = 0.0
        self._started = time.perf_counter()
        self._board: Any = None

    def newest_epoch(self) -> int:
        """Return the epoch that the newest sound checkpoint leads to; 0 without one."""
        folder = newest_checkpoint(self._folder)
        return 0 if folder is None else int(read_position(folder)["epoch"])

    def restore(
        self, epoch: int, network: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        """Load the state before `epoch` into network, optimiser and counts.

        Raises:
            ValueError: the checkpoint is of another data set or configuration.
        """
        folder = checkpoint_path(self._folder, epoch)
        position = read_position(folder)
        for name, own in (("fingerprint", self._fingerprint), ("digest", self._config.digest())):
            if position[name] != own:
                raise ValueError(f"checkpoint {folder} is of another run: {name} {position[name]}, here {own}")
        network.load_state_dict(load_tensors(folder / "model.pt", device))
        optimizer.load_state_dict(load_tensors(folder / "trainer.pt", device)["optimizer"])
        self._counts = {name: int(position["counts"][name]) for name in _COUNTS}
        self._wall_before = float(position["wall_time"])
        if self._rank == 0:
            mend_metrics(self._folder, position["metrics"])

    def count(self, trained: int, forwarded: int, padded: int) -> dict[str, int]:
        """Add an epoch's rows and return the cumulative counts."""
        for name, rows in zip(_COUNTS, (trained, forwarded, padded), strict=True):
            self._counts[name] += rows
        return dict(self._counts)

    def save(
        self,
        epoch: int,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        selector: Mapping[str, NDArray[Any]],
        metrics: dict[str, Any],
        seconds: dict[str, float],
    ) -> None:
        """Write the checkpoint of the state before `epoch` (rank 0), with the metrics line that follows it."""
        position = {
            "fingerprint": self._fingerprint,
            "digest": self._config.digest(),
            "counts": self._counts,
            "wall_time": self._wall_time(),
            "metrics": {**metrics, "seconds": seconds, "wall_time": self._wall_time()},
        }
        write_checkpoint(
            self._folder,
            epoch,
            model=network.state_dict(),
            trainer={"optimizer": optimizer.state_dict()},
            selector=selector,
            position=position,
        )

    def report(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Tell Ray Train (a barrier of all ranks); the files are in its folder already."""
        checkpoint = None
        if self._rank == 0:
            checkpoint = ray.train.Checkpoint.from_directory(str(checkpoint_path(self._folder, epoch)))
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if self._config.scaling.num_workers == 0:  # Ray Train deletes old ones itself, but not in its local mode
            remove_old_checkpoints(self._folder, self._config.run.keep_checkpoints)

    def append_metrics(self, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Write the epoch's line to metrics.jsonl and TensorBoard (rank 0)."""
        rounded = {name: round(value, 6) for name, value in seconds.items()}
        append_metrics(self._folder, {**metrics, "seconds": rounded, "wall_time": round(self._wall_time(), 3)})
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"))
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "epoch":
                self._board.add_scalar(name, value, metrics["epoch"])
        for name, value in rounded.items():
            self._board.add_scalar(f"seconds/{name}", value, metrics["epoch"])
        self._board.flush()

    def _wall_time(self) -> float:
        return self._wall_before + time.perf_counter() - self._started
