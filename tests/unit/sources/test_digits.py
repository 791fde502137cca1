"""scikit-learn's digits as a source."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rayprune.sources import digits, open_data


def test_the_split_is_fixed_and_stratified():
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
def test_the_digits_are_those_of_scikit_learn(in_package, monkeypatch):
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


def test_pickles_hold_no_pixels():
    train = open_data("digits").train
    pickled = pickle.dumps(train)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    ids = np.array([1436, 3])
    np.testing.assert_array_equal(again.take(ids)["image"], train.take(ids)["image"])
    np.testing.assert_array_equal(again.labels, train.labels)
    assert again.fingerprint == train.fingerprint
