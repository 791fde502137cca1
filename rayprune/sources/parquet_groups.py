"""Rows of Parquet files decoded at every visit: no cache, so the data may be larger than memory and disk.

A row group is read as a whole, whatever is asked of it. Each process keeps the encoded columns of the last ones, up to
`buffer_bytes`: plans visit such rows in windows of groups (rayprune.core.windows), so that a group is read about once
by each process that visits its window. Where a window's groups are larger than the buffer, what does not fit is read
again for every span of rows. Pruning saves decoding here, and reading only where a group has no kept row left.

Shapes: N rows of all files, B batch, G row groups of all files, D files.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayprune.sources.base import SampleSource, Schema, check_ids
from rayprune.sources.images import UnreadableImage
from rayprune.sources.parquet_buffer import EncodedGroup, GroupBuffer, shared_buffer
from rayprune.sources.parquet_files import ShardFile
from rayprune.sources.parquet_rows import (
    BadRow,
    ParquetRows,
    as_labels,
    bad_row,
    decode_row,
    feature_values,
    not_finite,
    read_labels,
)
from rayprune.sources.unlocked import decode_in_threads

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
