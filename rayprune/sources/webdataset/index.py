"""The index of tar shards: the positions of their samples, kept in the decoded cache.

As in WebDataset, a sample is a run of members whose names agree up to the first dot of the base name; the rest of the
name is the member's suffix. Directories, links and names between double underscores are skipped.

The key of a cache entry is the shard's path, size and times, because nothing else is known without reading it.

Shapes: M samples of a shard.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayprune import errors
from rayprune.errors import DataError
from rayprune.sources.cache import cache_root, cached_arrays
from rayprune.sources.fingerprint import digest
from rayprune.sources.storage import Storage, StoredFile, cure_of, one_line

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"}
DEFAULT_LABEL_KEYS = ("cls", "json:label")
# As in WebDataset: directories and the base name up to its first dot, then the suffix.
MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
META_NAME = re.compile(r"__[^/]*__($|/)")
# Longer texts are not labels; all records of a shard are as wide as its longest.
MAX_LABEL_BYTES = 1 << 10
MAX_TEXT_BYTES = 200
# Of a member with the label, which may be JSON with more, and of a header for a long name.
MAX_LABEL_MEMBER, MAX_HEADER = 1 << 26, 1 << 20
INDEX_VERSION = 2  # of what _scan records
# One remote request reads the headers of many small members; on a disk, seeking is cheaper than reading on.
LOCAL_WINDOW_BYTES, REMOTE_WINDOW_BYTES = 1 << 16, 1 << 23
HEAD_BYTES = 1 << 12
CRC_BYTES = 1 << 23
BLOCK_BYTES = 512


@dataclass(frozen=True)
class SampleKeys:
    """The members of a sample that are read.

    Attributes:
        image: the suffix of the image; None for the first member with one of IMAGE_SUFFIXES.
        label: the suffix of the member with the label as text, or `json:field`; None for `cls`, else `json:label`.
    """

    image: str | None
    label: str | None

    def is_image(self, suffix: str) -> bool:
        return suffix in IMAGE_SUFFIXES if self.image is None else suffix == self.image.lower()

    def label_rank(self, suffix: str) -> tuple[int, str | None] | None:
        """Return a member's rank among the possible labels, 0 first, and its JSON field; None if it is not one."""
        for rank, choice in enumerate(DEFAULT_LABEL_KEYS if self.label is None else (self.label,)):
            member, _, name = choice.partition(":")
            if suffix == member.lower():
                return rank, name or None
        return None


