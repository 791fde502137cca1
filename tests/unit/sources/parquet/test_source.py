"""Parquet files of images and of numbers, whole and damaged."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprune.errors import DataError
from rayprune.sources import open_data
from tests.support.sources import all_rows, claim_rows, encode_image, flip_byte, pixels


@pytest.fixture
def opened(tmp_path):
    """Open a path without validation part and with a cache of the test's own."""

    def call(path, **keys):
        return open_data(
            "parquet", **{"path": str(path), "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0} | keys
        )

    return call


def encoded(count, **keys):
    return [encode_image(array) for array in pixels(count, **keys)]


def write(file, images, labels, names=None, struct=True, **options):
    """Write one shard as the Hugging Face hub stores it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if struct:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(images)], kind)
    else:
        column = pa.array(images, pa.binary())
    table = pa.table({"img": column, "label": pa.array(labels)})
    if names:
        metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, file, **options)
    return file


@pytest.mark.parametrize("struct", [True, False])
def test_png_images_are_read_from_several_files(tmp_path, opened, struct):
    images, folder = pixels(30), tmp_path / "data"
    data = [encode_image(image) for image in images]
    labels = np.arange(30) % 3
    for part in (1, 0):
        rows = slice(part * 10, part * 10 + 10)
        write(folder / f"train-0000{part}.parquet", data[rows], labels[rows], struct=struct, row_group_size=4)
    write(folder / "test-00000.parquet", data[20:], labels[20:], struct=struct)
    splits = opened(folder)
    assert (len(splits.train), len(splits.validation)) == (20, 10)
    np.testing.assert_array_equal(all_rows(splits.train)["image"], images[:20])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], images[20:])
    ids = np.array([19, 0, 19, 7])
    taken = splits.train.take(ids)
    np.testing.assert_array_equal(taken["image"], images[ids])
    np.testing.assert_array_equal(taken["label"], labels[ids])
    assert taken["image"].flags.c_contiguous
    assert splits.train.schema.num_classes == 3
    with pytest.raises(ValueError, match="first 20"):
        splits.train.take(np.array([20]))


def test_jpeg_images_and_class_names_are_read(tmp_path, opened):
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 100, 200)]
    file = write(
        tmp_path / "a.parquet",
        [encode_image(image, "JPEG") for image in images],
        [0, 1, 1],
        names=["cat", "dog", "owl"],
    )
    train = opened(file).train
    assert train.schema.class_names == ("cat", "dog", "owl")
    assert train.schema.num_classes == 3
    np.testing.assert_allclose(all_rows(train)["image"].mean(axis=(1, 2, 3)), [10, 100, 200], atol=2)


def test_validation_comes_from_a_holdout_or_from_files(tmp_path, opened):
    write(tmp_path / "data" / "part.parquet", encoded(40), np.arange(40) % 4)
    splits = opened(tmp_path / "data", validation_fraction=0.25, limit=12)
    assert (len(splits.train), len(splits.validation)) == (12, 10)
    assert np.bincount(splits.validation.labels).max() <= 3
    write(tmp_path / "data" / "validation-0.parquet", encoded(5), [0] * 5)
    assert len(opened(tmp_path / "data").validation) == 5
    assert len(opened(tmp_path / "data", validation_files="").train) == 45
    with pytest.raises(ValueError, match=r"data\.validation_files 'exam\*' matches no file"):
        opened(tmp_path / "data", validation_files="exam*")


def test_string_labels_are_sorted_class_names(tmp_path, opened):
    folder = tmp_path / "data"
    write(folder / "train.parquet", encoded(4), ["owl", "cat", "dog", "cat"])
    write(folder / "test.parquet", encoded(2), pa.array(["dog", "owl"]).dictionary_encode())
    splits = opened(folder)
    assert splits.train.schema.class_names == ("cat", "dog", "owl")
    assert splits.train.labels.tolist() == [2, 0, 1, 0]
    assert splits.validation.labels.tolist() == [1, 2]
    write(folder / "test.parquet", encoded(2), ["dog", "cow"])
    with pytest.raises(ValueError, match=r"test\.parquet row 1 has label 'cow'"):
        opened(folder)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["RGB", "L", "P", "RGBA"], 3), (["P", "L"], 3), (["L", "RGB", "1"], 1), (["RGBA"], 3), (["LA"], 1)],
)
def test_the_first_image_decides_the_mode(tmp_path, opened, modes, channels):
    images = [encode_image(array, mode=mode) for array, mode in zip(pixels(len(modes)), modes, strict=True)]
    train = opened(write(tmp_path / "a.parquet", images, [0] * len(modes))).train
    assert all_rows(train)["image"].shape == (len(modes), 5, 6, channels)


@pytest.mark.parametrize("position", [0, 1])
def test_deep_images_are_refused_by_name(tmp_path, opened, position):
    images = encoded(2)
    images[position] = encode_image(np.zeros((5, 6), np.uint16))
    with pytest.raises(ValueError, match=rf"row {position} has image mode I;16, more than 8 bits"):
        opened(write(tmp_path / "a.parquet", images, [0, 1])).train.prepare()


def test_mixed_sizes_are_refused(tmp_path, opened):
    images = [*encoded(2), encode_image(pixels(1, size=(9, 4))[0])]
    with pytest.raises(
        ValueError,
        match=r"a\.parquet row 2 is an image of 9×4 pixels and the first one has 6×5: set data\.image_size=5",
    ):
        opened(write(tmp_path / "a.parquet", images, [0, 1, 0])).train.prepare()


def damaged_images():
    images = encoded(9)
    images[3] = images[3][:60]
    images[5] = b"no image at all"
    images[7] = None
    return images


def test_unreadable_images_fail_by_name(tmp_path, opened):
    file = write(tmp_path / "a.parquet", damaged_images(), np.arange(9) % 2)
    with pytest.raises(ValueError, match=r"a\.parquet row 3 is not a readable image .*data\.on_error=skip") as caught:
        opened(file).train.take(np.array([0]))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreadable_images_are_skipped(tmp_path, opened, caplog):
    file = write(tmp_path / "a.parquet", damaged_images(), np.arange(9))
    with caplog.at_level(logging.WARNING):
        train = opened(file, on_error="skip").train
    assert (
        "left out 3 of 9 samples that can't be read, first: a.parquet row 3, a.parquet row 5, a.parquet row 7"
        in caplog.text
    )
    kept = [0, 1, 2, 4, 6, 8]
    assert train.labels.tolist() == kept
    np.testing.assert_array_equal(all_rows(train)["image"], pixels(9)[kept])
    np.testing.assert_array_equal(all_rows(pickle.loads(pickle.dumps(train)))["label"], kept)
    assert train.fingerprint != opened(file).train.fingerprint


def test_skipping_nothing_keeps_the_fingerprint(tmp_path, opened):
    file = write(tmp_path / "a.parquet", encoded(4), [0, 1, 0, 1])
    assert opened(file, on_error="skip").train.fingerprint == opened(file).train.fingerprint


def test_an_unreadable_first_image_is_refused_or_skipped(tmp_path, opened):
    file = write(tmp_path / "a.parquet", [b"x", *encoded(2)], [0, 1, 1])
    with pytest.raises(ValueError, match="row 0 is not a readable image"):
        opened(file)
    assert len(opened(file, on_error="skip").train) == 2
    nothing = write(tmp_path / "b.parquet", [b"x"], [0])
    with pytest.raises(ValueError, match="holds no readable image"):
        opened(nothing, on_error="skip")


def test_truncated_files_are_refused_or_left_out(tmp_path, opened, caplog):
    folder = tmp_path / "data"
    for part in range(2):
        write(folder / f"train-{part}.parquet", encoded(10, seed=part), [0, 1] * 5)
    whole = opened(folder).train.fingerprint
    last = folder / "train-1.parquet"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-1\.parquet is not a readable Parquet file .*data\.on_error=skip"):
        opened(folder)
    train = opened(folder, on_error="skip").train
    assert "left out" in caplog.text
    assert len(train) == 10
    assert train.fingerprint != whole


def damage(file, group):
    """Overwrite the page header of one row group's first column."""
    start = pq.read_metadata(file).row_group(group).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(bytes(content))


def test_a_damaged_row_group_of_images_is_named_or_left_out(tmp_path, opened):
    file = write(tmp_path / "a.parquet", encoded(40), np.arange(40) % 2, row_group_size=10, use_dictionary=False)
    damage(file, 2)
    with pytest.raises(
        ValueError, match=r"a\.parquet row 20 is not a readable image \(its bytes are missing or damaged\)"
    ):
        opened(file).train.prepare()
    taken = all_rows(opened(file, on_error="skip").train)
    np.testing.assert_array_equal(taken["image"], np.delete(pixels(40), slice(20, 30), axis=0))


def test_a_damaged_row_group_of_numbers_is_named_or_left_out(tmp_path, opened):
    table = pa.table({"a": np.arange(30.0), "y": np.arange(30) % 2})
    pq.write_table(table, tmp_path / "n.parquet", row_group_size=10, use_dictionary=False)
    damage(tmp_path / "n.parquet", 0)
    with pytest.raises(ValueError, match=r"n\.parquet row 0 is in a damaged part"):
        opened(tmp_path / "n.parquet").train.prepare()
    assert all_rows(opened(tmp_path / "n.parquet", on_error="skip").train)["features"].ravel().tolist() == [
        *range(10, 30)
    ]


def test_a_file_with_damaged_labels_is_refused_or_left_out(tmp_path, opened):
    for part in range(2):
        table = pa.table({"y": np.arange(30) % 2, "a": np.arange(30.0)})
        pq.write_table(table, tmp_path / f"train-{part}.parquet", use_dictionary=False)
    damage(tmp_path / "train-0.parquet", 0)
    with pytest.raises(ValueError, match=r"train-0\.parquet is not a readable Parquet file"):
        opened(tmp_path)
    assert len(opened(tmp_path, on_error="skip").train) == 30
    damage(tmp_path / "train-1.parquet", 0)
    with pytest.raises(ValueError, match="holds no training file whose labels can be read"):
        opened(tmp_path, on_error="skip")


def numeric(file, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def test_numeric_columns_are_features(tmp_path, opened):
    a, b = np.arange(50) / 3, np.arange(50)
    file = numeric(tmp_path / "n.parquet", a=a, name=["x"] * 50, b=b, target=b % 5, flag=b % 2 == 0)
    train = opened(file).train
    assert train.schema.input == "features"
    np.testing.assert_allclose(all_rows(train)["features"], np.stack([a, b, b % 2 == 0], 1).astype(np.float32))
    assert train.labels.tolist() == (b % 5).tolist()
    chosen = opened(file, feature_columns=["b", "a"], label_column="target").train
    np.testing.assert_allclose(all_rows(chosen)["features"], np.stack([b, a], 1).astype(np.float32))
    with pytest.raises(ValueError, match="has no column 'c'"):
        opened(file, feature_columns=["c"])
    with pytest.raises(ValueError, match="column 'name' is string"):
        opened(file, feature_columns=["name"])


def test_missing_numbers_are_refused_or_left_out(tmp_path, opened):
    file = numeric(tmp_path / "n.parquet", a=[1.0, 2.0, float("nan"), 4.0], b=[1, None, 3, 4], y=[0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"n\.parquet row 1 is null, NaN or infinite in column 'b'"):
        opened(file).train.prepare()
    train = opened(file, on_error="skip").train
    assert all_rows(train)["features"].tolist() == [[1, 1], [4, 4]]


def test_missing_and_wrong_labels_are_refused(tmp_path, opened):
    file = numeric(tmp_path / "n.parquet", a=[1.0, 2.0, 3.0], y=[0, None, 2])
    with pytest.raises(ValueError, match="row 1 has no y"):
        opened(file)
    assert opened(file, on_error="skip").train.labels.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"row 2 has label 2, outside 0\.\.1"):
        opened(numeric(tmp_path / "n.parquet", a=[1.0, 2.0, 3.0], y=[0, 1, 2]), num_classes=2)
    with pytest.raises(ValueError, match="labels must be integers or strings"):
        opened(numeric(tmp_path / "n.parquet", a=[1.0, 2.0], y=[0.5, 1]))


def test_unsuitable_columns_and_files_are_refused(tmp_path, opened):
    with pytest.raises(ValueError, match="neither a Parquet file nor a folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"set data\.label_column"):
        opened(numeric(tmp_path / "n.parquet", a=[1, 2], b=[0, 1]))
    with pytest.raises(ValueError, match="have no rows"):
        opened(numeric(tmp_path / "n.parquet", a=pa.array([], pa.float32()), y=pa.array([], pa.int64())))
    numeric(tmp_path / "d" / "train-0.parquet", a=[1.0], y=[0])
    numeric(tmp_path / "d" / "train-1.parquet", b=[1.0], y=[0])
    with pytest.raises(ValueError, match=r"train-1\.parquet has no column 'a'"):
        opened(tmp_path / "d")
    with pytest.raises(ValueError, match=r"data\.on_error = 'skp': did you mean 'skip'"):
        opened(tmp_path / "d", on_error="skp")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"path": 3}, "data.path = 3: must be text"),
        ({"label_column": 3}, "data.label_column = 3: must be text or null"),
        ({"train_files": 3}, "data.train_files = 3: must be text"),
        ({"feature_columns": []}, "data.feature_columns = []: name at least one column"),
        ({"feature_columns": "abc"}, "data.feature_columns = 'abc': must be a list of texts or null"),
        ({"num_classes": "abc"}, "data.num_classes = 'abc': must be a whole number or null"),
        ({"validation_fraction": "abc"}, "data.validation_fraction = 'abc': must be a number"),
        ({"cache_dir": 3}, "data.cache_dir = 3: must be text or null"),
    ],
)
def test_keys_of_another_type_are_refused_in_one_line(tmp_path, keys, line):
    file = numeric(tmp_path / "n.parquet", a=[1.0, 2.0], y=[0, 1])
    with pytest.raises(ValueError, match=r".") as caught:
        open_data("parquet", **{"path": str(file)} | keys)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_the_index_of_pandas_is_neither_feature_nor_label(tmp_path, opened):
    frame = pd.DataFrame({"a": [0.5, 1.5, 2.5, 3.5], "mark": [0, 1, 0, 1]}, index=[7, 3, 9, 1])
    for name, table in (("unnamed", frame), ("named", frame.rename_axis("row"))):
        table.to_parquet(tmp_path / f"{name}.parquet")
        train = opened(tmp_path / f"{name}.parquet").train
        assert all_rows(train)["features"].tolist() == [[0.5], [1.5], [2.5], [3.5]]
        assert train.labels.tolist() == [0, 1, 0, 1]
    bare = numeric(tmp_path / "bare.parquet", __index_level_0__=[7, 3], a=[0.5, 1.5], mark=[0, 1])
    assert all_rows(opened(bare).train)["features"].tolist() == [[0.5], [1.5]]
    chosen = opened(tmp_path / "named.parquet", feature_columns=["row"], label_column="mark").train
    assert all_rows(chosen)["features"].ravel().tolist() == [7, 3, 9, 1]


