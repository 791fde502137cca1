"""The commands `rayprune train` and `rayprune score`: lines, a progress bar and tables of runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rayprune.cli.console import console, debug_option
from rayprune.errors import ConfigError


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG... [key=value]...")
@debug_option
@click.pass_obj
def train(debug: bool, words: tuple[str, ...], debug_here: bool) -> None:
    """Train what each CONFIG says, with key.sub=value laid over it; several runs are compared at the end.

    The same command again goes on from the last checkpoint.
    """
    overrides = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word]
    if not paths:
        raise ConfigError("no config is named: rayprune train configs/digits_full.yaml")
    # Loaded here, so that `rayprune methods` need not wait for Ray and torch.
    from rayprune.config import load_config

    configs = [load_config(path, overrides) for path in paths]  # all of them before any training starts
    folders = [Path(config.run.storage_path) / str(config.run.name) for config in configs]
    if len(set(folders)) < len(folders):
        raise ConfigError(f"two of the configs train in one folder, {folders[0]}: leave run.name out")
    runs = [
        (Path(path).stem, *_train_one(config, debug or debug_here)) for path, config in zip(paths, configs, strict=True)
    ]

    for number, line in enumerate(runs_table(runs)):
        console.print(line, style="bold" if number == 0 else None, highlight=False, markup=False)
    console.print()
    for name, folder, _ in runs:
        console.print(f"{name}: {folder}", highlight=False)


def _train_one(config: Any, debug: bool) -> tuple[Path, list[dict[str, Any]]]:
    from rayprune.engine.train.driver import train as run

    start = time.perf_counter()
    with RunDisplay(console) as display:
        result = run(config, on_scored=_scored, debug=debug, **_listeners(display))
    console.print(f"done in {elapsed(start)}\n", highlight=False)
    return result.folder, result.metrics


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@debug_option
@click.pass_obj
def score(debug: bool, words: tuple[str, ...], debug_here: bool) -> None:
    """Score the samples for a method that chooses one subset, such as tdds: the first half of `rayprune train`.

    Writes scores.parquet; `rayprune select` chooses by it, and `rayprune train` with the same CONFIG goes on from it.
    """
    from rayprune.config import load_config
    from rayprune.engine.train.driver import score as run

    paths = [word for word in words if "=" not in word]
    if len(paths) != 1:
        raise ConfigError("name one config: rayprune score configs/digits_tdds.yaml")
    config = load_config(paths[0], [word for word in words if "=" in word])
    with RunDisplay(console) as display:
        scored = run(config, debug=debug or debug_here, **_listeners(display))
    _scored(scored)
    console.print(f"scores: {scored.scores}", highlight=False)


def _listeners(display: Any) -> dict[str, Any]:
    from rayprune.engine.storage.run_folder import read_metrics
    from rayprune.report.read import count_of

    def started(start: Any) -> None:
        config, resources, first = start.config, start.resources, start.first_epoch
        fewest, most = config.scaling.worker_range
        workers = count_of(most, "worker") if fewest == most else f"{fewest} to {most} workers"
        workers = workers if most else "in this process"
        stops = config.train.stop_after
        length = f", {stops} of {config.train.epochs} epochs" if stops else ""
        console.print(
            f"{start.folder.name}: {config.method['name']} on {config.data.source}, {config.model.name}{length}, "
            f"{workers}, stream {resources.stream} ({resources.stream_reason})",
            highlight=False,
        )
        display.begin(config.last_epoch, first, [m for m in read_metrics(start.folder) if m["epoch"] < first])
        if first:
            done = first >= config.last_epoch
            console.print("finished before" if done else f"goes on at epoch {first + 1}", highlight=False)

    listen = display.progress if console.is_terminal else None
    return {"on_epoch": display.epoch, "on_progress": listen, "on_start": started, "on_notice": display.warn}


def _scored(scored: Any) -> None:
    facts, selection = scored.selection.facts, scored.selection
    cost = (
        "logs of another program, whose cost is not counted"
        if scored.imported
        else (f"{scored.prior_cost.samples_trained:,} samples trained to score them, part of what the run costs")
    )
    threshold = f", threshold {facts['threshold']:.4g}" if "threshold" in facts else ""
    console.print(
        f"chosen: {selection.num_kept:,} of {selection.num_samples:,} samples{threshold} ({cost})", highlight=False
    )


HEADER = "epoch   asked  pruned  train loss  val acc  samples/s  seconds   saved"


def epoch_line(record: Mapping[str, Any], num_epochs: int, samples_before: int, kept: int) -> str:
    """Return one epoch as a line under HEADER.

    Args:
        record: a line of metrics.jsonl.
        num_epochs: E.
        samples_before: samples trained in all earlier epochs, and by a run that scored them.
        kept: samples kept in this epoch and all before it.
    """
    trained = record["samples_trained"] - samples_before
    seconds = record["seconds"]
    rate = trained / seconds["train"] if seconds.get("train") else float("nan")
    return (
        f"{record['epoch'] + 1:>3}/{num_epochs:<3} {record['requested_prune_ratio']:>5.1%} "
        f"{record['pruned_fraction']:>7.1%} {_number(record['train_loss'], '>11.4f')} "
        f"{_number(record['val_accuracy'], '>8.2%')} {rate:>10,.0f} {seconds.get('epoch', 0.0):>8.2f} "
        f"{saved_share(kept, record):>7.1%}"
    )


def saved_share(kept: int, record: Mapping[str, Any]) -> float:
    """Return which share of the visits of a full run up to this epoch was saved; below 0 where scoring cost more.

    Args:
        kept: samples kept in this epoch and all before it; rows that `last_batch: drop` leaves out are not saved.
        record: a line of metrics.jsonl; what a run that scored the samples trained on counts as kept.
    """
    spent = kept + record.get("samples_collected", 0)
    share = 1.0 - spent / (record["num_samples"] * (record["epoch"] + 1))
    return round(share, 6) + 0.0  # no -0.0


class RunDisplay:
    """Print a run while it goes: plain lines, and on a terminal a bar with the time left below them."""

    def __init__(self, console: Console) -> None:
        self._console, self._num_epochs = console, 0
        self._samples_before: int | None = None
        self._kept = 0
        self._printed_header = False
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
        self._task: Any = None

    def __enter__(self) -> RunDisplay:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, num_epochs: int, epoch: int = 0, before: Sequence[Mapping[str, Any]] = ()) -> None:
        """Show a run of so many epochs, from an epoch on, after the metrics lines of those before it."""
        self._num_epochs, self._printed_header = num_epochs, False
        self._samples_before = before[-1]["samples_trained"] if before else None
        self._kept = sum(record["kept"] for record in before)
        if self._bar is not None:
            self._bar.update(self._task, total=num_epochs, completed=epoch)

    def epoch(self, record: dict[str, Any]) -> None:
        """Print one finished epoch."""
        if not self._printed_header:
            self._console.print(HEADER, style="bold", highlight=False)
            self._printed_header = True
        self._kept += record["kept"]
        before = record.get("samples_collected", 0) if self._samples_before is None else self._samples_before
        self._console.print(epoch_line(record, self._num_epochs, before, self._kept), highlight=False)
        self._samples_before = record["samples_trained"]

    def warn(self, line: str) -> None:
        """Print a line that is not an epoch's."""
        self._console.print(line, style="yellow", highlight=False, markup=False)

    def progress(self, epoch: int, observed: int, planned: int) -> None:
        """Move the bar inside an epoch."""
        if self._bar is not None and planned:
            done = epoch + observed / planned
            self._bar.update(self._task, completed=done, description=f"epoch {epoch + 1}/{self._num_epochs}")


