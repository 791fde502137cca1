"""Row groups of Parquet files, read whole, the last ones kept in memory: one buffer a source and process.

Shapes: D files.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayprune.sources.parquet_files import plain_values
from rayprune.sources.parquet_rows import LEFT_OUT, ParquetRows, encoded_values, image_leaf
from rayprune.sources.storage import one_line

_OPEN_FILES = 64
_KEPT_BUFFERS = 4


@dataclass(frozen=True)
class EncodedGroup:
    """A row group as it is stored: the images' bytes or the numeric columns, and the labels."""

    inputs: pa.ChunkedArray | pa.Table
    labels: pa.ChunkedArray

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return int(self.inputs.nbytes + self.labels.nbytes)


class GroupBuffer:
    """Read row groups; several threads may.

    Args:
        rows: which files and columns.
        first_groups: (D+1,) int64, which groups of all are a file's.
        buffer_bytes: how much is kept; what was read last stays.
    """

    def __init__(self, rows: ParquetRows, first_groups: np.ndarray, buffer_bytes: int) -> None:
        self._rows, self._first_groups, self._buffer_bytes = rows, first_groups, buffer_bytes
        self._lock = threading.Lock()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._held: OrderedDict[int, EncodedGroup] = OrderedDict()
        self._held_bytes = 0

    def clear(self) -> None:
        """Keep nothing of what was read."""
        with self._lock:
            self._held.clear()
            self._held_bytes = 0

    def held_first(self, groups: Iterable[int]) -> list[int]:
        """Return the groups, those that are held first: reading the others might push them out."""
        with self._lock:
            return sorted(groups, key=lambda group: group not in self._held)

    def group(self, group: int) -> tuple[EncodedGroup, int]:
        """Return a group and the bytes read for it: its columns' compressed chunks, 0 where it is held.

        Raises:
            OSError: it can't be read.
        """
        with self._lock:
            if group in self._held:
                self._held.move_to_end(group)
                return self._held[group], 0
            encoded, num_bytes = self._read(group)
            self._held[group] = encoded
            self._held_bytes += encoded.num_bytes
            while self._held_bytes > self._buffer_bytes:
                self._held_bytes -= self._held.popitem(last=False)[1].num_bytes
            return encoded, num_bytes

    def _read(self, group: int) -> tuple[EncodedGroup, int]:
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        place = group - int(self._first_groups[number])
        rows = self._rows
        try:
            file = self._open(number)
            image = [] if rows.image_column is None else [image_leaf(file.schema_arrow, rows.image_column)]
            columns = [*image, *rows.feature_columns, rows.label_column]
            table = file.read_row_group(place, columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            where = f"{rows.files[number]} row group {place}"
            raise OSError(f"{where} can't be read ({one_line(error, 120)}): restore it, {LEFT_OUT}") from None
        found = file.metadata.row_group(place)
        chunks = [found.column(position) for position in range(found.num_columns)]
        num_bytes = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)
        labels = plain_values(table.column(rows.label_column))
        if rows.image_column is not None:
            return EncodedGroup(encoded_values(table.column(rows.image_column)), labels), num_bytes
        return EncodedGroup(table.select(rows.feature_columns), labels), num_bytes

    def _open(self, number: int) -> pq.ParquetFile:
        if number not in self._files:
            self._files[number] = self._rows.files[number].open()
        self._files.move_to_end(number)
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close(force=True)
        return self._files[number]


_buffers: OrderedDict[Any, GroupBuffer] = OrderedDict()
_buffers_lock = threading.Lock()


def shared_buffer(rows: ParquetRows, fingerprint: str, first_groups: np.ndarray, buffer_bytes: int) -> GroupBuffer:
    """Return this process's buffer of a source: every read task brings its own copy of the source."""
    key = (fingerprint, buffer_bytes, *map(str, rows.files))
    with _buffers_lock:
        if key not in _buffers:
            _buffers[key] = GroupBuffer(rows, first_groups, buffer_bytes)
        _buffers.move_to_end(key)
        while len(_buffers) > _KEPT_BUFFERS:
            _buffers.popitem(last=False)
        return _buffers[key]
