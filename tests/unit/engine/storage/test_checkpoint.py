"""A checkpoint is used whole or not at all; old ones are deleted, and those that a resume needs stay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from rayprune.engine.storage.checkpoint import (
    checkpoint_path,
    copy_checkpoint,
    damage,
    forget_ray_records,
    is_written,
    load_selector_state,
    load_tensors,
    newest_checkpoint,
    newest_position,
    read_position,
    remove_old_checkpoints,
    remove_old_steps,
    write_checkpoint,
)
from tests.support.runs import POSITION


def write(folder: Path, epoch: int, step: int = 0, **position: Any) -> Path:
    """Write a small checkpoint whose contents tell its position."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return write_checkpoint(
        folder,
        epoch,
        step,
        model={"weight": torch.full((3,), float(epoch))},
        trainer={"optimizer": {}, "step": {}},
        selector={"loss": np.full(3, step)},
        position={**POSITION, **position},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 2, 7, wall_time=9.0)
    assert folder == checkpoint_path(tmp_path, 2, 7)
    assert is_written(folder)
    assert damage(folder) is None
    assert read_position(folder) == {"schema": 1, "epoch": 2, "step": 7, **POSITION, "wall_time": 9.0}
    assert load_selector_state(tmp_path, 2, 7)["loss"].tolist() == [7, 7, 7]
    assert load_tensors(folder / "model.pt", torch.device("cpu"))["weight"].tolist() == [2, 2, 2]


def test_the_newest_checkpoint_is_the_furthest_position(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_position(tmp_path) == (0, 0)
    for epoch, step in ((1, 0), (0, 400), (1, 12), (1, 3)):
        write(tmp_path, epoch, step)
    assert newest_position(tmp_path) == (1, 12)
    write(tmp_path, 2)
    assert newest_position(tmp_path) == (2, 0)


def test_damaged_checkpoints_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in range(4):
        write(tmp_path, epoch)
    (checkpoint_path(tmp_path, 3) / "manifest.json").unlink()
    (checkpoint_path(tmp_path, 2) / "position.json").write_text("{}")
    (checkpoint_path(tmp_path, 1) / "model.pt").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 0)
    for problem in ("it is incomplete", "position.json was altered", "model.pt is missing"):
        assert problem in caplog.text


def test_a_later_attempt_replaces_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1, wall_time=1)
    folder = write(tmp_path, 1, wall_time=2)
    assert read_position(folder)["wall_time"] == 2
    assert damage(folder) is None


def test_a_full_disk_leaves_nothing_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 0, 1)
    save = torch.save

    def fail(value: Any, stream: IO[bytes]) -> None:
        if stream.name.endswith("trainer.pt"):
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")  # torch's own words
        save(value, stream)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="could not be written"):
        write(tmp_path, 0, 2)
    assert names(tmp_path) == ["epoch-000000-step-00000001"]


def test_no_run_folder_is_created_for_a_checkpoint(tmp_path: Path) -> None:
    """Where the storage is not mounted, a folder in its place would hide the run."""
    with pytest.raises(OSError, match="No such file or directory"):
        write_checkpoint(tmp_path / "away", 0, model={}, trainer={}, selector={}, position={})
    assert not (tmp_path / "away").exists()


def test_a_copied_checkpoint_is_the_same(tmp_path: Path) -> None:
    origin = write(tmp_path / "one", 3, 5)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    copy = copy_checkpoint(origin, tmp_path / "other")
    assert copy == checkpoint_path(tmp_path / "other", 3, 5)
    assert damage(copy) is None
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in origin.iterdir()
    }


def test_mid_epoch_checkpoints_go_except_the_newest_and_the_attempts_own(tmp_path: Path) -> None:
    for epoch, step in ((0, 9), (1, 0), (1, 2), (1, 4), (1, 6), (1, 8)):
        write(tmp_path, epoch, step)
    remove_old_steps(tmp_path, 1, keep=2, resume_step=2)
    assert names(tmp_path) == ["epoch-000001", *(f"epoch-000001-step-0000000{step}" for step in (2, 6, 8))]


def test_old_epochs_go_and_steps_stay(tmp_path: Path) -> None:
    for epoch in range(4):
        write(tmp_path, epoch)
    write(tmp_path, 3, 2)
    remove_old_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["epoch-000002", "epoch-000003", "epoch-000003-step-00000002"]


def test_rays_own_records_are_forgotten(tmp_path: Path) -> None:
    write(tmp_path, 0)
    forget_ray_records(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").write_text("{}")
    forget_ray_records(tmp_path)
    assert names(tmp_path) == ["epoch-000000"]
