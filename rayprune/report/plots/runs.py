"""Plots of one or several runs: loss and accuracy, pruning, and the distribution of the seconds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from rayprune.report.plots.style import (
    INK,
    PAPER,
    Plot,
    count_axis,
    figure_of,
    look_of,
    value_axis,
    with_looks,
)
from rayprune.report.read import RunRecord
from rayprune.report.text import training_seconds

_NAME_WIDTH = 64  # characters
_SECONDARY: dict[str, Any] = {"ls": ":", "linewidth": 1.3}  # training and requested beside validation and realized
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
_POSITIONS = {"epoch": "epoch", "samples": "samples trained", "seconds": "training seconds"}


def curve_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Return loss and accuracy by epoch, by samples trained and by training seconds."""
    return [
        Plot(f"{what}_by_{position}", f"{what.capitalize()} by {label}", partial(_draw_curves, runs, what, position))
        for what in ("loss", "accuracy")
        for position, label in _POSITIONS.items()
    ]


def pruning_plot(runs: Sequence[RunRecord]) -> Plot:
    """Return requested and realized pruning by epoch."""
    note = "Dotted: the requested prune ratio. Solid: the fraction of all samples that was left out."
    return Plot("pruning", "Requested and realized pruning", partial(_draw_pruning, runs), note=note)


def seconds_plot(runs: Sequence[RunRecord]) -> Plot:
    """Return a plot with a bar per run: its seconds by part."""
    note = "Selecting, recording and forward-only passes are what pruning costs. All but validating are train s."
    size = (4.4, 1.1 + 0.42 * _rows(runs)[-1])
    return Plot("seconds", "Where the seconds went", partial(_draw_seconds, runs), size, note, by_run=False)


def draw_legend(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """Add a legend of the runs below a plot outside a page."""
    handles = [
        axes.plot([], [], ls=look.line, color=look.color, marker=look.marker, markersize=3.5, linewidth=1.9)[0]
        for _, look in with_looks(runs)
    ]
    names = [_wrapped(run.name) for run in runs]
    figure_of(axes).legend(handles, names, loc="outside lower center", ncols=1, labelcolor=INK, fontsize=8)


def legend_height(runs: Sequence[RunRecord]) -> float:
    """Return the height of a legend of the runs in inches."""
    return 0.1 + sum(0.17 + 0.13 * _wrapped(run.name).count("\n") for run in runs)


def _wrapped(name: str) -> str:
    """Return a name in lines that fit under a plot."""
    return "\n".join(textwrap.wrap(name, _NAME_WIDTH)) or name


def _draw_curves(runs: Sequence[RunRecord], what: str, position: str, axes: Axes) -> None:
    scale = 100.0 if what == "accuracy" else 1.0
    drawn = []
    for run, look in with_looks(runs):
        x = _positions(run, position)
        size = 3.0 if len(x) <= _MAX_MARKED else 0.0
        validation = {"ls": look.line, "linewidth": 1.9, "marker": look.marker, "markersize": size}
        for part, style in (("train", _SECONDARY), ("val", validation)):
            y = np.array([getattr(record, f"{part}_{what}") for record in run.metrics], dtype=np.float64) * scale
            known = np.isfinite(y)  # a curve connects across epochs without validation
            axes.plot(x[known], y[known], color=look.color, **style)
            drawn.append(y)
    if what == "loss":
        value_axis(axes, "loss", drawn)
    else:
        axes.set_ylabel("accuracy, %")
    if position == "epoch":
        count_axis(axes)
        return
    axes.set_xlabel("train s" if position == "seconds" else _POSITIONS[position])
    axes.set_xlim(left=0)
    if position == "samples":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _positions(run: RunRecord, position: str) -> NDArray[np.float64]:
    """Return the place of each epoch's end on the x-axis; a scoring run comes before the first."""
    if position == "seconds":
        seconds = [training_seconds(line.seconds) for line in run.metrics]
        return training_seconds(run.metrics[-1].seconds_collected) + np.cumsum(seconds)
    if position == "samples":
        return np.array([line.samples_trained for line in run.metrics], dtype=np.float64)
    return np.array([line.epoch + 1 for line in run.metrics], dtype=np.float64)


def _draw_pruning(runs: Sequence[RunRecord], axes: Axes) -> None:
    for run, look in with_looks(runs):
        epochs = [record.epoch + 1 for record in run.metrics]
        shares = [(record.requested_prune_ratio, record.pruned_fraction) for record in run.metrics]
        requested, realized = 100 * np.array(shares, dtype=np.float64).T
        size = 3.0 if len(epochs) <= _MAX_MARKED else 0.0
        axes.plot(epochs, requested, color=look.color, **_SECONDARY)
        axes.plot(epochs, realized, ls=look.line, color=look.color, linewidth=1.9, marker=look.marker, markersize=size)
    axes.set_ylabel("pruned, % of all samples")
    axes.set_ylim(bottom=0, top=max(5.0, axes.get_ylim()[1]))
    count_axis(axes)


def _rows(runs: Sequence[RunRecord]) -> NDArray[np.float64]:
    """Return where the bar of each run stands, with room for its name above it; a unit is a bar under a line."""
    return np.cumsum([1.0 + 0.35 * _wrapped(run.name).count("\n") for run in runs])


def _draw_seconds(runs: Sequence[RunRecord], axes: Axes) -> None:
    parts, rows = [_seconds_by_part(run) for run in runs], _rows(runs)
    lefts = np.zeros(len(runs))
    longest = max(sum(seconds.values()) for seconds in parts) or 1.0
    for number, name in enumerate(parts[0]):
        widths = np.array([seconds[name] for seconds in parts])
        if widths.max() < longest * 0.001:
            continue
        part = look_of(number)
        style: dict[str, Any] = {"color": part.color, "hatch": part.hatch, "edgecolor": PAPER, "linewidth": 0.6}
        axes.barh(rows, widths, left=lefts, height=0.4, label=name, **style)
        lefts += widths
    # Names stand above their bars, as names beside them would take half of the width.
    for run, row in zip(runs, rows, strict=True):
        axes.text(0.0, row - 0.26, _wrapped(run.name), fontsize=7.5, va="bottom", transform=axes.get_yaxis_transform())
    axes.set_yticks([])
    axes.set_ylim(rows[-1] + 0.35, 0.1)
    axes.set_xlabel("seconds of all epochs, validation included")
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
