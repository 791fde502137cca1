"""Plots of a sweep, out of its results.parquet.

The picture of a comparison: what each arm loses or gains against full training, with its interval.

The picture of a network with several exits: accuracy against multiply-adds, each exit alone and leaving early.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype

from rayprune.config.yaml import read_yaml
from rayprune.errors import RunFolderError
from rayprune.report.plots.style import INK, MUTED, PAPER, SERIES, Draw, save_png
from rayprune.report.read import count_of, read_comparison, share, short
from rayprune.report.tables import read_results

PARETO_SIZE = (8.0, 5.0)
_MARKS = "osD^vPX*"
_MOST_NAMED = 8


def plot_pareto(folder: Path) -> Path:
    """Draw each finished trial's accuracy against its compute, with the Pareto front; return pareto.png.

    Args:
        folder: of a sweep, with results.parquet.

    Raises:
        ValueError: no trial has an accuracy.
    """
    table, keys = read_results(folder / "results.parquet")
    draw = pareto(table, keys, folder.resolve().name)
    if draw is None:
        raise RunFolderError(f"{folder}: no trial has an accuracy to plot")
    return save_png(draw, PARETO_SIZE, folder / "pareto.png")


def pareto(table: pd.DataFrame, keys: list[str], title: str) -> Draw | None:
    """Return what draws a sweep's plot, see `plot_pareto`; None where no trial has an accuracy.

    Trials that were stopped are drawn hollow. The cost axis is the share of N samples in every epoch, or FLOPs where
    trials of the sweep have different lengths or networks.
    """
    table = table[table["val_accuracy"].notna() & table["status"].isin(["finished", "stopped"])]
    return None if table.empty else partial(_draw, table, keys, title)


def _draw(table: pd.DataFrame, keys: list[str], title: str, figure: Figure) -> None:
    finished = table[table["status"] == "finished"]
    cost, scale = "compute_share", 100.0
    if finished["flops"].notna().any():
        each = (finished["flops"] / finished["compute"]).round()
        if finished["epochs"].nunique() > 1 or each.nunique() > 1:
            cost, scale = "flops", 1.0
    axes = figure.add_subplot()
    _draw_trials(axes, table, keys, cost, scale)
    _draw_front(axes, finished[finished["pareto"]].sort_values(cost), keys, cost, scale)
    unit = "compute, % of N samples in every epoch" if cost == "compute_share" else "FLOPs of training"
    axes.set(xlabel=unit, ylabel="validation accuracy of the last epoch, %", title=title)
    axes.margins(0.08)
    axes.legend(loc="lower right", fontsize=8)


def _draw_trials(axes: Axes, table: pd.DataFrame, keys: list[str], cost: str, scale: float) -> None:
    for number, (name, group) in enumerate(table.groupby(table.apply(_method, axis=1, keys=keys))):
        colour, mark = SERIES[number % len(SERIES)], _MARKS[number % len(_MARKS)]
        for status, faces in (("finished", colour), ("stopped", "none")):
            some = group[group["status"] == status]
            if len(some):
                label = f"{name}" if status == "finished" else f"{name}, stopped early"
                axes.scatter(
                    some[cost] * scale,
                    some["val_accuracy"] * 100,
                    marker=mark,
                    edgecolors=colour,
                    facecolors=faces,
                    label=label,
                    zorder=3,
                )


def _draw_front(axes: Axes, front: pd.DataFrame, keys: list[str], cost: str, scale: float) -> None:
    x, y = front[cost] * scale, front["val_accuracy"] * 100
    axes.step(x, y, where="post", color=MUTED, linewidth=1.2, zorder=1, label="Pareto front")
    axes.scatter(x, y, s=130, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=4)
    # Trials that reached the same at the same cost share a label, a line each.
    labels: dict[tuple[float, float], list[str]] = {}
    for _, row in front.iterrows():
        place = (float(row[cost] * scale), float(row["val_accuracy"] * 100))
        # Of many points only the numbers of their trials have room.
        label = ", ".join(_shown(row[key]) for key in keys) if len(front) <= _MOST_NAMED else row["trial"][:3]
        labels.setdefault(place, []).append(label)
    middle = sum(axes.get_xlim()) / 2
    for place, lines in labels.items():
        # The front rises to the right: below it and above it are the free sides, and the plot's edge is far.
        offset, aligned = ((9, -4), "left") if place[0] < middle else ((-7, 5), "right")
        side = "top" if offset[1] < 0 else "bottom"
        text = "\n".join(lines)
        axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=7, ha=aligned, va=side)


def _method(row: Any, keys: list[str]) -> str:
    """Return what a trial is coloured by: its method and its network, where they were swept."""
    names = []
    for section in ("method", "model"):
        if f"{section}.name" in keys:
            names.append(_shown(row[f"{section}.name"]))
        elif section in keys:
            value = _read(row[section])
            names.append(str(value.get("name")) if isinstance(value, dict) else str(value))
    return short(", ".join(names), 60) or "trials"


def _read(text: Any) -> Any:
    try:
        return read_yaml(str(text))
    except ValueError:
        return text


def _shown(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    text = f"{value:.3g}" if isinstance(value, float) else str(value).strip("{}").replace("schedule: ", "")
    return short(text, 60)


_METHOD, _BASELINE = SERIES[1], SERIES[0]


def draw_intervals(folder: Path) -> Path:
    """Draw compare.png from a comparison's compare.json: one row an arm, in points of accuracy.

    Args:
        folder: of the comparison.

    Raises:
        ValueError: compare.json is damaged.
    """
    report = read_comparison(folder / "compare.json")
    return save_png(partial(draw_arms, report), size_of(report), folder / "compare.png", dpi=200)


def size_of(report: Mapping[str, Any]) -> tuple[float, float]:
    """Return how large the picture of a comparison is, in inches: no wider than a phone shows legibly."""
    return 4.6, 1.4 + 0.46 * max(1, len(report["arms"]) - 1)


def draw_arms(report: Mapping[str, Any], figure: Figure) -> None:
    """Fill a figure with what compare.json holds."""
    arms = [arm for arm in report["arms"] if arm["baseline"] != "full"]
    axes = figure.add_subplot()
    whole = [run["accuracy"] for run in report["arms"][0]["runs"]]
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.axvline(-report["margin"], color=MUTED, linewidth=1.0, linestyle="--")
    for row, arm in enumerate(arms):
        each = [run["accuracy"] - full for run, full in zip(arm["runs"], whole, strict=True)]
        _draw_arm(axes, row, arm, each)
    axes.set_yticks([])
    axes.set_ylim(max(1, len(arms)) - 0.55, -0.75)
    num = len(report["seeds"])
    interval = f"{count_of(num, 'seed')}, {report['confidence']:.0%} interval of pairs" if num > 1 else "1 seed"
    axes.set_xlabel(f"points of accuracy to full training ({interval})", fontsize=8)
    full = report["arms"][0]
    title = f"full training: {full['accuracy']:.2f} %; dashed: the margin of {report['margin']:g}"
    axes.set_title(title, fontsize=8.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _draw_arm(axes: Axes, row: int, arm: Mapping[str, Any], each: list[float]) -> None:
    """Draw one row: its name, and below it the interval, the mean, and each seed's difference."""
    colour = _METHOD if arm["baseline"] == "method" else _BASELINE
    found = arm["to_full"]
    if found["low"] is not None and found["high"] is not None:
        axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.0, solid_capstyle="butt")
    axes.plot([found["mean"]], [row], "o", color=colour, markersize=5)
    axes.plot(each, [row] * len(each), "|", color=colour, markersize=7, alpha=0.6)
    # Above its interval and not beside it: beside it half of a phone's width were names.
    label = axes.text(0.0, row - 0.42, f"{short(arm['name'], 40)}: {_cost(arm)}", fontsize=7.5, va="center")
    label.set_transform(axes.get_yaxis_transform())
    label.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})  # the lines of 0 and of the margin stop


