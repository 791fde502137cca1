"""Scores of all samples in one file: a row a sample, with the facts of where they come from.

A Parquet file of columns id, label, any scores, last_visit and times_pruned; under `rayprune` in its metadata, as JSON,
its schema, the fingerprint of the source and what the writer adds (method, seed). Tables of other programs, Parquet or
CSV, are read too where they have an id and a number a row.

Shapes: N samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayprune.core.references import closest
from rayprune.errors import DataError
from rayprune.sources.storage import one_line, replace_file

SCORES_SCHEMA = 1
METADATA_KEY = b"rayprune"
_COUNTS = ("last_visit", "times_pruned")  # columns that say something about a sample and do not rate it


@dataclass(frozen=True, eq=False)
class ScoreFile:
    """Hold what a file of scores says; row i is sample i.

    Attributes:
        path: the file that was read.
        num_samples: N.
        scores: name → (N,) numbers, in the order of the file; NaN where there is none. `last_visit` and `times_pruned`
            are among them.
        labels: (N,) int64, or None.
        fingerprint: of the source that was scored; None in tables of other programs.
        about: what else the file says of itself, such as `method` and `seed`.
    """

    path: Path
    num_samples: int
    scores: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64] | None = None
    fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> NDArray[np.int64]:
        """(N,) int64, 0..N-1."""
        return np.arange(self.num_samples)

    def score_name(self, wanted: str | None = None) -> str:
        """Return the name of a score: the wanted one, the one called as the method that made the file, or the only one.

        Raises:
            ValueError: there is none of that name, or several to choose from.
        """
        if wanted is not None:
            if wanted not in self.scores:
                raise DataError(f"{self.path} has no score {wanted!r}: {closest(wanted, self.scores)}")
            return wanted
        method = self.about.get("method")
        named = method.get("name") if isinstance(method, Mapping) else None
        names = [name for name in self.scores if name not in _COUNTS]
        if named in names:
            return str(named)
        if len(names) != 1:
            listed = ", ".join(names or self.scores)
            raise DataError(f"{self.path} has {len(names) or 'no'} scores: name the one to go by, one of {listed}")
        return names[0]


def write_scores(
    path: Path,
    num_samples: int,
    scores: Mapping[str, NDArray[Any]],
    *,
    labels: NDArray[np.integer[Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
    last_visit: NDArray[np.integer[Any]] | None = None,
    times_pruned: NDArray[np.integer[Any]] | None = None,
    fingerprint: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Parquet file of scores, whole or not at all.

    Args:
        path: where to.
        num_samples: N.
        scores: name → (N,) numbers.
        labels: (N,) integers.
        extra: name → (N,) array of any kind that Parquet has, placed between label and scores.
        last_visit, times_pruned: (N,) integers, of a run.
        fingerprint: of the source that was scored.
        about: what else to say, such as `method` and `seed`; anything that JSON has.

    Raises:
        ValueError: a name stands for two columns, a column is of another length, or the folder does not exist.
    """
    parts: list[Mapping[str, Any]] = [{"id": np.arange(num_samples)}]
    parts += [{"label": labels}, extra or {}, scores, {"last_visit": last_visit, "times_pruned": times_pruned}]
    columns: dict[str, Any] = {}
    for name, column in (item for part in parts for item in part.items()):
        if column is None:
            continue
        if name in columns:
            raise DataError(f"two columns of the scores are called {name!r}: rename one")
        if len(column) != num_samples:
            raise DataError(f"column {name!r} has {len(column)} rows for {num_samples} samples")
        columns[name] = column
    facts = {"schema": SCORES_SCHEMA, "fingerprint": fingerprint, **(about or {})}
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(facts)})
    with replace_file(path) as partial:
        pq.write_table(table, partial)
    return path


