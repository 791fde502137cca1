"""Paths of run folders, on a local disk or an object store, and files and folders that are replaced as a whole.

An object store has no folders, nothing can be renamed or appended there, and a write is visible as a whole when its
file is closed. Everything that a run writes keeps to this.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from rayprune.errors import REDACTED, ConfigError, one_line, redacted_url

if TYPE_CHECKING:  # most paths are local, and importing pyarrow takes time
    import pyarrow.fs as pafs

_ATTEMPTS = 10  # of a request; the wait doubles from one to the next
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 20.0
_READ_BYTES = 1 << 23
# Characters that pyarrow's parser takes unescaped; it refuses blanks and letters outside ASCII.
_URI_CHARACTERS = "%/:?#[]@!$&'()*+,;="
# Azure's URIs name the container before an "@".
_CONTAINER_SCHEMES = {"abfs", "abfss"}
_ONE_SLASH = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return an `ObjectPath` for a URI such as `s3://bucket/runs`, otherwise a local path, its `~` expanded.

    Raises:
        ConfigError: the URI has credentials or parameters, names no bucket, or lacks a slash.

    >>> as_path("s3://bucket/runs") / "a", as_path("/mnt/runs").name
    (ObjectPath('s3://bucket/runs/a'), 'runs')
    """
    if isinstance(path, ObjectPath):
        return path
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if _ONE_SLASH.match(text):
            raise ConfigError(f"{text} is neither a local path nor a URI: write it as {text.replace(':/', '://', 1)}")
        return Path(text).expanduser()
    if scheme == "file":
        return Path(f"/{rest.lstrip('/')}")
    has_secret = ":" in rest.partition("@")[0] if scheme in _CONTAINER_SCHEMES else REDACTED in redacted_url(text)
    if has_secret or "?" in text:
        raise ConfigError(
            f"{redacted_url(text)} has credentials or parameters: give them to the file system by the environment, "
            "such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    if not rest.strip("/"):
        raise ConfigError(f"{text} names no bucket: write it as {scheme}://BUCKET/FOLDER")
    return ObjectPath(text)


# Scheme → a file system that a program has made, and "/" if its paths begin so; they travel with the paths.
_GIVEN: dict[str, tuple[pafs.FileSystem, str]] = {}


def on_filesystem(path: str, filesystem: pafs.FileSystem | None) -> Path:
    """Return a path on a file system that a program has made, such as the `storage_filesystem` of Ray's RunConfig.

    Args:
        path: as the file system takes it, without a scheme.
        filesystem: a pyarrow file system, which must be able to be pickled; None for a path or URI of any.
    """
    if filesystem is None:
        return as_path(path)
    if filesystem.type_name == "local":
        return Path(path)
    scheme = f"{filesystem.type_name}-{hashlib.sha256(pickle.dumps(filesystem)).hexdigest()[:8]}"
    _GIVEN[f"{scheme}:"] = (filesystem, "/" if path.startswith("/") else "")
    return ObjectPath(f"{scheme}://{path.strip('/')}")


class ObjectPath(PosixPath):
    """A path on an object store, with the methods of `pathlib.Path` that run folders use.

    `mkdir` does nothing; a folder exists while there is an object below it. `open("a")` writes the whole object again.
    `os.fspath` raises, so that no library takes the path for a local file. The file system of a URI takes its
    credentials and its endpoint from the environment, as `data.path` does.
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, separator, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if separator else scheme  # the parts of a relative path have no scheme

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is on an object store, and this needs a local file: use a local folder")

    def __reduce__(self) -> tuple[Callable[..., Path], tuple[Any, ...]]:
        if (given := _GIVEN.get(self.parts[0])) is not None:
            return on_filesystem, (self.key, given[0])
        return ObjectPath, (str(self),)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system that holds it; `key` is its path there."""
        return _root(*self.parts[:2])[0]

    @property
    def key(self) -> str:
        """Its path within `filesystem`."""
        root = _root(*self.parts[:2])[1]
        return "/".join([*([root.rstrip("/")] if root else []), *self.parts[2:]])

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Open the object; a write is visible, as a whole, when the file is closed."""
        kind = mode.replace("b", "").replace("t", "")
        stream: Any
        if kind == "r":
            stream = io.BufferedReader(_ObjectReader(self), _READ_BYTES)
        elif kind in {"w", "a"}:
            before = self.read_bytes() if kind == "a" and self.is_file() else b""
            try:
                stream = self._output_stream()
            except NotImplementedError:
                raise OSError(errno.EROFS, "this file system can only be read", str(self)) from None
            stream.write(before)
        else:
            raise ValueError(f"an object can't be opened with mode {mode!r}")
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8", errors, newline)

    def _output_stream(self) -> Any:
        try:
            return self.filesystem.open_output_stream(self.key)
        except FileNotFoundError:  # a file system with folders, such as SFTP's
            self.filesystem.create_dir(self.parent.key, recursive=True)
            return self.filesystem.open_output_stream(self.key)

    def _info(self) -> pafs.FileInfo:
        return self.filesystem.get_file_info(self.key)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether there is an object of this name, or one below it."""
        return bool(self._info().type.name != "NotFound")

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether there is an object of this name."""
        return bool(self._info().type.name == "File")

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether there is an object below this name."""
        return bool(self._info().type.name == "Directory")

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Return st_size, st_mtime and st_mtime_ns."""
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(2, "No such object", str(self))
        modified_ns = info.mtime_ns or 0
        return SimpleNamespace(st_size=info.size or 0, st_mtime=modified_ns / 1e9, st_mtime_ns=modified_ns)

    def iterdir(self) -> Iterator[ObjectPath]:  # type: ignore[override]
        """Yield what is directly below; nothing if there is none."""
        import pyarrow.fs as pafs

        for info in self.filesystem.get_file_info(pafs.FileSelector(self.key, allow_not_found=True)):
            yield self / info.base_name

    def glob(self, pattern: str, **options: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        """Yield what matches a pattern without `**`."""
        first, _, rest = pattern.strip("/").partition("/")
        for path in self.iterdir() if any(sign in first for sign in "*?[") else [self / first]:
            if fnmatchcase(path.name, first):
                if rest:
                    yield from path.glob(rest)
                elif path.name != first or path.exists():
                    yield path

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: an object store has no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Return the path itself, which is absolute."""
        return self

    def absolute(self) -> ObjectPath:
        """Return the path itself, which is absolute."""
        return self

    def expanduser(self) -> ObjectPath:
        """Return the path itself."""
        return self


class _ObjectReader(io.RawIOBase):
    """Read an object; Arrow tries other requests to S3 again, but not those that read."""

    def __init__(self, path: ObjectPath) -> None:
        try:
            self._file = path.filesystem.open_input_file(path.key)
        except FileNotFoundError:
            raise FileNotFoundError(2, "No such object", str(path)) from None
        self._size, self._position = self._file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        content = _retried(lambda: self._file.read_at(size, self._position)) if size else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _retried(request: Callable[[], bytes]) -> bytes:
    for attempt in range(_ATTEMPTS - 1):
        try:
            return request()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt))
    return request()


