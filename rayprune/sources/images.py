"""Encoded images to uint8 arrays, with Pillow.

A data set has one mode, that of its first image: RGB when it is in colour (palette and transparent images count as
colour), grey otherwise. The rest is converted to it; transparency is dropped. Deeper than 8 bits is refused, because
squeezing it into a byte would lose what the user stored.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

GREY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = ("I", "F")


class UnreadableImage(ValueError):
    """Bytes that are no image, or a damaged one."""


def decode_image(encoded: bytes | None, num_channels: int | None = None) -> np.ndarray:
    """Decode one image of any format that Pillow reads.

    Args:
        encoded: the file's bytes; None counts as unreadable.
        num_channels: 1 or 3; None takes the image's own mode.

    Returns:
        (H, W, C) uint8.

    Raises:
        UnreadableImage: the bytes are missing, no image or damaged.
        ValueError: the image has more than 8 bits a channel.
    """
    if not encoded:
        raise UnreadableImage("its bytes are missing or damaged")
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except Exception as error:  # on damaged bytes Pillow's format plugins raise whatever their parsing runs into
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(reason) from None
    if image.mode.startswith(DEEP_MODES):
        raise ValueError(f"image mode {image.mode} has more than 8 bits a channel: convert the images to 8 bits")
    mode = "L" if num_channels == 1 or (num_channels is None and image.mode in GREY_MODES) else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[:, :, None] if mode == "L" else pixels
