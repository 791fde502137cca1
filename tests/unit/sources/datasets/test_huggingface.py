"""Datasets of the Hugging Face library, saved by it and read back, whole and damaged."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rayprune.errors import DataError
from rayprune.sources import from_huggingface, open_data
from tests.support.sources import all_rows, encode_image, pixels

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


@pytest.fixture
def opened(tmp_path):
    """Open a path without a validation part and with the test's own cache."""

    def call(path, **keys):
        fixed = {"path": str(path), "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0}
        return open_data("huggingface", **fixed | keys)

    return call


def images_of(encoded, labels, names=("cat", "dog", "größe")):
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict(
        {"image": [content and {"bytes": content, "path": None} for content in encoded], "label": labels},
        features=features,
    )


def image_set(count=12):
    return images_of([encode_image(image) for image in pixels(count)], [row % 3 for row in range(count)])


@pytest.mark.parametrize("cache", ["none", "auto"])
def test_a_saved_dataset_dict_is_read(tmp_path, opened, cache):
    whole = image_set()
    parts = datasets.DatasetDict(train=whole.select(range(9)), test=whole.select(range(9, 12)))
    parts.save_to_disk(tmp_path / "set", num_shards={"train": 2, "test": 1})
    splits = opened(tmp_path / "set", cache=cache)
    assert (len(splits.train), len(splits.validation)) == (9, 3)
    schema = splits.train.schema
    assert (schema.class_names, schema.num_classes) == (("cat", "dog", "größe"), 3)
    np.testing.assert_array_equal(all_rows(splits.train)["image"], pixels(12)[:9])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], pixels(12)[9:])
    again = pickle.loads(pickle.dumps(splits.train))
    ids = np.array([8, 0, 8, 5])
    np.testing.assert_array_equal(again.take(ids)["image"], pixels(12)[ids])
    np.testing.assert_array_equal(again.take(ids)["label"], ids % 3)
    np.testing.assert_array_equal(again.labels, splits.train.labels)
    assert again.take(ids[:0])["image"].shape == (0, 5, 6, 3)
    with pytest.raises(ValueError, match="first 9"):
        again.take(np.array([9]))


def test_nothing_is_downloaded(tmp_path, opened, monkeypatch):
    image_set().save_to_disk(tmp_path / "set")

    def refuse(*args, **keys):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(opened(tmp_path / "set").train) == 12
    with pytest.raises(ValueError, match="is a URI: copy the folder"):
        opened("s3://bucket/set")


def test_splits_are_found_and_chosen(tmp_path, opened):
    whole = image_set()
    saved = datasets.DatasetDict(train=whole, test=whole.select([0]), val=whole.select([1, 2]))
    saved.save_to_disk(tmp_path / "set")
    assert len(opened(tmp_path / "set").validation) == 2
    assert len(opened(tmp_path / "set", validation_split="test").validation) == 1
    assert opened(tmp_path / "set", validation_split="").validation is None
    assert len(opened(tmp_path / "set", validation_split="", validation_fraction=0.25).validation) == 3
    assert len(opened(tmp_path / "set", train_split="val").train) == 2
    with pytest.raises(ValueError, match=r"data\.train_split 'trian' is not in .*did you mean 'train'"):
        opened(tmp_path / "set", train_split="trian")
    with pytest.raises(ValueError, match=r"data\.validation_split 'valid' is not in .*did you mean 'val'"):
        opened(tmp_path / "set", validation_split="valid")


def test_the_fingerprint_changes_with_the_content_only(tmp_path, opened):
    whole = image_set()
    whole.save_to_disk(tmp_path / "one")
    whole.save_to_disk(tmp_path / "many", num_shards=4)
    fingerprint = from_huggingface(whole).fingerprint
    assert opened(tmp_path / "one").train.fingerprint == fingerprint
    assert opened(tmp_path / "many").train.fingerprint == fingerprint
    assert from_huggingface(whole.with_format("numpy")).fingerprint == fingerprint
    assert from_huggingface(whole.select([*range(1, 12), 0])).fingerprint != fingerprint
    assert from_huggingface(whole, image_size=4).fingerprint != fingerprint
    other = pixels(12)
    other[7, 0, 0, 0] ^= 1
    changed = images_of([encode_image(image) for image in other], whole["label"])
    assert from_huggingface(changed).fingerprint != fingerprint


