"""Rows of Parquet files, read once into the decoded cache: images decoded, numeric columns as float32.

Random access into Parquet reads and decompresses a whole row group for one row, hence the cache.

Shapes: N rows of all files, H height, W width, C channels, F features.

Parquet files on any file system, and which of them can be used.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayprune.errors import DataError, UnreadableImage
from rayprune.sources.cache import new_array
from rayprune.sources.fingerprint import digest, file_digest
from rayprune.sources.images import decode_image
from rayprune.sources.storage import Storage, one_line, public

logger = logging.getLogger(__name__)

LEFT_OUT = "or leave it out with data.on_error=skip"
# The end of a file that is not local: its footer names the place, size and statistics of every column chunk.
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardFile:
    """One Parquet file; pickles into its place.

    Attributes:
        storage: the folder, or the file itself.
        relative: the path below the folder; empty for the file itself.
    """

    storage: Storage
    relative: str = ""

    def __str__(self) -> str:
        place = public(self.storage.path)
        return f"{place.rstrip('/')}/{self.relative}" if self.relative else place

    @property
    def name(self) -> str:
        """The name without its folders."""
        return str(self).rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.removesuffix(".parquet")

    @property
    def _where(self) -> str:
        return self.storage.full(self.relative)

    def open(self) -> pq.ParquetFile:
        """Open the file; far away, neighbouring columns come in one request."""
        return pq.ParquetFile(
            self._where, filesystem=self.storage.filesystem, pre_buffer=not self.storage.is_local, memory_map=False
        )

    def metadata(self) -> pq.FileMetaData:
        """Read the footer."""
        return pq.read_metadata(self._where, filesystem=self.storage.filesystem)

    def schema(self) -> pa.Schema:
        """Read the schema."""
        return pq.read_schema(self._where, filesystem=self.storage.filesystem)

    def column(self, name: str) -> pa.ChunkedArray:
        """Read one column whole; dictionary-encoded values come as plain ones."""
        table = pq.read_table(self._where, filesystem=self.storage.filesystem, columns=[name], partitioning=None)
        return plain_values(table.column(name))

    def digest(self) -> str:
        """Return the content's digest; of a file that is not local that of its length and its last MiB.

        Reading it all over a network would cost as much as an epoch.
        """
        if self.storage.is_local:
            return file_digest(Path(self._where))
        with self.storage.open(self.relative) as file:
            size = file.size()
            start = max(0, size - _TAIL_BYTES)
            return digest("tail", size, bytes(file.read_at(size - start, start)).hex())


def plain_values(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without its dictionary."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def usable_files(
    files: tuple[ShardFile, ...], check: Callable[[ShardFile], object], skip_errors: bool
) -> tuple[ShardFile, ...]:
    """Return the files that `check` can read and finds no fault with.

    Raises:
        ValueError: a file is damaged or at fault, and skip_errors is off.
    """
    usable = []
    for file in files:
        try:
            check(file)
        except (ValueError, OSError) as error:  # pyarrow's own error is a ValueError too
            damaged = isinstance(error, pa.ArrowInvalid | OSError)
            fault = f"{file} is not a readable Parquet file ({one_line(error, 120)})" if damaged else str(error)
            if not skip_errors:
                raise DataError(f"{fault}: {'restore' if damaged else 'correct'} it, {LEFT_OUT}") from None
            logger.warning("left out: %s", fault)
        else:
            usable.append(file)
    return tuple(usable)


BATCH_ROWS = 1024
ROWS_PER_TASK = 64
TASKS_PER_THREAD = 16
# Smaller images spend their time in Python, where two threads were measured to be slower than one.
THREADED_PIXELS = 1 << 15
# A row that can't be used: its number in the file, and why.
BadRow = tuple[int, str]


@dataclass(frozen=True)
class ParquetRows:
    """Which rows of which files: all a process needs to read them for itself.

    Attributes:
        files: in the order of the rows.
        label_column: integers, or strings when there are label_names.
        label_names: the strings that stand for the labels 0, 1, …; empty for integer labels.
        image_column: the encoded images; None for numeric rows.
        feature_columns: the numeric columns; empty for images.
        shape: of one row, (H, W, C) or (F,).
        skip_errors: mark rows that can't be read instead of refusing them.
        image_size: pixels that every image is scaled and cut to; None keeps its own size.
    """

    files: tuple[ShardFile, ...]
    label_column: str
    label_names: tuple[str, ...]
    image_column: str | None
    feature_columns: tuple[str, ...]
    shape: tuple[int, ...]
    skip_errors: bool
    image_size: int | None = None


def read_labels(rows: ParquetRows) -> tuple[np.ndarray, np.ndarray]:
    """Read all labels.

    Returns:
        labels (N,) int64, and whether a row has one (N,) bool; a row without is labelled 0.

    Raises:
        ValueError: labels are neither integers nor strings, a string is not among the label_names, or a row has no
            label and skip_errors is off.
    """
    parts = [_file_labels(rows, file) for file in rows.files]
    return np.concatenate([labels for labels, _ in parts]), np.concatenate([present for _, present in parts])


def _file_labels(rows: ParquetRows, file: ShardFile) -> tuple[np.ndarray, np.ndarray]:
    return as_labels(rows, file, file.column(rows.label_column))


def as_labels(rows: ParquetRows, file: ShardFile, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a label column as int64, and which rows have one; see `read_labels`."""
    present = np.asarray(values.is_valid())
    if not present.all() and not rows.skip_errors:
        raise bad_row(file, (int(np.argmin(present)), f"has no {rows.label_column}"))
    if rows.label_names:
        labels = pc.index_in(values.cast(pa.string()), value_set=pa.array(rows.label_names, pa.string()))
        unknown = np.flatnonzero(present & np.asarray(labels.is_null()))
        if len(unknown):
            label = values[int(unknown[0])].as_py()
            raise DataError(f"{file} row {unknown[0]} has label {label!r}, which no training row has: correct it")
    elif pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        labels = values
    else:
        raise DataError(f"{file} column {rows.label_column!r} is {values.type}: labels must be integers or strings")
    try:
        return np.asarray(labels.cast(pa.int64()).fill_null(0)), present
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{file} column {rows.label_column!r} holds no class numbers ({one_line(error, 120)})"
        ) from None


