"""The decoded cache: arrays that are built once, then memory-mapped by every process.

An entry is the folder `<cache>/<kind>-<fingerprint>/` with one .npy file per array and a manifest of their sizes. It is
built in a temporary folder next to it, which is then renamed, so no process ever sees half an entry. If several
processes build one at once, the first rename wins and the others discard theirs. An entry whose files do not match its
manifest is built again. A temporary folder is locked by its builder, so that the next start removes those of killed
ones.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import DescribedSource, SampleSource, check_ids
from rayprune.sources.datasets.columns import empty_column, options_of_a_call
from rayprune.sources.memory import RowSource, rows_of
from rayprune.sources.views import Subset

logger = logging.getLogger(__name__)

CacheMode = Literal["auto", "memory", "disk", "none"]
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
CHUNK_BYTES = 1 << 26
# With `auto` the cache never takes more than this share of the free space.
_SHARE_OF_FREE = 0.5
LOCK = "builder.lock"  # in a temporary folder; names the builder's host
# No build goes this long without writing, if it is on another host or its file system has no locks.
ABANDONED_S = 24 * 3600
_TEMPORARY = re.compile(r"\.[a-z][a-z0-9_-]*-[0-9a-f]{32}-[a-z0-9_]{8}")  # `.<kind>-<fingerprint>-`, mkdtemp's end


def decoded(source: SampleSource, mode: str = "auto", cache_dir: str | None = None) -> SampleSource:
    """Return a source of the same samples that decodes each row once.

    Args:
        source: samples whose `take` decodes.
        mode: `disk` keeps the rows in the decoded cache, `memory` keeps a copy in each process that reads, `none`
            decodes at every visit. `auto` is `disk` if decoding is expensive. It is `none` for rows of which the disk
            has not twice the room, unless they are then read in groups and shuffled in another order: the plans of a
            run must not depend on the free space.
        cache_dir: see `cache_root`.

    Raises:
        ConfigError: an unknown mode, or `disk` for rows that are not numbers of one shape.
        DataError: `auto`, and the disk has too little room for rows in groups; or, at the first use, the cache can't be
            written.
    """
    check_mode(mode)
    uneven = [name for name, column in source.schema.columns.items() if column.in_objects]
    if uneven and mode == "disk":
        raise ConfigError(
            f"data.cache is 'disk', and column {uneven[0]!r} has rows of several shapes or Python objects: set it to "
            "memory or none"
        )
    if mode == "none" or (mode == "auto" and (source.row_cost == "cheap" or uneven)):
        return source
    if mode == "memory":
        return _kept(source, partial(_decode_all, source, None))
    num_bytes = len(source) * source.schema.row_bytes
    root, key = cache_root(cache_dir), f"decoded-{source.fingerprint}"
    if mode == "auto" and not has_room(source, num_bytes, root / key):
        return source
    open_arrays = partial(cached_arrays, key, root, partial(_decode_all, source), num_bytes)
    return _kept(source, open_arrays)


def has_room(source: SampleSource, num_bytes: int, entry: Path) -> bool:
    """Return whether data.cache=auto may keep the rows of a source in an entry; warn if not.

    Raises:
        DataError: it may not, and without the cache the rows would be shuffled in another order.
    """
    root = entry.parent
    _remove_abandoned(root)
    if is_complete(entry) or num_bytes <= _SHARE_OF_FREE * _free_bytes(root):
        return True
    problem = f"decoded, the samples take {num_bytes / 1e9:.1f} GB, more than half of the free space at {root}"
    if source.groups is not None:
        raise DataError(
            f"{problem}: free some space, set data.cache_dir or RAYPRUNE_CACHE to a larger disk, or set "
            "data.cache=none to decode them at every visit, in another order"
        )
    logger.warning(
        "%s: they are decoded at every visit; set data.cache=disk, or data.cache_dir to a larger disk", problem
    )
    return False


def _kept(source: SampleSource, open_arrays: Callable[[], dict[str, np.ndarray]]) -> SampleSource:
    if source.schema.num_classes is None:
        return KeptColumns(source, open_arrays)
    return RowSource(open_arrays, source.schema, source.fingerprint, source.labels, source.file_of)


class KeptColumns(RowSource):
    """Decoded rows of a source that keeps its own columns.

    Args:
        source: the samples.
        open_arrays: see RowSource.
    """

    def __init__(self, source: SampleSource, open_arrays: Callable[[], dict[str, np.ndarray]]) -> None:
        DescribedSource.__init__(self, len(source), source.schema, source.fingerprint)
        self._source, self._open_arrays, self._arrays = source, open_arrays, None

    def _read_labels(self) -> np.ndarray:
        return self._source.labels

    def arrays(self) -> Mapping[str, np.ndarray]:
        with options_of_a_call():
            return super().arrays()

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        return {name: np.ascontiguousarray(rows_of(values, ids)) for name, values in self.arrays().items()}


def check_mode(mode: str) -> None:
    """Check the value of `data.cache`.

    Raises:
        ConfigError: the mode is unknown; names the closest one.
    """
    if mode not in get_args(CacheMode):
        raise ConfigError(f"data.cache = {mode!r}: {closest(mode, get_args(CacheMode))}")


def leave_out_unreadable(source: SampleSource, readable: np.ndarray, name: Callable[[int], str]) -> SampleSource:
    """Return the samples of a source that can be read; warn of the others.

    Args:
        source: any source.
        readable: (N,) bool.
        name: maps an id to the sample's name in messages.
    """
    if readable.all():
        return source
    bad = np.flatnonzero(~readable)
    names = ", ".join(name(int(sample)) for sample in bad[:5])
    logger.warning("left out %d of %d samples that can't be read, first: %s", len(bad), len(readable), names)
    return Subset(source, np.flatnonzero(readable))


def cache_root(cache_dir: str | Path | None) -> Path:
    """Return the absolute cache folder: cache_dir, else $RAYPRUNE_CACHE, else ~/.cache/rayprune."""
    return Path(cache_dir or os.environ.get("RAYPRUNE_CACHE") or "~/.cache/rayprune").expanduser().absolute()


def cached_arrays(
    key: str, cache_dir: str | Path | None, build: Callable[[Path], object], num_bytes: int
) -> dict[str, np.ndarray]:
    """Memory-map the arrays of a cache entry; build it first if it is missing or damaged.

    Args:
        key: `<kind>-<fingerprint>`, the entry's folder; it must change with everything that `build` depends on.
        cache_dir: see `cache_root`.
        build: writes .npy files into the folder that is passed to it.
        num_bytes: the size of these files, checked against the free space.

    Returns:
        Read-only arrays by file stem.

    Raises:
        DataError: the folder can't be written, or the disk is too full.
    """
    folder = cache_root(cache_dir) / key
    # Another process that replaces a damaged entry may move this one away before it is mapped: try again.
    while (arrays := _load(folder)) is None:
        _build_entry(folder, build, num_bytes)
    return arrays


def new_array(folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    """Create `<name>.npy` in a folder, for writing piece by piece, and reserve its disk space.

    Raises:
        DataError: the disk is full.
    """
    file = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A full disk is an error here; later, through the memory map, it would kill the process by SIGBUS.
        try:
            with file.open("r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
        except OSError as error:
            raise _unwritable(folder.parent, error) from error
    return array


def is_complete(folder: Path) -> bool:
    """Return whether an entry exists and its files match its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest["version"] == MANIFEST_VERSION and manifest["files"] == _file_sizes(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _decode_all(source: SampleSource, folder: Path | None) -> dict[str, np.ndarray]:
    """Decode all rows into .npy files of a folder, or into memory."""
    arrays: dict[str, np.ndarray] = {}
    for name, column in source.schema.columns.items():
        if folder is None:
            arrays[name] = empty_column(column, len(source))
        else:
            arrays[name] = new_array(folder, name, column.dtype, (len(source), *column.shape))
    num_rows = max(1, CHUNK_BYTES // max(1, source.schema.row_bytes))
    for start in range(0, len(source), num_rows):
        stop = min(start + num_rows, len(source))
        for name, values in source.take(np.arange(start, stop, dtype=np.int64)).items():
            arrays[name][start:stop] = values
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    return arrays


def _free_bytes(root: Path) -> int:
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def _load(folder: Path) -> dict[str, np.ndarray] | None:
    if not is_complete(folder):
        return None
    try:
        return {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in sorted(folder.glob("*.npy"))}
    except FileNotFoundError:
        return None


def _file_sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.npy"))}


def _build_entry(folder: Path, build: Callable[[Path], object], num_bytes: int) -> None:
    temporary = _new_temporary(folder, num_bytes)
    started = time.perf_counter()
    try:
        with _locked(temporary):
            build(temporary)
            manifest = {"version": MANIFEST_VERSION, "files": _file_sizes(temporary)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            (temporary / LOCK).unlink(missing_ok=True)
            _publish(temporary, folder)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise _unwritable(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("built cache entry %s (%.1f MB) in %.1f s", folder, num_bytes / 1e6, time.perf_counter() - started)


@contextlib.contextmanager
def _locked(temporary: Path) -> Iterator[None]:
    """Hold a lock in a folder, which the operating system releases however the process ends."""
    with (temporary / f"{LOCK}.new").open("w") as lock:
        lock.write(socket.gethostname())
        lock.flush()
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            (temporary / f"{LOCK}.new").rename(temporary / LOCK)  # nobody sees it unlocked
        yield


def _new_temporary(folder: Path, num_bytes: int) -> Path:
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        free_bytes = shutil.disk_usage(root).free
        if num_bytes > free_bytes:
            raise DataError(
                f"cache folder {root} has {free_bytes / 1e9:.2f} GB free and {num_bytes / 1e9:.2f} GB are needed: "
                "free some space, set data.cache_dir or RAYPRUNE_CACHE to a larger disk, or set data.cache=none"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        temporary.chmod(0o755)  # mkdtemp's 0700 would shut other users out of a shared cache
    except OSError as error:
        raise _unwritable(root, error) from error
    return temporary


def _unwritable(root: Path, error: OSError) -> DataError:
    return DataError(
        f"cache folder {root} can't be written ({error.strerror or error}): "
        "set data.cache_dir or RAYPRUNE_CACHE to another folder"
    )


def _publish(temporary: Path, folder: Path) -> None:
    if folder.exists() and not is_complete(folder):
        # Move it away in one step: another process may be about to rename a good entry into this place.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder.rename(temporary / "damaged"))
    try:
        temporary.rename(folder)
    except OSError as error:
        # ENOTEMPTY or EEXIST: another process was first; the caller checks whether its entry is complete.
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise _unwritable(folder.parent, error) from error
        logger.info("another process built cache entry %s at the same time: its copy is used", folder)


def _remove_abandoned(root: Path) -> None:
    """Remove the temporary folders of killed processes."""
    for folder in root.glob(".*-*"):
        # The user's own hidden folders may lie in the cache folder too.
        is_ours = _TEMPORARY.fullmatch(folder.name) or (folder / LOCK).exists()
        if is_ours and _is_abandoned(folder):
            logger.info("removing %s, which a killed process has left", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        with (folder / LOCK).open() as lock:
            if lock.read() == socket.gethostname():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
    except BlockingIOError:
        return False
    except OSError:  # no lock, or a file system without locks
        pass
    try:
        return time.time() - max(entry.stat().st_mtime for entry in [folder, *folder.glob("*")]) > ABANDONED_S
    except FileNotFoundError:  # its builder has just renamed it
        return False
