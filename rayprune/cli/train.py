"""The commands `rayprune train` and `rayprune score`: print a line for each epoch and a final table of runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprune.cli.console import (
    console,
    debug,
    debug_option,
    say,
    say_table,
    single_config,
    split_arguments,
    warn,
)
from rayprune.errors import ConfigError
from rayprune.paths import as_path
from rayprune.report.text import count_of, number, share, training_seconds

if TYPE_CHECKING:
    from rayprune.config import Config
    from rayprune.engine.train.driver import Start
    from rayprune.engine.train.static_subset import Scored


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG... [key=value]...")
@debug_option
def train(arguments: tuple[str, ...]) -> None:
    """Train every CONFIG, with key.sub=value changes applied to each, and compare the runs at the end.

    Run the same command again to resume from the last checkpoint.
    """
    from rayprune.config import load_config

    paths, overrides = split_arguments(arguments)
    if not paths:
        raise ConfigError("no config is named: rayprune train digits_full")
    configs = [load_config(path, overrides) for path in paths]  # check all of them before any training starts
    folders = [as_path(config.run.storage_path) / str(config.run.name) for config in configs]
    if len(set(folders)) < len(folders):
        cure = "leave run.name out" if any(word.startswith("run.name=") for word in overrides) else "name each once"
        raise ConfigError(f"two of the configs train in the same folder, {folders[0]}: {cure}")
    results = [(Path(path).stem, _train_one(config)) for path, config in zip(paths, configs, strict=True)]
    _say_summary(results)
    say()
    for name, folder in results:
        say(f"{name}: {folder}")


def _train_one(config: Config) -> Path:
    """Train a run to its end; return its folder."""
    from rayprune.engine.storage.resume import finished_unread

    if (folder := finished_unread(config)) is not None:  # torch and Ray are not imported
        say(f"{folder.name}: already finished\n")
        return folder
    from rayprune.engine.train.driver import train as run

    start = time.perf_counter()
    with RunDisplay() as display:
        result = run(config, on_scored=_say_selection, debug=debug(), **display.listeners)
    if not display.has_started:
        say(f"{result.folder.name}: already finished\n")
        return result.folder
    rest = "start Ray and its workers" if config.scaling.num_workers else "start"
    total, epochs = time.perf_counter() - start, display.epochs_s
    split = f": {epochs:.1f} s in epochs, {total - epochs:.1f} s to {rest}, open the data and write the results"
    say(f"done in {total:.1f} s{split if epochs else ''}\n")
    return result.folder


def _say_summary(results: Sequence[tuple[str, Path]]) -> None:
    """Print the final table: the result of each run, what it saved, and what selection cost."""
    from rayprune.report.read import read_run
    from rayprune.report.tables import above_full, runs_table

    runs = [read_run(folder, name) for name, folder in results]
    table = runs_table(runs)
    say_table([table.head, *table.rows], table.words)
    for line in above_full(runs):
        say(line, "dim")


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@debug_option
def score(arguments: tuple[str, ...]) -> None:
    """Score the samples for a method that selects one subset, such as tdds: the first half of `rayprune train`.

    Writes scores.parquet. Select by the scores with `rayprune select`, or run `rayprune train` with the same CONFIG to
    train on the selected subset.
    """
    from rayprune.config import load_config
    from rayprune.engine.train.driver import score as run

    config = load_config(*single_config(arguments, "rayprune score digits_tdds"))
    with RunDisplay() as display:
        scored = run(config, debug=debug(), **display.listeners)
    _say_selection(scored)
    say(f"scores: {scored.scores}")


def _say_selection(scored: Scored) -> None:
    selection = scored.selection
    cost = f"scored by training on {scored.prior_cost.samples_trained:,} samples, which count as the run's own"
    if scored.imported:
        cost = "scored from logs of another program, whose cost is not counted"
    threshold = f", threshold {selection.facts['threshold']:.4g}" if "threshold" in selection.facts else ""
    say(f"selected: {selection.num_kept:,} of {selection.num_samples:,} samples{threshold} ({cost})")


class RunDisplay:
    """Print a running run: a line per epoch, and a progress bar on a terminal."""

    def __init__(self) -> None:
        self.epochs_s = 0.0  # seconds of the epochs that were shown
        self.has_started = False
        self._num_epochs = self._kept = 0
        self._samples_before: int | None = None  # samples trained before the next epoch; None: none of this run yet
        self._has_head = False  # notices are printed before the head
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> RunDisplay:
        if console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def listeners(self) -> dict[str, Any]:
        """Callbacks for `train` and `score` of the engine."""
        progress = None if self._bar is None else self.progress
        return {"on_start": self.start, "on_epoch": self.epoch, "on_progress": progress, "on_notice": warn}

    def start(self, start: Start) -> None:
        """Print the start of the run."""
        from rayprune.engine.storage.run_folder import read_metrics

        self.has_started = True
        config, resources, first = start.config, start.resources, start.first_epoch
        fewest, most = config.scaling.worker_range
        workers = count_of(most, "worker") if fewest == most else f"{fewest} to {most} workers"
        stop = config.train.stop_after
        length = f", {stop} of {config.train.epochs} epochs" if stop else ""
        say(
            f"{start.folder.name}: {short_name(config.method['name'])} on {short_name(config.data.source)}, "
            f"{short_name(config.model.name)}{length}, "
            f"{workers if most else 'in this process'}, stream {resources.stream} ({resources.stream_reason})"
        )
        before = [line for line in read_metrics(start.folder) if line["epoch"] < first]
        self._num_epochs = config.last_epoch
        self._samples_before = before[-1]["samples_trained"] if before else None
        self._kept = sum(line["kept"] for line in before)
        if first >= self._num_epochs:
            say("already trained: writes the results")
            return
        if first:
            say(f"resumes at epoch {first + 1}")
        self._has_head = False
        if self._bar is not None:
            self._bar.update(self._task, total=self._num_epochs, completed=first)

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Print an ended epoch."""
        if not self._has_head:
            say(EPOCH_HEAD, "bold")
            self._has_head = True
        self.epochs_s += line["seconds"]["epoch"]
        self._kept += line["kept"]
        before = line.get("samples_collected", 0) if self._samples_before is None else self._samples_before
        say(epoch_row(line, self._num_epochs, before, self._kept - line.get("samples_skipped", 0)))
        self._samples_before = line["samples_trained"]

    def progress(self, epoch: int, observed: int, planned: int) -> None:
        """Move the bar inside an epoch."""
        if planned:
            done = epoch + observed / planned
            self._bar.update(self._task, completed=done, description=f"epoch {epoch + 1}/{self._num_epochs}")


