"""JPEG decoding through torchvision, which lets go of Python's lock, so that threads use all cores.

Pillow decodes with the lock held. It is still asked wherever the two could differ (CMYK, colour turned to grey, other
than 8 bits), wherever it is faster (far larger JPEGs, which its decoder scales by halves for free), for files that
torchvision refuses, and for all PNGs: torchvision's PNG decoder ends the process on damaged ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from rayprune.sources.images import square
from rayprune.sources.threads import in_threads, num_cpus

# What a thread decodes under one release of the lock.
ROWS_PER_TASK = 32
JPEG = b"\xff\xd8"
# Start-of-frame markers: 0xC0 to 0xCF without the Huffman tables, the reserved one and the arithmetic conditioning.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STUFFING = 0xFF
_GREY, _RGB = 1, 3  # torchvision's ImageReadMode

Frame = tuple[int, int, int]


def decode_unlocked(encoded: bytes, num_channels: int, size: int | None = None) -> np.ndarray | None:
    """Decode a plain JPEG to what `images.decode_image` returns, up to rounding between versions of libjpeg-turbo.

    Args:
        encoded: a file's bytes.
        num_channels: 1 or 3.
        size: S pixels; None keeps the image's own size.

    Returns:
        (H, W, C) uint8, (S, S, C) with a size; None for what is left to Pillow.
    """
    return decode_all([encoded], num_channels, size)[0]


def decode_all(encoded: Sequence[bytes], num_channels: int, size: int | None = None) -> list[np.ndarray | None]:
    """Decode as `decode_unlocked` does, all of them under one release of Python's lock.

    Taking the lock back after each small image costs about as long as decoding it, once several threads want it.
    """
    found: list[np.ndarray | None] = [None] * len(encoded)
    mode = _GREY if num_channels == 1 else _RGB
    rows = [row for row, content in enumerate(encoded) if _is_plain(content, num_channels, size)]
    for row, pixels in zip(rows, _decode([encoded[row] for row in rows], mode), strict=True):
        found[row] = pixels if pixels is None or size is None else _scaled(pixels, size)
    return found


def decode_in_threads(
    encoded: Sequence[bytes | None], num_channels: int, size: int | None = None
) -> list[np.ndarray | None]:
    """Decode as `decode_all` does, on all CPUs of the process; None also for what is missing."""
    found: list[np.ndarray | None] = [None] * len(encoded)
    rows = [row for row, content in enumerate(encoded) if content is not None and content.startswith(JPEG)]
    parts = [rows[start : start + ROWS_PER_TASK] for start in range(0, len(rows), ROWS_PER_TASK)]

    def decode(part: list[int]) -> list[np.ndarray | None]:
        return decode_all([encoded[row] or b"" for row in part], num_channels, size)

    for part, decoded in zip(parts, in_threads(decode, parts, num_cpus()), strict=True):
        for row, pixels in zip(part, decoded, strict=True):
            found[row] = pixels
    return found


def _is_plain(encoded: bytes, num_channels: int, size: int | None) -> bool:
    """Return whether torchvision decodes an image; the others are left to Pillow."""
    frame = jpeg_frame(encoded)
    if frame is None:
        return False
    width, height, components = frame
    return components in {1, num_channels} and (size is None or min(width, height) < 2 * size)


def _scaled(pixels: np.ndarray, size: int) -> np.ndarray:
    if pixels.shape[:2] == (size, size):
        return pixels
    grey = pixels.shape[2] == 1
    scaled = np.asarray(square(Image.fromarray(pixels[:, :, 0] if grey else pixels), size))
    return scaled[:, :, None] if grey else scaled


def jpeg_frame(encoded: bytes) -> Frame | None:
    """Return width, height and number of components of a JPEG of 8 bits; None for anything else.

    >>> jpeg_frame(bytes.fromhex("ffd8 ffdb 0003 00 ffc0 000b 08 0010 0020 01 01 11 00"))
    (32, 16, 1)
    """
    if not encoded.startswith(JPEG):
        return None
    position, end = 2, len(encoded) - 9
    while position < end and encoded[position] == _STUFFING:
        marker = encoded[position + 1]
        if marker == _STUFFING:
            position += 1
            continue
        if marker in _FRAMES:
            height = int.from_bytes(encoded[position + 5 : position + 7], "big")
            width = int.from_bytes(encoded[position + 7 : position + 9], "big")
            return (width, height, encoded[position + 9]) if encoded[position + 4] == 8 else None
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def _decode(encoded: Sequence[bytes], mode: int) -> list[np.ndarray | None]:
    if not encoded or (loop := _loop()) is None:  # without a JPEG torch is not even imported
        return [None] * len(encoded)
    import torch

    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in encoded]
    try:
        return [np.asarray(pixels.permute(1, 2, 0).numpy()) for pixels in loop(tensors, mode)]
    except RuntimeError:  # one is damaged: Pillow says what is wrong, or reads it all the same
        if len(encoded) == 1:
            return [None]
        return [pixels for content in encoded for pixels in _decode([content], mode)]


@cache
def _loop() -> Any:
    """Return torchvision's decoder for a list of JPEGs; None where torchvision was built without it."""
    import torch

    def jpegs(encoded: list[torch.Tensor], mode: int) -> list[torch.Tensor]:
        decoded: list[torch.Tensor] = []
        for content in encoded:
            decoded.append(torch.ops.image.decode_jpeg(content, mode, False))
        return decoded

    try:
        import torchvision.io  # noqa: F401  # registers the operators

        _ = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None
    try:
        with warnings.catch_warnings():
            # Deprecated in torch, and without a successor that runs a loop outside of Python's lock.
            warnings.simplefilter("ignore")
            return torch.jit.script(jpegs)
    except Exception:  # a torch that has lost TorchScript: slower by threads, the same pixels
        return jpegs
