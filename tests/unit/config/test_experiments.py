"""The space of a sweep: what is read, which points it has, and which mistakes are refused before anything starts.

The `compare:` section: what it holds, and what is refused with which line.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.config import Config, load_config, make_config
from rayprune.config.experiments import BASELINES, axis_of, shown_value
from rayprune.config.yaml import read_yaml
from rayprune.experiments.sweep.space import (
    check_space,
    listed_points,
    probe_points,
    sweep_digest,
    trial_config,
    trial_name,
)
from tests.support.paths import ROOT


def base(space: dict[str, Any], method: dict[str, Any] | None = None, **sweep: Any) -> Config:
    return make_config({"method": method or {"name": "full"}, "sweep": {"space": space, **sweep}})


def test_a_grid_has_every_combination_in_the_order_given() -> None:
    config = base({"method.name": ["infobatch", "random_epoch"], "method.prune_ratio": [0.3, 0.5]})
    points = check_space(config)
    assert [tuple(point.values()) for point in points] == [
        ("infobatch", 0.3),
        ("infobatch", 0.5),
        ("random_epoch", 0.3),
        ("random_epoch", 0.5),
    ]
    trial = trial_config(config, points[3])
    assert (trial.method["name"], trial.method["prune_ratio"]) == ("random_epoch", 0.5)
    assert trial.sweep.space == {}


def test_whole_methods_and_schedules_are_values() -> None:
    trees = [{"name": "infobatch", "prune_ratio": 0.3}, {"name": "random_epoch", "prune_ratio": 0.5}]
    config = base({"method": trees})
    assert [trial_config(config, point).method["name"] for point in check_space(config)] == [
        "infobatch",
        "random_epoch",
    ]
    ramp = {"schedule": "linear", "start": 0.1, "end": 0.6}
    config = base({"method.prune_ratio": [0.3, ramp]}, {"name": "infobatch", "prune_ratio": {"schedule": "annealed"}})
    # A value replaces the base's: what the old schedule was given does not reach the new one.
    assert trial_config(config, check_space(config)[1]).method["prune_ratio"] == ramp


def test_keys_of_the_base_belong_to_its_own_method() -> None:
    config = base({"method.name": ["infobatch", "random_epoch"]}, {"name": "infobatch", "ema": 0.5, "prune_ratio": 0.2})
    same, other = (trial_config(config, point).method for point in check_space(config))
    assert (same["ema"], same["prune_ratio"]) == (0.5, 0.2)
    assert "ema" not in other
    assert other["prune_ratio"] != 0.2


def test_sections_may_be_nested_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("method: infobatch\nsweep: {space: {optim.lr: [0.1]}}\n")
    config = load_config(file, ["sweep.space.method.prune_ratio=[0.1,0.2]"])
    assert config.sweep.space == {"optim.lr": [0.1], "method.prune_ratio": [0.1, 0.2]}
    assert len(check_space(config)) == 2


@pytest.mark.parametrize(
    ("space", "sweep", "said"),
    [
        ({}, {}, "nothing varies"),
        ({"train.epoch": [1, 2]}, {}, "'train.epoch': did you mean 'epochs'"),
        ({"methode.name": ["full"]}, {}, "did you mean 'method'"),
        ({"method.name": ["infobatch", "infobach"]}, {}, "did you mean 'infobatch'"),
        ({"method.name": ["infobatch", "random_epoch"], "method.ema": [0.1, 0.2]}, {}, "'random_epoch'"),
        ({"method.name": ["infobatch"], "method.prune_ratio": [0.3, 1.5]}, {}, "method.prune_ratio=1.5"),
        ({"optim.lr": {"loguniform": [-0.1, 1]}}, {"search": "random", "num_trials": 2}, "low below high above 0"),
        ({"optim.lr": {"uniform": [-0.1, 1]}}, {"search": "random", "num_trials": 2}, "optim.lr=-0.1"),
        ({"train.epochs": {"uniform": [2.0, 5.0]}}, {"search": "random", "num_trials": 2}, "train.epochs"),
        ({"optim.lr": {"lognuniform": [0.1, 1]}}, {}, "did you mean 'loguniform'"),
        ({"optim.lr": {"uniform": [0.1, 1]}}, {}, "sweep.search=random"),
        ({"optim.lr": 0.1}, {}, "must be a list"),
        ({"optim.lr": []}, {}, "list of values"),
        ({"optim.lr": [0.1, 0.1]}, {}, "stands twice"),
        ({"optim.lr": [0.1]}, {"search": "random"}, "sweep.num_trials"),
        ({"optim.lr": [0.1]}, {"num_trials": 3}, "leave it out"),
        ({"optim.lr": {"grid": [0.1]}}, {"search": "optuna", "num_trials": 3}, "takes choice"),
        ({"run.name": ["a", "b"]}, {}, "'run.name'"),
        ({"scaling.num_workers": [1, 2]}, {}, "'scaling.num_workers'"),
        ({"optim.lr.peak": [1, 2]}, {}, "unknown distribution|'optim.lr' is a value"),
        ({"optim.lr": [0.1]}, {"serch": "grid"}, "did you mean 'search'"),
        ({"optim.lr": [0.1]}, {"max_concurrent": 0}, "at least 1"),
    ],
)
def test_mistakes_are_refused_in_one_line(space: dict[str, Any], sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        check_space(base(space, **sweep))
    assert "\n" not in str(caught.value)


def test_a_random_search_draws_the_same_trials_again() -> None:
    space = {"optim.lr": {"loguniform": [0.01, 1.0]}, "train.epochs": {"quniform": [4, 10, 2]}}
    config = base(space, search="random", num_trials=20, seed=3)
    points = check_space(config)
    assert points == check_space(config)
    assert points != listed_points(config.sweep.model_copy(update={"seed": 4}))
    assert {point["train.epochs"] for point in points} <= {4, 6, 8, 10}
    assert all(0.01 <= point["optim.lr"] <= 1.0 for point in points)
    assert len({trial_name(number, point) for number, point in enumerate(points)}) == 20


def test_a_random_search_draws_at_each_point_of_a_grid() -> None:
    space = {"optim.lr": {"uniform": [0.01, 1.0]}, "train.seed": {"grid": [0, 1, 2]}}
    points = listed_points(base(space, search="random", num_trials=4).sweep)
    assert [point["train.seed"] for point in points] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({point["optim.lr"] for point in points}) == 12


@given(low=st.floats(1e-6, 1e3), factor=st.floats(1.001, 1e3), seed=st.integers(0, 99))
def test_draws_lie_between_the_ends(low: float, factor: float, seed: int) -> None:
    high = low * factor
    for form in ("uniform", "loguniform"):
        value = axis_of("a.b", {form: [low, high]}).draw(np.random.default_rng(seed))
        assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
    value = axis_of("a.b", {"quniform": [low, high, (high - low) / 3]}).draw(np.random.default_rng(seed))
    assert low <= value <= high


def test_every_value_is_probed_with_every_method() -> None:
    space = {"method.name": ["infobatch", "random_epoch"], "method.prune_ratio": [0.1, 0.2], "optim.lr": [0.1, 0.2]}
    probed = list(probe_points(base(space).sweep))
    assert {(p["method.name"], p["method.prune_ratio"]) for p in probed} == {
        (name, ratio) for name in space["method.name"] for ratio in (0.1, 0.2)
    }
    assert {(p["method.name"], p["optim.lr"]) for p in probed} == {
        (n, r) for n in space["method.name"] for r in (0.1, 0.2)
    }


def test_the_section_does_not_change_a_runs_digest_but_the_sweeps() -> None:
    one, other = base({"train.epochs": [2]}), base({"train.epochs": [3]})
    assert one.digest() == other.digest() == make_config({"method": {"name": "full"}}).digest()
    assert sweep_digest(one) != sweep_digest(other)
    assert sweep_digest(one) == sweep_digest(base({"train.epochs": [2]}, max_concurrent=3, max_failures=9))
    assert "sweep" not in make_config({}).to_yaml()


def test_a_value_is_shown_in_one_line() -> None:
    assert shown_value([{"a": None}, True]) == "[{a: None}, True]"


def test_a_mistake_in_the_space_is_refused_before_ray_is_loaded() -> None:
    code = (
        "import sys; sys.argv = ['rayprune', 'sweep', 'configs/digits_sweep.yaml', 'sweep.space.train.epoch=[1]']\n"
        "from rayprune.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print('LOADED', sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "did you mean 'epochs'" in done.stderr
    assert "LOADED []" in done.stdout


def section(**keys: Any) -> Any:
    return make_config({"compare": keys}).compare


def test_by_default_three_seeds_meet_every_baseline() -> None:
    compare = section()
    assert compare.all_seeds == (0, 1, 2)
    assert compare.baselines == tuple(BASELINES)
    assert (compare.asked, compare.margin, compare.confidence) == ((), 0.2, 0.95)


def test_a_count_of_seeds_counts_from_zero_and_methods_are_whole() -> None:
    compare = section(
        seeds=2, methods=["infobatch", {"name": "random_epoch", "prune_ratio": 0.25}], baselines=["random"]
    )
    assert compare.all_seeds == (0, 1)
    assert [(method["name"], method["prune_ratio"]) for method in compare.asked] == [
        ("infobatch", 0.5),
        ("random_epoch", 0.25),
    ]
    assert compare.baselines == ("full", "random"), "there is no comparison without full training"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seeds": 0}, ["compare.seeds", "at least one seed"]),
        ({"seeds": []}, ["compare.seeds", "at least one seed"]),
        ({"seeds": -3}, ["compare.seeds", "at least one seed"]),
        ({"seeds": [0, 1, 1]}, ["compare.seeds names 1 twice"]),
        ({"seeds": [0, -1]}, ["compare.seeds", "at least 0"]),
        ({"seeds": [0.5]}, ["compare.seeds", "list of whole numbers"]),
        ({"baselines": ["full_tiem"]}, ["'full_tiem'", "did you mean 'full_time'"]),
        ({"baselines": ["random", "random"]}, ["'random' twice"]),
        ({"methods": ["infobach"]}, ["'infobach'", "'infobatch'"]),
        ({"methods": ["full"]}, ["compare.methods[0] is full", "name a method that prunes"]),
        ({"methods": ["infobatch", "infobatch"]}, ["compare.methods[1]", "leave it out"]),
        ({"methods": [{"name": "infobatch", "train.epochs": 5}]}, ["'train.epochs'", "leave it out", "full_steps"]),
        ({"methods": [{"name": "infobatch", "train": {"epochs": 5}}]}, ["'train'", "leave it out", "full_steps"]),
        ({"methods": [{"name": "infobatch", "epochs": 5}]}, ["'epochs'", "leave it out", "full_steps"]),
        ({"methods": [{"name": "infobatch", "prune_ratoi": 0.5}]}, ["prune_ratoi", "'prune_ratio'"]),
        ({"margin": -1}, ["compare.margin", "greater than or equal to 0"]),
        ({"confidence": 1}, ["compare.confidence", "less than 1"]),
        ({"parallel": 0}, ["compare.parallel = 0", "at least 1, or auto"]),
        ({"timed_seeds": 0}, ["compare.timed_seeds", "greater than or equal to 1"]),
        ({"marign": 1}, ["'compare.marign'", "'margin'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_cure(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        section(**keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_it_decides_no_run_and_reads_back_equal() -> None:
    plain = make_config({})
    asked = make_config({"compare": {"seeds": 5, "methods": ["infobatch"]}})
    assert asked.digest() == plain.digest()
    assert Config.model_validate(read_yaml(asked.to_yaml())) == asked
