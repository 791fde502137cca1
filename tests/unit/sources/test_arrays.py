"""NumPy arrays in folders and archives."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest

from rayprune.errors import DataError
from rayprune.sources import open_data
from tests.support.sources import all_rows, random_bytes


def save(folder, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


LABELS = np.arange(20) % 4


def bad_features(value):
    features = np.zeros((20, 4))
    features[11, 2] = features[15, 0] = value
    return features


@pytest.mark.parametrize(
    ("shape", "to_rows"),
    [
        ((20, 5, 6, 3), lambda x: x),
        ((20, 3, 5, 6), lambda x: x.transpose(0, 2, 3, 1)),
        ((20, 1, 5, 3), lambda x: x),
        ((20, 5, 6), lambda x: x[..., None]),
    ],
)
def test_image_layouts_are_delivered_channels_last(tmp_path, shape, to_rows):
    x = random_bytes(*shape)
    train = open_data("arrays", path=save(tmp_path, x_train=x, y_train=LABELS), validation_fraction=0).train
    ids = np.array([7, 0, 7, 19])
    taken = train.take(ids)
    np.testing.assert_array_equal(taken["image"], to_rows(x)[ids])
    assert taken["image"].flags.c_contiguous
    assert type(taken["image"]) is np.ndarray
    assert train.schema.columns["image"].shape == to_rows(x).shape[1:]
    assert train.schema.num_classes == 4


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8", "float16"])
def test_arrays_of_two_axes_are_features(tmp_path, dtype):
    x = random_bytes(20, 7).astype(dtype)
    train = open_data("arrays", path=save(tmp_path, x=x, y=LABELS[:, None].astype("uint8"))).train
    assert train.schema.input == "features"
    rows = all_rows(train)
    assert rows["features"].dtype == np.float32
    assert rows["label"].dtype == np.int64
    assert rows["label"].shape == (18,)


def test_a_stored_validation_part_is_used(tmp_path):
    x = random_bytes(20, 4, 4, 3)
    for names in (("x_test", "y_test"), ("x_val", "y_val")):
        path = save(
            tmp_path / names[0], x_train=x, y_train=LABELS, **dict(zip(names, (x[:6], LABELS[:6]), strict=True))
        )
        splits = open_data("arrays", path=path)
        assert (len(splits.train), len(splits.validation)) == (20, 6)
    bad = save(tmp_path / "bad", x_train=x, y_train=LABELS, x_test=x[:2], y_test=np.array([0, 4]))
    with pytest.raises(ValueError, match=r"y_test in .*bad row 1 has label 4, outside 0\.\.3: correct the label"):
        open_data("arrays", path=bad)
    other = save(tmp_path / "other", x_train=x, y_train=LABELS, x_test=x[:2, :3], y_test=LABELS[:2])
    with pytest.raises(ValueError, match="training and validation rows differ"):
        open_data("arrays", path=other)


def test_an_archive_is_extracted_once(tmp_path):
    x = random_bytes(20, 4, 4, 3)
    archive = tmp_path / "set.npz"
    np.savez_compressed(archive, x_train=x, y_train=LABELS, unrelated=np.zeros(3))
    keys = {"path": str(archive), "validation_fraction": 0, "cache_dir": str(tmp_path / "cache")}
    train = open_data("arrays", **keys).train
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert sorted(file.name for file in files) == ["x_train.npy", "y_train.npy"]
    again = pickle.loads(pickle.dumps(open_data("arrays", **keys).train))
    np.testing.assert_array_equal(all_rows(again)["image"], x)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    folder = open_data("arrays", path=save(tmp_path / "f", x_train=x, y_train=LABELS), validation_fraction=0).train
    assert folder.fingerprint == train.fingerprint


def test_the_fingerprint_ignores_the_path(tmp_path):
    x = random_bytes(20, 4, 4, 3)
    save(tmp_path / "a", x_train=x, y_train=LABELS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save(tmp_path / "c", x_train=x[::-1], y_train=LABELS)
    save(tmp_path / "d", x_train=x, y_train=LABELS[::-1])
    save(tmp_path / "e", x_train=x[:16], y_train=LABELS[:16])
    prints = [open_data("arrays", path=str(tmp_path / name)).train.fingerprint for name in "abcde"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_a_pickle_holds_the_path_only(tmp_path):
    x = random_bytes(200, 8, 8, 3)
    train = open_data("arrays", path=save(tmp_path, x_train=x, y_train=np.arange(200) % 4)).train
    pickled = pickle.dumps(train)
    assert len(pickled) < 2000
    ids = np.array([3, 100])
    np.testing.assert_array_equal(pickle.loads(pickled).take(ids)["image"], train.take(ids)["image"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": random_bytes(20, 4, 4, 3) / 255, "y_train": LABELS}, "images must be uint8"),
        (
            {"x_train": np.array([{}] * 20), "y_train": LABELS},
            r"x_train\.npy is truncated, or is not .* Python objects",
        ),
        ({"x_train": random_bytes(20, 4, 4, 3), "y_train": LABELS[:19]}, "x_train has 20 rows"),
        ({"x_train": random_bytes(20, 4, 4, 3), "y_train": LABELS / 1.0}, "labels must be integers"),
        ({"x_train": random_bytes(20, 4, 4, 3), "y_train": np.eye(4)[LABELS].astype(int)}, "labels must be integers"),
        ({"x_train": random_bytes(20, 4), "y_train": np.array(3)}, "labels must be integers"),
        ({"x_train": np.zeros((0, 4)), "y_train": LABELS[:0]}, "empty"),
        ({"x_train": random_bytes(20, 4, 4, 5), "y_train": LABELS}, "1 or 3 channels"),
        ({"x_train": np.full((20, 4), "a"), "y_train": LABELS}, "real numbers"),
        ({"x_train": random_bytes(20), "y_train": LABELS}, "reshape"),
        ({"x_train": random_bytes(20, 4)}, "holds no x_train and y_train"),
        ({"x": random_bytes(20, 4), "y": LABELS, "x_val": random_bytes(2, 4)}, "without its partner"),
        ({"x": random_bytes(20, 4), "y": LABELS - 9}, "y in .* row 0 has label -9, labels must be at least 0: "),
        (
            {"x": random_bytes(20, 4), "y": np.append(LABELS[:19], 2**62)},
            rf"y in .* holds {2**62}: labels must be below",
        ),
        ({"x": random_bytes(20, 4), "y": np.uint64(2**64 - 1) - LABELS.astype("u8")}, "labels must be below 2"),
        ({"x": random_bytes(20, 4), "y": LABELS * 1000}, r"y in .* look like ids, .* largest of 20 is 3000;"),
        ({"x": bad_features(np.nan), "y": LABELS}, r"x in .* row 11, column 2 is nan: features must be finite"),
        ({"x": bad_features(-np.inf), "y": LABELS}, r"row 11, column 2 is -inf"),
        ({"x": bad_features(1e300), "y": LABELS}, r"row 11, column 2 is 1e\+300"),
        ({"x": random_bytes(20, 4), "y": LABELS, "x_val": bad_features(np.nan), "y_val": LABELS}, "x_val in .* row 11"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_unsuitable_arrays_are_refused_in_one_line(tmp_path, monkeypatch, arrays, message):
    monkeypatch.setattr("rayprune.sources.arrays.CHUNK_VALUES", 12)
    with pytest.raises(ValueError, match=message) as caught:
        open_data("arrays", path=save(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"path": None}, "data.path = None: must be text"),
        ({"path": 3}, "data.path = 3: must be text"),
        ({"num_classes": "abc"}, "data.num_classes = 'abc': must be a whole number or null"),
        ({"num_classes": 3.5}, "data.num_classes = 3.5: must be a whole number or null"),
        ({"validation_fraction": "abc"}, "data.validation_fraction = 'abc': must be a number"),
        ({"cache_dir": 3}, "data.cache_dir = 3: must be text or null"),
        ({}, "data.path is missing"),
    ],
)
def test_keys_of_another_type_are_refused_in_one_line(tmp_path, keys, line):
    path = {"path": save(tmp_path, x=random_bytes(20, 4), y=LABELS)} if keys and "path" not in keys else {}
    with pytest.raises(ValueError, match=r".") as caught:
        open_data("arrays", **path, **keys)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_sparse_labels_are_accepted_with_num_classes(tmp_path):
    path = save(tmp_path, x=random_bytes(20, 4), y=LABELS * 1000)
    assert open_data("arrays", path=path, num_classes=3001).train.schema.num_classes == 3001


@pytest.mark.parametrize("num_bytes", [0, 20, 200])
def test_truncated_files_are_refused(tmp_path, num_bytes):
    save(tmp_path, x_train=random_bytes(20, 4, 4, 3), y_train=LABELS)
    file = tmp_path / "x_train.npy"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"x_train\.npy is truncated.*: write it again") as caught:
        open_data("arrays", path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_header_that_is_no_python_is_refused(tmp_path):
    save(tmp_path, x=np.zeros((4, 2)), y=np.zeros(4, int))
    file = tmp_path / "x.npy"
    file.write_bytes(file.read_bytes().replace(b")", b" ").replace(b"}", b" "))
    with pytest.raises(DataError, match=r"x\.npy"):
        open_data("arrays", path=str(tmp_path))


def test_an_archive_names_its_member(tmp_path):
    archive = tmp_path / "set.npz"
    np.savez(archive, x=np.array([{}] * 20), y=LABELS)
    with pytest.raises(ValueError, match=r"set\.npz: x\.npy is truncated, or is not .* Python objects") as caught:
        open_data("arrays", path=str(archive), cache_dir=str(tmp_path / "cache"))
    assert str(tmp_path / "cache") not in str(caught.value)


def test_damaged_archives_are_refused(tmp_path):
    archive = tmp_path / "set.npz"
    np.savez_compressed(archive, x=random_bytes(200, 40), y=np.arange(200) % 4)
    whole = archive.read_bytes()
    damaged = bytearray(whole)
    damaged[2000:2100] = bytes(100)
    for content in (whole[: len(whole) // 2], bytes(damaged), b""):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            open_data("arrays", path=str(archive), cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob(".*"))
    with pytest.raises(ValueError, match="nowhere' does not exist: correct it"):
        open_data("arrays", path=str(tmp_path / "nowhere"))
    (tmp_path / "set.txt").write_text("1")
    with pytest.raises(ValueError, match="neither a folder"):
        open_data("arrays", path=str(tmp_path / "set.txt"))


def header(shape):
    """Return the header of a .npy file of bytes."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("claim", ["shape", "size", "bomb"])
