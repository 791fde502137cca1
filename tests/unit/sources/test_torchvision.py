"""Data sets in torchvision's folders, written here in their published formats: CIFAR, Fashion-MNIST, ImageNet."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from rayprune.sources import default_augment, open_data

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def opened(tmp_path):
    """Open a data set below the test's own folder, with a cache of its own."""

    def call(name, **keys):
        cache = {} if name == "imagenet" else {"cache_dir": str(tmp_path / "cache")}
        return open_data(name, **{"path": str(tmp_path / "root"), **cache} | keys)

    return call


def images(count, seed, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def write_pickle(file, content, protocol=2):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    return file


def batch(rows, labels, key, **more):
    """Return what a CIFAR batch holds: one row an image, all red values first."""
    return {b"data": rows.transpose(0, 3, 1, 2).reshape(len(rows), -1), key: labels, b"filenames": [b"x"], **more}


def write_cifar10(root, protocol=2):
    folder, rows, labels = root / "cifar-10-batches-py", images(60, 1), (np.arange(60) * 7 % 10).tolist()
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        part = slice(number * 10, number * 10 + 10)
        write_pickle(folder / name, batch(rows[part], labels[part], b"labels", batch_label=name.encode()), protocol)
    names = [name.encode() for name in CIFAR10_NAMES]
    write_pickle(folder / "batches.meta", {b"num_cases_per_batch": 10, b"label_names": names, b"num_vis": 3072})
    return rows, labels


def all_rows(source):
    return source.take(np.arange(len(source)))


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar10(tmp_path, opened, caplog, protocol):
    rows, labels = write_cifar10(tmp_path / "root", protocol)
    with caplog.at_level(logging.WARNING):
        splits = opened("cifar10")
    assert "data_batch_1, " in caplog.text
    assert "differs from the published file (MD5)" in caplog.text
    np.testing.assert_array_equal(all_rows(splits.train)["image"], rows[:50])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], rows[50:])
    assert splits.train.labels.tolist() == labels[:50]
    assert splits.validation.labels.tolist() == labels[50:]
    assert splits.train.schema.class_names == tuple(CIFAR10_NAMES)
    assert default_augment("cifar10") == default_augment("cifar100") == {"crop": 4, "flip": True}


def test_cifar10_is_mapped_from_the_cache_and_not_pickled(tmp_path, opened):
    rows, _ = write_cifar10(tmp_path / "root")
    train = opened("cifar10").train
    pickled = pickle.dumps(train)
    assert len(pickled) < 4_000
    for file in (tmp_path / "root" / "cifar-10-batches-py").iterdir():
        file.unlink()
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.take(np.array([49, 3]))["image"], rows[[49, 3]])
    assert again.fingerprint == train.fingerprint


def test_cifar10_of_python_2(tmp_path, opened):
    """The published batches were pickled by Python 2, whose texts are bytes and whose protocol differs."""
    rows, labels = write_cifar10(tmp_path / "root")
    data = rows[:1].transpose(0, 3, 1, 2).reshape(1, -1)
    text = b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\ntS'b'\ntRp6\n"
    text += b"(I1\n(I1\nI3072\ntcnumpy\ndtype\np7\n(S'u1'\nI0\nI1\ntRp8\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS"
    text += repr(data.tobytes()).removeprefix("b").encode() + b"\ntbsS'labels'\n(lp10\nI%d\nas." % labels[0]
    (tmp_path / "root" / "cifar-10-batches-py" / "data_batch_1").write_bytes(text)
    train = opened("cifar10").train
    assert len(train) == 41
    np.testing.assert_array_equal(all_rows(train)["image"], np.concatenate([rows[:1], rows[10:50]]))


def test_cifar100_has_its_fine_labels(tmp_path, opened):
    folder, rows = tmp_path / "root" / "cifar-100-python", images(30, 2)
    fine = np.arange(30) * 37 % 100
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        coarse = {b"coarse_labels": (fine[part] // 5).tolist()}
        write_pickle(folder / name, batch(rows[part], fine[part].tolist(), b"fine_labels") | coarse)
    names = [f"class {number}".encode() for number in range(100)]
    write_pickle(folder / "meta", {b"fine_label_names": names, b"coarse_label_names": [b"x"] * 20})
    splits = opened("cifar100")
    np.testing.assert_array_equal(splits.train.labels, fine[:20])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], rows[20:])
    assert splits.train.schema.num_classes == 100
    assert splits.train.schema.class_names[37] == "class 37"


def test_pickled_code_does_not_run(tmp_path, opened):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    write_cifar10(tmp_path / "root")
    write_pickle(tmp_path / "root" / "cifar-10-batches-py" / "data_batch_3", {b"data": Harmful()})
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged or no CIFAR file \(it holds posix\.mkdir\): remove"):
        opened("cifar10")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": images(2, 0).reshape(2, -1), b"labels": [1]}, "'labels' is no list of 2 numbers"),
        ({b"data": images(2, 0).reshape(2, -1), b"labels": [1, 10]}, "'labels' holds 10, outside 0..9"),
        ({b"data": images(2, 0).reshape(4, -1), b"labels": [1] * 4}, "'data' is no uint8 array"),
        ({b"labels": [1]}, "'data' is no uint8 array"),
        ([1, 2], "it holds a list"),
    ],
)
def test_cifar_batches_of_another_form(tmp_path, opened, content, message):
    write_cifar10(tmp_path / "root")
    write_pickle(tmp_path / "root" / "cifar-10-batches-py" / "data_batch_2", content)
    with pytest.raises(ValueError, match=rf"data_batch_2 is damaged or no CIFAR file \({message}"):
        opened("cifar10")