def read_scores(path: str | Path) -> ScoreFile:
    """Read a file of scores.

    Args:
        path: a Parquet file, a CSV file with a header (.csv), or a run folder, whose scores.parquet is read.

    Raises:
        ValueError: there is no such file, it is no table or of a newer schema, its ids are not each of 0..N-1 once,
            or it holds no scores.
    """
    file = Path(path)
    if file.is_dir():
        file /= "scores.parquet"
        if not file.exists():
            raise DataError(f"{path} has no scores.parquet: a run writes it when it ends, so let the run finish first")
    if not file.is_file():
        raise DataError(f"{path} does not exist: give a file of scores, or the folder of a finished run")
    table = _read_csv(file) if file.suffix.lower() == ".csv" else read_table(file)
    about = facts_of(table, file, SCORES_SCHEMA)
    if about.get("kind") == "selection":
        raise DataError(f"{file} is a selection, made from scores: give the scores")
    order = _order_of(table, file)
    columns = {name: _numbers(table.column(name), order) for name in table.column_names if name != "id"}
    labels = columns.pop("label", None)
    scores = {name: column for name, column in columns.items() if column is not None}
    if not scores:
        raise DataError(f"{file} has no column of numbers beside id and label: add a score")
    if labels is not None and labels.dtype.kind not in "iu":
        labels = None  # names of classes, or some are missing: nothing to balance by
    return ScoreFile(
        file,
        table.num_rows,
        scores,
        None if labels is None else labels.astype(np.int64),
        about.pop("fingerprint", None),
        {name: value for name, value in about.items() if name != "schema"},
    )


def read_table(file: Path) -> pa.Table:
    """Read a Parquet file whole.

    Raises:
        ValueError: it is none.
    """
    try:
        table = pq.ParquetFile(file).read()
    except pa.ArrowException as error:
        raise DataError(f"{file} is no Parquet file ({one_line(error, 120)}): restore it, or write it again") from None
    return _of_single_columns(table, file)


def _of_single_columns(table: pa.Table, file: Path) -> pa.Table:
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{file} has more than one column called {', '.join(map(repr, twice))}: rename one")
    return table


def facts_of(table: pa.Table, file: Path, schema: int) -> dict[str, Any]:
    """Return what a table says of itself in its metadata; {} where that is nothing.

    Raises:
        ValueError: it is unreadable, or of a newer schema than `schema`.
    """
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        facts = dict(json.loads(text))
        newer = int(facts.get("schema", 0)) > schema
    except (ValueError, TypeError):
        raise DataError(f"{file} has damaged metadata under 'rayprune': write the file again") from None
    if newer:
        raise DataError(f"{file} is of schema {facts['schema']}, this version reads up to {schema}: upgrade rayprune")
    return facts


def _read_csv(file: Path) -> pa.Table:
    try:
        table = pa.csv.read_csv(file)
        return _of_single_columns(table, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text ({error.reason}): save it as UTF-8") from None
    except pa.ArrowException as error:
        raise DataError(f"{file} is no CSV file with a header ({one_line(error, 120)}): correct it") from None


def _order_of(table: pa.Table, file: Path) -> NDArray[np.int64] | None:
    """Return the rows in order of their ids; None where they are in order already."""
    if "id" not in table.column_names:
        raise DataError(f"{file} has no column 'id': give each row its sample's id, 0..N-1")
    column = table.column("id")
    if not pa.types.is_integer(column.type) or column.null_count:
        kind = f"{column.null_count} empty ones" if column.null_count else str(column.type)
        raise DataError(f"{file}: ids must be whole numbers, got {kind}: write each sample's id, 0..N-1")
    ids, num_samples = column.to_numpy(), table.num_rows
    inside = ids[(ids >= 0) & (ids < num_samples)]
    times = np.bincount(inside.astype(np.int64), minlength=num_samples)
    if (times != 1).any() or not num_samples:
        repeated, missing = np.flatnonzero(times > 1)[:5].tolist(), np.flatnonzero(times == 0)[:5].tolist()
        outside = ids[(ids < 0) | (ids >= num_samples)][:5].tolist()
        faults = {"repeated": repeated, "missing": missing, "outside": outside}
        named = ", ".join(f"{fault} {some}" for fault, some in faults.items() if some) or "no rows"
        raise DataError(f"{file}: the {num_samples} rows must hold each id of 0..N-1 once: {named}")
    ordered = (ids[1:] > ids[:-1]).all()
    return None if ordered else np.argsort(ids, kind="stable")


def _numbers(column: pa.ChunkedArray, order: NDArray[np.int64] | None) -> NDArray[Any] | None:
    """Return a column of numbers in order of ids, NaN where it has none; None for a column of anything else."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return None
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    if column.null_count and not pa.types.is_floating(kind):
        column = column.cast(pa.float64(), safe=False)
    array: NDArray[Any] = column.to_numpy()
    return array if order is None else array[order]
