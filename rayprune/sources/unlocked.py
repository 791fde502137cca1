"""JPEG and PNG decoding through torchvision, which lets go of Python's lock, so that threads use all cores.

Pillow decodes with the lock held. It is still asked wherever the two could differ (palettes, transparency, CMYK, colour
turned to grey, other than 8 bits), wherever it is faster (far larger JPEGs, which its decoder scales by halves for
free), and for files that torchvision refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from rayprune.sources.images import square

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: 0xC0 to 0xCF without the Huffman tables, the reserved one and the arithmetic conditioning.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STUFFING = 0xFF
_PNG_COMPONENTS = {0: 1, 2: 3}  # by colour type; the others have a palette or transparency
_GREY, _RGB = 1, 3  # torchvision's ImageReadMode

Frame = tuple[int, int, int]


def decode_unlocked(encoded: bytes, num_channels: int, size: int | None = None) -> np.ndarray | None:
    """Decode a plain JPEG or PNG to what `images.decode_image` returns.

    PNGs agree bit for bit, JPEGs up to rounding between versions of libjpeg-turbo.

    Args:
        encoded: a file's bytes.
        num_channels: 1 or 3.
        size: S pixels; None keeps the image's own size.

    Returns:
        (H, W, C) uint8, (S, S, C) with a size; None for what is left to Pillow.
    """
    is_jpeg = encoded.startswith(JPEG)
    frame = jpeg_frame(encoded) if is_jpeg else png_frame(encoded)
    if frame is None:
        return None
    width, height, components = frame
    halved = is_jpeg and size is not None and min(width, height) >= 2 * size
    if components not in {1, num_channels} or halved:
        return None
    pixels = _decode(encoded, "decode_jpeg" if is_jpeg else "decode_png", _GREY if num_channels == 1 else _RGB)
    if pixels is None or size is None or (width, height) == (size, size):
        return pixels
    scaled = np.asarray(square(Image.fromarray(pixels[:, :, 0] if num_channels == 1 else pixels), size))
    return scaled[:, :, None] if num_channels == 1 else scaled


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


def png_frame(encoded: bytes) -> Frame | None:
    """Return width, height and number of components of a plain PNG of 8 bits; None for anything else.

    >>> png_frame(PNG + bytes.fromhex("0000000d 49484452 00000020 00000010 08 02 00 00 00"))
    (32, 16, 3)
    """
    if not encoded.startswith(PNG) or encoded[12:16] != b"IHDR" or len(encoded) < 29 or encoded[24] != 8:
        return None
    components = _PNG_COMPONENTS.get(encoded[25])
    width, height = int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    return None if components is None else (width, height, components)


def _decode(encoded: bytes, name: str, mode: int) -> np.ndarray | None:
    decode = _decoder(name)
    return None if decode is None else decode(encoded, mode)


@cache
def _decoder(name: str) -> Callable[[bytes, int], np.ndarray | None] | None:
    """Return a decoder of torchvision's; None where torchvision was built without it."""
    import torch

    try:
        import torchvision.io  # noqa: F401  # registers the operators

        operator: Any = getattr(torch.ops.image, name).default
    except (ImportError, AttributeError, RuntimeError):
        return None

    def decode(encoded: bytes, mode: int) -> np.ndarray | None:
        try:
            pixels = operator(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode)
        except RuntimeError:  # damaged: Pillow says what is wrong, or reads it all the same
            return None
        return np.asarray(pixels.permute(1, 2, 0).numpy())

    return decode
