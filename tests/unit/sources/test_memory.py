"""Rows of arrays, opened in each process or held in memory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from rayprune.sources import MemorySource
from rayprune.sources.base import Column
from tests.support.sources import make_source


def test_take_keeps_order_and_repeats():
    rows = make_source([0, 1, 0, 1]).take(np.array([3, 0, 3]))
    assert rows["features"].ravel().tolist() == [3, 0, 3]
    assert rows["label"].tolist() == [1, 0, 1]
    assert rows["label"].dtype == np.int64


def test_take_of_no_ids_is_empty():
    assert make_source([0, 1]).take(np.array([], dtype=np.int64))["features"].shape == (0, 1)


def test_a_pickled_copy_opens_the_arrays_and_reads_the_labels_again():
    source = make_source([0, 1, 0, 1])
    opened = source.arrays()
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy), copy.schema, copy.fingerprint) == (4, source.schema, source.fingerprint)
    assert copy.labels.tolist() == [0, 1, 0, 1]
    assert copy.arrays() is not opened


def test_columns_in_memory():
    columns = {"x": np.arange(6).reshape(3, 2), "label": np.array([2, 0, 1], np.uint8)}
    source = pickle.loads(pickle.dumps(MemorySource(columns)))
    assert source.take(np.array([2, 0]))["x"].tolist() == [[4, 5], [0, 1]]
    assert (source.labels.tolist(), source.labels.dtype) == ([2, 0, 1], np.int64)
    assert source.fingerprint == MemorySource(columns).fingerprint
    assert source.fingerprint != MemorySource(columns | {"x": np.zeros((3, 2))}).fingerprint
    with pytest.raises(ValueError, match="no integer column 'label' or 'labels': name one with label_column"):
        MemorySource({"x": np.zeros(3)}).labels  # noqa: B018
    with pytest.raises(ValueError, match=r"column 'x' is float64 \(3,\), and labels are integers of shape \(N,\)"):
        MemorySource({"x": np.zeros(3)}, label_column="x").labels  # noqa: B018


def test_ragged_text_and_object_columns_in_memory():
    columns = {
        "tokens": [[1, 2], [], [3, 4, 5]],
        "text": np.array(["a", "bc", ""]),
        "meta": [{"x": 1}, None, "y"],
        "day": np.array(["2026-01-01", "2026-01-02", "2026-01-03"], "datetime64[D]"),
    }
    source = pickle.loads(pickle.dumps(MemorySource(columns)))
    assert source.schema.columns["tokens"] == Column((-1,), "int64")
    taken = source.take(np.array([2, 1]))
    assert [row.tolist() for row in taken["tokens"]] == [[3, 4, 5], []]
    assert (taken["text"].tolist(), taken["meta"].tolist()) == (["", "bc"], ["y", None])
    assert taken["day"].dtype == "datetime64[D]"
    changed = MemorySource(columns | {"tokens": [[1], [2], [3, 4, 5]]})
    assert changed.fingerprint != source.fingerprint
