"""Parquet files on any file system: labels, encoded images and numeric columns, and their decoded cache.

Random access into Parquet reads and decompresses a whole row group for one row, hence the cache.

Shapes: N rows of all files, H height, W width, C channels, F features.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayprune.errors import DataError, UnreadableImage
from rayprune.sources.cache import new_array
from rayprune.sources.fingerprint import digest, file_digest
from rayprune.sources.images.decode import LEAVE_OUT, ImageShape, decode_each, first_shape
from rayprune.sources.storage import Storage, cure_of, one_line

logger = logging.getLogger(__name__)

BATCH_ROWS = 1024
ROWS_PER_TASK = 64
TASKS_PER_THREAD = 16
# Smaller images spend their time in Python: two threads were measured to be slower than one.
THREADED_PIXELS = 1 << 15
# The end of a remote file: its footer holds the position, size and statistics of every column chunk.
_TAIL_BYTES = 1 << 20
# A row that can't be used: its number in the file, and the error that names it.
BadRow = tuple[int, DataError]


@dataclass(frozen=True)
class ShardFile:
    """One Parquet file; pickles into its path.

    Attributes:
        storage: the folder, or the file itself.
        relative: the path below the folder; empty for the file itself.
    """

    storage: Storage
    relative: str = ""

    def __str__(self) -> str:
        return self.storage.public(self.relative)

    @property
    def _path(self) -> str:
        return self.storage.full(self.relative)

    def open(self) -> pq.ParquetFile:
        """Open the file; a remote one reads neighboring columns in one request."""
        return pq.ParquetFile(
            self._path,
            filesystem=self.storage.filesystem,
            pre_buffer=not self.storage.is_local,
            memory_map=False,
            page_checksum_verification=True,  # of pages that have one
        )

    def metadata(self) -> pq.FileMetaData:
        """Read the footer."""
        return pq.read_metadata(self._path, filesystem=self.storage.filesystem)

    def check_rows(self) -> None:
        """Refuse a file that claims more rows than the memory has room for their labels.

        Raises:
            DataError: it does.
        """
        num_rows, free = self.metadata().num_rows, psutil.virtual_memory().available
        if 8 * num_rows > free:
            raise DataError(
                f"{self} claims {num_rows:,} rows, whose labels take {8 * num_rows / 1e9:,.0f} GB, and "
                f"{free / 1e9:.0f} GB of memory are free"
            )

    def schema(self) -> pa.Schema:
        """Read the schema."""
        return pq.read_schema(self._path, filesystem=self.storage.filesystem)

    def column(self, name: str) -> pa.ChunkedArray:
        """Read one whole column; dictionary-encoded values are decoded."""
        with self.open() as file:
            values = file.read(columns=[name]).column(name)
            if len(values) != file.metadata.num_rows:
                raise DataError(f"{self} claims {file.metadata.num_rows:,} rows and has {len(values):,}")
            return plain_values(values)

    def digest(self) -> str:
        """Return the digest of the content; of a remote file, only that of its length and its last MiB.

        Reading all of a remote file would take as long as an epoch.
        """
        if self.storage.is_local:
            return file_digest(Path(self._path))
        with self.storage.open(self.relative) as file:
            size = file.size()
            start = max(0, size - _TAIL_BYTES)
            return digest("tail", size, bytes(file.read_at(size - start, start)).hex())


def usable_files(
    files: tuple[ShardFile, ...], check: Callable[[ShardFile], object], skip_errors: bool
) -> tuple[ShardFile, ...]:
    """Return the files that `check` can read and accepts.

    Raises:
        DataError: a file is damaged or refused, and skip_errors is off.
    """
    usable = []
    for file in files:
        try:
            check(file)
        except (ValueError, OSError) as error:  # pyarrow's own error is a ValueError too
            damaged = isinstance(error, pa.ArrowInvalid | OSError)
            fault = f"{file} is not a readable Parquet file ({one_line(error, 120)})" if damaged else str(error)
            usual = f"{'restore' if damaged else 'correct'} it, or {LEAVE_OUT}"
            cure = cure_of(error, usual)
            if not skip_errors or cure != usual:
                raise DataError(f"{fault}: {cure}") from None
            logger.warning("left out: %s", fault)
        else:
            usable.append(file)
    return tuple(usable)


@dataclass(frozen=True)
class ParquetRows:
    """The rows of a dataset; all that a process needs to read them.

    Attributes:
        files: in the order of the rows.
        label_column: integers, or strings if there are label_names.
        label_names: the strings of the labels 0, 1, …; empty for integer labels.
        image_column: the encoded images; None for numeric rows.
        feature_columns: the numeric columns; empty for images.
        skip_errors: leave out rows that can't be read instead of refusing them.
        images: the shape of every image; None for numeric rows.
    """

    files: tuple[ShardFile, ...]
    label_column: str
    label_names: tuple[str, ...]
    image_column: str | None
    feature_columns: tuple[str, ...]
    skip_errors: bool
    images: ImageShape | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row, (H, W, C) or (F,)."""
        return (len(self.feature_columns),) if self.images is None else self.images.shape

    def row_name(self, row: int) -> str:
        """Return the name of a row, 0..N-1, in messages; reads footers."""
        for file in self.files:
            num_rows = file.metadata().num_rows
            if row < num_rows:
                break
            row -= num_rows
        return f"{file} row {row}"


