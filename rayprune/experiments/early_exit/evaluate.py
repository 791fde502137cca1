"""Evaluate a trained network with several exits: each exit by itself (anytime), and samples that leave early (dynamic).

Thresholds are found on training samples that the run was not trained on and judged on others, never on those that they
were found on: `data.hold_out` for the first, the source's own validation part for the second.

Shapes: K exits, N samples.

A trained network and its data, out of a run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rayprune.config import Config, make_config
from rayprune.config.yaml import read_yaml
from rayprune.core.references import closest
from rayprune.engine.storage.checkpoint import load_tensors, newest_checkpoint, read_position
from rayprune.engine.train.build import InputSpec, build_network
from rayprune.engine.train.preflight import input_spec
from rayprune.errors import ConfigError
from rayprune.experiments.early_exit.profile import (
    ExitReadings,
    clear_others,
    lazy,
    measure_latency,
    read_exits,
    write_rows,
    write_thresholds,
)
from rayprune.experiments.early_exit.thresholds import BUDGETS, evaluate_dynamic, exit_quotas, find_thresholds
from rayprune.nn.early_exit import count_exits
from rayprune.nn.flops import exit_macs, num_macs
from rayprune.sources import SampleSource, Splits, open_data


@dataclass(frozen=True)
class TrainedRun:
    """What a run has come to so far.

    Attributes:
        folder: of the run.
        config: its own.
        checkpoint: name of the newest one.
        epochs, steps: trained: whole epochs, and steps of the next one.
        network: with the checkpoint's weights, in eval mode on the device.
        input: what its inputs look like.
        held_out: training samples that it was not trained on (`data.hold_out`).
        validation: the source's own validation part.
        device: where the network is.
    """

    folder: Path
    config: Config
    checkpoint: str
    epochs: int
    steps: int
    network: nn.Module
    input: InputSpec
    held_out: SampleSource | None
    validation: SampleSource | None
    device: torch.device

    @property
    def trained(self) -> str:
        """How far it is trained, in words."""
        total = self.config.train.epochs
        if not self.steps:
            return f"after {self.epochs} of {total} epochs"
        return f"after {self.epochs} of {total} epochs and {self.steps} steps of the next"

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.epochs >= self.config.last_epoch


def open_run(folder: Path, device: torch.device) -> TrainedRun:
    """Open a run's network as its newest sound checkpoint has it, and the data that it was trained on.

    Raises:
        ValueError: no run, no checkpoint, or data or a network that are not the run's; one line with the cure.
    """
    config = _config_of(folder)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(
            f"{folder} holds no sound checkpoint yet: train it first, rayprune train {folder}/config.yaml"
        )
    position, weights = _read(checkpoint, device)
    if position["digest"] != config.digest():
        raise ConfigError(
            f"{folder}/config.yaml is not what its checkpoints were trained with (config {config.digest()}, they are "
            f"of {position['digest']}): restore it"
        )
    splits, validation = _data(config, folder, position)
    spec = input_spec(config, splits.train)
    network = build_network(config, spec, device)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the weights in {checkpoint} don't fit model {config.model.name!r} ({line}): bring back the code that it "
            "was trained with"
        ) from None
    return TrainedRun(
        folder=folder,
        config=config,
        checkpoint=checkpoint.name,
        epochs=int(position["epoch"]),
        steps=int(position["step"]),
        network=network.eval(),
        input=spec,
        held_out=None if config.data.hold_out is None else splits.validation,
        validation=validation,
        device=device,
    )


def find_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is the GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} can't be used: torch finds no GPU here, give --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend has its own
        line = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(
            f"device {name!r} can't be used ({line}): give --device cpu, or cuda where there is"
        ) from None
    return device


def _config_of(folder: Path) -> Config:
    stored = folder / "config.yaml"
    if not stored.is_file():
        known = {
            "sweep.yaml": "a sweep: name one of its trials/",
            "compare.yaml": "a comparison: name one of its runs/",
        }
        what = next((text for name, text in known.items() if (folder / name).exists()), None)
        reason = f"is {what}" if what else "is no run folder (it has no config.yaml): name one, such as runs/NAME"
        raise ConfigError(f"{folder} {reason}")
    try:
        return make_config(read_yaml(stored.read_text()) or {})
    except (OSError, ValueError) as error:
        raise ConfigError(f"{stored} can't be read ({' '.join(str(error).split())}): restore it") from None


def _data(config: Config, folder: Path, position: Mapping[str, Any]) -> tuple[Splits, SampleSource | None]:
    """Return the run's parts, and the source's own validation part."""
    data = config.data
    keys: dict[str, Any] = {"limit": data.limit, "cache": data.cache, **data.source_keys}
    try:
        splits = open_data(data.source, hold_out=data.hold_out, **keys)
        validation = splits.validation if data.hold_out is None else open_data(data.source, **keys).validation
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(
            f"the data of {folder} can't be opened ({line}): bring it back, or say in {folder}/config.yaml where it is"
        ) from None
    ours, theirs = splits.train.fingerprint, position["fingerprint"]
    if ours != theirs:
        raise ConfigError(
            f"{folder} was trained on other data (fingerprint {theirs[:12]}, here {ours[:12]}): bring that data back"
        )
    return splits, validation


def _read(checkpoint: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's position and weights."""
    try:
        return read_position(checkpoint), load_tensors(checkpoint / "model.pt", device)
    except FileNotFoundError:
        raise ConfigError(f"{checkpoint} was just replaced by a newer one: the run is training, try again") from None


