"""Images and their files' bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def noise(count: int, size: tuple[int, int] = (6, 5), channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return random images of a width and height, (N, H, W, C) uint8, or (N, H, W) with one channel."""
    shape = (count, size[1], size[0], *([channels] if channels > 1 else []))
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def smooth(seed: int = 0, size: tuple[int, int] = (6, 5), channels: int = 3) -> np.ndarray:
    """Return an image that JPEG hardly changes, (H, W, C) uint8, or (H, W) with one channel."""
    coarse = noise(1, (3, 3), channels, seed)[0]
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: object) -> bytes:
    """Return an image file's bytes; a Pillow mode converts the image first."""
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()
