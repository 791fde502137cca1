"""Descriptors of images: a flip changes nothing, small changes little, other images much."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from rayprune.nn.descriptors import embedder, image_descriptor, placeholder

RADIUS = 0.2


def scenes(count: int = 40, size: int = 32, channels: int = 3) -> Tensor:
    """Return smooth random images with the falling spectrum of photographs, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, channels, size, size)
    for side in (2, 4, 8, 16):
        coarse = torch.randn(count, channels, side, side, generator=generator) / side
        images += functional.interpolate(coarse, (size, size), mode="bicubic")
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return 0.1 + 0.75 * (images - low) / (high - low)


def apart(one: Tensor, other: Tensor) -> Tensor:
    return (image_descriptor(one) - image_descriptor(other)).norm(dim=1)


def jpeg(images: Tensor, quality: int) -> Tensor:
    found = []
    for image in (images.permute(0, 2, 3, 1) * 255).round().byte().numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(stream)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 32), (3, 8), (1, 28), (3, 96), (4, 33)])
def test_descriptors_have_length_one_and_do_not_see_a_flip(channels: int, size: int) -> None:
    images = scenes(8, size, channels)
    descriptors = image_descriptor(images)
    assert descriptors.ndim == 2
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(8))
    assert apart(images, images.flip(3)).max() < 1e-4


def test_small_changes_stay_within_the_radius_and_other_images_do_not() -> None:
    images = scenes()
    noise = 0.012 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    changes = {
        "brightness": images * 1.1,
        "darkness": images * 0.9,
        "contrast": 0.5 + 1.1 * (images - 0.5),
        "noise": images + noise,
        "jpeg": jpeg(images, 60),
        "resized": functional.interpolate(images, (64, 64), mode="bilinear", antialias=True),
    }
    for name, changed in changes.items():
        assert apart(images, changed).max() < RADIUS, name
    descriptors = image_descriptor(images)
    others = torch.cdist(descriptors, descriptors) + 9 * torch.eye(len(images))
    assert others.min() > RADIUS


def test_a_shift_moves_less_than_another_image() -> None:
    images = scenes(size=36)
    shifted = apart(images[:, :, 2:34, 2:34], images[:, :, 2:34, 3:35])
    assert shifted.median() < RADIUS
    assert apart(images[:, :, 2:34, 2:34], images[:, :, 1:33, 1:33].roll(1, 0)).min() > 2 * shifted.median()


def test_rounding_errors_of_one_color_are_not_seen() -> None:
    for value in (0.0, 0.1, 0.5, 1.0):
        assert not image_descriptor(torch.full((2, 3, 32, 32), value)).any()
    colored = torch.tensor([0.9, 0.2, 0.4])[None, :, None, None].expand(1, 3, 40, 40)
    assert apart(colored, colored + 1e-7 * torch.randn(1, 3, 40, 40)).item() < 1e-3


def test_mirrored_content_is_told_from_moved_content() -> None:
    """A bright left half and its flip are the same; a bright upper half is another image."""
    left, upper = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    left[..., :16], upper[..., :16, :] = 1.0, 1.0
    assert apart(left, left.flip(3)).item() < 1e-4
    assert apart(left, upper).item() > 0.5


def test_the_embedder_leaves_features_as_they_are() -> None:
    features = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(embedder()(features), features)
    images = scenes(3)
    assert torch.equal(embedder()(images), image_descriptor(images))


@pytest.mark.parametrize("shape", [(3, 8, 9), (5,)])
def test_the_placeholder_takes_any_input(shape: tuple[int, ...]) -> None:
    assert placeholder(4, shape)(torch.zeros(2, *shape)).shape == (2, 4)
