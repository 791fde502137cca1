"""The picture of a comparison: what each arm loses or gains against full training, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayprune.report.cells import count_of, share, short
from rayprune.report.comparison_file import read_comparison
from rayprune.report.drawing import INK, MUTED, PAPER, SERIES, save_png

_METHOD, _BASELINE = SERIES[1], SERIES[0]


def draw_intervals(folder: Path) -> Path:
    """Draw compare.png from a comparison's compare.json: one row an arm, in points of accuracy.

    Args:
        folder: of the comparison.

    Raises:
        ValueError: compare.json is damaged.
    """
    report = read_comparison(folder / "compare.json")
    return save_png(partial(draw, report), size_of(report), folder / "compare.png", dpi=200)


def size_of(report: Mapping[str, Any]) -> tuple[float, float]:
    """Return how large the picture of a comparison is, in inches: no wider than a phone shows legibly."""
    return 4.6, 1.4 + 0.46 * max(1, len(report["arms"]) - 1)


def draw(report: Mapping[str, Any], figure: Figure) -> None:
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
