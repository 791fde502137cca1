"""`rayprune audit CONFIG` on features: the report shows values, or a text where the source has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.engine.train.audit_gallery import write_audit_gallery
from rayprune.experiments.audit.runner import audit
from rayprune.report.audit import read_audit_section
from rayprune.report.collect import collect
from rayprune.report.page import render
from rayprune.sources import MemorySource, Splits
from rayprune.sources.tables.audits import AuditTable
from tests.support.runs import run_config

N, C = 240, 3
WRONG = np.arange(0, N, 10)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Three clusters; every tenth label is wrong, 239 is a copy of 238, and the first test row one of 5."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, C, N + 40)
    x = (rng.normal(size=(N + 40, 6)) + 2.5 * np.eye(C, 6)[true]).astype(np.float32)
    labels = true.copy()
    labels[WRONG] = (true[WRONG] + 1) % C
    for copy, of in ((239, 238), (N, 5)):
        x[copy], labels[copy] = x[of], labels[of]
    np.savez(tmp_path / "table.npz", x_train=x[:N], y_train=labels[:N], x_test=x[N:], y_test=labels[N:])
    return tmp_path / "table.npz"


def test_an_audit_of_features_shows_values(table: Path, tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        data={"source": "arrays", "path": str(table), "limit": None},
        audit={"folds": 2, "window": 2},
        train={"epochs": 5},
    )
    found = audit(config)
    assert np.isin(np.argsort(-found.table.p_wrong)[: WRONG.size], WRONG).mean() > 0.6
    assert found.table.duplicate_of[[239, 5]].tolist() == [238, 0]
    assert found.table.duplicate_split[[239, 5]].tolist() == ["train", "validation"]
    assert not list((found.folder / "audit_gallery").glob("*.png"))
    section = read_audit_section(found.folder)
    assert section is not None
    by_title = {group.title: group.table for group in section.groups}
    wrong = by_title["Probably wrong labels"]
    assert wrong is not None
    assert wrong.head == ("id", "label", "content", "evidence", "wrong")
    values = np.load(table)["x_train"][int(wrong.rows[0][0])]
    assert wrong.rows[0][2] == ", ".join(f"{value:.4g}" for value in values.tolist())
    assert wrong.rows[0][2] in render(collect([found.folder]))
    assert found.summary["predictions"] == "out_of_fold"


def test_a_text_beside_the_inputs_is_shown(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "features": np.zeros((4, 2), np.float32),
        "text": ["a  cat", "x" * 500, "", "no"],
        "label": np.arange(4) % 2,
    }
    table = AuditTable(np.arange(4) % 2, np.full(4, 0.9), group=np.full(4, "wrong_label", dtype=object))
    write_audit_gallery(Splits(MemorySource(rows), None), table, tmp_path)
    stored = json.loads((tmp_path / "audit_gallery" / "gallery.json").read_text())["groups"]["wrong_label"]
    assert [len(sample["text"]) for sample in stored] == [5, 160, 0, 2]
    assert stored[0]["text"] == "a cat"
