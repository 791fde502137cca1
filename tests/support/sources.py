"""Small sources for the tests, and what they deliver."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rayprune.sources import SampleSource, Schema
from rayprune.sources.fingerprint import digest
from rayprune.sources.memory import RowSource


def make_source(labels: Any, features: np.ndarray | None = None, num_classes: int | None = None) -> RowSource:
    """Return feature vectors in memory, by default (N, 1) with each sample's id."""
    labels = np.asarray(labels, dtype=np.int64)
    features = np.arange(len(labels), dtype=np.float32)[:, None] if features is None else features
    schema = Schema.for_classification("features", features.shape[1:], num_classes or int(labels.max(initial=0)) + 1)
    return RowSource(partial(_make_arrays, labels, features), schema, digest(labels, features), labels)


def _make_arrays(labels: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    return {"features": features, "label": labels}


def all_rows(source: SampleSource) -> dict[str, np.ndarray]:
    """Return all rows of a source, in order."""
    return source.take(np.arange(len(source)))


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random uint8 values."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def pixels(count: int, size: tuple[int, int] = (6, 5), channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return random images of a width and height, (N, H, W, C) uint8, or (N, H, W) with one channel."""
    images = random_bytes(count, size[1], size[0], channels, seed=seed)
    return images if channels > 1 else images[..., 0]


def smooth_pixels(seed: int = 0, size: tuple[int, int] = (6, 5), channels: int = 3) -> np.ndarray:
    """Return an image that JPEG hardly changes, (H, W, C) uint8, or (H, W) with one channel."""
    coarse = pixels(1, (3, 3), channels, seed)[0]
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def encode_image(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """Return an image file's bytes, converted to a Pillow mode first where one is given."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def claim_rows(file: Path, actual: int, claimed: int) -> None:
    """Replace the number of rows in a Parquet file's footer."""

    def varint(number: int) -> bytes:
        number, groups = 2 * number, []  # zigzag
        while number >= 128:
            groups.append(number & 127 | 128)
            number >>= 7
        return bytes([*groups, number])

    content = file.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - size : -8].replace(varint(actual), varint(claimed))
    file.write_bytes(content[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def flip_byte(file: Path, pattern: bytes) -> None:
    """Change the last byte of a pattern in a file."""
    content = bytearray(file.read_bytes())
    content[content.index(pattern) + len(pattern) - 1] ^= 1
    file.write_bytes(content)
