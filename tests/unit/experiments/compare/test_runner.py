"""Whole comparisons in this process: which runs they make, how those are paired, and what is written."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rayprune.config import Config, make_config
from rayprune.core.schedule import Schedule
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.experiments.compare.arms import Arm, ArmSettings, Spent, arms_of, digest_of, run_config, terms_of
from rayprune.experiments.compare.runner import CompareListeners, compare
from rayprune.experiments.compare.statistics import RunOutcome, paired_difference
from tests.support.runs import run_config as tiny
from tests.support.runs import same_weights

EPOCHS, NUM = 4, 301
ARMS = ["full", "infobatch", "full_time", "full_steps", "random", "random_epoch", "shuffled", "ratio_0"]


def config_of(tmp_path: Path, **keys: Any) -> Config:
    """Return a comparison of InfoBatch on 301 digits, which prunes in the second and third of four epochs."""
    method = {"name": "infobatch", "prune_ratio": 0.9}
    return tiny(
        tmp_path, "cmp", method=method, data={"augment": {"crop": 0}}, compare={"seeds": 2, "parallel": 1, **keys}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare(config_of(tmp_path_factory.mktemp("compare")))


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())  # type: ignore[no-any-return]


def test_every_arm_has_its_seeds_and_the_report_its_runs(folder: Path, report: dict[str, Any]) -> None:
    assert [arm["name"] for arm in report["arms"]] == ARMS
    assert report["seeds"] == [0, 1]
    for arm in report["arms"]:
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        for run in arm["runs"]:
            last = read_metrics(folder / "runs" / run["folder"])[-1]
            assert run["accuracy"] == 100 * last["val_accuracy"]
            assert run["worst_class"] == 100 * min(last["val_class_accuracy"])
            assert (run["samples_trained"], run["compute"]) == (last["samples_trained"], last["compute"])
            assert run["seconds"] > 0
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, str(seed)) for arm in ARMS for seed in (0, 1)]
    assert report["environment"]["versions"]["torch"]
    assert not list(folder.glob("*.partial"))


def test_differences_are_those_of_pairs(report: dict[str, Any]) -> None:
    accuracies = {arm["name"]: [run["accuracy"] for run in arm["runs"]] for arm in report["arms"]}
    for arm in report["arms"]:
        same = [run["folder"] for run in arm["runs"]] == [run["folder"] for run in report["arms"][0]["runs"]]
        # Accuracies are rounded to 1/360: seeds that agree are no more certain than that.
        least = 100 / 360 / np.sqrt(6)
        found = paired_difference(accuracies[arm["name"]], accuracies["full"], 0.95, least)
        ends = (None, None) if same else (found.low, found.high)
        assert arm["to_full"] == {"mean": found.mean, "low": ends[0], "high": ends[1]}
        ratios = [
            run["seconds"] / full["seconds"] for run, full in zip(arm["runs"], report["arms"][0]["runs"], strict=True)
        ]
        assert arm["seconds_to_full"]["mean"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    judged = report["methods"]["infobatch"]
    assert next(iter(judged["to_baselines"])) in {judged["strongest_baseline"], "ratio_0"}
    assert report["verdict"]["sentence"]


def test_the_same_seed_is_the_same_start_and_another_seed_another(folder: Path) -> None:
    # Two ways to train on everything end in one network only if they begin with one and see one order.
    for seed in (0, 1):
        assert same_weights(folder / "runs" / f"full-seed{seed}", folder / "runs" / f"ratio_0-seed{seed}")
    assert not same_weights(folder / "runs" / "full-seed0", folder / "runs" / "full-seed1")


def test_only_the_last_epoch_is_validated(folder: Path) -> None:
    for run in (folder / "runs").iterdir():
        seen = [line["val_accuracy"] is not None for line in read_metrics(run)]
        assert seen == [False] * (len(seen) - 1) + [True], run.name


def test_derived_arms_spend_what_the_method_spends(folder: Path, report: dict[str, Any]) -> None:
    arms = {arm["name"]: arm["runs"] for arm in report["arms"]}
    for place in (0, 1):
        spent, whole = (arms[name][place]["samples_trained"] for name in ("infobatch", "full"))
        assert whole == EPOCHS * NUM
        assert spent < 0.9 * whole
        for name in ("random", "random_epoch"):
            assert abs(arms[name][place]["samples_trained"] - spent) <= EPOCHS / 2
            stored = yaml.safe_load((folder / "runs" / arms[name][place]["folder"] / "config.yaml").read_text())
            assert stored["train"]["epochs"] == EPOCHS
        steps = arms["full_steps"][place]
        assert abs(steps["samples_trained"] - spent) <= 0.6 * NUM
        lines = read_metrics(folder / "runs" / steps["folder"])
        assert len(lines) == steps["epochs"]


def test_the_same_command_again_trains_nothing_and_more_seeds_go_on(folder: Path, tmp_path: Path) -> None:
    before = (folder / "compare.json").read_bytes()
    seen: list[tuple[str, int, bool]] = []

    def on_run(number: str, arm: Arm, seed: int, finished: bool, terms: ArmSettings) -> None:
        seen.append((arm.name, seed, finished))

    config = config_of(folder.parent)
    assert compare(config, CompareListeners(on_run)) == folder
    first, derived = [*ARMS[:2], *ARMS[6:]], ARMS[2:6]
    assert seen == [(arm, seed, True) for arms in (first, derived) for seed in (0, 1) for arm in arms]
    assert (folder / "compare.json").read_bytes() == before
    # One run that was not finished is trained, alone.
    (folder / "runs" / "shuffled-seed1" / "scores.parquet").unlink()
    seen.clear()
    compare(config, CompareListeners(on_run))
    assert [item for item in seen if not item[2]] == [("shuffled", 1, False)]
    seen.clear()
    wider = config_of(folder.parent, seeds=[0, 7], baselines=["full_steps"], margin=3.0)
    compare(wider, CompareListeners(on_run))
    new = [(arm, seed) for arm, seed, finished in seen if not finished]
    assert ("infobatch", 7) in new
    assert all(seed == 7 or arm == "full_steps" for arm, seed in new)
    assert json.loads((folder / "compare.json").read_text())["margin"] == 3.0


def test_a_folder_of_another_comparison_or_run_is_refused(folder: Path, tmp_path: Path) -> None:
    other = config_of(folder.parent, methods=[{"name": "infobatch", "prune_ratio": 0.2}])
    with pytest.raises(ValueError, match=r"holds another comparison .* choose another run.name"):
        compare(other)
    (tmp_path / "cmp").mkdir()
    (tmp_path / "cmp" / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="holds a run, no comparison"):
        compare(config_of(tmp_path))


def test_one_seed_is_allowed_and_says_so(tmp_path: Path) -> None:
    notices: list[str] = []
    config = config_of(tmp_path, seeds=[3], baselines=["full"], margin=1.0)
    folder = compare(config, CompareListeners(on_notice=notices.append))
    report = json.loads((folder / "compare.json").read_text())
    assert any("no interval" in line for line in notices)
    assert report["arms"][1]["to_full"]["low"] is None
    assert report["arms"][1]["accuracy_sd"] is None
    assert report["verdict"]["outcome"] == "undecided"


def test_a_shared_scoring_run_is_said_and_another_share_goes_on(tmp_path: Path) -> None:
    tdds = {"name": "tdds", "prune_ratio": 0.5, "trajectory_len": 3, "window_size": 3}
    seen: dict[int, dict[str, Any]] = {}
    for trainings in (1, 5, 2):
        keys = {"methods": [tdds], "seeds": 2, "baselines": ["random"], "margin": 5.0}
        folder = compare(config_of(tmp_path, **keys, amortise=trainings))
        seen[trainings] = json.loads((folder / "compare.json").read_text())
    spent = {n: report["arms"][1]["samples_trained"] for n, report in seen.items()}
    assert spent[5] < spent[2] < spent[1]
    assert "shared by" not in seen[1]["verdict"]["sentence"]
    assert "a scoring run shared by 5 trainings" in seen[5]["verdict"]["sentence"]
    assert seen[2]["amortise"] == 2
    # What was matched to another cost is another run; the method's own runs are the same.
    assert [run["folder"] for run in seen[5]["arms"][1]["runs"]] == [
        run["folder"] for run in seen[1]["arms"][1]["runs"]
    ]
    assert seen[5]["arms"][2]["runs"][0]["folder"] != seen[2]["arms"][2]["runs"][0]["folder"]


def test_threads_stay_those_that_a_comparison_began_with(tmp_path: Path) -> None:
    keys = {"seeds": 1, "baselines": ["full"]}
    folder = compare(
        config_of(tmp_path, **keys).model_copy(
            update={"scaling": make_config({"scaling": {"num_workers": 0, "threads": 1}}).scaling}
        )
    )
    assert json.loads((folder / "threads.json").read_text()) == 1
    auto = make_config({"scaling": {"num_workers": 0}}).scaling
    compare(config_of(tmp_path, baselines=["full"]).model_copy(update={"scaling": auto}))
    for run in (folder / "runs").iterdir():
        assert yaml.safe_load((run / "config.yaml").read_text())["scaling"]["threads"] == 1, run.name


def test_full_alone_and_cut_runs_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method is full, which everything is compared with"):
        arms_of(tiny(tmp_path, method={"name": "full"}))
    with pytest.raises(ValueError, match=r"train.stop_after .* leave it out"):
        arms_of(tiny(tmp_path, train={"stop_after": 2}))


# Derived lengths, by hand: 10 epochs of 100 samples in 50 seconds are what full training takes.
WHOLE = Spent(epochs=10, num_samples=100, samples_trained=1000, seconds=50.0)


@pytest.mark.parametrize(
    ("baseline", "samples", "seconds", "expected"),
    [
        ("full_steps", 640, 50.0, ("full", 6, False)),
        ("full_steps", 20, 50.0, ("full", 1, False)),
        ("full_steps", 1300, 50.0, ("full", 10, True)),
        ("full_time", 900, 35.1, ("full", 7, False)),
        ("full_time", 100, 55.0, ("full", 10, True)),
        ("random", 640, 1.0, ("random", 10, False)),
        ("random_epoch", 1000, 1.0, ("full", 10, True)),
        ("random", 1400, 1.0, ("full", 10, True)),
    ],
)
def test_lengths_by_hand(
    tmp_path: Path, baseline: str, samples: int, seconds: float, expected: tuple[str, int, bool]
) -> None:
    config = tiny(tmp_path, train={"epochs": 10})
    spent = dataclasses.replace(WHOLE, samples_trained=samples, seconds=seconds)
    arm = Arm(baseline, baseline, {"name": "infobatch"}, "infobatch")
    terms = terms_of(arm, config, [(WHOLE, spent)])
    assert (terms.method["name"], terms.epochs, terms.same_as_full) == expected
    if expected[0] in {"random", "random_epoch"}:
        assert int(terms.method["prune_ratio"] * 100) == 100 - samples // 10


def test_one_run_on_a_busy_machine_changes_no_length(tmp_path: Path) -> None:
    arm, config = (
        Arm("full_time", "full_time", {"name": "infobatch"}, "infobatch"),
        tiny(tmp_path, train={"epochs": 10}),
    )
    pairs = [(WHOLE, dataclasses.replace(WHOLE, seconds=seconds)) for seconds in (34.0, 190.0, 36.0)]
    assert {terms_of(arm, config, pairs, place).epochs for place in range(3)} == {7}


def test_every_drop_is_reached_exactly_by_its_ratio(tmp_path: Path) -> None:
    arm = Arm("random", "random", {"name": "infobatch"}, "infobatch")
    for num in (7, 1437, 50_000):
        for drops in np.unique(np.linspace(1, num - 1, 50).astype(int)):
            full = Spent(1, num, num, 1.0)
            spent = dataclasses.replace(full, samples_trained=num - int(drops))
            terms = terms_of(arm, tiny(tmp_path), [(full, spent)])
            assert int(terms.method["prune_ratio"] * num) == drops


def test_several_methods_have_baselines_of_their_own_and_pointless_arms_are_left_out(tmp_path: Path) -> None:
    methods = [{"name": "infobatch", "prune_ratio": ratio} for ratio in (0.3, 0.5)] + [{"name": "random_epoch"}]
    arms, notes = arms_of(config_of(tmp_path, methods=methods, baselines=["random_epoch", "shuffled", "ratio_0"]))
    assert [arm.name for arm in arms] == [
        *("full", "infobatch_1", "infobatch_2", "random_epoch_1"),
        *("random_epoch.infobatch_1", "shuffled.infobatch_1", "ratio_0.infobatch_1"),
        *("random_epoch.infobatch_2", "shuffled.infobatch_2", "ratio_0.infobatch_2"),
        "ratio_0.random_epoch_1",
    ]
    assert len(notes) == 2
    assert "it is what random_epoch does by itself" in notes[0]


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
def test_a_method_with_nothing_to_prune_is_a_method(tmp_path: Path, method: dict[str, Any]) -> None:
    arm = Arm("ratio_0", "ratio_0", method, "m")
    config = tiny(tmp_path, train={"epochs": 20})
    made = run_config(config, terms_of(arm, config), "n", 5, str(tmp_path))
    assert made.method["name"] == method["name"]
    assert (made.train.seed, made.train.validate_every) == (5, 20)
    inner = made.method.get("of", made.method)
    assert Schedule.of(inner["prune_ratio"])(10, 20) == 0.0


def test_seeds_and_margin_make_no_other_comparison_but_a_method_does(tmp_path: Path) -> None:
    plain = digest_of(config_of(tmp_path))
    assert digest_of(config_of(tmp_path, seeds=9, margin=2.0, baselines=["random"])) == plain
    assert digest_of(config_of(tmp_path, methods=["infobatch"])) != plain


def test_outcomes_are_the_columns_of_the_csv(folder: Path) -> None:
    head = (folder / "compare.csv").read_text().splitlines()[0].split(",")
    assert head == ["arm", "baseline", *(field.name for field in dataclasses.fields(RunOutcome))]
