"""The space of a sweep: its points, and the mistakes that are refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayprune.config import Config, load_config, make_config
from rayprune.config.yaml import read_yaml
from rayprune.core.redaction import secrets_of, with_secrets
from rayprune.experiments.sweep.space import (
    check_space,
    listed_points,
    probe_points,
    sweep_digest,
    trial_config,
    trial_name,
)
from rayprune.experiments.trials import trial_spec
from tests.support.paths import ROOT


def base(space: dict[str, Any], method: dict[str, Any] | None = None, **sweep: Any) -> Config:
    return make_config({"method": method or {"name": "full"}, "sweep": {"space": space, **sweep}})


def test_a_grid_has_every_combination_in_order() -> None:
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


def test_values_may_be_whole_methods_and_schedules() -> None:
    trees = [{"name": "infobatch", "prune_ratio": 0.3}, {"name": "random_epoch", "prune_ratio": 0.5}]
    config = base({"method": trees})
    assert [trial_config(config, point).method["name"] for point in check_space(config)] == [
        "infobatch",
        "random_epoch",
    ]
    ramp = {"schedule": "linear", "start": 0.1, "end": 0.6}
    config = base({"method.prune_ratio": [0.3, ramp]}, {"name": "infobatch", "prune_ratio": {"schedule": "annealed"}})
    # A value replaces that of the base: keys of the old schedule do not reach the new one.
    assert trial_config(config, check_space(config)[1]).method["prune_ratio"] == ramp


def test_the_base_configs_method_keys_apply_to_its_own_method_only() -> None:
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
    ("space", "sweep", "message"),
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
        ({"optim.lr": [0.1, 0.1]}, {}, "appears twice"),
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
def test_a_mistake_is_refused_in_one_line(space: dict[str, Any], sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_space(base(space, **sweep))
    assert "\n" not in str(caught.value)


def test_a_random_search_is_reproducible() -> None:
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


def test_every_value_is_probed_with_every_method() -> None:
    space = {"method.name": ["infobatch", "random_epoch"], "method.prune_ratio": [0.1, 0.2], "optim.lr": [0.1, 0.2]}
    probes = list(probe_points(base(space).sweep))
    assert {(p["method.name"], p["method.prune_ratio"]) for p in probes} == {
        (name, ratio) for name in space["method.name"] for ratio in (0.1, 0.2)
    }
    assert {(p["method.name"], p["optim.lr"]) for p in probes} == {
        (n, r) for n in space["method.name"] for r in (0.1, 0.2)
    }


def test_the_section_affects_the_digest_of_the_sweep_but_not_of_a_run() -> None:
    one, other = base({"train.epochs": [2]}), base({"train.epochs": [3]})
    assert one.digest() == other.digest() == make_config({"method": {"name": "full"}}).digest()
    assert sweep_digest(one) != sweep_digest(other)
    assert sweep_digest(one) == sweep_digest(base({"train.epochs": [2]}, max_concurrent=3, max_failures=9))
    assert "sweep" not in make_config({}).to_yaml()


def test_trials_are_the_same_with_another_token_and_tune_gets_none() -> None:
    one, other = (
        make_config(
            {"data": {"path": f"s3://{s}@b"}, "sweep": {"space": {"data.path": [f"s3://{s}@b", f"s3://{s}@c"]}}}
        )
        for s in ("key:A-SECRET", "key:B-SECRET")
    )
    assert sweep_digest(one) == sweep_digest(other)
    point, *_ = listed_points(one.sweep)
    assert trial_name(0, point) == trial_name(0, listed_points(other.sweep)[0])
    secrets = secrets_of(one.model_dump(mode="json"))
    for point in listed_points(one.sweep):
        trial = trial_config(one, point)
        spec = trial_spec(trial)
        assert "SECRET" not in str(spec)
        assert make_config(with_secrets(read_yaml(spec["yaml"]), secrets)) == trial


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
