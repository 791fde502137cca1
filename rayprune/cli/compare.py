"""The command `rayprune compare`: run every arm with every seed, and print the results and the verdict."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rayprune.cli.console import debug, debug_option, elapsed, say, say_table, single_config, warn
from rayprune.report.text import count_of

if TYPE_CHECKING:
    from rayprune.config import Config
    from rayprune.experiments.compare.arms import Arm, ArmSettings


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@debug_option
def compare(arguments: tuple[str, ...]) -> None:
    """Compare the methods of CONFIG with full training, shortened full training, and random subsets.

    Every arm runs with the same seeds (compare.seeds). The verdict may be to prune nothing. Run the same command again
    to continue where it stopped.
    """
    path, overrides = single_config(arguments, "rayprune compare digits_compare")
    start = time.perf_counter()
    from rayprune.config import read_config

    config = read_config(path, overrides)
    from rayprune.engine.storage.resume import run_folder_of
    from rayprune.experiments.compare.arms import digest_of

    if config.run.name is None:
        named = config.run.model_copy(update={"name": f"{Path(path).stem}-compare-{digest_of(config)}"})
        config = config.model_copy(update={"run": named})
    folder = run_folder_of(config)
    if _is_finished(config, folder):
        say(f"{folder.name}: already finished")
        _say_results(folder)
        say(f"\n{folder}")
        return
    from rayprune.experiments.compare.runner import CompareListeners
    from rayprune.experiments.compare.runner import compare as run

    folder = run(config, CompareListeners(_say_run, warn), debug=debug())
    from rayprune.report.plots.experiments import save_intervals

    save_intervals(folder)
    _say_results(folder)
    say(f"\ndone in {elapsed(start)}: {folder}")


def _is_finished(config: Config, folder: Path) -> bool:
    """Return whether the comparison has its results and all its runs; reads no data."""
    from rayprune.experiments.compare.arms import digest_of
    from rayprune.experiments.folder import ExperimentFolder
    from rayprune.report.read import read_comparison

    if not ExperimentFolder(folder, "compare.yaml", digest_of).is_current(config, "compare.png"):
        return False
    comparison = read_comparison(folder / "compare.json")
    runs = {run.folder for arm in comparison.arms for run in arm.runs}
    written = all((folder / "runs" / run / "scores.parquet").exists() for run in runs)
    return written and comparison.seeds == list(config.compare.all_seeds)


def _say_run(position: str, arm: Arm, seed: int, finished: bool, settings: ArmSettings) -> None:
    state = "already finished" if finished else count_of(settings.epochs, "epoch")
    matched = f", {settings.matched}" if settings.matched else ""
    if settings.same_as_full:
        state, matched = "the same as full", ""
    rate = f", learning rate × {settings.lr_factor:g}" if settings.lr_factor != 1.0 or position == "tuning" else ""
    say(f"{position:>7} {arm.name}, seed {seed}: {state}{rate}{matched}")


def _say_results(folder: Path) -> None:
    from rayprune.report.read import read_comparison
    from rayprune.report.tables import arms_table, explanation, verdict_lines

    comparison = read_comparison(folder / "compare.json")
    table = arms_table(comparison)
    say()
    say_table([table.head, *table.rows], table.words)
    for line in explanation(comparison):
        say(line, "dim")
    say()
    for line in verdict_lines(comparison):
        say(line)
