"""The command `rayprune sweep`: many short runs over a space of settings, and the Pareto front of their results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprune.cli.console import console, debug, debug_option, plain_text, say, say_table, single_config
from rayprune.errors import TrainingFailed
from rayprune.report.text import count_of, share

if TYPE_CHECKING:
    from rayprune.config import Config
    from rayprune.experiments.sweep.folder import Row
    from rayprune.experiments.sweep.runner import SweepStart


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@debug_option
def sweep(arguments: tuple[str, ...]) -> None:
    """Train CONFIG at each point of its section `sweep`: how much can be pruned, and how.

    Run the same command again to continue: ended trials are kept, others resume from their last checkpoint.
    """
    path, overrides = single_config(arguments, "rayprune sweep digits_sweep")
    from rayprune.config import read_config
    from rayprune.experiments.sweep.folder import finished_rows
    from rayprune.experiments.sweep.space import check_space, sweep_folder_of

    base = read_config(path, overrides)
    check_space(base)  # before Ray and torch are loaded
    folder, keys = sweep_folder_of(base, Path(path).stem), list(base.sweep.space)
    rows = finished_rows(base, folder)
    if rows is not None:
        say(f"{folder.name}: already finished")
    else:
        rows = _run(base, folder, keys)
    say()
    say_results(rows, keys)
    say()
    _say_files(folder, rows)
    if all(row["status"] != "finished" for row in rows):
        reasons = [row["error"] for row in rows if row["error"]]
        raise TrainingFailed(f"no trial finished; the first error: {reasons[0]}" if reasons else "no trial finished")


def _run(base: Config, folder: Path, keys: Sequence[str]) -> list[Row]:
    from rayprune.experiments.sweep.runner import SweepListeners
    from rayprune.experiments.sweep.runner import sweep as run

    with SweepDisplay(keys) as display:
        listeners = SweepListeners(display.start, display.epoch, display.trial)
        return run(base, folder, listeners, debug=debug()).rows


def say_results(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Print the final table, and a line for each failed trial; `rows` as in results.parquet."""
    from rayprune.report.tables import by_accuracy, sweep_notes, trials_table

    table = trials_table(rows, keys)
    say_table([table.head, *table.rows], table.words)
    for row in by_accuracy(rows):
        if row["error"]:
            say(f"failed   {row['trial']}: {row['error']}")
    for line in sweep_notes(rows):
        say(line, "dim")


def _say_files(folder: Path, rows: Sequence[Row]) -> None:
    from rayprune.report.plots.experiments import save_pareto

    say(f"table   {folder / 'results.parquet'} (and .csv)")
    if any(row["val_accuracy"] is not None and row["status"] != "failed" for row in rows):
        say(f"plot    {save_pareto(folder)}")
    if any(row["pareto"] for row in rows):
        say(f"configs {folder / 'pareto'}")
    say(f"trials  {folder / 'trials'}")


class SweepDisplay:
    """Print a running sweep: a live table on a terminal, otherwise a line for each ended trial.

    Args:
        keys: the swept keys.
    """

    _MAX_SHOWN = 20  # trials on a terminal, running ones first

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._num_trials = self._num_ended = 0
        self._start = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> SweepDisplay:
        if console.is_terminal:
            from rich.live import Live

            self._live = Live(console=console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, start: SweepStart) -> None:
        """Print the start of the sweep."""
        self._num_trials, self._num_ended = start.num_trials, len(start.before)
        say(f"{start.folder.name}: {start.num_trials} trials, {start.resources.text}")
        if start.before:
            say(f"{len(start.before)} of them had already ended")

    def epoch(self, name: str, point: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Show a trial's newest epoch, on a terminal only."""
        if self._live is not None:
            self._show({"trial": name, **point, "status": "running", "epochs": figures["epoch"], **figures})

    def trial(self, row: Mapping[str, Any]) -> None:
        """Show an ended trial."""
        self._num_ended += 1
        if self._live is not None:
            self._show(row)
            return
        values = " ".join(f"{key}={value}" for key, value in zip(self._keys, self._point(row), strict=True))
        outcome = f": {row['error']}"
        if row["status"] != "failed":
            outcome = (
                f" after {count_of(row['epochs'], 'epoch')}: accuracy {share(row['val_accuracy'])}, "
                f"compute {share(row['compute_share'])}, {row['seconds']:.1f} wall s"
            )
        say(f"{self._num_ended:>3}/{self._num_trials:<3} {row['trial']} {values} {row['status']}{outcome}")

    def _show(self, row: Mapping[str, Any]) -> None:
        from rich.box import SIMPLE
        from rich.table import Table

        self._rows[row["trial"]] = row
        seconds = time.monotonic() - self._start
        head = ("trial", *self._keys, "status", "epochs", "val acc", "compute")
        title = f"{self._num_ended}/{self._num_trials} trials, {seconds:.0f} wall s"
        table = Table(box=SIMPLE, pad_edge=False, title=title)
        for name in head:
            table.add_column(plain_text(name), overflow="fold")  # names of trials and values are never cut
        running_first = sorted(self._rows.values(), key=lambda row: row["status"] != "running")
        for trial in running_first[: self._MAX_SHOWN]:
            figures = (str(trial["epochs"] or "–"), share(trial.get("val_accuracy")), share(trial.get("compute_share")))
            table.add_row(*map(plain_text, (trial["trial"], *self._point(trial), trial["status"], *figures)))
        self._live.update(table)

    def _point(self, row: Mapping[str, Any]) -> list[str]:
        """Return the values of the swept keys."""
        from rayprune.config.experiments import format_value

        return [format_value(row[key]) for key in self._keys]
