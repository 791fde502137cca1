"""Runs with methods that pick inside batches, and with train steps of the user's own; no Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import rayprune
from rayprune.config import Config
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.train.driver import RunResult, train
from rayprune.experiments.compare.arms import unpruned
from rayprune.report.read import read_run
from rayprune.report.tables import facts, headline
from tests.support.paths import ROOT
from tests.support.runs import assert_same_run, results, run_config, same_weights, scores_of, user

NUM, BATCH, EPOCHS = 301, 32, 3
# 9 whole batches and one of 13 rows, of which half learn.
TRAINED, SKIPPED = 9 * 16 + 7, 9 * 16 + 6
THINNED = {"name": "selective_backprop", "start": 0.0, "end": 1.0, "interrupt": 0}


def in_batch(folder: Path, name: str = "run", **sections: Any) -> Config:
    base: dict[str, Any] = {"method": THINNED, "train": {"epochs": EPOCHS, "batch_size": BATCH}}
    return run_config(folder, name, **{**base, **sections})


@pytest.fixture(scope="module")
def thinned(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run that trains on half of every batch."""
    return train(in_batch(tmp_path_factory.mktemp("thinned")))


def test_trained_and_scored_rows_are_counted_apart(thinned: RunResult) -> None:
    for epoch, line in enumerate(thinned.metrics, start=1):
        assert line["samples_trained"] == epoch * TRAINED
        assert line["samples_forwarded"] == epoch * NUM
        assert line["samples_skipped"] == epoch * SKIPPED
        assert line["samples_padded"] == 0
        assert line["compute"] == pytest.approx(epoch * (TRAINED + NUM / 3), abs=0.1)
        assert (line["kept"], line["pruned_fraction"]) == (NUM, pytest.approx(SKIPPED / NUM))
    assert thinned.metrics[-1]["val_accuracy"] > 0.3


def test_scores_have_the_loss_and_how_often_a_sample_was_picked(thinned: RunResult) -> None:
    scores = scores_of(thinned.folder)
    assert (scores["last_visit"] == EPOCHS - 1).all()
    assert scores["loss"].notna().all()
    assert scores["picked_mean"].sum() * EPOCHS == pytest.approx(EPOCHS * TRAINED)
    rates = scores["picked_mean"]
    assert rates[scores["loss"] > scores["loss"].median()].mean() > rates.mean() + 0.05


def test_reports_count_skipped_rows_as_saved(thinned: RunResult) -> None:
    run = read_run(thinned.folder)
    assert run.saved == pytest.approx(SKIPPED / NUM)
    assert run.compute_share == pytest.approx(TRAINED / NUM + 1 / 3, abs=1e-3)
    assert f"{EPOCHS * NUM:,} rows had a forward pass alone" in " ".join(headline(run))
    assert dict(facts(run))["rows"] == f"{EPOCHS * TRAINED:,d} trained on, {EPOCHS * NUM:,} forwarded"
    assert dict(facts(run))["kept so far"].startswith(f"{100 * TRAINED / NUM:.1f}%")


def test_whole_batches_inside_the_window_are_not_scored(tmp_path: Path) -> None:
    """The window has epoch 1 alone, of whose ten steps every second one is plain."""
    result = train(in_batch(tmp_path, method={"name": "selective_backprop", "start": 0.33, "end": 0.66}))
    assert [line["samples_forwarded"] for line in result.metrics] == [0, 5 * BATCH, 5 * BATCH]
    assert [line["samples_skipped"] for line in result.metrics] == [0, 5 * 16, 5 * 16]
    plain = train(in_batch(tmp_path, "plain", method="full"))
    assert results(result.metrics[:1]) == results(plain.metrics[:1])


