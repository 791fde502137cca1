"""Whole comparisons in this process: their runs, the paired differences, and the files."""

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
from rayprune.engine.storage.run_folder import read_metrics, read_validation, write_validation
from rayprune.errors import ConfigError, RunFolderError, TrainingFailed
from rayprune.experiments.compare.arms import Arm, ArmSettings
from rayprune.experiments.compare.runner import CompareListeners, compare
from rayprune.experiments.compare.statistics import RunOutcome, paired_difference
from rayprune.experiments.compare.tuning import why_not_tuned
from rayprune.sources import open_data
from tests.support.runs import run_config as tiny
from tests.support.runs import same_weights

EPOCHS, NUM = 4, 301
BUDGET = ["full_time", "full_steps", "random", "random_epoch", "random_annealed"]
ARMS = ["full", "infobatch", *BUDGET, "shuffled", "ratio_0"]


def config_of(tmp_path: Path, **keys: Any) -> Config:
    """Return a comparison of InfoBatch on 301 digits; it prunes in the second and third of four epochs."""
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


def test_the_report_has_every_run_of_every_arm(folder: Path, report: dict[str, Any]) -> None:
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


def test_differences_are_paired_by_seed(report: dict[str, Any]) -> None:
    accuracies = {arm["name"]: [run["accuracy"] for run in arm["runs"]] for arm in report["arms"]}
    for arm in report["arms"]:
        same = [run["folder"] for run in arm["runs"]] == [run["folder"] for run in report["arms"][0]["runs"]]
        expected = paired_difference(accuracies[arm["name"]], accuracies["full"], 0.95)
        found = arm["to_full"]
        assert found["mean"] == pytest.approx(expected.mean)
        assert (found["low"] is None) == same
        if not same:
            # Accuracies are rounded to 1/360, so that is the least uncertainty of seeds that agree.
            assert found["seed_se"] == pytest.approx(max(expected.seed_se, 100 / 360 / np.sqrt(6) / np.sqrt(2)))
            assert found["high"] - found["low"] >= expected.high - expected.low - 1e-9
        ratios = [
            run["seconds"] / full["seconds"] for run, full in zip(arm["runs"], report["arms"][0]["runs"], strict=True)
        ]
        assert arm["seconds_to_full"]["mean"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    judged = report["methods"]["infobatch"]
    assert next(iter(judged["to_baselines"])) in {judged["strongest_baseline"], "ratio_0"}
    assert report["verdict"]["sentence"]


def test_runs_with_the_same_seed_have_the_same_start_and_order(folder: Path) -> None:
    # Two arms that train on all samples end with equal weights only if their start and their order are equal.
    for seed in (0, 1):
        assert same_weights(folder / "runs" / f"full-seed{seed}", folder / "runs" / f"ratio_0-seed{seed}")
    assert not same_weights(folder / "runs" / "full-seed0", folder / "runs" / "full-seed1")


def test_only_the_last_epoch_is_validated(folder: Path) -> None:
    for run in (folder / "runs").iterdir():
        validated = [line["val_accuracy"] is not None for line in read_metrics(run)]
        assert validated == [False] * (len(validated) - 1) + [True], run.name


def test_derived_arms_match_the_methods_cost(folder: Path, report: dict[str, Any]) -> None:
    arms = {arm["name"]: arm["runs"] for arm in report["arms"]}
    for place in (0, 1):
        spent, whole = (arms[name][place]["samples_trained"] for name in ("infobatch", "full"))
        assert whole == EPOCHS * NUM
        assert spent < 0.9 * whole
        for name in ("random", "random_epoch", "random_annealed"):
            assert abs(arms[name][place]["samples_trained"] - spent) <= EPOCHS / 2
            stored = yaml.safe_load((folder / "runs" / arms[name][place]["folder"] / "config.yaml").read_text())
            assert stored["train"]["epochs"] == EPOCHS
        steps = arms["full_steps"][place]
        assert -0.1 * NUM < steps["samples_trained"] - spent < 1.1 * NUM, "whole epochs, not fewer than the method's"
        lines = read_metrics(folder / "runs" / steps["folder"])
        assert len(lines) == steps["epochs"]


def test_arms_of_one_cost_take_steps_of_one_size(report: dict[str, Any]) -> None:
    arms = {arm["name"]: arm for arm in report["arms"]}
    scale = arms["infobatch"]["mean_step_scale"]
    kept = arms["infobatch"]["samples_trained"] / arms["full"]["samples_trained"]
    assert scale == pytest.approx(1 / kept, rel=0.1), "the weights stand for all samples"
    derived = ("full_steps", "full_time", "random", "random_epoch")
    shortened = [name for name in derived if arms[name]["runs"][0]["folder"] != "full-seed0"]
    assert {"random", "random_epoch"} <= set(shortened)
    for name in shortened:
        assert arms[name]["mean_step_scale"] == pytest.approx(scale, abs=0.05)
        assert arms[name]["learning_rate"] > 1.1 * arms["full"]["learning_rate"]
    assert arms["full"]["mean_step_scale"] == arms["ratio_0"]["mean_step_scale"] == 1.0
    assert arms["infobatch"]["learning_rate"] == arms["full"]["learning_rate"]
    expected = [["random_epoch", "full_steps"]] if "full_steps" in shortened else []
    assert [check["arms"] for check in report["self_checks"]] == expected


def test_only_missing_runs_are_trained(folder: Path, tmp_path: Path) -> None:
    before = (folder / "compare.json").read_bytes()
    seen: list[tuple[str, int, bool]] = []

    def on_run(number: str, arm: Arm, seed: int, finished: bool, settings: ArmSettings) -> None:
        seen.append((arm.name, seed, finished))

    config = config_of(folder.parent)
    assert compare(config, CompareListeners(on_run)) == folder
    first, derived = [arm for arm in ARMS if arm not in BUDGET], BUDGET
    assert seen == [(arm, seed, True) for arms in (first, derived) for seed in (0, 1) for arm in arms]
    assert (folder / "compare.json").read_bytes() == before
    # A run that has not finished is the only one to be trained.
    (folder / "runs" / "shuffled-seed1" / "scores.parquet").unlink()
    seen.clear()
    compare(config, CompareListeners(on_run))
    assert [item for item in seen if not item[2]] == [("shuffled", 1, False)]
    seen.clear()
    wider = config_of(folder.parent, seeds=[0, 1, 7], baselines=["full_steps"], margin=3.0)
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
    with pytest.raises(ValueError, match="holds a run, not a comparison"):
        compare(config_of(tmp_path))


def test_one_seed_is_allowed_but_has_no_interval(tmp_path: Path) -> None:
    notices: list[str] = []
    config = config_of(tmp_path, seeds=[3], baselines=["full"], margin=1.0)
    folder = compare(config, CompareListeners(on_notice=notices.append))
    report = json.loads((folder / "compare.json").read_text())
    assert any("no interval" in line for line in notices)
    assert report["arms"][1]["to_full"]["low"] is None
    assert report["arms"][1]["accuracy_sd"] is None
    assert report["verdict"]["outcome"] == "undecided"


def test_the_cost_of_a_scoring_run_is_shared_by_amortise_trainings(tmp_path: Path) -> None:
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
    # The method's runs stay the same; an arm that is matched to another cost is another run.
    assert [run["folder"] for run in seen[5]["arms"][1]["runs"]] == [
        run["folder"] for run in seen[1]["arms"][1]["runs"]
    ]
    assert seen[5]["arms"][2]["runs"][0]["folder"] != seen[2]["arms"][2]["runs"][0]["folder"]


def test_accuracies_are_measured_on_the_held_out_samples(tmp_path: Path) -> None:
    config = config_of(tmp_path, seeds=1, baselines=["full"], margin=1.0)
    config = config.model_copy(update={"data": config.data.model_copy(update={"hold_out": 0.2})})
    notices: list[str] = []
    compare(config, CompareListeners(on_notice=notices.append))
    assert any("less than one sample (1.7 points)" in line for line in notices)  # of 60
    finished: list[bool] = []
    compare(config, CompareListeners(lambda number, arm, seed, done, settings: finished.append(done)))
    assert finished == [True, True]


def test_a_source_without_a_validation_part_is_compared_on_a_fraction(tmp_path: Path) -> None:
    train = open_data("digits", limit=300).train
    rows, _ = train.read(np.arange(300))
    np.savez(tmp_path / "digits.npz", x=rows["image"].reshape(300, 64), y=rows["label"])
    keys: dict[str, Any] = {"seeds": 2, "baselines": ["random"], "margin": 5.0}
    data = {"source": "arrays", "path": str(tmp_path / "digits.npz"), "validation_fraction": 0.2}
    config = tiny(tmp_path, "cmp", method={"name": "infobatch"}, data=data, compare=keys)
    folder = compare(config)
    report = json.loads((folder / "compare.json").read_text())
    full = report["arms"][0]["runs"][0]
    assert full["samples_trained"] == EPOCHS * 240
    assert read_validation(folder / "runs" / full["folder"], 60).shape == (60,)
    finished: list[bool] = []
    compare(config, CompareListeners(lambda number, arm, seed, done, settings: finished.append(done)))
    assert all(finished)


def test_each_judgment_is_a_look_and_the_verdict_says_which(tmp_path: Path) -> None:
    def judged(seeds: Any, **keys: Any) -> dict[str, Any]:
        folder = compare(config_of(tmp_path, seeds=seeds, **{"baselines": ["random"], "margin": 5.0, **keys}))
        return json.loads((folder / "compare.json").read_text())  # type: ignore[no-any-return]

    alone, first, again, more = judged([1]), judged(2), judged([1, 0]), judged(3)
    assert (alone["looks"], len(more["looks"])) == ([], 2), "a single seed decides nothing"
    assert (first["look"], again["look"], more["look"]) == (1, 1, 2)
    assert (first["confidence"], more["confidence"]) == (0.95, 0.975)
    assert [look["seeds"] for look in more["looks"]] == [[0, 1], [0, 1, 2]]
    assert more["verdict"]["sentence"].endswith("Look 2: 97.5% intervals.")
    assert judged(2)["look"] == 1, "the same runs and margins are the same look"
    assert judged(3, margin=4.0)["look"] == 3
    assert judged(3, baselines=["random", "shuffled"])["look"] == 4
    with pytest.raises(ConfigError, match=r"leaves out seeds that this comparison was judged with \(1\)"):
        judged([0, 2])
    with pytest.raises(ConfigError, match=r"confidence = 0.5: this comparison began with 0.95"):
        judged(3, confidence=0.5)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"looks": null}'])
