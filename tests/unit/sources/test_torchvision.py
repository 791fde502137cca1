"""CIFAR and Fashion-MNIST in torchvision's folders, written here in their published formats."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision.datasets

from rayprune.sources import default_augment, open_data
from rayprune.sources.fingerprint import digest, file_digest
from tests.support.sources import all_rows, random_bytes

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def opened(tmp_path):
    """Open a dataset in the test's folder, with its own cache."""

    def call(name, **keys):
        return open_data(name, **{"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")} | keys)

    return call


def md5(file):
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def write_pickle(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol=2))


def batch(pixels, **labels):
    """Return the content of a CIFAR batch: a row per image, all red values first."""
    return {"data": pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1), **labels, "filenames": ["x"] * len(pixels)}


def publish(monkeypatch, dataset, folder, train, test, meta):
    """Let torchvision take the files in a folder for the published ones."""
    monkeypatch.setattr(dataset, "train_list", [[name, md5(folder / name)] for name in train])
    monkeypatch.setattr(dataset, "test_list", [[name, md5(folder / name)] for name in test])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(folder / meta)})


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Write 50 training and 10 test images; return the folder, all pixels and all labels."""
    folder, pixels, labels = tmp_path / "cifar-10-batches-py", random_bytes(60, 32, 32, 3), np.arange(60) * 7 % 10
    names = [f"data_batch_{number}" for number in range(1, 6)]
    for number, name in enumerate([*names, "test_batch"]):
        part = slice(number * 10, number * 10 + 10)
        write_pickle(folder / name, batch(pixels[part], labels=labels[part].tolist()))
    write_pickle(folder / "batches.meta", {"num_cases_per_batch": 10, "label_names": CIFAR10_NAMES, "num_vis": 3072})
    publish(monkeypatch, torchvision.datasets.CIFAR10, folder, names, ["test_batch"], "batches.meta")
    return folder, pixels, labels


def test_cifar10_is_read_as_published(opened, cifar10):
    folder, pixels, labels = cifar10
    splits = opened("cifar10")
    np.testing.assert_array_equal(all_rows(splits.train)["image"], pixels[:50])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], pixels[50:])
    np.testing.assert_array_equal(splits.train.labels, labels[:50])
    np.testing.assert_array_equal(splits.validation.labels, labels[50:])
    assert splits.train.labels.dtype == np.int64
    assert splits.train.schema.class_names == tuple(CIFAR10_NAMES)
    assert splits.validation.fingerprint == digest("cifar10", file_digest(folder / "test_batch"))
    assert default_augment("cifar10") == default_augment("cifar100") == {"crop": 4, "flip": True}


def test_rows_are_mapped_from_the_cache_and_not_pickled(opened, cifar10):
    folder, pixels, _ = cifar10
    train = opened("cifar10").train
    pickled = pickle.dumps(train)
    assert len(pickled) < 4_000
    for file in folder.iterdir():
        file.unlink()
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(copy.take(np.array([49, 3]))["image"], pixels[[49, 3]])
    assert copy.fingerprint == train.fingerprint


def test_cached_parts_are_opened_without_torch(tmp_path, opened, cifar10):
    opened("cifar10")
    code = (
        "import sys; from rayprune.sources import open_data; "
        f"train = open_data('cifar10', path={str(tmp_path)!r}, cache_dir={str(tmp_path / 'cache')!r}).train; "
        "print(len(train), train.schema.class_names[3], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["50", "cat", "False"]


def test_cifar100_has_its_fine_labels(tmp_path, opened, monkeypatch):
    folder, pixels = tmp_path / "cifar-100-python", random_bytes(30, 32, 32, 3)
    fine = np.arange(30) * 37 % 100
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        labels = {"fine_labels": fine[part].tolist(), "coarse_labels": (fine[part] // 5).tolist()}
        write_pickle(folder / name, batch(pixels[part], **labels))
    names = [f"class {number}" for number in range(100)]
    write_pickle(folder / "meta", {"fine_label_names": names, "coarse_label_names": ["x"] * 20})
    publish(monkeypatch, torchvision.datasets.CIFAR100, folder, ["train"], ["test"], "meta")
    splits = opened("cifar100")
    np.testing.assert_array_equal(splits.train.labels, fine[:20])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], pixels[20:])
    assert splits.train.schema.num_classes == 100
    assert splits.train.schema.class_names[37] == "class 37"


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_pickled_code_does_not_run(tmp_path, opened, cifar10, name):
    write_pickle(cifar10[0] / name, {"data": Harmful(tmp_path / "harm")})
    with pytest.raises(ValueError, match=rf"{name} is damaged or changed, its MD5 is not the published one: remove it"):
        opened("cifar10")
    assert not (tmp_path / "harm").exists()


def test_missing_and_damaged_cifar_files_are_named(opened, cifar10):
    folder, _, _ = cifar10
    file = folder / "test_batch"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"test_batch is damaged or changed.*data\.download=true.*torch_dataset"
    ) as bad:
        opened("cifar10")
    assert "\n" not in str(bad.value)
    (folder / "data_batch_1").unlink()
    with pytest.raises(ValueError, match=r"data_batch_1 is missing: set data\.download=true, or correct data\.path"):
        opened("cifar10")
    with pytest.raises(ValueError, match=r"unknown key 'data\.downlod'"):
        opened("cifar10", downlod=True)


def idx(values):
    """Return the bytes of an IDX file."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_fashion(folder, packed):
    """Write 40 training and 10 test images as IDX files; return all pixels and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = random_bytes(50, 28, 28), np.arange(50) % 10
    for part, chosen in (("train", slice(0, 40)), ("t10k", slice(40, 50))):
        for kind, values in (("images-idx3", pixels[chosen]), ("labels-idx1", labels[chosen])):
            file = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return pixels[..., None], labels


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_packed_and_unpacked(tmp_path, opened, packed):
    raw = tmp_path / "FashionMNIST" / "raw"
    pixels, labels = write_fashion(raw, packed)
    splits = opened("fashion_mnist")
    np.testing.assert_array_equal(all_rows(splits.train)["image"], pixels[:40])
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], pixels[40:])
    np.testing.assert_array_equal(splits.train.labels, labels[:40])
    assert list(splits.train.schema.class_names) == torchvision.datasets.FashionMNIST.classes
    assert default_augment("fashion_mnist") == {"crop": 2, "flip": True}
    files = sorted(raw.glob("t10k-*"))
    assert splits.validation.fingerprint == digest("fashion_mnist", *map(file_digest, files))
    if not packed:
        dataset = torchvision.datasets.FashionMNIST(str(tmp_path), train=False)
        np.testing.assert_array_equal(dataset.data.numpy()[..., None], pixels[40:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3", lambda data: gzip.compress(data)[:-20], "ended before|end-of-stream"),
        ("train-images-idx3", lambda data: gzip.compress(data[:-1]), "invalid for input of size 31359"),
        ("t10k-labels-idx1", lambda data: b"no gzip at all", "[Nn]ot a gzipped file"),
        ("t10k-labels-idx1", lambda data: gzip.compress(data[:4] + idx(np.zeros(9))[4:]), "it holds 9 labels for 10"),
        ("t10k-labels-idx1", lambda data: gzip.compress(data[:-1] + b"\x0b"), "it holds the label 11, outside 0..9"),
        ("t10k-labels-idx1", lambda data: gzip.compress(idx(np.zeros((10, 2)))), "should have 1 dimension"),
        ("t10k-images-idx3", lambda data: gzip.compress(idx(np.zeros((10, 9, 8)))), "images have 8×9 pixels"),
        ("t10k-images-idx3", lambda data: gzip.compress(b"text"), "AssertionError"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, opened, name, damage, message):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion(raw, packed=True)
    file = raw / f"{name}-ubyte.gz"
    file.write_bytes(damage(gzip.decompress(file.read_bytes())))
    pattern = rf"{name}-ubyte\.gz is damaged or of another form \(.*({message}).*\): remove it and set data\.download"
    with pytest.raises(ValueError, match=pattern) as caught:
        opened("fashion_mnist")
    assert "\n" not in str(caught.value)


@pytest.fixture
def mirror(tmp_path):
    """Serve a folder over HTTP; yields its address."""
    (tmp_path / "mirror").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_missing_files_are_downloaded_only_if_requested(tmp_path, opened, monkeypatch, mirror):
    """torchvision checks the MD5 of each download."""
    pixels, _ = write_fashion(tmp_path / "mirror", packed=True)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is missing: set data\.download=true"):
        opened("fashion_mnist")
    dataset = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(dataset, "mirrors", [mirror])
    with pytest.raises(ValueError, match=r"FashionMNIST can't be downloaded to .*: check the network") as caught:
        opened("fashion_mnist", download=True)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(dataset, "resources", [(file.name, md5(file)) for file in (tmp_path / "mirror").iterdir()])
    np.testing.assert_array_equal(all_rows(opened("fashion_mnist", download=True).train)["image"], pixels[:40])
