"""All mutable selection state: named arrays with one row a sample.

Shapes: N samples, B observed. A missing floating-point value is NaN and its row has `last_visit` -1; observed values
are finite, so a NaN always means "never visited".

Means of signals over a run's visits, beside whatever a method keeps: EL2N and AUM scores, among others.

Shapes: N samples, B observed.

How scores are spread at the end of an epoch, as a few quantiles: what a report can draw over epochs.

Shapes: N samples.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.errors import ConfigError

# Rows a pass takes at once, so that temporaries stay in the cache and memory a sample stays small.
CHUNK_ROWS = 1 << 16


def chunks(num_rows: int) -> Iterator[slice]:
    """Yield slices of at most CHUNK_ROWS rows that cover [0, num_rows).

    >>> [s.stop - s.start for s in chunks(100_000)]
    [65536, 34464]
    """
    for start in range(0, num_rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, num_rows))


class ScoreTable:
    """Hold a method's columns plus what every method needs: last visit and times pruned.

    Args:
        num_samples: N.
        columns: column name → NumPy dtype, or (dtype, row shape) for vectors; a row shape (None,) is a vector whose
            length the first observation tells (`widen`).
        num_epochs: E, which sizes the counter of prunings.
    """

    def __init__(self, num_samples: int, columns: Mapping[str, Any], num_epochs: int) -> None:
        self.columns: MutableMapping[str, NDArray[Any]] = {}
        for name, spec in columns.items():
            dtype, shape = spec if isinstance(spec, tuple) else (spec, ())
            missing = np.nan if np.dtype(dtype).kind == "f" else 0
            known = tuple(0 if length is None else length for length in shape)
            self.columns[name] = np.full((num_samples, *known), missing, dtype=dtype)
        self.last_visit: NDArray[np.int32] = np.full(num_samples, -1, dtype=np.int32)
        self.times_pruned: NDArray[Any] = np.zeros(num_samples, dtype=np.min_scalar_type(max(num_epochs, 1)))

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self.columns[column]

    def __len__(self) -> int:
        return int(self.last_visit.shape[0])

    @property
    def visited(self) -> NDArray[np.bool_]:
        """(N,) True where the sample has been observed at least once."""
        return self.last_visit >= 0

    def widen(self, column: str, length: int) -> NDArray[Any]:
        """Give a vector column of unknown length its length, and return it; later calls check it.

        Raises:
            ConfigError: the column has another length.
        """
        array = self.columns[column]
        if array.shape[1] == 0 < length:
            array = np.full((len(self), length), np.nan if array.dtype.kind == "f" else 0, dtype=array.dtype)
            self.columns[column] = array
        if array.shape[1] != length:
            raise ConfigError(f"{length} numbers a sample do not fit the {array.shape[1]} of column {column!r}")
        return array

    def mark_visited(self, ids: NDArray[np.int64], epoch: int) -> None:
        """Set the last visit of (B,) ids.

        Raises:
            ConfigError: an id stands twice in `ids`; the table is left as it was.
        """
        if (ids[1:] > ids[:-1]).all():  # ascending, as the engine's workers send them: nothing repeats
            self.last_visit[ids] = epoch
            return
        before = self.last_visit[ids]
        # Each row writes its own mark; where an id repeats the last mark wins, and earlier rows do not find theirs.
        marks = np.arange(-2, -2 - ids.size, -1, dtype=np.int32)
        self.last_visit[ids] = marks
        own = self.last_visit[ids] == marks
        if not own.all():
            self.last_visit[ids] = before
            raise ConfigError(f"duplicate ids {np.unique(ids[~own])[:5].tolist()}: a sample is observed once at a time")
        self.last_visit[ids] = epoch

    def permuted(self, order: NDArray[np.int64]) -> ScoreTable:
        """Return a table to read whose row i is this table's row order[i]; `times_pruned` stays with its sample."""
        copy = ScoreTable(0, {}, 0)
        copy.columns = _Permuted(self.columns, order)
        copy.last_visit = self.last_visit[order]
        copy.times_pruned = self.times_pruned
        return copy

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return every array by name, not copied: columns as `column/NAME`."""
        named: dict[str, NDArray[Any]] = {f"column/{name}": column for name, column in self.columns.items()}
        return {**named, "last_visit": self.last_visit, "times_pruned": self.times_pruned}

    def load_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy in what `to_arrays` returned.

        Raises:
            ConfigError: names, shapes or dtypes differ from this table's.
        """
        own = self.to_arrays()
        if own.keys() != arrays.keys():
            raise ConfigError(f"the table's columns differ: {sorted(arrays)} stored, {sorted(own)} expected")
        for name, array in arrays.items():
            if own[name].shape[1:] == (0,) and own[name].dtype == array.dtype and array.ndim == 2:
                self.widen(name.removeprefix("column/"), array.shape[1])
        own = self.to_arrays()
        for name, array in arrays.items():
            if own[name].shape != array.shape or own[name].dtype != array.dtype:
                raise ConfigError(
                    f"column {name!r} is {array.dtype}{array.shape}, not {own[name].dtype}{own[name].shape}"
                )
        for name, array in arrays.items():
            own[name][...] = array