def first_image_shape(rows: ParquetRows) -> tuple[int, ...]:
    """Return the shape (H, W, C) of the first image that can be read, which the others must have too.

    Raises:
        ValueError: it is unreadable and skip_errors is off, none is readable, or it is deeper than 8 bits.
    """
    for file in rows.files:
        for start, encoded in _encoded_images(file, str(rows.image_column)):
            for offset, content in enumerate(encoded):
                try:
                    return decode_image(content, size=rows.image_size).shape
                except UnreadableImage as error:
                    if not rows.skip_errors:
                        raise bad_row(file, (start + offset, f"is no readable image ({error})")) from None
                except ValueError as error:
                    raise DataError(f"{file} row {start + offset}: {error}") from None
    raise DataError(
        f"{public(rows.files[0].storage.path)} holds no readable image in column {rows.image_column!r}: correct it"
    )


def build_rows(rows: ParquetRows, folder: Path) -> None:
    """Write a cache entry: `image` (N, H, W, C) uint8 or `features` (N, F) float32, `label`, and `readable` (N,) bool.

    Unreadable rows keep their place, so that row numbers stay those of the files.

    Raises:
        ValueError: images of several sizes, or a row or file can't be read and skip_errors is off.
    """
    labels, readable = read_labels(rows)
    name, dtype = ("image", "uint8") if rows.image_column is not None else ("features", "float32")
    target = new_array(folder, name, dtype, (len(labels), *rows.shape))
    fill = _fill_images if name == "image" else _fill_features
    first = 0
    for file in rows.files:
        num_rows = file.metadata().num_rows
        for row, reason in fill(rows, file, target[first : first + num_rows]):
            if not rows.skip_errors:
                raise bad_row(file, (row, reason))
            readable[first + row] = False
        first += num_rows
    target.flush()
    np.save(folder / "label.npy", labels)
    np.save(folder / "readable.npy", readable)


def _batches(file: ShardFile, columns: list[str]) -> Iterator[tuple[int, int, pa.RecordBatch | None]]:
    """Yield the first row, the number of rows and the values of each batch; None for what a damaged row group lacks."""
    with file.open() as parquet:
        end = 0
        for group in range(parquet.num_row_groups):
            start, end = end, end + parquet.metadata.row_group(group).num_rows
            try:
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield start, batch.num_rows, batch
                    start += batch.num_rows
            except (pa.ArrowInvalid, OSError) as error:
                logger.warning("%s is damaged in rows %d to %d: %s", file, start, end - 1, one_line(error, 120))
            if start < end:
                yield start, end - start, None


