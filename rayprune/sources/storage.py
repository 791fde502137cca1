"""Files on a local path or on any file system of pyarrow or fsspec: `s3://`, `gs://`, `memory://`, `file://`.

Credentials and endpoints come from the environment, as each file system documents them (for S3: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL).

Shapes: B batch.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rayprune import errors
from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError
from rayprune.paths import open_filesystem

logger = logging.getLogger(__name__)

Shard = TypeVar("Shard")
Item = TypeVar("Item")
Result = TypeVar("Result")

# Remote requests wait for the network rather than for a CPU.
REMOTE_THREADS = 16
# A quarter of the files that the process may have open (ulimit -n), as torch and Ray need some too.
OPEN_FILES = max(4, min(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
# A larger read is cheaper than another request: only headers and a small label separate two images.
LOCAL_GAP_BYTES, REMOTE_GAP_BYTES = 1 << 12, 1 << 14
RANGE_BYTES = 1 << 23
DEFAULT_VALIDATION, OTHER_VALIDATION = "*test*", "*val*"


@dataclass(frozen=True)
class StoredFile:
    """One file below a Storage.

    Attributes:
        name: its path relative to the root (with `/`).
        num_bytes: its size.
        mtime_ns: when it was last written, if the file system records it; says nothing about the content.
    """

    name: str
    num_bytes: int
    mtime_ns: int | None = field(default=None, compare=False)


class Storage:
    """A folder or a single file; pickles into its path, and every process opens it again.

    Args:
        path: a local path (`~` is expanded) or a URI.

    Raises:
        DataError: no file system has the URI's scheme, or it can't be reached.
    """

    def __init__(self, path: str) -> None:
        self.path = path if "://" in path else str(Path(path).expanduser().absolute())

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.path,)

    @property
    def is_local(self) -> bool:
        """Whether plain file calls reach it."""
        return "://" not in self.path or self.path.startswith("file://")

    @cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        try:
            return open_filesystem(self.path)
        except (OSError, ValueError, ImportError) as error:
            raise _unreachable(self.path, error) from None

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system, for calls that take one, such as `pyarrow.parquet.ParquetFile`."""
        return self._resolved[0]

    def full(self, name: str) -> str:
        """Return a file's path within `filesystem`; the empty name is the root itself."""
        root = self._resolved[1]
        return f"{root.rstrip('/')}/{name}" if name else root

    def public(self, name: str = "") -> str:
        """Return the path of a file or folder, by default of the root, for messages."""
        return f"{public(self.path).rstrip('/')}/{name}" if name else public(self.path)

    def is_file(self) -> bool:
        """Return whether the path names a file."""
        return bool(self._get_info(self.full("")).type == pafs.FileType.File)

    def is_folder(self) -> bool:
        """Return whether the path names a folder."""
        return bool(self._get_info(self.full("")).type == pafs.FileType.Directory)

    def file(self) -> StoredFile:
        """Return the file that the path names, with an empty name."""
        info = self._get_info(self.full(""))
        return StoredFile("", info.size or 0, info.mtime_ns)

    def files(self) -> list[StoredFile]:
        """Return all files below a folder, sorted by name (by code points).

        Links are followed, except those that lead back to a folder above them. Broken links to files have 0 bytes.

        Raises:
            DataError: the folder can't be listed.
        """
        root = self.full("").rstrip("/") or "/"
        if self.is_local:
            return sorted(_local_files(root), key=lambda file: file.name)
        infos = self._get_info(pafs.FileSelector(root, recursive=True))
        # Some file systems name their files without the leading slash of the root.
        start = len(root.strip("/")) + 1 if root.strip("/") else 0
        files = [
            StoredFile(_path(info).lstrip("/")[start:], info.size or 0, info.mtime_ns)
            for info in infos
            if info.type == pafs.FileType.File
        ]
        return sorted(files, key=lambda file: file.name)

    def folders(self, name: str = "") -> list[str]:
        """Return the sorted names of a folder's direct subfolders; object stores have no empty ones.

        Raises:
            DataError: the folder can't be listed.
        """
        infos = self._get_info(pafs.FileSelector(self.full(name).rstrip("/")))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def _get_info(self, target: str | pafs.FileSelector) -> Any:
        try:
            return self.filesystem.get_file_info(target)
        except (OSError, pa.ArrowException) as error:
            raise _unreachable(self.path, error) from None

    def read(self, name: str = "") -> bytes:
        """Return a file's content.

        Raises:
            OSError: it can't be read.
        """
        if self.is_local:
            return _read_local(self.full(name))
        with self.filesystem.open_input_stream(self.full(name)) as stream:
            return bytes(stream.read())

    def open(self, name: str = "") -> pa.NativeFile:
        """Open a file for random access; several threads may call `read_at(num_bytes, offset)`.

        Raises:
            OSError: it can't be opened.
        """
        return self.filesystem.open_input_file(self.full(name))