def _cost(arm: Mapping[str, Any]) -> str:
    compute = None if arm["compute_saved"] is None else 1 - arm["compute_saved"]
    return f"compute {share(compute, 0)}, time {share(arm['seconds_to_full']['mean'], 0)}"


EXITS_SIZE = (7.0, 4.8)
_ANYTIME, _DYNAMIC = SERIES[1], SERIES[0]
_FOLDER = "exits"
_UNITS = ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3), ("", 1.0))


def draw_exits(run_folder: Path) -> Path:
    """Draw <run>/exits/accuracy_macs.png from anytime.csv and dynamic.csv, or from the one that is there.

    Args:
        run_folder: of a run that was evaluated.

    Raises:
        ValueError: it was not.
    """
    tables = read_exits(run_folder)
    if not tables:
        raise RunFolderError(f"{run_folder} was not evaluated yet: rayprune evaluate {run_folder}")
    name = run_folder.resolve().name
    return save_png(
        partial(draw_evaluations, tables, name), EXITS_SIZE, run_folder / _FOLDER / "accuracy_macs.png", dpi=130
    )


def read_exits(run_folder: Path) -> dict[str, pd.DataFrame]:
    """Return the evaluations of a run's exits that are there, by name: anytime, dynamic.

    Raises:
        ValueError: one is damaged.
    """
    tables = {}
    for name, own in (("anytime", "exit"), ("dynamic", "p")):
        file = run_folder / _FOLDER / f"{name}.csv"
        if not file.exists():
            continue
        try:
            table = pd.read_csv(file)
        except ValueError as error:
            raise RunFolderError(
                f"{file} is no table ({' '.join(str(error).split())}): evaluate the run again"
            ) from None
        if not _is_evaluation(table, own):
            raise RunFolderError(f"{file} is not what rayprune evaluate writes: evaluate the run again")
        tables[name] = table
    return tables


