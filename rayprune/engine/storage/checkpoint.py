"""Checkpoints: one folder with all that a resume needs; its manifest of checksums is written last.

    <run>/checkpoints/epoch-000003/                  the state before epoch 3
    <run>/checkpoints/epoch-000003-step-00000120/    the state before step 120 of epoch 3
        model.pt       the network's state_dict
        trainer.pt     the state_dicts of the optimizer and the train step
        selector.npz   the score table and the selection of epoch 3 (rayprune.core.selector)
        position.json  epoch, step, counts, the last metrics line, and the run's identity (config digest, fingerprint)
        manifest.json  name → SHA-256; without it, a folder is incomplete

Nothing is renamed, so this also works on object stores, mounted or by their own interface. Nothing needs
pickle to load: torch loads with weights_only, NumPy without allow_pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayprune.engine.storage.costs import PriorCost
from rayprune.errors import RaypruneError, RunFolderError, one_line
from rayprune.paths import ObjectPath, copy_tree, remove_tree

if TYPE_CHECKING:  # the ScoreActor loads states without torch, which would cost it 0.4 GB and a second
    import torch

    from rayprune.core.selector import Selector
    from rayprune.core.table import ScoreTable

logger = logging.getLogger(__name__)

SCHEMA = 1
_FOLDER, _MANIFEST, _POSITION = "checkpoints", "manifest.json", "position.json"
_FILES = ("model.pt", "trainer.pt", "selector.npz", _POSITION)
_WRITTEN = "written.json"  # on an object store, the names of the newest complete checkpoints
_NUM_LISTED = 8
_NAME = re.compile(r"epoch-\d{6}(-step-\d{8})?")
_UNSAFE = "a file holds Python objects other than tensors and numbers, which would run code"


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
        for name, state in (("model.pt", model), ("trainer.pt", trainer)):
            with (folder / name).open("wb") as stream:
                torch.save(dict(state), stream)
        with (folder / "selector.npz").open("wb") as stream:
            np.savez(stream, **dict[str, Any](selector))
        (folder / _POSITION).write_text(json.dumps({"schema": SCHEMA, "epoch": epoch, "step": step, **position}))
        # Read again, as a write to an object store may have gone wrong.
        sums = {name: _sha256(folder / name) for name in _FILES}
        (folder / _MANIFEST).write_text(json.dumps(sums, indent=1))
        _list_as_written(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        remove_checkpoint(folder)
        raise OSError(f"checkpoint {folder} could not be written: {error}") from error
    return folder


def copy_checkpoint(origin: Path, run_folder: Path) -> Path:
    """Copy an intact checkpoint into another run folder, its manifest last."""
    position = read_position(origin)
    folder = checkpoint_path(run_folder, position["epoch"], position["step"])
    remove_checkpoint(folder)
    copy_tree(origin, folder, last=_MANIFEST)
    _list_as_written(folder)
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if it exists; its manifest goes first, so that no remainder looks complete."""
    with contextlib.suppress(OSError):
        (folder / _MANIFEST).unlink(missing_ok=True)
    remove_tree(folder)


def set_aside(folder: Path) -> None:
    """Make a checkpoint count as incomplete: its files stay until the run writes them again."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest checkpoint that is not damaged, or None; log the others."""
    return next(_undamaged(run_folder), None)


def usable_checkpoint(
    run_folder: Path, check: Callable[[Path], None], on_refused: Callable[[Path], None] | None = None
) -> Path | None:
    """Return the newest checkpoint that is not damaged and that `check` accepts, or None if all are damaged.

    Checksums tell what has changed since a checkpoint was written, but not whether it was right then.

    Args:
        run_folder: the run's folder.
        check: raises a RunFolderError for a checkpoint that can't be applied.
        on_refused: called with each checkpoint that `check` has refused, once it has accepted an older one.

    Raises:
        RunFolderError: `check` refuses all of them; then the network or the settings differ, not the files.
    """
    refused: dict[Path, RunFolderError] = {}
    for folder in _undamaged(run_folder):
        try:
            check(folder)
        except RunFolderError as error:
            refused[folder] = error
            continue
        for skipped, reason in refused.items():
            logger.warning("checkpoint %s can't be used (%s): trying the one before it", skipped, reason)
            if on_refused is not None:
                on_refused(skipped)
        return folder
    if refused:
        raise next(iter(refused.values()))
    return None


def _list_as_written(folder: Path) -> None:
    """Note a checkpoint on an object store, whose listings may not have it for a while."""
    if isinstance(folder, ObjectPath):
        names = [folder.name, *(other.name for other in _listed_as_written(folder.parent))]
        (folder.parent / _WRITTEN).write_text(json.dumps(list(dict.fromkeys(names))[:_NUM_LISTED]))


def _listed_as_written(checkpoints: Path) -> list[Path]:
    if not isinstance(checkpoints, ObjectPath):
        return []
    try:
        names = json.loads((checkpoints / _WRITTEN).read_text())
        return [checkpoints / name for name in names if _NAME.fullmatch(name) and is_written(checkpoints / name)]
    except (OSError, ValueError, TypeError):
        return []


def _undamaged(run_folder: Path) -> Iterator[Path]:
    checkpoints = run_folder / _FOLDER
    found = {*checkpoints.glob("epoch-*"), *_listed_as_written(checkpoints)}
    for folder in sorted(found, reverse=True):
        problem = damage(folder)
        if problem is None:
            yield folder
        else:
            logger.warning("checkpoint %s can't be used (%s): trying the one before it", folder, problem)


