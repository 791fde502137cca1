"""Optuna as a search: its proposals, an interrupted sweep, and the error message if it is not installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rayprune.config.experiments import SweepSection
from rayprune.experiments.sweep.search import OptunaSearch, import_optuna

RAMP = {"schedule": "linear", "end": 0.6}
SPACE = {
    "optim.lr": {"loguniform": [0.01, 1.0]},
    "method.prune_ratio": [0.3, RAMP],
    "train.epochs": {"quniform": [2, 6, 2]},
}


def search(objectives: dict[str, bool]) -> OptunaSearch:
    section = SweepSection(space=SPACE, search="optuna", num_trials=9)
    return OptunaSearch(section.axes, objectives, 0, lambda point: {"point": point})


def test_a_missing_optuna_is_reported_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'rayprune\[optuna\]'"):
        import_optuna()


@pytest.mark.parametrize("objectives", [{"val_accuracy": True}, {"val_accuracy": True, "compute": False}])
def test_points_lie_in_the_space_and_results_reach_the_study(objectives: dict[str, bool]) -> None:
    pytest.importorskip("optuna")
    points = search(objectives)
    points.add_finished(
        {"optim.lr": 0.1, "method.prune_ratio": RAMP, "train.epochs": 4}, dict.fromkeys(objectives, 0.5)
    )
    for number in range(12):
        point = points.suggest(str(number))["point"]
        assert list(point) == list(SPACE)
        assert 0.01 <= point["optim.lr"] <= 1.0
        assert point["method.prune_ratio"] in (0.3, RAMP)
        assert point["train.epochs"] in (2, 4, 6)
        result: dict[str, Any] = {"error": "NaN"} if number == 3 else dict.fromkeys(objectives, number / 12)
        points.on_trial_complete(str(number), result)
    states = [trial.state.name for trial in points._study.get_trials()]
    assert states == ["COMPLETE"] * 4 + ["FAIL"] + ["COMPLETE"] * 8


def test_interrupted_trials_come_first() -> None:
    pytest.importorskip("optuna")
    points = search({"val_accuracy": True})
    point = {"optim.lr": 0.123, "method.prune_ratio": RAMP, "train.epochs": 6}
    points.resume(point, {"again": True})
    assert points.suggest("a") == {"again": True}
    points.on_trial_complete("a", {"val_accuracy": 0.7})
    (trial,) = points._study.get_trials()
    assert trial.params["optim.lr"] == 0.123  # the result belongs to the interrupted trial's point
    assert "point" in points.suggest("b")
