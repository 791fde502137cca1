"""Files on a local path or on any file system that pyarrow or fsspec knows: `s3://`, `gs://`, `memory://`, `file://`.

Credentials and endpoints come from the environment, as each file system documents them (for S3: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL).

Ranges of bytes of stored files: those of a batch are planned, merged where they are neighbours, and read.

Shapes: B batch.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rayprune.errors import DataError

# What pyarrow's parser takes as it is; it refuses blanks and letters outside ASCII unless they are escaped.
_URI_CHARACTERS = "%/:?#[]@!$&'()*+,;="


@dataclass(frozen=True)
class StoredFile:
    """One file below a Storage.

    Attributes:
        name: its path relative to the root (with `/`).
        num_bytes: its size.
        mtime_ns: when it was last written, as far as the file system tells; says nothing about the content.
    """

    name: str
    num_bytes: int
    mtime_ns: int | None = field(default=None, compare=False)


class Storage:
    """A folder, or a single file, that every process opens for itself; pickles into its path.

    Args:
        path: a local path (`~` is expanded) or a URI.

    Raises:
        DataError: no file system serves the URI's scheme, or it can't be reached.
    """

    def __init__(self, path: str) -> None:
        self.path = path if "://" in path else str(Path(path).expanduser().absolute())
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._opened: tuple[pafs.FileSystem, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._forget()

    @property
    def is_local(self) -> bool:
        """Whether plain file calls reach it."""
        return "://" not in self.path or self.path.startswith("file://")

    @property
    def local_path(self) -> Path:
        """The path of a local Storage."""
        return Path(self._open()[1])

    def _open(self) -> tuple[pafs.FileSystem, str]:
        with self._lock:
            if self._opened is None:
                self._opened = _resolve(self.path)
            return self._opened

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system, for calls that take one, such as `pyarrow.parquet.ParquetFile`."""
        return self._open()[0]

    def full(self, name: str) -> str:
        """Return a file's path within `filesystem`; the empty name is the root itself."""
        root = self._open()[1]
        return f"{root.rstrip('/')}/{name}" if name else root

    def is_file(self) -> bool:
        """Whether the path names a file."""
        return bool(self._info("").type == pafs.FileType.File)

    def is_folder(self) -> bool:
        """Whether the path names a folder."""
        return bool(self._info("").type == pafs.FileType.Directory)

    def _info(self, name: str) -> pafs.FileInfo:
        try:
            return self.filesystem.get_file_info(self.full(name))
        except (OSError, pa.ArrowException) as error:
            raise _unreachable(self.path, error) from None

    def files(self) -> list[StoredFile]:
        """Return all files below a folder, in the order of their names (as strings of code points).

        Raises:
            DataError: the folder can't be listed.
        """
        root = self.full("").rstrip("/") or "/"
        files = [info for info in self._list(root, recursive=True) if info.type == pafs.FileType.File]
        # Some file systems name their files without the leading slash that the root was given with.
        start = len(root.strip("/")) + 1 if root.strip("/") else 0
        named = [StoredFile(_path(info).lstrip("/")[start:], info.size or 0, info.mtime_ns) for info in files]
        return sorted(named, key=lambda file: file.name)

    def file(self, name: str = "") -> StoredFile:
        """Return one file's size and time, by default those of the root.

        Raises:
            DataError: it is no file, or can't be reached.
        """
        info = self._info(name)
        if info.type != pafs.FileType.File:
            raise DataError(f"{public(self.path)}{'/' if name else ''}{name} is no file: correct data.path")
        return StoredFile(name, info.size or 0, info.mtime_ns)

    def folders(self, name: str = "") -> list[str]:
        """Return the names of the folders directly below one, sorted; empty ones are found where folders exist at all.

        Raises:
            DataError: the folder can't be listed.
        """
        found = self._list(self.full(name).rstrip("/"), recursive=False)
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def _list(self, folder: str, recursive: bool) -> list[pafs.FileInfo]:
        try:
            return list(self.filesystem.get_file_info(pafs.FileSelector(folder, recursive=recursive)))
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

    def read_range(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Return part of a file.

        Raises:
            OSError: it can't be read, or ends before.
        """
        with self.open(name) as file:
            content = bytes(file.read_at(num_bytes, offset))
        if len(content) != num_bytes:
            raise OSError(f"{redacted(self.full(name))} ends before byte {offset + num_bytes}")
        return content

    def open(self, name: str = "") -> pa.NativeFile:
        """Open a file for random access; `read_at(num_bytes, offset)` may be called by several threads.

        Raises:
            OSError: it can't be opened.
        """
        return self.filesystem.open_input_file(self.full(name))


def public(path: str) -> str:
    """Return a path for messages: without the key and secret, and the settings, that a URI may carry.

    >>> public("s3://key:secret@bucket/a?region=us-east-1"), public("a/b?c")
    ('s3://bucket/a', 'a/b?c')
    """
    return re.sub(r"^([\w+.-]+://)(?:[^/@]*@)?([^?]*).*$", r"\1\2", path)


def one_line(error: Exception, width: int = 160) -> str:
    """Return the start of an error's message, without line breaks and secrets."""
    return redacted(" ".join(str(error).split()))[:width]


def redacted(text: str) -> str:
    """Return a text, such as a path within a file system or another library's message, without `key:secret@`.

    >>> redacted("No such file: '/key:secret@bucket/a'")
    "No such file: '/bucket/a'"
    """
    return re.sub(r"[^\s/@:'\"]+:[^\s/@'\"]+@", "", text)


def _read_local(path: str) -> bytes:
    # Plain system calls take a third of the time of a Python file, which counts where a file is one small image.
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
        raise DataError(f"the file name {bytes(error.object)!r} is not UTF-8: rename it") from None


def _resolve(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        filesystem, root = pafs.FileSystem.from_uri(quote(path, safe=_URI_CHARACTERS))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _by_fsspec(path)
    except OSError as error:
        raise _unreachable(path, error) from None
    return filesystem, root


def _by_fsspec(path: str) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError, OSError) as error:
        raise _unreachable(path, error) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), root


