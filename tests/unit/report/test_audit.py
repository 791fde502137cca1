"""The section "Data audit" of a page, from an audit of digits with injected errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.engine.train.audit_gallery import PICTURES_OF_A_GROUP, write_audit_gallery
from rayprune.errors import RunFolderError
from rayprune.report.audit import Audit, Suspect, read_audit_section
from rayprune.report.collect import collect
from rayprune.report.page import render
from rayprune.sources import Splits, Subset, open_data
from rayprune.sources.tables.audits import AuditTable, write_audit
from tests.support.sources import make_source

WRONG, DUPLICATES, LEAKS, OUTLIERS = slice(0, 100), slice(100, 104), slice(104, 106), slice(106, 108)


def digits_audit() -> tuple[Splits, AuditTable]:
    """An audit of 300 digits: 100 are suspects, in descending order of id; 0 is a 1 by mistake most often."""
    splits = open_data("digits", limit=300)
    labels, num = splits.train.labels, 300
    p_wrong, suggested = np.full(num, 0.01), labels.copy()
    p_wrong[WRONG], suggested[WRONG] = np.linspace(0.5, 0.99, 100), (labels[WRONG] + 1) % 10
    of, split, group = np.full(num, -1), np.full(num, "", dtype=object), np.full(num, "", dtype=object)
    of[DUPLICATES], split[DUPLICATES] = [200, 201, 202, 203], "train"
    of[LEAKS], split[LEAKS] = [7, 359], "validation"
    for rows, name in ((WRONG, "wrong_label"), (DUPLICATES, "duplicate"), (LEAKS, "leak"), (OUTLIERS, "outlier")):
        group[rows] = name
    evidence = np.full(num, "", dtype=object)
    evidence[99] = "<b>5 of 5</b> networks"
    outlier = np.zeros(num)
    outlier[107] = 3.0
    return splits, AuditTable(
        labels, p_wrong, suggested, of, split, group, evidence=evidence, statistics={"outlier": outlier}
    )


def audited(folder: Path, splits: Splits, table: AuditTable, **summary: Any) -> Audit:
    write_audit(folder, table, splits.train.fingerprint)
    write_audit_gallery(splits, table, folder)
    if summary:
        (folder / "audit.json").write_text(json.dumps(summary))
    section = read_audit_section(folder)
    assert section is not None
    return section


def test_a_run_without_an_audit_has_no_section(run: Path) -> None:
    assert read_audit_section(run) is None
    assert "Data audit" not in render(collect([run]))


def test_the_samples_are_shown_in_order_of_certainty(tmp_path: Path) -> None:
    section = audited(tmp_path, *digits_audit())
    groups = {group.title: group for group in section.groups}
    assert list(groups) == ["Probably wrong labels", "Duplicates", "Leaks", "Outliers"]
    wrong = groups["Probably wrong labels"].samples
    assert [sample.id for sample in wrong] == list(range(99, 99 - PICTURES_OF_A_GROUP, -1))
    labels = open_data("digits", limit=300).train.labels
    assert wrong[0].caption == f"{labels[99]} → {(labels[99] + 1) % 10}"
    assert wrong[0].lines == ["id 99", "wrong 99.0%", "<b>5 of 5</b> networks"]
    assert [sample.id for sample in groups["Outliers"].samples] == [107, 106]
    twins = [(sample.id, sample.duplicate.split, sample.duplicate.id) for sample in groups["Leaks"].samples]
    assert twins == [(104, "validation", 7), (105, "validation", 359)]
    shown = [sample for group in section.groups for sample in group.samples]
    assert all(sample.image.startswith("data:image/png") for sample in shown)
    assert all(twin.image.startswith("data:image/png") for sample in shown if (twin := sample.duplicate))
    validation = open_data("digits").validation
    assert validation is not None
    assert groups["Leaks"].samples[0].duplicate.label == validation.labels[7]


def test_a_file_is_shown_by_class_and_name() -> None:
    suspect = Suspect(id=7, label=0, suggested=1, p_wrong=0.9, file="/data/images/train/cat/003.png")
    assert suspect.lines == ["id 7", "cat/003.png", "wrong 90.0%"]


def test_what_the_summary_lacks_is_counted(tmp_path: Path) -> None:
    splits, table = digits_audit()
    section = audited(tmp_path, splits, table)
    assert section.verdict[0] == f"About {table.p_wrong.mean():.1%} of the labels are wrong."
    assert section.verdict[1] == "100 samples of 300 more likely have a wrong label than a right one."
    assert section.counts.rows[:2] == [
        ("Probably wrong labels", "100", "33.33%"),
        ("Duplicates", "4", "1.33%"),
    ]
    assert section.pairs is not None
    counts = np.bincount(table.label[WRONG], minlength=10)
    assert [int(row[2]) for row in section.pairs.rows] == sorted(counts.tolist(), reverse=True)
    assert all(int(suggested) == (int(label) + 1) % 10 for label, suggested, *_ in section.pairs.rows)
    share = counts.max() / np.bincount(table.label)[counts.argmax()]
    assert section.pairs.rows[0][3] == f"{share:.1%}"


def test_the_summary_is_shown(tmp_path: Path) -> None:
    pairs = [{"label": 1, "suggested": 0, "count": 3, "rate": 0.1}, {"label": 0, "suggested": 1, "count": 5}]
    names = ["cat", "dog"]
    facts: dict[str, Any] = {"noise_rate": 0.2, "groups": {"leak": 9}, "unknown": "field"}
    section = audited(tmp_path, *digits_audit(), pairs=pairs, class_names=names, **facts)
    assert section.verdict[0] == "About 20.0% of the labels are wrong."
    assert section.pairs is not None
    assert section.pairs.rows == [("cat (0)", "dog (1)", "5", "–"), ("dog (1)", "cat (0)", "3", "10.0%")]
    assert [row[1] for row in section.counts.rows] == ["0", "0", "9", "0", "0", "0"]


def test_the_page_holds_the_pictures_and_escapes_texts(run: Path) -> None:
    audited(run, *digits_audit())
    page = render(collect([run]))
    section = page[page.index("<h2>Data audit</h2>") : page.index("<h2>Result</h2>")]
    assert section.count("<img src=") == PICTURES_OF_A_GROUP + 2 * 4 + 2 * 2 + 2
    assert section.count('<li class="pair"><div><img') == 6
    assert "&lt;b&gt;5 of 5&lt;/b&gt; networks" in section
    assert not re.search(r"(src|href)=\"(?!data:)", section)


def test_an_audit_alone_has_a_page(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    audited(folder, *digits_audit())
    page = render(collect([folder]))
    assert "a data audit" in page
    assert page.count("<h2>Data audit</h2>") == 1
    assert page.count("<img src=") == PICTURES_OF_A_GROUP + 2 * 4 + 2 * 2 + 2
    together = collect([folder, run])
    assert [named.name for named in together.audits] == ["mine"]
    assert len(together.runs) == 1
    assert "Data audit" in render(together)


def test_the_runs_of_an_audit_are_no_runs_of_its_page(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "all" / "mine"
    shutil.copytree(run, folder / "fold_1")
    audited(folder, *digits_audit())
    for named in (folder, folder.parent):
        collected = collect([named])
        assert [audit.name for audit in collected.audits] == ["mine"]
        assert collected.runs == []


def test_data_without_pictures_are_tables(run: Path) -> None:
    features = np.arange(120, dtype=np.float32).reshape(10, 12) / 3
    source = make_source(np.arange(10) % 3, features)
    splits = Splits(Subset(source, np.arange(6)), Subset(source, np.arange(6, 10)))
    table = AuditTable(
        splits.train.labels,
        np.linspace(0, 1, 6),
        duplicate_of=[-1, 2, -1, -1, -1, -1],
        duplicate_split=["", "validation", "", "", "", ""],
        group=["outlier", "leak", "", "wrong_label", "wrong_label", "wrong_label"],
        suggested_label=[0, 1, 2, 1, 2, 2],
    )
    section = audited(run, splits, table)
    wrong, leak, _ = section.groups
    assert wrong.table is not None
    assert wrong.table.head == ("id", "label", "content", "wrong")
    assert [row[0] for row in wrong.table.rows] == ["5", "4", "3"]
    assert wrong.table.rows[2] == ("3", "0 → 1", "12, 12.33, 12.67, 13, 13.33, 13.67, 14, 14.33, …", "60.0%")
    assert leak.table is not None
    assert leak.table.rows[0][3] == "validation id 2, labeled 2"
    page = render(collect([run]))
    assert "12, 12.33, 12.67" in page


def test_the_gallery_is_written_anew(tmp_path: Path) -> None:
    splits, table = digits_audit()
    audited(tmp_path, splits, table)
    before = {file.name for file in (tmp_path / "audit_gallery").iterdir()}
    assert {"gallery.json", "99.png", "200.png", "validation-7.png"} <= before
    few = AuditTable(table.label, table.p_wrong, group=np.where(np.arange(300) == 5, "easy", ""))
    section = audited(tmp_path, splits, few)
    assert {file.name for file in (tmp_path / "audit_gallery").iterdir()} == {"gallery.json", "5.png"}
    assert [(group.title, len(group.samples)) for group in section.groups] == [("Easy", 1)]


def test_an_audit_without_gallery_or_summary_still_counts(tmp_path: Path) -> None:
    write_audit(tmp_path, digits_audit()[1])
    section = read_audit_section(tmp_path)
    assert section is not None
    assert section.counts.rows[0][1] == "100"
    wrong, duplicates, leaks, outliers = (group.table for group in section.groups)
    assert wrong is not None
    assert duplicates is not None
    assert leaks is not None
    assert outliers is not None
    assert wrong.head == ("id", "label", "evidence", "wrong")
    assert [row[0] for row in wrong.rows] == [str(row) for row in range(99, 79, -1)]
    assert wrong.rows[0][2] == "<b>5 of 5</b> networks"
    assert duplicates.rows[0][2].startswith("train id 200, labeled ")
    assert "same as" not in leaks.head


@pytest.mark.parametrize(("name", "content"), [("audit.json", '{"pairs": 3}'), ("audit.json", "[")])
def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path, name: str, content: str) -> None:
    write_audit(tmp_path, digits_audit()[1])
    (tmp_path / name).write_text(content)
    with pytest.raises(RunFolderError, match=rf"^{re.escape(str(tmp_path / name))} is not [^\n]*: [^\n]*$"):
        read_audit_section(tmp_path)
