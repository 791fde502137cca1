"""Opening sources by name or from a function of the user, and the statistics of their inputs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from rayprune.cli.schema import keys_of
from rayprune.errors import ConfigError, RunFolderError
from rayprune.sources import SOURCES, Splits, default_augment, input_statistics, open_data
from rayprune.sources.tables.audits import AuditTable, write_audit
from tests.support.sources import all_rows, make_source


def test_unknown_sources_and_keys_are_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"data\.source 'digit' is unknown: did you mean 'digits'"):
        open_data("digit")
    with pytest.raises(ValueError, match=r"unknown key 'data\.pth' of source 'arrays': did you mean 'path'"):
        open_data("arrays", pth="x")
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        open_data("parquet")
    assert {"digits", "arrays", "parquet"} <= set(SOURCES)


def test_a_number_that_would_fill_the_memory_is_refused():
    numbers = [(name, key.name) for name, cls in SOURCES.items() for key in keys_of(cls) if "int" in str(key.hint)]
    assert ("parquet", "num_classes") in numbers
    for name, key in numbers:
        for value in (10**9, 10**12):
            if key in {"buffer_bytes", "options"} or (key, value) == ("max_pixels", 10**9):
                continue  # bounds of what may be read
            with pytest.raises(ConfigError, match=rf"data\.{key} = {value}: must be at most"):
                open_data(name, **{"dataset" if name == "torch_dataset" else "path": "", key: value})
    with pytest.raises(ConfigError, match=r"data\.image_size is 20,000, .* set it to 13,377 or less"):
        open_data("image_folder", path="", image_size=20_000)


def test_a_limit_applies_to_training_only():
    splits = open_data("digits", limit=100)
    assert (len(splits.train), len(splits.validation)) == (100, 360)
    assert len(open_data("digits", limit=9999).train) == 1437


def test_hold_out_takes_the_place_of_the_validation_part() -> None:
    whole = open_data("digits", limit=400)
    splits = open_data("digits", limit=400, hold_out=0.25)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation)) == (300, 100)
    assert splits.train.fingerprint != whole.train.fingerprint
    both = np.sort(np.concatenate([splits.train.labels, splits.validation.labels]))
    assert both.tolist() == np.sort(whole.train.labels).tolist()
    again = open_data("digits", limit=400, hold_out=0.25)
    assert again.validation is not None
    assert again.validation.fingerprint == splits.validation.fingerprint


def test_an_audit_replaces_labels_of_the_training_part_alone(tmp_path) -> None:
    keys = {"limit": 400, "hold_out": 0.25}
    plain = open_data("digits", **keys)
    labels = plain.train.labels
    p_wrong = np.where(np.arange(300) < 20, 0.7, 0.2)
    write_audit(tmp_path, AuditTable(labels, p_wrong, suggested_label=(labels + 1) % 10), plain.train.fingerprint)
    splits = open_data("digits", **keys, relabel=str(tmp_path))
    assert splits.train.labels[:20].tolist() == ((labels[:20] + 1) % 10).tolist()
    assert splits.train.labels[20:].tolist() == labels[20:].tolist()
    assert splits.train.fingerprint != plain.train.fingerprint
    assert splits.validation.fingerprint == plain.validation.fingerprint
    assert open_data("digits", **keys, relabel=str(tmp_path), relabel_at=0.71).train.fingerprint == (
        plain.train.fingerprint
    )
    for other in ({"limit": 400}, {"limit": 300}, {}):
        with pytest.raises(RunFolderError, match=r"of other data .* with the same data.limit and data.hold_out"):
            open_data("digits", **other, relabel=str(tmp_path))


def test_unknown_sources_have_no_default_augmentation():
    assert default_augment("digits") == {"crop": 1, "flip": False}
    assert default_augment("module:function") == {"crop": 0, "flip": False}


FUNCTIONS = """
from rayprune.sources import open_data, Splits
def splits(count=1): return open_data("digits", limit=count)
def source(): return open_data("digits").train
def pair(): return open_data("digits").train, None
def number(): return 3
"""


def test_functions_of_the_user_return_sources(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    assert len(open_data(f"{file}:splits", count=7).train) == 7
    assert open_data(f"{file}:source", limit=5).validation is None
    assert isinstance(open_data(f"{file}:pair"), Splits)
    with pytest.raises(ValueError, match="returned int"):
        open_data(f"{file}:number")
    with pytest.raises(ValueError, match="can't be called with the keys"):
        open_data(f"{file}:splits", cuont=7)


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [([0, 3, 1], 3, r"training row 1 has label 3, outside 0\.\.2"), ([0, -2], 2, "label -2"), ([], 2, "is empty")],
)
def test_labels_are_checked_when_opened(tmp_path, labels, num_classes, message):
    file = tmp_path / "bad.py"
    file.write_text(
        "from tests.support.sources import make_source\n"
        f"def bad(): return make_source({labels}, num_classes={num_classes})\n"
    )
    with pytest.raises(ValueError, match=message):
        open_data(f"{file}:bad")


def test_statistics_of_features_are_exact(monkeypatch):
    monkeypatch.setattr("rayprune.sources.registry.CHUNK_VALUES", 64)
    features = np.random.default_rng(0).normal(1e4, 2, (500, 3)).astype(np.float32)
    features[:, 2] = 0.1
    mean, deviation = input_statistics(make_source([0] * 500, features))
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(deviation[:2], features.astype(np.float64).std(axis=0)[:2], rtol=1e-9)
    assert deviation[2] == 1.0


def test_statistics_of_images_are_scaled_and_sampled_evenly():
    train = open_data("digits").train
    mean, deviation = input_statistics(train)
    pixels = all_rows(train)["image"] / 255
    np.testing.assert_allclose([mean[0], deviation[0]], [pixels.mean(), pixels.std()], rtol=1e-10)
    few = train.take(np.arange(10) * len(train) // 10)["image"] / 255
    np.testing.assert_allclose(input_statistics(train, num_rows=10)[0], [few.mean()], rtol=1e-10)


def test_importing_sources_loads_no_heavy_package():
    code = "import rayprune.sources, sys; print([m for m in ('sklearn', 'torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
