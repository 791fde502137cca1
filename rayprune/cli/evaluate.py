"""The command `rayprune evaluate`: how good each exit of a trained network is, and what leaving early gives.

An evaluation of exits as plain lines: a table of the exits, then one of the budgets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprune.cli.console import console
from rayprune.errors import ConfigError

if TYPE_CHECKING:
    from rayprune.experiments.early_exit.evaluate import Evaluation, Row


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--mode",
    type=click.Choice(["anytime", "dynamic"]),
    help="Each exit by itself, or thresholds for a budget. [default: both, where the run held samples out]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--batch-size", default=256, show_default=True, type=click.IntRange(min=1), metavar="N", help="Rows at a time."
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def evaluate(run: str, mode: Any, device: str, batch_size: int) -> None:
    """Evaluate the newest checkpoint of RUN, the folder of a run whose network has several exits.

    Writes RUN/exits/: anytime.csv, dynamic.csv, latency.csv, thresholds.json, accuracy_macs.png.
    """
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file() and not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: name a run's, such as runs/NAME")
    start = time.perf_counter()
    from rayprune.cli.train import elapsed
    from rayprune.experiments.early_exit.evaluate import evaluate as evaluate_run
    from rayprune.experiments.early_exit.evaluate import find_device

    found = evaluate_run(folder, mode, find_device(device), batch_size=batch_size, on_notice=_warn)
    from rayprune.report.plots.experiments import draw_exits

    drawn = draw_exits(folder)
    _show(found)
    console.print(f"\ndone in {elapsed(start)}: {drawn.parent}", highlight=False, markup=False)


def _warn(line: str) -> None:
    console.print(line, style="yellow", highlight=False, markup=False)


def _show(found: Any) -> None:

    console.print(
        f"{found.run.config.model.name.split('/')[-1]} {found.run.progress}, on {found.part}\n",
        highlight=False,
        markup=False,
    )
    _print_table(exit_lines(found))
    for line in (accuracy_line(found), latency_line(found)):
        console.print(line, style="dim", highlight=False, markup=False)
    if not found.dynamic:
        return
    console.print(
        f"\nleaving early, thresholds of {found.dynamic[0]['held_out_samples']:,} training samples held out:",
        highlight=False,
        markup=False,
    )
    _print_table(budget_lines(found))


def _print_table(lines: Iterable[str]) -> None:
    for number, line in enumerate(lines):
        console.print(line, style="bold" if number == 0 else None, highlight=False, markup=False)


_SHOWN = (1, 5, 10, 15, 20, 25, 30, 35, 39)  # of the budgets in dynamic.csv
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def exit_lines(found: Evaluation) -> Iterator[str]:
    """Yield the table of the exits; the first line is its head."""
    batches = sorted({row["batch"] for row in found.latency})
    unit, scale = _unit(found)
    heads = ["exit", f"{unit}MACs", *(["top-1", "top-5", "loss"] if found.anytime else [])]
    heads += [f"ms for {batch} image{'s' * (batch > 1)}" for batch in batches]
    rows = [heads]
    for exit_, macs in enumerate(found.macs, start=1):
        cells = [str(exit_), f"{macs / scale:,.2f}"]
        for row in found.anytime[exit_ - 1 : exit_]:
            cells += [f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['loss']:.4f}"]
        rows.append(cells + [_time(found.latency, exit_, batch) for batch in batches])
    yield from _aligned(rows)


def accuracy_line(found: Evaluation) -> str:
    """Return how far the accuracies may be off by the draw of the samples."""
    row = [*found.anytime, *found.dynamic][-1]
    error = math.sqrt(row["top1"] * (1 - row["top1"]) / row["samples"])
    return f"accuracies: {row['samples']:,} samples, a standard error of about {error * 100:.2f} points"


def latency_line(found: Evaluation) -> str:
    """Return how the latencies were measured."""
    first = found.latency[0]
    threads = first["threads"]
    where = first["device"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
    counts = sorted({row["repeats"] for row in found.latency})
    repeats = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"ms: median of {repeats} forwards up to the exit [quartiles], on {where}"


def budget_lines(found: Evaluation) -> Iterator[str]:
    """Yield the table of some of the budgets; the first line is its head."""
    unit, scale = _unit(found)
    exits = range(1, len(found.macs) + 1)
    rows = [["p", f"{unit}MACs", "top-1", *(f"exit {number}" for number in exits)]]
    for row in (row for row in found.dynamic if row["p"] in _SHOWN):
        shares = [f"{row[f'share_{number}']:.1%}" for number in exits]
        rows.append([str(row["p"]), f"{row['macs'] / scale:,.2f}", f"{row['top1']:.2%}", *shares])
    yield from _aligned(rows)


def _unit(found: Evaluation) -> tuple[str, float]:
    return next((name, size) for name, size in _UNITS if found.macs[-1] >= size or size == 1.0)


def _time(latency: Sequence[Row], exit_: int, batch: int) -> str:
    row = next(row for row in latency if row["exit"] == exit_ and row["batch"] == batch)
    return f"{_ms(row['median_ms'])} [{_ms(row['low_ms'])}, {_ms(row['high_ms'])}]"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
