"""The score table: all mutable selection state, as named arrays with one row per sample.

A missing floating-point value is NaN and its row has `last_visit` -1; observed values are finite, so NaN always means
"never visited".

Shapes: N samples, B observed.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.vectors import VectorColumn, Vectors
from rayprune.errors import ConfigError, RunFolderError

Ids = NDArray[np.int64]
Signals = Mapping[str, NDArray[Any]]

CHUNK_NUMBERS = 1 << 16  # temporaries of this size stay in the cache
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_VISITS = "visits"
# Enough rows for quantiles to a third of a percent of the samples, few enough to take milliseconds.
_QUANTILE_ROWS = 100_000
_QUANTILE_COLUMNS = 4


def chunks(num_rows: int, num_columns: int = 1) -> Iterator[slice]:
    """Yield slices of rows that cover [0, num_rows) and hold at most CHUNK_NUMBERS numbers each, one row at least.

    >>> [rows.stop - rows.start for rows in chunks(100_000)]
    [65536, 34464]
    >>> list(chunks(40_000, 2))
    [slice(0, 32768, None), slice(32768, 40000, None)]
    """
    size = max(1, CHUNK_NUMBERS // max(num_columns, 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class ScoreTable:
    """Hold a method's columns and what every method needs: the last visit and the times pruned.

    Args:
        num_samples: N.
        columns: column name → NumPy dtype, or (dtype, row shape) for vectors; a row shape (None,) is a vector whose
            length the first observation sets (`widen`). A VectorColumn is kept apart, in `vectors`.
        num_epochs: E, which sizes the counter of prunings.
        rows: the samples that this table holds, one per row; all by default.

    Attributes:
        num_samples, rows: as passed.
        vectors: name → the vectors of the current forward-only pass; they are in no checkpoint.
    """

    def __init__(
        self, num_samples: int, columns: Mapping[str, Any], num_epochs: int, rows: range | None = None
    ) -> None:
        self.num_samples, self.rows = num_samples, range(num_samples) if rows is None else rows
        num_rows = len(self.rows)
        self.columns: MutableMapping[str, NDArray[Any]] = {}
        self.vectors: dict[str, Vectors] = {}
        for name, spec in columns.items():
            if isinstance(spec, VectorColumn):
                self.vectors[name] = Vectors(name, num_rows, spec.storage)
                continue
            dtype, shape = spec if isinstance(spec, tuple) else (spec, ())
            row_shape = tuple(0 if length is None else length for length in shape)
            self.columns[name] = np.full((num_rows, *row_shape), missing(dtype), dtype=dtype)
        self._last_visit: NDArray[np.int32] = np.full(num_rows, -1, dtype=np.int32)
        self.times_pruned: NDArray[Any] = np.zeros(num_rows, dtype=np.min_scalar_type(max(num_epochs, 1)))

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last_visit(self) -> NDArray[np.int32]:
        """(N,) The epoch of the sample's last visit, -1 before any."""
        return self._last_visit

    @property
    def visited(self) -> NDArray[np.bool_]:
        """(N,) True where the sample has been observed at least once."""
        return self.last_visit >= 0

    def widen(self, column: str, length: int) -> NDArray[Any]:
        """Return a vector column, after setting its length if it has none yet.

        Raises:
            ConfigError: the column has another length.
        """
        array = self.columns[column]
        if array.shape[1] == 0 < length:
            array = np.full((len(self), length), missing(array.dtype), dtype=array.dtype)
            self.columns[column] = array
        if array.shape[1] != length:
            raise ConfigError(
                f"{length} numbers per sample do not fit the {array.shape[1]} of column {column!r}: use one length"
            )
        return array

    def mark_visited(self, ids: Ids, epoch: int) -> None:
        """Set the last visit of (B,) ids.

        Raises:
            ConfigError: an id repeats; the table is unchanged.
        """
        if (ids[1:] > ids[:-1]).all():  # ascending, as the engine's workers send them: no id repeats
            self.last_visit[ids] = epoch
            return
        before = self.last_visit[ids]
        # Each row writes its own mark. Where an id repeats, the last mark wins and earlier rows do not find theirs.
        marks = np.arange(-2, -2 - ids.size, -1, dtype=np.int32)
        self.last_visit[ids] = marks
        own = self.last_visit[ids] == marks
        if not own.all():
            self.last_visit[ids] = before
            raise ConfigError(f"duplicate ids {np.unique(ids[~own])[:5].tolist()}: observe each sample once at a time")
        self.last_visit[ids] = epoch

    def permuted(self, order: Ids) -> ScoreTable:
        """Return a read-only table whose row i is this table's row order[i]; `times_pruned` is not permuted."""
        copy = ScoreTable(self.num_samples, {}, 0, range(0))
        copy.rows, copy.columns = range(len(order)), _Permuted(self.columns, order)
        copy._last_visit = self.last_visit[order]
        copy.times_pruned = self.times_pruned
        return copy

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return every array by name, not copied; columns as `column/NAME`."""
        columns: dict[str, NDArray[Any]] = {f"column/{name}": column for name, column in self.columns.items()}
        return {**columns, "last_visit": self.last_visit, "times_pruned": self.times_pruned}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy the arrays of `to_arrays` into this table.

        Raises:
            RunFolderError: names, shapes or dtypes differ from this table's.
        """
        own = self.to_arrays()
        if own.keys() != arrays.keys():
            raise RunFolderError(f"the table's columns differ: {sorted(arrays)} stored, {sorted(own)} expected")
        for name, array in arrays.items():
            if own[name].shape[1:] == (0,) and own[name].dtype == array.dtype and array.ndim == 2:
                self.widen(name.removeprefix("column/"), array.shape[1])
        own = self.to_arrays()
        for name, array in arrays.items():
            if own[name].shape != array.shape or own[name].dtype != array.dtype:
                raise RunFolderError(
                    f"column {name!r} is {array.dtype}{array.shape}, not {own[name].dtype}{own[name].shape}"
                )
        for name, array in arrays.items():
            own[name][...] = array


