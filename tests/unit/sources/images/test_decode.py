"""Decoding: torchvision's JPEGs against Pillow's, in threads; images that only Pillow may decode."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import psutil
import pytest
from PIL import Image

from rayprune.errors import UnreadableImage
from rayprune.sources.images import decode
from rayprune.sources.images.decode import (
    ImageShape,
    decode_image,
    decode_jpegs,
    decode_rows,
    jpeg_frame,
    readable_rows,
)
from tests.support.sources import encode_image, smooth_pixels

PNG_WITHOUT_HEADER = b"\x89PNG\r\n\x1a\n" + bytes(40)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("size", [None, 16, 33])
def test_jpeg_decoder_agrees_with_pillow(options, size):
    for channels in (1, 3):
        data = encode_image(smooth_pixels(7, (61, 47), channels), "JPEG", **({} if channels == 1 else options))
        decoded, expected = decode_jpegs([data], channels, size)[0], decode_image(data, channels, size)
        if size == 16:
            assert decoded is None  # Pillow's decoder scales by halves
            continue
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).max() <= 2


def test_threads_decode_every_row_to_its_own_place():
    jpegs = [encode_image(smooth_pixels(seed, (24, 24)), "JPEG") for seed in range(150)]
    mixed = [*jpegs[:70], None, b"", encode_image(smooth_pixels(1, (24, 24))), jpegs[70][:200], *jpegs[70:]]
    shape = ImageShape((24, 24, 3), None)
    assert np.flatnonzero(~readable_rows(mixed, shape, str)).tolist() == [70, 71, 73]
    rows = decode_rows(jpegs, shape, str)
    for row, jpeg in zip(rows, jpegs, strict=True):
        assert np.abs(row.astype(int) - decode_image(jpeg, 3)).max() <= 2
    with pytest.raises(ValueError, match="row 70 is not a readable image"):
        decode_rows(mixed, shape, lambda position: f"row {position}")


def test_pillow_decodes_what_torchvision_must_not():
    whole = encode_image(smooth_pixels(7, (61, 47)), "JPEG")
    cmyk = encode_image(smooth_pixels(7, (61, 47)), "JPEG", "CMYK")
    assert jpeg_frame(whole) == (61, 47, 3)
    assert jpeg_frame(cmyk) == (61, 47, 4)
    for data, channels in ((cmyk, 3), (whole, 1), (whole[:300], 3), (whole[:5], 3), (b"", 3)):
        assert decode_jpegs([data], channels) == [None]
    for data in (
        encode_image(smooth_pixels()),
        encode_image(smooth_pixels(), mode="L"),
        PNG_WITHOUT_HEADER,
    ):  # torchvision may end the process
        assert decode_jpegs([data], 3) == [None]


def claiming(encoded: bytes, width: int, height: int) -> bytes:
    """Return an image of 24×24 pixels with another size in its header."""
    formats = {b"\xff\xd8": (">HH", 0), b"\x89P": (">II", 16), b"GI": ("<HH", 6), b"RI": ("<HH", 26)}
    form, place = formats[encoded[:2]]
    sizes = (height, width) if place == 0 else (width, height)
    if place == 0:
        place = encoded.index(struct.pack(form, 24, 24))
    if encoded.startswith(b"\x89P"):  # a PNG's header has a checksum
        header = b"IHDR" + struct.pack(form, *sizes) + encoded[24:29]
        return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    return encoded[:place] + struct.pack(form, *sizes) + encoded[place + struct.calcsize(form) :]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("size", [None, 32])
def test_a_header_of_too_many_pixels_is_refused_before_decoding(form, size):
    side = 16_000 if form == "WEBP" else 65_500  # the format has 14 bits
    small = encode_image(smooth_pixels(1, (24, 24)), form)
    image = claiming(small, side, side)
    shape = ImageShape((24, 24, 3) if size is None else (size, size, 3), size)
    before = psutil.Process().memory_info().rss
    with pytest.raises(UnreadableImage, match=r"row 1 claims .*pixels and data\.max_pixels is 178,956,970.*: correct"):
        decode_rows([small, image], shape, lambda row: f"row {row}")
    assert readable_rows([small, image], shape, str).tolist() == [True, False]
    assert psutil.Process().memory_info().rss < before + 100e6
    limited = replace(shape, max_pixels=24 * 24 - 1)
    with pytest.raises(UnreadableImage, match=r"row 0 claims 24×24 pixels and data\.max_pixels is 575"):
        decode_rows([small], limited, lambda row: f"row {row}")
    assert decode_rows([small], replace(shape, max_pixels=24 * 24), str).shape == (1, *shape.shape)


def test_an_image_above_pillows_limit_is_read_if_max_pixels_allows_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(decode, "MAX_PIXELS", 200)
    with pytest.raises(UnreadableImage, match=r"claims more pixels and data\.max_pixels is 200"):
        decode_image(encode_image(smooth_pixels(1, (24, 24))), max_pixels=200)
    assert decode_image(encode_image(smooth_pixels(1, (24, 24))), max_pixels=24 * 24).shape == (24, 24, 3)


def test_no_image_starts_another_program():
    file = io.BytesIO()
    Image.fromarray(smooth_pixels(1, (24, 24))).save(file, "EPS")
    with pytest.raises(UnreadableImage, match="no known image format"):
        decode_image(file.getvalue())
