"""A file of scores: a row per sample, with metadata about their origin.

A Parquet file has the columns id, label, any scores, last_visit and times_pruned. Its metadata have, under `rayprune`
as JSON, the schema number, the source's fingerprint and facts of the writer (method, seed). Tables of other programs,
Parquet or CSV, are read too if they have an id and a number in each row.

Shapes: N samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayprune.core.references import closest
from rayprune.errors import ConfigError, RunFolderError, one_line
from rayprune.paths import ObjectPath, as_path, replace_file
from rayprune.sources.base import id_faults

SCORES_SCHEMA = 1
METADATA_KEY = b"rayprune"
_COUNTS = ("last_visit", "times_pruned")  # columns that describe a sample without scoring it


@dataclass(frozen=True, eq=False)
class ScoreFile:
    """The content of a file of scores; row i is sample i.

    Attributes:
        path: the file.
        num_samples: N.
        scores: name → (N,) numbers, in the order of the file; NaN for a missing one. `last_visit` and `times_pruned`
            are among them.
        labels: (N,) int64, or None.
        fingerprint: of the source that was scored; None in tables of other programs.
        about: other metadata of the file, such as `method` and `seed`.
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

    def score_name(self, requested: str | None = None) -> str:
        """Return the name of a score: the requested one, else the one of the file's method, else the only one.

        Raises:
            ConfigError: there is none of that name, or several to choose from.
        """
        if requested is not None:
            if requested not in self.scores:
                raise ConfigError(f"{self.path} has no score {requested!r}: {closest(requested, self.scores)}")
            return requested
        method = self.about.get("method")
        method_name = method.get("name") if isinstance(method, Mapping) else None
        names = [name for name in self.scores if name not in _COUNTS]
        if method_name in names:
            return str(method_name)
        if len(names) != 1:
            choices = ", ".join(names or self.scores)
            raise ConfigError(f"{self.path} has {len(names) or 'no'} scores: name the one to use, one of {choices}")
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
    """Write a Parquet file of scores atomically.

    Args:
        path: of the file.
        num_samples: N.
        scores: name → (N,) numbers.
        labels: (N,) integers.
        extra: name → (N,) array of any type that Parquet has, placed between label and scores.
        last_visit, times_pruned: (N,) integers, of a run.
        fingerprint: of the source that was scored.
        about: other metadata, such as `method` and `seed`; any JSON.

    Raises:
        ConfigError: two columns have one name, a column is of another length, or the folder does not exist.
    """
    parts: list[Mapping[str, Any]] = [{"id": np.arange(num_samples)}]
    parts += [{"label": labels}, extra or {}, scores, {"last_visit": last_visit, "times_pruned": times_pruned}]
    columns: dict[str, Any] = {}
    for name, column in (item for part in parts for item in part.items()):
        if column is None:
            continue
        if name in columns:
            raise ConfigError(f"two columns of the scores are called {name!r}: rename one")
        if len(column) != num_samples:
            raise ConfigError(f"column {name!r} has {len(column)} rows for {num_samples} samples")
        columns[name] = column
    write_table(path, columns, {"schema": SCORES_SCHEMA, "fingerprint": fingerprint, **(about or {})})
    return path


def read_scores(path: str | Path) -> ScoreFile:
    """Read a file of scores.

    Args:
        path: a Parquet file, a CSV file with a header (.csv), or a run folder, whose scores.parquet is read.

    Raises:
        RunFolderError: there is no such file, it is not a table or of a newer schema, its ids are not each of 0..N-1
            once, or it holds no scores.
    """
    file = as_path(path)
    if file.is_dir():
        file /= "scores.parquet"
        if not file.exists():
            raise RunFolderError(
                f"{path} has no scores.parquet: a run writes it when it ends, so let the run finish first"
            )
    if not file.is_file():
        raise RunFolderError(f"{path} does not exist: give a file of scores, or the folder of a finished run")
    table = _read_csv(file) if file.suffix.lower() == ".csv" else read_table(file)
    metadata = table_metadata(table, file, SCORES_SCHEMA)
    if metadata.get("kind") == "selection":
        raise RunFolderError(f"{file} is a selection, made from scores: give the scores")
    order = id_order(table, file)
    columns = {name: _numbers(table.column(name), order) for name in table.column_names if name != "id"}
    labels = columns.pop("label", None)
    scores = {name: column for name, column in columns.items() if column is not None}
    if not scores:
        raise RunFolderError(f"{file} has no column of numbers beside id and label: add a score")
    if labels is not None and labels.dtype.kind not in "iu":
        labels = None  # names of classes, or incomplete: nothing to balance by
    return ScoreFile(
        file,
        table.num_rows,
        scores,
        None if labels is None else labels.astype(np.int64),
        metadata.pop("fingerprint", None),
        {name: value for name, value in metadata.items() if name != "schema"},
    )