def test_a_selection_of_rows_is_read_through(tmp_path):
    chosen = image_set().select([5, 1, 1, 11])
    source = pickle.loads(pickle.dumps(from_huggingface(chosen)))
    columns, num_bytes = source.read(np.array([3, 0]))
    np.testing.assert_array_equal(columns["image"], pixels(12)[[11, 5]])
    assert num_bytes == sum(len(encode_image(image)) for image in pixels(12)[[11, 5]]) + 16
    assert source.row_cost == "expensive"


def test_images_in_separate_files_are_read(tmp_path):
    paths = [str(tmp_path / f"bild ü {row}.png") for row in range(3)]
    for path, image in zip(paths, pixels(3), strict=True):
        Image.fromarray(image).save(path)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    named = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 0]}, features=features)
    source = from_huggingface(named)
    np.testing.assert_array_equal(all_rows(source)["image"], pixels(3))
    Image.fromarray(pixels(6)[5]).save(paths[1])
    assert from_huggingface(named).fingerprint != source.fingerprint
    (tmp_path / "bild ü 2.png").unlink()
    with pytest.raises(ValueError, match="row 2 is not a readable image"):
        source.take(np.array([2]))


def test_numbers_and_lists_of_numbers_are_features(tmp_path, opened):
    rows = {
        "width": [1, 2, 3],
        "code": [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]],
        "kind": ["b", "a", "b"],
        "note": ["x", "y", "z"],
    }
    dataset = datasets.Dataset.from_dict(rows)
    dataset.save_to_disk(tmp_path / "set")
    train = opened(tmp_path / "set", label_column="kind").train
    assert train.schema.class_names == ("a", "b")
    assert train.row_cost == "cheap"
    np.testing.assert_array_equal(all_rows(train)["features"], [[1, 0.5, 1.5], [2, 2.5, 3.5], [3, 4.5, 5.5]])
    assert all_rows(train)["label"].tolist() == [1, 0, 1]
    assert train.take(np.array([], np.int64))["features"].shape == (0, 3)
    chosen = from_huggingface(dataset, label_column="kind", feature_columns=("code",))
    np.testing.assert_array_equal(chosen.take(np.array([2]))["features"], [[4.5, 5.5]])
    fixed = dataset.cast_column("code", datasets.Sequence(datasets.Value("float32"), length=2))
    again = from_huggingface(fixed.select([2, 0]), label_column="kind")
    np.testing.assert_array_equal(all_rows(again)["features"], [[3, 4.5, 5.5], [1, 0.5, 1.5]])


def test_string_labels_have_the_same_numbers_in_both_splits(tmp_path, opened):
    train = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0], "y": ["owl", "cat", "owl"]})
    test = datasets.Dataset.from_dict({"x": [1.0], "y": ["owl"]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "set")
    splits = opened(tmp_path / "set")
    assert (splits.train.labels.tolist(), splits.validation.labels.tolist()) == ([1, 0, 1], [1])
    unknown = datasets.Dataset.from_dict({"x": [1.0], "y": ["cow"]})
    datasets.DatasetDict(train=train, test=unknown).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="row 0 has label 'cow', which no training row has"):
        opened(tmp_path / "other")


def test_images_of_several_sizes_and_modes_are_brought_to_one(tmp_path):
    images = [
        encode_image(pixels(1, (9, 4))[0]),
        encode_image(pixels(1)[0], mode="L"),
        encode_image(pixels(1)[0], mode="RGBA"),
    ]
    mixed = images_of(images, [0, 1, 2])
    with pytest.raises(ValueError, match=r"row 1 is an image of 6×5 pixels and the first one has 9×4: set image_size"):
        from_huggingface(mixed).take(np.array([0, 1]))
    assert all_rows(from_huggingface(mixed, image_size=4))["image"].shape == (3, 4, 4, 3)
    with pytest.raises(ValueError, match=r"^image_size is 0"):
        from_huggingface(mixed, image_size=0)


