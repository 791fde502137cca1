"""Any data that users have as a source."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rayprune.sources import Splits, as_source, from_torch


class Items(Dataset):
    """Feature vectors with their position as label."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, position):
        return np.full(2, float(position)), position


class Stream(IterableDataset):
    """A dataset without positions."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(range(3))


def test_data_of_every_kind_becomes_a_source():
    items = Items(6)
    source = from_torch(items)
    assert as_source(source) is source
    assert as_source(Splits(source, None)) is source
    assert as_source(items).take(np.array([4]))["features"].dtype == np.float64
    columns = {"x": np.zeros((3, 2)), "label": np.arange(3)}
    assert as_source(columns).take(np.array([1]))["label"].tolist() == [1]
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [1.0, 2.0], "label": [0, 1]})
    assert list(as_source(table).schema.columns) == ["x", "label"]
    with pytest.raises(ValueError, match="DatasetDict is not a source of samples: choose a split"):
        as_source(datasets.DatasetDict(train=table))


def test_options_go_to_the_reader_of_the_data():
    named = as_source(Items(6), columns=("x", "kind"), label_column="kind")
    assert (list(named.schema.columns), named.labels.tolist()) == (["x", "kind"], [0, 1, 2, 3, 4, 5])
    assert as_source({"x": np.zeros(3), "kind": np.arange(3)}, label_column="kind").labels.tolist() == [0, 1, 2]
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [1.0, 2.0], "kind": ["b", "a"]})
    assert as_source(table, columns=["x"], label_column="kind").labels.tolist() == [1, 0]
    refused = [
        (table, "feature_columns", "columns, image_column, label_column, image_size, max_pixels, cache, cache_dir"),
        (table.with_transform(lambda batch: batch), "image_size", "columns, label_column, cache, cache_dir"),
        (Items(6), "image_size", "columns, label_column, cache, cache_dir"),
        ({"x": np.zeros(3)}, "columns", "label_column"),
    ]
    for data, option, taken in refused:
        with pytest.raises(ValueError, match=f"takes no option '{option}': it takes {taken}$"):
            as_source(data, **{option: 4})
    with pytest.raises(ValueError, match="a source takes no option 'columns': give it when you open the source"):
        as_source(named, columns=["x"])


def test_errors_name_the_options_of_the_call():
    with pytest.raises(ValueError, match=r"^cache = 'dsk': did you mean 'disk'"):
        as_source(Items(6), cache="dsk")
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"^image_size is 0: give pixels"):
        as_source(datasets.Dataset.from_dict({"x": [1.0]}), image_size=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "Stream is not a source of samples: it can't be read by id"),
        (DataLoader(Items(1)), "DataLoader is not a source of samples: give its dataset, loader.dataset"),
        ([1, 2], "list is not a source of samples: give named columns"),
        (np.zeros(3), "ndarray is not a source of samples: give named columns"),
        (torch.zeros(3), "Tensor is not a source of samples: give named columns"),
        (pd.DataFrame({"x": [1]}), "DataFrame is not a source of samples: give its columns"),
        ("folder", "str is not a source of samples: open it"),
        (7, "int is not a source of samples: give a SampleSource"),
    ],
)
def test_other_objects_are_refused_with_a_cure(data, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        as_source(data)
    assert "\n" not in str(caught.value)


def test_objects_with_items_are_read_without_torch():
    code = (
        "import sys, numpy as np\n"
        "from rayprune.sources import as_source\n"
        "class Mine:\n"
        "    def __len__(self): return 3\n"
        "    def __getitem__(self, row): return np.full(2, row), row\n"
        "print(as_source(Mine()).labels.tolist(), {'torch', 'ray', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1, 2] set()"
