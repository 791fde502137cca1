"""The predictions of a run's final network, in eval mode and full precision.

Shapes: N samples, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.engine.data.transport import prefetch
from rayprune.engine.storage.checkpoint import load_weights, usable_checkpoint
from rayprune.engine.train.build import InputSpec, build_network
from rayprune.errors import RunFolderError
from rayprune.sources import SampleSource

_BATCH = 64


def final_predictions(
    config: Config,
    source: SampleSource,
    spec: InputSpec,
    folder: Path,
    ids: NDArray[np.int64],
    *,
    device: torch.device | None = None,
    batch_size: int = _BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Return the final network's probabilities, (N, C), the last exit's if there are several.

    Args:
        config, spec, folder: the run's.
        source: its training samples.
        ids: (N,) the samples to predict.
        device: where to compute; the CPU by default.
        batch_size: rows per forward pass.
        on_batch: called with the number of samples that were predicted so far.

    Raises:
        RunFolderError: there is no intact checkpoint, or its weights do not fit the model.
    """
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, spec, device)
    if usable_checkpoint(folder, lambda checkpoint: load_weights(checkpoint, network, device)) is None:
        raise RunFolderError(f"{folder} has no usable checkpoint: train it again, rayprune train {folder}/config.yaml")
    network.eval()
    probs_NC, done = np.empty((ids.size, spec.num_classes)), 0
    with torch.inference_mode():
        for inputs in _inputs(source, spec.column, ids, batch_size):
            output = network(spec.augment.evaluate(torch.from_numpy(inputs).to(device)))
            logits_BC = output[-1] if isinstance(output, list | tuple) else output
            probs_NC[done : done + len(inputs)] = logits_BC.double().softmax(dim=1).cpu().numpy()
            done += len(inputs)
            if on_batch is not None:
                on_batch(done)
    return probs_NC


def _inputs(
    source: SampleSource, column: str, ids: NDArray[np.int64], batch_size: int
) -> Iterator[NDArray[np.generic]]:
    """Yield the inputs of a batch; a thread reads the next one during the computation."""

    def read(start: int) -> NDArray[np.generic]:
        # Rows of a memory map are read-only, and torch requires writable arrays.
        return np.require(source.take(ids[start : start + batch_size])[column], requirements=["C", "W"])

    yield from prefetch(map(read, range(0, len(ids), batch_size)), 1, "rayprune-predict")
