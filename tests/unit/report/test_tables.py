"""The report's tables: samples by score, settings, and gaps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from rayprune.report.read import read_run
from rayprune.report.tables import facts, samples_table


def test_samples_come_in_order_of_their_score(runs: list[Path]) -> None:
    scores = pd.read_parquet(runs[1] / "scores.parquet")
    for ascending in (False, True):
        expected = scores.sort_values("loss", ascending=ascending, kind="stable")["id"].head(7).tolist()
        table = samples_table(read_run(runs[1]), "loss", 7, ascending)
        assert [int(row[0]) for row in table.rows] == expected


def test_an_unknown_score_is_refused_with_the_closest(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"no column 'los'.*loss"):
        samples_table(read_run(runs[1]), "los")


def test_a_method_within_a_method_is_listed_without_unset_options(run: Path) -> None:
    inner = "{name: infobatch, prune_ratio: 0.5, target_saving: null, quantiles: []}"
    (run / "config.yaml").write_text(f"method: {{name: shuffled, of: {inner}}}\ntrain: {{epochs: 4}}\n")
    assert dict(facts(read_run(run)))["method"] == "shuffled (of (name infobatch, prune_ratio 0.5))"
