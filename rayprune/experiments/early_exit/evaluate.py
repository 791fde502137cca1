"""Evaluate a trained network with several exits: each exit on all samples (anytime), and early exit (dynamic).

The thresholds of early exit are found on held-out training samples (`data.hold_out`), and evaluated on the source's own
validation part.

Shapes: K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rayprune.config import Config
from rayprune.config.code import Trust
from rayprune.core.references import closest
from rayprune.engine.storage.checkpoint import load_weights, newest_checkpoint, read_position, usable_checkpoint
from rayprune.engine.storage.stored_config import read_trusted
from rayprune.engine.train.build import InputSpec, build_network
from rayprune.engine.train.driver import open_splits
from rayprune.engine.train.preflight import input_spec
from rayprune.errors import ConfigError, DataError, RunFolderError, one_line
from rayprune.experiments.early_exit.profile import (
    ExitReadings,
    clear_others,
    measure_latency,
    read_exits,
    write_rows,
    write_thresholds,
)
from rayprune.experiments.early_exit.thresholds import BUDGETS, evaluate_dynamic, exit_quotas, find_thresholds
from rayprune.nn.early_exit import count_exits
from rayprune.nn.flops import exit_macs, num_macs
from rayprune.nn.models.multi_exit import MultiExitModel
from rayprune.sources import SampleSource, Splits

Mode = Literal["anytime", "dynamic"]
Row = dict[str, Any]
_LATENCY_BATCHES = (1, 64)


@dataclass(frozen=True)
class TrainedRun:
    """A run at its newest checkpoint.

    Attributes:
        folder: the run folder.
        config: the run's config.
        checkpoint: name of the checkpoint.
        epochs, steps: completed epochs, and completed steps of the next one.
        network: with the checkpoint's weights, in eval mode on the device.
        input: the network's inputs.
        held_out: training samples that the run was not trained on (`data.hold_out`), or None.
        validation: the source's own validation part, or None.
        device: of the network.
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
    def progress(self) -> str:
        """The completed part of the training, in words."""
        steps = f" and {self.steps} steps of the next" if self.steps else ""
        return f"after {self.epochs} of {self.config.train.epochs} epochs{steps}"

    @property
    def finished(self) -> bool:
        """Whether the run has completed its last epoch."""
        return self.epochs >= self.config.last_epoch


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        run: the evaluated run.
        macs: (K,) multiply-adds of a sample that leaves at each exit, including the exits before it.
        part: the samples of the accuracies, in words.
        anytime, dynamic, latency: the rows of the CSV files; empty for a mode that was not evaluated.
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
    overrides: Iterable[str] = (),
    trust: Trust = False,
    on_notice: Callable[[str], None],
) -> Evaluation:
    """Evaluate the newest checkpoint of a run, and write the results to <run>/exits/.

    Args:
        folder: the run folder.
        mode: the mode to evaluate; None: both, but only anytime with a notice if the run does not allow dynamic.
        device: where to compute.
        batch_size: rows per forward pass.
        overrides: `key.sub=value` words, such as the new place of the data.
        trust: run the code that the run's config names: True, or the digest of the code that you have read.
        on_notice: called with one-line notices for the user.

    Raises:
        ConfigError: the mode is unknown, or the network or the parts of the data do not allow it.
        DataError: the data can't be read, or is not the run's.
        RunFolderError: there is no run or no checkpoint, or the checkpoint does not fit the config or the network.
    """
    if mode is not None and mode not in get_args(Mode):
        raise ConfigError(f"unknown mode {mode!r}: {closest(mode, get_args(Mode))}")
    run = open_run(folder, device, overrides, trust)
    macs = _macs(run)
    test, part = _test_samples(run)
    if (reason := _why_not_dynamic(run)) and mode == "dynamic":
        raise ConfigError(reason)
    if not run.finished:
        on_notice(f"the run is not finished: evaluating its network {run.progress}")
    if reason and mode is None:
        on_notice(f"only anytime: {reason}")
    readings = read_exits(run.network, test, run.input, device, batch_size)
    clear_others(folder, run.checkpoint)
    anytime, dynamic = [], []
    if mode != "dynamic":
        anytime = _anytime_rows(readings, macs)
        write_rows(folder, "anytime", run.checkpoint, anytime)
    if mode != "anytime" and run.held_out is not None and not reason:
        held_out = read_exits(run.network, run.held_out, run.input, device, batch_size)
        thresholds = {budget: find_thresholds(held_out.confidences, budget) for budget in BUDGETS}
        write_thresholds(folder, _facts(run, macs, run.held_out, test), thresholds)
        dynamic = [_budget_row(budget, values, readings, held_out, macs) for budget, values in thresholds.items()]
        write_rows(folder, "dynamic", run.checkpoint, dynamic)
    latency = [row for batch in _LATENCY_BATCHES for row in _latency_rows(run, macs, batch)]
    write_rows(folder, "latency", run.checkpoint, latency)
    return Evaluation(run, macs, part, anytime, dynamic, latency)


