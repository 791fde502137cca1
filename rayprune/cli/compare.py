"""The command `rayprune compare`: is pruning worth it here? Runs every arm with every seed and says so.

A comparison as plain lines: a table of the arms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from rayprune.cli.console import console
from rayprune.errors import ConfigError
from rayprune.report.tables import HEADS, compare_rows


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@click.option("--debug", "debug_here", is_flag=True, help="Show tracebacks and Ray's own logs.")
@click.pass_obj
def compare(debug: bool, words: tuple[str, ...], debug_here: bool) -> None:
    """Compare the methods of a CONFIG with full training, full training shortened, and random subsets.

    Every arm runs with the same seeds (compare.seeds). The answer may be to prune nothing. The same command again goes
    on where it stopped.
    """
    paths = [word for word in words if "=" not in word]
    if len(paths) != 1:
        raise ConfigError("name one config: rayprune compare configs/digits_compare.yaml")
    start = time.perf_counter()
    from rayprune.cli.train import elapsed
    from rayprune.config import load_config

    config = load_config(paths[0], [word for word in words if "=" in word])
    from rayprune.experiments.compare.arms import digest_of
    from rayprune.experiments.compare.runner import CompareListeners
    from rayprune.experiments.compare.runner import compare as run

    stem = Path(paths[0]).stem
    if config.run.name == f"{stem}-{config.digest()}":  # the name of a single run, where none was given
        named = config.run.model_copy(update={"name": f"{stem}-compare-{digest_of(config)}"})
        config = config.model_copy(update={"run": named})
    folder = run(config, CompareListeners(_announce, _warn), debug=debug or debug_here)
    from rayprune.report.plots.experiments import draw_intervals

    draw_intervals(folder)
    _show(folder)
    console.print(f"\ndone in {elapsed(start)}: {folder}", highlight=False, markup=False)


def _announce(number: str, arm: Any, seed: int, finished: bool, settings: Any) -> None:
    from rayprune.report.read import count_of

    state = (
        "the same as full"
        if settings.same_as_full
        else "finished before"
        if finished
        else count_of(settings.epochs, "epoch")
    )
    matched = f", {settings.matched}" if settings.matched and not settings.same_as_full else ""
    console.print(f"{number:>7} {arm.name}, seed {seed}: {state}{matched}", highlight=False, markup=False)


def _warn(line: str) -> None:
    console.print(line, style="yellow", highlight=False, markup=False)


def _show(folder: Path) -> None:
    import json

    from rayprune.report.tables import explanation, verdict_lines

    report = json.loads((folder / "compare.json").read_text())
    console.print()
    for number, line in enumerate(compare_lines(report)):
        console.print(line, style="bold" if number == 0 else None, highlight=False, markup=False)
    for line in explanation(report):
        console.print(line, style="dim", highlight=False, markup=False)
    console.print()
    for line in verdict_lines(report):
        console.print(line, highlight=False, markup=False)


def compare_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a comparison; the first line is its head.

    Args:
        report: what compare.json holds.
    """
    rows = [HEADS, *compare_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join([row[0].ljust(widths[0]), *cells])
