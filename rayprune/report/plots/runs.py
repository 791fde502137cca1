"""Plots of one or several runs: loss and accuracy, pruning, and the distribution of the seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from rayprune.report.plots.style import INK, SERIES, Plot, count_axis, figure_of, with_lines
from rayprune.report.read import EpochMetrics, RunRecord
from rayprune.report.text import short

_MAX_MARKED = 30  # epochs, up to which each one has a marker on a curve
# The parts of an epoch's seconds, in the order of the bar.
_PARTS = {
    "training": "train",
    "waiting for data": "data_wait",
    "forward-only passes": "forward_only",
    "selecting": "select",
    "recording": "record",
    "validating": "validate",
    "checkpoint": "checkpoint",
}
_POSITIONS: dict[str, tuple[str, Callable[[EpochMetrics], float | None]]] = {
    "epoch": ("epoch", lambda line: line.epoch + 1),
    "samples": ("samples trained", lambda line: line.samples_trained),
    "seconds": ("seconds", lambda line: line.wall_time),
}


def curve_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Return loss and accuracy by epoch, by samples trained and by seconds."""
    return [
        Plot(f"{what}_by_{position}", f"{what.capitalize()} by {label}", partial(_draw_curves, runs, what, position))
        for what in ("loss", "accuracy")
        for position, (label, _) in _POSITIONS.items()
    ]


def pruning_plot(runs: Sequence[RunRecord]) -> Plot:
    """Return requested and realized pruning by epoch."""
    note = "Thin dashes: the requested prune ratio. Solid: the fraction of all samples that was left out."
    return Plot("pruning", "Requested and realized pruning", partial(_draw_pruning, runs), note=note)


def seconds_plot(runs: Sequence[RunRecord]) -> Plot:
    """Return a plot with a bar per run: its seconds by part."""
    note = "Selecting, recording and forward-only passes are what pruning costs."
    size = (4.4, 1.5 + 0.42 * len(runs))
    return Plot("seconds", "Where the seconds went", partial(_draw_seconds, runs), size, note, by_run=False)


def draw_legend(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """Add a legend of the runs below a plot outside a page."""
    handles = [axes.plot([], [], line, color=color, linewidth=1.9)[0] for _, color, line in with_lines(runs)]
    names = [short(run.name, 40) for run in runs]
    figure_of(axes).legend(handles, names, loc="outside lower center", ncols=1 if len(runs) < 5 else 2, labelcolor=INK)


def _draw_curves(runs: Sequence[RunRecord], what: str, position: str, axes: Axes) -> None:
    label, place = _POSITIONS[position]
    scale = 100.0 if what == "accuracy" else 1.0
    for run, color, line in with_lines(runs):
        x = np.array([place(record) for record in run.metrics], dtype=np.float64)
        for part, style, width in (("train", "--", 0.9), ("val", line, 1.9)):
            y = np.array([getattr(record, f"{part}_{what}") for record in run.metrics], dtype=np.float64) * scale
            size = 3.0 if len(x) <= _MAX_MARKED else 0.0
            known = np.isfinite(y)  # a curve connects across epochs without validation
            axes.plot(x[known], y[known], style, color=color, linewidth=width, marker="o", markersize=size)
    axes.set_ylabel("accuracy, %" if what == "accuracy" else "loss")
    if position == "epoch":
        count_axis(axes)
        return
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    if position == "samples":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_pruning(runs: Sequence[RunRecord], axes: Axes) -> None:
    for run, color, line in with_lines(runs):
        epochs = [record.epoch + 1 for record in run.metrics]
        shares = [(record.requested_prune_ratio, record.pruned_fraction) for record in run.metrics]
        requested, realized = 100 * np.array(shares, dtype=np.float64).T
        size = 3.0 if len(epochs) <= _MAX_MARKED else 0.0
        axes.plot(epochs, requested, "--", color=color, linewidth=0.9)
        axes.plot(epochs, realized, line, color=color, linewidth=1.9, marker="o", markersize=size)
    axes.set_ylabel("pruned, % of all samples")
    axes.set_ylim(bottom=0, top=max(5.0, axes.get_ylim()[1]))
    count_axis(axes)


def _draw_seconds(runs: Sequence[RunRecord], axes: Axes) -> None:
    parts = [_seconds_by_part(run) for run in runs]
    lefts = np.zeros(len(runs))
    longest = max(sum(seconds.values()) for seconds in parts) or 1.0
    for number, name in enumerate(parts[0]):
        widths = np.array([seconds[name] for seconds in parts])
        if widths.max() < longest * 0.001:
            continue
        axes.barh(range(len(runs)), widths, left=lefts, color=SERIES[number % len(SERIES)], height=0.6, label=name)
        lefts += widths
    axes.set_yticks(range(len(runs)), [short(run.name, 22) for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_xlabel("seconds of all epochs")
    axes.grid(visible=False, axis="y")
    if axes.patches:
        figure_of(axes).legend(loc="outside lower center", ncols=3, fontsize=8)


def _seconds_by_part(run: RunRecord) -> dict[str, float]:
    """Return the seconds of each part; they add up to those of the epochs."""
    parts = {name: run.seconds(key) for name, key in _PARTS.items()}
    # The time for training includes the wait for data.
    parts["training"] = max(0.0, parts["training"] - parts["waiting for data"])
    parts["other"] = max(0.0, run.seconds("epoch") - sum(parts.values()))
    return parts