def test_a_damaged_record_of_looks_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "cmp").mkdir()
    (tmp_path / "cmp" / "compare.json").write_text(content)
    config = config_of(tmp_path)
    (tmp_path / "cmp" / "compare.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.raises(RunFolderError, match="records how often this comparison was judged") as caught:
        compare(config)
    assert "\n" not in str(caught.value)


def test_damaged_files_of_a_run_are_named_with_a_cure(tmp_path: Path) -> None:
    config = config_of(tmp_path, seeds=2, baselines=["full"], margin=5.0)
    folder = compare(config)
    file = folder / "runs" / "full-seed0" / "validation.parquet"
    whole = file.read_bytes()
    write_validation(file.parent, np.ones(7, bool))
    with pytest.raises(RunFolderError, match=r"validation.parquet is not of 360 samples: .*delete the run folder"):
        compare(config)
    file.unlink()
    with pytest.raises(RunFolderError, match=r"validation.parquet can't be read .*delete the run folder"):
        compare(config)
    file.write_bytes(whole)
    (folder / "threads.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"threads.json can't be read"):
        compare(config.model_copy(update={"scaling": make_config({"scaling": {"num_workers": 0}}).scaling}))


def test_least_confident_samples_are_a_baseline_of_the_same_cost(tmp_path: Path) -> None:
    notices: list[str] = []
    keys: dict[str, Any] = {"baselines": ["least_confidence"], "margin": 5.0, "seeds": 1}
    compare(config_of(tmp_path, **keys), CompareListeners(on_notice=notices.append))
    assert any("least_confidence is left out: its scoring run would be a large part of 4 epochs" in n for n in notices)
    config = tiny(
        tmp_path, "long", method={"name": "infobatch", "prune_ratio": 0.9}, train={"epochs": 10}, compare=keys
    )
    folder = compare(config)
    arms = {arm["name"]: arm for arm in json.loads((folder / "compare.json").read_text())["arms"]}
    ours, theirs = (arms[name]["samples_trained"] for name in ("least_confidence", "infobatch"))
    assert abs(ours - theirs) <= 10
    assert theirs < 0.9 * 10 * NUM


def test_the_seeds_that_the_margin_needs_are_said_before_the_start(tmp_path: Path) -> None:
    notices: list[str] = []

    def note(margin: float) -> str:
        notices.clear()
        compare(config_of(tmp_path, baselines=["full"], margin=margin), CompareListeners(on_notice=notices.append))
        return next(line for line in notices if "margin of" in line)

    assert "a margin of 2 needs about 15 seeds, if seeds spread a difference by 1.7 points (guessed" in note(2.0)
    report = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    sd = report["arms"][1]["to_full"]["seed_se"] * np.sqrt(2)
    assert f"by {sd:.2g} points (observed so far)" in note(3.0)
    assert "to show a margin of 0.5 with 360 validation samples: use more of them" in note(0.5)


def test_timed_places_decide_only_if_the_runs_were_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, seeds=3, baselines=["random"], margin=5.0, parallel=1)
    folder = compare(config)
    runs = sorted(run.name for run in (folder / "runs").iterdir())
    assert "timed" not in json.loads((folder / "compare.json").read_text())["verdict"]["sentence"].partition(";")[0]
    (folder / "shared_runs.json").write_text(json.dumps(runs))
    compare(config)
    report = json.loads((folder / "compare.json").read_text())
    assert "(not timed alone)" in report["verdict"]["sentence"]
    assert report["verdict"]["outcome"] in {"undecided", "prune nothing", "baseline is as good"}


def test_a_comparison_keeps_its_number_of_threads(tmp_path: Path) -> None:
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


def test_each_arm_tunes_its_learning_rate_on_held_out_samples(tmp_path: Path) -> None:
    baselines = ["random", "ratio_0"]
    config = config_of(tmp_path, seeds=1, baselines=baselines, tune=True, tune_seeds=1, lr_factors=[0.01, 1.0])
    seen: list[tuple[str, str, int, bool]] = []

    def on_run(number: str, arm: Arm, seed: int, finished: bool, settings: ArmSettings) -> None:
        seen.append((number, arm.name, seed, finished))

    folder = compare(config, CompareListeners(on_run))
    report = json.loads((folder / "compare.json").read_text())
    assert list(report["tuning"]) == ["full", "infobatch", "random"]
    arms = {arm["name"]: arm for arm in report["arms"]}
    for name, accuracies in report["tuning"].items():
        assert {"0.01", "1"} < set(accuracies), "the best factor was at an end, so others were tried"
        best = max(accuracies, key=lambda factor: accuracies[factor])
        assert arms[name]["learning_rate"] == pytest.approx(float(best) * config.optim.lr)
    assert arms["ratio_0"]["learning_rate"] == arms["full"]["learning_rate"]
    tuned = {seed for number, _, seed, _ in seen if number == "tuning"}
    assert not tuned & {seed for number, _, seed, _ in seen if number != "tuning"}
    for run in (folder / "tuning").iterdir():
        assert yaml.safe_load((run / "config.yaml").read_text())["data"]["hold_out"] == 0.1
    for run in (folder / "runs").iterdir():
        assert yaml.safe_load((run / "config.yaml").read_text())["data"]["hold_out"] is None
    seen.clear()
    compare(config, CompareListeners(on_run))
    assert all(finished for *_, finished in seen)


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    keys = {"seeds": 1, "baselines": ["full"], "tune": True, "tune_seeds": 2}
    folder = compare(config_of(tmp_path, **keys, lr_factors=[1.0, 1e30]))
    report = json.loads((folder / "compare.json").read_text())
    for arm in report["arms"]:
        assert report["tuning"][arm["name"]]["1e+30"] is None
        assert arm["learning_rate"] == config_of(tmp_path).optim.lr, "the factor 1, not one of the others"
    with pytest.raises(TrainingFailed, match=r"no learning rate works for full: .*NaN or infinite"):
        compare(config_of(tmp_path / "all", **keys, lr_factors=[1e30, 1e31]))


def test_relabeled_samples_are_not_held_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, seeds=1, baselines=["full"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"relabel": "audit.parquet"})})
    assert "the audit of data.relabel is of all training samples" in why_not_tuned(config, 10_000)


def test_tuning_needs_samples_that_do_not_judge(tmp_path: Path) -> None:
    notices: list[str] = []
    compare(config_of(tmp_path, seeds=1, baselines=["full"]), CompareListeners(on_notice=notices.append))
    assert any("not tuned (a tenth of the training samples is only 30)" in line for line in notices)
    config = config_of(tmp_path / "other", tune=True)
    held_out = config.model_copy(update={"data": config.data.model_copy(update={"hold_out": 0.2})})
    with pytest.raises(
        ValueError, match=r"compare.tune = True: the samples of data.hold_out judge the arms; leave one of them out"
    ):
        compare(held_out)


def test_the_columns_of_the_csv_are_the_fields_of_an_outcome(folder: Path) -> None:
    head = (folder / "compare.csv").read_text().splitlines()[0].split(",")
    assert head == ["arm", "baseline", *(field.name for field in dataclasses.fields(RunOutcome))]
