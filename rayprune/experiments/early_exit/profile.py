"""What every exit of a network says of every sample: one pass in eval mode, without augmentation, in full precision.

Shapes: K exits, N samples, B batch, C classes.

How long a network takes to each of its exits, measured: multiply-adds are not seconds.

What an evaluation of exits leaves in the run folder.

    <run>/exits/thresholds.json   for each budget p: the thresholds, the samples that they were found on
    <run>/exits/anytime.csv       a row an exit: multiply-adds, accuracy, loss
    <run>/exits/dynamic.csv       a row a budget: accuracy against multiply-adds, share of samples an exit
    <run>/exits/latency.csv       a row an exit and batch size: measured seconds

Each names the checkpoint that it is of; what another checkpoint left is deleted, so that no picture mixes two.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rayprune.engine.data.transport import prefetch
from rayprune.engine.train.build import InputSpec
from rayprune.errors import ConfigError
from rayprune.nn.models.multi_exit import MultiExitModel
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

    yield from prefetch(map(read, range(0, len(source), batch_size)), 1, "rayprune-evaluate")


_WARM_UP, _LEAST, _MOST = 3, 5, 50  # rounds
_LONGEST_S = 10.0  # for all rounds of one batch size


@dataclass(frozen=True)
class Latency:
    """Repeated forwards of one batch up to one exit.

    Attributes:
        exit: from 1.
        batch: rows a forward.
        repeats: how many were timed.
        median_s: of the repeats.
        low_s, high_s: their quartiles.
    """

    exit: int
    batch: int
    repeats: int
    median_s: float
    low_s: float
    high_s: float


def lazy(network: nn.Module) -> bool:
    """Tell whether a network can be computed exit by exit: see `rayprune.nn.models.multi_exit`."""
    return isinstance(network, MultiExitModel)


@torch.inference_mode()
def measure_latency(
    network: nn.Module, input_shape: tuple[int, ...], num_exits: int, device: torch.device, batch: int
) -> list[Latency]:
    """Time forwards of made-up inputs up to each exit, in turns, so that a drift of the clock touches all alike.

    A network that is not lazy can't stop early: each of its exits takes the whole forward.

    Args:
        network: in eval mode on the device.
        input_shape: of one sample.
        num_exits: K.
        device: where it computes.
        batch: rows a forward.

    Returns:
        One an exit.
    """
    inputs = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    if inputs.ndim == 4:
        inputs = inputs.to(memory_format=torch.channels_last)  # as evaluated batches come
    forwards: list[Callable[[Tensor], object]] = [network]
    if isinstance(network, MultiExitModel):
        forwards = [_up_to(network, exit_) for exit_ in range(num_exits)]
    seconds: list[list[float]] = [[] for _ in forwards]
    begun = time.perf_counter()
    for number in range(_WARM_UP + _MOST):
        for forward, timed in zip(forwards, seconds, strict=True):
            timed.append(_timed(forward, inputs, device))
        if number + 1 >= _WARM_UP + _LEAST and time.perf_counter() - begun > _LONGEST_S:
            break
    found = seconds if len(seconds) == num_exits else seconds * num_exits
    return [_summary(exit_, batch, timed[_WARM_UP:]) for exit_, timed in enumerate(found, start=1)]


def _up_to(network: MultiExitModel, last: int) -> Callable[[Tensor], object]:
    def forward(inputs: Tensor) -> Tensor:
        state = network.begin(inputs)
        for exit_ in range(last + 1):
            logits, state = network.advance(exit_, state)
        return logits

    return forward


def _timed(forward: Callable[[Tensor], object], inputs: Tensor, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    forward(inputs)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(exit_: int, batch: int, seconds: list[float]) -> Latency:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Latency(exit_, batch, len(seconds), median, low, high)


FOLDER = "exits"
_THRESHOLDS = "thresholds.json"
_DRAWN = "accuracy_macs.png"


def clear_others(run_folder: Path, checkpoint: str) -> None:
    """Make <run>/exits, and delete there what an evaluation of another checkpoint left."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    files = [*folder.glob("*.csv"), folder / _THRESHOLDS]
    others = [file for file in files if file.exists() and _checkpoint_of(file) != checkpoint]
    for file in [*others, *([folder / _DRAWN] if others else [])]:
        file.unlink(missing_ok=True)


def write_rows(run_folder: Path, name: str, checkpoint: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write <run>/exits/NAME.csv: the checkpoint, then the rows' own columns."""
    file = run_folder / FOLDER / f"{name}.csv"
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["checkpoint", *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"checkpoint": checkpoint, **row} for row in rows)
    return partial.replace(file)


def write_thresholds(run_folder: Path, facts: Mapping[str, Any], thresholds: Mapping[int, NDArray[np.float32]]) -> Path:
    """Write <run>/exits/thresholds.json.

    Args:
        run_folder: of the run.
        facts: what else the file says: checkpoint, model, what the thresholds were found on.
        thresholds: budget → (K,) float32 with −inf for the last exit, which the file leaves out; JSON has no
            infinity, and +inf is null there.
    """
    budgets = [
        {"p": budget, "thresholds": [None if np.isinf(value) else float(value) for value in found[:-1]]}
        for budget, found in thresholds.items()
    ]
    file = run_folder / FOLDER / _THRESHOLDS
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**facts, "budgets": budgets}, indent=1) + "\n")
    return partial.replace(file)


def read_thresholds(run_folder: Path | str, budget: int) -> NDArray[np.float32]:
    """Return the thresholds that an evaluation found for a budget.

    Args:
        run_folder: of a run that was evaluated.
        budget: p, 1..39.

    Returns:
        (K,) float32: +inf where nobody leaves, −inf at the last exit.

    Raises:
        ValueError: the run has none.
    """
    file = Path(run_folder) / FOLDER / _THRESHOLDS
    if not file.exists():
        raise ConfigError(f"{run_folder} has no thresholds yet: rayprune evaluate {run_folder} --mode dynamic")
    stored = {entry["p"]: entry["thresholds"] for entry in json.loads(file.read_text())["budgets"]}
    if budget not in stored:
        raise ConfigError(f"{file} has no budget p = {budget}: it has {min(stored)} to {max(stored)}")
    return np.array([np.inf if value is None else value for value in stored[budget]] + [-np.inf], np.float32)


def _checkpoint_of(file: Path) -> str | None:
    """Return the checkpoint that a file is of; None for one that can't be read."""
    try:
        if file.suffix == ".json":
            return str(json.loads(file.read_text())["checkpoint"])
        with file.open(newline="") as stream:
            return next(csv.DictReader(stream), {}).get("checkpoint")
    except (ValueError, KeyError):
        return None