def short_name(name: str) -> str:
    """Return a built-in name, or what a reference names."""
    return name.rpartition(":")[2]


EPOCH_HEAD = "epoch  requested  pruned  train loss  val acc  samples/s  train s   saved"


def epoch_row(line: Mapping[str, Any], num_epochs: int, samples_before: int, kept: int) -> str:
    """Return an epoch as a line under EPOCH_HEAD.

    Args:
        line: its line of metrics.jsonl.
        num_epochs: E.
        samples_before: samples trained in all earlier epochs, and by a scoring run.
        kept: samples kept in this epoch and all before it, without those skipped inside batches; rows that `last_batch:
            drop` leaves out are not saved.
    """
    seconds = training_seconds(line["seconds"])
    rate = (line["samples_trained"] - samples_before) / seconds if seconds else None
    visits = kept + line.get("samples_collected", 0)  # samples trained by a scoring run count as kept
    saved = 1.0 - visits / (line["num_samples"] * (line["epoch"] + 1))
    return (
        f"{line['epoch'] + 1:>3}/{num_epochs:<3} {share(line['requested_prune_ratio'], 1):>8} "
        f"{share(line['pruned_fraction'], 1):>7} {number(line['train_loss']):>11} {share(line['val_accuracy']):>8} "
        f"{number(rate, ',.0f'):>10} {seconds:>8.2f} {share(saved, 1):>7}"
    )