def _encoded_images(file: ShardFile, column: str) -> Iterator[tuple[int, list[bytes | None]]]:
    leaf = image_leaf(file.schema(), column)
    for start, num_rows, batch in _batches(file, [leaf]):
        yield start, [None] * num_rows if batch is None else encoded_values(batch.column(0)).to_pylist()


def image_leaf(schema: pa.Schema, column: str) -> str:
    """Return what is to be read of an image column: of the hub's structs the `bytes` alone."""
    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def encoded_values(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return the encoded images of an image column."""
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


def _fill_images(rows: ParquetRows, file: ShardFile, target: np.ndarray) -> Iterator[BadRow]:
    num_threads = (os.cpu_count() or 1) if target.shape[1] * target.shape[2] >= THREADED_PIXELS else 1
    pending: deque[Future[list[BadRow]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for start, encoded in _encoded_images(file, str(rows.image_column)):
            for offset in range(0, len(encoded), ROWS_PER_TASK):
                task = encoded[offset : offset + ROWS_PER_TASK]
                pending.append(pool.submit(_decode_into, target, rows, file, start + offset, task))
            # Row groups may be smaller than what keeps all threads busy, files larger than memory.
            while len(pending) > TASKS_PER_THREAD * num_threads:
                yield from pending.popleft().result()
        for rest in pending:
            yield from rest.result()


def _decode_into(
    target: np.ndarray, rows: ParquetRows, file: ShardFile, start: int, encoded: list[bytes | None]
) -> list[BadRow]:
    bad = []
    for row, content in enumerate(encoded, start):
        try:
            target[row] = decode_row(rows, file, row, content)
        except UnreadableImage as error:
            bad.append((row, f"is no readable image ({error})"))
    return bad


def decode_row(
    rows: ParquetRows, file: ShardFile, row: int, content: bytes | None, pixels: np.ndarray | None = None
) -> np.ndarray:
    """Decode the image of a row into the shape of all; `pixels` are what it has been decoded to, where it has.

    Raises:
        UnreadableImage: as `decode_image`.
        ValueError: the image is deeper than 8 bits, or of another size than the first one.
    """
    try:
        if pixels is None:
            pixels = decode_image(content, rows.shape[2], rows.image_size)
    except UnreadableImage:
        raise
    except ValueError as error:
        raise DataError(f"{file} row {row}: {error}") from None
    if pixels.shape != rows.shape:
        (height, width), (first_height, first_width) = pixels.shape[:2], rows.shape[:2]
        raise DataError(
            f"{file} row {row} is an image of {width}×{height} pixels and the first one has "
            f"{first_width}×{first_height}: resize them all to one size before storing them, or set data.image_size"
        )
    return pixels


def _fill_features(rows: ParquetRows, file: ShardFile, target: np.ndarray) -> Iterator[BadRow]:
    for start, num_rows, batch in _batches(file, list(rows.feature_columns)):
        if batch is None:
            yield from ((row, "lies in a damaged part of the file") for row in range(start, start + num_rows))
            continue
        values = feature_values(rows, batch)
        target[start : start + num_rows] = values
        yield from ((start + row, reason) for row, reason in not_finite(rows, values))


def feature_values(rows: ParquetRows, batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """Return the numeric columns as (rows, F) float32."""
    values = np.empty((batch.num_rows, len(rows.feature_columns)), dtype=np.float32)
    for position, name in enumerate(rows.feature_columns):
        with np.errstate(over="ignore"):
            values[:, position] = batch.column(name).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def not_finite(rows: ParquetRows, values: np.ndarray) -> list[BadRow]:
    """Return which rows of numeric values have one that is none."""
    return [
        (int(row), f"is null, NaN or infinite in column {rows.feature_columns[position]!r}")
        for row, position in np.argwhere(~np.isfinite(values))
    ]


def bad_row(file: ShardFile, bad: BadRow) -> ValueError:
    """Return the error that names a row."""
    return DataError(f"{file} row {bad[0]} {bad[1]}: correct it, {LEFT_OUT}")
