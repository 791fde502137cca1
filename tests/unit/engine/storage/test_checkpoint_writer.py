"""Checkpoints are written while training goes on: each holds the state of its moment, and no line precedes its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.engine.storage import checkpoint_writer
from rayprune.engine.storage.checkpoint import checkpoint_path, newest_checkpoint, newest_position, read_position
from rayprune.engine.storage.checkpoint_writer import CheckpointWriter, StateCopy
from rayprune.engine.storage.costs import PriorCost
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.nn.steps import PlainStep
from tests.support.runs import run_config

SECONDS = {"epoch": 1.0}


class SlowWriter:
    """A CheckpointWriter of a small network whose disk is blocked until `disk` is set."""

    def __init__(self, folder: Path) -> None:
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.folder, self.disk = folder, threading.Event()
        self.writer = CheckpointWriter(folder, run_config(folder), 0, fingerprint="fingerprint", shuffle="")
        self.network = torch.nn.Linear(2, 2)
        self.step = PlainStep(self.network, torch.optim.SGD(self.network.parameters(), lr=0.1))
        self.table = {"loss": np.zeros(3, np.float32)}
        self.writer._executor.submit(self.disk.wait, 30)

    def copy_state(self) -> StateCopy:
        """Copy the current state."""
        return self.writer.copy_state(self.network, self.step, self.table)

    def train(self) -> None:
        """Change everything that training changes."""
        self.writer.add_counts(samples_trained=1000)
        self.table["loss"][:] = 7.0
        with torch.no_grad():
            self.network.weight.fill_(7.0)

    def assert_untrained(self, folder: Path) -> None:
        """Assert that a checkpoint holds no later state."""
        assert read_position(folder)["counts"]["samples_trained"] == 0
        assert not (torch.load(folder / "model.pt", weights_only=True)["weight"] == 7.0).any()
        with np.load(folder / "selector.npz") as stored:
            assert not stored["loss"].any()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowWriter]:
    writer = SlowWriter(tmp_path)
    yield writer
    writer.disk.set()
    writer.writer.close()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every checkpoint fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", fail)


def test_a_mid_epoch_checkpoint_holds_the_state_of_its_moment_however_late_it_is_written(slow: SlowWriter) -> None:
    slow.writer.save_mid_epoch(0, 3, slow.copy_state(), [0.0] * 5, resume_step=0)
    slow.train()
    slow.disk.set()
    slow.writer.wait()
    slow.assert_untrained(checkpoint_path(slow.folder, 0, 3))


def test_an_epochs_line_follows_its_checkpoint_and_training_waits_for_neither(
    slow: SlowWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[tuple[dict[str, Any], str | None]] = []

    def report(metrics: dict[str, Any], checkpoint: Any, **_: Any) -> None:
        reports.append((metrics, checkpoint and Path(checkpoint.path).name))

    monkeypatch.setattr(checkpoint_writer.ray.train, "report", report)
    slow.writer.save(1, {"epoch": 0}, SECONDS, slow.copy_state())
    slow.train()
    slow.writer.raise_failure()
    assert newest_checkpoint(slow.folder) is None
    assert read_metrics(slow.folder) == []
    slow.disk.set()
    slow.writer.report()
    slow.writer.report()  # nothing new
    assert reports == [({"epoch": 0}, "epoch-000001")]
    assert newest_position(slow.folder) == (1, 0)
    slow.assert_untrained(checkpoint_path(slow.folder, 1))
    (line,) = read_metrics(slow.folder)
    assert (line["epoch"], line["seconds"]) == (0, SECONDS)
    assert read_position(checkpoint_path(slow.folder, 1))["metrics"] == line


@pytest.mark.usefixtures("full_disk")
def test_a_failed_write_at_an_epochs_end_ends_the_attempt_and_leaves_no_line(slow: SlowWriter) -> None:
    slow.writer.save(1, {"epoch": 0}, SECONDS, slow.copy_state())
    slow.disk.set()
    with pytest.raises(OSError, match="No space left"):
        slow.writer.wait()
    slow.writer.raise_failure()  # only once
    assert read_metrics(slow.folder) == []


@pytest.mark.usefixtures("full_disk")
def test_a_failed_write_inside_an_epoch_is_logged_and_training_goes_on(
    slow: SlowWriter, caplog: pytest.LogCaptureFixture
) -> None:
    slow.writer.save_mid_epoch(0, 3, slow.copy_state(), [0.0] * 5, resume_step=0)
    slow.disk.set()
    with caplog.at_level(logging.WARNING):
        slow.writer.wait()
    assert "could not be written (No space left on device); training continues" in caplog.text


@pytest.mark.usefixtures("full_disk")
def test_a_failed_write_is_logged_when_the_run_ends(slow: SlowWriter, caplog: pytest.LogCaptureFixture) -> None:
    slow.writer.save(1, {"epoch": 0}, SECONDS, slow.copy_state())
    slow.disk.set()
    slow.writer.close()
    assert "the last checkpoint could not be written: No space left" in caplog.text


def test_a_read_only_table_is_not_copied(slow: SlowWriter) -> None:
    slow.table["loss"].flags.writeable = False
    assert slow.copy_state().selector["loss"] is slow.table["loss"]


def test_a_table_too_large_to_copy_is_written_before_training_goes_on(
    slow: SlowWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_COPY_HEADROOM", 2**60)
    slow.disk.set()
    slow.writer.save_mid_epoch(0, 3, slow.copy_state(), [0.0] * 5, resume_step=0)
    slow.train()
    slow.assert_untrained(checkpoint_path(slow.folder, 0, 3))


def test_a_checkpoint_restores_weights_counts_and_sums(slow: SlowWriter, tmp_path: Path) -> None:
    slow.train()
    slow.writer.save_mid_epoch(2, 3, slow.copy_state(), [1.5, 2.0], resume_step=0)
    slow.disk.set()
    slow.writer.wait()
    other = SlowWriter(tmp_path)
    sums = other.writer.restore(2, 3, other.network, other.step, torch.device("cpu"))
    other.disk.set()
    other.writer.close()
    assert sums == [1.5, 2.0]
    assert torch.equal(other.network.weight, slow.network.weight)
    assert other.writer.add_counts(samples_trained=1)["samples_trained"] == 1001


def test_a_checkpoint_of_other_data_is_not_restored(slow: SlowWriter) -> None:
    slow.disk.set()
    slow.writer.save_mid_epoch(0, 3, slow.copy_state(), [], resume_step=0)
    slow.writer.wait()
    other = CheckpointWriter(slow.folder, run_config(slow.folder), 0, fingerprint="other", shuffle="")
    with pytest.raises(ValueError, match="is of another run: fingerprint fingerprint, here other"):
        other.restore(0, 3, slow.network, slow.step, torch.device("cpu"))


def test_counts_start_from_the_prior_cost(tmp_path: Path) -> None:
    prior_cost = PriorCost(samples_trained=100, bytes_read=7)
    writer = CheckpointWriter(tmp_path, run_config(tmp_path), 0, fingerprint="", shuffle="", prior_cost=prior_cost)
    counts = writer.add_counts(samples_trained=5)
    assert counts == {**prior_cost.counts, "samples_trained": 105}
