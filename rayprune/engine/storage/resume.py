"""The run folder at the start of a run: created, or checked to belong to this run, and locked while the run lasts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayprune.config import Config
from rayprune.config.code import file_digests
from rayprune.config.yaml import flatten
from rayprune.engine.storage.checkpoint import (
    copy_checkpoint,
    damage,
    newest_checkpoint,
    read_position,
    set_aside,
    usable_checkpoint,
)
from rayprune.engine.storage.lock import lock_folder
from rayprune.engine.storage.run_folder import (
    append_metrics,
    mend_metrics,
    read_metrics,
    start_metrics,
    write_environment,
    write_whole,
)
from rayprune.engine.storage.stored_config import read_like, read_tree
from rayprune.errors import ConfigError, RunFolderError, one_line
from rayprune.paths import as_path, copy_tree
from rayprune.sources import SampleSource
from rayprune.sources.base import shuffle_name

_FREE = {"scaling", "run", "compare", "sweep", "audit"}  # sections that do not affect a run's result
SCORING = "collect"  # the folder, inside a run's, of the first run that scored its samples


def run_folder_of(config: Config) -> Path:
    """Return the folder that a config's run writes to.

    Raises:
        ConfigError: the run has no name.
    """
    if config.run.name is None:
        raise ConfigError("run.name is not set: name the run's folder, run.name=NAME")
    return config.run.storage_folder() / config.run.name


def check_folder(config: Config) -> None:
    """Refuse a folder that holds another run, or any run if `run.resume=never`; touch nothing.

    Raises:
        RunFolderError: the folder is refused.
    """
    folder = run_folder_of(config)
    if (folder / "config.yaml").exists():
        if config.run.resume == "never":
            raise RunFolderError(
                f"{folder} holds a run already: choose another run.name, or run.resume=auto to continue it"
            )
        _check_config(config, folder)


def finished_folder(config: Config, source: SampleSource) -> Path | None:
    """Return the run's folder if the run is finished, otherwise None; refuse what `open_folder` would refuse.

    Raises:
        RunFolderError: the folder holds another run, or there is nothing to resume at `run.resume`.
    """
    folder, start = run_folder_of(config), _find_start(config, source)
    return folder if start is not None and start.parents[1] == folder and _is_finished(config, start) else None


def finished_unread(config: Config) -> Path | None:
    """Return the run's folder if a run with these settings is finished, without reading its data; None if unsure.

    None does not mean that the run is unfinished. It may also be refused, or its data or subset may have changed.
    """
    folder = run_folder_of(config)
    reads_a_file = config.method["name"] == "fixed" or config.data.relabel is not None
    if config.run.resume == "never" or reads_a_file or not (folder / "config.yaml").exists():
        return None
    stored = read_like(folder / "config.yaml", config)
    if stored is None or stored.digest() != config.digest() or stored.shown()["data"] != config.shown()["data"]:
        return None
    start = newest_checkpoint(folder)
    if start is None or not _is_finished(config, start):
        return None
    return None if _is_newer(config.data.model_dump().get("path"), folder / "scores.parquet") else folder


def _is_newer(path: Any, results: Path) -> bool:
    """Return whether a file, or a folder, an entry of it or a folder two levels below, is newer than the results."""
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return False
    data = Path(path).expanduser()
    # The time of a class folder, `<path>/train/<class>`, shows that an image was moved; a pattern with a slash at its
    # end finds folders alone, as a million images would take seconds.
    entries = [data, *data.glob("*"), *data.glob("*/*/")]
    return max(entry.stat().st_mtime for entry in entries) > results.stat().st_mtime


def _is_finished(config: Config, newest: Path) -> bool:
    """Return whether a run has trained all epochs and written all its results."""
    folder = newest.parents[1]
    if read_position(newest)["epoch"] < config.last_epoch or not (folder / "metrics.jsonl").exists():
        return False
    metrics = read_metrics(folder)  # a kill may have come before the last line
    written = all((folder / name).exists() for name in ("scores.parquet", "gallery"))
    return written and bool(metrics) and bool(metrics[-1]["epoch"] + 1 >= config.last_epoch)


def where_stopped(config: Config, folder: Path, epoch: int, step: int) -> str:
    """Return the line on a run that Ctrl-C has stopped."""
    run = " of the scoring run" if is_scoring_run(folder) else ""
    if epoch >= config.last_epoch:
        return f"stopped after the last epoch{run}: the same command continues from there"
    if (epoch, step) == (0, 0):
        return f"stopped before the first step{run}: the same command starts again"
    return f"stopped at epoch {epoch + 1}, step {step}{run}: the same command continues from there"


def adopt_scoring(config: Config) -> None:
    """Copy the scoring runs of the run that `run.resume` names, unless this run has them: their scores are paid for."""
    own, path = run_folder_of(config), _resume_path(config)
    if path is None or is_scoring_run(own / SCORING):
        return
    for run in (path, *path.parents[1:2]):  # a run folder, or one of its checkpoints
        found = [folder for folder in run.glob(f"{SCORING}*") if is_scoring_run(folder)]
        for folder in sorted(found, reverse=True):  # the first one last: it says that all are there
            copy_tree(folder, own / folder.name, last="config.yaml")
        if found:
            return


def is_scoring_run(folder: Path) -> bool:
    """Return whether a folder, inside a run's, is that of a scoring run: `collect`, `collect_2`, …"""
    return re.fullmatch(rf"{SCORING}(_\d+)?", folder.name) is not None and (folder / "config.yaml").exists()


