"""The sections `sweep` and `compare`: values of an axis, defaults, and mistakes in one line."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.config import Config, make_config
from rayprune.config.experiments import BASELINES, axis_of, format_value
from rayprune.config.yaml import read_yaml
from rayprune.errors import ConfigError


@given(low=st.floats(1e-6, 1e3), factor=st.floats(1.001, 1e3), seed=st.integers(0, 99))
def test_draws_lie_between_low_and_high(low: float, factor: float, seed: int) -> None:
    high = low * factor
    for form in ("uniform", "loguniform"):
        value = axis_of("a.b", {form: [low, high]}).draw(np.random.default_rng(seed))
        assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
    value = axis_of("a.b", {"quniform": [low, high, (high - low) / 3]}).draw(np.random.default_rng(seed))
    assert low <= value <= high


def test_values_are_formatted_in_one_line() -> None:
    assert format_value([{"a": None}, True]) == "[{a: None}, True]"


def section(**keys: Any) -> Any:
    return make_config({"compare": keys}).compare


def test_the_default_is_three_seeds_and_every_baseline() -> None:
    compare = section()
    assert compare.all_seeds == (0, 1, 2)
    assert compare.baselines == tuple(BASELINES)
    assert (compare.method_configs, compare.margin, compare.confidence) == ((), 0.2, 0.95)


def test_a_number_of_seeds_counts_from_zero_and_methods_get_their_defaults() -> None:
    compare = section(
        seeds=2, methods=["infobatch", {"name": "random_epoch", "prune_ratio": 0.25}], baselines=["random"]
    )
    assert compare.all_seeds == (0, 1)
    assert [(method["name"], method["prune_ratio"]) for method in compare.method_configs] == [
        ("infobatch", 0.5),
        ("random_epoch", 0.25),
    ]
    assert compare.baselines == ("full", "random"), "full training always runs"


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
        ({"lr_factors": [1.0]}, ["compare.lr_factors", "two or more"]),
        ({"lr_factors": [1.4, 1.0]}, ["compare.lr_factors", "ascending"]),
        ({"margin": -1}, ["compare.margin", "at least 0"]),
        ({"confidence": 1}, ["compare.confidence", "less than 1"]),
        ({"parallel": 0}, ["compare.parallel = 0", "at least 1, or auto"]),
        ({"timed_seeds": -1}, ["compare.timed_seeds", "at least 0"]),
        ({"rival_margin": -1}, ["compare.rival_margin", "at least 0"]),
        ({"marign": 1}, ["'compare.marign'", "'margin'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_cure(keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        section(**keys)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"space": {f"optim.{name}": list(range(1, 1001)) for name in "abcd"}}, "sweep.space has 1,000,000,000,000 po"),
        ({"space": {"optim.lr": list(range(10_001))}}, "sweep.space 'optim.lr' lists 10,001 values: give at most"),
        (
            {"space": {"optim.lr": {"grid": [1, 2, 3]}}, "search": "random", "num_trials": 10_000},
            "sweep.space has 30,000 points",
        ),
        (
            {
                "space": {name: list(map(str, range(200))) for name in ("method.name", "model.name")},
                "search": "random",
                "num_trials": 1,
            },
            "sweep.space combines 40,000 methods, models and sources",
        ),
    ],
)
def test_a_space_of_too_many_points_is_refused_before_any_is_made(sweep: dict[str, Any], message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        make_config({"sweep": sweep})
    assert time.perf_counter() - started < 1


def test_the_section_does_not_affect_the_digest_and_round_trips() -> None:
    plain = make_config({})
    config = make_config({"compare": {"seeds": 5, "methods": ["infobatch"]}})
    assert config.digest() == plain.digest()
    assert Config.model_validate(read_yaml(config.to_yaml())) == config
