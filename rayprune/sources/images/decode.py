"""Decode images to uint8 arrays.

A dataset has one mode, that of its first image: RGB if it is in color (palette and transparent images count as color),
otherwise gray. Other images are converted to it; transparency is dropped. Images of more than 8 bits per channel are
refused, because conversion to bytes would lose information. With a size, the shorter side is scaled to it and the
middle square cut out, as is usual for evaluation on ImageNet.

torchvision decodes without Python's lock, so threads use all cores; Pillow holds the lock. torchvision decodes plain
JPEGs. Pillow decodes images for which the two could differ (CMYK, color turned to gray, other than 8 bits), much larger
JPEGs (which it scales by halves for free), files that torchvision refuses, and all PNGs, because torchvision's PNG
decoder crashes the process on damaged ones.

An image of more than `max_pixels` is refused by its header: a few bytes can claim 65,535 × 65,535 pixels, 13 GB. The
default is the size above which Pillow refuses an image by default, 13,377 pixels square.

Shapes: B batch, H height, W width, C channels, S pixels per side.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rayprune.core.validation import AtMost
from rayprune.errors import ConfigError, DataError, UnreadableImage, one_line
from rayprune.sources.storage import in_threads

# The cure for bad data, in messages of sources with this key.
LEAVE_OUT = "leave it out with data.on_error=skip"
# The number of images that a thread decodes under one release of the lock.
ROWS_PER_TASK = 32
MAX_PIXELS = 178_956_970  # of Pillow: 1 GiB is the memory of two of them in color
MaxPixels = Annotated[int, AtMost(2**32)]  # of data.max_pixels; the formats end there
# Pillow starts Ghostscript for these.
_PROGRAMS = {"EPS"}
GREY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = ("I", "F")
_JPEG = b"\xff\xd8"
_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # its first bytes, and the position of its bits per channel
# Start-of-frame markers: 0xC0 to 0xCF without the Huffman tables, the reserved one and the arithmetic conditioning.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STUFFING = 0xFF
_GREY, _RGB = 1, 3  # torchvision's ImageReadMode


@dataclass(frozen=True)
class ImageShape:
    """The shape of every row of an image column.

    Attributes:
        shape: (H, W, C).
        size: S, to which images are scaled and cut; None if all images have the same size already.
        max_pixels: refuse larger images.
        cure: for an unreadable image, in messages.
        option: the user's name of `size`, in messages.
    """

    shape: tuple[int, ...]
    size: int | None
    cure: str = "correct it, or leave it out"
    option: str = "data.image_size"
    max_pixels: int = MAX_PIXELS


def first_shape(
    images: Iterable[bytes | None],
    name: Callable[[int], str],
    num_channels: int | None = None,
    size: int | None = None,
    *,
    on_error: str | None = None,
    owner: str = "the dataset",
    max_pixels: int = MAX_PIXELS,
) -> ImageShape:
    """Return the shape of the first image that can be read.

    Args:
        images: encoded, in the order of the rows; read until one can be decoded.
        name: maps a row to its name in messages.
        num_channels: 1 or 3; None takes the image's own mode.
        size: see ImageShape.
        on_error: data.on_error; "skip" skips unreadable images; None for sources without the key.
        owner: of the images, for messages.
        max_pixels: see ImageShape.

    Raises:
        DataError: the first image can't be read (and on_error is not "skip") or has more than 8 bits per channel, or
            none can be read.
    """
    cure = ImageShape.cure if on_error is None else f"correct it, or {LEAVE_OUT}"
    for row, encoded in enumerate(images):
        try:
            shape = decode_image(encoded, num_channels, size, max_pixels).shape
            return ImageShape(shape, size, cure, max_pixels=max_pixels)
        except UnreadableImage as error:
            if on_error != "skip":
                raise DataError(f"{name(row)} {error}: {cure}") from None
        except DataError as error:
            raise DataError(f"{name(row)} {error}") from None
    raise DataError(f"{owner} holds no readable image: correct the images, or the path or column they are read from")


def decode_rows(
    encoded: Sequence[bytes | None],
    images: ImageShape,
    name: Callable[[int], str],
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Decode a batch.

    Args:
        encoded: B images.
        images: the shape of every row.
        name: maps a position in the batch to the sample's name in messages.
        rows: (B, H, W, C) uint8 to write to; default: a new array.

    Returns:
        (B, H, W, C) uint8.

    Raises:
        DataError: an image can't be read, or is of another shape.
    """
    rows = np.empty((len(encoded), *images.shape), np.uint8) if rows is None else rows
    decoded = _decode_in_threads(encoded, images)
    for position, pixels in enumerate(decode_each(encoded, images, name, decoded)):
        if isinstance(pixels, UnreadableImage):
            raise pixels
        rows[position] = pixels
    return rows


