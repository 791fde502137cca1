"""Chosen samples in one file: ids and weights, with the facts of how they were chosen.

The ending says the format: .parquet (id int64, weight float32; facts in the metadata), .npz (arrays, no pickle), .txt
or .tsv (facts in comment lines, then id, tab, weight; a column of ids alone is read too) and .npy (ids alone).

Shapes: N samples of the source, M chosen.

A file of chosen samples that belongs to a source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayprune.core.selection import Selection
from rayprune.errors import DataError
from rayprune.sources.base import SampleSource
from rayprune.sources.score_files import METADATA_KEY, facts_of, read_table
from rayprune.sources.storage import one_line, replace_file

SELECTION_SCHEMA = 1
_FACTS = {"kind": str, "schema": int, "num_samples": int, "fingerprint": str, "about": dict}


@dataclass(frozen=True, eq=False)
class ChosenFile:
    """Hold what a file of chosen samples says.

    Attributes:
        path: the file that was read.
        ids: (M,) int64, ascending.
        weights: (M,) float32, at least 0, aligned with ids; 1 where the file has none.
        num_samples: N, or None in files of other programs.
        fingerprint: of the source that the ids belong to, or None.
        about: how they were chosen; {} where the file does not say.
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
            ValueError: the file is of another number of samples, or an id lies outside 0..N-1.
        """
        _check_fit(self.path, self.ids, self.num_samples, num_samples)
        return Selection.of_ids(
            self.ids,
            num_samples,
            weights=self.weights,
            requested=1.0 - self.ids.size / num_samples,
            expected_drops=num_samples - self.ids.size,
        )


class _Content(NamedTuple):
    ids: NDArray[Any]
    weights: NDArray[Any] | None
    facts: Mapping[str, Any]


def check_selection_path(path: Path, selection: Selection | None = None) -> None:
    """Refuse a path that `write_selection_file` can't write (the selection) to.

    Raises:
        ValueError: an unknown ending, a folder that does not exist, or weights that the format has no place for.
    """
    _format_of(path)
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a folder: add a file name" if path.is_dir() else f"has no folder {path.parent}: create it first"
        raise DataError(f"{path} {fault}")
    if path.suffix == ".npy" and selection is not None and (selection.weights != 1).any():
        raise DataError(f"{path} has no place for weights, and not all are 1: write .npz, .parquet or .txt")


def write_selection_file(
    path: str | Path, selection: Selection, fingerprint: str | None = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Write the kept ids and their weights, whole or not at all.

    Args:
        path: where to; the ending says the format.
        selection: what was chosen.
        fingerprint: of the source that the ids belong to.
        about: how they were chosen; anything that JSON has.

    Raises:
        ValueError: as `check_selection_path`.
    """
    file = Path(path)
    check_selection_path(file, selection)
    facts = {"kind": "selection", "schema": SELECTION_SCHEMA, "num_samples": selection.num_samples}
    facts |= {"fingerprint": fingerprint, "about": dict(about or {})}
    with replace_file(file) as partial, partial.open("wb") as stream:
        _format_of(file).write(stream, _Content(selection.ids, selection.weights, facts))
    return file


def read_selection_file(path: str | Path, num_samples: int | None = None) -> ChosenFile:
    """Read chosen samples.

    Args:
        path: the file; the ending says the format.
        num_samples: N, where it is known: ids must lie below it.

    Raises:
        ValueError: no such file, an unknown ending, unreadable content or a newer schema; ids that are no whole
            numbers, repeat or lie out of range; weights that are negative, NaN or infinite.
    """
    file = Path(path)
    read = _format_of(file).read
    if not file.is_file():
        raise DataError(f"{file} does not exist: `rayprune select` writes such a file")
    ids, weights, facts = read(file)
    for name, kind in _FACTS.items():
        if facts.get(name) is not None and not isinstance(facts[name], kind):
            raise DataError(f"{file} has a damaged {name}, {str(facts[name])[:60]!r}: write the file again")
    if (facts.get("schema") or 0) > SELECTION_SCHEMA:
        raise DataError(
            f"{file} is of schema {facts['schema']}, this version reads up to {SELECTION_SCHEMA}: upgrade rayprune"
        )
    ids, order = _checked_ids(file, ids)
    weights = np.ones(ids.size, dtype=np.float32) if weights is None else _checked_weights(file, weights, ids.size)
    stored = facts.get("num_samples")
    for bound in (stored, num_samples):
        if bound is not None:
            _check_fit(file, ids, stored, bound)
    return ChosenFile(file, ids, weights[order], stored, facts.get("fingerprint") or None, facts.get("about") or {})


def _checked_ids(file: Path, ids: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"{file}: ids must be one row of whole numbers, got {ids.dtype} of shape {ids.shape}")
    if not ids.size:
        raise DataError(f"{file} holds no ids: nothing would be trained on")
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise DataError(f"{file}: ids {np.unique(repeated)[:5].tolist()} repeat: each chosen sample stands there once")
    if ordered[0] < 0 or ordered[-1] > np.iinfo(np.int64).max:
        raise DataError(f"{file}: id {ordered[0] if ordered[0] < 0 else ordered[-1]} is out of range: ids go from 0")
    return ordered.astype(np.int64), order


def _checked_weights(file: Path, weights: NDArray[Any], count: int) -> NDArray[np.float32]:
    if weights.shape != (count,) or weights.dtype.kind not in "iuf":
        raise DataError(f"{file}: {weights.dtype} weights of shape {weights.shape} do not fit {count} ids")
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32)
    if not narrow.any():
        raise DataError(f"{file}: all weights are 0, and nothing would be learned: leave them out, or give others")
    if (bad := np.flatnonzero(~(np.isfinite(narrow) & (narrow >= 0)))).size:
        raise DataError(f"{file}: weights must be finite and at least 0, row {bad[0]} has {weights[bad[0]]}")
    return narrow


