"""The columns of a Hugging Face Dataset as they are, for users' own training loops.

Numbers keep their dtypes. Lists of equally many numbers become arrays, other lists of numbers ragged columns. Images
are decoded to (H, W, C) uint8. Text stays text, and anything else the Python object that Arrow makes of it.

Shapes: N samples, B batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayprune.core.references import closest
from rayprune.errors import DataError
from rayprune.sources.base import Column, DescribedSource, RowCost, SampleSource, Schema, check_ids, spaced_ids
from rayprune.sources.cache import CacheMode, check_mode, decoded
from rayprune.sources.datasets.columns import (
    NO_LABELS,
    check_names,
    column_digest,
    column_of,
    empty_column,
    find_label,
    object_array,
)
from rayprune.sources.datasets.huggingface import check_dataset, class_numbers, encoded_lengths, image_bytes
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images.decode import (
    MAX_PIXELS,
    ImageShape,
    check_size,
    decode_ragged,
    decode_rows,
    first_shape,
    image_sizes,
)
from rayprune.sources.parquet.layout import is_image
from rayprune.sources.parquet.reader import plain_values, text_labels

_NAME = "the dataset"
_CHUNK_ROWS = 1_024
_MEASURED_ROWS = 256


def columns_from_huggingface(
    dataset: Any,
    *,
    columns: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    cache: CacheMode = "none",
    cache_dir: str | None = None,
) -> SampleSource:
    """Return the columns of a `datasets.Dataset` as they are; one on disk pickles into its paths.

    Args:
        dataset: the Dataset, without a transform of its own; of its format only the choice of columns counts.
        columns: those to keep; default: all that its format has.
        image_column: one of encoded images that is not of type Image: binary, or a struct with `bytes`.
        label_column: ClassLabel, integers or strings, for methods that need labels; default: `label` or `labels`.
        image_size: pixels that the shorter side of `image_column`, or of all images, is scaled to, before the center
            square is cut out; default: as stored. Images of several sizes make a ragged column.
        max_pixels: refuse images whose header claims more pixels, before they are decoded.
        cache: `memory` or `disk` keeps the decoded rows; see `cache.decoded`.
        cache_dir: see `cache.cache_root`.

    Raises:
        ConfigError: `image_size` or `cache` is wrong.
        DataError: it is not a Dataset, it is empty, or a column is missing or unsuitable.
    """
    check_dataset(dataset)
    check_mode(cache)
    check_size(image_size, max_pixels)
    source = DatasetColumns(dataset, columns, image_column, label_column, (image_size, max_pixels))
    return decoded(source, cache, cache_dir)


class DatasetColumns(DescribedSource):
    """The columns of a Dataset; images are decoded at every visit.

    Args:
        dataset, columns, image_column, label_column: see columns_from_huggingface.
        sizes: its image_size and max_pixels.

    Raises:
        DataError: a column is missing or unsuitable, or there are no samples.
    """

    process_local = ("_labels", "_rows")

    def __init__(
        self,
        dataset: Any,
        columns: Sequence[str] | None,
        image_column: str | None,
        label_column: str | None,
        sizes: tuple[int | None, int],
    ) -> None:
        if len(dataset) == 0:
            raise DataError(f"{_NAME} has no rows: give one that has some")
        super().__init__(len(dataset), Schema({}), "")
        kinds = {field.name: field.type for field in dataset.features.arrow_schema}
        names = list(dataset.format["columns"] if columns is None else columns)
        for name in [*names, *([] if image_column is None else [image_column])]:
            if name not in kinds:
                raise DataError(f"{_NAME} has no column {name!r}: {closest(name, kinds)}")
        check_names(names)
        if image_column is not None and not is_image(kinds[image_column]):
            raise DataError(
                f"column {image_column!r} is {kinds[image_column]}: images must be binary or a struct with `bytes`"
            )
        self._label = find_label(kinds, label_column)
        self._dataset, self._names, self._rows = dataset, names, None
        self._images: dict[str, ImageShape] = {}
        schema: dict[str, Column] = {}
        for name in names:
            if name == image_column or type(dataset.features[name]).__name__ == "Image":
                resized = image_column in (None, name)
                schema[name] = self._image_column(name, sizes[0] if resized else None, sizes[1])
            else:
                schema[name] = self._column(name)
        self._schema = Schema(schema)
        described = [f"{name} {column.dtype} {column.shape}" for name, column in schema.items()]
        self._fingerprint = digest("dataset columns", len(self), *described, *self._content())

    @property
    def row_cost(self) -> RowCost:
        return "expensive" if self._images else "cheap"

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) == 0:
            return {name: empty_column(column, 0) for name, column in self.schema.columns.items()}, 0
        table = self._formatted()[ids]
        columns, num_bytes = {}, 0
        for name in self.schema.columns:
            if name in self._images:
                encoded = _encoded(table.column(name))
                columns[name] = self._decoded(name, encoded, ids)
                num_bytes += sum(len(content or b"") for content in encoded)
            else:
                columns[name] = self._values(name, table.column(name), ids)
                num_bytes += columns[name].nbytes
        return columns, num_bytes

    def _formatted(self) -> Any:
        """Return the Dataset in Arrow's format; pickles leave it out, as it is a copy."""
        with self._lock:
            if self._rows is None:
                self._rows = self._dataset.with_format("arrow", columns=self._names)
            return self._rows

    def _image_column(self, name: str, size: int | None, max_pixels: int) -> Column:
        images = (_encoded(self._formatted()[[row]].column(name))[0] for row in range(len(self)))
        first = first_shape(images, partial(_row_name, name), size=size, max_pixels=max_pixels)
        first = replace(first, option="image_size")
        self._images[name] = first
        shape, sampled = first.shape, self._formatted()[spaced_ids(len(self), _MEASURED_ROWS)].column(name)
        if size is None and len(sizes := image_sizes(_encoded(sampled))) > 1:
            widths, heights = ({*axis} for axis in zip(*sizes, strict=True))
            height, width = (axis.pop() if len(axis) == 1 else -1 for axis in (heights, widths))
            pixels = sum(width * height for width, height in sizes) // len(sizes)
            return Column((height, width, shape[2]), "uint8", pixels * shape[2])
        return Column(shape, "uint8")

    def _column(self, name: str) -> Column:
        stored = plain_values(_storage(self._dataset.data.column(name)))
        indices = getattr(self._dataset, "_indices", None)  # of rows that `select` or `shuffle` chose, without a copy
        shape, leaf, mean_bytes = _row_shape(stored, None if indices is None else np.asarray(indices.column(0)))
        if leaf is not None:
            return Column(shape, leaf.name, mean_bytes)
        sampled = self._formatted()[spaced_ids(len(self), _MEASURED_ROWS)].column(name)
        return replace(column_of(object_array(sampled.to_pylist())), shape=(), dtype="object")

    def _decoded(self, name: str, encoded: list[bytes | None], ids: np.ndarray) -> np.ndarray:
        def row_name(position: int) -> str:
            return _row_name(name, int(ids[position]))

        if self.schema.columns[name].is_ragged:
            return object_array(decode_ragged(encoded, self._images[name], row_name))
        return decode_rows(encoded, self._images[name], row_name)

    def _values(self, name: str, values: pa.ChunkedArray, ids: np.ndarray) -> np.ndarray:
        column, values = self.schema.columns[name], plain_values(_storage(values))
        if column.dtype == "object":
            return object_array(values.to_pylist())
        flat, lengths = values, None
        for axis in range(len(column.shape)):
            self._refuse_nulls(name, flat, values, ids)
            lengths = np.asarray(pc.list_value_length(flat)) if axis == 0 else lengths
            flat = pc.list_flatten(flat)
        self._refuse_nulls(name, flat, values, ids)
        numbers = np.ascontiguousarray(flat.to_numpy(), dtype=column.dtype)
        if not column.is_ragged:
            return numbers.reshape(len(ids), *column.shape)
        assert lengths is not None
        numbers = numbers.reshape(-1, *column.shape[1:])
        ends = np.cumsum(lengths)
        return object_array(numbers[end - length : end] for end, length in zip(ends, lengths, strict=True))

    def _refuse_nulls(self, name: str, flat: pa.ChunkedArray, values: pa.ChunkedArray, ids: np.ndarray) -> None:
        if flat.null_count:
            row = next(row for row, value in zip(ids, values.to_pylist(), strict=True) if _has_null(value))
            raise DataError(f"{_row_name(name, int(row))} is null or has one: correct it, or leave the row out")

    def _content(self) -> Iterator[str | np.ndarray]:
        """Yield the content to hash: all rows, or evenly spaced ones if they have more than 1 GiB."""
        num_bytes = sum(column.row_bytes for name, column in self.schema.columns.items() if name not in self._images)
        num_bytes *= len(self)
        for name in self._images:
            lengths = encoded_lengths(self._dataset, name)
            yield lengths
            num_bytes += int(lengths.sum())
        ids = spaced_ids(len(self), max(1, len(self) * WHOLE_BYTES // max(1, num_bytes)))
        for start in range(0, len(ids), _CHUNK_ROWS):
            chunk = ids[start : start + _CHUNK_ROWS]
            table = self._formatted()[chunk]
            for name in self.schema.columns:
                if name in self._images:
                    yield digest(*(np.frombuffer(content or b"", np.uint8) for content in _encoded(table.column(name))))
                else:
                    yield column_digest(self._values(name, table.column(name), chunk))

    def _read_labels(self) -> np.ndarray:
        if self._label is None:
            raise DataError(NO_LABELS)
        values = self._dataset.with_format("arrow", columns=[self._label])[:].column(self._label)
        return class_numbers(values, text_labels(values), f"column {self._label!r}")


def _row_name(column: str, row: int) -> str:
    return f"column {column!r} of row {row}"


def _has_null(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_has_null, value)))


