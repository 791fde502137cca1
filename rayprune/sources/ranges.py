"""Ranges of bytes of stored files: those of a batch are planned, merged where they are neighbours, and read.

Shapes: B batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayprune.sources.storage import Storage, one_line, redacted

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
            ValueError: a file can't be read, or has become shorter.
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
            raise ValueError(f"{place} can't be read ({one_line(error)}): restore it") from None
        if len(content) != part.stop - part.start:
            raise ValueError(f"{place} is shorter than it was when it was opened: restore it")
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
