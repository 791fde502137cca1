"""Views for comparing samples: two sources as one, and which columns count as image, text or numbers."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from rayprune.errors import DataError
from rayprune.sources import MemorySource, Schema, Subset, open_data
from rayprune.sources.base import Column
from rayprune.sources.vectors import VectorView, compared_columns
from rayprune.sources.views import Concatenated
from tests.support.sources import make_source


def test_concatenated_rows_keep_their_order() -> None:
    first, second = make_source(np.arange(5) % 3), make_source(np.arange(4) % 3, 10 + np.arange(4.0)[:, None])
    both = Concatenated(first, second)
    ids = np.array([8, 0, 5, 4, 0, 6])
    assert len(both) == 9
    assert both.take(ids)["features"][:, 0].tolist() == [13, 0, 10, 4, 0, 11]
    assert both.take(ids)["label"].tolist() == both.labels[ids].tolist()
    assert both.take(np.array([1, 2]))["features"][:, 0].tolist() == [1, 2]
    assert both.take(np.array([7]))["features"][:, 0].tolist() == [12]
    assert both.read(ids)[1] == sum(column.nbytes for column in both.take(ids).values())
    with pytest.raises(DataError, match=r"0\.\.8"):
        both.take(np.array([9]))
    assert both.fingerprint not in (Concatenated(second, first).fingerprint, first.fingerprint)
    assert pickle.loads(pickle.dumps(both)).take(ids)["features"][:, 0].tolist() == [13, 0, 10, 4, 0, 11]


def test_concatenated_sources_have_the_same_columns() -> None:
    with pytest.raises(DataError, match="same columns"):
        Concatenated(make_source([0, 1]), make_source([0, 1], np.ones((2, 3), np.float32)))


class Grouped(Subset):
    """Rows that are read in groups of two."""

    @property
    def groups(self) -> np.ndarray | None:
        return np.r_[np.arange(0, len(self), 2), len(self)]


def test_groups_of_concatenated_sources() -> None:
    plain = make_source([0] * 5)
    grouped = Grouped(plain, np.arange(5))
    assert Concatenated(plain, plain).groups is None
    assert Concatenated(grouped, plain).groups.tolist() == [0, 2, 4, 5, 10]
    assert Concatenated(plain, grouped).groups.tolist() == [0, 5, 7, 9, 10]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": Column((), "object"), "label": Column((), "int64")}, ("text", ["text"])),
        ({"input_ids": Column((-1,), "int64"), "attention_mask": Column((-1,), "int64")}, ("text", ["input_ids"])),
        ({"tokens": Column((16,), "int32")}, ("text", ["tokens"])),
        ({"age": Column((), "int64"), "income": Column((), "float32")}, ("features", ["age", "income"])),
        ({"pixels": Column((8, 8, 3), "uint8"), "caption": Column((), "object")}, ("image", ["pixels"])),
        ({"x": Column((4, 5), "float32"), "labels": Column((), "int64")}, ("features", ["x"])),
    ],
)
def test_compared_columns(columns: dict[str, Any], expected: tuple[str, list[str]]) -> None:
    assert compared_columns(Schema(columns)) == expected


def test_the_input_column_counts_if_there_is_one() -> None:
    view = VectorView(open_data("digits").train)
    assert (view.kind, view.schema.input, view.schema.num_classes) == ("image", "image", 10)
    assert view.take(np.array([3]))["label"].tolist() == [view.labels[3]]


def test_numbers_are_features_in_the_order_of_the_columns() -> None:
    view = VectorView(MemorySource({"b": np.arange(3), "a": np.ones((3, 2)), "label": [4, 0, 1]}))
    rows = view.take(np.array([2, 0]))
    assert rows["features"].tolist() == [[2, 1, 1], [0, 1, 1]]
    assert rows["features"].dtype == np.float32
    assert rows["label"].tolist() == [1, 4]
    assert view.schema.num_classes == 5


def test_samples_without_classes_have_label_0() -> None:
    view = VectorView(MemorySource({"text": ["a b", "c"]}))
    assert view.take(np.array([1]))["label"].tolist() == [0]
    assert view.labels.tolist() == [0, 0]
    assert view.take(np.array([0, 1]))["features"].shape == (2, 512)


def test_several_texts_have_length_one_together() -> None:
    view = VectorView(MemorySource({"question": ["who", "what"], "answer": ["me", "this"]}))
    np.testing.assert_allclose(np.linalg.norm(view.take(np.array([0, 1]))["features"], axis=1), 1.0, rtol=1e-6)