def _macs(run: TrainedRun) -> list[int]:
    """Return the multiply-adds up to each exit, or those of the whole forward pass if the network can't stop early."""
    name = run.config.model.name
    try:
        num_exits = count_exits(run.network, run.input.shape)
    except ValueError as error:
        raise ConfigError(f"model {name!r} can't be evaluated: {error}") from None
    if num_exits == 1:
        raise ConfigError(f"model {name!r} has one exit: rayprune evaluate needs several, as in model.name=msdnet")
    if isinstance(run.network, MultiExitModel):
        return exit_macs(run.network, run.input.shape)
    return [num_macs(run.network, torch.zeros(1, *run.input.shape, device=run.device))] * num_exits


def _test_samples(run: TrainedRun) -> tuple[SampleSource, str]:
    """Return the samples to measure accuracies on, and their description."""
    if run.validation is not None:
        return run.validation, f"the {len(run.validation):,} validation samples of {run.config.data.source}"
    if run.held_out is not None:
        return run.held_out, f"the {len(run.held_out):,} held-out training samples"
    raise ConfigError(
        f"data.source {run.config.data.source!r} has no validation part, and the run held out no samples: "
        "set data.hold_out=0.1 and train again"
    )


def _why_not_dynamic(run: TrainedRun) -> str | None:
    """Return why early exit can't be evaluated; None if it can."""
    if not isinstance(run.network, MultiExitModel):
        return (
            f"model {run.config.model.name!r} can't stop early, each exit takes the whole forward pass: "
            "give it num_exits, begin(inputs) -> state and advance(exit, state) -> (logits, state)"
        )
    if run.held_out is None:
        return (
            f"{run.folder} was trained on all training samples, and thresholds need held-out ones: set "
            "data.hold_out=0.1 and train again"
        )
    if run.validation is None:
        return (
            f"data.source {run.config.data.source!r} has no validation part of its own to evaluate thresholds on: add "
            "one and train again"
        )
    return None


def _anytime_rows(readings: ExitReadings, macs: list[int]) -> list[Row]:
    return [
        {
            "exit": exit_ + 1,
            "macs": macs[exit_],
            "top1": float(readings.correct[exit_].mean()),
            "top5": float(readings.in_top5[exit_].mean()),
            "loss": float(readings.losses[exit_].mean(dtype=np.float64)),
            "samples": readings.losses.shape[1],
        }
        for exit_ in range(len(macs))
    ]


def _budget_row(
    budget: int, thresholds: NDArray[np.float32], test: ExitReadings, held_out: ExitReadings, macs: list[int]
) -> Row:
    costs = np.array(macs, np.float64)
    on_test = evaluate_dynamic(test.confidences, test.correct, thresholds, costs)
    on_held_out = evaluate_dynamic(held_out.confidences, held_out.correct, thresholds, costs)
    quotas = exit_quotas(budget, len(macs), held_out.correct.shape[1])
    return {
        "p": budget,
        "macs": on_test.cost,
        "top1": on_test.accuracy,
        **{f"share_{number}": float(share) for number, share in enumerate(on_test.shares, start=1)},
        "samples": test.correct.shape[1],
        "held_out_macs": on_held_out.cost,
        "held_out_top1": on_held_out.accuracy,
        **{f"held_out_quota_{number}": int(quota) for number, quota in enumerate(quotas, start=1)},
        "held_out_samples": held_out.correct.shape[1],
    }


def _facts(run: TrainedRun, macs: list[int], held_out: SampleSource, test: SampleSource) -> Mapping[str, Any]:
    return {
        "checkpoint": run.checkpoint,
        "epochs": run.epochs,
        "steps": run.steps,
        "config": run.config.digest(),
        "model": run.config.shown()["model"],
        "num_exits": len(macs),
        "macs": macs,
        "found_on": {"samples": len(held_out), "fingerprint": held_out.fingerprint},
        "tested_on": {"samples": len(test), "fingerprint": test.fingerprint},
        "confidence": "largest softmax probability, full precision",
        "rule": "leave at the first exit whose threshold the confidence reaches; null: no sample; the last has none",
    }


