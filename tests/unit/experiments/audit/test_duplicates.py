"""Near-duplicates in the data of a run: images, features, texts and token ids, splits, outliers, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.core.algorithms.near_duplicates import ACROSS, WITHIN
from rayprune.errors import DataError, RunFolderError
from rayprune.experiments.audit.duplicates import find_in_data
from rayprune.sources import MemorySource, Splits, Subset, open_data
from tests.support.runs import run_config
from tests.support.sources import make_source


def test_an_exact_copy_across_splits_of_the_digits(tmp_path: Path) -> None:
    digits = open_data("digits").train
    train, validation = Subset(digits, np.arange(300)), Subset(digits, np.r_[np.arange(300, 380), 17])
    scan = find_in_data(run_config(tmp_path), Splits(train, validation), radius=1e-3)
    assert scan.kind == "image"
    assert (tmp_path / "run" / "duplicates" / "scores.parquet").exists()
    assert scan.duplicates.of[380] == 17
    assert scan.duplicates.split[[17, 380]].tolist() == [ACROSS, ACROSS]
    assert scan.duplicates.leaked.tolist() == [17]
    assert scan.duplicates.similarity[380] == pytest.approx(1.0)
    assert (scan.duplicates.of >= 0).sum() == 1
    assert np.isfinite(scan.outlier).all()


def test_a_finished_pass_is_only_read_and_another_radius_refused(tmp_path: Path) -> None:
    splits = Splits(Subset(open_data("digits").train, np.arange(100)), None)
    starts: list[Any] = []
    first = find_in_data(run_config(tmp_path), splits, on_start=starts.append)
    again = find_in_data(run_config(tmp_path), splits, on_start=starts.append)
    assert len(starts) == 1
    np.testing.assert_array_equal(first.outlier, again.outlier)
    np.testing.assert_array_equal(first.duplicates.of, again.duplicates.of)
    with pytest.raises(RunFolderError):
        find_in_data(run_config(tmp_path), splits, radius=0.5)


def test_features_are_standardized(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scales = np.array([1, 1e-4, 1e5, 1, 1, 1])
    features = (rng.normal(size=(200, 6)) * scales).astype(np.float32)
    features[50] = features[3] + np.float32([1e-6, 0, 0.1, 0, 0, 0])
    features[60] = features[3]
    features[60, 1] += 1e-3  # ten standard deviations
    features[70] = 9 * features.std(axis=0)
    validation = np.concatenate([features[120:121], (rng.normal(size=(20, 6)) * scales).astype(np.float32)])
    labels = np.arange(200) % 2
    splits = Splits(make_source(labels, features), make_source(np.arange(21) % 2, validation))
    scan = find_in_data(run_config(tmp_path), splits)
    assert scan.kind == "features"
    assert np.flatnonzero(scan.duplicates.of >= 0).tolist() == [50, 200]
    assert scan.duplicates.of[[50, 200]].tolist() == [3, 120]
    assert scan.duplicates.split[[3, 50, 120, 200]].tolist() == [WITHIN, WITHIN, ACROSS, ACROSS]


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    return [" ".join(rng.choice(words, size=30)) for _ in range(count)]


def test_texts(tmp_path: Path) -> None:
    texts = sentences(80)
    texts[40] = texts[4].upper() + "!"
    texts[41] = texts[5].replace(texts[5].split()[7], "typo")
    validation = [*sentences(90)[80:], texts[9]]
    train = MemorySource({"text": texts, "label": np.arange(80) % 3})
    scan = find_in_data(
        run_config(tmp_path), Splits(train, MemorySource({"text": validation, "label": np.arange(11) % 3}))
    )
    assert scan.kind == "text"
    assert np.flatnonzero(scan.duplicates.of >= 0).tolist() == [40, 41, 90]
    assert scan.duplicates.of[[40, 41, 90]].tolist() == [4, 5, 9]
    assert scan.duplicates.leaked.tolist() == [9]
    assert scan.duplicates.similarity[40] == pytest.approx(1.0, abs=1e-3)
    assert 0.9 < scan.duplicates.similarity[41] < 0.99


def test_token_ids_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 30_000, size=length) for length in rng.integers(5, 40, size=60)]
    tokens[33] = tokens[2].copy()
    scan = find_in_data(run_config(tmp_path), Splits(MemorySource({"input_ids": tokens}), None))
    assert scan.kind == "text"
    assert np.flatnonzero(scan.duplicates.of >= 0).tolist() == [33]
    assert scan.duplicates.of[33] == 2


def test_a_table_of_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = {"age": rng.integers(0, 90, 150), "income": rng.normal(size=150) * 1e4, "label": rng.integers(0, 2, 150)}
    for name in ("age", "income"):
        table[name][77] = table[name][7]
    scan = find_in_data(run_config(tmp_path), Splits(MemorySource(table), None))
    assert scan.kind == "features"
    assert np.flatnonzero(scan.duplicates.of >= 0).tolist() == [77]


def test_rows_without_anything_to_compare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image, text or numbers"):
        find_in_data(run_config(tmp_path), Splits(MemorySource({"label": np.arange(5)}), None))
