"""Rows of Parquet files decoded at every visit: no cache, so the data may be larger than memory and disk.

A row group is read as a whole, whatever is asked of it. Each process keeps the encoded columns of the last ones, up to
`buffer_bytes`: plans visit such rows in windows of groups (rayprune.core.plan), so that a group is read about once
by each process that visits its window. Where a window's groups are larger than the buffer, what does not fit is read
again for every span of rows. Pruning saves decoding here, and reading only where a group has no kept row left.

Shapes: N rows of all files, B batch, G row groups of all files, D files.

Row groups of Parquet files, read whole, the last ones kept in memory: one buffer a source and process.

Shapes: D files.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayprune.errors import UnreadableImage
from rayprune.sources.base import SampleSource, Schema, check_ids
from rayprune.sources.images import decode_in_threads
from rayprune.sources.parquet.reader import (
    LEFT_OUT,
    BadRow,
    ParquetRows,
    ShardFile,
    as_labels,
    bad_row,
    decode_row,
    encoded_values,
    feature_values,
    image_leaf,
    not_finite,
    plain_values,
    read_labels,
)
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


logger = logging.getLogger(__name__)

BUFFER_BYTES = 64 * 1024 * 1024
_CHECKED_ROWS = 256


class ParquetGroups(SampleSource):
    """Rows decoded from row groups; `read` counts the compressed bytes of the column chunks that it really read.

    Pickles into places and sizes; the copies in one process share one buffer.

    Args:
        rows: which files and columns.
        schema: the columns.
        fingerprint: of the samples.
        labels: (N,) int64; kept in this process only, the others read the label column.
        buffer_bytes: how much of the encoded columns each process keeps.
    """

    def __init__(
        self, rows: ParquetRows, schema: Schema, fingerprint: str, labels: np.ndarray, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        self._rows, self._schema, self._fingerprint = rows, schema, fingerprint
        self._buffer_bytes = buffer_bytes
        self._labels: np.ndarray | None = labels
        footers = [file.metadata() for file in rows.files]
        sizes = [footer.row_group(place).num_rows for footer in footers for place in range(footer.num_row_groups)]
        counts = [footer.num_row_groups for footer in footers]
        self._set_groups(np.array(sizes, dtype=np.int64), np.cumsum([0, *counts]))

    def _set_groups(self, sizes_G: np.ndarray, first_groups: np.ndarray) -> None:
        self._first_groups = first_groups  # (D+1,): which groups are a file's
        self._groups = np.concatenate([[0], np.cumsum(sizes_G)])

    def __getstate__(self) -> dict[str, Any]:
        # Row groups of one size, which is what writers make, travel as runs: pickles go out with every read task.
        sizes = np.diff(self._groups)
        runs = np.flatnonzero(np.diff(sizes, prepend=-1))
        kept = {name: value for name, value in vars(self).items() if name not in {"_groups", "_first_groups"}}
        packed = sizes[runs], np.diff(runs, append=sizes.size), self._first_groups.astype(np.uint32)
        return {**kept, "_labels": None, "packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sizes, counts, first_groups = state["packed"]
        vars(self).update({name: value for name, value in state.items() if name != "packed"})
        self._set_groups(np.repeat(sizes, counts), first_groups.astype(np.int64))

    def __len__(self) -> int:
        return int(self._groups[-1])

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        if self._labels is None:
            self._labels, _ = read_labels(self._rows)
        return self._labels

    @property
    def groups(self) -> np.ndarray:
        return self._groups

    @property
    def row_cost(self) -> Literal["expensive"]:
        return "expensive"

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        columns = {name: np.empty((len(ids), *c.shape), c.dtype) for name, c in self._schema.columns.items()}
        by_group = np.searchsorted(self._groups, ids, side="right") - 1
        order = np.argsort(by_group, kind="stable")
        touched, starts = np.unique(by_group[order], return_index=True)
        # Without ids there is one empty part and no group.
        places = dict(zip(touched.tolist(), np.split(order, starts[1:]), strict=False))
        buffer, num_bytes = self._buffer(), 0
        for group in buffer.held_first(places):
            encoded, read = buffer.group(group)
            num_bytes += read
            rows = ids[places[group]] - self._groups[group]
            decoded, bad = self._decoded(encoded, group, rows)
            if bad:
                file, first = self._place(group)
                raise bad_row(file, (first + bad[0][0], bad[0][1]))
            for name, values in decoded.items():
                columns[name][places[group]] = values
        return columns, num_bytes

    def prepare(self) -> None:
        """Empty this process's buffer: the bytes that a run counts must not depend on what was read before it."""
        self._buffer().clear()

    def readable(self) -> np.ndarray:
        """Decode everything once; return which rows can be, (N,) bool."""
        readable = np.zeros(len(self), dtype=bool)
        for group, (first, stop) in enumerate(pairwise(self._groups.tolist())):
            try:
                encoded, _ = self._buffer().group(group)
            except OSError as error:
                logger.warning("%s", error)
                continue
            _, readable[first:stop] = as_labels(self._rows, self._place(group)[0], encoded.labels)
            for start in range(0, stop - first, _CHECKED_ROWS):
                rows = np.arange(start, min(start + _CHECKED_ROWS, stop - first))
                readable[[first + row for row, _ in self._decoded(encoded, group, rows)[1]]] = False
        return readable

    def _buffer(self) -> GroupBuffer:
        return shared_buffer(self._rows, self._fingerprint, self._first_groups, self._buffer_bytes)

    def _place(self, group: int) -> tuple[ShardFile, int]:
        """Return a group's file and the number of its first row there."""
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        return self._rows.files[number], int(self._groups[group] - self._groups[self._first_groups[number]])

    def _decoded(
        self, encoded: EncodedGroup, group: int, rows: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[BadRow]]:
        """Decode rows of a group; return the columns, and the rows that can't be, by their numbers in the group."""
        file, first = self._place(group)
        labels, _ = as_labels(self._rows, file, encoded.labels.take(pa.array(rows)))
        if self._rows.image_column is None:
            values = feature_values(self._rows, encoded.inputs.take(pa.array(rows)))
            bad = [(int(rows[place]), reason) for place, reason in not_finite(self._rows, values)]
            return {self._schema.input: values, "label": labels}, bad
        values, bad = np.empty((rows.size, *self._rows.shape), np.uint8), []
        contents = encoded.inputs.take(pa.array(rows)).to_pylist()
        decoded = decode_in_threads(contents, self._rows.shape[2], self._rows.image_size)
        for place, row in enumerate(rows.tolist()):
            try:
                values[place] = decode_row(self._rows, file, first + row, contents[place], decoded[place])
            except UnreadableImage as error:
                bad.append((row, f"is no readable image ({error})"))
        return {self._schema.input: values, "label": labels}, bad
