"""Decoding: torchvision's JPEGs against Pillow's, in threads; images that only Pillow may decode."""

from __future__ import annotations

import numpy as np
import pytest

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
