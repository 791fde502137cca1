"""Checkpoints: one folder with all that a resume needs; its manifest of checksums is written last.

    <run>/checkpoints/epoch-000003/                  the state before epoch 3
    <run>/checkpoints/epoch-000003-step-00000120/    the state before step 120 of epoch 3
        model.pt       the network's state_dict
        trainer.pt     the state_dicts of the optimizer and the train step
        selector.npz   the score table and the selection of epoch 3 (rayprune.core.selector)
        position.json  epoch, step, counts, the last metrics line, and the run's identity (config digest, fingerprint)
        manifest.json  name → SHA-256; without it, a folder is incomplete

Nothing is renamed, so this also works on storage without atomic renames, such as a mounted object store. Nothing needs
pickle to load: torch loads with weights_only, NumPy without allow_pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayprune.errors import RunFolderError

if TYPE_CHECKING:  # the ScoreActor loads states without torch, which would cost it 0.4 GB and a second
    import torch

logger = logging.getLogger(__name__)

SCHEMA = 1
_FOLDER, _MANIFEST = "checkpoints", "manifest.json"


def checkpoint_path(run_folder: Path, epoch: int, step: int = 0) -> Path:
    """Return the folder of the state before a step of an epoch; names sort by position."""
    return run_folder / _FOLDER / (f"epoch-{epoch:06d}" + (f"-step-{step:08d}" if step else ""))


def write_checkpoint(
    run_folder: Path,
    epoch: int,
    step: int = 0,
    *,
    model: Mapping[str, Any],
    trainer: Mapping[str, Any],
    selector: Mapping[str, NDArray[Any]],
    position: Mapping[str, Any],
) -> Path:
    """Write the state before a step; readers ignore it until its manifest exists.

    Raises:
        OSError: the checkpoint could not be written; its files have been removed.
    """
    import torch

    folder = checkpoint_path(run_folder, epoch, step)
    folder.parent.mkdir(exist_ok=True)  # without parents: nothing may take the place of storage that is not mounted
    remove_checkpoint(folder)  # by an earlier attempt
    try:
        folder.mkdir()
        torch.save(dict(model), folder / "model.pt")
        torch.save(dict(trainer), folder / "trainer.pt")
        np.savez(folder / "selector.npz", **dict[str, Any](selector))
        (folder / "position.json").write_text(json.dumps({"schema": SCHEMA, "epoch": epoch, "step": step, **position}))
        sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        (folder / _MANIFEST).write_text(json.dumps(sums, indent=1))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        remove_checkpoint(folder)
        raise OSError(f"checkpoint {folder} could not be written: {error}") from error
    return folder


def copy_checkpoint(origin: Path, run_folder: Path) -> Path:
    """Copy an intact checkpoint into another run folder, its manifest last."""
    position = read_position(origin)
    folder = checkpoint_path(run_folder, position["epoch"], position["step"])
    remove_checkpoint(folder)
    shutil.copytree(origin, folder, ignore=shutil.ignore_patterns(_MANIFEST))
    shutil.copy2(origin / _MANIFEST, folder / _MANIFEST)
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if it exists; its manifest goes first, so that no remainder looks complete."""
    with contextlib.suppress(OSError):
        (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match their manifest; log and skip damaged ones."""
    for folder in sorted((run_folder / _FOLDER).glob("epoch-*"), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s can't be used (%s): trying the one before it", folder, problem)
    return None


def read_position(folder: Path) -> dict[str, Any]:
    """Return position.json.

    Raises:
        RunFolderError: a newer version of rayprune wrote it.
    """
    position: dict[str, Any] = json.loads((folder / "position.json").read_text())
    if position["schema"] > SCHEMA:
        raise RunFolderError(
            f"checkpoint {folder} has schema {position['schema']}, this version reads {SCHEMA}: upgrade"
        )
    return position


def newest_position(run_folder: Path) -> tuple[int, int]:
    """Return the (epoch, step) at which the newest intact checkpoint resumes; (0, 0) without one."""
    folder = newest_checkpoint(run_folder)
    if folder is None:
        return 0, 0
    position = read_position(folder)
    return position["epoch"], position["step"]


def is_written(folder: Path) -> bool:
    """Return whether all files of a checkpoint are written; does not verify them."""
    return (folder / _MANIFEST).exists()


def load_selector_state(run_folder: Path, epoch: int, step: int = 0) -> dict[str, NDArray[Any]]:
    """Return the Selector's state before a step of an epoch.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    with np.load(checkpoint_path(run_folder, epoch, step) / "selector.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def load_tensors(file: Path, device: torch.device) -> dict[str, Any]:
    """Load a file of tensors, plain numbers and containers; torch refuses anything else."""
    import torch

    loaded: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    return loaded


def remove_old_steps(run_folder: Path, epoch: int, keep: int, resume_step: int) -> None:
    """Delete mid-epoch checkpoints that are no longer needed.

    Args:
        run_folder: the run's folder.
        epoch: the current epoch; those of other epochs are deleted.
        keep: how many of the current epoch to keep.
        resume_step: the step at which this attempt began the epoch. A ScoreActor that restarts needs its checkpoint, so
            it is kept until the epoch ends.
    """
    mid_epoch = sorted((run_folder / _FOLDER).glob("epoch-*-step-*"), reverse=True)
    current = [folder for folder in mid_epoch if folder.name.startswith(f"epoch-{epoch:06d}")]
    needed = {*current[:keep], checkpoint_path(run_folder, epoch, resume_step)}
    for folder in mid_epoch:
        if folder not in needed:
            remove_checkpoint(folder)


def remove_old_checkpoints(run_folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of epoch starts."""
    starts = [folder for folder in (run_folder / _FOLDER).glob("epoch-*") if "-step-" not in folder.name]
    for folder in sorted(starts, reverse=True)[keep:]:
        remove_checkpoint(folder)


def forget_ray_records(run_folder: Path) -> None:
    """Delete Ray Train's own list of checkpoints: if a kill left it out of date, Ray refuses to start."""
    (run_folder / _FOLDER / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """Return the first mismatch between a checkpoint's files and its manifest, or None."""
    try:
        sums = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return "it is incomplete"
    except (OSError, ValueError) as error:
        return f"{_MANIFEST}: {error}"
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name} was altered"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