def _latency_rows(run: TrainedRun, macs: list[int], batch: int) -> list[Row]:
    seconds_KR = measure_latency(run.network, run.input.shape, len(macs), run.device, batch)
    low_K, median_K, high_K = np.quantile(seconds_KR * 1e3, [0.25, 0.5, 0.75], axis=1).tolist()
    on_gpu = run.device.type == "cuda"
    return [
        {
            "exit": exit_ + 1,
            "macs": macs[exit_],
            "batch": batch,
            "repeats": seconds_KR.shape[1],
            "median_ms": median_K[exit_],
            "low_ms": low_K[exit_],
            "high_ms": high_K[exit_],
            "device": torch.cuda.get_device_name(run.device) if on_gpu else run.device.type,
            "threads": torch.get_num_threads() if run.device.type == "cpu" else 0,
        }
        for exit_ in range(len(macs))
    ]


def open_run(folder: Path, device: torch.device, overrides: Iterable[str] = (), trust: Trust = False) -> TrainedRun:
    """Load the network of a run's newest intact checkpoint, and open its data; arguments as for `evaluate`.

    Raises:
        ConfigError: the network can't be built, or the config names code that is not trusted.
        DataError: the data can't be read, or is not the run's.
        RunFolderError: there is no run or no checkpoint, or the checkpoint does not fit the config or the network.
    """
    config = _config_of(folder, overrides, trust)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise RunFolderError(
            f"{folder} has no intact checkpoint yet: train it first, rayprune train {folder}/config.yaml"
        )
    try:
        position = read_position(checkpoint)
    except FileNotFoundError:
        raise _replaced(checkpoint) from None
    if position["digest"] != config.digest():
        raise RunFolderError(
            f"{folder}/config.yaml is not the config of its checkpoints (its digest is {config.digest()}, theirs "
            f"{position['digest']}): restore it"
        )
    splits, validation = _open_data(config, folder, position["fingerprint"])
    spec = input_spec(config, splits.train)
    network = build_network(config, spec, device)
    try:
        checkpoint = usable_checkpoint(folder, lambda each: load_weights(each, network, device)) or checkpoint
        position = read_position(checkpoint)
    except FileNotFoundError:
        raise _replaced(checkpoint) from None
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


def _replaced(checkpoint: Path) -> RunFolderError:
    return RunFolderError(f"{checkpoint} was just replaced by a newer one: the run is training, try again")


def _config_of(folder: Path, overrides: Iterable[str], trust: Trust) -> Config:
    if (folder / "config.yaml").is_file():
        return read_trusted(folder / "config.yaml", overrides, trust)
    reason = "is not a run folder (it has no config.yaml): name one, such as runs/NAME"
    if (folder / "sweep.yaml").exists():
        reason = "is a sweep: name one of its trials/"
    elif (folder / "compare.yaml").exists():
        reason = "is a comparison: name one of its runs/"
    raise RunFolderError(f"{folder} {reason}")


def _open_data(config: Config, folder: Path, fingerprint: str) -> tuple[Splits, SampleSource | None]:
    """Return the run's data, and the source's own validation part."""
    try:
        splits = open_splits(config)
        validation = splits.validation
        if config.data.hold_out is not None:
            data = config.data.model_copy(update={"hold_out": None, "relabel": None})  # the audit is of one part
            validation = open_splits(config.model_copy(update={"data": data})).validation
    except (OSError, ValueError) as error:
        raise DataError(
            f"the data of {folder} can't be opened ({one_line(error)}): restore it, or name its new place, data.path=…"
        ) from None
    if splits.train.fingerprint != fingerprint:
        raise DataError(
            f"{folder} was trained on other data (fingerprint {fingerprint[:12]}, here "
            f"{splits.train.fingerprint[:12]}): restore that data"
        )
    return splits, validation


def find_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the GPU if there is one.

    Raises:
        ConfigError: the device can't be used on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} can't be used: torch finds no GPU here, use --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend raises its own
        line = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ConfigError(
            f"device {name!r} can't be used ({line}): use --device cpu, or cuda if there is a GPU"
        ) from None
    return device
