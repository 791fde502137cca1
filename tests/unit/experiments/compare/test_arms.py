"""The arms of a comparison, and what each one trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.config import Config
from rayprune.core import Selector
from rayprune.core.schedule import Schedule
from rayprune.experiments.compare.arms import Arm, arm_settings, arms_of, digest_of, equal_steps, run_config
from rayprune.experiments.compare.statistics import RunOutcome
from rayprune.methods import build_method
from tests.support.runs import run_config as tiny


def config_of(tmp_path: Path, **keys: Any) -> Config:
    """Return the config of a comparison of InfoBatch."""
    return tiny(tmp_path, method={"name": "infobatch", "prune_ratio": 0.9}, compare=keys)


def test_full_alone_and_runs_that_end_early_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method is full, the baseline of all methods"):
        arms_of(tiny(tmp_path, method={"name": "full"}))
    with pytest.raises(ValueError, match=r"train.stop_after .* leave it out"):
        arms_of(tiny(tmp_path, train={"stop_after": 2}))


# Full training in these examples: 10 epochs of 100 samples, in 50 seconds.
WHOLE = RunOutcome(
    0,
    "full-seed0",
    10,
    "",
    90.0,
    80.0,
    samples_trained=1000,
    samples_forwarded=0,
    compute=1000.0,
    flops=0.0,
    seconds=50.0,
    learning_rate=0.1,
    mean_step_scale=1.0,
)


@pytest.mark.parametrize(
    ("baseline", "samples", "seconds", "expected"),
    [
        ("full_steps", 640, 50.0, ("full", 7, False)),
        ("full_steps", 700, 50.0, ("full", 7, False)),
        ("full_steps", 20, 50.0, ("full", 1, False)),
        ("full_steps", 1300, 50.0, ("full", 10, True)),
        ("full_time", 900, 35.1, ("full", 8, False)),
        ("full_time", 100, 55.0, ("full", 10, True)),
        ("random", 640, 1.0, ("random", 10, False)),
        ("random_epoch", 1000, 1.0, ("full", 10, True)),
        ("random", 1400, 1.0, ("full", 10, True)),
    ],
)
def test_lengths_and_ratios_match_hand_computed_ones(
    tmp_path: Path, baseline: str, samples: int, seconds: float, expected: tuple[str, int, bool]
) -> None:
    config = tiny(tmp_path, train={"epochs": 10})
    spent = dataclasses.replace(WHOLE, samples_trained=samples, seconds=seconds)
    arm = Arm(baseline, baseline, {"name": "infobatch"}, "infobatch")
    settings = arm_settings(arm, config, [(WHOLE, spent)], num_samples=100)
    assert (settings.method["name"], settings.epochs, settings.same_as_full) == expected
    if expected[0] in {"random", "random_epoch"}:
        assert int(settings.method["prune_ratio"] * 100) == 100 - samples // 10


def test_one_run_on_a_busy_machine_does_not_change_the_length(tmp_path: Path) -> None:
    arm = Arm("full_time", "full_time", {"name": "infobatch"}, "infobatch")
    config = tiny(tmp_path, train={"epochs": 10})
    pairs = [(WHOLE, dataclasses.replace(WHOLE, seconds=seconds)) for seconds in (34.0, 190.0, 36.0)]
    assert {arm_settings(arm, config, pairs, place, num_samples=100).epochs for place in range(3)} == {8}


def test_a_length_is_matched_to_the_seconds_of_runs_that_ran_alone(tmp_path: Path) -> None:
    arm = Arm("full_time", "full_time", {"name": "infobatch"}, "infobatch")
    config = tiny(tmp_path, train={"epochs": 10})
    shared = dataclasses.replace(WHOLE, alone=False)
    pairs = [(WHOLE, dataclasses.replace(WHOLE, seconds=25.0)), (shared, dataclasses.replace(shared, seconds=45.0))]
    assert arm_settings(arm, config, pairs, 1, num_samples=100).epochs == 5
    assert arm_settings(arm, config, pairs[1:], num_samples=100).epochs == 9


@pytest.mark.parametrize(
    ("baseline", "tag"),
    [
        ("full_steps", "-7epochs-lr1.4"),
        ("full_time", "-7epochs-lr1.4"),
        ("random", "-30dropped-lr1.45"),
        ("random_epoch", "-30dropped-lr1.45"),
    ],
)
def test_arms_of_the_methods_cost_take_steps_of_its_size(tmp_path: Path, baseline: str, tag: str) -> None:
    """The learning rate follows the method's mean weight: of all seeds for a length, of the own seed for a subset."""
    config = tiny(tmp_path, train={"epochs": 10}, optim={"lr": 0.05})
    spent = dataclasses.replace(WHOLE, samples_trained=700, seconds=35.0)
    pairs = [(WHOLE, dataclasses.replace(spent, mean_step_scale=scale)) for scale in (1.35, 1.4, 1.46)]
    arm = Arm(baseline, baseline, {}, "m")
    settings = arm_settings(arm, config, pairs, 2, num_samples=100)
    settings = equal_steps(arm, settings, [method for _, method in pairs], 2)
    assert settings.tag == tag
    made = run_config(config, settings, "n", 5, str(tmp_path))
    assert made.optim.lr == pytest.approx(0.05 * settings.lr_factor)
    if baseline == "random_epoch":
        assert made.method["replacement"] is False


