"""The command `rayprune evaluate`: the accuracy and cost of each exit of a trained network, and of early exit."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import click

from rayprune.cli.console import debug_option, elapsed, say, say_table, single_config, trust_option, warn
from rayprune.core.validation import MAX_INT
from rayprune.errors import ConfigError
from rayprune.paths import as_path
from rayprune.report.text import count_of, number, share

if TYPE_CHECKING:
    from rayprune.experiments.early_exit.evaluate import Evaluation

_SHOWN_BUDGETS = (1, 5, 10, 15, 20, 25, 30, 35, 39)  # of those in dynamic.csv
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
Rows = list[list[str]]


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN [key=value]...")
@click.option(
    "--mode",
    type=click.Choice(["anytime", "dynamic"]),
    help="Each exit alone, or early exit by thresholds for a budget. [default: both, if the run held samples out]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--batch-size", default=256, show_default=True, type=click.IntRange(1, MAX_INT), metavar="N", help="Rows per batch."
)
@trust_option
@debug_option
def evaluate(arguments: tuple[str, ...], mode: Any, device: str, batch_size: int, trust: bool | str) -> None:
    """Evaluate the newest checkpoint of RUN, the folder of a run whose network has several exits.

    data.path=PATH names the data's new place.

    Writes RUN/exits/: anytime.csv, dynamic.csv, latency.csv, thresholds.json, accuracy_macs.png.
    """
    run, overrides = single_config(arguments, "rayprune evaluate runs/NAME", "run")
    folder = as_path(run)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: name a run's, such as runs/NAME")
    start = time.perf_counter()
    from rayprune.experiments.early_exit.evaluate import evaluate as evaluate_run
    from rayprune.experiments.early_exit.evaluate import find_device

    options: dict[str, Any] = {"batch_size": batch_size, "overrides": overrides, "trust": trust}
    evaluation = evaluate_run(folder, mode, find_device(device), **options, on_notice=warn)
    from rayprune.report.plots.experiments import save_exits

    plot = save_exits(folder)
    trained = evaluation.run
    say(f"{trained.config.model.name.split('/')[-1]} {trained.progress}, on {evaluation.part}\n")
    say_table(exit_rows(evaluation), words=())
    say(accuracy_line(evaluation), "dim")
    say(latency_line(evaluation), "dim")
    if evaluation.dynamic:
        num_held_out = evaluation.dynamic[0]["held_out_samples"]
        say(f"\nearly exit, with thresholds of {num_held_out:,} held-out training samples:")
        say_table(budget_rows(evaluation), words=())
    say(f"\ndone in {elapsed(start)}: {plot.parent}")


def exit_rows(evaluation: Evaluation) -> Rows:
    """Return the table of the exits with its head."""
    batches = sorted({row["batch"] for row in evaluation.latency})
    latency = {(row["exit"], row["batch"]): row for row in evaluation.latency}
    unit, scale = _unit(evaluation)
    accuracies = ["top-1", "top-5", "loss"] if evaluation.anytime else []
    rows = [["exit", f"{unit}MACs", *accuracies, *(f"ms for {count_of(batch, 'image')}" for batch in batches)]]
    for exit_, macs in enumerate(evaluation.macs, start=1):
        cells = [str(exit_), f"{macs / scale:,.2f}"]
        if evaluation.anytime:
            row = evaluation.anytime[exit_ - 1]
            cells += [share(row["top1"]), share(row["top5"]), number(row["loss"])]
        for batch in batches:
            median, low, high = (_ms(latency[exit_, batch][name]) for name in ("median_ms", "low_ms", "high_ms"))
            cells.append(f"{median} [{low}, {high}]")
        rows.append(cells)
    return rows


def budget_rows(evaluation: Evaluation) -> Rows:
    """Return the table of some of the budgets with its head."""
    unit, scale = _unit(evaluation)
    exits = range(1, len(evaluation.macs) + 1)
    rows = [["p", f"{unit}MACs", "top-1", *(f"exit {number}" for number in exits)]]
    for row in evaluation.dynamic:
        if row["p"] in _SHOWN_BUDGETS:
            shares = [share(row[f"share_{exit_}"], 1) for exit_ in exits]
            rows.append([str(row["p"]), f"{row['macs'] / scale:,.2f}", share(row["top1"]), *shares])
    return rows


def accuracy_line(evaluation: Evaluation) -> str:
    """Return the sampling error of the accuracies in words."""
    row = [*evaluation.anytime, *evaluation.dynamic][-1]
    error = math.sqrt(row["top1"] * (1 - row["top1"]) / row["samples"])
    return f"accuracies: {row['samples']:,} samples, a standard error of about {error * 100:.2f} points"


def latency_line(evaluation: Evaluation) -> str:
    """Return how the latencies were measured."""
    first = evaluation.latency[0]
    threads = f", {count_of(first['threads'], 'thread')}" if first["threads"] else ""
    counts = [row["repeats"] for row in evaluation.latency]
    repeats = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"ms: median of {repeats} forward passes up to the exit [quartiles], on {first['device']}{threads}"


def _unit(evaluation: Evaluation) -> tuple[str, float]:
    return next((name, size) for name, size in _UNITS if evaluation.macs[-1] >= size or size == 1.0)


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
