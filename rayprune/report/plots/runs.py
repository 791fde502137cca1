"""Plots of one run or of several laid over each other: what they reached, what they pruned, where the seconds went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from rayprune.report.plots.style import INK, SERIES, Draw, series
from rayprune.report.read import Line, RunRecord, short

WIDE = (4.4, 2.9)
# What an epoch's seconds are made of, in the order of the bar.
_PARTS = {
    "training": "train",
    "waiting for data": "data_wait",
    "forward-only passes": "forward_only",
    "selecting": "select",
    "recording": "record",
    "validating": "validate",
    "checkpoint": "checkpoint",
}
_AXES: dict[str, tuple[str, Callable[[Line], float]]] = {
    "epoch": ("epochs", lambda line: line["epoch"] + 1),
    "samples": ("samples trained", lambda line: _number(line["samples_trained"])),
    "seconds": ("seconds", lambda line: _number(line["wall_time"])),
}


@dataclass(frozen=True)
class Plot:
    """A plot and what stands beside it.

    Attributes:
        key: the name of its PNG file; unique in a report.
        title: its heading.
        draw: fills a figure.
        size: inches.
        note: a sentence below it, or "".
        runs: whether each run has its colour, so that a legend of the runs is needed.
        pan: whether it is too dense for a phone's width, where it scrolls.
    """

    key: str
    title: str
    draw: Draw
    size: tuple[float, float] = WIDE
    note: str = ""
    runs: bool = True
    pan: bool = False


def curve_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Return loss and accuracy, by epoch, by samples trained and by seconds."""
    plots = []
    for what in ("loss", "accuracy"):
        for place, (label, _) in _AXES.items():
            draw = partial(_draw_curves, runs, what, place)
            plots.append(Plot(f"{what}_by_{place}", f"{what.capitalize()} by {label.replace('epochs', 'epoch')}", draw))
    return plots


def pruning_plot(runs: Sequence[RunRecord]) -> Plot:
    """Return requested (dashed) against realised pruning, epoch by epoch."""
    note = "Thin dashes: the prune ratio that was asked for. Solid: the share of all samples that was really left out."
    return Plot("pruning", "Requested and realised pruning", partial(_draw_pruning, runs), note=note)


def seconds_plot(runs: Sequence[RunRecord]) -> Plot:
    """Return a bar a run of where its seconds went."""
    height = 1.5 + 0.42 * len(runs)
    note = "Selecting, recording and forward-only passes exist only because of pruning: what saving samples costs."
    return Plot("seconds", "Where the seconds went", partial(_draw_seconds, runs), (WIDE[0], height), note, runs=False)


def spent(metrics: Sequence[Line]) -> dict[str, float]:
    """Return the seconds of each part of a run, what scored its samples included."""
    before = metrics[-1]["seconds_collected"]
    return {
        key: sum(line["seconds"].get(key, 0.0) for line in metrics) + before.get(key, 0.0)
        for key in (*_PARTS.values(), "epoch")
    }


def _parts(metrics: Sequence[Line]) -> dict[str, float]:
    """Return words → seconds, which add up to those of the epochs."""
    seconds = spent(metrics)
    parts = {words: seconds[key] for words, key in _PARTS.items()}
    # Workers wait for data inside what is timed as training.
    parts["training"] = max(0.0, parts["training"] - parts["waiting for data"])
    parts["other"] = max(0.0, seconds["epoch"] - sum(parts.values()))
    return parts


def _draw_curves(runs: Sequence[RunRecord], what: str, place: str, figure: Figure) -> None:
    axes = figure.add_subplot()
    label, position = _AXES[place]
    scale = 100.0 if what == "accuracy" else 1.0
    for number, run in enumerate(runs):
        colour, line = series(number)
        x = [position(record) for record in run.metrics]
        for part, width in (("train", 0.9), ("val", 1.9)):
            y = [_number(record[f"{part}_{what}"]) * scale for record in run.metrics]
            shown = np.isfinite(y)
            size = 3.0 if len(x) <= 30 else 0.0
            style = "--" if part == "train" else line
            curve = axes.plot(np.array(x)[shown], np.array(y)[shown], style, color=colour, linewidth=width)[0]
            curve.set(marker="o", markersize=size)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %" if what == "accuracy" else "loss")
    if place == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif place == "samples":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0 if place != "epoch" else None)


def _draw_pruning(runs: Sequence[RunRecord], figure: Figure) -> None:
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        colour, line = series(number)
        epochs = [record["epoch"] + 1 for record in run.metrics]
        asked = [100 * _number(record["requested_prune_ratio"]) for record in run.metrics]
        real = [100 * _number(record["pruned_fraction"]) for record in run.metrics]
        axes.plot(epochs, asked, "--", color=colour, linewidth=0.9)
        axes.plot(epochs, real, line, color=colour, linewidth=1.9, marker="o", markersize=3 if len(real) <= 30 else 0)
    axes.set_xlabel("epochs")
    axes.set_ylabel("pruned, % of all samples")
    axes.set_ylim(bottom=0, top=max(5.0, axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_seconds(runs: Sequence[RunRecord], figure: Figure) -> None:
    axes = figure.add_subplot()
    each = [_parts(run.metrics) for run in runs]
    lefts = np.zeros(len(runs))
    whole = max(sum(parts.values()) for parts in each) or 1.0
    for number, words in enumerate(each[0]):
        widths = np.array([parts[words] for parts in each])
        if widths.max() < whole * 0.001:
            continue
        colour = SERIES[number % len(SERIES)]
        axes.barh(range(len(runs)), widths, left=lefts, color=colour, height=0.6, label=words)
        lefts += widths
    axes.set_yticks(range(len(runs)), [short(run.name, 22) for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_xlabel("seconds of all epochs")
    axes.grid(visible=False, axis="y")
    if axes.patches:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def legend(figure: Figure, runs: Sequence[RunRecord]) -> None:
    """Draw a legend of the runs below a plot that stands alone."""
    handles = []
    for number in range(len(runs)):
        colour, line = series(number)
        handles.append(figure.axes[0].plot([], [], line, color=colour, linewidth=1.9)[0])
    names = [short(run.name, 40) for run in runs]
    figure.legend(handles, names, loc="outside lower center", ncols=1 if len(runs) < 5 else 2, labelcolor=INK)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def facts_of(line: Line) -> Mapping[str, Any]:
    """Return what the selection of an epoch says of itself."""
    facts: Mapping[str, Any] = line["selection"]
    return facts