def test_the_ratio_drops_the_exact_number_of_samples(tmp_path: Path) -> None:
    arm = Arm("random", "random", {"name": "infobatch"}, "infobatch")
    for num in (7, 1437, 50_000):
        for drops in np.unique(np.linspace(1, num - 1, 50).astype(int)):
            full = dataclasses.replace(WHOLE, samples_trained=num)
            spent = dataclasses.replace(full, samples_trained=num - int(drops))
            settings = arm_settings(arm, tiny(tmp_path), [(full, spent)], num_samples=num)
            assert int(settings.method["prune_ratio"] * num) == drops


def test_the_annealed_subsets_drop_more_before_the_final_phase(tmp_path: Path) -> None:
    arm = Arm("random_annealed", "random_annealed", {"name": "infobatch", "anneal_start": 0.8}, "infobatch")
    config = tiny(tmp_path, train={"epochs": 10})
    spent = dataclasses.replace(WHOLE, samples_trained=700)
    settings = arm_settings(arm, config, [(WHOLE, spent)], num_samples=100)
    method = build_method(settings.method)
    selector = Selector(method, 100, 10, seed=0)
    kept = [selector.begin_epoch(epoch).num_kept for epoch in range(10)]
    assert kept == [62] * 8 + [100] * 2, "0.3 · 10 / 8 of 100 samples, rounded to 38"
    assert sum(kept) == pytest.approx(700, abs=5)
    assert "38.0% dropped before epoch 9" in settings.matched


def test_the_least_confident_samples_are_chosen_after_a_scoring_run_within_the_budget(tmp_path: Path) -> None:
    arm = Arm("least_confidence", "least_confidence", {"name": "infobatch"}, "infobatch")
    collect = {"collect": {"trajectories": str(tmp_path)}}
    for amortise, drops in ((1, 40), (5, 32)):
        config = tiny(tmp_path, train={"epochs": 10}, compare={"amortise": amortise}, **collect)
        spent = dataclasses.replace(WHOLE, samples_trained=700)
        settings = arm_settings(arm, config, [(WHOLE, spent)], num_samples=100)
        assert (settings.method["score_epochs"], settings.epochs) == (1, 10)
        assert int(settings.method["prune_ratio"] * 100) == drops, "1/10 of the visits are those of the scoring run"
        made = run_config(config, settings, "n", 5, str(tmp_path))
        assert made.collect.trajectories is None, "the config's own scores are the method's"
        assert made.build_method().collect_epochs == 1


def test_each_method_has_its_own_baselines_without_meaningless_ones(tmp_path: Path) -> None:
    methods = [{"name": "infobatch", "prune_ratio": ratio} for ratio in (0.3, 0.5)] + [{"name": "random_epoch"}]
    baselines = ["random_epoch", "random_annealed", "shuffled", "ratio_0"]
    arms, notes = arms_of(config_of(tmp_path, methods=methods, baselines=baselines))
    assert [arm.name for arm in arms] == [
        *("full", "infobatch_1", "infobatch_2", "random_epoch_1"),
        *("random_epoch.infobatch_1", "random_annealed.infobatch_1", "shuffled.infobatch_1", "ratio_0.infobatch_1"),
        *("random_epoch.infobatch_2", "random_annealed.infobatch_2", "shuffled.infobatch_2", "ratio_0.infobatch_2"),
        "ratio_0.random_epoch_1",
    ]
    assert len(notes) == 3
    assert "it is the same as random_epoch" in notes[0]
    assert "random_epoch does not end with epochs on all samples" in notes[1]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "infobatch", "target_saving": 0.2, "max_prune_ratio": 0.8},
        {"name": "infobatch", "quantiles": [20, 85], "keep": [0.25, 0.5]},
        {"name": "dynams", "budget": 0.5},
        {"name": "tdds", "prune_ratio": 0.7, "trajectory_len": 3, "window_size": 3},
        {"name": "shuffled", "of": {"name": "infobatch"}},
    ],
)
def test_the_baseline_ratio_0_is_the_method_with_a_ratio_of_0(tmp_path: Path, method: dict[str, Any]) -> None:
    arm = Arm("ratio_0", "ratio_0", method, "m")
    config = tiny(tmp_path, train={"epochs": 20})
    made = run_config(config, arm_settings(arm, config), "n", 5, str(tmp_path))
    assert made.method["name"] == method["name"]
    assert (made.train.seed, made.train.validate_every) == (5, 20)
    inner = made.method.get("of", made.method)
    assert Schedule.of(inner["prune_ratio"])(10, 20) == 0.0


def test_the_digest_depends_on_the_methods_but_not_on_seeds_and_margin(tmp_path: Path) -> None:
    plain = digest_of(config_of(tmp_path))
    assert digest_of(config_of(tmp_path, seeds=9, margin=2.0, baselines=["random"])) == plain
    assert digest_of(config_of(tmp_path, methods=["infobatch"])) != plain