def _unreachable(path: str, error: Exception) -> ValueError:
    return DataError(
        f"{public(path)} can't be reached ({one_line(error)}): correct data.path, or the file system's settings"
    )


# Requests that wait for a network rather than for this machine.
REMOTE_THREADS = 16
# Reading on is cheaper than another request: headers and a small label lie between two images.
LOCAL_GAP_BYTES, REMOTE_GAP_BYTES = 1 << 12, 1 << 14
RANGE_BYTES = 1 << 23
OPEN_FILES = 64


class RangeReader:
    """Reads pieces of files, several at once; keeps the last files open.

    Args:
        storage: where the files lie.
        names: of the files; the empty name is the storage's root.
    """

    def __init__(self, storage: Storage, names: tuple[str, ...]) -> None:
        self._storage, self._names = storage, names
        self._lock = threading.Lock()
        self._files: OrderedDict[str, pa.NativeFile] = OrderedDict()

    def read(self, file: np.ndarray, offset: np.ndarray, num_bytes: np.ndarray) -> tuple[list[bytes], int]:
        """Read pieces.

        Args:
            file, offset, num_bytes: of each piece, (B,) integers; a file is its position among the names.

        Returns:
            The pieces, and the bytes that were read for them.

        Raises:
            DataError: a file can't be read, or has become shorter.
        """
        pieces = [b""] * len(file)
        ranges = plan_ranges(file, offset, num_bytes, LOCAL_GAP_BYTES if self._storage.is_local else REMOTE_GAP_BYTES)
        if self._storage.is_local or len(ranges) <= 1:
            contents = [self._fetch(part) for part in ranges]
        else:
            with ThreadPoolExecutor(min(REMOTE_THREADS, len(ranges))) as pool:
                contents = list(pool.map(self._fetch, ranges))
        for part, content in zip(ranges, contents, strict=True):
            for position in part.positions:
                start = int(offset[position]) - part.start
                pieces[position] = content[start : start + int(num_bytes[position])]
        return pieces, sum(len(content) for content in contents)

    def _fetch(self, part: Range) -> bytes:
        name = self._names[part.file]
        place = redacted(self._storage.full(name))
        try:
            content = bytes(self._open(name).read_at(part.stop - part.start, part.start))
        except OSError as error:
            raise DataError(f"{place} can't be read ({one_line(error)}): restore it") from None
        if len(content) != part.stop - part.start:
            raise DataError(f"{place} is shorter than it was when it was opened: restore it")
        return content

    def _open(self, name: str) -> pa.NativeFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = self._storage.open(name)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)  # closed when the last thread that reads it lets go
            self._files.move_to_end(name)
            return self._files[name]


@dataclass(frozen=True)
class Range:
    """Bytes start..stop-1 of a file, and the positions of the batch that lie in them."""

    file: int
    start: int
    stop: int
    positions: tuple[int, ...]


def plan_ranges(file: np.ndarray, offset: np.ndarray, num_bytes: np.ndarray, gap_bytes: int) -> list[Range]:
    """Merge pieces of files into ranges of bytes, where little lies between them.

    Args:
        file, offset, num_bytes: of each piece, (B,) integers.
        gap_bytes: what may lie between two pieces of one range.

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
