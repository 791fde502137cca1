"""The files of a run folder read back as written, after kills too, and damaged ones are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.engine.storage.run_folder import (
    append_metrics,
    mend_metrics,
    read_metrics,
    read_selection,
    write_environment,
    write_scores,
    write_selection,
    write_whole,
)
from rayprune.methods.infobatch import InfoBatch
from rayprune.sources.tables.scores import read_scores


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "note.txt"
    write_whole(file, "old · ")
    assert file.read_text(encoding="utf-8") == "old · "

    def fail(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_whole(file, "new")
    assert file.read_text(encoding="utf-8") == "old · "


def test_a_private_file_is_the_users_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    (tmp_path / "config.yaml.partial").touch(mode=0o644)  # of a kill
    write_whole(file, "settings", private=True)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("settings", 0o600)


def test_metrics_are_the_last_line_of_each_epoch_in_order(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    for epoch, loss in ((0, 3.0), (2, 1.0), (1, 2.0), (2, 0.5)):
        append_metrics(tmp_path, {"epoch": epoch, "loss": loss})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [3.0, 2.0, 0.5]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"epoch": 0, "loss": math.nan, "nested": {"high": math.inf, "low": 1.0}})
    assert read_metrics(tmp_path) == [{"epoch": 0, "loss": None, "nested": {"high": None, "low": 1.0}}]


@pytest.mark.parametrize("length", [1, 5, 12])
def test_an_incomplete_line_is_ignored_and_removed_by_the_next(length: int, tmp_path: Path) -> None:
    append_metrics(tmp_path, {"epoch": 0})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 1}'[:length])
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [0]
    append_metrics(tmp_path, {"epoch": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\ngarbage\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not valid JSON: restore the file"):
        read_metrics(tmp_path)


def test_a_line_that_a_kill_prevented_is_written_once(tmp_path: Path) -> None:
    mend_metrics(tmp_path, None)
    assert read_metrics(tmp_path) == []
    append_metrics(tmp_path, {"epoch": 0, "loss": 1.0})
    for _ in range(2):
        mend_metrics(tmp_path, {"epoch": 0, "loss": 9.0})
        mend_metrics(tmp_path, {"epoch": 1, "loss": 0.5})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 0.5]


def test_only_the_newest_selections_are_kept(tmp_path: Path) -> None:
    selections = [Selection.of_ids(np.arange(epoch, 10), 10, weights=np.full(10 - epoch, 1.5)) for epoch in range(4)]
    for epoch, selection in enumerate(selections):
        write_selection(tmp_path, epoch, selection, keep=2)
    assert sorted(file.name for file in (tmp_path / "selections").iterdir()) == ["epoch-000002.npz", "epoch-000003.npz"]
    for epoch in (2, 3):
        stored = read_selection(tmp_path, epoch)
        assert np.array_equal(stored.ids, selections[epoch].ids)
        assert np.array_equal(stored.weights, selections[epoch].weights)
    write_selection(tmp_path / "none", 0, selections[0], keep=0)
    assert not (tmp_path / "none").exists()


def test_scores_hold_the_selectors_columns_and_the_extra_ones(tmp_path: Path) -> None:
    selector = Selector(InfoBatch(prune_ratio=0.5), 6, 4, 3)
    selector.begin_epoch(0)
    selector.observe(np.arange(6), {"loss": np.arange(6, dtype=np.float32)}, 0)
    labels = np.arange(6) % 2
    file = write_scores(tmp_path, selector, labels, "f" * 64, extra={"collected_tdds": np.ones(6)})
    scores = read_scores(file)
    assert list(scores.scores) == ["collected_tdds", "loss", "last_visit", "times_pruned"]
    assert scores.labels is not None
    assert np.array_equal(scores.labels, labels)
    assert scores.fingerprint == "f" * 64
    assert scores.about == {"method": selector.method.to_config(), "seed": 3}
    other = write_scores(tmp_path, selector, labels, "f" * 64, method={"name": "tdds"})
    assert read_scores(other).about["method"] == {"name": "tdds"}


def test_the_environment_has_versions_hardware_and_facts(tmp_path: Path) -> None:
    write_environment(tmp_path, seed=5)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["seed"] == 5
    assert environment["versions"].keys() >= {"rayprune", "ray", "torch"}
    assert environment["machine"]["python"]