def write_table(path: Path, columns: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write columns and metadata as a Parquet file, atomically.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not isinstance(path, ObjectPath) and not path.parent.is_dir():
        raise ConfigError(f"{path} can't be written: there is no folder {path.parent}, create it first")
    table = pa.table(dict(columns)).replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    with replace_file(path) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def read_table(file: Path) -> pa.Table:
    """Read a whole Parquet file.

    Raises:
        RunFolderError: it is not one, or two columns have one name.
    """
    try:
        with file.open("rb") as stream, pq.ParquetFile(stream, page_checksum_verification=True) as stored:
            _check_size(file, stored.metadata)
            table = stored.read()
    except (pa.ArrowException, OSError) as error:
        raise RunFolderError(
            f"{file} is not a Parquet file, or damaged ({one_line(error)}): restore it, or write it again"
        ) from None
    return _check_column_names(table, file)


def _check_size(file: Path, metadata: pq.FileMetaData) -> None:
    """Refuse a file that claims more rows than the memory has room for; repeated values take no room in a file."""
    needed, free = 8 * metadata.num_rows * metadata.num_columns, psutil.virtual_memory().available
    if needed > free:
        raise RunFolderError(
            f"{file} claims {metadata.num_rows:,} rows of {metadata.num_columns} columns, {needed / 1e9:.0f} GB, and "
            f"{free / 1e9:.0f} GB of memory are free: restore it, or write it again"
        )


def table_metadata(table: pa.Table, file: Path, schema: int) -> dict[str, Any]:
    """Return the metadata that rayprune has stored in a table; {} for none.

    Raises:
        RunFolderError: it is unreadable, or of a newer schema than `schema`.
    """
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        metadata = dict(json.loads(text))
        stored = int(metadata.get("schema", 0))
    except (ValueError, TypeError):
        raise RunFolderError(f"{file} has damaged metadata under 'rayprune': write the file again") from None
    check_schema(file, stored, schema)
    return metadata


def check_schema(file: Path, stored: int, known: int) -> None:
    """Refuse a file of a newer schema than this version knows."""
    if stored > known:
        raise RunFolderError(f"{file} is of schema {stored}, this version reads up to {known}: upgrade rayprune")


def _read_csv(file: Path) -> pa.Table:
    try:
        with file.open("rb") as stream:
            return _check_column_names(pa.csv.read_csv(stream), file)
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{file} is not valid UTF-8 ({error.reason}): save it as UTF-8") from None
    except pa.ArrowException as error:
        raise RunFolderError(f"{file} is not a CSV file with a header ({one_line(error)}): correct it") from None


def _check_column_names(table: pa.Table, file: Path) -> pa.Table:
    repeated = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if repeated:
        raise RunFolderError(f"{file} has more than one column called {', '.join(map(repr, repeated))}: rename one")
    return table


def id_order(table: pa.Table, file: Path) -> NDArray[np.int64] | None:
    """Return the order that sorts the rows by id; None if they are sorted already."""
    if "id" not in table.column_names:
        raise RunFolderError(f"{file} has no column 'id': give each row its sample's id, 0..N-1")
    column = table.column("id")
    if not pa.types.is_integer(column.type) or column.null_count:
        kind = f"{column.null_count} empty ones" if column.null_count else str(column.type)
        raise RunFolderError(f"{file}: ids must be whole numbers, got {kind}: write each sample's id, 0..N-1")
    ids, num_samples = column.to_numpy(), table.num_rows
    if faults := id_faults(ids, num_samples) if num_samples else "no rows":
        raise RunFolderError(f"{file}: the {num_samples} rows must hold each id of 0..N-1 once: {faults}")
    return None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")


def _numbers(column: pa.ChunkedArray, order: NDArray[np.int64] | None) -> NDArray[Any] | None:
    """Return a column of numbers in the order of ids, NaN for missing ones; None for any other column."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return None
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    if column.null_count and not pa.types.is_floating(kind):
        column = column.cast(pa.float64(), safe=False)
    array: NDArray[Any] = column.to_numpy()
    return array if order is None else array[order]