Mode = Literal["anytime", "dynamic"]
MODES = ("anytime", "dynamic")
Row = dict[str, Any]
LATENCY_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """What was found, as it was written.

    Attributes:
        run: what was evaluated.
        macs: (K,) cumulative multiply-adds of one sample that leaves at each exit.
        part: the samples that accuracies are of, in words.
        anytime, dynamic, latency: the rows of the CSV files; empty where it was not asked for.
    """

    run: TrainedRun
    macs: list[int]
    part: str
    anytime: list[Row]
    dynamic: list[Row]
    latency: list[Row]


def evaluate(
    folder: Path,
    mode: Mode | None,
    device: torch.device,
    *,
    batch_size: int = 256,
    on_notice: Callable[[str], None],
) -> Evaluation:
    """Evaluate the newest checkpoint of a run, and write what was found to <run>/exits/.

    Args:
        folder: of the run.
        mode: None does both, or leaves out with a notice what this run's data don't allow.
        device: where to compute.
        batch_size: rows at a time.
        on_notice: called with lines that a person should see.

    Raises:
        ValueError: it can't be evaluated; one line with the cure.
    """
    if mode is not None and mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}: {closest(mode, MODES)}")
    run = open_run(folder, device)
    _check_exits(run)
    test, part = _tested_on(run)
    if (reason := _why_not_dynamic(run)) and mode == "dynamic":
        raise ConfigError(reason)
    if not run.finished:
        on_notice(f"the run is not finished: this is its network {run.trained}")
    if reason and mode is None:
        on_notice(f"only anytime: {reason}")
    macs = _macs(run)
    readings = read_exits(run.network, test, run.input, device, batch_size)
    clear_others(folder, run.checkpoint)
    anytime, dynamic = [], []
    if mode != "dynamic":
        anytime = _anytime(readings, macs)
        write_rows(folder, "anytime", run.checkpoint, anytime)
    if mode != "anytime" and not reason:
        dynamic = _dynamic(run, macs, readings, test, batch_size)
        write_rows(folder, "dynamic", run.checkpoint, dynamic)
    latency = [row for batch in (1, LATENCY_BATCH) for row in _latency(run, macs, batch)]
    write_rows(folder, "latency", run.checkpoint, latency)
    return Evaluation(run, macs, part, anytime, dynamic, latency)


def _check_exits(run: TrainedRun) -> None:
    name = run.config.model.name
    try:
        num_exits = count_exits(run.network, run.input.shape)
    except ValueError as error:
        raise ConfigError(f"model {name!r} can't be evaluated: {error}") from None
    if num_exits == 1:
        raise ConfigError(f"model {name!r} has one exit: rayprune evaluate is for several, such as model.name=msdnet")


def _macs(run: TrainedRun) -> list[int]:
    """Return the cumulative multiply-adds of each exit; of the whole forward where a network can't stop early."""
    if lazy(run.network):
        return exit_macs(run.network, run.input.shape)
    whole = num_macs(run.network, torch.zeros(1, *run.input.shape, device=run.device))
    return [whole] * count_exits(run.network, run.input.shape)


