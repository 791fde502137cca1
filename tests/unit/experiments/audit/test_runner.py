"""A whole audit of digits with known errors: findings, files, resuming, and data that cannot be audited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rayprune.core.algorithms.near_duplicates import Duplicates
from rayprune.core.audit.noise_model import NoiseModel
from rayprune.core.audit.suspects import Suspects
from rayprune.engine.storage.audit_findings import AuditSettings, Compared, table_of
from rayprune.engine.train.driver import Start
from rayprune.errors import ConfigError, RunFolderError
from rayprune.experiments.audit.runner import Audit, audit, digest_of, evidence_of
from rayprune.sources.tables.audits import COLUMNS, read_audit
from tests.support.audits import COPIES, LEAK, LEAKED, ORIGINALS, NoisyDigits, audit_config, noisy_digits

STATISTICS = {"held_out_probability", "held_out_margin", "probability", "loss", "margin", "correct"}
FILES = {"audit.yaml", "audit.parquet", "audit.json", "audit_gallery", "duplicates", "fold_1", "fold_2", "fold_3"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> NoisyDigits:
    return noisy_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def finished(digits: NoisyDigits) -> Audit:
    return audit(audit_config(digits.path, digits.path.parent))


def test_wrong_labels_are_found(digits: NoisyDigits, finished: Audit) -> None:
    table, wrong = finished.table, digits.wrong
    assert roc_auc_score(wrong, table.p_wrong) > 0.95
    suspects = table.p_wrong >= 0.5
    assert wrong[suspects].mean() > 0.8
    assert suspects[wrong].mean() > 0.8
    assert (table.suggested_label[suspects] == digits.true[suspects]).mean() > 0.7
    np.testing.assert_array_equal(table.suggested_label[~suspects], table.label[~suspects])
    assert finished.summary["noise_rate"] == pytest.approx(wrong.mean(), abs=0.04)
    assert table.p_wrong.mean() == pytest.approx(finished.summary["noise_rate"], abs=0.01)


def test_copies_are_found(finished: Audit) -> None:
    table = finished.table
    copies = [*COPIES, LEAK]
    assert table.duplicate_of[copies].tolist() == [*ORIGINALS, LEAKED]
    assert table.duplicate_split[copies].tolist() == ["train"] * 3 + ["validation"]
    assert np.flatnonzero(table.duplicate_of >= 0).tolist() == copies
    np.testing.assert_allclose(table.statistics["similarity"][copies], 1.0, atol=1e-3)
    assert table.group[LEAK] == "leak"
    right = [copy for copy in COPIES if table.p_wrong[copy] < 0.5]
    assert right
    assert set(table.group[right]) == {"duplicate"}


def test_groups_and_evidence(finished: Audit) -> None:
    table = finished.table
    statistics = table.statistics
    assert ((table.group == "wrong_label") == (table.p_wrong >= 0.5)).all()
    easy = table.group == "easy"
    assert 20 < easy.sum() < 400
    assert statistics["correct"][easy].min() >= 0.9
    assert statistics["held_out_probability"][easy].min() >= 0.95
    assert ((table.evidence == "") == (table.group == "")).all()
    suspect = int(np.flatnonzero(table.group == "wrong_label")[0])
    own = statistics["held_out_probability"][suspect]
    expected = (
        f"{table.label[suspect]} has probability {own:.2f} out of fold, {table.suggested_label[suspect]} is likely"
    )
    assert table.evidence[suspect] == expected


def test_files(finished: Audit, digits: NoisyDigits) -> None:
    assert finished.folder == digits.path.parent / "audit"
    assert {path.name for path in finished.folder.iterdir()} - {".lock"} == FILES
    stored = read_audit(finished.folder)
    assert set(stored.table.columns()) == {*COLUMNS[1:], *STATISTICS, "similarity", "outlier"}
    for name, column in finished.table.columns().items():
        np.testing.assert_array_equal(stored.table.columns()[name], column)
    assert stored.about["audit"]["folds"] == 3
    with np.load(digits.path) as arrays:
        np.testing.assert_array_equal(stored.table.label, arrays["y_train"])
    gallery = json.loads((finished.folder / "audit_gallery" / "gallery.json").read_text())
    assert [entry["id"] for entry in gallery["groups"]["leak"]] == [LEAK]


def test_the_summary(finished: Audit, digits: NoisyDigits) -> None:
    summary, table = json.loads((finished.folder / "audit.json").read_text()), finished.table
    assert summary == finished.summary
    assert (summary["num_samples"], summary["folds"], summary["rule"], summary["at"]) == (604, 3, "ensemble", 0.5)
    assert summary["samples_trained"] == 12 * 2 * 604
    assert summary["groups"] == {name: int((table.group == name).sum()) for name in sorted(set(table.group) - {""})}
    assert summary["compared_by"] == "image"
    held_out = evidence_of(audit_config(digits.path, digits.path.parent), table.label).held_out
    assert summary["accuracy"] == pytest.approx((held_out.argmax(axis=1) == table.label).mean(), abs=1e-6)
    assert not summary["is_weak"]
    copies = np.flatnonzero(table.duplicate_split == "train")
    assert summary["conflicts"] == (table.label[copies] != table.label[table.duplicate_of[copies]]).sum() > 0
    assert sum(pair["count"] for pair in summary["pairs"]) <= table.relabeled.sum()
    for pair in summary["pairs"][:5]:
        counted = (table.label == pair["label"]) & (table.suggested_label == pair["suggested"])
        assert pair["count"] == counted.sum()
        assert pair["rate"] == pytest.approx(counted.sum() / (table.label == pair["label"]).sum(), abs=0.05)


def test_the_same_audit_again_starts_nothing(digits: NoisyDigits, finished: Audit) -> None:
    before = {name: (finished.folder / name).read_bytes() for name in ("audit.parquet", "audit.json")}
    starts: list[Any] = []
    again = audit(audit_config(digits.path, digits.path.parent), on_start=starts.append)
    assert starts == []
    assert again.summary == finished.summary
    assert {name: (finished.folder / name).read_bytes() for name in before} == before


def test_an_interrupted_audit_continues(digits: NoisyDigits, tmp_path: Path) -> None:
    config = audit_config(digits.path, tmp_path, train={"epochs": 3}, audit={"folds": 2, "duplicates": False})

    def interrupt(start: Start) -> None:
        if start.folder.name == "fold_2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(config, on_start=interrupt)
    assert not (tmp_path / "audit" / "audit.parquet").exists()
    starts: list[Any] = []
    continued = audit(config, on_start=starts.append)
    assert [start.folder.name for start in starts] == ["fold_2"]
    whole = audit(audit_config(digits.path, tmp_path / "whole", **sections_of(config)))
    np.testing.assert_array_equal(continued.table.p_wrong, whole.table.p_wrong)
    assert "similarity" not in whole.table.statistics
    assert "leak" not in whole.summary["groups"]


def sections_of(config: Any) -> dict[str, Any]:
    return {"train": {"epochs": config.train.epochs}, "audit": config.audit.model_dump(mode="json")}


@pytest.mark.parametrize(
    "sections",
    [{"audit": {"window": 2}}, {"audit": {"folds": 4}}, {"train": {"epochs": 13}}, {"optim": {"lr": 0.2}}],
)
def test_another_setting_in_the_same_folder_is_refused(
    digits: NoisyDigits, finished: Audit, sections: dict[str, Any]
) -> None:
    before = (finished.folder / "audit.yaml").read_bytes()
    with pytest.raises(RunFolderError, match=r"holds another audit .*: choose another run.name") as refused:
        audit(audit_config(digits.path, digits.path.parent, **sections))
    assert "\n" not in str(refused.value)
    assert (finished.folder / "audit.yaml").read_bytes() == before


def test_another_rule_and_threshold_train_nothing(digits: NoisyDigits, finished: Audit, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "audit")
    starts: list[Any] = []
    sections = {"audit": {"rule": "margin", "at": 0.3}}
    again = audit(audit_config(digits.path, tmp_path, **sections), on_start=starts.append)
    assert not starts
    assert (again.summary["rule"], again.summary["at"]) == ("margin", 0.3)
    assert again.table.p_wrong.tolist() != finished.table.p_wrong.tolist()
    assert sorted(again.table.p_wrong) == pytest.approx(sorted(finished.table.p_wrong), abs=1e-3)  # equal ranks share


def test_the_folder_of_a_run_is_refused(digits: NoisyDigits, finished: Audit) -> None:
    storage = finished.folder
    config = audit_config(digits.path, storage)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": "fold_1"})})
    with pytest.raises(RunFolderError, match="holds a run, not an audit"):
        audit(config)


def test_the_digest_is_of_settings_that_affect_results(digits: NoisyDigits, tmp_path: Path) -> None:
    config = audit_config(digits.path, tmp_path)
    same = [{"run": {"storage_path": "elsewhere"}}, {"scaling": {"threads": 2}}, {"method": {"ema": 0.7}}]
    assert {digest_of(audit_config(digits.path, tmp_path, **sections)) for sections in same} == {digest_of(config)}
    others = [{"audit": {"window": 4}}, {"audit": {"train": {"epochs": 5}}}, {"model": {"name": "resnet8"}}]
    digests = {digest_of(audit_config(digits.path, tmp_path, **sections)) for sections in others}
    assert len(digests | {digest_of(config)}) == 4


def test_one_run_on_all_samples_with_settings_of_its_own(digits: NoisyDigits, tmp_path: Path) -> None:
    own = {"folds": 1, "duplicates": False, "train": {"epochs": 8}, "optim": {"lr": 0.05}}
    result = audit(audit_config(digits.path, tmp_path, audit=own))
    assert result.summary["samples_trained"] == 8 * 604
    assert roc_auc_score(digits.wrong, result.table.p_wrong) > 0.9
    statistics = result.table.statistics
    assert not any(name.startswith("held_out") for name in statistics)  # nothing was left out


def test_repeats_average_over_other_folds(digits: NoisyDigits, tmp_path: Path) -> None:
    config = audit_config(digits.path, tmp_path, audit={"folds": 2, "repeats": 2, "duplicates": False})
    result = audit(config)
    names = {folder.name for folder in result.folder.iterdir() if folder.is_dir()}
    assert names == {"fold_1", "fold_2", "fold_1_repeat_2", "fold_2_repeat_2", "audit_gallery"}
    evidence = evidence_of(config, np.zeros(604, dtype=np.int64))
    assert evidence.losses.shape == (4, 604)
    left_out = np.isnan(evidence.losses)
    assert left_out.sum(axis=0).tolist() == [2] * 604  # once in each repeat
    assert (left_out[0] != left_out[2]).any()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(30, dtype=int), "an audit needs labels of at least two classes"),
        (np.array([0, 1]), "audit.folds = 3: there are 2 samples, use fewer folds"),
    ],
)
def test_data_that_cannot_be_audited(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    features = np.random.default_rng(0).normal(size=(labels.size, 4)).astype(np.float32)
    np.savez(tmp_path / "few.npz", x_train=features, y_train=labels, x_test=features, y_test=labels)
    with pytest.raises(ConfigError, match=message) as refused:
        audit(audit_config(tmp_path / "few.npz", tmp_path))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "audit").exists()


def test_a_sample_is_in_the_first_group_that_fits(tmp_path: Path) -> None:
    names = ["wrong_label", "duplicate", "leak", "outlier", "never_learned", "easy", ""]
    num = len(names)
    p_wrong = np.float32([0.5, 0.4, 0, 0, 0, 0, 0])
    # Ids 0 and 1 are copies of validation sample 0 (id 7), and id 2 of validation sample 1 (id 8).
    of, split = np.array([-1, 0, -1, -1, -1, -1, -1, 0, 2]), np.array([2, 2, 2, 0, 0, 0, 0, 2, 2], dtype=np.int8)
    outlier = np.float32([9, 9, 9, 6, 5.9, 0, 0, 0, 0])
    compared = Compared(Duplicates(of, split, np.ones(9, np.float32), num), outlier, "image")
    statistics = {
        "correct": np.float32([0, 0, 0, 0, 0, 0.9, 0.89]),
        "held_out_probability": np.float32([0, 0, 0, 0, 0, 0.95, 1.0]),
    }
    model = NoiseModel(1.0, np.eye(2), np.eye(2) / 2)
    suspects = Suspects(p_wrong, np.ones(num, dtype=np.int64), model, statistics)
    labels = np.array([0, 1, 0, 0, 0, 0, 0])
    table = table_of(labels, suspects, compared, AuditSettings(class_names=("cat", "dog")))
    assert table.group.tolist() == names
    assert table.suggested_label.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert table.duplicate_of.tolist() == [0, 0, 1, -1, -1, -1, -1]
    assert table.duplicate_split.tolist() == ["validation", "train", "validation", "", "", "", ""]
    assert table.evidence.tolist() == [
        "cat has probability 0.00 out of fold, dog is likely",
        "similarity 1.000, but 0 is labeled cat",
        "similarity 1.000",
        "6.0 robust standard deviations from its class",
        "predicted in 0% of its training visits, 0.00 out of fold",
        "predicted in 90% of its training visits, 0.95 out of fold",
        "",
    ]
    without = table_of(np.zeros(num, dtype=np.int64), suspects, None, AuditSettings())
    assert without.group.tolist() == ["wrong_label", *["never_learned"] * 4, "easy", ""]
    assert (without.duplicate_of == -1).all()