def test_keeping_everything_is_full_training(tmp_path: Path) -> None:
    config = unpruned(THINNED)
    assert config is not None
    assert config["keep"] == 1.0
    whole = train(in_batch(tmp_path, "whole", method=config))
    plain = train(in_batch(tmp_path, "plain", method="full"))
    keys = ("epoch", "kept", "samples_trained", "plan_hash", "lr")
    assert results(whole.metrics, keys) == results(plain.metrics, keys)
    for one, other in zip(whole.metrics, plain.metrics, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    assert whole.metrics[-1]["samples_forwarded"] == EPOCHS * NUM


SCRIPT = """
import sys, yaml
from rayprune.config import make_config
from rayprune.engine.train.driver import train
if __name__ == "__main__":
    train(make_config(yaml.safe_load(sys.argv[1])))
"""


# Killed at step 6 of the second epoch: its checkpoint waited until that of step 3 was whole. The second method runs the
# model twice in a step that picks, which the first epoch's do not.
@pytest.mark.parametrize(
    ("method", "kill_at"),
    [
        ({"name": "es", "start": 0.0}, 10 + 6 + 1),
        ({"name": "ordered_sgd", "accuracies": [0.1], "shares": [1.0, 0.5]}, 10 + 2 * 6 + 1),
    ],
)
def test_a_run_killed_inside_an_epoch_continues_exactly(tmp_path: Path, method: dict[str, Any], kill_at: int) -> None:
    runs = {}
    for name, step in (("whole", 0), ("killed", kill_at)):
        model = {"name": user("counted"), "log": str(tmp_path / f"{name}.steps"), "kill_at": step}
        runs[name] = in_batch(tmp_path, name, method=method, model=model, run={"checkpoint_steps": 3})
    whole = train(runs["whole"])
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, runs["killed"].to_yaml()], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert newest_position(tmp_path / "killed")[1] > 0, "a checkpoint inside an epoch"
    again = train(runs["killed"])
    assert_same_run(again, whole)
    counts = ("samples_trained", "samples_forwarded", "samples_skipped", "compute", "selection")
    assert results(again.metrics, counts) == results(whole.metrics, counts)
    assert whole.metrics[-1]["samples_skipped"] > 0


