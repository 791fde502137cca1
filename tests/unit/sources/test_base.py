"""Views of a source, the stratified holdout, input statistics, digits and the registry."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rayprune.sources import (
    SOURCES,
    Column,
    Limited,
    Schema,
    Splits,
    Subset,
    default_augment,
    digits,
    holdout,
    input_statistics,
    open_data,
)
from rayprune.sources.fingerprint import array_digest, digest, file_digest
from rayprune.sources.memory import RowSource


def make_arrays(labels, features):
    return {"features": features, "label": labels}


def make_source(labels, features=None, num_classes=None):
    labels = np.asarray(labels, dtype=np.int64)
    features = np.arange(len(labels), dtype=np.float32)[:, None] if features is None else features
    schema = Schema(
        {"features": Column(features.shape[1:], "float32"), "label": Column((), "int64")},
        "features",
        num_classes or int(labels.max(initial=0)) + 1,
    )
    return RowSource(partial(make_arrays, labels, features), schema, digest(labels, features), labels)


class GroupedSource(RowSource):
    @property
    def groups(self):
        return np.array([0, 4, 7, 10])


def test_digits_split_is_fixed_and_stratified():
    first, second = open_data("digits"), open_data("digits")
    assert (len(first.train), len(first.validation)) == (1437, 360)
    assert first.train.fingerprint == second.train.fingerprint != first.validation.fingerprint
    counts = np.bincount(first.validation.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    batch = first.train.take(np.array([5, 0, 5]))
    assert batch["image"].shape == (3, 8, 8, 1)
    assert batch["image"].dtype == np.uint8
    assert batch["image"].max() <= 240
    np.testing.assert_array_equal(batch["label"], first.train.labels[[5, 0, 5]])
    assert first.train.schema.class_names == tuple("0123456789")


@pytest.mark.parametrize("in_package", [True, False], ids=["file", "scikit-learn"])
def test_digits_are_scikit_learns(in_package, monkeypatch):
    if not in_package:
        monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    arrays, expected = digits.load_arrays(), load_digits()
    np.testing.assert_array_equal(arrays["image"][..., 0], expected.images * 15)
    np.testing.assert_array_equal(arrays["label"], expected.target)
    assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int64)


def test_opening_digits_imports_no_scikit_learn():
    code = (
        "import sys; from rayprune.sources import open_data; open_data('digits'); assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_pickle_carries_no_pixels():
    train = open_data("digits").train
    pickled = pickle.dumps(train)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    ids = np.array([1436, 3])
    np.testing.assert_array_equal(again.take(ids)["image"], train.take(ids)["image"])
    np.testing.assert_array_equal(again.labels, train.labels)
    assert again.fingerprint == train.fingerprint


def test_importing_sources_loads_no_heavy_package():
    code = "import rayprune.sources, sys; print([m for m in ('sklearn', 'torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_take_keeps_order_and_duplicates():
    taken = make_source([0, 1, 0, 1]).take(np.array([3, 0, 3]))
    assert taken["features"].ravel().tolist() == [3, 0, 3]
    assert taken["label"].tolist() == [1, 0, 1]
    assert taken["label"].dtype == np.int64


def test_take_of_no_ids_is_empty():
    assert make_source([0, 1]).take(np.array([], dtype=np.int64))["features"].shape == (0, 1)


@pytest.mark.parametrize("ids", [[0, 4], [-1]])
@pytest.mark.parametrize(
    "source",
    [make_source([0, 1, 0, 1]), Limited(make_source([0] * 9), 4), Subset(make_source([0] * 9), np.array([8, 1, 2, 3]))],
)
def test_unknown_ids_are_named(source, ids):
    with pytest.raises(ValueError, match=rf"first {ids[-1]}: valid are 0\.\.3"):
        source.take(np.array(ids))


def test_limited():
    source = make_source([0, 1, 2, 0, 1])
    limited = Limited(source, 3)
    assert len(limited) == 3
    assert limited.labels.tolist() == [0, 1, 2]
    assert limited.fingerprint not in {source.fingerprint, Limited(source, 2).fingerprint}
    whole = Limited(source, 99)
    assert (len(whole), whole.fingerprint) == (5, source.fingerprint)
    with pytest.raises(ValueError, match=r"data\.limit is 0"):
        Limited(source, 0)


def test_subset_pickles_its_rows():
    source = make_source([0, 1, 2, 0, 1])
    for rows in ([1, 3, 4], [4, 1, 1]):
        again = pickle.loads(pickle.dumps(Subset(source, np.array(rows))))
        assert again.take(np.arange(3))["features"].ravel().tolist() == rows
        assert again.fingerprint == Subset(source, np.array(rows)).fingerprint
    with pytest.raises(ValueError, match="first 5"):
        Subset(source, np.array([5]))


def test_groups_follow_the_rows():
    plain = make_source([0] * 10)
    source = GroupedSource(plain._open_arrays, plain.schema, plain.fingerprint, plain.labels)
    assert Limited(source, 5).groups.tolist() == [0, 4, 5]
    assert Subset(source, np.array([1, 2, 5, 9])).groups.tolist() == [0, 2, 3, 4]
    assert Subset(source, np.array([5, 1])).groups is None
    assert plain.groups is None
    assert Limited(plain, 5).groups is None


def test_fingerprint_changes_with_order_and_labels():
    prints = {
        Subset(make_source(labels), np.array(rows)).fingerprint
        for labels, rows in [([0, 1, 1], [0, 1, 2]), ([0, 1, 0], [0, 1, 2]), ([0, 1, 1], [0, 2, 1])]
    }
    assert len(prints) == 3


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.95])
def test_holdout_is_stratified_and_complete(fraction):
    labels = np.repeat([0, 1, 2, 3], [50, 20, 2, 1])
    source = make_source(np.random.default_rng(1).permutation(labels))
    splits = holdout(source, fraction, seed=0)
    rows = [part.take(np.arange(len(part)))["features"].ravel() for part in (splits.train, splits.validation)]
    assert sorted(np.concatenate(rows)) == list(range(73))
    assert all((np.diff(part) > 0).all() for part in rows)
    assert np.unique(splits.train.labels).tolist() == [0, 1, 2, 3]
    held = np.bincount(splits.validation.labels, minlength=4)
    assert held[3] == 0
    assert (np.abs(held[:2] - fraction * np.array([50, 20])) <= 1).all()
    assert holdout(source, fraction, 0).validation.fingerprint == splits.validation.fingerprint
    assert holdout(source, fraction, 1).validation.fingerprint != splits.validation.fingerprint


def test_holdout_takes_one_at_least_and_nothing_from_singletons():
    assert len(holdout(make_source([0, 0, 1]), 0.1, 0).validation) == 1
    assert holdout(make_source([0, 1, 2]), 0.5, 0).validation is None
    with pytest.raises(ValueError, match=r"validation_fraction is 1\.5"):
        holdout(make_source([0, 0]), 1.5, 0)


def test_statistics_of_features(monkeypatch):
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
    pixels = train.take(np.arange(len(train)))["image"] / 255
    np.testing.assert_allclose([mean[0], deviation[0]], [pixels.mean(), pixels.std()], rtol=1e-10)
    few = train.take(np.arange(10) * len(train) // 10)["image"] / 255
    np.testing.assert_allclose(input_statistics(train, num_rows=10)[0], [few.mean()], rtol=1e-10)


def test_large_content_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("rayprune.sources.fingerprint.WHOLE_BYTES", 1 << 12)
    monkeypatch.setattr("rayprune.sources.fingerprint.SAMPLE_BYTES", 1 << 8)
    file = tmp_path / "content"
    content = np.random.default_rng(0).integers(0, 256, 1 << 16).astype(np.uint8)
    prints = set()
    for length in (1 << 16, (1 << 16) - 1):
        file.write_bytes(content[:length].tobytes())
        prints.add(file_digest(file))
    changed = content.copy()
    changed[-1] ^= 1
    assert len(prints) == 2
    assert array_digest(content) != array_digest(changed)


def test_unknown_sources_and_keys_are_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"data\.source 'digit' is unknown: did you mean 'digits'"):
        open_data("digit")
    with pytest.raises(ValueError, match=r"unknown key 'data\.pth' of source 'arrays': did you mean 'path'"):
        open_data("arrays", pth="x")
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        open_data("parquet")
    assert {"digits", "arrays", "parquet"} <= set(SOURCES)


def test_limit_applies_to_training_only():
    splits = open_data("digits", limit=100)
    assert (len(splits.train), len(splits.validation)) == (100, 360)
    assert len(open_data("digits", limit=9999).train) == 1437


def test_default_augment():
    assert default_augment("digits") == {"crop": 1, "flip": False}
    assert default_augment("module:function") == {"crop": 0, "flip": False}


FUNCTIONS = """
from rayprune.sources import open_data, Splits
def splits(count=1): return open_data("digits", limit=count)
def source(): return open_data("digits").train
def pair(): return open_data("digits").train, None
def number(): return 3
"""


def test_functions_of_the_user(tmp_path):
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
        "import sys\nimport test_sources_base as made\n"
        f"def bad(): return made.make_source({labels}, num_classes={num_classes})\n"
    )
    sys.modules.setdefault("test_sources_base", sys.modules[__name__])
    with pytest.raises(ValueError, match=message):
        open_data(f"{file}:bad")


def test_a_held_out_part_takes_the_place_of_the_validation_part() -> None:
    whole = open_data("digits", limit=400)
    held = open_data("digits", limit=400, hold_out=0.25)
    assert held.validation is not None
    assert (len(held.train), len(held.validation)) == (300, 100)
    assert held.train.fingerprint != whole.train.fingerprint
    both = np.sort(np.concatenate([held.train.labels, held.validation.labels]))
    assert both.tolist() == np.sort(whole.train.labels).tolist()
    again = open_data("digits", limit=400, hold_out=0.25)
    assert again.validation is not None
    assert again.validation.fingerprint == held.validation.fingerprint
