"""A small run for the tests of the ScoreActor and its sessions: InfoBatch with a moving average on 41 digits.

A moving average shows every observation that is folded twice or in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.engine.scoring.messages import PlanPass, Push, pack
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.methods import InfoBatch
from rayprune.sources import open_data
from tests.support.runs import losses_of, pass_of

NUM_SAMPLES, NUM_EPOCHS, BATCH, RANKS, SEED = 41, 4, 8, 2, 3
METHOD = InfoBatch(prune_ratio=0.5, ema=0.5, anneal_start=1.0)
SOURCE = open_data("digits", limit=NUM_SAMPLES).train


def make_spec(folder: Path) -> ScoreSpec:
    """Return what the run's actor is built from."""
    return ScoreSpec(METHOD.to_config(), SOURCE, 0, NUM_EPOCHS, SEED, BATCH, "pad", 64, str(folder), NUM_EPOCHS)


def train_pass(epoch: int, generation: int = 1) -> PlanPass:
    """Return the training pass of an epoch."""
    return pass_of(epoch, "train", RANKS, generation=generation)


def make_push(sequence: int, ids: NDArray[np.int64], epoch: int) -> Push:
    """Return a push of rank 0 with the epoch's losses of these samples."""
    return Push(0, sequence, *pack(ids, {"loss": losses_of(epoch, NUM_SAMPLES)[ids]}))


def save(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write a checkpoint that holds the Selector's state alone."""
    write_checkpoint(folder, epoch, model={}, trainer={}, selector=state, position={})
