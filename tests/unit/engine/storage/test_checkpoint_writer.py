"""Checkpoints are written behind training's back: what they hold is of their moment, and no line comes before them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from rayprune.engine.storage import checkpoint_writer as saving
from rayprune.engine.storage.checkpoint import checkpoint_path, newest_checkpoint, newest_position, read_position
from rayprune.engine.storage.checkpoint_writer import CheckpointWriter
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.nn.device import host_copy
from rayprune.nn.steps import PlainStep
from tests.support.runs import run_config

SECONDS = {"epoch": 1.0}


class Slow:
    """A CheckpointWriter of a small network whose disk is slow until `disk` is set."""

    def __init__(self, folder: Path) -> None:
        (folder / "checkpoints").mkdir()
        self.folder, self.disk = folder, threading.Event()
        self.saver = CheckpointWriter(folder, run_config(folder), "fingerprint", "", rank=0)
        self.network = torch.nn.Linear(2, 2)
        self.step = PlainStep(self.network, torch.optim.SGD(self.network.parameters(), lr=0.1))
        self.table = {"loss": np.zeros(3, np.float32)}
        self.saver._writer.submit(self.disk.wait, 30)

    def copied(self) -> saving.StateCopy:
        """Copy the state as it is."""
        return self.saver.copied(self.network, self.step, self.table)

    def go_on(self) -> None:
        """Change all that training changes."""
        self.saver.count(1000, 0, 0, 0, 0)
        self.table["loss"][:] = 7.0
        with torch.no_grad():
            self.network.weight.fill_(7.0)

    def assert_untouched(self, folder: Path) -> None:
        """Hold that a checkpoint has nothing of what came after its moment."""
        assert read_position(folder)["counts"]["samples_trained"] == 0
        assert not (torch.load(folder / "model.pt", weights_only=True)["weight"] == 7.0).any()
        with np.load(folder / "selector.npz") as stored:
            assert not stored["loss"].any()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    made = Slow(tmp_path)
    yield made
    made.disk.set()
    made.saver.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no checkpoint be written."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "write_checkpoint", full)


def test_a_checkpoint_inside_an_epoch_is_of_its_moment_however_late_it_is_written(slow: Slow) -> None:
    slow.saver.save_inside(0, 3, slow.copied(), [0.0] * 5, resume_step=0)
    slow.go_on()
    slow.disk.set()
    slow.saver.wait()
    slow.assert_untouched(checkpoint_path(slow.folder, 0, 3))


def test_the_line_of_an_epoch_comes_after_its_checkpoint_and_training_waits_for_neither(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[dict[str, Any], str | None]] = []

    def report(metrics: dict[str, Any], checkpoint: Any, **_: Any) -> None:
        told.append((metrics, checkpoint and Path(checkpoint.path).name))

    monkeypatch.setattr(saving.ray.train, "report", report)
    slow.saver.save(1, {"epoch": 0}, SECONDS, slow.copied())
    slow.go_on()
    slow.saver.look()
    assert newest_checkpoint(slow.folder) is None
    assert read_metrics(slow.folder) == []
    slow.disk.set()
    slow.saver.report()
    slow.saver.report()  # nothing new
    assert told == [({"epoch": 0}, "epoch-000001")]
    assert newest_position(slow.folder) == (1, 0)
    slow.assert_untouched(checkpoint_path(slow.folder, 1))
    (line,) = read_metrics(slow.folder)
    assert (line["epoch"], line["seconds"]) == (0, SECONDS)
    assert read_position(checkpoint_path(slow.folder, 1))["metrics"] == line


@pytest.mark.usefixtures("full_disk")
def test_an_end_of_an_epoch_that_cannot_be_written_ends_the_attempt_and_leaves_no_line(slow: Slow) -> None:
    slow.saver.save(1, {"epoch": 0}, SECONDS, slow.copied())
    slow.disk.set()
    with pytest.raises(OSError, match="No space left"):
        slow.saver.wait()
    slow.saver.look()  # said once
    assert read_metrics(slow.folder) == []


@pytest.mark.usefixtures("full_disk")
def test_a_checkpoint_inside_an_epoch_that_cannot_be_written_is_told_and_training_goes_on(
    slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    slow.saver.save_inside(0, 3, slow.copied(), [0.0] * 5, resume_step=0)
    slow.disk.set()
    with caplog.at_level(logging.WARNING):
        slow.saver.wait()
    assert "could not be written (No space left on device); training goes on" in caplog.text


def test_a_copy_keeps_values_strides_and_what_is_shared() -> None:
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    state = {"encoder": weight, "decoder": weight.detach(), "inner": [(weight[0], 3)], "empty": torch.zeros(0)}
    copied = host_copy(state)
    before = weight.clone()
    weight.zero_()
    assert torch.equal(copied["encoder"], before)
    assert copied["encoder"].stride() == before.stride() == (24, 1, 8, 2)
    assert copied["decoder"] is copied["encoder"]
    assert torch.equal(copied["inner"][0][0], before[0])
    assert copied["inner"][0][1] == 3


def test_tensors_without_an_address_and_lazy_views_are_copied_by_themselves() -> None:
    sparse, base = torch.eye(3).to_sparse(), torch.tensor([1 + 2j])
    state = {"sparse": sparse, "base": base, "view": base.conj(), "pair": _Pair(torch.ones(2) * 2, 3)}
    copied = host_copy(state)
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(3))
    assert copied["view"].tolist() == [1 - 2j]
    assert isinstance(copied["pair"], _Pair)
    assert copied["pair"].first.tolist() == [2, 2]


class _Pair(NamedTuple):
    first: torch.Tensor
    second: int


@pytest.mark.usefixtures("full_disk")
def test_what_could_not_be_written_is_told_where_something_else_ended_the_run(
    slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    slow.saver.save(1, {"epoch": 0}, SECONDS, slow.copied())
    slow.disk.set()
    slow.saver.close()
    assert "the last checkpoint could not be written: No space left" in caplog.text


def test_a_table_that_nobody_can_change_is_not_copied(slow: Slow) -> None:
    slow.table["loss"].flags.writeable = False
    assert slow.copied().selector["loss"] is slow.table["loss"]


def test_a_table_too_large_for_a_copy_is_written_before_training_goes_on(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_ROOM", 2**60)
    slow.disk.set()
    slow.saver.save_inside(0, 3, slow.copied(), [0.0] * 5, resume_step=0)
    slow.go_on()
    slow.assert_untouched(checkpoint_path(slow.folder, 0, 3))
