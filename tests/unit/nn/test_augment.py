"""Augmentation is a pure function of (seed, epoch, id), equal to a naive transcription, and uniform.

Shapes: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import CenterCrop, RandomResizedCrop

from rayprune.nn.augment import Augment, hash_ids, hash_key, seed_generators, step_seed

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_images(batch: int, height: int = 12, width: int = 10, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8, generator=generator)


def augment_batch(augment: Augment, images: Tensor, ids: npt.ArrayLike, seed: int, epoch: int) -> Tensor:
    """Draw and augment like a worker."""
    shape = (images.shape[-1], *images.shape[1:-1])
    draws = augment.draws(np.asarray(ids), shape, seed=seed, epoch=epoch)
    return augment.train(images, None if draws is None else torch.from_numpy(draws).to(images.device))


def naive_splitmix64(state: int) -> int:
    """Transcribe the published generator: advance the state, then mix it, modulo 2**64."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def naive_word(sample: int, seed: int, epoch: int) -> int:
    key = naive_splitmix64((naive_splitmix64(seed % 2**64) + epoch) % 2**64)
    return naive_splitmix64((key + sample * 0x9E3779B97F4A7C15) % 2**64)


def naive_augment(image: npt.NDArray[np.uint8], word: int, crop: int, flip: bool) -> npt.NDArray[np.float64]:
    """Flip, pad, crop and normalize one (H, W, C) image."""
    height, width, _ = image.shape
    if flip and word >> 63:
        image = image[:, ::-1]
    padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)))
    top = (word % 2**31) * (2 * crop + 1) // 2**31
    left = (word // 2**31 % 2**31) * (2 * crop + 1) // 2**31
    pixels = padded[top : top + height, left : left + width].astype(np.float64)
    return np.asarray(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))


def test_the_hash_is_splitmix64() -> None:
    first = 0xE220A8397B1DCDAF  # the published first output of SplitMix64 from state 0
    assert hash_key(0) == naive_splitmix64(0) == first
    ids = [0, 1, 2, 12345, 2**31, 2**62 + 17, 2**63 - 1]
    for key in (0, 1, 2**63, 2**64 - 1, hash_key(3, 4)):
        assert hash_ids(np.array(ids), key).tolist() == [
            naive_splitmix64((key + sample * 0x9E3779B97F4A7C15) % 2**64) for sample in ids
        ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("crop", "flip"), [(0, False), (4, False), (0, True), (4, True), (1, True)])
