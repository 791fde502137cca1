"""The columns of Hugging Face Datasets as they are."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from rayprune.sources import as_source, columns_from_huggingface
from rayprune.sources.base import Column
from tests.support.sources import all_rows, encode_image, pixels

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

WORDS = ["a b", "c", "a d e f", "b b b"]


def tokenized():
    """Texts, their token ids without padding, and classes."""
    vocabulary = {word: position for position, word in enumerate("abcdef")}

    def tokenize(batch):
        ids = [[vocabulary[word] for word in text.split()] for text in batch["text"]]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    kinds = datasets.Features({"text": datasets.Value("string"), "labels": datasets.ClassLabel(names=["no", "yes"])})
    texts = datasets.Dataset.from_dict({"text": WORDS, "labels": [0, 1, 1, 0]}, features=kinds)
    return texts.map(tokenize, batched=True)


def test_a_tokenized_dataset_keeps_its_columns():
    source = columns_from_huggingface(tokenized())
    assert dict(source.schema.columns) == {
        "text": Column((), "object"),
        "labels": Column((), "int64"),
        "input_ids": Column((-1,), "int32"),
        "attention_mask": Column((-1,), "int8"),
    }
    assert source.row_cost == "cheap"
    for reader in (source, pickle.loads(pickle.dumps(source))):
        rows = reader.take(np.array([2, 1, 2]))
        assert rows["text"].tolist() == ["a d e f", "c", "a d e f"]
        assert [row.tolist() for row in rows["input_ids"]] == [[0, 3, 4, 5], [2], [0, 3, 4, 5]]
        assert rows["input_ids"][0].dtype == np.int32
        assert (rows["labels"].tolist(), rows["labels"].dtype) == ([1, 1, 1], np.int64)
        assert reader.labels.tolist() == [0, 1, 1, 0]
    assert source.take(np.array([], np.int64))["input_ids"].shape == (0,)
    padded = columns_from_huggingface(tokenized().select([0, 0]))  # rows of one length are a matrix
    np.testing.assert_array_equal(all_rows(padded)["input_ids"], [[0, 1], [0, 1]])


def test_columns_are_chosen_by_the_format_or_by_name():
    formatted = tokenized().with_format("torch", columns=["labels"])
    assert list(columns_from_huggingface(formatted).schema.columns) == ["labels"]
    chosen = columns_from_huggingface(tokenized(), columns=["input_ids"], label_column="text")
    assert list(chosen.schema.columns) == ["input_ids"]
    assert chosen.labels.tolist() == [0, 3, 1, 2]  # sorted texts
    with pytest.raises(ValueError, match="the dataset has no column 'txt': did you mean 'text'"):
        columns_from_huggingface(tokenized(), columns=["txt"])


def images(sizes, name="img"):
    values = [Image.fromarray(pixels(1, size, seed=row)[0]) for row, size in enumerate(sizes)]
    kinds = datasets.Features({name: datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=3)})
    return datasets.Dataset.from_dict({name: values, "fine_label": [row % 3 for row in range(len(sizes))]}, kinds)


def test_an_image_column_keeps_its_name():
    source = columns_from_huggingface(images([(6, 5)] * 6), label_column="fine_label")
    assert source.schema.columns["img"] == Column((5, 6, 3), "uint8")
    assert source.row_cost == "expensive"
    rows, num_bytes = source.read(np.array([4, 0]))
    np.testing.assert_array_equal(rows["img"], [pixels(1, seed=4)[0], pixels(1, seed=0)[0]])
    assert num_bytes > 0
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="no integer column 'label' or 'labels': name one with label_column"):
        columns_from_huggingface(images([(6, 5)])).labels  # noqa: B018
    cached = columns_from_huggingface(images([(6, 5)] * 6), cache="memory")
    np.testing.assert_array_equal(cached.take(np.array([4]))["img"], [pixels(1, seed=4)[0]])


def test_images_of_several_sizes_are_ragged_or_scaled():
    several = images([(6, 5), (6, 7), (6, 9)])
    source = columns_from_huggingface(several)
    assert source.schema.columns["img"] == Column((-1, 6, 3), "uint8")
    rows = source.take(np.array([2, 0]))["img"]
    np.testing.assert_array_equal(rows[0], pixels(1, (6, 9), seed=2)[0])
    assert rows[1].shape == (5, 6, 3)
    assert columns_from_huggingface(several, image_size=4).schema.columns["img"].shape == (4, 4, 3)
    late = images([(6, 5)] * 511 + [(6, 7)])  # none of the 256 that are measured
    with pytest.raises(ValueError, match=r"column 'img' of row 511 is an image of 6×7 pixels .*: set image_size=5"):
        columns_from_huggingface(late).take(np.array([511]))


def test_encoded_images_of_another_type_are_named():
    encoded = {"picture": [encode_image(pixels(1)[0]), b"damaged"], "y": [0.5, 1.5]}
    dataset = datasets.Dataset.from_dict(encoded)
    assert columns_from_huggingface(dataset).schema.columns["picture"].dtype == "object"
    source = columns_from_huggingface(dataset, image_column="picture")
    np.testing.assert_array_equal(source.take(np.array([0]))["picture"], pixels(1))
    with pytest.raises(ValueError, match="column 'picture' of row 1 is not a readable image"):
        source.take(np.array([1]))
    with pytest.raises(ValueError, match="column 'y' is double: images must be binary"):
        columns_from_huggingface(dataset, image_column="y")


def test_nested_values():
    rows = {
        "code": np.arange(12, dtype=np.int8).reshape(4, 3),
        "grid": [[[1, 2], [3, 4]]] * 4,
        "boxes": [[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]], [], [[7.0, 8.0]]],
        "uneven": [[[1], [2, 3]], [[1]], [], [[]]],
        "tags": [["a", "b"], [], ["c"], []],
        "meta": [{"x": 1, "y": "q"}] * 4,
        "flag": [True, False, True, True],
        "half": np.ones(4, np.float16),
    }
    source = columns_from_huggingface(datasets.Dataset.from_dict(rows))
    kinds = {name: (column.shape, column.dtype) for name, column in source.schema.columns.items()}
    assert kinds == {
        "code": ((3,), "int8"),
        "grid": ((2, 2), "int64"),
        "boxes": ((-1, 2), "float64"),
        "uneven": ((), "object"),
        "tags": ((), "object"),
        "meta": ((), "object"),
        "flag": ((), "bool"),
        "half": ((), "float16"),
    }
    taken = source.take(np.array([1, 2]))
    assert taken["code"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert taken["grid"].tolist() == [[[1, 2], [3, 4]]] * 2
    assert [row.tolist() for row in taken["boxes"]] == [[[3.0, 4.0], [5.0, 6.0]], []]
    assert taken["boxes"][1].shape == (0, 2)
    assert (taken["uneven"].tolist(), taken["tags"].tolist()) == ([[[1]], []], [[], ["c"]])
    assert taken["meta"][0] == {"x": 1, "y": "q"}
    kind = datasets.Features({"g": datasets.Array2D((2, 3), "float32")})
    array = columns_from_huggingface(datasets.Dataset.from_dict({"g": [np.ones((2, 3))] * 3}, features=kind))
    assert array.schema.columns["g"] == Column((2, 3), "float32")


def test_selected_rows_and_their_fingerprint():
    whole = tokenized()
    chosen = columns_from_huggingface(whole.select([3, 3, 0]))
    assert [row.tolist() for row in all_rows(chosen)["input_ids"]] == [[1, 1, 1], [1, 1, 1], [0, 1]]
    assert chosen.labels.tolist() == [0, 0, 0]
    fingerprint = columns_from_huggingface(whole).fingerprint
    assert columns_from_huggingface(tokenized()).fingerprint == fingerprint
    assert columns_from_huggingface(whole.select([1, 0, 2, 3])).fingerprint != fingerprint
    assert columns_from_huggingface(whole, columns=["labels"]).fingerprint != fingerprint
    swapped = images([(6, 5)] * 3).select([1, 0, 2])
    assert columns_from_huggingface(images([(6, 5)] * 3)).fingerprint != columns_from_huggingface(swapped).fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"n": [1, None]}, "column 'n' of row 1 is null or has one"),
        ({"n": [[1], [None, 2]]}, "column 'n' of row 1 is null or has one"),
        ({"n": [[1], None]}, "column 'n' of row 1 is null or has one"),
        ({"id": [1]}, "column 'id' has a name that rayprune adds itself"),
        ({"n": []}, "the dataset has no rows"),
    ],
)
def test_unsuitable_columns_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        columns_from_huggingface(datasets.Dataset.from_dict(rows))


def test_a_transform_of_the_dataset_runs():
    transformed = tokenized().with_transform(lambda batch: {"length": [len(text) for text in batch["text"]]})
    source = as_source(transformed)
    assert all_rows(source)["length"].tolist() == [len(text) for text in WORDS]


def test_a_generated_dataset_is_read(tmp_path):
    def rows():
        for row in range(5):
            yield {"x": row, "tokens": list(range(row)), "name": f"row {row}"}

    generated = datasets.Dataset.from_generator(rows, cache_dir=str(tmp_path))
    source = pickle.loads(pickle.dumps(columns_from_huggingface(generated)))
    taken = source.take(np.array([3]))
    assert (taken["x"].tolist(), taken["tokens"][0].tolist(), taken["name"].tolist()) == ([3], [0, 1, 2], ["row 3"])
