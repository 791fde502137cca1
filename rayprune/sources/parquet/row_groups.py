"""Rows of Parquet files decoded at every visit: no cache, so the data may be larger than memory and disk.

A row group can only be read whole. Each process keeps the encoded columns of the groups that it read last, up to
`buffer_bytes`. Plans visit such rows in windows of groups (rayprune.core.plan), so each process reads the groups of a
window about once. If they are larger than the buffer, those that do not fit are read again for every span of rows.
Pruning always saves decoding, but it saves reading only for groups without a kept row.

Shapes: N rows of all files, B batch, G row groups of all files, D files.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayprune.core.plan import MIN_GROUPS
from rayprune.sources.base import DescribedSource, RowCost, Schema, check_ids
from rayprune.sources.images.decode import LEAVE_OUT, decode_rows, readable_rows
from rayprune.sources.parquet.reader import (
    ParquetRows,
    ShardFile,
    as_labels,
    bad_row,
    encoded_values,
    feature_values,
    input_columns,
    non_finite_rows,
    plain_values,
    read_labels,
)
from rayprune.sources.storage import OPEN_FILES, cure_of, one_line

logger = logging.getLogger(__name__)

BUFFER_BYTES = 256 * 1024 * 1024
_BUFFERS = 4
_CHECKED_ROWS = 256


class ParquetGroups(DescribedSource):
    """Rows decoded from row groups; `read` counts the compressed bytes of the column chunks that were not buffered.

    Pickles into paths and sizes; the copies in one process share one buffer, of `buffer_bytes`.
    """

    process_local = ("_groups", "_first_groups", "_labels")
    row_cost: RowCost = "expensive"

    def __init__(
        self, rows: ParquetRows, schema: Schema, fingerprint: str, labels: np.ndarray, buffer_bytes: int
    ) -> None:
        super().__init__(len(labels), schema, fingerprint, labels)
        self._rows, self._buffer_bytes = rows, buffer_bytes
        footers = [file.metadata() for file in rows.files]
        groups = [footer.row_group(number) for footer in footers for number in range(footer.num_row_groups)]
        sizes, counts = [group.num_rows for group in groups], [footer.num_row_groups for footer in footers]
        self._check_buffer([group.total_byte_size for group in groups])
        self._set_groups(np.array(sizes, dtype=np.int64), np.cumsum([0, *counts]))

    def _check_buffer(self, sizes: list[int]) -> None:
        """Warn if a window of groups, with the one that it shares with the window before, does not fit."""
        mixed = min(MIN_GROUPS + 1, len(sizes))
        needed = mixed * max(sizes, default=0)
        if needed > self._buffer_bytes:
            logger.warning(
                "%d row groups of up to %.0f MB are mixed and do not fit into data.buffer_bytes = %d, so each one is "
                "read several times: set data.buffer_bytes=%d",
                mixed,
                max(sizes) / 1e6,
                self._buffer_bytes,
                needed,
            )

    def _set_groups(self, sizes_G: np.ndarray, first_groups: np.ndarray) -> None:
        self._first_groups = first_groups  # see GroupBuffer
        self._groups = np.concatenate([[0], np.cumsum(sizes_G)])

    def __getstate__(self) -> dict[str, Any]:
        # Every read task carries a pickle. Most row groups have one size, so their sizes are pickled as runs.
        sizes = np.diff(self._groups)
        runs = np.flatnonzero(np.diff(sizes, prepend=-1))
        packed = sizes[runs], np.diff(runs, append=sizes.size), self._first_groups.astype(np.uint32)
        return {**super().__getstate__(), "packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sizes, counts, first_groups = state.pop("packed")
        super().__setstate__(state)
        self._set_groups(np.repeat(sizes, counts), first_groups.astype(np.int64))

    def _read_labels(self) -> np.ndarray:
        return read_labels(self._rows)[0]

    @property
    def groups(self) -> np.ndarray:
        return self._groups

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        columns = {name: np.empty((len(ids), *c.shape), c.dtype) for name, c in self._schema.columns.items()}
        by_group = np.searchsorted(self._groups, ids, side="right") - 1
        order = np.argsort(by_group, kind="stable")
        touched, starts = np.unique(by_group[order], return_index=True)
        # Without ids there is one empty part and no group.
        positions = dict(zip(touched.tolist(), np.split(order, starts[1:]), strict=False))
        buffer, num_bytes = self._buffer(), 0
        for group in buffer.held_first(positions):
            table, group_bytes = buffer.group(group)
            num_bytes += group_bytes
            rows = ids[positions[group]] - self._groups[group]
            inputs, columns["label"][positions[group]] = self._decode(table.take(pa.array(rows)), group, rows)
            columns[self._schema.input][positions[group]] = inputs
        return columns, num_bytes

    def _decode(self, table: pa.Table, group: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and the labels of rows of a group."""
        file, first = self._location(group)
        labels, _ = as_labels(self._rows, file, table.column(self._rows.label_column))
        if self._rows.images is None:
            values = feature_values(self._rows, table)
            for position, problem in non_finite_rows(self._rows, values):
                raise bad_row(file, first + int(rows[position]), problem)
            return values, labels
        encoded = table.column(self._rows.image_column).to_pylist()
        images = self._rows.images
        return decode_rows(encoded, images, lambda position: f"{file} row {first + rows[position]}"), labels

    def prepare(self) -> None:
        """Clear this process's buffer: the bytes that a run counts must not depend on earlier reads."""
        self._buffer().clear()

    def readable(self) -> np.ndarray:
        """Decode all rows, and return which can be read, (N,) bool."""
        readable = np.zeros(len(self), dtype=bool)
        for group, (first, stop) in enumerate(pairwise(self._groups.tolist())):
            try:
                table, _ = self._buffer().group(group)
            except OSError as error:
                logger.warning("%s", error)
                continue
            file, file_row = self._location(group)
            _, readable[first:stop] = as_labels(self._rows, file, table.column(self._rows.label_column))
            for start in range(0, stop - first, _CHECKED_ROWS):
                part = slice(first + start, min(first + start + _CHECKED_ROWS, stop))
                readable[part] &= self._readable(table.slice(start, _CHECKED_ROWS), file, file_row + start)
        return readable

    def _readable(self, table: pa.Table, file: ShardFile, start: int) -> np.ndarray:
        if self._rows.images is None:
            return np.asarray(np.isfinite(feature_values(self._rows, table)).all(axis=1))
        encoded = table.column(self._rows.image_column).to_pylist()
        return readable_rows(encoded, self._rows.images, lambda position: f"{file} row {start + position}")

    def _buffer(self) -> GroupBuffer:
        return shared_buffer(self._rows, self._fingerprint, self._first_groups, self._buffer_bytes)

    def _location(self, group: int) -> tuple[ShardFile, int]:
        """Return a group's file and the number of its first row there."""
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        return self._rows.files[number], int(self._groups[group] - self._groups[self._first_groups[number]])