def _check_fit(file: Path, ids: NDArray[np.int64], stored: int | None, num_samples: int) -> None:
    if stored is not None and stored != num_samples:
        raise DataError(f"{file} was chosen among {stored} samples, not {num_samples}: choose again on these data")
    if ids[-1] >= num_samples:
        outside = ids[ids >= num_samples]
        raise DataError(f"{file}: ids {outside[:5].tolist()} are out of range: ids go from 0 to {num_samples - 1}")


def _write_parquet(stream: BinaryIO, content: _Content) -> None:
    table = pa.table({"id": content.ids, "weight": content.weights})
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(content.facts)}), stream)


def _read_parquet(file: Path) -> _Content:
    table = read_table(file)
    facts = facts_of(table, file, SELECTION_SCHEMA)
    if "id" not in table.column_names:
        raise DataError(f"{file} has no column 'id'")
    if facts and facts.get("kind") != "selection":
        raise DataError(f"{file} holds scores, not a choice: make one with rayprune select {file} --keep SHARE")
    columns = {name: table.column(name) for name in ("id", "weight") if name in table.column_names}
    return _Content(columns["id"].to_numpy(), columns["weight"].to_numpy() if "weight" in columns else None, facts)


def _write_npz(stream: BinaryIO, content: _Content) -> None:
    assert content.weights is not None
    facts = {name: "" if value is None else value for name, value in content.facts.items()}
    facts["about"] = json.dumps(facts["about"])
    arrays = {name: np.array(value) for name, value in facts.items()}
    np.savez_compressed(stream, allow_pickle=False, ids=content.ids, weights=content.weights, **arrays)


def _read_npz(file: Path) -> _Content:
    arrays = _load(file, np.lib.npyio.NpzFile)
    if "ids" not in arrays:
        raise DataError(f"{file} has no array 'ids', only {', '.join(arrays) or 'nothing'}")
    facts = {name: arrays[name].item() for name in _FACTS if name in arrays and arrays[name].size == 1}
    if "about" in facts:
        facts["about"] = _parsed(file, "about", str(facts["about"]))
    return _Content(arrays["ids"], arrays.get("weights"), facts)


def _write_npy(stream: BinaryIO, content: _Content) -> None:
    np.save(stream, content.ids, allow_pickle=False)


def _read_npy(file: Path) -> _Content:
    return _Content(_load(file, np.ndarray), None, {})


def _load(file: Path, kind: type) -> Any:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, kind):
            return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except Exception as error:  # NumPy, zipfile and zlib each have their own
        raise DataError(f"{file} is no readable {file.suffix} file ({one_line(error, 120)}): write it again") from None
    raise DataError(f"{file} is no {file.suffix} file: give it the ending of what it is")


def _write_text(stream: BinaryIO, content: _Content) -> None:
    for name, value in content.facts.items():
        stream.write(f"# {name}: {json.dumps(value)}\n".encode())
    stream.write(b"# id\tweight\n")
    table = pa.table({"id": content.ids, "weight": content.weights})
    pa.csv.write_csv(table, stream, pa.csv.WriteOptions(include_header=False, delimiter="\t"))


def _read_text(file: Path) -> _Content:
    facts: dict[str, Any] = {}
    with file.open("rb") as stream:
        start = 0
        while (line := stream.readline()).lstrip().startswith(b"#") or line in (b"\n", b"\r\n"):
            start = stream.tell()
            name, _, value = line.decode(errors="replace").lstrip("# \t").partition(":")
            if name in _FACTS:
                facts[name] = _parsed(file, name, value)
        if not line.strip():
            return _Content(np.empty(0, dtype=np.int64), None, facts)
        names = ["id", "weight"][: line.count(b"\t") + 1]
        stream.seek(start)
        columns = _read_columns(file, stream, names)
    return _Content(columns["id"], columns.get("weight"), facts)


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
        raise DataError(
            f"{file}: a line must be a whole number, the id, or an id, a tab and a weight ({one_line(error, 120)})"
        ) from None
    return {name: table.column(name).to_numpy() for name in names}


def _parsed(file: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise DataError(f"{file} has a damaged {name}, {text.strip()[:60]!r}: write the file again") from None


class _Format(NamedTuple):
    write: Callable[[BinaryIO, _Content], None]
    read: Callable[[Path], _Content]


_FORMATS = {
    ".parquet": _Format(_write_parquet, _read_parquet),
    ".npz": _Format(_write_npz, _read_npz),
    ".txt": _Format(_write_text, _read_text),
    ".tsv": _Format(_write_text, _read_text),
    ".npy": _Format(_write_npy, _read_npy),
}


def _format_of(path: Path) -> _Format:
    if path.suffix not in _FORMATS:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}: end it in one of {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix]


def read_chosen(path: str, source: SampleSource) -> ChosenFile:
    """Read the samples of a source that a method `fixed` is to train on.

    Raises:
        ValueError: no path, a file that can't be read, or one that was chosen on other data.
    """
    if not path:
        raise DataError("method.path is missing: method fixed trains on a file that `rayprune select` wrote")
    read = read_selection_file(path, len(source))
    if read.fingerprint is not None and read.fingerprint != source.fingerprint:
        raise DataError(
            f"{path} was chosen on other data (fingerprint {read.fingerprint[:12]}, here {source.fingerprint[:12]}): "
            "score and select these data"
        )
    return read
