"""The picture of a comparison: what each arm loses or gains against full training, with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayprune.report.drawing import INK, MUTED, SERIES, save_png

_METHOD, _BASELINE = SERIES[1], SERIES[0]


def draw_intervals(folder: Path) -> Path:
    """Draw compare.png from a comparison's compare.json: one row an arm, in points of accuracy.

    Args:
        folder: of the comparison.
    """
    report = json.loads((folder / "compare.json").read_text())
    return save_png(partial(draw, report), size_of(report), folder / "compare.png", dpi=130)


def size_of(report: Mapping[str, Any]) -> tuple[float, float]:
    """Return how large the picture of a comparison is, in inches."""
    return 7.6, 1.8 + 0.36 * len(report["arms"])


def draw(report: Mapping[str, Any], figure: Figure) -> None:
    """Fill a figure with what compare.json holds."""
    arms = [arm for arm in report["arms"] if arm["baseline"] != "full"]
    axes = figure.add_subplot()
    whole = [run["accuracy"] for run in report["arms"][0]["runs"]]
    for row, arm in enumerate(arms):
        each = [run["accuracy"] - full for run, full in zip(arm["runs"], whole, strict=True)]
        _draw_arm(axes, row, arm, each)
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.axvline(-report["margin"], color=MUTED, linewidth=1.0, linestyle="--")
    labels = [f"{arm['name']}\n{_cost(arm)}" for arm in arms]
    axes.set_yticks(range(len(arms)), labels, fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    num = len(report["seeds"])
    interval = f", {report['confidence']:.0%} interval of paired seeds" if num > 1 else ": no interval"
    axes.set_xlabel(f"accuracy minus that of full training, points ({num} seed{'s' * (num > 1)}{interval})")
    full = report["arms"][0]
    axes.set_title(f"full training: {full['accuracy']:.2f} %; dashed: the margin of {report['margin']:g}", fontsize=10)
    axes.grid(visible=False, axis="y")


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
