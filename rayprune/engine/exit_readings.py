"""What every exit of a network says of every sample: one pass in eval mode, without augmentation, in full precision.

Shapes: K exits, N samples, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rayprune.engine.ahead import ahead
from rayprune.engine.setup import InputSpec
from rayprune.sources import SampleSource

_BEST = 5  # top-5; of fewer classes, all of them


@dataclass(frozen=True)
class ExitReadings:
    """What the exits say of N samples, in the order of their ids.

    Attributes:
        confidences: (K, N) float32, largest softmax probability.
        correct: (K, N) bool, whether the most probable class is the label.
        among_best: (K, N) bool, whether the label is among the five most probable classes.
        losses: (K, N) float32, plain cross-entropy.
    """

    confidences: NDArray[np.float32]
    correct: NDArray[np.bool_]
    among_best: NDArray[np.bool_]
    losses: NDArray[np.float32]


@torch.inference_mode()
def read_exits(
    network: nn.Module, source: SampleSource, spec: InputSpec, device: torch.device, batch_size: int
) -> ExitReadings:
    """Send all samples of a source through all exits.

    Args:
        network: in eval mode on the device; its forward returns K tensors (B, C).
        source: labelled samples.
        spec: what the inputs look like.
        device: where to compute.
        batch_size: rows at a time; decides nothing but speed and memory.
    """
    source.prepare()
    read = []
    for inputs, labels_B in _batches(source, spec, batch_size):
        images = torch.from_numpy(inputs).to(device)
        logits_KBC = torch.stack([logits.float() for logits in network(spec.augment.evaluate(images))])
        read.append([part.cpu() for part in _judged(logits_KBC, torch.from_numpy(labels_B).to(device))])
    parts = [torch.cat(batches, dim=1).numpy() for batches in zip(*read, strict=True)]
    return ExitReadings(*parts)


def _judged(logits_KBC: Tensor, labels_B: Tensor) -> tuple[Tensor, ...]:
    num_exits, _, num_classes = logits_KBC.shape
    labels_KB = labels_B.expand(num_exits, -1)
    confidences_KB, answers_KB = logits_KBC.softmax(dim=2).max(dim=2)
    best_KBJ = logits_KBC.topk(min(_BEST, num_classes), dim=2).indices
    losses_KB = functional.cross_entropy(logits_KBC.transpose(1, 2), labels_KB, reduction="none")
    return confidences_KB, answers_KB == labels_KB, (best_KBJ == labels_KB[:, :, None]).any(dim=2), losses_KB


def _batches(
    source: SampleSource, spec: InputSpec, batch_size: int
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.int64]]]:
    """Yield (inputs, labels); a thread reads the next batch while this one is computed."""

    def read(start: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        rows = source.take(np.arange(start, min(start + batch_size, len(source)), dtype=np.int64))
        # Rows out of a memory map are read-only, which torch does not take.
        return np.require(rows[spec.column], requirements=["C", "W"]), rows["label"].astype(np.int64)

    yield from ahead(map(read, range(0, len(source), batch_size)), 1, "rayprune-evaluate")
