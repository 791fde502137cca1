"""What a checkpoint costs training: the copy that it waits for, and the writing that goes on beside it.

ResNet-18 of CIFAR-10 with SGD's momentum (90 MB), a score table of four columns over 50,000 samples, a local disk.
"""

from __future__ import annotations

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
    """Yield the seconds of both."""
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
            writes.append(
                seconds(
                    lambda number=number, state=state: write_checkpoint(  # type: ignore[misc]
                        Path(folder),
                        number,
                        model=state.model,
                        trainer=state.trainer,
                        selector=state.selector,
                        position={},
                    )
                )
            )
        saver.close()
    yield Figure("checkpoint of ResNet-18: the copy that training waits for, s", copies[1:])
    yield Figure("checkpoint of ResNet-18: written beside training, s", writes[1:])
