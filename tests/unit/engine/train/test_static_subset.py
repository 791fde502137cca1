"""One subset for a whole run: from a scoring run, from logged logits, or from a file; costs, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rayprune.config import Config
from rayprune.core import Selection
from rayprune.engine.storage.costs import forward_flops_of
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train import preflight
from rayprune.engine.train.driver import RunResult, score, train
from rayprune.errors import TrainingFailed
from rayprune.sources import open_data
from rayprune.sources.tables.selections import read_selection_file, write_selection_file
from tests.support.runs import assert_same_run, run_config, user


def tdds(tmp_path: Path, name: str = "run", **sections: dict[str, Any]) -> Config:
    """Return a run that scores three epochs, then trains four on half of the samples."""
    method = {"name": "tdds", "prune_ratio": 0.5, "trajectory_len": 3, "window_size": 3, "also": [[4, 3]]}
    return run_config(tmp_path, name, **{"method": method, **sections})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(tdds(tmp_path_factory.mktemp("subset")))


def test_a_new_network_trains_on_the_highest_scores(finished: RunResult) -> None:
    scores = pd.read_parquet(finished.folder / "collect" / "scores.parquet")
    num = len(scores)
    assert {"id", "label", "tdds", "tdds_T4_J3", "last_visit"} <= set(scores.columns)
    assert scores["last_visit"].eq(3).all()
    expected = np.sort(np.lexsort((scores["id"], -scores["tdds"]))[: num - num // 2])
    chosen = read_selection_file(finished.folder / "selection.parquet", num)
    assert chosen.ids.tolist() == expected.tolist()
    assert all(line["kept"] == expected.size for line in finished.metrics)
    final = pd.read_parquet(finished.folder / "scores.parquet")
    assert final.loc[final["times_pruned"] == 0, "id"].tolist() == expected.tolist()
    pd.testing.assert_series_equal(final["tdds"], scores["tdds"])
    assert final["loss"].notna().sum() == expected.size


def test_the_cost_includes_the_scoring_run(finished: RunResult) -> None:
    collected = json.loads((finished.folder / "collect" / "metrics.jsonl").read_text().splitlines()[-1])
    num = collected["num_samples"]
    assert collected["samples_trained"] == 4 * num  # the longest trajectory that is asked for
    kept = finished.metrics[0]["kept"]
    for number, line in enumerate(finished.metrics, start=1):
        assert line["samples_collected"] == 4 * num
        assert line["samples_trained"] == 4 * num + number * kept
        assert line["wall_time"] > collected["wall_time"]
        assert line["compute"] == line["samples_trained"] + line["samples_padded"]


def test_scoring_with_a_smaller_network_costs_less(tmp_path: Path) -> None:
    result = train(tdds(tmp_path, collect={"model": {"hidden": [8]}}))
    own, other = (forward_flops_of(folder) for folder in (result.folder, result.folder / "collect"))
    assert other < own
    line, scored = result.metrics[-1], read_metrics(result.folder / "collect")[-1]
    assert line["compute_collected"] == pytest.approx(scored["compute"] * other / own, abs=0.1)
    assert line["compute"] < line["samples_trained"]


def test_the_environment_has_the_cost_of_a_sample(finished: RunResult) -> None:
    facts = json.loads((finished.folder / "environment.json").read_text())
    assert facts["forward_flops_per_sample"] == 2 * (64 * 256 + 256 * 256 + 256 * 10)


def test_selection_facts_are_in_the_metrics(finished: RunResult) -> None:
    scores = pd.read_parquet(finished.folder / "collect" / "scores.parquet")
    for number, line in enumerate(finished.metrics, start=1):
        facts = line["selection"]
        kept = read_selection_file(finished.folder / "selection.parquet").ids
        assert facts["threshold"] == pytest.approx(float(scores["tdds"][kept].min()))
        assert facts["budget_so_far"] == pytest.approx(
            (4 * len(scores) + number * kept.size) / (4 * len(scores)), abs=1e-6
        )
        shares = [scores.loc[kept, "label"].eq(c).sum() / scores["label"].eq(c).sum() for c in range(10)]
        assert facts["class_kept"] == pytest.approx(shares, abs=1e-6)


def test_a_finished_run_is_not_repeated(finished: RunResult, tmp_path: Path) -> None:
    starts: list[int] = []
    config = tdds(finished.folder.parent)
    again = train(config, on_start=lambda start: starts.append(start.first_epoch))
    assert starts == []
    assert_same_run(finished, again)


@pytest.mark.parametrize("stops", ["collect", "train"])
def test_a_stopped_run_resumes_exactly(finished: RunResult, tmp_path: Path, stops: str) -> None:
    config = tdds(tmp_path)
    if stops == "collect":
        score(config)
    else:
        train(tdds(tmp_path, train={"stop_after": 2}))
    assert_same_run(train(config), finished)


def test_the_scored_network_can_continue(tmp_path: Path) -> None:
    method = {"name": "tdds", "prune_ratio": 0.5, "trajectory_len": 3, "window_size": 3}
    result = train(run_config(tmp_path, method=method, collect={"fresh": False}))
    num = result.metrics[0]["num_samples"]
    assert [line["kept"] for line in result.metrics] == [num, num, num, num - num // 2]
    assert not (result.folder / "collect").exists()
    assert result.metrics[-1]["samples_collected"] == 0


def test_the_scoring_run_can_have_its_own_settings(tmp_path: Path) -> None:
    config = tdds(tmp_path, collect={"train": {"batch_size": 16, "epochs": 8}, "optim": {"lr": 0.01}})
    result = train(config)
    collected = (result.folder / "collect" / "config.yaml").read_text()
    assert "batch_size: 16" in collected
    lines = [json.loads(line) for line in (result.folder / "collect" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[-1]["lr"] == pytest.approx(0.01 * (1 + np.cos(np.pi * 3.97 / 8)) / 2, rel=0.02)  # half way of 8 epochs


def test_recorded_signals_are_means_over_the_visits(tmp_path: Path) -> None:
    result = train(tdds(tmp_path, train={"record": ["loss", "margin"]}))
    scores = pd.read_parquet(result.folder / "collect" / "scores.parquet")
    line = json.loads((result.folder / "collect" / "metrics.jsonl").read_text().splitlines()[0])
    assert scores["visits"].eq(4).all()
    assert scores["margin_mean"].between(-1, 1).all()
    assert scores["loss_mean"].mean() < line["train_loss"]
    final = pd.read_parquet(result.folder / "scores.parquet")
    assert {"loss_mean", "collected_loss_mean", "visits"} <= set(final.columns)


def logged(folder: Path, logits_ENC: np.ndarray, dtype: Any = np.float32) -> Path:
    """Write trajectories as the reference program does, each epoch in an order of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for epoch, logits in enumerate(logits_ENC):
        order = rng.permutation(len(logits))
        np.save(folder / f"{epoch}_Output.npy", logits[order].astype(dtype))
        np.save(folder / f"{epoch}_Index.npy", order)
        np.save(folder / f"{epoch}_Loss.npy", np.zeros(len(logits), np.float32))
    return folder


