"""Measure a network with several exits, and write and read the files of an evaluation.

Predictions come from one pass over the samples in eval mode, without augmentation, in full precision. Latency is
measured too, as it does not follow from multiply-adds.

    <run>/exits/thresholds.json   the thresholds for each budget p, and the samples that they were found on
    <run>/exits/anytime.csv       a row per exit: multiply-adds, accuracy, loss
    <run>/exits/dynamic.csv       a row per budget: multiply-adds, accuracy, share of samples at each exit
    <run>/exits/latency.csv       a row per exit and batch size: measured milliseconds

Each file names its checkpoint. Files of another checkpoint are deleted, so that no plot mixes two checkpoints.

Shapes: K exits, N samples, B batch, C classes, R repeats.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rayprune.engine.data.transport import prefetch
from rayprune.engine.storage.run_folder import write_whole
from rayprune.engine.train.build import InputSpec
from rayprune.errors import ConfigError, RunFolderError
from rayprune.nn.models.multi_exit import MultiExitModel
from rayprune.paths import as_path
from rayprune.sources import SampleSource

_TOP = 5  # top-5 accuracy, or all classes if there are fewer


@dataclass(frozen=True)
class ExitReadings:
    """Predictions of the exits for N samples, in the order of their ids.

    Attributes:
        confidences: (K, N) float32, largest softmax probability.
        correct: (K, N) bool, whether the most probable class is the label.
        in_top5: (K, N) bool, whether the label is among the five most probable classes.
        losses: (K, N) float32, cross-entropy.
    """

    confidences: NDArray[np.float32]
    correct: NDArray[np.bool_]
    in_top5: NDArray[np.bool_]
    losses: NDArray[np.float32]


@torch.inference_mode()
def read_exits(
    network: nn.Module, source: SampleSource, spec: InputSpec, device: torch.device, batch_size: int
) -> ExitReadings:
    """Return the predictions of all exits for all samples of a source.

    Args:
        network: in eval mode on the device; its forward returns K tensors (B, C).
        source: labeled samples.
        spec: the network's inputs.
        device: of the network.
        batch_size: rows per forward pass; affects only speed and memory.
    """
    source.prepare()
    batches = []
    for inputs, labels_B in _batches(source, spec, batch_size):
        images = torch.from_numpy(inputs).to(device)
        logits_KBC = torch.stack([logits.float() for logits in network(spec.augment.evaluate(images))])
        batches.append([part.cpu() for part in _predictions(logits_KBC, torch.from_numpy(labels_B).to(device))])
    return ExitReadings(*(torch.cat(parts, dim=1).numpy() for parts in zip(*batches, strict=True)))


def _predictions(logits_KBC: Tensor, labels_B: Tensor) -> tuple[Tensor, ...]:
    num_exits, _, num_classes = logits_KBC.shape
    labels_KB = labels_B.expand(num_exits, -1)
    confidences_KB, classes_KB = logits_KBC.softmax(dim=2).max(dim=2)
    top_KBJ = logits_KBC.topk(min(_TOP, num_classes), dim=2).indices
    losses_KB = functional.cross_entropy(logits_KBC.transpose(1, 2), labels_KB, reduction="none")
    return confidences_KB, classes_KB == labels_KB, (top_KBJ == labels_KB[:, :, None]).any(dim=2), losses_KB


def _batches(
    source: SampleSource, spec: InputSpec, batch_size: int
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.int64]]]:
    """Yield (inputs, labels); a thread reads the next batch during the computation."""

    def read(start: int) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        rows = source.take(np.arange(start, min(start + batch_size, len(source)), dtype=np.int64))
        # Rows of a memory map are read-only, and torch requires writable arrays.
        return np.require(rows[spec.column], requirements=["C", "W"]), rows["label"].astype(np.int64)

    yield from prefetch(map(read, range(0, len(source), batch_size)), 1, "rayprune-evaluate")


_WARM_UP, _MIN_ROUNDS, _MAX_ROUNDS = 3, 5, 50
_LIMIT_S = 10.0  # after the minimum, for all rounds of one batch size


@torch.inference_mode()
def measure_latency(
    network: nn.Module, input_shape: tuple[int, ...], num_exits: int, device: torch.device, batch: int
) -> NDArray[np.float64]:
    """Time forward passes of random inputs up to each exit.

    Each round times every exit once, so that a change of the processor's clock rate affects all equally. A network that
    cannot stop early has the latency of the whole forward pass at each of its exits.

    Args:
        network: in eval mode on the device.
        input_shape: of one sample.
        num_exits: K.
        device: of the network.
        batch: rows per forward pass.

    Returns:
        (K, R) float64, in seconds.
    """
    inputs = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    if inputs.ndim == 4:
        inputs = inputs.to(memory_format=torch.channels_last)  # the layout of evaluated batches
    forwards: list[Callable[[Tensor], object]] = [network]
    if isinstance(network, MultiExitModel):
        forwards = [_forward_to(network, exit_) for exit_ in range(num_exits)]
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < _WARM_UP + _MAX_ROUNDS:
        rounds.append([_seconds(forward, inputs, device) for forward in forwards])
        if len(rounds) >= _WARM_UP + _MIN_ROUNDS and time.perf_counter() - start > _LIMIT_S:
            break
    seconds = np.array(rounds[_WARM_UP:]).T
    return np.broadcast_to(seconds, (num_exits, seconds.shape[1]))


def _forward_to(network: MultiExitModel, last: int) -> Callable[[Tensor], object]:
    def forward(inputs: Tensor) -> Tensor:
        state = network.begin(inputs)
        for exit_ in range(last + 1):
            logits, state = network.advance(exit_, state)
        return logits

    return forward


def _seconds(forward: Callable[[Tensor], object], inputs: Tensor, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    forward(inputs)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_FOLDER = "exits"
_THRESHOLDS = "thresholds.json"
_PLOT = "accuracy_macs.png"


def clear_others(run_folder: Path, checkpoint: str) -> None:
    """Create <run>/exits, and delete its files of another checkpoint."""
    folder = run_folder / _FOLDER
    folder.mkdir(exist_ok=True)
    files = [*folder.glob("*.csv"), *folder.glob(_THRESHOLDS)]
    others = [file for file in files if _checkpoint_of(file) != checkpoint]
    for file in [*others, *([folder / _PLOT] if others else [])]:
        file.unlink(missing_ok=True)


def _checkpoint_of(file: Path) -> str | None:
    """Return the checkpoint that a file names, or None if the file can't be read."""
    try:
        if file.suffix == ".json":
            return str(json.loads(file.read_text())["checkpoint"])
        with file.open("rb") as stream:
            return str(pd.read_csv(stream)["checkpoint"].iloc[0])
    except (ValueError, LookupError):
        return None