class RangeReader:
    """Reads pieces of the named files of a storage, several at once; keeps the most recently used files open."""

    def __init__(self, storage: Storage, names: tuple[str, ...]) -> None:
        self._storage, self._names = storage, names
        self._lock = threading.Lock()
        # A file that is dropped from the cache is closed when the last thread has read it.
        self._open: Callable[[str], pa.NativeFile] = lru_cache(OPEN_FILES)(storage.open)

    def read(self, file: np.ndarray, offset: np.ndarray, num_bytes: np.ndarray) -> tuple[list[bytes], int]:
        """Read pieces, and count the bytes that were read for them.

        Args:
            file, offset, num_bytes: of each piece, (B,) integers; a file is its position among the names.

        Raises:
            DataError: a file can't be read, or has become shorter.
        """
        pieces = [b""] * len(file)
        ranges = plan_ranges(file, offset, num_bytes, LOCAL_GAP_BYTES if self._storage.is_local else REMOTE_GAP_BYTES)
        contents = in_threads(self._fetch, ranges, 1 if self._storage.is_local else REMOTE_THREADS)
        for part, content in zip(ranges, contents, strict=True):
            for position in part.positions:
                start = int(offset[position]) - part.start
                pieces[position] = content[start : start + int(num_bytes[position])]
        return pieces, sum(len(content) for content in contents)

    def _fetch(self, part: Range) -> bytes:
        name = self._names[part.file]
        try:
            with self._lock:  # one request opens a file for all threads
                file = self._open(name)
            # A damaged index may ask for any number of bytes, and the reader allocates them first.
            content = bytes(file.read_at(part.stop - part.start, part.start)) if part.stop <= file.size() else b""
        except OSError as error:
            cure = cure_of(error, "restore it")
            raise DataError(f"{self._storage.public(name)} can't be read ({one_line(error)}): {cure}") from None
        if len(content) != part.stop - part.start:
            raise DataError(f"{self._storage.public(name)} is shorter than it was when it was opened: restore it")
        return content


@dataclass(frozen=True)
class Range:
    """Bytes start..stop-1 of a file, and the positions of the batch whose pieces are in it."""

    file: int
    start: int
    stop: int
    positions: tuple[int, ...]


def plan_ranges(file: np.ndarray, offset: np.ndarray, num_bytes: np.ndarray, gap_bytes: int) -> list[Range]:
    """Merge neighboring pieces of files into ranges of bytes.

    Args:
        file, offset, num_bytes: of each piece, (B,) integers.
        gap_bytes: the largest gap between two pieces of one range.

    Returns:
        Ranges in the order of the files and offsets; every position is in one.

    >>> plan_ranges(np.array([0, 1, 0]), np.array([900, 0, 512]), np.array([100, 8, 300]), 200)
    [Range(file=0, start=512, stop=1000, positions=(2, 0)), Range(file=1, start=0, stop=8, positions=(1,))]
    """
    ranges: list[Range] = []
    for position in np.lexsort((offset, file)).tolist():
        number, start = int(file[position]), int(offset[position])
        stop = start + int(num_bytes[position])
        last = ranges[-1] if ranges else None
        if last and last.file == number and start - last.stop <= gap_bytes and stop - last.start <= RANGE_BYTES:
            ranges[-1] = Range(number, last.start, max(stop, last.stop), (*last.positions, position))
        else:
            ranges.append(Range(number, start, stop, (position,)))
    return ranges