def test_logged_trajectories_replace_the_scoring_run(finished: RunResult, tmp_path: Path) -> None:
    num = finished.metrics[0]["num_samples"]
    logits = np.random.default_rng(1).normal(size=(4, num, 10)).cumsum(axis=0)
    folder = logged(tmp_path / "logs", logits)
    result = train(tdds(tmp_path, collect={"trajectories": str(folder)}))
    assert result.metrics[-1]["samples_collected"] == 0
    scores = pd.read_parquet(result.folder / "collect" / "scores.parquet")
    assert scores["tdds"].notna().all()
    assert result.metrics[0]["kept"] == num - num // 2
    with pytest.raises(ValueError, match="float16"):
        train(tdds(tmp_path, "half", collect={"trajectories": str(logged(tmp_path / "half16", logits, np.float16))}))
    assert not (tmp_path / "half").exists()


def chosen_file(finished: RunResult, file: Path, **changes: Any) -> Path:
    """Write a selection of the tests' digits: every third sample at weight 2."""
    num = finished.metrics[0]["num_samples"]
    ids = changes.pop("ids", np.arange(0, num, 3))
    selection = Selection.of_ids(ids, num, weights=np.full(len(ids), 2.0))
    fingerprint = open_data("digits", limit=301).train.fingerprint
    return write_selection_file(file, selection, changes.pop("fingerprint", fingerprint), {})