def write_rows(run_folder: Path, name: str, checkpoint: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write <run>/exits/NAME.csv: a column with the checkpoint, then the columns of the rows."""
    table = pd.DataFrame([{"checkpoint": checkpoint, **row} for row in rows])
    write_whole(run_folder / _FOLDER / f"{name}.csv", table.to_csv(index=False))


def write_thresholds(run_folder: Path, facts: Mapping[str, Any], thresholds: Mapping[int, NDArray[np.float32]]) -> None:
    """Write <run>/exits/thresholds.json.

    Args:
        run_folder: the run folder.
        facts: the file's other fields: checkpoint, model, the samples that the thresholds were found on.
        thresholds: budget → (K,) float32. The file omits the −inf of the last exit, and writes +inf as null, as JSON
            has no infinity.
    """
    budgets = [
        {"p": budget, "thresholds": [None if np.isinf(value) else float(value) for value in values[:-1]]}
        for budget, values in thresholds.items()
    ]
    text = json.dumps({**facts, "budgets": budgets}, indent=1)
    write_whole(run_folder / _FOLDER / _THRESHOLDS, text + "\n")


def read_thresholds(run_folder: Path | str, budget: int) -> NDArray[np.float32]:
    """Return the thresholds for a budget from the evaluation of a run.

    Args:
        run_folder: folder of an evaluated run.
        budget: p, 1..39.

    Returns:
        (K,) float32: +inf where no sample leaves, −inf at the last exit.

    Raises:
        RunFolderError: the run has no thresholds.
        ConfigError: it has none for this budget.
    """
    file = as_path(run_folder) / _FOLDER / _THRESHOLDS
    if not file.exists():
        raise RunFolderError(f"{run_folder} has no thresholds yet: rayprune evaluate {run_folder} --mode dynamic")
    stored = {entry["p"]: entry["thresholds"] for entry in json.loads(file.read_text())["budgets"]}
    if budget not in stored:
        raise ConfigError(f"{file} has no budget p = {budget}: it has {min(stored)} to {max(stored)}")
    return np.array([np.inf if value is None else value for value in stored[budget]] + [-np.inf], np.float32)
