"""Batched augmentation on the device, keyed by (seed, epoch, sample id).

Every draw is a hash of its key and no generator exists: a sample looks the same in an epoch whatever the batch it came
in, the order, the number of workers or the device, and a resumed run has no state to restore. The hash is SplitMix64
(Steele, Lea, Flood, OOPSLA 2014); one 64-bit word a sample gives the flip (bit 63) and the two offsets of the crop
(31 bits each). Drawing is arithmetic on a few hundred integers: the host does it in some microseconds, where a GPU
would be given thirty kernels.

The augmentation is the usual one of small images (He et al., arXiv 1512.03385, section 4.2), with the flip before the
zero padding and crop: the distribution is the same, and the crop is then one gather of whole rows. The padding is 0 in
pixels, so black, and not the mean as where one normalises first.

Shapes: B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rayprune.errors import ConfigError

MASK64 = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Derive the seed of one optimisation step on one worker.

    Returns:
        a seed in [0, 2**63), fit for torch.manual_seed.

    >>> step_seed(0, 1, 2, 3) == step_seed(0, 1, 2, 3) != step_seed(0, 1, 3, 2)
    True
    """
    return hash_key(seed, epoch, step, rank) >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that a step on this device draws from, as torch.manual_seed does.

    torch.manual_seed itself, on a machine where CUDA is not in use, keeps the call for later with the text of its
    stack, for three kinds of device: a third of a millisecond, at every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def hash_key(*parts: int) -> int:
    """Hash integers, in order, into one in [0, 2**64)."""
    state = 0
    for part in parts:
        word = (state + GOLDEN_GAMMA + part) & MASK64
        word = ((word ^ (word >> 30)) * MULTIPLIER_1) & MASK64
        word = ((word ^ (word >> 27)) * MULTIPLIER_2) & MASK64
        state = word ^ (word >> 31)
    return state


