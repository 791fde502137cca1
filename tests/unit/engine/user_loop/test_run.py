"""The run folder of a loop: its files, resuming, and the commands that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rayprune
from rayprune.cli.main import cli
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.user_loop.shard import Shard
from rayprune.sources.tables.scores import read_scores
from tests.unit.engine.user_loop.loops import BATCH, DATA, METHOD, N, X, local_shard

EPOCHS = 3


def shard_in(folder: Path, **changes: Any) -> Shard:
    return local_shard(num_epochs=EPOCHS, run=folder, **changes)


def train(shard: Shard, stop: tuple[int, int] | None = None) -> tuple[list[list[float]], dict[str, Any]]:
    """Train; return the losses of each epoch's real rows, and the state at `stop`."""
    losses: list[list[float]] = []
    for epoch in shard:
        losses.append([])
        for batch in epoch:
            epoch.weigh(batch, batch["x"].square().sum(1))
            losses[-1] += batch["x"].square().sum(1)[batch["weight"] > 0].tolist()
            if (epoch.index, epoch.step) == stop:
                return losses, shard.state_dict()
        epoch.log(val_accuracy=torch.tensor(0.5), lr=0.1, mine=epoch.index)
    return losses, {}


@pytest.mark.parametrize("method", [METHOD, rayprune.RandomEpoch(prune_ratio=0.5)], ids=["losses", "no signals"])
def test_every_epoch_has_a_line_and_the_end_has_scores(method: Any, tmp_path: Path) -> None:
    shard = shard_in(tmp_path / "run", method=method)
    losses, _ = train(shard)
    lines = read_metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["train_loss"] for line in lines] == pytest.approx([np.mean(epoch) for epoch in losses], rel=1e-5)
    trained = np.cumsum([len(epoch) for epoch in losses])
    assert [line["samples_trained"] for line in lines] == trained.tolist()
    rows = np.cumsum([-(-len(epoch) // BATCH) * BATCH for epoch in losses])
    assert [line["samples_padded"] for line in lines] == (rows - trained).tolist()
    assert [line["compute"] for line in lines] == rows.tolist()
    assert [line["pruned_fraction"] for line in lines] == pytest.approx([1 - len(epoch) / N for epoch in losses])
    assert [(line["val_accuracy"], line["lr"], line["mine"]) for line in lines] == [(0.5, 0.1, i) for i in range(3)]
    assert lines[2]["wall_time"] > lines[1]["wall_time"] > 0
    stored, scores = read_scores(tmp_path / "run"), shard.scores()
    assert {"loss_mean"} <= set(stored.scores)
    assert all(np.array_equal(stored.scores[name], scores[name], equal_nan=True) for name in stored.scores)


def test_the_commands_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    train(shard_in(folder))
    runner = CliRunner()
    shown = runner.invoke(cli, ["show", str(folder), "--top", "3"], catch_exceptions=False)
    assert "infobatch" in shown.output
    assert "50.00%" in shown.output
    for words in (["report", str(folder)], ["select", str(folder), "--by", "loss", "--keep", "0.25"]):
        assert runner.invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert (folder / "report.html").stat().st_size > 10_000
    chosen = rayprune.local_loader(DATA, rayprune.Fixed(path=str(folder / "chosen.parquet")), 1, BATCH)
    assert next(chosen.epochs()).num_kept == -(-N // 4)


def test_a_resumed_loop_continues_its_lines(tmp_path: Path) -> None:
    train(shard_in(tmp_path / "whole"))
    _, state = train(shard_in(tmp_path / "run"), stop=(1, 4))
    again = shard_in(tmp_path / "run")
    again.load_state_dict(state)
    train(again)
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    left_out = {"seconds", "wall_time"}
    for line in (*ours, *theirs):
        line["train_loss"] = None if line["epoch"] == 1 else line["train_loss"]  # of the steps after the resume
    assert [{k: v for k, v in line.items() if k not in left_out} for line in ours] == [
        {k: v for k, v in line.items() if k not in left_out} for line in theirs
    ]
    # An older state: the epochs after it are trained, and written, again.
    earlier = shard_in(tmp_path / "run")
    earlier.load_state_dict(state)
    next(earlier.epochs())
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [0]


def test_a_restart_of_the_same_loop_without_a_state_starts_its_lines_anew(tmp_path: Path) -> None:
    """Ray Train restarts a failed loop that saves nothing from its start."""
    shard = shard_in(tmp_path / "run")
    client = shard._session.client
    train(shard, stop=(1, 2))
    assert len(read_metrics(tmp_path / "run")) == 1
    client.restore(client.generation() + 1, 0, None)
    assert read_metrics(tmp_path / "run") == []


def test_another_run_in_the_folder_is_never_overwritten(tmp_path: Path) -> None:
    train(shard_in(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(rayprune.RunFolderError, match="holds 3 epochs of an earlier start: load its state"):
        next(shard_in(tmp_path / "run").epochs())
    with pytest.raises(rayprune.RunFolderError, match="holds a run on other data"):
        shard_in(tmp_path / "run", source={"x": X[:100]})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    (tmp_path / "file").touch()
    with pytest.raises(rayprune.RunFolderError, match=r"can't be written .*: name another run="):
        shard_in(tmp_path / "file")
    (tmp_path / "engine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(rayprune.RunFolderError, match="holds a run on other data"):
        shard_in(tmp_path / "engine")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"val_accuracy": 97.5}, r"val_accuracy 97.5: give a fraction in \[0, 1\]"),
        ({"mine": [1, 2]}, "mine of type list: give a number or text"),
    ],
)
def test_metrics_that_cannot_be_shown_are_refused(metrics: dict[str, Any], words: str, tmp_path: Path) -> None:
    epoch = next(shard_in(tmp_path / "run").epochs())
    with pytest.raises(ValueError, match=words):
        epoch.log(**metrics)
    epoch.log(a=np.float32(0.5), b=torch.tensor(2), c=np.array([3]), d="text", e=None, f=True)


def test_metrics_may_follow_the_state_of_the_epochs_end(tmp_path: Path) -> None:
    """Train, save, validate, log is a common order."""
    shard = shard_in(tmp_path / "run")
    for epoch in shard:
        for batch in epoch:
            epoch.weigh(batch, batch["x"].square().sum(1))
        assert shard.state_dict()["epoch"] == epoch.index + 1
        epoch.log(val_accuracy=0.25)
        epoch.log(more=epoch.index)
    lines = read_metrics(tmp_path / "run")
    assert [(line["val_accuracy"], line["more"]) for line in lines] == [(0.25, 0), (0.25, 1), (0.25, 2)]
    train(shard_in(tmp_path / "other"))
    for ours, theirs in zip(lines, read_metrics(tmp_path / "other"), strict=True):
        names = ours.keys() & theirs.keys() - {"wall_time", "seconds", "val_accuracy"}
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_names_that_rayprune_writes_cannot_be_logged(tmp_path: Path) -> None:
    epoch = next(shard_in(tmp_path / "run").epochs())
    with pytest.raises(ValueError, match="rayprune writes train_loss itself"):
        epoch.log(train_loss=0.3)
    train(shard_in(tmp_path / "other"))
    for name in read_metrics(tmp_path / "other")[0].keys() - {"val_accuracy", "lr", "mine"}:
        with pytest.raises(ValueError, match=f"rayprune writes {name} itself"):
            epoch.log(**{name: 0})


def test_the_report_advises_what_a_loop_can_do(tmp_path: Path) -> None:
    train(shard_in(tmp_path / "own"))
    reported = CliRunner().invoke(cli, ["report", str(tmp_path / "own")], catch_exceptions=False)
    assert "gallery" not in reported.output
    page = (tmp_path / "own" / "report.html").read_text()
    assert "train the loop with rayprune.Full(), too" in page
    assert "rayprune compare trains both" not in page