def split_shards(
    shards: Mapping[str, Shard], train: str, validation: str, noun: str
) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """Split shards into training and validation by patterns of their names.

    A pattern is matched against a name with and without its folders. A shard that matches both patterns is for
    training. If none matches the training pattern, all shards that are not for validation are for training.

    Args:
        shards: by name, without the suffix.
        train: pattern of the training shards.
        validation: pattern of the validation shards; the default also tries "*val*", "" matches none.
        noun: the word for a shard in the config key `data.train_<noun>s`.

    Raises:
        ConfigError: nothing is left for training, or a validation pattern other than the default matches nothing.

    >>> split_shards({"a/test": 0, "b": 1}, "*train*", "*test*", "file")
    ((1,), (0,))
    """
    training = _matching(shards, train)
    others = [name for name in shards if name not in training]
    held_out = _matching(others, validation)
    if not held_out and validation == DEFAULT_VALIDATION:
        held_out = _matching(others, OTHER_VALIDATION)
    elif not held_out and validation:
        names = closest(validation, others)
        raise ConfigError(f"data.validation_{noun}s {validation!r} matches no {noun} left for validation: {names}")
    training = training or set(others) - held_out
    if not training:
        raise ConfigError(f"data.train_{noun}s {train!r} matches no {noun} left for training: {closest(train, shards)}")
    return (
        tuple(shard for name, shard in shards.items() if name in training),
        tuple(shard for name, shard in shards.items() if name in held_out),
    )


def _matching(names: Iterable[str], pattern: str) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)}


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> list[Result]:
    """Return a function's results for all items, in order, computed in threads; the first error is raised."""
    items = list(items)
    if min(num_threads, len(items)) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(num_threads, len(items)), thread_name_prefix="rayprune-read") as pool:
        return list(pool.map(function, items))


def public(path: str) -> str:
    """Return a path for messages, without the credentials and settings that a URI may contain.

    >>> public("s3://key:secret@bucket/a?region=us-east-1"), public("a/b?c")
    ('s3://bucket/a', 'a/b?c')
    """
    return re.sub(r"^([\w+.-]+://)(?:[^/@]*@)?([^?]*).*$", r"\1\2", path)


def one_line(error: Exception, width: int = 160) -> str:
    """Return the start of an error's message, on one line and without secrets."""
    return errors.one_line(error)[:width]


def _local_files(root: str) -> Iterator[StoredFile]:
    """Yield the files below a local folder; pyarrow would follow a link in a loop 40 times."""
    loops: list[str] = []
    # The name of a folder, and the real paths of it and of those above it.
    folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while folders:
        prefix, above = folders.pop()
        try:
            with os.scandir(f"{root}/{prefix}") as entries:
                for entry in entries:
                    name = f"{prefix}{entry.name}"
                    if not entry.is_dir():
                        yield from _local_file(entry, name)
                        continue
                    real = os.path.realpath(entry.path) if entry.is_symlink() else str(Path(above[-1], entry.name))
                    if real in above:
                        loops.append(name)
                    else:
                        folders.append((f"{name}/", (*above, real)))
        except OSError as error:
            raise _unreachable(f"{root}/{prefix}".rstrip("/"), error) from None
    if loops:
        logger.warning("left out %d links in %s to a folder above them, first %s", len(loops), root, min(loops))


def _local_file(entry: os.DirEntry[str], name: str) -> Iterator[StoredFile]:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the file name {os.fsencode(name)!r} is not valid UTF-8: rename it") from None
    try:
        status = entry.stat()
    except OSError:  # a broken link; whoever reads it names it
        yield StoredFile(name, 0)
    else:
        if stat.S_ISREG(status.st_mode):
            yield StoredFile(name, status.st_size, status.st_mtime_ns)


def cure_of(error: Exception, usual: str) -> str:
    """Return the cure for a file that can't be read: the usual one, unless the process has too many open files.

    >>> cure_of(OSError(errno.EMFILE, "Too many open files"), "restore it")
    'raise the limit on open files (ulimit -n 4096)'
    """
    # Arrow's errors have the number only in their text.
    too_many = getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE} or "Too many open files" in str(error)
    return "raise the limit on open files (ulimit -n 4096)" if too_many else usual


def _read_local(path: str) -> bytes:
    # Plain system calls take a third of the time of a Python file, which matters if each file is one small image.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        num_bytes = os.fstat(handle).st_size
        content = os.read(handle, num_bytes)
        while len(content) < num_bytes and (more := os.read(handle, num_bytes - len(content))):
            content += more
        return content
    finally:
        os.close(handle)


def _path(info: pafs.FileInfo) -> str:
    try:
        return str(info.path)
    except UnicodeDecodeError as error:
        raise DataError(f"the file name {bytes(error.object)!r} is not valid UTF-8: rename it") from None


def _unreachable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{public(path)} can't be reached ({one_line(error)}): correct the address, or the file system's settings"
    )