class GroupBuffer:
    """Reads row groups, and keeps `buffer_bytes` of the most recently used ones; several threads may use it.

    File d has the groups first_groups[d]..first_groups[d+1]-1; first_groups is (D+1,) int64.
    """

    def __init__(self, rows: ParquetRows, first_groups: np.ndarray, buffer_bytes: int) -> None:
        self._rows, self._first_groups, self._buffer_bytes = rows, first_groups, buffer_bytes
        self._lock = threading.Lock()
        self._open: Callable[[int], pq.ParquetFile] = lru_cache(OPEN_FILES)(lambda number: rows.files[number].open())
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._held_bytes = 0

    def clear(self) -> None:
        """Drop all groups."""
        with self._lock:
            self._held.clear()
            self._held_bytes = 0

    def held_first(self, groups: Iterable[int]) -> list[int]:
        """Return groups, starting with those in the buffer, which reading the others might evict."""
        with self._lock:
            return sorted(groups, key=lambda group: group not in self._held)

    def group(self, group: int) -> tuple[pa.Table, int]:
        """Return a group's encoded columns, and the compressed bytes read for them, 0 if they are in the buffer.

        Raises:
            OSError: it can't be read.
        """
        with self._lock:
            if group in self._held:
                self._held.move_to_end(group)
                return self._held[group], 0
            table, num_bytes = self._read(group)
            self._held[group] = table
            self._held_bytes += table.nbytes
            while self._held_bytes > self._buffer_bytes:
                self._held_bytes -= self._held.popitem(last=False)[1].nbytes
            return table, num_bytes

    def _read(self, group: int) -> tuple[pa.Table, int]:
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        place = group - int(self._first_groups[number])
        rows = self._rows
        try:
            file = self._open(number)
            columns = [*input_columns(rows, file.schema_arrow), rows.label_column]
            table = file.read_row_group(place, columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            where = f"{rows.files[number]} row group {place}"
            cure = cure_of(error, f"restore it, or {LEAVE_OUT}")
            raise OSError(f"{where} can't be read ({one_line(error, 120)}): {cure}") from None
        metadata = file.metadata.row_group(place)
        chunks = [metadata.column(position) for position in range(metadata.num_columns)]
        num_bytes = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)
        encoded = {name: plain_values(encoded_values(table.column(name))) for name in table.column_names}
        return pa.table(encoded), num_bytes


_buffers: OrderedDict[Any, GroupBuffer] = OrderedDict()
_buffers_lock = threading.Lock()


def shared_buffer(rows: ParquetRows, fingerprint: str, first_groups: np.ndarray, buffer_bytes: int) -> GroupBuffer:
    """Return this process's buffer of a source; every read task has its own copy of the source."""
    key = (fingerprint, buffer_bytes, *map(str, rows.files))
    with _buffers_lock:
        if key not in _buffers:
            _buffers[key] = GroupBuffer(rows, first_groups, buffer_bytes)
        _buffers.move_to_end(key)
        while len(_buffers) > _BUFFERS:
            _buffers.popitem(last=False)
        return _buffers[key]
