"""The run folder at the start of a run: created, or checked to be this run's, and held while the run lasts."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import copy_checkpoint, damage, newest_checkpoint, read_position
from rayprune.engine.storage.run_folder import (
    append_metrics,
    mend_metrics,
    read_config,
    read_metrics,
    write_environment,
)
from rayprune.errors import RunFolderError
from rayprune.sources import SampleSource
from rayprune.sources.base import shuffle_name

_FREE = {"scaling", "run", "compare", "sweep"}  # sections that do not decide a run's result
SCORING = "collect"  # the folder, inside a run's, of the run that scored its samples


def run_folder_of(config: Config) -> Path:
    """Return the folder that a config's run writes to.

    Raises:
        ValueError: it has no name.
    """
    if config.run.name is None:
        raise RunFolderError("run.name is not set: name the run's folder")
    return config.run.storage_folder() / config.run.name


def check_folder(config: Config) -> None:
    """Refuse a folder that holds another run, or one that `run.resume=never` must not touch.

    Raises:
        ValueError: it does; nothing was touched.
    """
    folder = run_folder_of(config)
    stored = folder / "config.yaml"
    if stored.exists():
        if config.run.resume == "never":
            raise RunFolderError(
                f"{folder} holds a run already: choose another run.name, or run.resume=auto to go on with it"
            )
        _check_same(config, read_config(stored), folder)


def check_start(config: Config, source: SampleSource) -> Path | None:
    """Refuse what `open_folder` would refuse, before a scoring run begins; return the folder of a finished run.

    Raises:
        ValueError: the folder is another run's, or `run.resume` names nothing to go on from.
    """
    folder = run_folder_of(config)
    position = _sound_position(folder, config, source)
    if position is None and config.run.resume not in {"auto", "never"}:
        _sound_origin(Path(config.run.resume).expanduser().resolve(), config, source)
    done = position is not None and position["epoch"] >= config.last_epoch
    return folder if done and (folder / "scores.parquet").exists() else None


def adopt_scoring(config: Config) -> None:
    """Copy the scoring run of the run that `run.resume` names, where this run has none: its scores are paid for."""
    own = run_folder_of(config) / SCORING
    if config.run.resume in {"auto", "never"} or own.exists():
        return
    named = Path(config.run.resume).expanduser().resolve()
    for run in (named, *named.parents[1:2]):
        if (run / SCORING / "config.yaml").exists():
            partial = own.with_name(f"{SCORING}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(run / SCORING, partial)
            partial.replace(own)
            return


@contextlib.contextmanager
def open_folder(config: Config, source: SampleSource, **facts: Any) -> Iterator[tuple[Path, int]]:
    """Create the run folder, or check that the one that is there is this run's, and hold it while the block runs.

    Args:
        config, source: what runs, on which data.
        **facts: what else environment.json says.

    Yields:
        The folder, and where its newest sound checkpoint stands: 0 without one, E when the run is finished.

    Raises:
        ValueError: the folder is another run's, in use by another process, or can't be written; nothing was touched.
    """
    check_folder(config)
    folder = run_folder_of(config)
    stored = folder / "config.yaml"
    origin = None
    if config.run.resume not in {"auto", "never"} and newest_checkpoint(folder) is None:
        origin = _sound_origin(Path(config.run.resume).expanduser().resolve(), config, source)
    _sound_position(folder, config, source)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_folder(folder))
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "metrics.jsonl").open("a").close()
            partial = stored.with_suffix(".partial")  # a full disk or a kill must not leave half a config behind
            partial.write_text(config.to_yaml())
            partial.replace(stored)
            if origin is not None:
                _adopt(folder, origin)
            position = _sound_position(folder, config, source)
            if position is not None:
                mend_metrics(folder, position["metrics"])
            write_environment(folder, seed=config.train.seed, fingerprint=source.fingerprint, **facts)
        except OSError as error:
            what = f"{error.filename or folder}: {error.strerror}"
            raise RunFolderError(f"run folder {folder} can't be written ({what}): set run.storage_path") from None
        yield folder, position["epoch"] if position is not None else 0


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets it go when the process ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is training in {folder}: wait for it, or choose another run.name"
            ) from None
        yield


def _sound_origin(path: Path, config: Config, source: SampleSource) -> Path:
    """Return the checkpoint that `run.resume=PATH` means: the folder itself, or the newest of a run folder.

    Raises:
        ValueError: there is none, it is damaged, or it is of another configuration or data set.
    """
    is_checkpoint = (path / "position.json").exists()
    damaged = damage(path) if is_checkpoint else None
    origin = path if is_checkpoint and damaged is None else newest_checkpoint(path)
    if origin is None or damaged is not None:
        reason = f"is damaged ({damaged})" if damaged else "holds no sound checkpoint"
        raise RunFolderError(f"run.resume {path} {reason}: name a run folder or one of its checkpoints/epoch-… folders")
    position = read_position(origin)
    run_config = origin.parents[1] / "config.yaml"
    if position["digest"] != config.digest() and run_config.exists():
        _check_same(config, read_config(run_config), origin.parents[1])
    for name, own in (("digest", config.digest()), ("fingerprint", source.fingerprint)):
        if position[name] != own:
            raise RunFolderError(f"run.resume {origin} is of another run: {name} {position[name]}, here {own}")
    _check_shuffle(origin, position, source)
    return origin


def _adopt(folder: Path, origin: Path) -> None:
    """Copy a checkpoint, and the metrics of the epochs before it, into a run folder of its own."""
    position = read_position(copy_checkpoint(origin, folder))
    for record in read_metrics(origin.parents[1]):
        if record["epoch"] < position["epoch"]:
            append_metrics(folder, record)


def _check_same(config: Config, stored: Config, folder: Path) -> None:
    if config.digest() == stored.digest():
        return
    new, old = (_flat(c.model_dump(mode="json", exclude=_FREE)) for c in (config, stored))
    changed = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]
    raise RunFolderError(f"{folder} holds another run ({'; '.join(changed)}): choose another run.name")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _sound_position(folder: Path, config: Config, source: SampleSource) -> dict[str, Any] | None:
    """Return the newest sound checkpoint's position, None without one; refuse another run's."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    position = read_position(newest)
    fingerprint = source.fingerprint
    if position["fingerprint"] != fingerprint:
        raise RunFolderError(
            f"{folder} was trained on other data (fingerprint {position['fingerprint'][:12]}, "
            f"here {fingerprint[:12]}): choose another run.name"
        )
    if position["digest"] != config.digest():
        raise RunFolderError(
            f"{folder} holds another run (its checkpoints are of config {position['digest']}, this is "
            f"{config.digest()}): choose another run.name"
        )
    _check_shuffle(newest, position, source)
    return position


def _check_shuffle(checkpoint: Path, position: Mapping[str, Any], source: SampleSource) -> None:
    """Refuse to go on in another order: inside an epoch, samples would be visited twice and others never."""
    before, now = position.get("shuffle", ""), shuffle_name(source)  # older versions shuffled uniformly
    if before != now:
        ways = ["in windows of row groups" if name else "uniformly" for name in (before, now)]
        cure = "set data.cache=none" if before and not now else "set data.cache=disk" if now and not before else ""
        raise RunFolderError(
            f"checkpoint {checkpoint} is of a run shuffled {ways[0]}, this one would be {ways[1]}"
            + (f": {cure}" if cure else ", of other groups: choose another run.name")
        )