def decode_ragged(encoded: Sequence[bytes | None], images: ImageShape, name: Callable[[int], str]) -> list[np.ndarray]:
    """Decode a batch of images of several sizes, each (H, W, C) uint8; arguments and errors as in `decode_rows`."""
    rows = []
    for position, pixels in enumerate(_decode_in_threads(encoded, images)):
        try:
            row = _decode(encoded[position], images) if pixels is None else pixels
        except UnreadableImage as error:
            raise UnreadableImage(f"{name(position)} {error}: {images.cure}") from None
        except DataError as error:
            raise DataError(f"{name(position)} {error}") from None
        rows.append(row)
    return rows


def image_sizes(encoded: Iterable[bytes | None]) -> set[tuple[int, int]]:
    """Return the different (width, height) of images, from their headers; unreadable images are left out."""
    sizes = set()
    for content in encoded:
        with contextlib.suppress(Exception):  # Pillow's format plugins raise errors of any type; decoding names them
            sizes.add(Image.open(io.BytesIO(content or b"")).size)
    return sizes


def readable_rows(encoded: Sequence[bytes | None], images: ImageShape, name: Callable[[int], str]) -> np.ndarray:
    """Decode a batch, and return which images can be read, (B,) bool; arguments and errors as in `decode_rows`."""
    decoded = decode_each(encoded, images, name, _decode_in_threads(encoded, images))
    return np.array([not isinstance(pixels, UnreadableImage) for pixels in decoded], dtype=bool)


def decode_each(
    encoded: Sequence[bytes | None],
    images: ImageShape,
    name: Callable[[int], str],
    decoded: Iterable[np.ndarray | None] | None = None,
) -> Iterator[np.ndarray | UnreadableImage]:
    """Yield the pixels of each image, (H, W, C) uint8, or the error of one that can't be read.

    Args:
        encoded, images, name: as in `decode_rows`.
        decoded: the pixels of images that are already decoded, None for the others.

    Raises:
        DataError: an image has another size, or more than 8 bits per channel.
    """
    for position, (content, pixels) in enumerate(zip(encoded, decoded or [None] * len(encoded), strict=True)):
        try:
            pixels = _decode(content, images) if pixels is None else pixels
            if pixels.shape != images.shape:
                (height, width), (first_height, first_width) = pixels.shape[:2], images.shape[:2]
                raise DataError(
                    f"is an image of {width}×{height} pixels and the first one has {first_width}×{first_height}: "
                    f"set {images.option}={min(first_width, first_height)}, or resize all images to one size"
                )
            yield pixels
        except UnreadableImage as error:
            yield UnreadableImage(f"{name(position)} {error}: {images.cure}")
        except DataError as error:
            raise DataError(f"{name(position)} {error}") from None


def _decode(encoded: bytes | None, images: ImageShape) -> np.ndarray:
    return decode_image(encoded, images.shape[2], images.size, images.max_pixels)


