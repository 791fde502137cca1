"""CIFAR-10, CIFAR-100 and Fashion-MNIST in torchvision's folders, read with torchvision.

CIFAR (Krizhevsky, 2009) is stored as pickles. Only files with the published MD5 are opened, so that no other pickle can
run code. Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747) is stored as IDX files.

Reading imports torchvision, and with it torch; parts in the decoded cache are opened without it.

Shapes: N samples, H height, W width, C channels.
"""

from __future__ import annotations

import abc
import gzip
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rayprune.errors import DataError, one_line
from rayprune.sources.base import SampleSource, Schema, Splits
from rayprune.sources.cache import cache_root, cached_arrays
from rayprune.sources.fingerprint import digest, file_digest
from rayprune.sources.memory import RowSource
from rayprune.sources.registry import register_source

_REPLACE = "remove it and set data.download=true"
_MAX_GZIP_RATIO = 1032  # of what deflate can reach


@dataclass(frozen=True)
class PublishedImages(abc.ABC):
    """The keys of a published dataset; its test part validates.

    Attributes:
        path: torchvision's root folder.
        download: fetch missing files.
        cache_dir: folder of the cache; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
    """

    path: str
    download: bool = False
    cache_dir: str | None = None

    name: ClassVar[str]
    dataset: ClassVar[str]  # torchvision's class
    folder: ClassVar[str]  # of the files, below the root
    train_files: ClassVar[tuple[str, ...]]
    test_files: ClassVar[tuple[str, ...]]
    shared_files: ClassVar[tuple[str, ...]] = ()
    endings: ClassVar[tuple[str, ...]] = ("",)  # of stored files, after their names
    shape: ClassVar[tuple[int, int, int]]

    def open(self) -> Splits:
        """Open both parts; with `download`, fetch missing files first.

        Raises:
            DataError: a file is missing, damaged, or can't be downloaded.
        """
        names = (*self.train_files, *self.test_files, *self.shared_files)
        if self.download and not all(map(self._stored_file, names)):
            self._download()
        for name in names:
            if self._stored_file(name) is None:
                cure = "remove the other files and try again" if self.download else "set data.download=true"
                raise DataError(f"{self._folder / name} is missing: {cure}, or correct data.path")
        return Splits(self._open_part(self.train_files), self._open_part(self.test_files))

    @property
    def _root(self) -> Path:
        return Path(self.path).expanduser().absolute()

    @property
    def _folder(self) -> Path:
        return self._root / self.folder

    def _stored_file(self, name: str) -> Path | None:
        paths = (self._folder / f"{name}{ending}" for ending in self.endings)
        return next((path for path in paths if path.is_file()), None)

    def _download(self) -> None:
        import torchvision.datasets

        try:
            getattr(torchvision.datasets, self.dataset)(self._root, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise DataError(
                f"{self.dataset} can't be downloaded to {self._root} ({one_line(error)}): check the network, or copy "
                "the files there"
            ) from None

    def _open_part(self, names: tuple[str, ...]) -> SampleSource:
        files = [file for file in map(self._stored_file, names) if file is not None]
        fingerprint = digest(self.name, *map(file_digest, files))
        key, num_bytes = f"torchvision-{fingerprint}", sum(map(_stored_bytes, files))
        open_arrays = partial(cached_arrays, key, cache_root(self.cache_dir), partial(self._build, files), num_bytes)
        arrays = open_arrays()
        class_names = arrays["class_names"].tolist()
        schema = Schema.for_classification("image", self.shape, len(class_names), class_names)
        return RowSource(open_arrays, schema, fingerprint, np.asarray(arrays["label"]))

    def _build(self, files: list[Path], folder: Path) -> None:
        """Write the cache entry of a part: image (N, H, W, C) uint8, label (N,) int64 and class_names."""
        images, labels, class_names = self._read(files)
        np.save(folder / "image.npy", images)
        np.save(folder / "label.npy", labels.astype(np.int64))
        np.save(folder / "class_names.npy", np.array(class_names))

    @abc.abstractmethod
    def _read(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return a part's images, labels and class names.

        Raises:
            DataError: a file is damaged, or is not one of the dataset.
        """


@register_source("cifar10")
class Cifar10(PublishedImages):
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels in 10 classes."""

    name, dataset, folder = "cifar10", "CIFAR10", "cifar-10-batches-py"
    train_files: ClassVar[tuple[str, ...]] = tuple(f"data_batch_{number}" for number in range(1, 6))
    test_files = ("test_batch",)
    shared_files = ("batches.meta",)
    shape = (32, 32, 3)
    default_augment: ClassVar[dict[str, Any]] = {"crop": 4, "flip": True}

    def _read(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        import torchvision.datasets
        from torchvision.datasets.utils import check_integrity

        dataset = getattr(torchvision.datasets, self.dataset)
        published = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        for name, checksum in published:
            if not check_integrity(self._folder / name, checksum):
                raise DataError(
                    f"{self._folder / name} is damaged or changed, its MD5 is not the published one: {_REPLACE}; read "
                    "changed copies with data.source=torch_dataset or arrays"
                )
        part = dataset(self._root, train=files[0].name in self.train_files)
        return part.data, np.array(part.targets), part.classes


@register_source("cifar100")
class Cifar100(Cifar10):
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 pixels in 100 fine classes."""

    name, dataset, folder = "cifar100", "CIFAR100", "cifar-100-python"
    train_files, test_files, shared_files = ("train",), ("test",), ("meta",)


@register_source("fashion_mnist")
class FashionMnist(PublishedImages):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28×28 gray pixels in 10 classes."""

    name, dataset, folder = "fashion_mnist", "FashionMNIST", "FashionMNIST/raw"
    train_files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test_files = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    endings = ("", ".gz")
    shape = (28, 28, 1)
    default_augment: ClassVar[dict[str, Any]] = {"crop": 2, "flip": True}

    def _read(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        from torchvision.datasets import FashionMNIST
        from torchvision.datasets.mnist import read_image_file, read_label_file

        images, labels = _read_idx(files[0], read_image_file), _read_idx(files[1], read_label_file)
        num_classes = len(FashionMNIST.classes)
        if images.shape[1:] != self.shape[:2]:
            raise _bad_idx(files[0], f"its images have {images.shape[2]}×{images.shape[1]} pixels, not 28×28")
        if len(labels) != len(images):
            raise _bad_idx(files[1], f"it holds {len(labels)} labels for {len(images)} images")
        if labels.max(initial=0) >= num_classes:
            raise _bad_idx(files[1], f"it holds the label {labels.max()}, outside 0..{num_classes - 1}")
        return images[..., None], labels, FashionMNIST.classes


def _read_idx(file: Path, read: Callable[[str], Any]) -> np.ndarray:
    try:
        if file.suffix != ".gz":
            return np.asarray(read(str(file)))
        with gzip.open(file) as packed, tempfile.NamedTemporaryFile() as unpacked:
            shutil.copyfileobj(packed, unpacked)
            unpacked.flush()
            return np.asarray(read(unpacked.name))
    except Exception as error:  # torchvision checks a file by asserting, indexing and reshaping
        raise _bad_idx(file, one_line(error)) from None


def _stored_bytes(file: Path) -> int:
    """Return the decompressed size of a file."""
    size = file.stat().st_size
    if file.suffix != ".gz":
        return size
    with file.open("rb") as packed:
        packed.seek(max(0, size - 4))  # a gzip file ends with the decompressed size, unless it is damaged
        return min(int.from_bytes(packed.read(4), "little"), _MAX_GZIP_RATIO * size)


def _bad_idx(file: Path, reason: str) -> DataError:
    return DataError(f"{file} is damaged or of another form ({reason}): {_REPLACE}")