@lru_cache(maxsize=64)
def _root(scheme: str, bucket: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a bucket, and the bucket's path within it."""
    import pyarrow.fs as pafs

    if scheme in _GIVEN:
        filesystem, root = _GIVEN[scheme]
        return filesystem, root + bucket
    try:
        filesystem, root = open_filesystem(f"{scheme}//{bucket}")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{scheme}//{bucket} can't be reached ({one_line(error)}): correct it, or the file system's settings in "
            "the environment"
        ) from None
    if scheme == "s3:":
        # A URI's file system gives up early, and that of Arrow's "standard" strategy after many errors in all.
        filesystem = pafs.S3FileSystem(
            region=filesystem.region,
            endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=_ATTEMPTS),
        )
    return filesystem, root


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a path or URI, pyarrow's own or one of fsspec, and the path within it.

    Raises:
        OSError, ValueError, ImportError: there is no such file system, or it can't be reached.
    """
    import pyarrow as pa
    import pyarrow.fs as pafs

    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        found = pafs.FileSystem.from_uri(quote(path, safe=_URI_CHARACTERS))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        # Without fsspec's memory of listings: other machines write, too.
        filesystem, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), root
    return found


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Replace a file as a whole: a kill or an error leaves the old content or the new one, never a part.

    Yields:
        A local path to write to; its content replaces that of `path` when the block ends without an error.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="rayprune-") as folder:
            partial = Path(folder, path.name)
            yield partial
            copy_file(partial, path)
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path, last: str | None = None) -> Iterator[Path]:
    """Replace a folder of files as a whole.

    Args:
        path: the folder.
        last: the name of a file in it. On an object store, files appear one by one, and this one last: a reader that
            finds it finds all.

    Yields:
        A new local folder to write to; its content replaces that of `path` when the block ends without an error.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="rayprune-") as folder:
            yield Path(folder)
            if last is not None:
                (path / last).unlink(missing_ok=True)
            remove_tree(path)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == last):
                copy_file(file, path / file.name)
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_file(file: Path, path: Path) -> None:
    """Copy a file, between any two places; a signal takes effect when the whole file is written."""

    def copy() -> None:
        with file.open("rb") as content, path.open("wb") as stream:
            shutil.copyfileobj(content, stream, 1 << 20)

    # Closing publishes what has been written, and Ctrl-C would close in the middle. It reaches the main thread only.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(copy).result()


def ray_storage(path: Path) -> dict[str, Any]:
    """Return the arguments of Ray's RunConfig that make it store below a path."""
    if isinstance(path, ObjectPath):
        return {"storage_path": path.key, "storage_filesystem": path.filesystem}
    return {"storage_path": str(path)}


def remove_tree(path: Path) -> None:
    """Delete a file or folder with all that is in it; errors are ignored, as by `shutil.rmtree(ignore_errors=True)`."""
    if not isinstance(path, ObjectPath):
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.filesystem.delete_dir(path.key) if path.is_dir() else path.unlink(missing_ok=True)


def copy_tree(origin: Path, path: Path, last: str | None = None) -> None:
    """Copy a folder with all that is in it, between any two places.

    Args:
        origin: an existing folder.
        path: the copy; what is there is deleted.
        last: the name of a file of the folder to copy last.
    """
    remove_tree(path)
    path.mkdir(parents=True)
    for entry in sorted(origin.iterdir(), key=lambda entry: entry.name == last):
        if entry.is_dir():
            copy_tree(entry, path / entry.name)
        else:
            copy_file(entry, path / entry.name)
