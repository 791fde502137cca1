"""The benchmarks can be run: each name has a module with figures(), and a figure says whether its goal holds."""

from __future__ import annotations

import importlib
import inspect
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.__main__ import BY_NAME, NAMES, main
from benchmarks.harness import HEADER, Figure
from benchmarks.images import VARIABLE, load
from rayprune.sources import open_data


@pytest.mark.parametrize("name", [*NAMES, *BY_NAME])
def test_every_name_has_figures(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert not inspect.signature(module.figures).parameters
    assert module.__doc__


def test_an_unknown_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "plans"])
    assert main() == 2
    assert "plans" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "holds"), [("≤ 1.02", "yes"), ("≤ 0.5", "NO"), ("≥ 0.5", "yes"), ("≥ 1.5", "NO"), ("", "")]
)
def test_the_median_decides(goal, holds):
    figure = Figure("seconds", [0.1, 1.0, 99.0], goal)
    assert figure.median == 1.0
    assert figure.holds == holds
    row = figure.row()
    assert row.startswith("seconds ")
    assert "0.1 … 99" in row
    assert row.index("  3 ") == HEADER.index("  n ")


def test_random_images_stand_in(tmp_path, monkeypatch):
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


def test_real_images_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert load(tmp_path, 50).name == "CIFAR-10"