def shard_samples(
    storage: Storage, file: StoredFile, keys: SampleKeys, cache_dir: str | None, whole: bool = False
) -> np.ndarray:
    """Return a shard's samples, (M,) records.

    Fields are `name`, `offset` and `num_bytes` of the image, `crc` (a checksum of its first 4 KiB, or all of it with
    `whole`), `label` (its text), and `fault`, empty for a usable sample. The records of a damaged shard end with one
    that has no name, and the damage as its fault.

    Raises:
        DataError: the shard can't be read, or the cache can't be written.
    """
    if file.mtime_ns is None:  # an entry of an older shard could not be recognized
        return _scan(storage, file, keys, whole)
    # A tool that rewrites a shard may restore its modification time, but not its change time.
    changed_ns = _change_time_ns(storage, file) if storage.is_local else 0
    address = digest(storage.path, file.name, file.num_bytes, file.mtime_ns, changed_ns)
    key = f"webdataset-index-{digest(address, INDEX_VERSION, str(keys.image), str(keys.label), str(whole))}"

    def build(folder: Path) -> None:
        np.save(folder / "samples.npy", _scan(storage, file, keys, whole))

    return cached_arrays(key, cache_root(cache_dir), build, num_bytes=file.num_bytes // 100)["samples"]


def shard_name(storage: Storage, file: StoredFile) -> str:
    """Return a shard's name in messages."""
    return file.name or storage.full("").rpartition("/")[2]


def _change_time_ns(storage: Storage, file: StoredFile) -> int:
    try:
        return Path(storage.full(file.name)).stat().st_ctime_ns
    except OSError as error:
        raise _unreadable(storage, file, error) from None


def _unreadable(storage: Storage, file: StoredFile, error: OSError) -> DataError:
    cure = cure_of(error, "restore it, or try again")
    return DataError(f"{shard_name(storage, file)} can't be read ({one_line(error)}): {cure}")


def _scan(storage: Storage, file: StoredFile, keys: SampleKeys, whole: bool) -> np.ndarray:
    try:
        reader = _WindowReader(storage, file)
        samples = _walk(reader, keys, whole)
    except OSError as error:
        raise _unreadable(storage, file, error) from None
    records = [sample.record() for sample in samples]
    widths = [max((len(record[column]) for record in records), default=0) or 1 for column in (0, 4, 5)]  # type: ignore[arg-type]
    fields = [("name", f"S{widths[0]}"), ("offset", "<i8"), ("num_bytes", "<i8"), ("crc", "<u4")]
    return np.array(records, dtype=[*fields, ("label", f"S{widths[1]}"), ("fault", f"S{widths[2]}")])


def _walk(reader: _WindowReader, keys: SampleKeys, whole: bool) -> list[_Sample]:
    samples: list[_Sample] = []
    try:
        with tarfile.open(fileobj=reader, mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps every header otherwise
                if member.size < 0:  # the next header would be this one again
                    raise tarfile.ReadError(f"size {member.size} of {member.name[:80]!r}")
                if member.isreg() and not META_NAME.match(member.name):
                    _add_member(samples, reader, member, keys, whole)
            end = archive.offset
            if any(reader.read_at(end, BLOCK_BYTES)):
                raise tarfile.ReadError(f"no header at byte {end}")
            if end >= reader.num_bytes:  # cut between two members, it would look whole
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, ValueError, EOFError) as error:
        samples.append(_Sample("", fault=f"is not a tar archive, or cut off ({errors.one_line(error)[:80]})"))
    return samples


def _add_member(
    samples: list[_Sample], reader: _WindowReader, member: tarfile.TarInfo, keys: SampleKeys, whole: bool
) -> None:
    parts = MEMBER_NAME.fullmatch(member.name)
    if parts is None:
        return
    name, suffix = parts[1], parts[2].lower()
    if not samples or samples[-1].name != name:
        samples.append(_Sample(name))
    sample = samples[-1]
    if suffix in sample.suffixes:
        sample.fault = f"has two members .{suffix}: give every sample its own name"
    sample.suffixes.append(suffix)
    if member.sparse is not None or member.offset_data + member.size > reader.num_bytes:
        sample.fault = f"has a member .{suffix} that is {'sparse' if member.sparse is not None else 'cut off'}"
    elif keys.is_image(suffix) and sample.image is None:
        crc, num_bytes = 0, member.size if whole else min(member.size, HEAD_BYTES)
        for start in range(0, num_bytes, CRC_BYTES):
            crc = zlib.crc32(reader.read_at(member.offset_data + start, min(CRC_BYTES, num_bytes - start)), crc)
        sample.image = (member.offset_data, member.size, crc)
    elif (choice := keys.label_rank(suffix)) is not None and choice[0] < sample.label_rank:
        try:
            if member.size > MAX_LABEL_MEMBER:
                raise DataError(f"{member.size} bytes are too long for a label")
            label = _label_text(reader.read_at(member.offset_data, member.size), choice[1])
        except ValueError as error:
            sample.label_fault = f"has an unsuitable label in .{suffix} ({errors.one_line(error)[:100]})"
            return
        if label is not None:
            sample.label, sample.label_rank, sample.label_fault = label, choice[0], ""


def _label_text(content: bytes, name: str | None) -> bytes | None:
    """Return a label's text; None if a JSON member lacks the field."""
    if name is None:
        value: Any = content.decode("utf-8")
    else:
        fields = json.loads(content)
        if not isinstance(fields, dict) or fields.get(name) is None:
            return None
        value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{name} is {str(value)[:40]}: labels must be whole numbers or text")
    label = str(value).strip().encode()
    if len(label) > MAX_LABEL_BYTES:
        raise DataError(f"{len(label)} bytes are too long for a label")
    return label


@dataclass
class _Sample:
    """A sample whose members are being read.

    Attributes:
        name: of its members, without the suffix.
        suffixes: of its members.
        image: offset, size in bytes and checksum.
        label: its text.
        label_rank: of the member with the label; higher than all ranks if there is none.
        label_fault, fault: the problem with the label and with the sample; "" for none.
    """

    name: str
    suffixes: list[str] = field(default_factory=list)
    image: tuple[int, int, int] | None = None
    label: bytes | None = None
    label_rank: int = 99
    label_fault: str = ""
    fault: str = ""

    def record(self) -> tuple[bytes, int, int, int, bytes, bytes]:
        fault = self.fault or self.label_fault
        if self.image is None:
            fault = fault or f"has no image (its members: {', '.join(self.suffixes)})"
        elif self.image[1] == 0:
            fault = fault or "has an image of 0 bytes"
        if not self.label:
            fault = fault or f"has {'no' if self.label is None else 'an empty'} label ({', '.join(self.suffixes)})"
        name, text = (value.encode(errors="replace")[:MAX_TEXT_BYTES] for value in (self.name, fault))
        return name, *(self.image or (0, 0, 0)), self.label or b"", text


class _WindowReader:
    """A file object for tarfile that reads a stored file in windows, so that one request brings many headers."""

    def __init__(self, storage: Storage, file: StoredFile) -> None:
        self._file = storage.open(file.name)
        self.num_bytes = file.num_bytes
        self._window_bytes = LOCAL_WINDOW_BYTES if storage.is_local else REMOTE_WINDOW_BYTES
        self._start, self._window = 0, b""
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {num_bytes} bytes")
        content = self.read_at(self._position, num_bytes)
        self._position += len(content)
        return content

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        num_bytes = min(num_bytes, self.num_bytes - offset)
        if num_bytes <= 0:
            return b""
        if offset < self._start or offset + num_bytes > self._start + len(self._window):
            wanted = min(max(num_bytes, self._window_bytes), self.num_bytes - offset)
            self._start, self._window = offset, bytes(self._file.read_at(wanted, offset))
        return self._window[offset - self._start :][:num_bytes]