class _Permuted(UserDict[str, NDArray[Any]]):
    """Columns permuted on access, so that wide columns that a selection never reads are not copied."""

    data: Any

    def __init__(self, columns: Mapping[str, NDArray[Any]], order: Ids) -> None:
        self.data, self._order = columns, order

    def __getitem__(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = self.data[name][self._order]
        return column


def missing(dtype: Any) -> float:
    """Return what a column of a dtype holds for samples that were never visited."""
    return np.nan if np.dtype(dtype).kind == "f" else 0


def mean_columns(signals: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns for the means of signals over a run's visits, name → dtype.

    >>> sorted(mean_columns(("el2n",)))
    ['el2n_mean', 'visits']
    """
    return {**{f"{name}_mean": np.float32 for name in signals}, **({_VISITS: np.int32} if signals else {})}


def fold_means(table: ScoreTable, ids: Ids, signals: Signals) -> None:
    """Add one visit of (B,) distinct ids to the means of the signals, (B,) each."""
    visits = table[_VISITS][ids] + 1
    for name, values in signals.items():
        column = table[f"{name}_mean"]
        old = np.where(visits == 1, 0.0, column[ids])
        column[ids] = old + (values.astype(np.float64) - old) / visits
    table[_VISITS][ids] = visits


def column_quantiles(table: ScoreTable) -> dict[str, list[float]]:
    """Return the QUANTILES of each floating-point column of single numbers, over the samples that have a value.

    Above 100,000 samples, evenly spaced samples stand for all.

    >>> table = ScoreTable(5, {"loss": np.float32}, 1)
    >>> table["loss"][1:] = [1.0, 2.0, 3.0, 4.0]
    >>> column_quantiles(table)["loss"][3]
    2.5
    """
    return quantiles_of(quantile_values(table))


def quantile_values(table: ScoreTable) -> dict[str, NDArray[Any]]:
    """Return the values that stand for each column in `quantiles_of`: those of a table's rows, in their order."""
    stride = -(-table.num_samples // _QUANTILE_ROWS)
    rows = slice(-table.rows.start % stride, None, stride)
    columns = {name: column for name, column in table.columns.items() if column.ndim == 1 and column.dtype.kind == "f"}
    return {name: np.array(column[rows]) for name, column in columns.items()}


def quantiles_of(columns: Mapping[str, NDArray[Any]]) -> dict[str, list[float]]:
    """Return the QUANTILES of the finite values of the first columns that have any."""
    quantiles: dict[str, list[float]] = {}
    for name, column in columns.items():
        values = column[np.isfinite(column)].astype(np.float64)
        if values.size and len(quantiles) < _QUANTILE_COLUMNS:
            quantiles[name] = [round(float(value), 6) for value in np.quantile(values, QUANTILES)]
    return quantiles