@pytest.fixture(scope="module")
def irreducible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of another program, in another order, in which the first 30 samples are irreducible."""
    file = tmp_path_factory.mktemp("files") / "irreducible.csv"
    ids = np.arange(NUM)[::-1]
    pd.DataFrame({"id": ids, "il": np.where(ids < 30, 100.0, 0.0), "other": 1.0}).to_csv(file, index=False)
    return file


def rho(file: Path | str, **keys: Any) -> dict[str, Any]:
    return {"name": "rho", "irreducible": str(file), "column": "il", **keys}


def test_irreducible_losses_come_from_a_file(
    tmp_path: Path, irreducible: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(irreducible.parent)
    config = in_batch(tmp_path, method=rho(irreducible.name))
    assert config.method["irreducible"] == str(irreducible)
    picked = scores_of(train(config).folder)["picked_mean"]
    assert picked[:30].max() == 0.0
    assert picked.sum() * EPOCHS == pytest.approx(EPOCHS * (9 * 4 + 2))
    shuffled = in_batch(tmp_path, "control", method={"name": "shuffled", "of": rho(irreducible.name)})
    assert shuffled.method["of"]["irreducible"] == str(irreducible)
    control = scores_of(train(shuffled).folder)["picked_mean"]
    assert control[:30].max() > 0.0
    assert control.sum() == pytest.approx(picked.sum())


def test_scores_of_a_run_serve_as_irreducible_losses(tmp_path: Path, thinned: RunResult) -> None:
    result = train(in_batch(tmp_path, method=rho(thinned.folder, column="loss")))
    assert result.metrics[-1]["samples_trained"] == EPOCHS * (9 * 4 + 2)
    other = in_batch(tmp_path, "other", method=rho(thinned.folder, column="loss"), data={"hold_out": 0.1})
    with pytest.raises(ValueError, match=r"has 301 samples, the training split \d+: give a score for each"):
        train(other)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"method": "rho"}, "method 'rho' needs a file: set method.irreducible=scores.parquet"),
    "missing file": ({"method": rho("nowhere.csv")}, "nowhere.csv does not exist"),
    "class floor": ({"method": {**THINNED, "class_floor": 0.1}}, "chooses inside batches"),
    "exits": ({"train": {"step": "exits"}}, "trains by its own step 'in_batch', and train.step is 'exits'"),
    "compiled": ({"train": {"compile": True}}, "train step 'in_batch' cannot be compiled"),
    "no last layer": (
        {"method": "divbs", "model": {"name": user("ends_in_a_convolution")}},
        "method 'divbs' can't train model .*nn.Linear",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    sections, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        train(in_batch(tmp_path, **sections))
    assert not (tmp_path / "run").exists()


def test_files_with_gaps_and_of_other_data_are_refused(tmp_path: Path, irreducible: Path, thinned: RunResult) -> None:
    table = pd.read_csv(irreducible).sort_values("id")
    table.loc[table["id"] == 7, "il"] = np.nan
    table.to_csv(tmp_path / "gaps.csv", index=False)
    with pytest.raises(ValueError, match=r"no finite il for 1 samples, first ids \[7\]: score them, too"):
        train(in_batch(tmp_path, method=rho(tmp_path / "gaps.csv")))
    with pytest.raises(ValueError, match=r"has no score 'ill': did you mean 'il'"):
        train(in_batch(tmp_path, method=rho(irreducible, column="ill")))
    features = np.random.default_rng(0).random((400, 4)).astype(np.float32)
    np.savez(tmp_path / "other.npz", x=features, y=np.arange(400) % 3)
    other = {"source": "arrays", "path": str(tmp_path / "other.npz"), "hold_out": None}
    with pytest.raises(ValueError, match=r"has scores of other data than data\.source"):
        train(in_batch(tmp_path, method=rho(thinned.folder, column="loss"), data=other))


def test_a_loop_of_ones_own_refuses_them() -> None:
    data = {"x": np.zeros((8, 2), dtype=np.float32), "label": np.arange(8)}
    with pytest.raises(ValueError, match="'es' picks rows inside the train step of rayprune train"):
        rayprune.local_loader(data, rayprune.EvolvedSampling(), num_epochs=2, batch_size=4)


# Train steps of the user's own


def test_the_example_of_a_step_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    epochs, example = {"epochs": 2, "batch_size": BATCH}, "examples/focal_step.py:FocalStep"
    plain = train(run_config(tmp_path, "plain", train=epochs))
    same, focal = (
        train(run_config(tmp_path, f"focal{gamma}", train={**epochs, "step": {"name": example, "gamma": gamma}}))
        for gamma in (0, 2)
    )
    assert same_weights(same.folder, plain.folder)
    assert focal.metrics[0]["train_loss"] < plain.metrics[0]["train_loss"]


def test_a_step_of_ones_own_trains_with_its_options(tmp_path: Path) -> None:
    optim = {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.0}
    scaled = {factor: {"name": user("Scaled"), "factor": factor} for factor in (1.0, 2.0)}
    epochs = {"epochs": EPOCHS, "batch_size": BATCH}
    runs = {
        factor: train(run_config(tmp_path, f"by_{factor}", train={**epochs, "step": step}, optim=optim))
        for factor, step in scaled.items()
    }
    for factor, rate in ((1.0, 0.02), (2.0, 0.04)):
        plain = train(run_config(tmp_path, f"at_{rate}", train=epochs, optim={**optim, "lr": rate}))
        assert same_weights(runs[factor].folder, plain.folder), "twice the loss is twice the rate"
    assert not same_weights(runs[1.0].folder, runs[2.0].folder)
    config = run_config(tmp_path, train={"step": scaled[2.0]})
    assert config.train.step == {"name": user("Scaled"), "factor": 2.0}
    assert config.digest() != run_config(tmp_path, train={"step": scaled[1.0]}).digest()
    with pytest.raises(ValueError, match=r"train\.step\.factor = -1\.0: must be above 0"):
        run_config(tmp_path, train={"step": {"name": user("Scaled"), "factor": -1.0}})
    with pytest.raises(ValueError, match=r"is not a train step with options"):
        run_config(tmp_path, train={"step": user("LowerHalf")})
