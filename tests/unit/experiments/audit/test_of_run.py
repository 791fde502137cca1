"""`rayprune audit RUN`: findings from a finished run, without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits

from rayprune.cli.main import cli
from rayprune.config import Config
from rayprune.engine.storage.lock import lock_folder
from rayprune.engine.train.driver import open_splits, train
from rayprune.engine.train.predictions import final_predictions
from rayprune.engine.train.preflight import input_spec
from rayprune.errors import ConfigError, RunFolderError
from rayprune.experiments.audit.of_run import audit_run
from rayprune.experiments.audit.of_run import run_config as config_of
from rayprune.report.audit import TRAINED, read_audit_section
from rayprune.report.collect import collect
from rayprune.report.page import render
from rayprune.sources.tables.audits import read_audit
from rayprune.sources.tables.scores import read_scores
from tests.support.runs import run_config

N = 400
WRONG = np.arange(0, N, 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, of which every tenth has a wrong label, and 399 is a copy of 398."""
    digits = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target.copy()
    labels[WRONG] = (labels[WRONG] + 1 + WRONG % 9) % 10
    images[399], labels[399] = images[398], labels[398]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=images[:N], y_train=labels[:N], x_test=images[N:500], y_test=labels[N:500])
    return path


def config_for(data: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    train_keys = {"epochs": 10, "record": ["loss", "logit_margin", "correct"], **sections.pop("train", {})}
    return run_config(
        folder, data={"source": "arrays", "path": str(data), "limit": None}, optim={"lr": 0.01}, train=train_keys,
        **sections,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(data, tmp_path_factory.mktemp("runs"))).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, in another place."""
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def test_wrong_labels_rank_first_and_the_report_shows_the_caveat(run: Path) -> None:
    done = CliRunner().invoke(cli, ["audit", str(run)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert TRAINED in " ".join(done.output.split())
    stored = read_audit(run)
    stored.check_source(open_splits(config_of(run)).train)
    table = stored.table
    ranked = np.argsort(-table.p_wrong)
    assert np.isin(ranked[: WRONG.size], WRONG).mean() > 0.75
    assert (table.duplicate_of[399], table.duplicate_split[399]) == (398, "train")
    assert set(table.statistics) == {"probability", "loss", "margin", "correct", "similarity", "outlier"}
    stored = read_scores(run).scores
    np.testing.assert_array_equal(table.statistics["margin"], stored["logit_margin_mean"].astype(np.float32))
    np.testing.assert_array_equal(table.statistics["loss"], stored["loss_mean"].astype(np.float32))
    assert "out of fold" not in " ".join(table.evidence.tolist())
    summary = json.loads((run / "audit.json").read_text())
    assert summary["predictions"] == "trained_network"
    assert (run / "audit_gallery" / "gallery.json").exists()
    section = read_audit_section(run)
    assert section is not None
    assert TRAINED in section.verdict
    assert "Data audit" in render(collect([run]))


def test_the_predictions_are_those_of_the_final_network(run: Path) -> None:
    config = config_of(run)
    source = open_splits(config).train
    done: list[int] = []
    ids = np.array([5, 3, 17])
    some = final_predictions(config, source, input_spec(config, source), run, ids, batch_size=2, on_batch=done.append)
    every = final_predictions(config, source, input_spec(config, source), run, np.arange(N), batch_size=N)
    assert done == [2, 3]
    np.testing.assert_allclose(some, every[ids], atol=1e-6)
    state = torch.get_rng_state()
    table = audit_run(config.model_copy(update={"audit": config.audit.model_copy(update={"duplicates": False})})).table
    assert torch.equal(torch.get_rng_state(), state)
    own = every[np.arange(N), source.labels]
    np.testing.assert_allclose(table.statistics["probability"], own, atol=1e-6)
    assert not (run / "duplicates").exists()


def test_a_run_without_recorded_signals(data: Path, tmp_path: Path) -> None:
    """InfoBatch stores each sample's last loss; a random subset leaves samples without any."""
    plain = train(config_for(data, tmp_path, train={"record": [], "epochs": 4})).folder
    none = {"duplicates": False}
    changes = ["audit.duplicates=false"]
    table = audit_run(config_of(plain, changes)).table
    assert set(table.statistics) == {"probability", "loss"}
    with pytest.raises(ConfigError, match=r"audit.rule 'margin' needs the margins .* train.record"):
        audit_run(config_of(plain, [*changes, "audit.rule=margin"]))
    subset = {"name": "random", "prune_ratio": 0.5}
    half = train(config_for(data, tmp_path / "half", method=subset, audit=none, train={"epochs": 4})).folder
    for rule in ("ensemble", "margin", "loss_mixture"):
        table = audit_run(config_of(half, [f"audit.rule={rule}"])).table
        assert np.isnan(table.statistics["margin"]).sum() == N // 2
        assert np.isfinite(table.p_wrong).all()


def test_refusals_are_one_line_with_the_cure(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs would change what was trained"):
        config_of(run, ["train.epochs=3"])
    with pytest.raises(RunFolderError, match="is not a run folder"):
        config_of(tmp_path)
    with lock_folder(run), pytest.raises(RunFolderError, match="another process"):
        audit_run(config_of(run))
    (run / "scores.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"is not finished: continue it first, rayprune train .*config.yaml"):
        audit_run(config_of(run))
    with np.load(data) as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "y_train": (arrays["y_train"] + 1) % 10})
    with pytest.raises(RunFolderError, match="other data"):
        audit_run(config_of(run, [f"data.path={tmp_path / 'other.npz'}"]))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunFolderError, match=r"loop of your own.*shard.audit"):
        config_of(run)