def test_a_file_of_other_types_is_named_or_left_out(tmp_path, opened, caplog):
    write(tmp_path / "i" / "train-0.parquet", encoded(4), [0, 1, 0, 1])
    numeric(tmp_path / "i" / "train-1.parquet", img=[1, 2], label=[0, 1])
    numeric(tmp_path / "f" / "train-0.parquet", a=[1.0, 2.0], y=[0, 1])
    numeric(tmp_path / "f" / "train-1.parquet", a=["x", "y"], y=[0, 1])
    numeric(tmp_path / "l" / "train-0.parquet", a=[1.0, 2.0], y=[0, 1])
    numeric(tmp_path / "l" / "train-1.parquet", a=[1.0, 2.0], y=["0", "1"])
    for folder, column, kind, count in (("i", "img", "int64", 4), ("f", "a", "string", 2), ("l", "y", "string", 2)):
        message = (
            rf"train-1\.parquet column '{column}' is {kind}, and .* in the first file: correct it, or leave it out"
        )
        with pytest.raises(ValueError, match=message) as caught:
            opened(tmp_path / folder)
        assert "\n" not in str(caught.value)
        caplog.clear()
        assert len(opened(tmp_path / folder, on_error="skip").train) == count
        assert f"train-1.parquet column '{column}' is {kind}" in caplog.text


