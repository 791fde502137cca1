"""The network of the runs under test, which logs the progress of training. Configs name it by its path.

It writes into the folder named by the environment variable WATCH_FOLDER, so that the config is the same in every run:
`rank-<r>.pid` holds the process id of a rank, and rank 0 appends a line `epoch step nanoseconds pid` to `steps` at each
training step.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import ray.train
import torch
from torch import nn

from rayprune.nn.augment import step_seed

WATCH_FOLDER = "RAYPRUNE_KILLS_WATCH"
# Long enough for a kill to hit the intended step.
PAUSE_S = 0.05
HIDDEN = 384
_SEED, _EPOCHS, _STEPS = 0, 64, 256


def watched(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build an MLP with batch normalization that logs every training step."""
    inputs = math.prod(input_shape)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes)
    )
    folder = os.environ.get(WATCH_FOLDER)
    if folder is not None:
        model.register_forward_pre_hook(_Watch(Path(folder)))
    return model


class _Watch:
    """A forward hook that recognizes the step by the seed that the engine sets before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank = -1
        self._step_of: dict[int, tuple[int, int]] = {}

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not module.training or not ray.train.get_context():
            return
        if self._rank < 0:
            self._register(ray.train.get_context().get_world_rank())
        position = self._step_of.get(torch.initial_seed())
        if position is None:
            return  # not a training step but a check of the model before the run
        if self._rank == 0:
            line = f"{position[0]} {position[1]} {time.monotonic_ns()} {os.getpid()}\n"
            with (self._folder / "steps").open("ab", buffering=0) as steps:
                steps.write(line.encode())
        time.sleep(PAUSE_S)

    def _register(self, rank: int) -> None:
        self._rank = rank
        positions = [(epoch, step) for epoch in range(_EPOCHS) for step in range(_STEPS)]
        self._step_of = {step_seed(_SEED, epoch, step, rank): (epoch, step) for epoch, step in positions}
        partial = self._folder / f"rank-{rank}.{os.getpid()}"
        partial.write_text(str(os.getpid()))
        partial.rename(self._folder / f"rank-{rank}.pid")