def read_labels(rows: ParquetRows) -> tuple[np.ndarray, np.ndarray]:
    """Return all labels, (N,) int64, and which rows have one, (N,) bool; a row without a label has 0.

    Raises:
        DataError: labels are neither integers nor strings, a string is not among the label_names, or a row has no
            label and skip_errors is off.
    """
    parts = [as_labels(rows, file, file.column(rows.label_column)) for file in rows.files]
    return np.concatenate([labels for labels, _ in parts]), np.concatenate([present for _, present in parts])


def as_labels(rows: ParquetRows, file: ShardFile, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of a column, and which rows have one, as `read_labels` does."""
    present = np.asarray(values.is_valid())
    if not present.all() and not rows.skip_errors:
        raise bad_row(file, int(np.argmin(present)), f"has no {rows.label_column}")
    if rows.label_names:
        labels = text_numbers(values, rows.label_names, str(file))
    elif pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        labels = values
    else:
        raise DataError(f"{file} column {rows.label_column!r} is {values.type}: labels must be integers or strings")
    try:
        return np.asarray(labels.cast(pa.int64()).fill_null(0)), present
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{file} column {rows.label_column!r} does not hold class numbers ({one_line(error, 120)}): "
            "correct it, or set data.label_column"
        ) from None


def first_image_shape(rows: ParquetRows, image_size: int | None, max_pixels: int) -> ImageShape:
    """Return the shape of the first readable image, which the others must have too; see `images.first_shape`."""
    batches = chain.from_iterable(_batches(file, input_columns(rows, file.schema())) for file in rows.files)
    images = chain.from_iterable(_encoded_images(batch, num_rows) for _, num_rows, batch in batches)
    owner = f"column {rows.image_column!r} of {rows.files[0].storage.public()}"
    on_error = "skip" if rows.skip_errors else "fail"
    return first_shape(images, rows.row_name, None, image_size, on_error=on_error, owner=owner, max_pixels=max_pixels)


def build_rows(rows: ParquetRows, folder: Path) -> None:
    """Write a cache entry: `image` (N, H, W, C) uint8 or `features` (N, F) float32, `label`, and `readable` (N,) bool.

    Unreadable rows keep their place, so that the row numbers are those of the files.

    Raises:
        DataError: images of several sizes, or a row or file can't be read and skip_errors is off.
    """
    labels, readable = read_labels(rows)
    name, dtype = ("features", "float32") if rows.images is None else ("image", "uint8")
    target = new_array(folder, name, dtype, (len(labels), *rows.shape))
    first = 0
    for file in rows.files:
        num_rows = file.metadata().num_rows
        for row, error in _fill(rows, file, target[first : first + num_rows]):
            if not rows.skip_errors:
                raise error
            readable[first + row] = False
        first += num_rows
    target.flush()
    np.save(folder / "label.npy", labels)
    np.save(folder / "readable.npy", readable)


def _fill(rows: ParquetRows, file: ShardFile, target: np.ndarray) -> Iterator[BadRow]:
    """Decode a file's rows into the target, (rows of the file, …); yield those that can't be used."""
    threaded = rows.images is not None and target.shape[1] * target.shape[2] >= THREADED_PIXELS
    num_threads = (os.cpu_count() or 1) if threaded else 1
    task_rows = BATCH_ROWS if rows.images is None else ROWS_PER_TASK
    pending: deque[Future[list[BadRow]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for start, num_rows, batch in _batches(file, input_columns(rows, file.schema())):
            for offset in range(0, num_rows, task_rows):
                part = None if batch is None else batch.slice(offset, task_rows)
                part_target = target[start + offset : start + min(offset + task_rows, num_rows)]
                pending.append(pool.submit(_fill_part, rows, file, start + offset, part, part_target))
            # Row groups may be too small to keep all threads busy, and files larger than memory.
            while len(pending) > TASKS_PER_THREAD * num_threads:
                yield from pending.popleft().result()
        for rest in pending:
            yield from rest.result()


def _fill_part(
    rows: ParquetRows, file: ShardFile, start: int, part: pa.RecordBatch | None, target: np.ndarray
) -> list[BadRow]:
    """Decode consecutive rows of a file, from row `start`; they are damaged if the part is None."""
    if rows.images is None:
        if part is None:
            problems = [(position, "is in a damaged part of the file") for position in range(len(target))]
        else:
            target[:] = feature_values(rows, part)
            problems = list(non_finite_rows(rows, target))
        return [(start + position, bad_row(file, start + position, problem)) for position, problem in problems]
    encoded = _encoded_images(part, len(target))
    bad: list[BadRow] = []
    for position, pixels in enumerate(decode_each(encoded, rows.images, lambda row: f"{file} row {start + row}")):
        if isinstance(pixels, UnreadableImage):
            bad.append((start + position, pixels))
        else:
            target[position] = pixels
    return bad


def _encoded_images(batch: pa.RecordBatch | None, num_rows: int) -> list[bytes | None]:
    return [None] * num_rows if batch is None else encoded_values(batch.column(0)).to_pylist()


def _batches(file: ShardFile, columns: list[str]) -> Iterator[tuple[int, int, pa.RecordBatch | None]]:
    """Yield the first row, number of rows and values of each batch; None for the values of a damaged row group."""
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


def plain_values(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without its dictionary."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def text_labels(values: pa.ChunkedArray) -> tuple[str, ...]:
    """Return the sorted unique strings of a label column, for labels 0, 1, …; empty for any other column."""
    return tuple(sorted(values.unique().drop_null().to_pylist())) if is_text(values.type) else ()


def text_numbers(values: pa.ChunkedArray, class_texts: tuple[str, ...], owner: str) -> pa.ChunkedArray:
    """Return the positions of labels among the strings of `text_labels`; null for a missing label.

    Raises:
        DataError: a label is not among them.
    """
    numbers = pc.index_in(values.cast(pa.string()), value_set=pa.array(class_texts, pa.string()))
    unknown = np.flatnonzero(np.asarray(values.is_valid()) & np.asarray(numbers.is_null()))
    if len(unknown):
        label = values[int(unknown[0])].as_py()
        raise DataError(f"{owner} row {unknown[0]} has label {label!r}, which no training row has: correct it")
    return numbers


def input_columns(rows: ParquetRows, schema: pa.Schema) -> list[str]:
    """Return the columns to read for the inputs: only the field `bytes` of the hub's image structs."""
    if rows.image_column is None:
        return list(rows.feature_columns)
    is_struct = pa.types.is_struct(schema.field(rows.image_column).type)
    return [f"{rows.image_column}.bytes" if is_struct else rows.image_column]


def encoded_values(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return the encoded images of an image column."""
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


def feature_values(rows: ParquetRows, batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """Return the numeric columns as (B, F) float32."""
    values = np.empty((batch.num_rows, len(rows.feature_columns)), dtype=np.float32)
    for position, name in enumerate(rows.feature_columns):
        with np.errstate(over="ignore"):
            values[:, position] = batch.column(name).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def non_finite_rows(rows: ParquetRows, values: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield the position and problem of each missing or infinite number among (B, F) values."""
    for position, column in np.argwhere(~np.isfinite(values)).tolist():
        yield position, f"is null, NaN or infinite in column {rows.feature_columns[column]!r}"


def bad_row(file: ShardFile, row: int, problem: str) -> DataError:
    """Return the error of a row, with its cure."""
    return DataError(f"{file} row {row} {problem}: correct it, or {LEAVE_OUT}")
