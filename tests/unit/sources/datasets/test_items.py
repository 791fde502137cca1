"""Items of map-style Datasets as they are."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from rayprune.sources import as_source, columns_from_torch
from rayprune.sources.base import Column
from tests.support.sources import all_rows, pixels


class Items(Dataset):
    """Items that a function makes."""

    def __init__(self, make, count=30, **attributes):
        self.make, self.count, self.num_read = make, count, 0
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, position):
        self.num_read += 1
        return self.make(position)


def record(position):
    return {
        "img": torch.from_numpy(pixels(1)[0]).permute(2, 0, 1),
        "input_ids": torch.arange(position % 4),
        "labels": np.int16(position % 3),
        "score": np.float64(position),
        "name": f"item {position}",
    }


def numbered(position):
    return {"x": np.full(2, position), "labels": position % 2}


def test_the_items_of_a_mapping_keep_names_dtypes_and_axes():
    source = columns_from_torch(Items(record))
    assert dict(source.schema.columns) == {
        "img": Column((3, 5, 6), "uint8"),
        "input_ids": Column((-1,), "int64"),
        "labels": Column((), "int16"),
        "score": Column((), "float64"),
        "name": Column((), "object"),
    }
    for reader in (source, pickle.loads(pickle.dumps(source))):
        rows = reader.take(np.array([7, 4, 7]))
        np.testing.assert_array_equal(rows["img"], [record(0)["img"]] * 3)
        assert [row.tolist() for row in rows["input_ids"]] == [[0, 1, 2], [], [0, 1, 2]]
        assert (rows["labels"].tolist(), rows["labels"].dtype) == ([1, 1, 1], np.int16)
        assert rows["name"].tolist() == ["item 7", "item 4", "item 7"]
        assert reader.labels.tolist() == [row % 3 for row in range(30)]
    kept = columns_from_torch(Items(record), columns=("labels", "score"))
    assert list(kept.schema.columns) == ["labels", "score"]


def test_tuples_get_names():
    vectors = columns_from_torch(TensorDataset(torch.rand(9, 2, dtype=torch.float64), torch.arange(9) % 2))
    assert dict(vectors.schema.columns) == {"features": Column((2,), "float64"), "label": Column((), "int64")}
    images = columns_from_torch(Items(lambda position: (torch.zeros(3, 4, 6, dtype=torch.uint8), position % 2)))
    assert images.schema.columns["image"].shape == (3, 4, 6)
    named = columns_from_torch(Items(lambda position: (1, 2.5, "a")), columns=["a", "b", "c"])
    assert [column.dtype for column in named.schema.columns.values()] == ["int64", "float64", "object"]
    with pytest.raises(ValueError, match="Items item 0 has 3 entries: name them with columns"):
        columns_from_torch(Items(lambda position: (1, 2, 3)))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("P", 3), ("RGBA", 3)])
def test_pillow_images_have_their_channels_last(mode, channels):
    image = Image.fromarray(pixels(1)[0]).convert(mode)
    source = columns_from_torch(Items(lambda position: {"img": image, "y": position}))
    assert source.schema.columns["img"] == Column((5, 6, channels), "uint8")
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    with pytest.raises(ValueError, match="item 0 column 'img' is an image of mode I;16"):
        columns_from_torch(Items(lambda position: {"img": deep}))


def test_labels_are_read_only_if_they_are_needed():
    items = Items(lambda position: {"x": np.zeros(2), "kind": position % 3}, count=1000)
    source = columns_from_torch(items, label_column="kind")
    assert items.num_read < 300
    assert source.labels.tolist() == [row % 3 for row in range(1000)]
    stored = Items(lambda position: {"x": np.zeros(2), "labels": position % 3}, 1000, targets=np.arange(1000) % 3)
    assert columns_from_torch(stored).labels.tolist() == stored.targets.tolist()
    assert stored.num_read < 300
    with pytest.raises(ValueError, match="name one with label_column, or set class_floor=0"):
        columns_from_torch(items).labels  # noqa: B018
    with pytest.raises(ValueError, match="no column 'knd' for label_column: did you mean 'kind'"):
        columns_from_torch(items, label_column="knd")


def test_items_that_change_are_hashed_by_the_columns_that_stay(caplog):
    def source(offset=0):
        return columns_from_torch(Items(lambda position: (torch.rand(2), position + offset)), cache="auto")

    with caplog.at_level(logging.WARNING):
        fingerprint = source().fingerprint
    assert "items of Items differ at each visit: its fingerprint is that of label" in caplog.text
    assert source().fingerprint == fingerprint
    assert source(1).fingerprint != fingerprint
    with pytest.raises(ValueError, match=r"^cache is 'memory' and items of Items differ at each visit"):
        as_source(Items(lambda position: (torch.rand(2), position)), cache="memory")


def test_the_fingerprint_changes_with_the_content():
    def fingerprint(last):
        items = Items(lambda position: {"ids": [position] * (last if position == 29 else 2)})
        return columns_from_torch(items).fingerprint

    assert fingerprint(2) == fingerprint(2)
    assert len({fingerprint(2), fingerprint(3), fingerprint(4)}) == 3


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_items_are_kept_if_asked(mode, tmp_path):
    items = Items(numbered)
    source = columns_from_torch(items, cache=mode, cache_dir=str(tmp_path))
    source.prepare()
    num_read = items.num_read
    np.testing.assert_array_equal(all_rows(source)["x"], np.arange(30)[:, None] * [1, 1])
    assert all_rows(pickle.loads(pickle.dumps(source)))["labels"].sum() == 15
    assert items.num_read == num_read
    assert source.labels.tolist() == [row % 2 for row in range(30)]


def test_ragged_items_are_kept_in_memory_only():
    ragged = Items(lambda position: {"x": [1] * (position % 3)})
    kept = columns_from_torch(ragged, cache="memory")
    assert [len(row) for row in all_rows(kept)["x"]] == [row % 3 for row in range(30)]
    assert columns_from_torch(ragged, cache="auto").row_cost == "expensive"
    with pytest.raises(ValueError, match="column 'x' has rows of several shapes or Python objects: set it to memory"):
        columns_from_torch(ragged, cache="disk")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda position: {"x": np.zeros(2 if position != 293 else 3)}, r"item 293 column 'x' is float64 \(3,\)"),
        (lambda position: {"x": 1 if position != 293 else 1.5}, r"item 293 column 'x' is float64 \(\)"),
        (lambda position: {"x": 1} if position != 293 else {"y": 1}, r"item 293 has columns \['y'\] and item 0"),
        (lambda position: {"id": 1, "x": 2}, "item 0 has a column 'id', .*: rename it, or leave it out with columns"),
        (lambda position: {"x": 1 if position else "a"}, "Items column 'x' has numbers in some rows and str"),
    ],
)
def test_unsuitable_items_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        columns_from_torch(Items(make, 300)).take(np.array([293]))
    assert "\n" not in str(caught.value)