def test_missing_and_damaged_cifar_files(tmp_path, opened):
    with pytest.raises(ValueError, match=r"data_batch_1 is missing: set data\.download=true, or correct data\.path"):
        opened("cifar10")
    write_cifar10(tmp_path / "root")
    file = tmp_path / "root" / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"test_batch is damaged or no CIFAR file .*data\.download=true"):
        opened("cifar10")
    with pytest.raises(ValueError, match=r"unknown key 'data\.downlod'"):
        opened("cifar10", downlod=True)


def idx(values):
    """Return the bytes of an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_fashion(folder, packed):
    folder.mkdir(parents=True, exist_ok=True)
    rows, labels = images(50, 3, (28, 28)), np.arange(50) % 10
    for part, chosen in (("train", slice(0, 40)), ("t10k", slice(40, 50))):
        for kind, values in (("images-idx3", rows[chosen]), ("labels-idx1", labels[chosen])):
            name = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            name.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return rows[..., None], labels


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist(tmp_path, opened, packed):
    rows, labels = write_fashion(tmp_path / "root" / "FashionMNIST" / "raw", packed)
    splits = opened("fashion_mnist")
    np.testing.assert_array_equal(all_rows(splits.train)["image"], rows[:40])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], rows[40:])
    np.testing.assert_array_equal(splits.train.labels, labels[:40])
    assert list(splits.train.schema.class_names) == torchvision.datasets.FashionMNIST.classes
    assert default_augment("fashion_mnist") == {"crop": 2, "flip": True}
    if not packed:
        theirs = torchvision.datasets.FashionMNIST(str(tmp_path / "root"), train=False)
        np.testing.assert_array_equal(theirs.data.numpy()[..., None], rows[40:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3", lambda data: gzip.compress(data)[:-20], "ended before|end-of-stream"),
        ("train-images-idx3", lambda data: gzip.compress(data[:-1]), "it holds 31359 of 31360 bytes"),
        ("t10k-labels-idx1", lambda data: b"no gzip at all", "[Nn]ot a gzipped file"),
        ("t10k-labels-idx1", lambda data: gzip.compress(data[:4] + idx(np.zeros(9))[4:]), "it holds 9 labels for 10"),
        ("t10k-labels-idx1", lambda data: gzip.compress(data[:-1] + b"\x0b"), "it holds the label 11, outside 0..9"),
        ("t10k-images-idx3", lambda data: gzip.compress(idx(np.zeros((10, 9, 8)))), "images have 8×9 pixels"),
        ("t10k-images-idx3", lambda data: gzip.compress(b"text"), "does not start like an IDX file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, opened, name, damage, message):
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    write_fashion(raw, packed=True)
    file = raw / f"{name}-ubyte.gz"
    file.write_bytes(damage(gzip.decompress(file.read_bytes())))
    with pytest.raises(ValueError, match=rf"{name}-ubyte\.gz is damaged or of another form \(.*({message})"):
        opened("fashion_mnist")


@pytest.fixture
def mirror(tmp_path):
    """Serve a folder over HTTP; yields its address."""
    (tmp_path / "mirror").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_missing_files_are_downloaded_where_wanted(tmp_path, opened, monkeypatch, mirror):
    """torchvision checks the sums of what comes."""
    rows, _ = write_fashion(tmp_path / "mirror", packed=True)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is missing: set data\.download=true"):
        opened("fashion_mnist")
    sums = [
        (file.name, hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest())
        for file in (tmp_path / "mirror").iterdir()
    ]
    dataset = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(dataset, "mirrors", [mirror])
    with pytest.raises(ValueError, match=r"FashionMNIST can't be downloaded to .*: check the network"):
        opened("fashion_mnist", download=True)
    monkeypatch.setattr(dataset, "resources", sums)
    np.testing.assert_array_equal(all_rows(opened("fashion_mnist", download=True).train)["image"], rows[:40])


def write_imagenet(root):
    for part, count in (("train", 3), ("val", 1)):
        for seed, wnid in enumerate(("n02119789", "n01440764")):
            (root / part / wnid).mkdir(parents=True)
            for number in range(count):
                size = (60 + 7 * number, 40 + 9 * number)
                picture = Image.fromarray(images(1, seed, (4, 4, 3))[0]).resize(size)
                mode = "L" if number == 1 else "RGB"
                picture.convert(mode).save(root / part / wnid / f"{wnid}_{number}.JPEG")


def test_imagenet(tmp_path, opened):
    write_imagenet(tmp_path / "root")
    splits = opened("imagenet", cache="none", image_size=32)
    assert (len(splits.train), len(splits.validation)) == (6, 2)
    assert splits.train.schema.class_names == ("n01440764", "n02119789")
    assert all_rows(splits.train)["image"].shape == (6, 32, 32, 3)
    assert splits.validation.labels.tolist() == [0, 1]
    assert opened("imagenet", cache="none").train.schema.columns["image"].shape == (224, 224, 3)
    assert default_augment("imagenet") == {"crop": 0, "flip": True}


def test_imagenet_folders_must_be_there(tmp_path, opened):
    with pytest.raises(ValueError, match=r"train is missing: ImageNet can't be downloaded, get .* image-net\.org"):
        opened("imagenet")
    write_imagenet(tmp_path / "root")
    with pytest.raises(ValueError, match=r"data\.download is true: ImageNet can't be downloaded"):
        opened("imagenet", download=True)
    (tmp_path / "root" / "val").rename(tmp_path / "root" / "other")
    with pytest.raises(ValueError, match="val is missing"):
        opened("imagenet")