@contextlib.contextmanager
def open_folder(
    config: Config,
    source: SampleSource,
    check: Callable[[Path], None] | None = None,
    *,
    on_lost: Callable[[], None],
    **facts: Any,
) -> Iterator[tuple[Path, int]]:
    """Create the run folder, or check that it belongs to this run, and lock it while the block runs.

    Args:
        config, source: the run and its training data.
        check: raises a RunFolderError for a checkpoint that can't be applied; those that it refuses are set aside if it
            accepts an older one.
        on_lost: as for `lock_folder`.
        **facts: more fields for environment.json.

    Yields:
        The folder, and the epoch of its newest intact checkpoint: 0 without one, E when the run is finished.

    Raises:
        RunFolderError: the folder holds another run, is in use by another process, or can't be written, or `check`
            refuses all its checkpoints. Nothing was touched.
    """
    check_folder(config)
    _find_start(config, source)
    folder = run_folder_of(config)
    epoch = 0
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(folder, on_lost))
            (folder / "checkpoints").mkdir(exist_ok=True)
            start_metrics(folder)
            write_whole(folder / "config.yaml", config.to_yaml(), private=True)
            start = _find_start(config, source)
            if start is not None and check is not None:
                start = _applicable(start, folder, check)
            if start is not None:
                if start.parents[1] != folder:
                    start = _adopt(folder, start)
                position = read_position(start)
                epoch = position["epoch"]
                mend_metrics(folder, position["metrics"])
            code = file_digests(config.model_dump(mode="json"))
            write_environment(folder, seed=config.train.seed, fingerprint=source.fingerprint, code=code, **facts)
        except OSError as error:
            inside = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
            reason = f"{inside}{error.strerror or one_line(error)}"
            raise RunFolderError(f"run folder {folder} can't be written ({reason}): set run.storage_path") from None
        yield folder, epoch


def _find_start(config: Config, source: SampleSource) -> Path | None:
    """Return the checkpoint to start from: the newest of the run folder, or that of `run.resume`, or None.

    Raises:
        RunFolderError: `run.resume` names no intact checkpoint, or the checkpoint is of another run.
    """
    checkpoint, path = newest_checkpoint(run_folder_of(config)), _resume_path(config)
    if checkpoint is None and path is not None:
        checkpoint = _named_checkpoint(path)
    if checkpoint is not None:
        _check_checkpoint(config, source, checkpoint)
    return checkpoint


def _applicable(start: Path, folder: Path, check: Callable[[Path], None]) -> Path | None:
    """Return a checkpoint, or the first one before it that `check` accepts."""
    if start.parents[1] == folder:
        return usable_checkpoint(folder, check, on_refused=set_aside)
    check(start)  # of another run's folder, in which nothing is touched
    return start


def _resume_path(config: Config) -> Path | None:
    """Return the path that `run.resume` names, or None for its keywords."""
    return None if config.run.resume in {"auto", "never"} else as_path(config.run.resume).resolve()


def _named_checkpoint(path: Path) -> Path:
    """Return the checkpoint at a path: the folder itself, or the newest of a run folder."""
    is_checkpoint = (path / "position.json").exists()
    problem = damage(path) if is_checkpoint else None
    checkpoint = path if is_checkpoint else newest_checkpoint(path)
    if checkpoint is None or problem is not None:
        reason = f"is damaged ({problem})" if problem else "holds no intact checkpoint"
        raise RunFolderError(f"run.resume {path} {reason}: name a run folder or one of its checkpoints/epoch-… folders")
    return checkpoint


def _adopt(folder: Path, origin: Path) -> Path:
    """Copy a checkpoint, and the metrics of the epochs before it, into another run's folder."""
    checkpoint = copy_checkpoint(origin, folder)
    epoch = read_position(checkpoint)["epoch"]
    for record in read_metrics(origin.parents[1]):
        if record["epoch"] < epoch:
            append_metrics(folder, record)
    return checkpoint


def _check_config(config: Config, folder: Path) -> None:
    """Refuse a folder of another config, with the keys that differ."""
    stored = read_like(folder / "config.yaml", config)
    if stored is not None and config.digest() == stored.digest():
        return
    tree = read_tree(folder / "config.yaml") if stored is None else stored.shown()
    new, old = (
        flatten({key: value for key, value in each.items() if key not in _FREE}) for each in (config.shown(), tree)
    )
    changes = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]
    raise RunFolderError(f"{folder} holds another run ({'; '.join(changes)}): {_cure(config, folder)}")


def _check_checkpoint(config: Config, source: SampleSource, checkpoint: Path) -> None:
    """Refuse a checkpoint of another config or dataset, or of another order of samples."""
    position, folder = read_position(checkpoint), checkpoint.parents[1]
    if position["digest"] != config.digest():
        if (folder / "config.yaml").exists():
            _check_config(config, folder)
        raise RunFolderError(
            f"{folder} holds another run ({checkpoint.name} is of config {position['digest']}, this is "
            f"{config.digest()}): {_cure(config, folder)}"
        )
    if position["fingerprint"] != source.fingerprint:
        raise RunFolderError(
            f"{folder} was trained on other data (fingerprint {position['fingerprint'][:12]}, "
            f"here {source.fingerprint[:12]}): {_cure(config, folder)}"
        )
    # In another order, the rest of an epoch would visit samples twice and others never.
    before, now = position["shuffle"], shuffle_name(source)
    if before != now:
        orders = ["in windows of row groups" if name else "uniformly" for name in (before, now)]
        cure = "set data.cache=none" if before and not now else "set data.cache=disk" if now and not before else ""
        raise RunFolderError(
            f"checkpoint {checkpoint} is of a run shuffled {orders[0]}, this one would be {orders[1]}"
            + (f": {cure}" if cure else f", of other groups: {_cure(config, folder)}")
        )


def _cure(config: Config, folder: Path) -> str:
    return f"choose another {'run.name' if folder == run_folder_of(config) else 'run.resume'}"
