"""The command `rayprune sweep`: many short runs over a space of keys, and which of them are worth it.

What a person sees of a sweep: a live table on a terminal, else a line a finished trial; a table at the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rayprune.config.experiments import format_value
from rayprune.errors import ConfigError
from rayprune.report.read import count_of
from rayprune.report.tables import by_accuracy, sweep_cells


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@click.option("--debug", "debug_here", is_flag=True, help="Show tracebacks and Ray's own logs.")
@click.pass_obj
def sweep(debug: bool, words: tuple[str, ...], debug_here: bool) -> None:
    """Train CONFIG at each point of its section `sweep`: how much can be pruned, and with what.

    The same command again goes on: trials that ended stay, interrupted ones go on from their last checkpoint.
    """
    paths = [word for word in words if "=" not in word]
    if len(paths) != 1:
        raise ConfigError("name one config: rayprune sweep configs/digits_sweep.yaml")
    from rayprune.config import read_config
    from rayprune.experiments.sweep.space import check_space, sweep_folder_of

    base = read_config(paths[0], [word for word in words if "=" in word])
    check_space(base)  # before Ray and torch are loaded
    from rayprune.experiments.sweep.runner import SweepListeners
    from rayprune.experiments.sweep.runner import sweep as run

    console = Console(soft_wrap=True)
    with SweepDisplay(console, list(base.sweep.space)) as display:
        listeners = SweepListeners(display.start, display.epoch, display.trial)
        result = run(base, sweep_folder_of(base, Path(paths[0]).stem), listeners, debug=debug or debug_here)
    console.print()
    for number, line in enumerate(sweep_table(result.rows, list(base.sweep.space))):
        console.print(line, style="bold" if number == 0 else None, highlight=False, markup=False)
    console.print()
    for line in _places(result):
        console.print(line, highlight=False, markup=False)
    if all(row["status"] != "finished" for row in result.rows):
        errors = [row["error"] for row in result.rows if row["error"]]
        raise RuntimeError(f"no trial finished; the first error: {errors[0]}" if errors else "no trial finished")


def _places(result: Any) -> list[str]:
    from rayprune.report.plots.experiments import plot_pareto

    lines = [f"table   {result.folder / 'results.parquet'} (and .csv)"]
    if any(row["val_accuracy"] is not None and row["status"] != "failed" for row in result.rows):
        lines.append(f"plot    {plot_pareto(result.folder)}")
    if any(row["pareto"] for row in result.rows):
        lines.append(f"configs {result.folder / 'pareto'} (*: the Pareto front, accuracy against FLOPs)")
    return [*lines, f"trials  {result.folder / 'trials'}"]


_MOST_SHOWN = 20  # running and newest trials on a terminal


class SweepDisplay:
    """Print a sweep while it goes.

    Args:
        console: where.
        keys: the swept keys.
    """

    def __init__(self, console: Console, keys: Sequence[str]) -> None:
        self._console, self._keys = console, list(keys)
        self._rows: dict[str, dict[str, Any]] = {}
        self._num_trials, self._num_ended, self._began = 0, 0, time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, start: Any) -> None:
        """Say what begins, or goes on."""
        self._num_trials, self._num_ended = start.num_trials, len(start.before)
        self._say(f"{start.folder.name}: {start.num_trials} trials, {start.share.text}")
        if start.before:
            self._say(f"{len(start.before)} of them ended before")

    def epoch(self, name: str, point: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Show a trial's newest epoch; on a terminal only."""
        if self._live is not None:
            self._rows[name] = {"trial": name, **point, "status": "running", "epochs": figures["epoch"], **figures}
            self._live.update(self._table())

    def trial(self, row: Mapping[str, Any]) -> None:
        """Print a trial that ended."""
        self._num_ended += 1
        if self._live is not None:
            self._rows[row["trial"]] = dict(row)
            self._live.update(self._table())
            return
        values = " ".join(f"{key}={format_value(row[key])}" for key in self._keys)
        figures = f": {row['error']}"
        if row["status"] != "failed":
            figures = (
                f" after {count_of(row['epochs'], 'epoch')}: accuracy {_share(row['val_accuracy'])}, "
                f"compute {_share(row['compute_share'])}, {row['seconds']:.1f} s"
            )
        self._say(f"{self._num_ended:>3}/{self._num_trials:<3} {row['trial']} {values} {row['status']}{figures}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def _table(self) -> Table:
        seconds = time.monotonic() - self._began
        table = Table(box=SIMPLE, pad_edge=False, title=f"{self._num_ended}/{self._num_trials} trials, {seconds:.0f} s")
        for column in ("trial", *self._keys, "status", "epochs", "val acc", "compute"):
            table.add_column(column)
        order = sorted(self._rows.values(), key=lambda row: row["status"] != "running")
        for row in order[:_MOST_SHOWN]:
            swept = (format_value(row[key]) for key in self._keys)
            figures = (str(row["epochs"] or "–"), _share(row.get("val_accuracy")), _share(row.get("compute_share")))
            table.add_row(row["trial"], *swept, row["status"], *figures)
        return table


def sweep_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return the final table as lines, the most accurate first, trials of the Pareto front with a star.

    Args:
        rows: as in results.parquet.
        keys: the swept keys.
    """
    cells = sweep_cells(rows, keys)
    header = cells[0]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    left = {0, *range(1, len(keys) + 1), len(header) - 2, len(header) - 1}
    lines = []
    for line in cells:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    failed = [f"failed   {row['trial']}: {row['error']}" for row in by_accuracy(rows) if row["error"]]
    return [*lines, *failed]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
