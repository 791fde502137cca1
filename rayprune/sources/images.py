"""Encoded images to uint8 arrays, with Pillow.

A data set has one mode, that of its first image: RGB when it is in colour (palette and transparent images count as
colour), grey otherwise. The rest is converted to it; transparency is dropped. Deeper than 8 bits is refused, because
squeezing it into a byte would lose what the user stored. With a size given, the shorter side is scaled to it and the
middle square cut out, as is usual for evaluation on ImageNet.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

GREY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = ("I", "F")
PNG, PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # its first bytes, and the place of its bits a channel


class UnreadableImage(ValueError):
    """Bytes that are no image, or a damaged one."""


def decode_image(encoded: bytes | None, num_channels: int | None = None, size: int | None = None) -> np.ndarray:
    """Decode one image of any format that Pillow reads.

    Args:
        encoded: the file's bytes; None counts as unreadable.
        num_channels: 1 or 3; None takes the image's own mode.
        size: S pixels; None keeps the image's own size.

    Returns:
        (H, W, C) uint8; (S, S, C) with a size.

    Raises:
        UnreadableImage: the bytes are missing, no image or damaged.
        ValueError: the image has more than 8 bits a channel.
    """
    if not encoded:
        raise UnreadableImage("its bytes are missing or damaged")
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        if size is not None:
            image.draft(None, (size, size))  # a JPEG decoder scales by halves for free; never below the size
        image.load()
    except Exception as error:  # on damaged bytes Pillow's format plugins raise whatever their parsing runs into
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(reason) from None
    # Pillow squeezes a PNG of 16 bits in colour, or with transparency, into 8 by itself, and its mode does not tell.
    deep_png = encoded.startswith(PNG) and encoded[PNG_DEPTH] == 16
    if deep_png or image.mode.startswith(DEEP_MODES):
        kind = f"{image.mode};16" if deep_png and ";" not in image.mode else image.mode
        raise ValueError(f"image mode {kind} has more than 8 bits a channel: convert the images to 8 bits")
    mode = "L" if num_channels == 1 or (num_channels is None and image.mode in GREY_MODES) else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    pixels = np.asarray(image if size is None else square(image, size))
    return pixels[:, :, None] if mode == "L" else pixels


def square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` pixels and cut out the middle square."""
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # One call cuts and scales: the pixels that are cut off are never resampled.
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