class _Permuted(UserDict[str, NDArray[Any]]):
    """Columns that are permuted when they are asked for: wide ones that a selection never reads are not copied."""

    def __init__(self, columns: Mapping[str, NDArray[Any]], order: NDArray[np.int64]) -> None:
        self.data, self._order = dict(columns), order

    def __getitem__(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = self.data[name][self._order]
        return column


_VISITS = "visits"


def mean_columns(record: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns that the means of the named signals need, name → dtype.

    >>> sorted(mean_columns(("el2n",)))
    ['el2n_mean', 'visits']
    """
    return {**{f"{name}_mean": np.float32 for name in record}, **({_VISITS: np.int32} if record else {})}


def fold_means(
    table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], record: tuple[str, ...]
) -> None:
    """Add one visit of (B,) distinct ids to the means.

    Raises:
        ConfigError: a signal is not one number a sample.
    """
    if not record or not ids.size:
        return
    visits = table[_VISITS][ids] + 1
    for name in record:
        seen = np.asarray(signals[name], dtype=np.float64)
        if seen.ndim != 1:
            raise ConfigError(f"signal {name!r} has {seen.shape[1:]} numbers a sample: train.record takes single ones")
        column = table[f"{name}_mean"]
        old = np.where(visits == 1, 0.0, column[ids])
        column[ids] = old + (seen - old) / visits
    table[_VISITS][ids] = visits


def mean_scores(table: ScoreTable, record: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return name → (N,) means, NaN where never visited, and the visits that they are over."""
    return {name: table[name] for name in mean_columns(record)}


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Enough for quantiles to a third of a percent of the samples, few enough to cost milliseconds.
_MOST_ROWS = 100_000
_MOST_COLUMNS = 4


def column_quantiles(table: ScoreTable) -> dict[str, list[float]]:
    """Return name → values at QUANTILES of each column of single numbers, over the samples that have one.

    Of more than 100,000 samples, evenly spaced ones stand for all.

    >>> table = ScoreTable(5, {"loss": np.float32}, 1)
    >>> table["loss"][1:] = [1.0, 2.0, 3.0, 4.0]
    >>> column_quantiles(table)["loss"][3]
    2.5
    """
    found: dict[str, list[float]] = {}
    stride = -(-len(table) // _MOST_ROWS)
    for name, column in table.columns.items():
        if column.ndim > 1 or column.dtype.kind != "f" or len(found) == _MOST_COLUMNS:
            continue
        some = column[::stride].astype(np.float64)
        some = some[np.isfinite(some)]
        if some.size:
            found[name] = [round(float(value), 6) for value in np.quantile(some, QUANTILES)]
    return found