def test_integers_and_floats_may_be_mixed(tmp_path, opened):
    numeric(tmp_path / "d" / "train-0.parquet", a=[1.0, 2.0], y=[0, 1])
    numeric(tmp_path / "d" / "train-1.parquet", a=[3, 4], y=pa.array([0, 1], pa.int8()))
    assert all_rows(opened(tmp_path / "d").train)["features"].ravel().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0, 2**62]), rf"column 'y' of .* holds {2**62}: labels must be below"),
        (pa.array([0, 2**63 + 1], pa.uint64()), "column 'y' does not hold class numbers"),
        (
            pa.array([0, 5000]),
            "column 'y' of .* look like ids, not labels: the largest of 2 is 5000; .*data.num_classes",
        ),
    ],
)
def test_labels_that_are_ids_are_refused(tmp_path, opened, labels, message):
    file = numeric(tmp_path / "n.parquet", a=[1.0, 2.0], y=labels)
    with pytest.raises(ValueError, match=message) as caught:
        opened(file)
    assert "\n" not in str(caught.value)


def test_second_open_reuses_the_cache(tmp_path, opened):
    file = write(tmp_path / "a.parquet", encoded(8), [0, 1] * 4)
    opened(file).train.prepare()
    before = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache").rglob("*")}
    train = opened(file).train
    train.prepare()
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(all_rows(again)["image"], pixels(8))
    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "cache").rglob("*")} == before