def test_a_run_trains_on_the_samples_of_a_file(finished: RunResult, tmp_path: Path) -> None:
    file = chosen_file(finished, tmp_path / "chosen.parquet")
    config = run_config(tmp_path, method={"name": "fixed", "path": str(file)})
    whole = train(config)
    num = whole.metrics[0]["num_samples"]
    assert {line["kept"] for line in whole.metrics} == {-(-num // 3)}
    train(run_config(tmp_path, "cut", method={"name": "fixed", "path": str(file)}, train={"stop_after": 1}))
    again = train(run_config(tmp_path, "cut", method={"name": "fixed", "path": str(file)}))
    assert_same_run(whole, again)


def test_a_file_that_changed_or_belongs_to_other_data_is_refused(finished: RunResult, tmp_path: Path) -> None:
    file = chosen_file(finished, tmp_path / "chosen.parquet")
    config = run_config(tmp_path, method={"name": "fixed", "path": str(file)})
    train(config.model_copy(update={"train": config.train.model_copy(update={"stop_after": 1})}))
    file.unlink()
    chosen_file(finished, file, ids=np.arange(50))
    with pytest.raises(ValueError, match="the subset has changed since the run"):
        train(config)
    other = chosen_file(finished, tmp_path / "other.parquet", fingerprint="0" * 64)
    with pytest.raises(ValueError, match="was chosen on other data"):
        train(run_config(tmp_path, "other", method={"name": "fixed", "path": str(other)}))
    for path, message in (("", r"method\.path is missing"), ("none.parquet", "does not exist")):
        with pytest.raises(ValueError, match=message):
            train(run_config(tmp_path, "none", method={"name": "fixed", "path": path}))
    broken = {"name": user("wants_rgb")}
    with pytest.raises(ValueError, match="can't take a batch"):
        train(run_config(tmp_path, "none", method={"name": "fixed", "path": str(file)}, model=broken))
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"epochs": 3}}, r"scores over 4 epochs, and the run has 3: set collect\.train\.epochs=4"),
        ({"collect": {"train": {"epoch": 8}}}, r"unknown key 'collect\.train\.epoch': did you mean 'epochs'"),
        ({"collect": {"trajectories": "no/such/folder"}}, "no/such/folder"),
        ({"collect": {"trajectories": "x", "optim": {"lr": 0.3}}}, r"leave out collect\.optim\.lr"),
        ({"collect": {"fresh": False, "trajectories": "x"}}, r"makes no scoring run: leave out collect\.trajectories"),
        ({"collect": {"train": {"stop_after": 2}}}, r"collect\.train\.stop_after is set by the method"),
        ({"train": {"last_batch": "drop"}}, r"leaves out \d+ of \d+ samples.*use train\.last_batch=pad"),
        ({"run": {"resume": "no/such/run"}}, "holds no intact checkpoint"),
        ({"train": {"stop_after": 9}}, r"train\.stop_after = 9: the run has 4 epochs"),
        ({"train": {"record": ["probs"]}}, r"train\.record.*probs"),
        ({"train": {"record": ["los"]}}, "did you mean 'loss'"),
    ],
)
def test_invalid_scoring_is_refused_before_anything_is_written(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tdds(tmp_path, **sections))
    assert list(tmp_path.iterdir()) == []


def test_one_scoring_run_serves_every_ratio(finished: RunResult, tmp_path: Path) -> None:
    """What decides no score need not be the same: the scoring run is found finished at another ratio."""
    method = {"name": "tdds", "trajectory_len": 3, "window_size": 3, "also": [[4, 3]]}
    scored = score(run_config(tmp_path, method={**method, "prune_ratio": 0.2}))
    starts: list[int] = []
    config = run_config(tmp_path, method={**method, "prune_ratio": 0.5})
    result = train(config, on_start=lambda start: starts.append(start.first_epoch))
    assert starts == [4, 0]
    assert scored.selection.num_kept > result.metrics[0]["kept"]
    assert_same_run(result, finished)


def test_a_run_that_starts_from_another_reuses_its_scores(finished: RunResult, tmp_path: Path) -> None:
    starts: list[tuple[str, int]] = []
    config = tdds(tmp_path, run={"resume": str(finished.folder)})
    result = train(config, on_start=lambda start: starts.append((start.folder.name, start.first_epoch)))
    assert starts == [("collect", 4), ("run", 4)]
    assert_same_run(result, finished)


def test_a_finished_run_no_longer_needs_its_scoring_run(tmp_path: Path) -> None:
    whole = train(tdds(tmp_path))
    shutil.rmtree(whole.folder / "collect")
    assert_same_run(train(tdds(tmp_path)), whole)
    assert not (whole.folder / "collect").exists()


def test_a_dynamic_method_has_no_scoring_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method 'infobatch' has no scoring run"):
        score(run_config(tmp_path))


def test_a_table_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 10_000  # enough for a batch

    # Only here: the check before it finds enough for the network.
    monkeypatch.setattr(preflight, "psutil", SimpleNamespace(virtual_memory=Little))
    with pytest.raises(ValueError, match=r"keeps [\d,]+ bytes for each of .* samples.*storage=float16"):
        train(tdds(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_nan_logits_end_the_scoring_run_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="samples were not visited in epoch"):
        train(tdds(tmp_path, model={"name": user("nan_rows"), "rows": 2}))