def hash_ids(ids_B: NDArray[np.int64], key: int) -> NDArray[np.uint64]:
    """Hash ids under a key: the id-th word of the SplitMix64 stream that starts at the key.

    Args:
        ids_B: (B,) int64.
        key: in [0, 2**64).

    Returns:
        (B,) uint64.
    """
    word_B = (ids_B.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_GAMMA) + np.uint64(key)
    word_B = (word_B ^ (word_B >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    word_B = (word_B ^ (word_B >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return word_B ^ (word_B >> np.uint64(31))


@dataclass(frozen=True)
class Augment:
    """Crop, flip and normalise batches of images; standardise batches of features.

    Args:
        crop: pixels of zero padding on each side before a random crop back to the size; 0 for none.
        flip: mirror a random half of the images.
        mean: per channel, of pixels scaled to [0, 1] (of the raw values for features), or one for all; empty for 0.
        std: likewise, above 0; empty for 1.

    Raises:
        ConfigError: a value is outside its range.
    """

    crop: int = 0
    flip: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise ConfigError(f"crop must be an integer of at least 0, got {self.crop!r}")
        if not all(math.isfinite(value) for value in self.mean):
            raise ConfigError(f"mean must be finite, got {self.mean}")
        if not all(value > 0.0 and math.isfinite(value) for value in self.std):
            raise ConfigError(f"std must be above 0, got {self.std}")

    def draws(
        self, ids_B: NDArray[np.int64], shape: tuple[int, ...], *, seed: int, epoch: int
    ) -> NDArray[np.int64] | None:
        """Draw on the host what `train` does to each sample.

        Args:
            ids_B: (B,) int64 sample ids.
            shape: of a network's input: (C, H, W), or (F,) for features.
            seed: of the run.
            epoch: from 0.

        Returns:
            (B,) int64: where each sample's first row of pixels lies among its two sides; None where nothing is drawn.

        Raises:
            ConfigError: ids of another dtype or shape.
        """
        if ids_B.dtype != np.int64 or ids_B.ndim != 1:
            raise ConfigError(f"ids must be int64, one a sample, got {ids_B.dtype} {ids_B.shape}")
        if len(shape) != 3 or not (self.crop or self.flip):
            return None
        words_B = hash_ids(ids_B, hash_key(seed, epoch))
        rows, width = (size + 2 * self.crop for size in shape[1:])
        starts_B = _offsets(words_B, self.crop) * width + _offsets(words_B >> np.uint64(31), self.crop)
        return starts_B + (words_B >> np.uint64(63)).astype(np.int64) * (rows * width) if self.flip else starts_B

    @torch.no_grad()
    def train(self, images_BHWC: Tensor, draws_B: Tensor | None) -> Tensor:
        """Augment and normalise a training batch.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype, which are only standardised.
            draws_B: what `draws` gave for their ids and shape, on the images' device.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32, on the images' device.

        Raises:
            ConfigError: a wrong shape or dtype, a mean or std of another length, or draws of other samples.
        """
        if draws_B is not None:
            _check_images(images_BHWC)
            if draws_B.shape != images_BHWC.shape[:1]:
                raise ConfigError(f"there are draws for {len(draws_B)} samples, and {len(images_BHWC)} samples")
            images_BHWC = self._flip_and_crop(images_BHWC, draws_B)
        return self.evaluate(images_BHWC)

    @torch.no_grad()
    def evaluate(self, images_BHWC: Tensor) -> Tensor:
        """Normalise a batch, as `train` does after its draws.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32.

        Raises:
            ConfigError: a wrong shape or dtype, or a mean or std of another length.
        """
        _check_lengths(self, images_BHWC.shape[-1])
        if images_BHWC.ndim == 2:
            scale, shift = _affine(self.mean, self.std, 1.0, images_BHWC.shape[1], 1, images_BHWC.device)
            return images_BHWC.to(torch.float32, copy=True).mul_(scale).add_(shift)
        _check_images(images_BHWC)
        batch, height, width, channels = images_BHWC.shape
        # Constants repeated along the row: the inner loop then runs over W·C values and not over C.
        scale, shift = _affine(self.mean, self.std, 255.0, channels, width, images_BHWC.device)
        rows = images_BHWC.reshape(batch, height, width * channels).float().mul_(scale).add_(shift)
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _flip_and_crop(self, images_BHWC: Tensor, draws_B: Tensor) -> Tensor:
        batch, height, width, channels = images_BHWC.shape
        sides = images_BHWC[:, None]
        if self.flip:
            mirrored = images_BHWC.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
            sides = torch.stack((images_BHWC, mirrored), dim=1)
        if self.crop:
            sides = functional.pad(sides, (0, 0, self.crop, self.crop, self.crop, self.crop))
        sides = sides.contiguous()
        # Every run of W pixels is a row of this overlapping view, so that a crop is H rows copied whole.
        runs = sides.as_strided((sides.numel() // channels - width + 1, width * channels), (channels, 1))
        firsts_BH = _firsts(batch, height, sides.numel() // (batch * channels), sides.shape[3], draws_B.device)
        rows_BH = firsts_BH + draws_B[:, None]
        return runs.index_select(0, rows_BH.view(-1)).view(batch, height, width, channels)


def _offsets(words_B: NDArray[np.uint64], crop: int) -> NDArray[np.int64]:
    """Map the low 31 bits to 0..2·crop, uniformly."""
    return ((words_B & np.uint64(0x7FFFFFFF)).astype(np.int64) * (2 * crop + 1)) >> 31


@lru_cache(maxsize=16)
def _firsts(batch: int, height: int, sample: int, width: int, device: torch.device) -> Tensor:
    """Return (B, H) int64: where row h of sample b's first side begins, in pixels, with its padding."""
    with torch.inference_mode(False):
        samples_B = torch.arange(batch, device=device) * sample
        return samples_B[:, None] + torch.arange(height, device=device) * width


@lru_cache(maxsize=64)
def _affine(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: float,
    channels: int,
    repeats: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Turn (x/scale − mean)/std into x·a + b: a and b, (repeats·channels,) float32."""
    # A tensor made under inference_mode stays one, and is cached here for every later caller.
    with torch.inference_mode(False):
        means = torch.tensor(mean or (0.0,), dtype=torch.float64).expand(channels)
        stds = torch.tensor(std or (1.0,), dtype=torch.float64).expand(channels)
        factor, term = 1.0 / (scale * stds), -means / stds
        return factor.repeat(repeats).to(device, torch.float32), term.repeat(repeats).to(device, torch.float32)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ConfigError(
            f"images must be uint8 (batch, height, width, channels), got {images.dtype} {tuple(images.shape)}"
        )


def _check_lengths(augment: Augment, channels: int) -> None:
    for name, values in (("mean", augment.mean), ("std", augment.std)):
        if len(values) not in (0, 1, channels):
            raise ConfigError(f"{name} must have 1 or {channels} values for {channels} channels, got {len(values)}")
