"""The benchmarks can be run: each name has a module with figures(), and a figure reports whether its goal holds."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import vectors
from benchmarks.__main__ import BY_NAME, NAMES, main
from benchmarks.harness import HEADER, Figure, Head, Row, alternate
from benchmarks.images import VARIABLE, load
from benchmarks.methods import reads_vectors
from benchmarks.soak import fit_trends
from rayprune.methods import METHODS
from rayprune.sources import open_data


@pytest.mark.parametrize("name", [*NAMES, *BY_NAME])
def test_every_name_has_figures(name: str) -> None:
    module, _, function = name.partition(".")
    of = importlib.import_module(f"benchmarks.{module}")
    assert not inspect.signature(getattr(of, function or "figures")).parameters
    assert of.__doc__


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "plans"])
    assert main() == 2
    assert "plans" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "holds"), [("≤ 1.02", "yes"), ("≤ 0.5", "NO"), ("≥ 0.5", "yes"), ("≥ 1.5", "NO"), ("", "")]
)
def test_the_median_decides(goal: str, holds: str) -> None:
    figure = Figure("seconds", [0.1, 1.0, 99.0], goal)
    assert figure.median == 1.0
    assert figure.holds == holds
    row = figure.row()
    assert row.startswith("seconds ")
    assert "0.1 … 99" in row
    assert row.index("  3 ") == HEADER.index("  n ")


def test_a_row_shows_medians_and_says_no_where_a_goal_is_missed() -> None:
    figures = Figure("s", [0.1, 0.3, 0.2], "≤ 0.1"), None, Figure("bytes", [4.0], "≤ 8")
    row = Row("infobatch", figures)
    assert row.row() == "| infobatch | 0.2 (0.1 … 0.3) NO: ≤ 0.1 |  | 4 |"
    assert row.holds == "NO"
    assert Row("full", figures[1:]).holds == "yes"
    assert Row("full", [None, Figure("s", [1.0])]).holds == ""
    assert Row("divbs", [Figure("µs", [15_600.4, 999.6])]).row() == "| divbs | 8,300 (1,000 … 15,600) |"
    head = Head(("method", "s", "sweep, s", "bytes"))
    assert head.row().splitlines() == ["", "| method | s | sweep, s | bytes |", "|---|---|---|---|"]
    assert not head.holds


def test_every_method_has_a_row() -> None:
    scalars = {name for name, cls in METHODS.items() if not reads_vectors(cls())}
    cases = Counter(case.method["name"] for case in (*vectors.CASES, *vectors.SLOW))
    assert cases.keys() == METHODS.keys() - scalars
    assert set(cases.values()) == {1}
    assert scalars >= {"infobatch", "tdds", "divbs"}


@pytest.mark.parametrize("name", ["moderate", "infomax", "glister"])
def test_a_vector_method_is_measured_at_any_size(name: str) -> None:
    values = vectors.measure(vectors.Case({"name": name}, num_samples=300, num_classes=5, width=4))
    assert list(values) == list(vectors.COLUMNS[1:])
    assert values["disk, B/sample"] == 4 * {"glister": 5}.get(name, 4)
    assert all(value >= 0 for value in values.values())


def test_measurements_alternate_and_warm_up_rounds_are_dropped() -> None:
    calls: list[str] = []
    measures = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in ("a", "b")}
    assert alternate(measures, rounds=2, warm_up=1) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize(("leak", "flat"), [(0, True), (1, False)])
def test_a_leak_of_one_handle_per_epoch_is_not_flat(leak: int, flat: bool) -> None:
    samples = {epoch: Counter({"all processes: handles": 400 + leak * epoch + epoch % 2}) for epoch in range(40)}
    (trend,) = fit_trends(samples, warm_up=10)
    assert (trend.growth <= trend.limit) == flat
    assert trend.growth == pytest.approx(29 * leak, abs=1)


def test_random_images_are_used_without_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    images = load(tmp_path, 50)
    assert images.name == "random images"
    keys = images.keys(tmp_path / "cache")
    keys.pop("augment")
    splits = open_data(**keys)
    assert splits.validation is None
    rows = splits.train.take(np.arange(50))
    assert rows["image"].shape == (50, 32, 32, 3)
    assert sorted(np.bincount(rows["label"])) == [5] * 10


def test_real_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert load(tmp_path, 50).name == "CIFAR-10"
