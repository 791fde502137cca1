"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747): IDX files, in torchvision's folders."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.cache import new_array
from rayprune.sources.registry import register_source
from rayprune.sources.torchvision_files import find_files, open_files

SHAPE = (28, 28, 1)
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
        return open_files("fashion_mnist", files, build_rows, num_bytes, SHAPE, CLASS_NAMES, self.cache_dir)


def build_rows(files: list[Path], folder: Path) -> None:
    """Write a cache entry: `image` (N, 28, 28, 1) uint8 and `label` (N,) int64.

    Raises:
        ValueError: a file is damaged or of another form.
    """
    images, labels = _read_idx(files[0], 3), _read_idx(files[1], 1)
    if images.shape[1:] != SHAPE[:2]:
        raise _no_idx(files[0], f"its images have {images.shape[2]}×{images.shape[1]} pixels, not 28×28")
    if len(labels) != len(images):
        raise _no_idx(files[1], f"it holds {len(labels)} labels for {len(images)} images")
    if len(labels) and labels.max() >= len(CLASS_NAMES):
        raise _no_idx(files[1], f"it holds the label {labels.max()}, outside 0..{len(CLASS_NAMES) - 1}")
    target = new_array(folder, "image", "uint8", (len(images), *SHAPE))
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
    return ValueError(f"{file} is damaged or of another form ({reason}): remove it and set data.download=true")
