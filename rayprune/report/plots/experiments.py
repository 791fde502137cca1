"""Plots of experiments: the trials of a sweep, the arms of a comparison, and the exits of a network.

Each one is a Plot on the page, and a PNG file that the command of the experiment writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from rayprune.config.experiments import format_value
from rayprune.config.yaml import read_yaml
from rayprune.errors import RunFolderError
from rayprune.report.plots.style import INK, MUTED, PAPER, SERIES, Plot, figure_of, save_png
from rayprune.report.read import Arm, Comparison, SweepResults, read_comparison, read_exits, read_results
from rayprune.report.text import count_of, percent, share, short

_MARKS = "osD^vPX*"
_MAX_NAMED = 8  # trials on the front that are labeled with their values


def save_pareto(folder: Path) -> Path:
    """Draw a sweep's pareto.png from its results.parquet; return the file.

    Raises:
        RunFolderError: no trial has an accuracy.
    """
    plot = pareto_plot(read_results(folder / "results.parquet"), folder.resolve().name)
    if plot is None:
        raise RunFolderError(f"{folder}: no trial has an accuracy to plot yet, try again when one has ended")
    return save_png(plot, folder / "pareto.png")


def save_intervals(folder: Path) -> Path:
    """Draw a comparison's compare.png from its compare.json; return the file."""
    return save_png(intervals_plot(read_comparison(folder / "compare.json")), folder / "compare.png", dpi=200)


def save_exits(run_folder: Path) -> Path:
    """Draw <run>/exits/accuracy_macs.png from the evaluations of a run; return the file.

    Raises:
        RunFolderError: there is no evaluation.
    """
    tables = read_exits(run_folder)
    if not tables:
        raise RunFolderError(f"{run_folder} was not evaluated yet: rayprune evaluate {run_folder}")
    plot = exits_plot(tables, run_folder.resolve().name)
    return save_png(plot, run_folder / "exits" / "accuracy_macs.png", dpi=130)


def pareto_plot(results: SweepResults, name: str, key: str = "pareto") -> Plot | None:
    """Return a plot of accuracy against compute with the Pareto front; None if no trial has an accuracy.

    Stopped trials are hollow. The cost is the fraction of N samples in every epoch, or FLOPs if the trials differ in
    length or network.
    """
    table = results.table
    table = table[table["val_accuracy"].notna() & table["status"].isin(["finished", "stopped"])]
    if table.empty:
        return None
    draw = partial(_draw_pareto, table, results.keys, name)
    return Plot(key, "Accuracy against compute", draw, (8.0, 5.0), by_run=False, scrolls=True)


def _draw_pareto(table: pd.DataFrame, keys: list[str], name: str, axes: Axes) -> None:
    finished = table[table["status"] == "finished"]
    flops_per_sample = (finished["flops"] / finished["compute"]).dropna().round()
    in_flops = len(flops_per_sample) > 0 and (finished["epochs"].nunique() > 1 or flops_per_sample.nunique() > 1)
    cost = table["flops"] if in_flops else table["compute_share"] * 100
    points = table.assign(x=cost, y=table["val_accuracy"] * 100, series=table.apply(_series_of, axis=1, keys=keys))
    for number, (series, trials) in enumerate(points.groupby("series")):
        color, mark = SERIES[number % len(SERIES)], _MARKS[number % len(_MARKS)]
        for status, face, label in (("finished", color, series), ("stopped", "none", f"{series}, stopped early")):
            some = trials[trials["status"] == status]
            if len(some):
                axes.scatter(
                    some["x"], some["y"], marker=mark, edgecolors=color, facecolors=face, label=label, zorder=3
                )
    _draw_front(axes, points[points["pareto"] & (points["status"] == "finished")].sort_values("x"), keys)
    unit = "FLOPs of training" if in_flops else "compute, % of N samples in every epoch"
    axes.set(xlabel=unit, ylabel="validation accuracy after the last epoch, %", title=name)
    axes.margins(0.08)
    axes.legend(loc="lower right", fontsize=8)


def _draw_front(axes: Axes, front: pd.DataFrame, keys: list[str]) -> None:
    axes.step(front["x"], front["y"], where="post", color=MUTED, linewidth=1.2, zorder=1, label="Pareto front")
    axes.scatter(front["x"], front["y"], s=130, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=4)
    middle = sum(axes.get_xlim()) / 2
    # Trials with the same accuracy and cost share a label with a line for each.
    for _, trials in front.groupby(["x", "y"]):
        x, y = trials[["x", "y"]].iloc[0].astype(float)
        # There is only room for the values of a few trials; otherwise, show their numbers.
        labels = [
            ", ".join(_value(trial[key]) for key in keys) if len(front) <= _MAX_NAMED else trial["trial"][:3]
            for _, trial in trials.iterrows()
        ]
        # The front rises to the right, so there is room below its left part and above its right part.
        offset, align, side = ((9, -4), "left", "top") if x < middle else ((-7, 5), "right", "bottom")
        text = "\n".join(labels)
        axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=7, ha=align, va=side)


