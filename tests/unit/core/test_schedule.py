"""Schedules: end points, range, monotonicity, the power law's published numbers, and messages."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core.schedule import SCHEDULES, Polynomial, Power, Schedule, epoch_at

ratios = st.floats(0.0, 1.0, exclude_max=True)
ramps = st.fixed_dictionaries({"schedule": st.sampled_from(["linear", "cosine"]), "start": ratios, "end": ratios})
polynomials = st.fixed_dictionaries(
    {"schedule": st.just("polynomial"), "start": ratios, "end": ratios, "power": st.floats(0.01, 50)}
)
powers = st.integers(1, 60).flatmap(
    lambda blocks: (
        st.fixed_dictionaries(
            {
                "schedule": st.just("power"),
                "blocks": st.just(blocks),
                "budget": st.floats(1 / blocks, 1.0, exclude_min=blocks > 1).filter(lambda b: b > 1 / blocks),
            }
        )
        if blocks > 1
        else st.just({"schedule": "power", "blocks": 2, "budget": 1.0})
    )
)
steps = st.lists(st.tuples(st.floats(0, 1), ratios), unique_by=lambda pair: pair[0], max_size=5).map(
    lambda pairs: {
        "schedule": "step",
        "milestones": [milestone for milestone, _ in sorted(pairs)],
        "ratios": [ratio for _, ratio in sorted(pairs)],
        "start": 0.1,
    }
)
simple = st.one_of(ratios, ramps, polynomials, powers, steps)
annealed = st.fixed_dictionaries({"schedule": st.just("annealed"), "of_ratio": simple, "until": st.floats(0, 1)})
configs = st.one_of(simple, annealed)


def curve(config: Any, num_epochs: int) -> list[float]:
    schedule = Schedule.of(config)
    return [schedule(epoch, num_epochs) for epoch in range(num_epochs)]


@given(configs, st.integers(1, 120))
def test_every_ratio_lies_in_range(config: Any, num_epochs: int) -> None:
    assert all(type(ratio) is float and 0.0 <= ratio < 1.0 for ratio in curve(config, num_epochs))


@given(configs)
def test_the_config_round_trips(config: Any) -> None:
    schedule = Schedule.of(config)
    plain = schedule.to_config()
    assert yaml.safe_load(yaml.safe_dump(plain)) == json.loads(json.dumps(plain)) == plain
    assert Schedule.of(plain) == schedule
    assert hash(Schedule.of(plain)) == hash(schedule)
    assert Schedule.of(schedule) is schedule


@given(st.one_of(ramps, polynomials), st.integers(2, 60))
def test_ramps_are_monotone_from_start_to_end(config: dict[str, Any], num_epochs: int) -> None:
    points = curve(config, num_epochs)
    assert points[0] == pytest.approx(config["start"], abs=1e-12)
    assert points[-1] == pytest.approx(config["end"], abs=1e-12)
    rising = config["end"] >= config["start"]
    assert all((b >= a - 1e-12) if rising else (b <= a + 1e-12) for a, b in itertools.pairwise(points))


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_a_run_of_one_epoch_uses_the_end_value(name: str) -> None:
    assert curve({"schedule": name, "start": 0.1, "end": 0.4}, 1) == [0.4]


@given(powers)
def test_the_power_law_meets_its_budget(config: dict[str, Any]) -> None:
    points = curve(config, config["blocks"])
    assert points[0] == 0.0
    assert points == sorted(points)
    assert 1 - sum(points) / len(points) == pytest.approx(config["budget"], rel=1e-9)


@pytest.mark.parametrize(("budget", "exponent"), [(0.6, 0.25140), (0.4, 0.47027), (0.8, 0.10717)])
def test_published_exponents(budget: float, exponent: float) -> None:
    assert round(Power(budget=budget, blocks=20).exponent, 5) == exponent


def test_published_keep_ratios_of_the_power_law() -> None:
    kept = [round(1 - ratio, 5) for ratio in curve({"schedule": "power", "budget": 0.6, "blocks": 20}, 20)]
    assert (kept[0], kept[1], kept[19]) == (1.0, 0.84008, 0.47090)
    # In blocks of ten epochs the ratio changes only at their boundaries.
    assert curve({"schedule": "power"}, 200) == [ratio for ratio in curve({"schedule": "power"}, 20) for _ in range(10)]


def test_a_budget_at_its_limit_keeps_some_samples() -> None:
    assert 0.999 < Power(budget=0.05 + 1e-12, blocks=20)(19, 20) < 1.0


def test_step_and_annealed_switch_at_their_milestones() -> None:
    step = {"schedule": "step", "milestones": [0.29, 0.5], "ratios": [0.2, 0.0], "start": 0.6}
    assert curve(step, 100) == [0.6] * 29 + [0.2] * 21 + [0.0] * 50
    assert curve({"schedule": "step", "milestones": [0.0], "ratios": [0.3]}, 3) == [0.3] * 3
    assert curve({"schedule": "annealed", "of_ratio": 0.5, "until": 0.875}, 10) == [0.5] * 8 + [0.0] * 2
    assert curve({"schedule": "annealed", "of_ratio": 0.5, "until": 1.0}, 4) == [0.5] * 4
    assert curve({"schedule": "annealed", "of_ratio": step, "until": 0.25}, 4) == [0.6, 0.0, 0.0, 0.0]


@given(st.integers(1, 1000), st.integers(0, 1000))
def test_epoch_at_is_exact_for_thousandths(num_epochs: int, thousandths: int) -> None:
    assert epoch_at(thousandths / 1000, num_epochs) == thousandths * num_epochs // 1000


def test_defaults_of_every_schedule_work() -> None:
    for name in SCHEDULES:
        assert Schedule.of({"schedule": name}).name == name
        assert len(curve({"schedule": name}, 7)) == 7


def test_numpy_numbers_are_accepted() -> None:
    assert Schedule.of(np.float32(0.25)) == Schedule.of(np.float64(0.25)) == Schedule.of(0.25)
    assert type(Schedule.of(np.float32(0.3))(np.int64(1), np.int64(4))) is float  # type: ignore[arg-type]
    config = Schedule.of({"schedule": "power", "blocks": np.int64(10), "budget": np.float32(0.5)}).to_config()
    assert config == {"schedule": "power", "budget": 0.5, "blocks": 10}
    json.dumps(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (1.0, r"prune ratio 1\.0 is outside \[0, 1\)"),
        (-0.1, r"prune ratio -0\.1 is outside"),
        (float("nan"), "prune_ratio = nan: must be a finite number"),
        (True, "prune_ratio = True: must be a number, or a mapping"),
        (np.float32(1.5), r"prune ratio 1\.5 is outside"),
        ("0.5", r"prune_ratio = '0\.5': must be a number, or a mapping"),
        (None, "prune_ratio = None: must be a number, or a mapping"),
        ([0.5], "must be a number, or a mapping"),
        ({"schedule": ["a"]}, r"prune_ratio: unknown schedule \['a'\]"),
        (
            {"schedule": "step", "milestones": 0.5, "ratios": 0.5},
            r"prune_ratio\.milestones = 0\.5: must be a list of num",
        ),
        ({"schedule": "polynomial", "power": "a"}, r"prune_ratio\.power = 'a': must be a number"),
        ({"schedule": "linear", 1: 2}, r"unknown key 'prune_ratio\.1' of schedule 'linear'"),
        ({"schedule": "annealed", "of_ratio": "a"}, "of_ratio = 'a': must be a number, or a mapping"),
        ({"schedule": "linaer"}, "unknown schedule 'linaer': did you mean 'linear'"),
        ({"start": 0.1}, "unknown schedule None: choose one of annealed"),
        (
            {"schedule": "linear", "stat": 0.1},
            "unknown key 'prune_ratio.stat' of schedule 'linear': did you mean 'start'",
        ),
        ({"schedule": "cosine", "end": 1}, r"end 1 is outside \[0, 1\)"),
        ({"schedule": "polynomial", "power": 0}, "power 0 must be above 0"),
        ({"schedule": "polynomial", "power": float("nan")}, r"power = nan: must be a finite number"),
        ({"schedule": "power", "blocks": 0}, "blocks 0 must be at least 1"),
        ({"schedule": "power", "blocks": 2.5}, r"prune_ratio\.blocks = 2\.5: must be a whole number"),
        ({"schedule": "power", "blocks": 20, "budget": 0.05}, r"budget 0\.05 is outside \(0\.05, 1\] for 20 blocks"),
        ({"schedule": "power", "budget": 1.1}, r"budget 1\.1 is outside"),
        ({"schedule": "step", "milestones": [0.5, 0.2], "ratios": [0.1, 0.2]}, "milestones .* must ascend"),
        ({"schedule": "step", "milestones": [0.5], "ratios": []}, "one ratio each"),
        ({"schedule": "step", "milestones": [1.5], "ratios": [0.1]}, r"milestone 1\.5 is outside \[0, 1\]"),
        ({"schedule": "step", "milestones": [0.5], "ratios": [1.0]}, r"ratio 1\.0 is outside"),
        ({"schedule": "annealed", "until": 2}, "until 2 is outside"),
        ({"schedule": "annealed", "of_ratio": 7}, "prune ratio 7 is outside"),
    ],
)
def test_invalid_schedules_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Schedule.of(config)
    assert "\n" not in str(caught.value)


def test_a_schedule_built_in_code_is_checked() -> None:
    with pytest.raises(ValueError, match=r"Polynomial\.power = 'a': must be a number"):
        Polynomial(power="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("epoch", [-1, 5, 100])
def test_epochs_outside_the_run_are_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match=rf"epoch {epoch} is outside \[0, 5\)"):
        Schedule.of(0.5)(epoch, 5)