def _is_evaluation(table: pd.DataFrame, own: str) -> bool:
    if table.empty or not {"macs", "top1", "samples", "checkpoint", own} <= set(table.columns):
        return False
    numbers = table[["macs", "top1", "samples", own]]
    return all(is_numeric_dtype(kind) for kind in numbers.dtypes) and bool(np.isfinite(numbers).all(axis=None))


def draw_evaluations(tables: Mapping[str, pd.DataFrame], name: str, figure: Figure) -> None:
    """Fill a figure with a run's evaluations, at least one."""
    axes = figure.add_subplot()
    most = max(float(table["macs"].max()) for table in tables.values())
    unit, scale = next((name, size) for name, size in _UNITS if most >= size or size == 1.0)
    if "dynamic" in tables:
        _draw_dynamic(axes, tables["dynamic"], scale)
    if "anytime" in tables:
        _draw_anytime(axes, tables["anytime"], scale)
    first = next(iter(tables.values())).iloc[0]
    axes.set_xlabel(f"multiply-adds a sample{unit}; where samples leave early, their mean")
    axes.set_ylabel(f"top-1 accuracy on {first['samples']:,} samples, %")
    axes.set_title(f"{name}, {first['checkpoint']}", fontsize=10)
    axes.set_xlim(0, most / scale * 1.06)
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def _draw_anytime(axes: Axes, table: pd.DataFrame, scale: float) -> None:
    macs, accuracy = table["macs"] / scale, table["top1"] * 100
    label = "all samples at one exit, by its number"
    axes.plot(macs, accuracy, "s--", color=_ANYTIME, markersize=12, linewidth=1.0, label=label, zorder=3, mfc=PAPER)
    for exit_, x, y in zip(table["exit"], macs, accuracy, strict=True):
        # Inside the mark: nothing else is printed there, wherever the curves run.
        axes.annotate(str(exit_), (x, y), fontsize=8, color=INK, ha="center", va="center", zorder=5)


def _draw_dynamic(axes: Axes, table: pd.DataFrame, scale: float) -> None:
    table = table.sort_values("p")
    label = f"leaving early, p = {table['p'].min()} to {table['p'].max()}"
    macs, accuracy = table["macs"] / scale, table["top1"] * 100
    axes.plot(macs, accuracy, "o-", color=_DYNAMIC, markersize=3, linewidth=1.4, label=label, zorder=2)