def _series_of(trial: Any, keys: list[str]) -> str:
    """Return the label that determines a trial's color: its method and its network, if they were swept."""
    names = []
    for section in ("method", "model"):
        if f"{section}.name" in keys:
            names.append(_value(trial[f"{section}.name"]))
        elif section in keys:
            value = _parsed(trial[section])
            names.append(str(value.get("name")) if isinstance(value, dict) else str(value))
    return short(", ".join(names), 60) or "trials"


def _parsed(text: Any) -> Any:
    try:
        return read_yaml(str(text))
    except ValueError:
        return text


def _value(value: Any) -> str:
    if pd.isna(value):
        return "–"
    return short(format_value(value).strip("{}").replace("schedule: ", ""), 60)


def intervals_plot(comparison: Comparison, key: str = "intervals") -> Plot:
    """Return a plot with a row per arm: its difference to full training in points of accuracy, with the interval."""
    num_rows = max(1, len(comparison.arms) - 1)
    size = (4.6, 1.4 + 0.46 * num_rows)  # no wider than a phone can show legibly
    return Plot(key, "Accuracy against full training", partial(_draw_intervals, comparison), size, by_run=False)


def _draw_intervals(comparison: Comparison, axes: Axes) -> None:
    full = comparison.arms[0]
    arms = [arm for arm in comparison.arms if arm.baseline != "full"]
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.axvline(-comparison.margin, color=MUTED, linewidth=1.0, linestyle="--")
    for row, arm in enumerate(arms):
        by_seed = [run.accuracy - whole.accuracy for run, whole in zip(arm.runs, full.runs, strict=True)]
        _draw_arm(axes, row, arm, by_seed)
    axes.set_yticks([])
    axes.set_ylim(max(1, len(arms)) - 0.55, -0.75)
    num = len(comparison.seeds)
    interval = f"{num} seeds, {percent(comparison.confidence)} interval" if num > 1 else "1 seed"
    axes.set_xlabel(f"accuracy against full training, in points ({interval})", fontsize=8)
    title = f"full training: {full.accuracy:.2f} %; dashed: the margin of {comparison.margin:g}"
    axes.set_title(title, fontsize=8.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _draw_arm(axes: Axes, row: int, arm: Arm, by_seed: list[float]) -> None:
    """Draw a row: the arm's name, and below it the interval, the mean, and the difference of each seed."""
    color = SERIES[1] if arm.baseline == "method" else SERIES[0]
    low, high = arm.to_full.low, arm.to_full.high
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=color, linewidth=2.0, solid_capstyle="butt")
    axes.plot([arm.to_full.mean], [row], "o", color=color, markersize=5)
    axes.plot(by_seed, [row] * len(by_seed), "|", color=color, markersize=7, alpha=0.6)
    # Names stand above the intervals, as names beside them would take half of a phone's width.
    cost = f"compute {share(1 - arm.compute_saved, 0)}, time {share(arm.seconds_to_full.mean, 0)}"
    label = axes.text(0.0, row - 0.42, f"{short(arm.name, 40)}: {cost}", fontsize=7.5, va="center")
    label.set_transform(axes.get_yaxis_transform())
    label.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})  # interrupts the vertical lines


_UNITS = ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3), ("", 1.0))


def exits_plot(tables: Mapping[str, pd.DataFrame], name: str, key: str = "exits") -> Plot:
    """Return a plot of accuracy against multiply-adds, for each exit alone and for early exit."""
    draw = partial(_draw_exits, tables, name)
    return Plot(key, name, draw, (7.0, 4.8), by_run=False, scrolls=True)


def _draw_exits(tables: Mapping[str, pd.DataFrame], name: str, axes: Axes) -> None:
    most = max(float(table["macs"].max()) for table in tables.values())
    unit, scale = next((unit, size) for unit, size in _UNITS if most >= size or size == 1.0)
    if "dynamic" in tables:
        table = tables["dynamic"].sort_values("p")
        macs, accuracy = table["macs"] / scale, table["top1"] * 100
        label = f"early exit, p = {table['p'].min()} to {table['p'].max()}"
        axes.plot(macs, accuracy, "o-", color=SERIES[0], markersize=3, linewidth=1.4, label=label, zorder=2)
    if "anytime" in tables:
        table = tables["anytime"]
        macs, accuracy = table["macs"] / scale, table["top1"] * 100
        label = "all samples at one exit, by its number"
        axes.plot(macs, accuracy, "s--", color=SERIES[1], markersize=12, lw=1.0, label=label, zorder=3, mfc=PAPER)
        for exit_, x, y in zip(table["exit"], macs, accuracy, strict=True):
            # Inside the marker, where no curve runs.
            axes.annotate(str(exit_), (x, y), fontsize=8, color=INK, ha="center", va="center", zorder=5)
    first = next(iter(tables.values())).iloc[0]
    axes.set_xlabel(f"multiply-adds per sample{unit} (early exit: mean)")
    axes.set_ylabel(f"top-1 accuracy on {count_of(int(first['samples']), 'sample')}, %")
    axes.set_title(f"{name}, {first['checkpoint']}", fontsize=10)
    axes.set_xlim(0, most / scale * 1.06)
    axes.margins(y=0.1)
    figure_of(axes).legend(loc="outside lower center", ncols=2, fontsize=9)
