"""A run inside a trial of Tune: how its error reaches the command line, as text alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayprune.cli.errors import explain
from rayprune.errors import TrainingFailed
from rayprune.experiments.trials import Trial, trial_spec
from tests.support.runs import run_config, user


def test_a_mistake_ends_the_trial_for_good_and_its_line_keeps_its_own_cure(tmp_path: Path) -> None:
    trial = Trial({"trial": trial_spec(run_config(tmp_path, model={"name": "no_such_model"}))})
    result = trial.step()
    trial.cleanup()
    assert result["done"]
    assert result["error"].startswith("ConfigError: ")
    line, _ = explain(TrainingFailed(f"run full-seed0: {result['error']}"))
    assert line == f"run full-seed0: {result['error']}"


def test_an_error_of_the_users_code_may_be_tried_again(tmp_path: Path) -> None:
    trial = Trial({"trial": trial_spec(run_config(tmp_path, model={"name": user("broken")}))})
    with pytest.raises(RuntimeError, match="training failed on rank 0: ValueError: this model is broken"):
        trial.step()
    trial.cleanup()
