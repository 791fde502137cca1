"""Columns of a Hugging Face Dataset: which hold the inputs and labels, and their Arrow values as NumPy's.

Shapes: N samples, B batch, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayprune.sources.parquet_layout import find_columns, hub_class_names


@dataclass(frozen=True)
class Columns:
    """Which columns to read, and how: the user's keys, None where they are to be found."""

    image: str | None
    label: str | None
    features: tuple[str, ...] | None
    image_size: int | None


def choose_columns(named: Path, schema: pa.Schema, columns: Columns) -> tuple[str | None, str, tuple[str, ...]]:
    """Choose the columns as for Parquet files, where a list of numbers counts as one.

    Args:
        named: the data set, for messages.
        schema: Arrow's, with the library's metadata.
        columns: the user's choice.

    Returns:
        The image column or None, the label column, and the feature columns, which are empty for images.

    Raises:
        ValueError: a column given is missing or of a wrong type, or none suits.
    """
    kinds = [field.with_type(pa.float64()) if _is_vector(field.type) else field for field in schema]
    label = columns.label
    if label is None:
        classes = [name for name in schema.names if hub_class_names(schema, name)]
        label = classes[0] if len(classes) == 1 else None
    return find_columns(named, pa.schema(kinds, schema.metadata), columns.image, label, columns.features)


def _is_vector(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
    return False


def label_names(values: pa.ChunkedArray) -> tuple[str, ...]:
    """Return the sorted unique strings of a label column; empty where it holds no strings."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return ()
    return tuple(sorted(value for value in values.unique().to_pylist() if value is not None))


def class_numbers(values: pa.ChunkedArray, names: tuple[str, ...], named: str) -> np.ndarray:
    """Return labels as class numbers, (N,) int64.

    Args:
        values: integers or strings.
        names: the strings that stand for 0, 1, …; empty for integers.
        named: the column, for messages.

    Raises:
        ValueError: a row has no label, one that is not among the names, or labels are of another type.
    """
    if values.null_count:
        row = int(np.argmax(np.asarray(values.is_null())))
        raise ValueError(f"{named} has no label in row {row}: add it, or leave the row out with Dataset.filter")
    kind = values.type
    if names and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        numbers = pc.index_in(values.cast(pa.string()), value_set=pa.array(names, pa.string()))
        if numbers.null_count:
            row = int(np.argmax(np.asarray(numbers.is_null())))
            raise ValueError(
                f"{named} row {row} has label {values[row].as_py()!r}, which no training row has: correct it"
            )
        return np.asarray(numbers.cast(pa.int64()))
    if names or not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{named} is {kind}: labels must be ClassLabel, integers or strings, alike in all splits")
    return np.asarray(values.cast(pa.int64()))


def image_bytes(value: dict[str, Any] | None) -> bytes | None:
    """Return an image's bytes; those that the data set only names are read from their file."""
    if value is None:
        return None
    if value["bytes"] is not None or not value.get("path"):
        encoded: bytes | None = value["bytes"]
        return encoded
    try:
        return Path(value["path"]).read_bytes()
    except OSError:
        return None


def encoded_lengths(dataset: Any, column: str) -> np.ndarray:
    """Return the encoded images' bytes, (N,) int64; reads no image."""
    values = dataset.data.column(column)
    encoded = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
    lengths = np.array(pc.binary_length(encoded).fill_null(0), dtype=np.int64)
    if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        outside = np.flatnonzero(np.asarray(encoded.is_null()))
        paths = pc.struct_field(values, "path").take(pa.array(outside)).to_pylist()
        lengths[outside] = [_file_bytes(path) for path in paths]
    chosen = getattr(dataset, "_indices", None)  # rows that `select` or `shuffle` left, without copying them
    return lengths if chosen is None else lengths[np.asarray(chosen.column(0), dtype=np.int64)]


def _file_bytes(path: str | None) -> int:
    try:
        return Path(path).stat().st_size if path else 0
    except OSError:
        return 0


def matrix(values: pa.ChunkedArray, name: str, named: Callable[[int], str], ids: np.ndarray) -> np.ndarray:
    """Return numbers, or lists of equally many, as (B, F) float64.

    Args:
        values: B rows of a column.
        name: the column's, for messages.
        named: says which row an id is, for messages.
        ids: (B,) int64 of the rows.

    Raises:
        ValueError: a row is null, or lists are of several lengths.
    """
    if values.null_count:
        row = int(ids[int(np.argmax(np.asarray(values.is_null())))])
        raise ValueError(f"{named(row)} is null in column {name!r}: correct it, or leave the row out")
    if not _is_vector(values.type):
        return np.asarray(values.cast(pa.float64(), safe=False)).reshape(-1, 1)
    lengths = np.asarray(pc.list_value_length(values))
    if len(np.unique(lengths)) > 1:
        other = int(np.argmax(lengths != lengths[0]))
        raise ValueError(
            f"{named(int(ids[other]))} has {lengths[other]} numbers in column {name!r} and row {ids[0]} has "
            f"{lengths[0]}: give all rows equally many"
        )
    return np.asarray(pc.list_flatten(values).cast(pa.float64(), safe=False)).reshape(len(values), -1)
