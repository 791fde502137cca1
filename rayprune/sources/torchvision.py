"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) as published: pickled batches, in torchvision's folders.

The pickles are read by an unpickler that knows arrays and plain values only, so that no code in them can run.

Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747): IDX files, in torchvision's folders.

What the data sets in torchvision's folders share: finding their files, downloading them, opening their arrays.

torchvision downloads; reading is our own, because its classes refuse every file whose checksum is not the published
one, and with it copies of such sets with other labels or fewer samples, and unpickle whatever a file holds.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from rayprune.errors import DataError
from rayprune.sources.base import Column, SampleSource, Schema, Splits
from rayprune.sources.cache import cache_root, cached_arrays, new_array
from rayprune.sources.fingerprint import digest, file_digest
from rayprune.sources.memory import RowSource
from rayprune.sources.registry import register_source

logger = logging.getLogger(__name__)


def find_files(root: Path, choices: Sequence[tuple[Path, ...]], dataset: str, download: bool) -> list[Path]:
    """Return the files of a data set, downloading them first where one is missing and that is wanted.

    Args:
        root: torchvision's root.
        choices: for each file, where it may lie.
        dataset: name of torchvision's class.
        download: data.download.

    Raises:
        ValueError: a file is missing, or can't be downloaded.
    """
    if download and any(_first(paths) is None for paths in choices):
        _download(root, dataset)
    found = [_first(paths) for paths in choices]
    for file, paths in zip(found, choices, strict=True):
        if file is None:
            cure = "remove what is there and try again" if download else "set data.download=true, or correct data.path"
            raise DataError(f"{paths[0]} is missing: {cure}")
    return [file for file in found if file is not None]


def _first(paths: tuple[Path, ...]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _download(root: Path, dataset: str) -> None:
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, dataset)(str(root), download=True)
    except (OSError, RuntimeError, EOFError) as error:
        line = " ".join(str(error).split())[:160]
        raise DataError(
            f"{dataset} can't be downloaded to {root} ({line}): check the network, or put the files there"
        ) from None


def warn_of_changes(files: list[Path], checksums: dict[str, str]) -> None:
    """Warn of files that are not the published ones: damaged, or a variant of one's own.

    Args:
        files: those to look at.
        checksums: file name → published MD5.
    """
    changed = [
        file
        for file in files
        if file.name in checksums
        and hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != checksums[file.name]
    ]
    if changed:
        logger.warning(
            "%s differs from the published file (MD5): where that is not meant, remove it and set data.download=true",
            ", ".join(map(str, changed)),
        )


def open_files(
    name: str,
    files: list[Path],
    build: Callable[[list[Path], Path], None],
    num_bytes: int,
    shape: tuple[int, ...],
    class_names: tuple[str, ...],
    cache_dir: str | None,
) -> RowSource:
    """Open one part of a data set, kept as arrays in the decoded cache.

    Args:
        name: of the source.
        files: of this part, in order.
        build: writes image.npy (N, *shape) uint8 and label.npy (N,) int64 into a folder; a module's function.
        num_bytes: about what it writes.
        shape: of one image (H, W, C).
        class_names: one a class.
        cache_dir: see `cache.cache_root`.
    """
    fingerprint = digest(name, *(file_digest(file) for file in files))
    key = f"{name}-{fingerprint}"
    open_arrays = partial(cached_arrays, key, cache_root(cache_dir), partial(build, files), num_bytes)
    columns = {"image": Column(shape, "uint8"), "label": Column((), "int64")}
    schema = Schema(columns, "image", len(class_names), class_names)
    return RowSource(open_arrays, schema, fingerprint, np.asarray(open_arrays()["label"], dtype=np.int64))


CIFAR_SHAPE = (32, 32, 3)
ROW_VALUES = 3072
# What the pickles of NumPy arrays name, by NumPy 1 and 2 and by Python 2 and 3; `encode` makes bytes out of text.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class _Layout:
    """Where one of the two data sets keeps what."""

    dataset: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    names_key: str


