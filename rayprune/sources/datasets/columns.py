"""Columns of data that come through as they are: their names, and rows that are not numbers of one shape.

A ragged column is a (B,) object array of NumPy arrays of one dtype and number of axes. Text, bytes, None and other
Python objects also make an object array.

Shapes: B rows.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError, one_line
from rayprune.sources.base import RESERVED_NAMES, Column, spaced_ids
from rayprune.sources.fingerprint import WHOLE_BYTES, array_digest, digest

Allocate = Callable[[tuple[int, ...], str], np.ndarray]  # shape and dtype → an array of any content
NUMBERS = "biufc"  # the kinds of dtype that tensors can hold
LABEL_COLUMNS = ("label", "labels")
NO_LABELS = "these samples have no integer column 'label' or 'labels': name one with label_column, or set class_floor=0"
_OPTIONS = "columns|image_column|label_column|feature_columns|image_size|max_pixels|num_classes|cache|cache_dir"
_DATA_KEY = re.compile(rf"(?<![\w/.])data\.(?=({_OPTIONS})\b)")
_CHUNK_ROWS = 4_096
_MEASURED_ROWS = 256


@contextlib.contextmanager
def options_of_a_call() -> Iterator[None]:
    """In the errors of a function's body, call options by their own names: `image_size`, not `data.image_size`."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(_DATA_KEY.sub("", str(error))) from None


def check_names(names: Iterable[str]) -> None:
    """Refuse the names of the columns that rayprune adds to every batch.

    Raises:
        DataError: names the column.
    """
    for name in names:
        if name in RESERVED_NAMES:
            raise DataError(f"column {name!r} has a name that rayprune adds itself: rename it, or leave it out")


def find_label(names: Collection[str], label_column: str | None) -> str | None:
    """Return the column of the labels: the given one, else `label` or `labels`; None for none.

    Raises:
        DataError: the given one is missing.
    """
    if label_column is not None and label_column not in names:
        raise DataError(f"no column {label_column!r} for label_column: {closest(label_column, names)}")
    return label_column or next((name for name in LABEL_COLUMNS if name in names), None)


def object_array(rows: Iterable[Any]) -> np.ndarray:
    """Return rows of any kind as a (B,) object array; NumPy itself would make rows of one length a matrix."""
    rows = list(rows)
    column = np.empty(len(rows), dtype=object)
    for position, row in enumerate(rows):
        column[position] = row
    return column


def is_ragged(column: np.ndarray) -> bool:
    """Return whether a column holds an array in each row."""
    return column.dtype == object and len(column) > 0 and _is_numbers(column[0])


def as_row(value: Any) -> Any:
    """Return one row's value: tensors and lists of numbers as arrays, everything else unchanged.

    Raises:
        DataError: a tensor that NumPy cannot hold.
    """
    if hasattr(value, "detach"):
        try:
            return value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:
            raise DataError(f"is not an array ({one_line(error)}): return a tensor that NumPy can hold") from None
    if isinstance(value, np.generic):
        return value.item() if value.dtype.kind in "SU" else np.asarray(value)
    if isinstance(value, bool | int | float | complex):
        return np.asarray(value)
    if isinstance(value, list | tuple):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return value
        return array if array.dtype.kind in NUMBERS else value
    return value


def as_column(rows: Sequence[Any]) -> np.ndarray:
    """Return rows as a column: dense if they are arrays of one shape, else (B,) objects.

    Args:
        rows: B values from `as_row`, B at least 1. Numbers of several dtypes are promoted to one that holds all; an
            empty list takes the dtype of the others.

    Raises:
        DataError: arrays of several numbers of axes, or arrays and other objects together.
    """
    arrays = [row for row in rows if _is_numbers(row)]
    if not arrays:
        return object_array(rows)
    if len(arrays) < len(rows):
        other = next(row for row in rows if not _is_numbers(row))
        raise DataError(f"has numbers in some rows and {type(other).__name__} in others: give all rows one type")
    if len({array.ndim for array in arrays}) > 1:
        raise DataError(
            f"has arrays of {sorted({array.ndim for array in arrays})} axes: give all rows the same number of axes"
        )
    dtype = np.result_type(*{array.dtype for array in arrays if array.size} or {arrays[0].dtype})
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays).astype(dtype, copy=False)
    return object_array(array.astype(dtype, copy=False) for array in arrays)


def column_of(values: np.ndarray) -> Column:
    """Return the schema of a column from some of its rows, at least one."""
    if values.dtype != object:
        return Column(values.shape[1:], values.dtype.name)
    sizes = [_num_bytes(values[row]) for row in spaced_ids(len(values), _MEASURED_ROWS)]
    mean_bytes = -(-sum(sizes) // len(sizes))
    if not is_ragged(values):
        return Column((), "object", mean_bytes)
    lengths = zip(*(row.shape for row in values), strict=True)
    shape = tuple(axis[0] if len(set(axis)) == 1 else -1 for axis in lengths)
    return Column(shape, values[0].dtype.name, mean_bytes)


def empty_column(column: Column, num_rows: int, allocate: Allocate = np.empty) -> np.ndarray:
    """Return a column to be filled row by row; dense ones are allocated by a function like np.empty."""
    if column.in_objects:
        return np.empty(num_rows, dtype=object)
    return allocate((num_rows, *column.shape), column.dtype)


def fits(row: Any, column: Column) -> bool:
    """Return whether a column can hold a row from `as_row` without loss."""
    if column.dtype == "object" or not _is_numbers(row):
        return column.dtype == "object" and not _is_numbers(row)
    if row.ndim != len(column.shape):
        return False
    alike = all(length in (-1, actual) for length, actual in zip(column.shape, row.shape, strict=True))
    return alike and (row.size == 0 or np.can_cast(row.dtype, column.dtype, "same_kind"))


def column_digest(values: np.ndarray) -> str:
    """Hash a column, sampled like a file's content; Python objects other than text and bytes by their `repr`."""
    if values.dtype != object:
        return array_digest(values)
    total = len(values) * max(1, column_of(values).mean_bytes) if len(values) else 0
    chosen = spaced_ids(len(values), max(1, len(values) * WHOLE_BYTES // max(WHOLE_BYTES, total)))
    parts: list[str | int | np.ndarray] = [len(values)]
    for start in range(0, len(chosen), _CHUNK_ROWS):
        rows = values[chosen[start : start + _CHUNK_ROWS]]
        if is_ragged(rows):
            parts.append(np.array([row.shape for row in rows], dtype=np.int64))
            parts.append(np.concatenate([np.ravel(row) for row in rows]))
        else:
            parts += [row if isinstance(row, str) else repr(row) for row in rows]
    return digest("objects", *parts)


def _is_numbers(row: Any) -> bool:
    return isinstance(row, np.ndarray) and row.dtype.kind in NUMBERS


def _num_bytes(row: Any) -> int:
    return row.nbytes if isinstance(row, np.ndarray) else sys.getsizeof(row)