def _why_not_dynamic(run: TrainedRun) -> str | None:
    if not lazy(run.network):
        return (
            f"model {run.config.model.name!r} can't stop early, each exit takes the whole forward: give it num_exits, "
            "begin(inputs) -> state and advance(exit, state) -> (logits, state)"
        )
    if run.held_out is None:
        return (
            f"{run.folder} was trained on all training samples, and thresholds need some that it has not seen: set "
            "data.hold_out=0.1 and train again"
        )
    if run.validation is None:
        return (
            f"data.source {run.config.data.source!r} has no validation part of its own to judge thresholds on: give it "
            "one and train again"
        )
    return None


def _tested_on(run: TrainedRun) -> tuple[SampleSource, str]:
    """Return the samples that accuracies are measured on, and what they are in words."""
    if run.validation is not None:
        return run.validation, f"the {len(run.validation):,} validation samples of {run.config.data.source}"
    if run.held_out is not None:
        return run.held_out, f"the {len(run.held_out):,} training samples held out"
    raise ConfigError(
        f"data.source {run.config.data.source!r} has no validation part, and the run held nothing out: set "
        "data.hold_out=0.1 and train again"
    )


def _anytime(readings: ExitReadings, macs: list[int]) -> list[Row]:
    return [
        {
            "exit": exit_ + 1,
            "macs": macs[exit_],
            "top1": float(readings.correct[exit_].mean()),
            "top5": float(readings.among_best[exit_].mean()),
            "loss": float(readings.losses[exit_].mean(dtype=np.float64)),
            "samples": readings.losses.shape[1],
        }
        for exit_ in range(len(macs))
    ]


def _dynamic(
    run: TrainedRun, macs: list[int], readings: ExitReadings, test: SampleSource, batch_size: int
) -> list[Row]:
    """Find the thresholds, write them, and return what each budget's give."""
    assert run.held_out is not None, "a run that held nothing out was refused"
    held = read_exits(run.network, run.held_out, run.input, run.device, batch_size)
    thresholds = {budget: find_thresholds(held.confidences, budget) for budget in BUDGETS}
    write_thresholds(run.folder, _facts(run, macs, run.held_out, test), thresholds)
    return [_budget_row(budget, found, readings, held, macs) for budget, found in thresholds.items()]


def _budget_row(
    budget: int, thresholds: NDArray[np.float32], test: ExitReadings, held: ExitReadings, macs: list[int]
) -> Row:
    costs = np.array(macs, np.float64)
    on_test = evaluate_dynamic(test.confidences, test.correct, thresholds, costs)
    on_held = evaluate_dynamic(held.confidences, held.correct, thresholds, costs)
    quotas = exit_quotas(budget, len(macs), held.correct.shape[1])
    return {
        "p": budget,
        "macs": on_test.cost,
        "top1": on_test.accuracy,
        **{f"share_{number}": float(share) for number, share in enumerate(on_test.shares, start=1)},
        "samples": test.correct.shape[1],
        "held_out_macs": on_held.cost,
        "held_out_top1": on_held.accuracy,
        **{f"held_out_quota_{number}": int(quota) for number, quota in enumerate(quotas, start=1)},
        "held_out_samples": held.correct.shape[1],
    }


def _facts(run: TrainedRun, macs: list[int], held_out: SampleSource, test: SampleSource) -> Mapping[str, Any]:
    return {
        "checkpoint": run.checkpoint,
        "epochs": run.epochs,
        "steps": run.steps,
        "config": run.config.digest(),
        "model": run.config.model.model_dump(mode="json"),
        "num_exits": len(macs),
        "macs": macs,
        "found_on": {"samples": len(held_out), "fingerprint": held_out.fingerprint},
        "tested_on": {"samples": len(test), "fingerprint": test.fingerprint},
        "confidence": "largest softmax probability, full precision",
        "rule": "leave at the first exit whose threshold the confidence reaches; null: nobody; the last takes the rest",
    }


def _latency(run: TrainedRun, macs: list[int], batch: int) -> list[Row]:
    timed = measure_latency(run.network, run.input.shape, len(macs), run.device, batch)
    return [
        {
            "exit": each.exit,
            "macs": macs[each.exit - 1],
            "batch": each.batch,
            "repeats": each.repeats,
            "median_ms": each.median_s * 1e3,
            "low_ms": each.low_s * 1e3,
            "high_ms": each.high_s * 1e3,
            "device": device_name(run.device),
            "threads": torch.get_num_threads() if run.device.type == "cpu" else 0,
        }
        for each in timed
    ]


def device_name(device: torch.device) -> str:
    """Return what a device is called: the GPU's name, or its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
