"""A file of selected samples: ids and weights, with metadata about how they were chosen.

The suffix selects the format: .parquet (id int64, weight float32; metadata as in a file of scores) or .txt (metadata
in comment lines, then id, tab, weight; a column of ids alone is read too).

Shapes: N samples of the source, M selected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from rayprune.core.selection import Selection
from rayprune.errors import ConfigError, RunFolderError, one_line
from rayprune.paths import as_path, replace_file
from rayprune.sources.base import SampleSource
from rayprune.sources.tables.scores import check_schema, read_table, table_metadata, write_table

SELECTION_SCHEMA = 1
FORMATS = (".parquet", ".txt")
Content = tuple[NDArray[Any], NDArray[Any] | None, Mapping[str, Any]]  # ids, weights, metadata
_METADATA_TYPES = {"kind": str, "schema": int, "num_samples": int, "fingerprint": str, "about": dict}


@dataclass(frozen=True, eq=False)
class SelectionFile:
    """The content of a file of selected samples.

    Attributes:
        path: the file.
        ids: (M,) int64, ascending.
        weights: (M,) float32, at least 0, aligned with ids; 1 if the file has no weights.
        num_samples: N, or None in files of other programs.
        fingerprint: of the source that the ids belong to, or None.
        about: how the samples were chosen; {} if the file does not say.
    """

    path: Path
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    num_samples: int | None = None
    fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def selection(self, num_samples: int) -> Selection:
        """Return the Selection of these samples among N.

        Raises:
            RunFolderError: the file is of another number of samples, or an id is outside 0..N-1.
        """
        _check_fit(self.path, self.ids, self.num_samples, num_samples)
        return Selection.of_ids(
            self.ids,
            num_samples,
            weights=self.weights,
            requested=1.0 - self.ids.size / num_samples,
            expected_drops=num_samples - self.ids.size,
        )


def check_selection_path(path: Path) -> None:
    """Refuse a path that `write_selection_file` can't write to.

    Raises:
        ConfigError: an unknown suffix, or a folder that does not exist.
    """
    _check_format(path)
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a folder: add a file name" if path.is_dir() else f"has no folder {path.parent}: create it first"
        raise ConfigError(f"{path} {fault}")


def _check_format(path: Path, cure: str = "end it in") -> None:
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} ends in {path.suffix or 'nothing'!r}: {cure} {' or '.join(FORMATS)}")


def write_selection_file(
    path: str | Path, selection: Selection, fingerprint: str | None = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Write the kept ids and their weights atomically.

    Args:
        path: of the file; its suffix selects the format.
        selection: of the samples.
        fingerprint: of the source that the ids belong to.
        about: how they were chosen; any JSON.

    Raises:
        ConfigError: as `check_selection_path`.
    """
    file = as_path(path)
    check_selection_path(file)
    metadata = {"kind": "selection", "schema": SELECTION_SCHEMA, "num_samples": selection.num_samples}
    metadata |= {"fingerprint": fingerprint, "about": dict(about or {})}
    columns = {"id": selection.ids, "weight": selection.weights}
    if file.suffix == ".parquet":
        write_table(file, columns, metadata)
    else:
        _write_text(file, columns, metadata)
    return file


