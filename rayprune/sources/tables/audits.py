"""A file of a data audit: a row per training sample, with what is probably wrong with it.

A Parquet file has the columns id, label, suggested_label, p_wrong, duplicate_of, duplicate_split, group and evidence,
`file` if the samples have files of their own, and any further statistics as float32. Its metadata have, under
`rayprune` as JSON, the kind "audit", the schema number, the source's fingerprint and facts of the writer.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError, RunFolderError
from rayprune.paths import as_path
from rayprune.sources.base import SampleSource
from rayprune.sources.tables.scores import id_order, read_table, table_metadata, write_table

AUDIT_SCHEMA = 1
_DEFAULT_AT = 0.5  # of data.relabel_at
AUDIT_NAME = "audit.parquet"  # in a run folder
GROUPS = ("wrong_label", "duplicate", "leak", "outlier", "never_learned", "easy")  # beside "", none
SPLITS = ("train", "validation")  # where a duplicate lies, beside "", nowhere
_INTEGERS = ("label", "suggested_label", "duplicate_of")
_TEXTS = ("duplicate_split", "group", "evidence")
_FILE = "file"
COLUMNS = ("id", "label", "suggested_label", "p_wrong", "duplicate_of", *_TEXTS)


@dataclass(frozen=True, eq=False)
class AuditTable:
    """The findings of an audit; row i is sample i. Arrays are converted to the types below.

    Attributes:
        label: (N,) int64, the given labels.
        p_wrong: (N,) float32 in [0, 1], the probability that the label is wrong.
        suggested_label: (N,) int64, the likely label; the given one where nothing is suggested, the default.
        duplicate_of: (N,) int64, the id of a sample with the same content in `duplicate_split`; -1 for none.
        duplicate_split: (N,) texts: "train", "validation", or "" for none.
        group: (N,) texts, one of GROUPS, or "" for none.
        evidence: (N,) short texts for people.
        statistics: name → (N,) float32, NaN for a missing one.
        file: (N,) texts, the path of each sample's file; None if samples have none.

    Raises:
        DataError: a column has another length or type, or a value out of range; names the first such sample.
    """

    label: NDArray[np.int64]
    p_wrong: NDArray[np.float32]
    suggested_label: NDArray[np.int64] = None  # type: ignore[assignment]  # the labels
    duplicate_of: NDArray[np.int64] = None  # type: ignore[assignment]  # -1
    duplicate_split: NDArray[np.object_] = None  # type: ignore[assignment]  # ""
    group: NDArray[np.object_] = None  # type: ignore[assignment]  # ""
    evidence: NDArray[np.object_] = None  # type: ignore[assignment]  # ""
    statistics: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    file: NDArray[np.object_] | None = None

    def __post_init__(self) -> None:
        num = len(self.label)
        defaults = {"suggested_label": self.label, "duplicate_of": np.full(num, -1)}
        for name in _INTEGERS:
            given = getattr(self, name)
            self._set(name, _integers(name, defaults[name] if given is None else given))
        self._set("p_wrong", _numbers("p_wrong", self.p_wrong))
        for name in _TEXTS:
            given = getattr(self, name)
            self._set(name, _texts(name, np.full(num, "", dtype=object) if given is None else given))
        if self.file is not None:
            self._set(_FILE, _texts(_FILE, self.file))
        self._set("statistics", {name: _numbers(name, values) for name, values in self.statistics.items()})
        self._check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        if taken := sorted({*COLUMNS, _FILE} & self.statistics.keys()):
            raise DataError(f"a statistic is called {taken[0]!r}, as a column of every audit: rename it")
        for name, column in self.columns().items():
            if column.shape != (len(self),):
                raise DataError(f"column {name!r} is of shape {column.shape}: give one value for each of {len(self)}")
        of, split = self.duplicate_of, self.duplicate_split
        has_duplicate, inside = of >= 0, split == "train"
        _refuse(~((self.p_wrong >= 0) & (self.p_wrong <= 1)), "p_wrong", self.p_wrong, "give a probability in [0, 1]")
        _refuse(self.label < 0, "label", self.label, "number the classes from 0")
        _refuse(
            self.suggested_label < 0, "suggested_label", self.suggested_label, "give the label where none is better"
        )
        _refuse(of < -1, "duplicate_of", of, "give an id, or -1 for none")
        for name, known in (("duplicate_split", SPLITS), ("group", GROUPS)):
            column = getattr(self, name)
            if unknown := sorted(set(column.tolist()) - {"", *known}):
                raise DataError(f"{name} {unknown[0]!r} is unknown: {closest(unknown[0], known)}, or ''")
        _refuse(has_duplicate != (split != ""), "duplicate_split", split, "name a split where duplicate_of is an id")
        itself = inside & (of == np.arange(len(self)))
        _refuse((inside & (of >= len(self))) | itself, "duplicate_of", of, "give the id of another training sample")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def relabeled(self) -> NDArray[np.bool_]:
        """(N,) whether another label is suggested."""
        return self.suggested_label != self.label

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns beside the id, in the order of the file."""
        files = {} if self.file is None else {_FILE: self.file}
        return {name: getattr(self, name) for name in COLUMNS[1:]} | files | dict(self.statistics)

    def duplicate_groups(self) -> NDArray[np.int64]:
        """Return the lowest id of each sample's group of duplicates in the training part, (N,); its own if it has none.

        >>> pairs = {"duplicate_of": [-1, 0, 1, -1], "duplicate_split": ["", "train", "train", ""]}
        >>> AuditTable(np.zeros(4, int), np.zeros(4), **pairs).duplicate_groups().tolist()
        [0, 0, 0, 3]
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        rows = np.flatnonzero(self.duplicate_split == "train")
        links = coo_array((np.ones(rows.size, dtype=bool), (rows, self.duplicate_of[rows])), shape=(len(self),) * 2)
        _, component = connected_components(links, directed=False)
        _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
        return np.asarray(first[inverse], dtype=np.int64)

    def kept(self, at: float | None = None, drop_duplicates: bool = False) -> NDArray[np.bool_]:
        """Return a mask of the samples to keep.

        Args:
            at: keep the samples with `p_wrong` below this number; None for all.
            drop_duplicates: of those, keep one of each group of duplicates: the one with the lowest `p_wrong`, the
                lower id among equal ones.
        """
        kept = np.ones(len(self), dtype=bool) if at is None else self.p_wrong < np.float32(at)
        if drop_duplicates:
            ids = np.flatnonzero(kept)
            ids = ids[np.argsort(self.p_wrong[ids], kind="stable")]
            _, first = np.unique(self.duplicate_groups()[ids], return_index=True)
            kept[:] = False
            kept[ids[first]] = True
        return kept

    def corrected(self, at: float = 0.5) -> NDArray[np.int64]:
        """Return the labels, (N,) int64, with the suggested one where `p_wrong` is at least `at`."""
        return np.where(self.p_wrong >= np.float32(at), self.suggested_label, self.label)


@dataclass(frozen=True, eq=False)
class AuditFile:
    """The content of a file of an audit.

    Attributes:
        path: the file.
        table: the findings.
        fingerprint: of the training source that was audited, or None.
        about: how it was audited; any JSON.
    """

    path: Path
    table: AuditTable
    fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def check_source(self, source: SampleSource) -> None:
        """Refuse an audit of other data.

        Raises:
            RunFolderError: fingerprint, number of samples or labels differ.
        """
        here, cure = source.fingerprint, "audit these data, with the same data.limit and data.hold_out"
        if self.fingerprint is not None and self.fingerprint != here:
            raise RunFolderError(
                f"{self.path} is an audit of other data (fingerprint {self.fingerprint[:12]}, here {here[:12]}): {cure}"
            )
        if len(self.table) != len(source):
            raise RunFolderError(
                f"{self.path} is an audit of {len(self.table)} samples, and the training part has {len(source)}: {cure}"
            )
        if (wrong := np.flatnonzero(self.table.label != source.labels)).size:
            raise RunFolderError(
                f"{self.path} is an audit of other labels: {wrong.size} differ, first ids {wrong[:5].tolist()}: {cure}"
            )


def write_audit(
    path: str | Path, table: AuditTable, fingerprint: str | None = None, about: Mapping[str, Any] | None = None
) -> Path:
    """Write an audit as a Parquet file, atomically.

    Args:
        path: of the file, or a folder for its audit.parquet.
        table: the findings.
        fingerprint: of the training source that was audited.
        about: how it was audited; any JSON.

    Raises:
        ConfigError: the folder does not exist, or the file has another suffix than .parquet.
    """
    file = as_path(path)
    if file.is_dir():
        file /= AUDIT_NAME
    if file.suffix != ".parquet":
        raise ConfigError(f"{file} ends in {file.suffix or 'nothing'!r}: end it in .parquet")
    metadata = {"kind": "audit", "schema": AUDIT_SCHEMA, "fingerprint": fingerprint, "about": dict(about or {})}
    columns = table.columns()
    texts = {name: pa.array(columns[name], type=pa.string()) for name in (*_TEXTS, _FILE) if name in columns}
    write_table(file, {"id": np.arange(len(table)), **columns, **texts}, metadata)
    return file


def read_audit(path: str | Path) -> AuditFile:
    """Read an audit.

    Args:
        path: the file, or a run folder, whose audit.parquet is read.

    Raises:
        RunFolderError: there is no such file, it is not an audit or of a newer schema, its ids are not each of 0..N-1
            once, or a column is missing or has a wrong value.
    """
    file = as_path(path)
    if file.is_dir():
        file /= AUDIT_NAME
    if not file.is_file():
        raise RunFolderError(f"{file} does not exist: rayprune audit CONFIG writes it into the run's folder")
    if file.suffix != ".parquet":
        raise RunFolderError(f"{file} is not an audit: give the audit.parquet that rayprune audit CONFIG writes")
    stored = read_table(file)
    metadata = table_metadata(stored, file, AUDIT_SCHEMA)
    missing = [name for name in COLUMNS[1:] if name not in stored.column_names]
    if missing or metadata.get("kind", "audit") != "audit":
        has = f"it has no column {missing[0]!r}" if missing else f"it is a {metadata['kind']}"
        raise RunFolderError(f"{file} is not an audit, {has}: give the audit.parquet that rayprune audit CONFIG writes")
    order = id_order(stored, file)
    columns: dict[str, Any] = {}
    for name in stored.column_names:
        column = stored.column(name)
        if column.null_count:
            raise RunFolderError(f"{file}: column {name!r} has {column.null_count} empty values: write the audit again")
        array = column.to_numpy()
        columns[name] = array if order is None else array[order]
    del columns["id"]
    own = {name: columns.pop(name) for name in (*COLUMNS[1:], _FILE) if name in columns}
    try:
        table = AuditTable(**own, statistics=columns)
    except DataError as error:
        raise RunFolderError(f"{file}: {error}") from None
    fingerprint, about = metadata.get("fingerprint"), metadata.get("about")
    return AuditFile(file, table, str(fingerprint) if fingerprint else None, about if isinstance(about, dict) else {})


def corrected_labels(path: str | Path, source: SampleSource, at: float) -> NDArray[np.int64]:
    """Return the labels of a training source, (N,), with those that its audit suggests from a probability on.

    Raises:
        ConfigError: the audit suggests labels from a higher probability on.
        RunFolderError: as `read_audit`, or the audit is of other data, or a suggested label is no class of the source.
    """
    stored, num_classes = read_audit(path), source.schema.num_classes or 0
    stored.check_source(source)
    settings = stored.about.get("audit")
    suggested_from = settings.get("at") if isinstance(settings, dict) else None
    # The default is for all audits, also for one with a higher threshold.
    if isinstance(suggested_from, int | float) and at < min(suggested_from, _DEFAULT_AT):
        raise ConfigError(
            f"data.relabel_at={at:g}: {stored.path} suggests labels from p_wrong {suggested_from:g} on; run the audit "
            f"again with audit.at={at:g}, which trains nothing"
        )
    labels = stored.table.corrected(at)
    if (outside := np.flatnonzero(labels >= num_classes)).size:
        raise RunFolderError(
            f"{stored.path} suggests label {labels[outside[0]]} for sample {outside[0]}, outside 0..{num_classes - 1}: "
            "correct it, or audit again"
        )
    return labels


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise DataError(f"column {name!r} is {array.dtype}: give whole numbers")
    return array.astype(np.int64, copy=False)


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise DataError(f"column {name!r} is {array.dtype}: give numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _texts(name: str, values: ArrayLike) -> NDArray[np.object_]:
    array = np.asarray(values, dtype=object)
    if not all(isinstance(value, str) for value in array.flat):
        raise DataError(f"column {name!r} holds other values than texts: give '' for none")
    return array


def _refuse(wrong: NDArray[np.bool_], name: str, values: NDArray[Any], cure: str) -> None:
    if (bad := np.flatnonzero(wrong)).size:
        raise DataError(
            f"{name} is wrong for {bad.size} samples, first id {bad[0]} with {values[bad[0]]!s:.40}: {cure}"
        )