def test_train_equals_a_naive_transcription(crop: int, flip: bool, device: str) -> None:
    images, ids_B = make_images(24), torch.arange(24) * 977 + 3
    augment = Augment(crop=crop, flip=flip, mean=MEAN, std=STD)
    batch = augment_batch(augment, images.to(device), ids_B, seed=5, epoch=2)
    assert batch.dtype == torch.float32
    assert batch.shape == (24, 3, 12, 10)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for image, sample, result in zip(images.numpy(), ids_B.tolist(), batch.cpu().numpy(), strict=True):
        expected = naive_augment(image, naive_word(sample, 5, 2), crop, flip)
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_sample_does_not_depend_on_its_batch(channels: int) -> None:
    images, ids_B = make_images(40, channels=channels), torch.arange(100, 140)
    augment = Augment(crop=2, flip=True, mean=(0.5,), std=(0.25,))
    whole = augment_batch(augment, images, ids_B, seed=0, epoch=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(augment_batch(augment, images[order], ids_B[order], seed=0, epoch=3), whole[order])
    halves = [augment_batch(augment, images[part], ids_B[part], seed=0, epoch=3) for part in (slice(13), slice(13, 40))]
    assert torch.equal(torch.cat(halves), whole)


def test_draws_differ_between_epochs_and_seeds() -> None:
    images, ids_B = make_images(64), torch.arange(64)
    augment = Augment(crop=4, flip=True)
    runs = [augment_batch(augment, images, ids_B, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        same = sum(torch.equal(a, b) for a, b in zip(runs[first], runs[second], strict=True))
        assert same <= 6  # one draw in 162 is alike by chance


def test_draws_are_uniform_and_independent() -> None:
    num_samples, crop = 40_000, 4
    # An image whose channels are its coordinates shows its own draw.
    size = 2 * crop + 1
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack((rows + 1, columns + 1), dim=2).to(torch.uint8)
    images = image.expand(num_samples, size, size, 2)
    batch = augment_batch(Augment(crop=crop, flip=True), images, np.arange(num_samples), seed=9, epoch=0)
    center, middle_row = batch[:, :, crop, crop], batch[..., crop, :]
    row, column = (center * 255).round().long().sub(1).unbind(1)
    flipped = ((middle_row[:, 1] * 255).round().diff(dim=1) == -1).any(dim=1)
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.01)
    cells = (flipped * size + row) * size + column
    counts = torch.bincount(cells, minlength=2 * size * size).double()
    expected = num_samples / (2 * size * size)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 161 - 5 * 18 < chi_square < 161 + 5 * 18  # 161 degrees of freedom, deviation sqrt(2·161) = 18


def naive_box(sample: int, seed: int, epoch: int, sides: tuple[int, int], scale: tuple[float, float]) -> list[int]:
    """Draw the top, left, height and width of one image's random-resized crop, as torchvision does."""
    height, width = sides
    position = naive_word(sample, seed, epoch)
    for attempt in range(10):
        key = 0
        for part in (seed, epoch, attempt):
            key = naive_splitmix64((key + part) % 2**64)
        word = naive_splitmix64((key + sample * 0x9E3779B97F4A7C15) % 2**64)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * (word % 2**31 / 2**31))
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * (word // 2**31 % 2**31 / 2**31))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = position % 2**31 * (height - rows + 1) // 2**31
            left = position // 2**31 % 2**31 * (width - columns + 1) // 2**31
            return [top, left, rows, columns]
    rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return [(height - rows) // 2, (width - columns) // 2, rows, columns]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sides", "scale", "flip"),
    [
        ((12, 10), (0.08, 1.0), True),
        ((16, 16), (0.08, 1.0), False),
        ((9, 40), (0.9, 1.0), True),  # nine tenths of so wide an image never fit
    ],
)
def test_a_resized_crop_equals_a_naive_transcription(
    sides: tuple[int, int], scale: tuple[float, float], flip: bool, device: str
) -> None:
    images, ids = make_images(40, *sides), np.arange(40) * 977 + 3
    augment = Augment(resized_crop=7, scale=scale, flip=flip, mean=MEAN, std=STD)
    batch = augment_batch(augment, images.to(device), ids, seed=5, epoch=2)
    assert batch.dtype == torch.float32
    assert batch.shape == (40, *augment.output_shape((3, *sides))) == (40, 3, 7, 7)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for image, sample, result in zip(images, ids.tolist(), batch.cpu(), strict=True):
        top, left, rows, columns = naive_box(sample, 5, 2, sides, scale)
        part = image[top : top + rows, left : left + columns].permute(2, 0, 1).double()
        if flip and naive_word(sample, 5, 2) >> 63:
            part = part.flip(2)
        resized = functional.interpolate(part[None], size=(7, 7), mode="bilinear", align_corners=False)[0]
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        torch.testing.assert_close(result.double(), (resized / 255 - mean) / std, rtol=0, atol=1e-4)


def test_the_parts_have_the_sizes_of_torchvisions() -> None:
    draws = Augment(resized_crop=224).draws(np.arange(4000), (3, 256, 256), seed=1, epoch=0)
    assert draws is not None
    torch.manual_seed(0)
    image = torch.empty(3, 256, 256)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    for column, (ours_N, theirs_N) in enumerate(zip(draws.T, theirs.T, strict=True)):
        error = math.hypot(ours_N.std(), theirs_N.std()) / math.sqrt(4000)
        assert abs(ours_N.mean() - theirs_N.mean()) < 4 * error, column
        assert ours_N.std() == pytest.approx(theirs_N.std(), rel=0.06)
    assert np.corrcoef(draws[:, 2], draws[:, 3])[0, 1] == pytest.approx(
        np.corrcoef(theirs[:, 2], theirs[:, 3])[0, 1], abs=0.03
    )


def test_a_resized_crop_does_not_depend_on_the_batch() -> None:
    images, ids_B = make_images(40, 20, 16), torch.arange(100, 140)
    augment = Augment(resized_crop=12, flip=True, mean=(0.5,), std=(0.25,))
    whole = augment_batch(augment, images, ids_B, seed=0, epoch=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(augment_batch(augment, images[order], ids_B[order], seed=0, epoch=3), whole[order])
    halves = [augment_batch(augment, images[part], ids_B[part], seed=0, epoch=3) for part in (slice(13), slice(13, 40))]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(augment_batch(augment, images, ids_B, seed=0, epoch=4), whole)


@pytest.mark.parametrize("side", [7, 8])
def test_evaluation_takes_the_central_square(side: int) -> None:
    images = make_images(3, 12, 10)
    batch = Augment(resized_crop=side, mean=MEAN, std=STD).evaluate(images)
    expected = Augment(mean=MEAN, std=STD).evaluate(CenterCrop(side)(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.equal(batch, expected)


def test_a_resized_crop_needs_images_that_are_large_enough() -> None:
    augment = Augment(resized_crop=224)
    assert augment.output_shape((3, 256, 300)) == (3, 224, 224)
    assert Augment(crop=4).output_shape((3, 32, 32)) == (3, 32, 32)
    with pytest.raises(ValueError, match=r"more than the side of images of 300×200: set data\.image_size=256"):
        augment.output_shape((3, 300, 200))
    with pytest.raises(ValueError, match="resized_crop = 224 is for images, and the data has features"):
        augment.output_shape((10,))


def test_evaluation_only_normalizes() -> None:
    images = make_images(3)
    batch = Augment(crop=4, flip=True, mean=MEAN, std=STD).evaluate(images)
    expected = (images.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(batch.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=2e-6)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    plain = Augment().evaluate(images[:, ::2])  # not contiguous
    torch.testing.assert_close(plain, images[:, ::2].permute(0, 3, 1, 2) / 255)


def test_features_are_standardized_and_the_input_does_not_change() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    augment = Augment(crop=4, flip=True, mean=(1.0, 2.0), std=(2.0, 4.0))
    batch = augment_batch(augment, features, np.arange(2), seed=0, epoch=0)
    assert batch.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert features.tolist() == [[1.0, 2.0], [3.0, 6.0]]
    assert torch.equal(augment.evaluate(features.double()), batch)


def test_constants_cached_in_inference_mode_work_in_training() -> None:
    augment, images = Augment(mean=(0.123,), std=(0.456,)), make_images(2)
    with torch.inference_mode():
        augment.evaluate(images)
    weights = torch.ones(1, requires_grad=True)
    (augment.evaluate(images) * weights).sum().backward()
    assert weights.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": -1}, "crop must be an integer of at least 0, got -1"),
        ({"crop": 1.5}, "crop must be"),
        ({"resized_crop": -1}, "resized_crop must be an integer of at least 0, got -1"),
        ({"resized_crop": 8, "crop": 1}, "crop 1 and resized_crop 8 exclude each other"),
        ({"scale": (0.0, 1.0)}, r"scale must ascend in \(0, 1\], got \[0.0, 1.0\]"),
        ({"scale": (0.5, 0.4)}, "scale must ascend"),
        ({"std": (0.0,)}, r"std must be above 0, got \(0.0,\)"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**options)  # type: ignore[arg-type]


def test_wrong_batches_are_refused() -> None:
    images, flip = make_images(2), Augment(flip=True)
    with pytest.raises(ValueError, match="ids must be int64, one per sample, got float32"):
        augment_batch(flip, images, np.arange(2, dtype=np.float32), seed=0, epoch=0)
    with pytest.raises(ValueError, match="draws for 3 samples do not fit a batch of 2"):
        augment_batch(flip, images, np.arange(3), seed=0, epoch=0)
    with pytest.raises(ValueError, match="images must be uint8"):
        augment_batch(flip, images.float(), np.arange(2), seed=0, epoch=0)
    with pytest.raises(ValueError, match="mean must have 1 or 3 values for 3 channels, got 2"):
        Augment(mean=(0.1, 0.2)).evaluate(images)


def test_step_seeds_are_distinct_stable_and_fit_torch() -> None:
    seeds = {step_seed(s, e, t, r) for s in range(4) for e in range(4) for t in range(20) for r in range(4)}
    assert len(seeds) == 4 * 4 * 20 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    state = 0
    for part in (7, 1, 2, 3):
        state = naive_splitmix64((state + part) % 2**64)
    assert step_seed(7, 1, 2, 3) == state >> 1


def test_generators_are_seeded_as_torch_seeds_them() -> None:
    torch.manual_seed(2**63 - 5)
    expected = torch.rand(4), torch.randperm(9)
    torch.rand(3)
    seed_generators(2**63 - 5, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected[0])
    assert torch.equal(torch.randperm(9), expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_generator_is_seeded_too() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4, device="cuda")
    seed_generators(11, torch.device("cuda"))
    assert torch.equal(torch.rand(4, device="cuda"), expected)