@pytest.mark.parametrize("content", [b"no image", encode_image(pixels(1)[0])[:60], None])
def test_unreadable_images_are_named(content):
    damaged = images_of([*[encode_image(image) for image in pixels(2)], content], [0, 1, 2])
    with pytest.raises(ValueError, match="the dataset row 2 is not a readable image"):
        from_huggingface(damaged).take(np.array([1, 2]))
    with pytest.raises(ValueError, match="row 0 is not a readable image"):
        from_huggingface(damaged.select([2]))


def test_an_empty_image_is_named():
    kind = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int64")})
    stored = datasets.Dataset.from_dict({"image": [encode_image(pixels(1)[0]), b""], "label": [0, 1]}, features=kind)
    with pytest.raises(ValueError, match="row 1 is not a readable image"):
        from_huggingface(stored).take(np.array([1]))


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ({"x": [1.0], "y": [None]}, {}, r"labels must be ClassLabel|has no label in row 0"),
        ({"x": [1.0, 2.0], "y": [1, None]}, {}, "column 'y' has no label in row 1"),
        ({"x": [1.0], "y": [0.5]}, {}, "column 'y' is double: labels must be"),
        ({"x": [1.0], "y": [7_000_000_000]}, {}, "labels must be below"),
        ({"x": [1.0], "z": ["a"]}, {}, "set label_column to one of"),
        ({"x": [1.0], "y": [0]}, {"label_column": "w"}, "has no column 'w'"),
        ({"x": [1.0], "y": [0]}, {"image_column": "x"}, "column 'x' is double: images must be"),
        ({"t": ["a"], "y": [0]}, {}, "neither an image nor a numeric column"),
        ({"x": [1.0, float("nan")], "y": [0, 1]}, {}, "row 1 has a feature that is NaN or infinite"),
        ({"x": [1.0, None], "y": [0, 1]}, {}, "row 1 is null in column 'x'"),
        ({"x": [[1.0], [1.0, 2.0]], "y": [0, 1]}, {}, "row 1 has 2 numbers in column 'x' and row 0 has 1"),
        ({"x": [], "y": []}, {}, "has no rows"),
    ],
)
def test_unsuitable_columns_are_refused(rows, keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        all_rows(from_huggingface(datasets.Dataset.from_dict(rows), **keys))
    assert "\n" not in str(caught.value)


def test_labels_beyond_int64_are_refused():
    labels = pa.array([0, 2**64 - 1], pa.uint64())
    rows = datasets.Dataset(pa.table({"x": pa.array([0.0, 1.0], pa.float32()), "label": labels}))
    with pytest.raises(DataError, match="has a label outside int64"):
        from_huggingface(rows)


def test_other_objects_are_refused():
    for other in (datasets.DatasetDict(train=image_set()), image_set().to_iterable_dataset(), [1, 2]):
        with pytest.raises(ValueError, match=r"is not a datasets\.Dataset: choose a split"):
            from_huggingface(other)


def test_missing_and_damaged_folders_are_refused(tmp_path, opened):
    with pytest.raises(ValueError, match=r"is not a folder written by Dataset\.save_to_disk: correct it$"):
        opened(tmp_path)
    image_set().to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"or set data\.source=parquet"):
        opened(tmp_path / "data")
    image_set().save_to_disk(tmp_path / "set")
    shard = next((tmp_path / "set").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"is damaged .*: save the dataset again") as caught:
        opened(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from rayprune.sources import open_data\n"
        f"try: open_data('huggingface', path={str(tmp_path)!r})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "source 'huggingface' needs the package datasets: pip install 'rayprune[huggingface]'\n"


def test_validation_class_names_in_another_order_are_refused(tmp_path, opened):
    encoded = [encode_image(image) for image in pixels(2)]
    parts = {"train": images_of(encoded, [0, 1], ("cat", "dog")), "test": images_of(encoded, [0, 1], ("dog", "cat"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    for keys in ({}, {"num_classes": 3}):
        with pytest.raises(ValueError, match=r"set/test has 2 classes.*'dog'.*the training split 2 classes.*one order"):
            opened(tmp_path / "set", **keys)
