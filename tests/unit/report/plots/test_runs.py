"""The axes of the plots: training seconds, logarithms where values span decades, bars for classes, whole names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rayprune.report.plots.runs import curve_plots, draw_legend, seconds_plot
from rayprune.report.plots.samples import sample_plots
from rayprune.report.plots.style import Plot
from rayprune.report.read import RunRecord, read_run
from tests.support.reports import copy_of


def drawn(plot: Plot) -> Axes:
    axes = Figure().add_subplot()
    plot.draw(axes)
    return axes


def changed(run: Path, change: Callable[[int, dict[str, object]], None]) -> RunRecord:
    """Change the lines of metrics.jsonl; return the run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        change(number, line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(run)


def curves(run: RunRecord) -> dict[str, Plot]:
    return {plot.key: plot for plot in curve_plots([run])}


def test_curves_over_time_are_drawn_by_training_seconds(run: Path) -> None:
    record = changed(run, lambda number, line: line.update(seconds={"epoch": 3.0, "validate": 1.0}, wall_time=99.0))
    axes = drawn(curves(record)["accuracy_by_seconds"])
    assert np.array_equal(axes.lines[-1].get_xdata(), [2.0, 4.0, 6.0, 8.0])
    assert axes.get_xlabel() == "train s"


def test_a_scoring_run_comes_before_the_first_epoch(run: Path) -> None:
    collected = {"epoch": 5.0, "validate": 1.0}
    record = changed(run, lambda _, line: line.update(seconds={"epoch": 1.0}, seconds_collected=collected))
    assert np.array_equal(drawn(curves(record)["loss_by_seconds"]).lines[-1].get_xdata(), [5.0, 6.0, 7.0, 8.0])


@pytest.mark.parametrize(("lowest", "scale"), [(0.005, "log"), (0.05, "linear"), (-0.005, "linear")])
def test_losses_have_a_logarithmic_axis_if_they_span_decades(run: Path, lowest: float, scale: str) -> None:
    record = changed(run, lambda number, line: line.update(train_loss=2.0, val_loss=lowest if number == 3 else 1.0))
    assert drawn(curves(record)["loss_by_epoch"]).get_yscale() == scale
    assert drawn(curves(record)["accuracy_by_epoch"]).get_yscale() == "linear"


def test_classes_are_bars(runs: list[Path]) -> None:
    records = [read_run(folder) for folder in runs]
    plot = next(plot for plot in sample_plots(records)[0] if plot.key == "class_balance")
    axes = drawn(plot)
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(bars) == 2 * 10
    assert not axes.lines
    assert [bar.get_height() for bar in bars[:10]] == [100.0] * 10  # the run on all samples


def test_names_of_runs_are_whole(runs: list[Path], tmp_path: Path) -> None:
    name = "trial " + " ".join(f"method.key_{number}=0.123456" for number in range(8))
    record = read_run(copy_of(runs[1], tmp_path / "run"), name)
    axes = drawn(seconds_plot([record]))
    assert [" ".join(text.get_text().split()) for text in axes.texts] == [name]
    draw_legend(axes, [record, record])
    (legend,) = axes.figure.legends[-1:]
    assert " ".join(legend.get_texts()[0].get_text().split()) == name
