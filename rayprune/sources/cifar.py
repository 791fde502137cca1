"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) as published: pickled batches, in torchvision's folders.

The pickles are read by an unpickler that knows arrays and plain values only, so that no code in them can run.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.registry import register_source
from rayprune.sources.torchvision_files import find_files, open_files, warn_of_changes

SHAPE = (32, 32, 3)
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
        build = partial(build_rows, layout, len(class_names))
        num_bytes = sum(file.stat().st_size for file in files)
        return open_files(name, files, build, num_bytes, SHAPE, class_names, cache_dir)

    return Splits(open_part(train), open_part([test]))


def build_rows(layout: _Layout, num_classes: int, files: list[Path], folder: Path) -> None:
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
    return ValueError(f"{file} is damaged or no CIFAR file ({reason}): remove it and set data.download=true")
