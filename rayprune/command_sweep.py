"""The command `rayprune sweep`: many short runs over a space of keys, and which of them are worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console


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
        raise ValueError("name one config: rayprune sweep configs/digits_sweep.yaml")
    from rayprune.config import load_tree
    from rayprune.config_trials import check_space, sweep_folder_of

    base = load_tree(paths[0], [word for word in words if "=" in word])
    check_space(base)  # before Ray and torch are loaded
    from rayprune.display_sweep import SweepDisplay, sweep_table
    from rayprune.engine.sweep import SweepListeners
    from rayprune.engine.sweep import sweep as run

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
    from rayprune.report.plots import plot_pareto

    lines = [f"table   {result.folder / 'results.parquet'} (and .csv)"]
    if any(row["val_accuracy"] is not None and row["status"] != "failed" for row in result.rows):
        lines.append(f"plot    {plot_pareto(result.folder)}")
    if any(row["pareto"] for row in result.rows):
        lines.append(f"configs {result.folder / 'pareto'} (*: the Pareto front, accuracy against FLOPs)")
    return [*lines, f"trials  {result.folder / 'trials'}"]
