"""Cost of a checkpoint: the copy that blocks training, and the write in the background.

ResNet-18 for CIFAR-10 with SGD momentum (90 MB), a score table of four columns over 50,000 samples, a local disk.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Figure, seconds
from rayprune.config import make_config
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.engine.storage.checkpoint_writer import CheckpointWriter
from rayprune.nn.models import build_model
from rayprune.nn.steps import PlainStep

SAMPLES, COLUMNS, REPETITIONS = 50_000, 4, 5


def figures() -> Iterator[Figure]:
    """Yield the seconds of the copy and of the write."""
    network = build_model("resnet18", num_classes=10, input_shape=(3, 32, 32))
    step = PlainStep(network, torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9))
    step(torch.rand(8, 3, 32, 32), torch.arange(8), torch.ones(8))
    table = {f"column{number}": np.zeros(SAMPLES, np.float32) for number in range(COLUMNS)}
    copies, writes = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointWriter(Path(folder), make_config({"run": {"name": "saving"}}), 0, fingerprint="", shuffle="")
        for number in range(REPETITIONS + 1):
            copies.append(seconds(lambda: saver.copy_state(network, step, table)))
            state = saver.copy_state(network, step, table)
            parts = {"model": state.model, "trainer": state.trainer, "selector": state.selector, "position": {}}
            writes.append(seconds(functools.partial(write_checkpoint, Path(folder), number, **parts)))
        saver.close()
    yield Figure("checkpoint of ResNet-18: blocking copy, s", copies[1:])
    yield Figure("checkpoint of ResNet-18: background write, s", writes[1:])
