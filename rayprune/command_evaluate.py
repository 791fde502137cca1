"""The command `rayprune evaluate`: how good each exit of a trained network is, and what leaving early gives."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

console = Console(soft_wrap=True)


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
        raise ValueError(f"there is no folder {folder}: name a run's, such as runs/NAME")
    start = time.perf_counter()
    from rayprune.display import elapsed
    from rayprune.engine.evaluate import evaluate as evaluate_run
    from rayprune.engine.trained import find_device

    found = evaluate_run(folder, mode, find_device(device), batch_size=batch_size, on_notice=_warn)
    from rayprune.report.exits import draw_exits

    drawn = draw_exits(folder)
    _show(found)
    console.print(f"\ndone in {elapsed(start)}: {drawn.parent}", highlight=False, markup=False)


def _warn(line: str) -> None:
    console.print(line, style="yellow", highlight=False, markup=False)


def _show(found: Any) -> None:
    from rayprune.display_evaluate import accuracy_line, budget_lines, exit_lines, latency_line

    console.print(
        f"{found.run.config.model.name.split('/')[-1]} {found.run.trained}, on {found.part}\n",
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