def test_threads_and_pickled_copies_read_the_same_rows(tmp_path, opened):
    train = opened(write(tmp_path / "a.parquet", encoded(200), np.arange(200) % 7)).train
    pickled = pickle.dumps(train)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    ids = [np.random.default_rng(seed).integers(0, 200, 64) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for chosen, taken in zip(ids, pool.map(again.take, ids), strict=True):
            np.testing.assert_array_equal(taken["image"], pixels(200)[chosen])
            np.testing.assert_array_equal(taken["label"], chosen % 7)


def test_large_images_are_decoded_by_several_threads(tmp_path, opened):
    images = pixels(80, size=(256, 128), channels=1)
    data = [encode_image(image) for image in images]
    splits = opened(write(tmp_path / "a.parquet", data, [0, 1] * 40, row_group_size=7))
    np.testing.assert_array_equal(all_rows(splits.train)["image"][..., 0], images)


def test_fingerprint_follows_the_content_not_the_place(tmp_path, opened):
    data, labels = encoded(6), [0, 1, 1, 0, 1, 1]
    first = write(tmp_path / "a" / "train.parquet", data, labels)
    (tmp_path / "b").mkdir()
    shutil.copy(first, tmp_path / "b" / "part.parquet")
    swapped = [data[0], data[2], data[1], *data[3:]]  # same labels, same lengths
    variants = [(data, labels[::-1]), (swapped, labels), (data[:5], labels[:5])]
    prints = [opened(tmp_path / "a").train.fingerprint, opened(tmp_path / "b").train.fingerprint]
    for number, (images, marks) in enumerate(variants):
        prints.append(opened(write(tmp_path / f"v{number}.parquet", images, marks)).train.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("other", ["train-1", "test-0"])
def test_class_names_in_two_orders_are_refused(tmp_path, opened, other, caplog):
    for name, names in (("train-0", ["cat", "dog"]), (other, ["dog", "cat"])):
        write(tmp_path / "set" / f"{name}.parquet", encoded(2), [0, 1], names=names)
    with pytest.raises(
        ValueError,
        match=rf"{other}\.parquet has 2 classes, from 0: \['dog', 'cat'\], and the first file 2 classes, "
        r"from 0: \['cat', 'dog'\]: store them with one order of names",
    ):
        opened(tmp_path / "set")
    assert len(opened(tmp_path / "set", on_error="skip").train) == 2
    assert f"{other}.parquet has 2 classes" in caplog.text
    write(tmp_path / "set" / f"{other}.parquet", encoded(2), [0, 1], names=["cat", "dog", "owl"])
    with pytest.raises(ValueError, match=r"has 3 classes, from 2: \['owl'\], and the first file 2 classes"):
        opened(tmp_path / "set")
    write(tmp_path / "set" / f"{other}.parquet", encoded(2), [0, 1])  # says nothing of names
    opened(tmp_path / "set")


@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize("kind", ["features", "label", "image"])
def test_a_flipped_bit_in_a_page_with_a_checksum_is_no_other_sample(tmp_path, opened, cache, kind):
    values = np.arange(20, dtype=np.float64) + 0.123
    table = {"x": values, "label": np.arange(20) % 4 + 4_000}
    if kind == "image":
        table["x"] = [encode_image(image) for image in pixels(20)]
    file, plain = tmp_path / "a.parquet", {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table(table), file, write_page_checksum=True, **plain)
    some = table["label" if kind == "label" else "x"][:7]  # one alone may be in the statistics, too
    flip_byte(file, b"".join(some)[:60] if kind == "image" else some.tobytes())
    with pytest.raises((DataError, OSError), match=r"a\.parquet (row|is not).*: (correct|restore)") as caught:
        opened(file, cache=cache, num_classes=9_999).train.take(np.arange(20))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        (
            10**12,
            r"a\.parquet claims 1,000,000,000,000 rows, whose labels take 8,000 GB, and \d+ GB of memory are free: ",
        ),
        (200_000, r"a\.parquet claims 200,000 rows and has 100,003: correct it, or leave it out"),
    ],
)
def test_a_footer_that_claims_too_many_rows_is_refused(tmp_path, opened, claimed, message):
    file, count = tmp_path / "a.parquet", 100_003
    pq.write_table(pa.table({"x": np.zeros(count), "label": np.arange(count) % 3}), file)
    claim_rows(file, count, claimed)
    with pytest.raises(DataError, match=message):
        opened(file)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_declared_classes_names_its_file_and_row(tmp_path, opened, label, caplog):
    labels = [*[0, 1, 2] * 3, label, 0, 0]
    write(tmp_path / "data" / "train-0.parquet", encoded(6), labels[:6], ["a", "b", "c"])
    write(tmp_path / "data" / "train-1.parquet", encoded(6), labels[6:], ["a", "b", "c"])
    with pytest.raises(
        DataError, match=rf"train-1\.parquet row 3 has label {label}, outside 0\.\.2: correct the label"
    ):
        opened(tmp_path / "data", validation_fraction=0.2)
    if label == 3:
        with caplog.at_level(logging.WARNING):
            assert opened(tmp_path / "data", num_classes=4).train.schema.class_names == ()
        assert "train-1.parquet row 3 has label 3 and the data name 3 classes" in caplog.text
    write(tmp_path / "data" / "test.parquet", encoded(6), labels[6:], ["a", "b", "c"])
    write(tmp_path / "data" / "train-1.parquet", encoded(6), labels[:6], ["a", "b", "c"])
    with pytest.raises(DataError, match=rf"test\.parquet row 3 has label {label}, outside 0\.\.2"):
        opened(tmp_path / "data")