def _encoded(values: pa.ChunkedArray) -> list[bytes | None]:
    """Return the encoded images of a column; None for a missing one."""
    images: list[Any] = values.to_pylist()
    return [image_bytes(image) for image in images] if pa.types.is_struct(values.type) else images


def _storage(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the nested lists of the library's Array2D to Array5D; other values unchanged."""
    if not isinstance(values.type, pa.ExtensionType):
        return values
    return pa.chunked_array([chunk.storage for chunk in values.chunks], values.type.storage_type)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _row_shape(values: pa.ChunkedArray, rows: np.ndarray | None) -> tuple[tuple[int, ...], np.dtype | None, int]:
    """Return the shape of a column's rows, the dtype of their numbers and the mean bytes of a row.

    Args:
        values: the stored column.
        rows: the rows that count; None for all.

    Returns:
        A shape whose first axis is -1 if the rows have several lengths. The dtype is None for rows that are not
        numbers, and for lists of lists of several lengths.
    """
    shape: list[int] = []
    while _is_list(values.type):
        lengths = np.asarray(pc.list_value_length(values).fill_null(0))
        if rows is not None and not shape:
            lengths = lengths[rows]
        shape.append(int(lengths[0]) if len(lengths) and (lengths == lengths[0]).all() else -1 if len(lengths) else 0)
        if len(shape) == 1:
            mean_length = float(lengths.mean()) if len(lengths) else 0.0
        values = pc.list_flatten(values)
    kind = values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not is_number or -1 in shape[1:]:
        return (), None, 0
    dtype = np.dtype(kind.to_pandas_dtype())
    inner = int(np.prod(shape[1:])) * dtype.itemsize
    return tuple(shape), dtype, int(np.ceil(mean_length * inner)) if -1 in shape else 0