def _write_text(file: Path, columns: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    with replace_file(file) as partial, partial.open("wb") as stream:
        for name, value in metadata.items():
            stream.write(f"# {name}: {json.dumps(value)}\n".encode())
        stream.write(b"# id\tweight\n")
        options = pa.csv.WriteOptions(include_header=False, delimiter="\t")
        pa.csv.write_csv(pa.table(dict(columns)), stream, options)


def read_selection_for(path: str, source: SampleSource) -> SelectionFile:
    """Read the samples of a source that the method `fixed` trains on.

    Raises:
        ConfigError: no path, or an unknown suffix.
        RunFolderError: the file can't be read, or was chosen on other data.
    """
    if not path:
        raise ConfigError("method.path is missing: set it to a file that `rayprune select` wrote")
    stored = read_selection_file(path, len(source))
    if stored.fingerprint is not None and stored.fingerprint != source.fingerprint:
        raise RunFolderError(
            f"{path} was chosen on other data (fingerprint {stored.fingerprint[:12]}, here {source.fingerprint[:12]}): "
            "score and select these data"
        )
    return stored


def read_selection_file(path: str | Path, num_samples: int | None = None) -> SelectionFile:
    """Read selected samples.

    Args:
        path: the file; its suffix selects the format.
        num_samples: N, if it is known: ids must be below it.

    Raises:
        ConfigError: an unknown suffix.
        RunFolderError: no such file, unreadable content or a newer schema; ids that are not whole numbers, repeat or
            are out of range; weights that are negative, NaN or infinite.
    """
    file = as_path(path)
    _check_format(file, "a selection, which rayprune select writes, ends in")
    if not file.is_file():
        raise RunFolderError(f"{file} does not exist: `rayprune select` writes such a file")
    ids, weights, metadata = _read_parquet(file) if file.suffix == ".parquet" else _read_text(file)
    for name, kind in _METADATA_TYPES.items():
        if metadata.get(name) is not None and not isinstance(metadata[name], kind):
            raise _damaged(file, name, str(metadata[name]))
    check_schema(file, metadata.get("schema") or 0, SELECTION_SCHEMA)
    ids, order = _checked_ids(file, ids)
    weights = np.ones(ids.size, dtype=np.float32) if weights is None else _checked_weights(file, weights)
    stored = metadata.get("num_samples")
    for expected in (stored, num_samples):
        if expected is not None:
            _check_fit(file, ids, stored, expected)
    fingerprint, about = metadata.get("fingerprint") or None, metadata.get("about") or {}
    return SelectionFile(file, ids, weights[order], stored, fingerprint, about)


def _read_parquet(file: Path) -> Content:
    table = read_table(file)
    metadata = table_metadata(table, file, SELECTION_SCHEMA)
    if "id" not in table.column_names:
        raise RunFolderError(f"{file} has no column 'id': give each row a sample's id")
    if metadata and metadata.get("kind") != "selection":
        raise RunFolderError(f"{file} holds scores, not a selection: make one with rayprune select {file} --keep SHARE")
    weights = table.column("weight").to_numpy() if "weight" in table.column_names else None
    return table.column("id").to_numpy(), weights, metadata


def _read_text(file: Path) -> Content:
    metadata: dict[str, Any] = {}
    with file.open("rb") as stream:
        start = 0
        while (line := stream.readline()).lstrip().startswith(b"#") or line in (b"\n", b"\r\n"):
            start = stream.tell()
            name, _, value = line.decode(errors="replace").lstrip("# \t").partition(":")
            if name in _METADATA_TYPES:
                try:
                    metadata[name] = json.loads(value)
                except ValueError:
                    raise _damaged(file, name, value.strip()) from None
        if not line.strip():
            return np.empty(0, dtype=np.int64), None, metadata
        stream.seek(start)
        columns = _read_columns(file, stream, ["id", "weight"][: line.count(b"\t") + 1])
    return columns["id"], columns.get("weight"), metadata


def _read_columns(file: Path, stream: BinaryIO, names: list[str]) -> dict[str, NDArray[Any]]:
    types = {"id": pa.int64(), "weight": pa.float64()}
    try:
        table = pa.csv.read_csv(
            stream,
            read_options=pa.csv.ReadOptions(column_names=names),
            parse_options=pa.csv.ParseOptions(delimiter="\t"),
            convert_options=pa.csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except pa.ArrowException as error:
        raise RunFolderError(
            f"{file}: a line must be a whole number, the id, or an id, a tab and a weight ({one_line(error)})"
        ) from None
    return {name: table.column(name).to_numpy() for name in names}


def _damaged(file: Path, name: str, text: str) -> RunFolderError:
    return RunFolderError(f"{file} has a damaged {name}, {text[:60]!r}: write the file again")


def _checked_ids(file: Path, ids: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids in ascending order, and their positions in the file."""
    if ids.dtype.kind not in "iu":
        raise RunFolderError(f"{file}: ids must be whole numbers, got {ids.dtype}: write each sample's id")
    if not ids.size:
        raise RunFolderError(f"{file} holds no ids, and nothing would be trained on: list at least one")
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise RunFolderError(f"{file}: ids {np.unique(repeated)[:5].tolist()} repeat: list each sample once")
    if ordered[0] < 0 or ordered[-1] > np.iinfo(np.int64).max:
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise RunFolderError(f"{file}: id {wrong} is out of range: ids start at 0")
    return ordered.astype(np.int64), order


def _checked_weights(file: Path, weights: NDArray[Any]) -> NDArray[np.float32]:
    if weights.dtype.kind not in "iuf":
        raise RunFolderError(f"{file}: weights must be numbers, got {weights.dtype}")
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32)
    if not narrow.any():
        raise RunFolderError(f"{file}: all weights are 0, and nothing would be learned: leave them out, or give others")
    if (bad := np.flatnonzero(~(np.isfinite(narrow) & (narrow >= 0)))).size:
        raise RunFolderError(f"{file}: weights must be finite and at least 0, row {bad[0]} has {weights[bad[0]]}")
    return narrow


def _check_fit(file: Path, ids: NDArray[np.int64], stored: int | None, num_samples: int) -> None:
    if stored is not None and stored != num_samples:
        raise RunFolderError(f"{file} was chosen among {stored} samples, not {num_samples}: choose again on these data")
    if ids[-1] >= num_samples:
        outside = ids[ids >= num_samples]
        raise RunFolderError(f"{file}: ids {outside[:5].tolist()} are out of range: ids go from 0 to {num_samples - 1}")
