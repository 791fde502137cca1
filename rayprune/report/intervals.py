"""The picture of a comparison: what each arm loses or gains against full training, with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_METHOD, _BASELINE, _MARGIN = "#c0392b", "#34495e", "#7f8c8d"


def draw_intervals(folder: Path) -> Path:
    """Draw compare.png from a comparison's compare.json: one row an arm, in points of accuracy.

    Args:
        folder: of the comparison.
    """
    report = json.loads((folder / "compare.json").read_text())
    arms = [arm for arm in report["arms"] if arm["baseline"] != "full"]
    figure = Figure(figsize=(8.5, 1.8 + 0.36 * len(arms)), layout="constrained")
    axes = figure.add_subplot()
    whole = [run["accuracy"] for run in report["arms"][0]["runs"]]
    for row, arm in enumerate(arms):
        each = [run["accuracy"] - full for run, full in zip(arm["runs"], whole, strict=True)]
        _draw_arm(axes, row, arm, each)
    axes.axvline(0.0, color="black", linewidth=1.0)
    axes.axvline(-report["margin"], color=_MARGIN, linewidth=1.0, linestyle="--")
    labels = [f"{arm['name']}\n{_cost(arm)}" for arm in arms]
    axes.set_yticks(range(len(arms)), labels, fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    num = len(report["seeds"])
    interval = f", {report['confidence']:.0%} interval of paired seeds" if num > 1 else ": no interval"
    axes.set_xlabel(f"accuracy minus that of full training, points ({num} seed{'s' * (num > 1)}{interval})")
    full = report["arms"][0]
    axes.set_title(f"full training: {full['accuracy']:.2f} %; dashed: the margin of {report['margin']:g}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    partial = folder / "compare.png.partial"
    FigureCanvasAgg(figure)
    figure.savefig(partial, dpi=130, format="png")
    return partial.replace(folder / "compare.png")


def _draw_arm(axes: Axes, row: int, arm: Mapping[str, Any], each: list[float]) -> None:
    """Draw one row: the interval, the mean, and each seed's difference."""
    colour = _METHOD if arm["baseline"] == "method" else _BASELINE
    found = arm["to_full"]
    if found["low"] is not None:
        axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.0, solid_capstyle="butt")
    axes.plot([found["mean"]], [row], "o", color=colour, markersize=6)
    axes.plot(each, [row] * len(each), "|", color=colour, markersize=7, alpha=0.6)


def _cost(arm: Mapping[str, Any]) -> str:
    return f"compute {1 - arm['compute_saved']:.0%}, time {arm['seconds_to_full']['mean']:.0%}"