_CIFAR10 = _Layout(
    "CIFAR10",
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test_batch",
    "batches.meta",
    "labels",
    "label_names",
)
_CIFAR100 = _Layout("CIFAR100", "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names")


@register_source("cifar10")
@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels in 10 classes; the test part validates.

    Attributes:
        path: torchvision's root, which holds `cifar-10-batches-py`.
        download: fetch the files where they are missing.
        cache_dir: see `cache.cache_root`.
    """

    path: str
    download: bool = False
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 4, "flip": True}

    def open(self) -> Splits:
        """Open both parts; see `_open`."""
        return _open("cifar10", _CIFAR10, self.path, self.download, self.cache_dir)


@register_source("cifar100")
@dataclass(frozen=True)
class Cifar100:
    """CIFAR-100: 50,000 training and 10,000 test images of 32×32 pixels in 100 fine classes; the test part validates.

    Attributes:
        path: torchvision's root, which holds `cifar-100-python`.
        download: fetch the files where they are missing.
        cache_dir: see `cache.cache_root`.
    """

    path: str
    download: bool = False
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 4, "flip": True}

    def open(self) -> Splits:
        """Open both parts; see `_open`."""
        return _open("cifar100", _CIFAR100, self.path, self.download, self.cache_dir)


def _open(name: str, layout: _Layout, path: str, download: bool, cache_dir: str | None) -> Splits:
    """Open a data set.

    Raises:
        ValueError: a file is missing, damaged or of another form.
    """
    root = Path(path).expanduser().absolute()
    folder = root / layout.folder
    choices = [(folder / file,) for file in (*layout.train, layout.test, layout.meta)]
    *train, test, meta = find_files(root, choices, layout.dataset, download)
    class_names = _class_names(meta, layout.names_key)

    def open_part(files: list[Path]) -> SampleSource:
        build = partial(build_cifar_rows, layout, len(class_names))
        num_bytes = sum(file.stat().st_size for file in files)
        return open_files(name, files, build, num_bytes, CIFAR_SHAPE, class_names, cache_dir)

    return Splits(open_part(train), open_part([test]))


def build_cifar_rows(layout: _Layout, num_classes: int, files: list[Path], folder: Path) -> None:
    """Write a cache entry: `image` (N, 32, 32, 3) uint8 and `label` (N,) int64.

    Raises:
        ValueError: a file is damaged or of another form.
    """
    import torchvision.datasets

    published = getattr(torchvision.datasets, layout.dataset)
    warn_of_changes(files, dict((*published.train_list, *published.test_list)))
    parts = [_read_batch(file, layout.label_key, num_classes) for file in files]
    np.save(folder / "image.npy", np.concatenate([images for images, _ in parts]))
    np.save(folder / "label.npy", np.concatenate([labels for _, labels in parts]))


def _read_batch(file: Path, label_key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(file)
    values, labels = batch.get("data"), np.asarray(batch.get(label_key, ()))
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.shape[1:] != (ROW_VALUES,):
        raise _no_batch(file, f"'data' is no uint8 array of shape (N, {ROW_VALUES})")
    if labels.shape != (len(values),) or not (np.issubdtype(labels.dtype, np.integer) or len(labels) == 0):
        raise _no_batch(file, f"{label_key!r} is no list of {len(values)} numbers")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise _no_batch(file, f"{label_key!r} holds {outside[0]}, outside 0..{num_classes - 1}")
    return values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def _class_names(file: Path, key: str) -> tuple[str, ...]:
    names = _unpickle(file).get(key)
    if not isinstance(names, list) or not names:
        raise _no_batch(file, f"{key!r} is no list of class names")
    return tuple(map(_text, names))


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as handle:
            content = _ArrayUnpickler(handle, encoding="latin1").load()
    except Exception as error:  # damaged pickles raise whatever their parsing runs into
        line = " ".join(str(error).split())[:120]
        raise _no_batch(file, line or type(error).__name__) from None
    if not isinstance(content, dict):
        raise _no_batch(file, f"it holds a {type(content).__name__}")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _no_batch(file: Path, reason: str) -> ValueError:
    return DataError(f"{file} is damaged or no CIFAR file ({reason}): remove it and set data.download=true")


FASHION_SHAPE = (28, 28, 1)
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PARTS = {"train": "train", "validation": "t10k"}
_UINT8 = 8  # the type code in the third byte of an IDX file


@register_source("fashion_mnist")
@dataclass(frozen=True)
class FashionMnist:
    """Fashion-MNIST: 60,000 training and 10,000 test images, 28×28 grey pixels, 10 classes; the test part validates.

    Attributes:
        path: torchvision's root, which holds `FashionMNIST/raw` with the IDX files, packed (.gz) or not.
        download: fetch the files where they are missing.
        cache_dir: see `cache.cache_root`.
    """

    path: str
    download: bool = False
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 2, "flip": True}

    def open(self) -> Splits:
        """Open both parts.

        Raises:
            ValueError: a file is missing, damaged or of another form.
        """
        root = Path(self.path).expanduser().absolute()
        raw = root / "FashionMNIST" / "raw"
        names = [f"{part}-{kind}-ubyte" for part in PARTS.values() for kind in ("images-idx3", "labels-idx1")]
        files = find_files(root, [(raw / name, raw / f"{name}.gz") for name in names], "FashionMNIST", self.download)
        return Splits(self._open_part(files[:2]), self._open_part(files[2:]))

    def _open_part(self, files: list[Path]) -> SampleSource:
        with _opened(files[0]) as handle:
            num_bytes = math.prod(_read_header(files[0], handle, 3))
        return open_files(
            "fashion_mnist", files, build_fashion_rows, num_bytes, FASHION_SHAPE, CLASS_NAMES, self.cache_dir
        )


def build_fashion_rows(files: list[Path], folder: Path) -> None:
    """Write a cache entry: `image` (N, 28, 28, 1) uint8 and `label` (N,) int64.

    Raises:
        ValueError: a file is damaged or of another form.
    """
    images, labels = _read_idx(files[0], 3), _read_idx(files[1], 1)
    if images.shape[1:] != FASHION_SHAPE[:2]:
        raise _no_idx(files[0], f"its images have {images.shape[2]}×{images.shape[1]} pixels, not 28×28")
    if len(labels) != len(images):
        raise _no_idx(files[1], f"it holds {len(labels)} labels for {len(images)} images")
    if len(labels) and labels.max() >= len(CLASS_NAMES):
        raise _no_idx(files[1], f"it holds the label {labels.max()}, outside 0..{len(CLASS_NAMES) - 1}")
    target = new_array(folder, "image", "uint8", (len(images), *FASHION_SHAPE))
    target[:] = images[..., None]
    target.flush()
    np.save(folder / "label.npy", labels.astype(np.int64))


def _opened(file: Path) -> gzip.GzipFile:
    # A GzipFile has all that is used of a plain file.
    return gzip.open(file, "rb") if file.suffix == ".gz" else cast(gzip.GzipFile, file.open("rb"))


def _read_header(file: Path, handle: gzip.GzipFile, num_axes: int) -> tuple[int, ...]:
    try:
        header = handle.read(4 + 4 * num_axes)
    except (OSError, EOFError, zlib.error) as error:
        raise _no_idx(file, str(error)) from None
    if header[:4] != bytes([0, 0, _UINT8, num_axes]) or len(header) != 4 + 4 * num_axes:
        raise _no_idx(file, f"it does not start like an IDX file of bytes with {num_axes} axes")
    return tuple(np.frombuffer(header, dtype=">u4", offset=4).tolist())


def _read_idx(file: Path, num_axes: int) -> np.ndarray:
    with _opened(file) as handle:
        shape = _read_header(file, handle, num_axes)
        try:
            content = handle.read()
        except (OSError, EOFError, zlib.error) as error:
            raise _no_idx(file, str(error)) from None
    if len(content) != math.prod(shape):
        raise _no_idx(file, f"it holds {len(content)} of {math.prod(shape)} bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _no_idx(file: Path, reason: str) -> ValueError:
    return DataError(f"{file} is damaged or of another form ({reason}): remove it and set data.download=true")
