"""What ends a run for good, each with the line that says so."""

from __future__ import annotations

from rayprune.config import Config
from rayprune.engine.protocol import PlanHeader, TrainingStopped


def nothing_to_train(config: Config, epoch: int, header: PlanHeader) -> TrainingStopped:
    """Return what ends a run whose selection is less than a batch, where such batches are dropped."""
    return TrainingStopped(
        f"epoch {epoch} keeps {header.num_kept} samples, less than train.batch_size {config.train.batch_size}, and "
        "train.last_batch is drop: use train.last_batch=pad"
    )


def too_many_nonfinite(config: Config, count: int, ids: list[int], on_all_ranks: bool) -> TrainingStopped:
    """Return what ends a run whose losses diverge."""
    return TrainingStopped(
        f"training stopped: {count} losses were NaN or infinite, more than train.max_nonfinite "
        f"{config.train.max_nonfinite}; first sample ids {ids[:5]}: lower optim.lr, set train.clip_norm, or "
        "look at these samples",
        on_all_ranks,
    )