def runs_table(runs: Sequence[tuple[str, Path, list[dict[str, Any]]]]) -> list[str]:
    """Return the final table as lines: what each run reached, what it saved, and what selection cost.

    Args:
        runs: (name, folder, metrics lines) of each.
    """
    rows = [("run", "val acc", "samples trained", "saved", "compute", "train s", "selection s", "total s")]
    for name, _, metrics in runs:
        last = metrics[-1]
        seconds = {key: _seconds(metrics, key) for key in ("train", "epoch")}
        # Selecting, recording and re-scoring exist only because of pruning: what saving samples costs.
        cost = _seconds(metrics, "select", "record", "forward_only")
        kept = sum(record["kept"] for record in metrics)
        if len(metrics) <= last["epoch"]:  # lines were lost: what was trained is known, what it was kept of is not
            kept = last["samples_trained"] - last.get("samples_collected", 0)
        saved = saved_share(kept, last)
        trained = f"{last['samples_trained']:,}"
        # Scoring passes, proxies and padding included; a run on everything has a little over 100 % for its padding.
        whole = last["num_samples"] * (last["epoch"] + 1)
        compute = f"{last['compute'] / whole:.1%}" if "compute" in last else "–"
        times = (f"{seconds['train']:.1f}", f"{cost:.2f}", f"{seconds['epoch']:.1f}")
        rows.append((name, _number(last["val_accuracy"], ".2%"), trained, f"{saved:.1%}", compute, *times))
    # Plain columns as wide as their content: a number is never cut to fit a terminal.
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _seconds(metrics: Sequence[Mapping[str, Any]], *keys: str) -> float:
    before = metrics[-1].get("seconds_collected", {})
    return sum(record["seconds"].get(key, 0.0) for record in metrics for key in keys) + sum(
        before.get(key, 0.0) for key in keys
    )


def elapsed(start: float) -> str:
    """Return the seconds since a time.perf_counter() value, as text."""
    return f"{time.perf_counter() - start:.1f} s"


def _number(value: float | None, form: str) -> str:
    if value is None:
        width = form.lstrip("><").split(".")[0]
        return f"{'–':>{width}}" if width else "–"
    return format(value, form)
