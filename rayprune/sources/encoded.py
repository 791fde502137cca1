"""Encoded images to the rows of one column, decoded at every visit.

Shapes: N samples, B batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rayprune.sources.images import UnreadableImage, decode_image
from rayprune.sources.unlocked import decode_in_threads


@dataclass(frozen=True)
class ImageShape:
    """What every row of an image column is brought to.

    Attributes:
        shape: (H, W, C).
        size: pixels that both sides are scaled to; None where all images have the shape's size already.
    """

    shape: tuple[int, ...]
    size: int | None

    def decode(self, encoded: bytes | None, pixels: np.ndarray | None = None) -> np.ndarray:
        """Return one image's pixels, of this shape.

        Args:
            encoded: the image.
            pixels: what it has been decoded to, where it has.

        Raises:
            UnreadableImage: its bytes are missing, no image or damaged.
            ValueError: it has another size, or more than 8 bits a channel.
        """
        if pixels is None:
            pixels = decode_image(encoded, self.shape[2], self.size)
        if pixels.shape != self.shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], self.shape[:2]
            raise ValueError(
                f"is an image of {width}×{height} pixels and the first one has {first_width}×{first_height}: "
                "set data.image_size, or resize them all to one size before storing them"
            )
        return pixels


def check_size(image_size: int | None) -> None:
    """Refuse a size that no image can have.

    Raises:
        ValueError: it is below 1.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"data.image_size is {image_size}: give pixels, at least 1, or leave it out")


def first_shape(
    images: Iterable[bytes | None],
    named: Callable[[int], str],
    num_channels: int | None = None,
    size: int | None = None,
    skip_errors: bool = False,
) -> ImageShape:
    """Return the shape of the first image that can be read.

    Args:
        images: encoded, in the order of the rows; no more are read than needed.
        named: says which row it is, for messages.
        num_channels: 1 or 3; None takes the image's own mode.
        size: see ImageShape.
        skip_errors: pass over images that can't be read.

    Raises:
        ValueError: the first one is unreadable and skip_errors is off, none is readable, or it is deeper than 8 bits.
    """
    for row, encoded in enumerate(images):
        try:
            return ImageShape(decode_image(encoded, num_channels, size).shape, size)
        except UnreadableImage as error:
            if not skip_errors:
                raise _unreadable(named(row), error) from None
        except ValueError as error:
            raise ValueError(f"{named(row)}: {error}") from None
    raise ValueError("none of the samples has a readable image: correct data.path, or the column of the images")


def decode_rows(encoded: Sequence[bytes | None], images: ImageShape, named: Callable[[int], str]) -> np.ndarray:
    """Decode a batch.

    Args:
        encoded: B images.
        images: what they are brought to.
        named: says which sample a position of the batch is, for messages.

    Returns:
        (B, H, W, C) uint8.

    Raises:
        ValueError: an image can't be read, or is of another shape.
    """
    rows = np.empty((len(encoded), *images.shape), np.uint8)
    decoded = decode_in_threads(encoded, images.shape[2], images.size)
    for position, (content, pixels) in enumerate(zip(encoded, decoded, strict=True)):
        try:
            rows[position] = images.decode(content, pixels)
        except UnreadableImage as error:
            raise _unreadable(named(position), error) from None
        except ValueError as error:
            raise ValueError(f"{named(position)} {error}") from None
    return rows


def is_readable(encoded: bytes | None, images: ImageShape, named: str) -> bool:
    """Return whether an image can be decoded.

    Raises:
        ValueError: it is readable, and of another shape; `named` says which it is.
    """
    try:
        images.decode(encoded)
    except UnreadableImage:
        return False
    except ValueError as error:
        raise ValueError(f"{named} {error}") from None
    return True


def _unreadable(named: str, error: UnreadableImage) -> ValueError:
    return ValueError(f"{named} is no readable image ({error}): correct it, or leave it out")