def read_position(folder: Path) -> dict[str, Any]:
    """Return position.json.

    Raises:
        RunFolderError: it is damaged, or a newer version of rayprune wrote it.
    """
    position, problem = _stored_position(folder)
    if problem is not None:
        raise RunFolderError(f"checkpoint {folder} is damaged ({problem}): restore it or delete it")
    if position["schema"] > SCHEMA:
        raise RunFolderError(
            f"checkpoint {folder} has schema {position['schema']}, this version reads {SCHEMA}: upgrade rayprune"
        )
    return position


def _stored_position(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return position.json, and what is wrong with it; a newer version's is not damaged."""
    try:
        position = dict(json.loads((folder / _POSITION).read_text()))
        if not _is_count(position.get("schema")):
            return {}, f"{_POSITION}: schema is not a count"
        problem = None if position["schema"] > SCHEMA else _wrong_entry(position, folder)
    except (ValueError, TypeError, RecursionError) as error:
        return {}, f"{_POSITION}: {one_line(error)}"
    return position, problem and f"{_POSITION}: {problem}"


def _wrong_entry(position: Mapping[str, Any], folder: Path) -> str | None:
    """Return what is wrong with the content of position.json, or None."""
    for name, (kind, fits) in _ENTRIES.items():
        if name not in position:
            return f"{name} is missing"
        if not fits(position[name]):
            return f"{name} is not {kind}"
    if folder.name.startswith("epoch-") and folder != checkpoint_path(
        folder.parents[1], position["epoch"], position["step"]
    ):
        return f"epoch {position['epoch']}, step {position['step']} is not the folder's"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# position.json: name → what it must hold.
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": ("a count", _is_count),
    "step": ("a count", _is_count),
    "digest": ("text", _is_text),
    "fingerprint": ("text", _is_text),
    "shuffle": ("text", _is_text),
    "wall_time": ("a number", _is_number),
    "counts": (
        "counts of a run",
        lambda counts: isinstance(counts, dict) and all(_is_count(counts.get(name)) for name in PriorCost().counts),
    ),
    "metrics": (
        "a line of metrics",
        lambda line: line is None or (isinstance(line, dict) and _is_count(line.get("epoch"))),
    ),
    "sums": ("a list of numbers", lambda sums: isinstance(sums, list) and all(map(_is_number, sums))),
}


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
        RunFolderError: the file can't be read.
    """
    folder = checkpoint_path(run_folder, epoch, step)
    with refusing(folder), _open_selector(folder) as stored:
        return {name: stored[name] for name in stored.files}


@contextlib.contextmanager
def _open_selector(folder: Path) -> Iterator[Any]:
    with (folder / "selector.npz").open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        yield stored


def restore_selector(selector: Selector, folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Load a checkpoint's state into a Selector.

    Args:
        selector: to load into.
        folder: the checkpoint.
        leave_out: arrays of the table that the Selector does not hold.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        RunFolderError: the file can't be read, or is not of this run; names the checkpoint.
    """
    with refusing(folder), _open_selector(folder) as stored:
        names = [name for name in stored.files if name.removeprefix("table/") not in leave_out]
        selector.load_state_dict({name: stored[name] for name in names})


def restore_rows(table: ScoreTable, folder: Path) -> None:
    """Load the rows of a table that holds a part of the samples.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        RunFolderError: the file can't be read, or is not of this run; names the checkpoint.
    """
    rows = slice(table.rows.start, table.rows.stop)
    with refusing(folder), _open_selector(folder) as stored:
        table.load_arrays({name: np.array(stored[f"table/{name}"][rows]) for name in table.to_arrays()})


class _Refused(RunFolderError):
    """An error that names its checkpoint already."""


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn any error that a checkpoint's content causes while the block applies it into one that names the checkpoint.

    Raises:
        RunFolderError: the block failed, other than by an error of the operating system.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = one_line(error)
        reason = (
            text
            if isinstance(error, RaypruneError) or type(error).__name__ in text
            else f"{type(error).__name__}: {text}"
        )
        reason = _UNSAFE if "weights_only" in text else reason[:200]
        raise _Refused(
            f"checkpoint {folder} can't be applied ({reason}): restore the code and the settings that wrote it, or "
            "delete it to continue from the one before it"
        ) from error


def load_tensors(file: Path, device: torch.device) -> dict[str, Any]:
    """Load a file of tensors, plain numbers and containers.

    Raises:
        RunFolderError: it holds anything else, or is damaged.
    """
    import torch

    with refusing(file.parent), file.open("rb") as stream:
        loaded = torch.load(stream, map_location=device, weights_only=True)
        if not isinstance(loaded, dict):
            raise RunFolderError(f"{file.name} holds no dictionary")
    return dict(loaded)


def load_weights(folder: Path, network: torch.nn.Module, device: torch.device) -> None:
    """Load a checkpoint's weights into a network on a device.

    Raises:
        RunFolderError: they don't fit it, or can't be read; the network may have been changed in part.
    """
    with refusing(folder):
        network.load_state_dict(load_tensors(folder / "model.pt", device))


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
    """Return what is wrong with a checkpoint, or None: files missing or altered since it was written, or its position.

    Does not open the states, which needs torch and the run's network.
    """
    try:
        sums = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return "it is incomplete"
    except (OSError, ValueError, RecursionError) as error:
        return f"{_MANIFEST}: {error}"
    if not isinstance(sums, dict) or not sums.keys() >= set(_FILES):
        return f"{_MANIFEST} does not list {', '.join(_FILES)}"
    for name, expected in sums.items():
        file = folder / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name} was altered"
    return _stored_position(folder)[1]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
