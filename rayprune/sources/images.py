"""Encoded images to uint8 arrays, with Pillow.

A data set has one mode, that of its first image: RGB when it is in colour (palette and transparent images count as
colour), grey otherwise. The rest is converted to it; transparency is dropped. Deeper than 8 bits is refused, because
squeezing it into a byte would lose what the user stored. With a size given, the shorter side is scaled to it and the
middle square cut out, as is usual for evaluation on ImageNet.

Encoded images to the rows of one column, decoded at every visit.

Shapes: N samples, B batch, H height, W width, C channels.

JPEG decoding through torchvision, which lets go of Python's lock, so that threads use all cores.

Pillow decodes with the lock held. It is still asked wherever the two could differ (CMYK, colour turned to grey, other
than 8 bits), wherever it is faster (far larger JPEGs, which its decoder scales by halves for free), for files that
torchvision refuses, and for all PNGs: torchvision's PNG decoder ends the process on damaged ones.

Work on many rows in a few threads of this process.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from rayprune.errors import DataError, UnreadableImage

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> list[Result]:
    """Call a function for every item in a few threads; results come in the items' order, the first error is raised."""
    items = list(items)
    if min(count, len(items)) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(count, len(items)), thread_name_prefix="rayprune-decode") as pool:
        return list(pool.map(function, items))


GREY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = ("I", "F")
PNG, PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # its first bytes, and the place of its bits a channel


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
        DataError: the image has more than 8 bits a channel.
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
        raise DataError(f"image mode {kind} has more than 8 bits a channel: convert the images to 8 bits")
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
            DataError: it has another size, or more than 8 bits a channel.
        """
        if pixels is None:
            pixels = decode_image(encoded, self.shape[2], self.size)
        if pixels.shape != self.shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], self.shape[:2]
            raise DataError(
                f"is an image of {width}×{height} pixels and the first one has {first_width}×{first_height}: "
                "set data.image_size, or resize them all to one size before storing them"
            )
        return pixels


def check_size(image_size: int | None) -> None:
    """Refuse a size that no image can have.

    Raises:
        DataError: it is below 1.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"data.image_size is {image_size}: give pixels, at least 1, or leave it out")


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
        DataError: the first one is unreadable and skip_errors is off, none is readable, or it is deeper than 8 bits.
    """
    for row, encoded in enumerate(images):
        try:
            return ImageShape(decode_image(encoded, num_channels, size).shape, size)
        except UnreadableImage as error:
            if not skip_errors:
                raise _unreadable(named(row), error) from None
        except ValueError as error:
            raise DataError(f"{named(row)}: {error}") from None
    raise DataError("none of the samples has a readable image: correct data.path, or the column of the images")


def decode_rows(encoded: Sequence[bytes | None], images: ImageShape, named: Callable[[int], str]) -> np.ndarray:
    """Decode a batch.

    Args:
        encoded: B images.
        images: what they are brought to.
        named: says which sample a position of the batch is, for messages.

    Returns:
        (B, H, W, C) uint8.

    Raises:
        DataError: an image can't be read, or is of another shape.
    """
    rows = np.empty((len(encoded), *images.shape), np.uint8)
    decoded = decode_in_threads(encoded, images.shape[2], images.size)
    for position, (content, pixels) in enumerate(zip(encoded, decoded, strict=True)):
        try:
            rows[position] = images.decode(content, pixels)
        except UnreadableImage as error:
            raise _unreadable(named(position), error) from None
        except ValueError as error:
            raise DataError(f"{named(position)} {error}") from None
    return rows


def is_readable(encoded: bytes | None, images: ImageShape, named: str) -> bool:
    """Return whether an image can be decoded.

    Raises:
        DataError: it is readable, and of another shape; `named` says which it is.
    """
    try:
        images.decode(encoded)
    except UnreadableImage:
        return False
    except ValueError as error:
        raise DataError(f"{named} {error}") from None
    return True


def _unreadable(named: str, error: UnreadableImage) -> ValueError:
    return DataError(f"{named} is no readable image ({error}): correct it, or leave it out")
