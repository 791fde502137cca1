"""Files of audits: a written table is read back, and faults are one line with the cure.

Shapes: N samples.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprune.errors import ConfigError, DataError, RunFolderError
from rayprune.sources.tables.audits import COLUMNS, AuditTable, corrected_labels, read_audit, write_audit
from rayprune.sources.tables.scores import read_scores, write_scores
from tests.support.sources import make_source

LABEL = np.array([0, 1, 2, 1, 0])
P_WRONG = np.array([0.0, 0.9, 0.5, 0.25, 1.0])
COLUMNS_OF_TABLE: dict[str, Any] = {
    "label": LABEL,
    "p_wrong": P_WRONG,
    "suggested_label": [0, 2, 2, 1, 1],
    "duplicate_of": [-1, 7, -1, 0, 3],
    "duplicate_split": ["", "validation", "", "train", "train"],
    "group": ["", "leak", "easy", "duplicate", "wrong_label"],
    "evidence": ["", "7 is a validation sample", "", "é\n", "all of 5 networks disagree"],
}


def table_of(**changes: Any) -> AuditTable:
    return AuditTable(**{**COLUMNS_OF_TABLE, **changes})


def test_a_written_audit_is_read_back(tmp_path: Path) -> None:
    table = table_of(statistics={"margin": [0.1, np.nan, 3, -1, np.inf]})
    file = write_audit(tmp_path, table, "ab", {"folds": 5})
    assert [path.name for path in tmp_path.iterdir()] == [file.name] == ["audit.parquet"]
    for path in (file, tmp_path):
        stored = read_audit(path)
        assert (stored.path, stored.fingerprint, dict(stored.about)) == (file, "ab", {"folds": 5})
        assert list(stored.table.columns()) == [*COLUMNS[1:], "margin"]
        for name, column in stored.table.columns().items():
            assert column.dtype == table.columns()[name].dtype
            np.testing.assert_array_equal(column, table.columns()[name])
    types = {field.name: str(field.type) for field in pq.read_schema(file)}
    assert types == {
        **dict.fromkeys(["id", "label", "suggested_label", "duplicate_of"], "int64"),
        **dict.fromkeys(["p_wrong", "margin"], "float"),
        **dict.fromkeys(["duplicate_split", "group", "evidence"], "string"),
    }


def test_rows_in_another_order_are_sorted_by_id(tmp_path: Path) -> None:
    file = write_audit(tmp_path, table_of())
    pq.write_table(pq.read_table(file).take([3, 0, 4, 1, 2]), file)
    assert read_audit(file).table.label.tolist() == LABEL.tolist()
    assert read_audit(file).table.group.tolist() == COLUMNS_OF_TABLE["group"]


def test_what_is_left_out_has_nothing_to_say() -> None:
    table = AuditTable(LABEL, P_WRONG)
    assert not table.relabeled.any()
    assert set(table.duplicate_of) == {-1}
    assert {*table.group, *table.evidence, *table.duplicate_split} == {""}


def test_suspects_are_dropped_and_labels_corrected_from_the_threshold_on() -> None:
    table = table_of()
    assert np.flatnonzero(table.kept(0.5)).tolist() == [0, 3]
    assert np.flatnonzero(table.kept(0.500001)).tolist() == [0, 2, 3]
    assert table.kept(None).all()
    assert table.corrected(0.9).tolist() == [0, 2, 2, 1, 1]
    assert table.corrected(0.91).tolist() == [0, 1, 2, 1, 1]
    exact = AuditTable(LABEL, np.full(5, 0.7), suggested_label=LABEL + 1)  # 0.7 is no float32
    assert not exact.kept(0.7).any()
    assert exact.corrected(0.7).tolist() == (LABEL + 1).tolist()


def test_one_of_a_group_of_duplicates_is_kept_however_they_are_chained() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        of = np.where(rng.random(30) < 0.6, rng.integers(0, 30, 30), -1)
        of[of == np.arange(30)] = -1
        split = np.where(of < 0, "", np.where(rng.random(30) < 0.8, "train", "validation"))
        p_wrong = np.round(rng.random(30), 1)
        table = AuditTable(np.zeros(30, int), p_wrong, duplicate_of=of, duplicate_split=split.tolist())
        member = list(range(30))
        for _ in range(30):  # a naive flood
            for a, b in enumerate(of):
                if split[a] == "train":
                    member[a] = member[b] = min(member[a], member[b])
        assert table.duplicate_groups().tolist() == member
        best: dict[int, int] = {}
        for sample in sorted((sample for sample in range(30) if p_wrong[sample] < 0.5), key=lambda s: (p_wrong[s], s)):
            best.setdefault(member[sample], sample)
        assert np.flatnonzero(table.kept(0.5, drop_duplicates=True)).tolist() == sorted(best.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p_wrong": [0, 1, 1.5, 0, 2]}, "p_wrong is wrong for 2 samples, first id 2"),
        ({"p_wrong": [0, np.nan, 0, 0, 0]}, "p_wrong is wrong for 1 samples, first id 1"),
        ({"p_wrong": [0.0]}, "column 'p_wrong' is of shape (1,): give one value for each of 5"),
        ({"label": LABEL + 0.5}, "column 'label' is float64: give whole numbers"),
        ({"suggested_label": [-1] * 5}, "suggested_label is wrong for 5 samples, first id 0"),
        ({"group": ["", "", "wrong", "", ""]}, "group 'wrong' is unknown: "),
        ({"duplicate_split": ["test"] * 5}, "duplicate_split 'test' is unknown: "),
        ({"duplicate_split": [""] * 5}, "duplicate_split is wrong for 3 samples, first id 1"),
        ({"duplicate_of": [-1, 7, -1, 3, 3]}, "duplicate_of is wrong for 1 samples, first id 3 "),
        ({"duplicate_of": [-1, 7, -1, 5, 3]}, "duplicate_of is wrong for 1 samples, first id 3 "),
        ({"evidence": [None] * 5}, "column 'evidence' holds other values than texts"),
        ({"statistics": {"label": LABEL}}, "a statistic is called 'label'"),
        ({"statistics": {"margin": ["x"] * 5}}, "column 'margin' is <U1: give numbers"),
    ],
)
def test_a_wrong_table_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        table_of(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns("group"), "not an audit, it has no column 'group'"),
        (lambda table: table.slice(1), "must hold each id of 0..N-1 once"),
        (lambda table: table.set_column(3, "p_wrong", pa.array([2.0] * 5)), "p_wrong is wrong for 5 samples"),
        (lambda table: table.set_column(1, "label", pa.array(["a"] * 5)), "column 'label' is object"),
        (lambda table: table.set_column(7, "evidence", pa.array([None] * 5)), "'evidence' has 5 empty values"),
        (lambda table: table.replace_schema_metadata({b"rayprune": b'{"schema": 9}'}), "upgrade rayprune"),
        (lambda table: table.replace_schema_metadata({b"rayprune": b'{"kind": "selection"}'}), "it is a selection"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    file = write_audit(tmp_path, table_of())
    pq.write_table(change(pq.read_table(file)), file)
    with pytest.raises(RunFolderError, match=re.escape(message)) as error:
        read_audit(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"audit.parquet does not exist: rayprune audit CONFIG writes it"):
        read_audit(tmp_path)
    scores = write_scores(tmp_path / "scores.parquet", 5, {"loss": P_WRONG}, labels=LABEL)
    with pytest.raises(RunFolderError, match="is not an audit, it has no column 'suggested_label': give the audit"):
        read_audit(scores)
    scores.write_text("no table")
    with pytest.raises(RunFolderError, match="is not a Parquet file"):
        read_audit(scores)
    with pytest.raises(ConfigError, match=r"end it in .parquet"):
        write_audit(tmp_path / "audit.txt", table_of())
    with pytest.raises(ConfigError, match="there is no folder"):
        write_audit(tmp_path / "missing" / "audit.parquet", table_of())


def test_an_audit_of_other_data_is_refused(tmp_path: Path) -> None:
    source = make_source(np.arange(30) % 3)
    p_wrong = np.zeros(30)
    file = write_audit(tmp_path, AuditTable(source.labels, p_wrong), source.fingerprint)
    read_audit(file).check_source(source)
    write_audit(file, AuditTable(source.labels, p_wrong), "another")
    with pytest.raises(RunFolderError, match=r"of other data \(fingerprint another, here \w{12}\): audit these data"):
        corrected_labels(file, source, 0.5)
    write_audit(file, AuditTable(source.labels + 1, p_wrong))
    with pytest.raises(RunFolderError, match=r"of other labels: 30 differ, first ids \[0, 1, 2, 3, 4\]: audit these"):
        corrected_labels(file, source, 0.5)
    write_audit(file, AuditTable(source.labels[1:], p_wrong[1:]))
    with pytest.raises(RunFolderError, match="an audit of 29 samples, and the training part has 30: audit these data"):
        corrected_labels(file, source, 0.5)


def test_files_of_samples_are_kept(tmp_path: Path) -> None:
    names = ["cat/0.png", "cat/ü 1.png", "dog/2.png"]
    table = AuditTable(np.array([0, 0, 1]), np.zeros(3), file=np.array(names, dtype=object))
    assert read_audit(write_audit(tmp_path, table)).table.file.tolist() == names
    assert list(table.columns()) == [*COLUMNS[1:], "file"]
    assert read_audit(write_audit(tmp_path, AuditTable(table.label, table.p_wrong))).table.file is None
    with pytest.raises(DataError, match="'file' is of shape"):
        AuditTable(np.array([0, 0, 1]), np.zeros(3), file=np.array(names[:2], dtype=object))


def test_corrected_labels(tmp_path: Path) -> None:
    source = make_source(np.arange(4) % 3)
    table = AuditTable(source.labels, np.array([0.9, 0.4, 0.6, 0.0]), np.array([2, 1, 1, 0]))
    file = write_audit(tmp_path, table, source.fingerprint, {"audit": {"at": 0.5}})
    assert corrected_labels(file, source, 0.5).tolist() == [2, 1, 1, 0]
    assert corrected_labels(file, source, 0.7).tolist() == [2, 1, 2, 0]
    with pytest.raises(ConfigError, match=r"from p_wrong 0.5 on; run the audit again with audit.at=0.3, which trains"):
        corrected_labels(file, source, 0.3)
    write_audit(tmp_path, table, source.fingerprint)  # by another program
    assert corrected_labels(file, source, 0.3).tolist() == [2, 1, 1, 0]
    write_audit(tmp_path, AuditTable(source.labels, np.ones(4), np.array([2, 1, 7, 0])), source.fingerprint)
    with pytest.raises(RunFolderError, match=r"suggests label 7 for sample 2, outside 0\.\.2: correct"):
        corrected_labels(file, source, 0.5)


def test_an_audit_can_be_read_as_scores(tmp_path: Path) -> None:
    write_audit(tmp_path, table_of(statistics={"margin": P_WRONG}))
    assert {"p_wrong", "margin"} <= read_scores(tmp_path / "audit.parquet").scores.keys()