def decode_image(
    encoded: bytes | None, num_channels: int | None = None, size: int | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode one image of any format that Pillow reads.

    Args:
        encoded: the file's bytes; None counts as unreadable.
        num_channels: 1 or 3; None takes the image's own mode.
        size: S; None keeps the image's own size.
        max_pixels: refuse larger images before they are decoded.

    Returns:
        (H, W, C) uint8; (S, S, C) with a size.

    Raises:
        UnreadableImage: the bytes are missing, not an image, damaged, or an image of more pixels.
        DataError: the image has more than 8 bits per channel.
    """
    if not encoded:
        raise UnreadableImage("is not a readable image (its bytes are missing or damaged)")
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # the user knows of such images
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))  # reads the header alone
        if image.format in _PROGRAMS:
            raise UnidentifiedImageError
        if image.width * image.height <= max_pixels:
            if size is not None:
                image.draft(None, (size, size))  # a JPEG decoder scales by halves for free; never below the size
            image.load()
    except Image.DecompressionBombError:
        raise _too_large(jpeg_frame(encoded), max_pixels) from None
    except Exception as error:  # on damaged bytes, Pillow's format plugins raise errors of any type
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise UnreadableImage(f"is not a readable image ({reason})") from None
    if image.width * image.height > max_pixels:
        raise _too_large(image.size, max_pixels)
    # Pillow reduces a PNG of 16 bits in color, or with transparency, to 8 bits, and its mode does not show it.
    deep_png = encoded.startswith(_PNG) and encoded[_PNG_DEPTH] == 16
    if deep_png or image.mode.startswith(DEEP_MODES):
        mode = f"{image.mode};16" if deep_png and ";" not in image.mode else image.mode
        raise DataError(f"has image mode {mode}, more than 8 bits per channel: convert the images to 8 bits")
    mode = "L" if num_channels == 1 or (num_channels is None and image.mode in GREY_MODES) else "RGB"
    return _pixels(image if image.mode == mode else image.convert(mode), size)


def _too_large(size: tuple[int, ...] | None, max_pixels: int) -> UnreadableImage:
    pixels = f"{size[0]}×{size[1]} pixels" if size else "more pixels"
    return UnreadableImage(f"claims {pixels} and data.max_pixels is {max_pixels:,}, which can be raised")


def decode_jpegs(
    encoded: Sequence[bytes], num_channels: int, size: int | None = None, max_pixels: int = MAX_PIXELS
) -> list[np.ndarray | None]:
    """Decode plain JPEGs with torchvision, to the same pixels as `decode_image` but for libjpeg-turbo's rounding.

    Python's lock is released once for all of them: if several threads compete for it, taking it back after each small
    image takes about as long as decoding the image.

    Args:
        encoded: B files of any content.
        num_channels: 1 or 3.
        size: S; None keeps the images' own sizes.
        max_pixels: Pillow reads the headers of larger images, and refuses them.

    Returns:
        For each file (H, W, C) uint8, (S, S, C) with a size; None for those that Pillow has to decode.
    """
    pixels: list[np.ndarray | None] = [None] * len(encoded)
    rows = [row for row, content in enumerate(encoded) if _is_plain(content, num_channels, size, max_pixels)]
    decoded = _decode_unlocked([encoded[row] for row in rows], _GREY if num_channels == 1 else _RGB)
    for row, image in zip(rows, decoded, strict=True):
        if image is None or size is None or image.shape[:2] == (size, size):
            pixels[row] = image
        else:
            pixels[row] = _pixels(Image.fromarray(image[:, :, 0] if num_channels == 1 else image), size)
    return pixels


def jpeg_frame(encoded: bytes) -> tuple[int, int, int] | None:
    """Return width, height and number of components of a JPEG of 8 bits; None for anything else.

    >>> jpeg_frame(bytes.fromhex("ffd8 ffdb 0003 00 ffc0 000b 08 0010 0020 01 01 11 00"))
    (32, 16, 1)
    """
    if not encoded.startswith(_JPEG):
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


def check_size(image_size: int | None, max_pixels: int = MAX_PIXELS) -> None:
    """Check the values of `data.image_size` and `data.max_pixels`.

    Raises:
        ConfigError: one is below 1, or the images would have more pixels than they may.
    """
    if max_pixels < 1:
        raise ConfigError(f"data.max_pixels is {max_pixels}: give a number of pixels, at least 1")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size is {image_size}: give pixels, at least 1, or leave it out")
    if image_size is not None and image_size**2 > max_pixels:
        raise ConfigError(
            f"data.image_size is {image_size:,}, and an image of its square has more than data.max_pixels = "
            f"{max_pixels:,}: set it to {math.isqrt(max_pixels):,} or less"
        )
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size is {image_size}: give pixels, at least 1, or leave it out")


def num_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pixels(image: Image.Image, size: int | None) -> np.ndarray:
    """Return an image's pixels, (H, W, C); with a size, of its middle square, scaled to it."""
    width, height = image.size
    if size is not None and (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # One call cuts and scales, so the pixels that are cut off are never resampled.
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _decode_in_threads(encoded: Sequence[bytes | None], images: ImageShape) -> list[np.ndarray | None]:
    """Decode plain JPEGs on all CPUs of the process; None for the other images."""
    pixels: list[np.ndarray | None] = [None] * len(encoded)
    rows = [row for row, content in enumerate(encoded) if content and content.startswith(_JPEG)]
    parts = [rows[start : start + ROWS_PER_TASK] for start in range(0, len(rows), ROWS_PER_TASK)]

    def decode(part: list[int]) -> list[np.ndarray | None]:
        return decode_jpegs([encoded[row] or b"" for row in part], images.shape[2], images.size, images.max_pixels)

    for part, decoded in zip(parts, in_threads(decode, parts, num_cpus()), strict=True):
        for row, image in zip(part, decoded, strict=True):
            pixels[row] = image
    return pixels


def _is_plain(encoded: bytes, num_channels: int, size: int | None, max_pixels: int) -> bool:
    """Return whether torchvision decodes a file; Pillow decodes the others."""
    frame = jpeg_frame(encoded)
    if frame is None:
        return False
    width, height, components = frame
    if width * height > max_pixels:
        return False
    return components in {1, num_channels} and (size is None or min(width, height) < 2 * size)


def _decode_unlocked(encoded: Sequence[bytes], mode: int) -> list[np.ndarray | None]:
    if not encoded or (decode := _torchvision_decoder()) is None:  # without a JPEG, torch is not imported
        return [None] * len(encoded)
    import torch

    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in encoded]
    try:
        return [np.asarray(pixels.permute(1, 2, 0).numpy()) for pixels in decode(tensors, mode)]
    except RuntimeError:  # one is damaged: Pillow names the damage, or can still read it
        if len(encoded) == 1:
            return [None]
        return [pixels for content in encoded for pixels in _decode_unlocked([content], mode)]


@cache
def _torchvision_decoder() -> Any:
    """Return torchvision's decoder for a list of JPEGs; None if torchvision was built without it."""
    import torch

    def decode(encoded: list[torch.Tensor], mode: int) -> list[torch.Tensor]:
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
            # Deprecated in torch, but nothing else runs a loop outside of Python's lock.
            warnings.simplefilter("ignore")
            return torch.jit.script(decode)
    except Exception:  # a torch without TorchScript: slower in threads, the same pixels
        return decode