def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path, packing, claim):
    archive, cache = tmp_path / "set.npz", tmp_path / "cache"
    content = header((4_000_000_000, 4) if claim == "shape" else (20, 4)) + bytes(80)
    if claim == "bomb":
        content += bytes(50_000_000)
    with zipfile.ZipFile(archive, "w", packing) as file:
        file.writestr("x.npy", content)
        file.writestr("y.npy", header((20,)) + bytes(20))
    if claim == "size":
        packed = bytearray(archive.read_bytes())
        sizes = struct.pack("<I", len(content))
        place = packed.rindex(sizes, 0, packed.rindex(b"y.npy") - 46)  # in the directory
        packed[place : place + 4] = struct.pack("<I", 4_000_000_000)
        archive.write_bytes(packed)
    with pytest.raises(
        DataError, match=r"set\.npz is damaged \(x\.npy claims .*: save it again with np\.savez"
    ) as caught:
        open_data("arrays", path=str(archive), cache_dir=str(cache))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("cache/**/*.npy"))


def test_a_header_of_more_than_the_file_is_refused(tmp_path):
    path = save(tmp_path / "set", y=LABELS)
    (tmp_path / "set" / "x.npy").write_bytes(header((4_000_000_000, 4)) + bytes(80))
    with pytest.raises(DataError, match=r"x\.npy is truncated, or is not a \.npy file of numbers .*: write it again"):
        open_data("arrays", path=path)


@pytest.mark.parametrize("name", ["x.npy", "y.npy"])
def test_a_file_that_is_cut_while_it_is_in_use_is_named(tmp_path, name):
    path = save(tmp_path / "set", x=random_bytes(2_000, 4, 4, 3), y=np.arange(2_000) % 4)
    train = open_data("arrays", path=path, validation_fraction=0).train
    other = pickle.loads(pickle.dumps(train))
    assert len(train.take(np.arange(2_000))["label"]) == len(other.take(np.arange(5))["label"]) * 400
    os.truncate(tmp_path / "set" / name, 5_000)
    for source in (train, other):
        with pytest.raises(DataError, match=rf"{name} has been cut off since it was opened: restore it, and run the"):
            source.take(np.arange(1_000, 2_000))
