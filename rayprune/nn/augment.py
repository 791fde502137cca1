"""Batched augmentation on the device, keyed by (seed, epoch, sample id).

Every random draw is a hash of its key, and no generator exists: a sample looks the same in an epoch whatever its batch,
the order, the number of workers or the device, and a resumed run has no state to restore. The hash is SplitMix64
(Steele, Lea, Flood, OOPSLA 2014). One 64-bit word per sample gives the flip (bit 63) and the two offsets of the crop
(31 bits each). The host draws: arithmetic on a few hundred integers takes it microseconds, where a GPU would launch
thirty kernels.

The augmentation is the usual one for small images (He et al., arXiv 1512.03385, section 4.2), with the flip before the
zero padding and crop: the distribution is the same, and the crop is then one gather of whole rows. Padding is 0 in
pixel values, so black, not the mean as when images are normalized first.

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
    """Derive the seed of one optimization step on one worker.

    Returns:
        A seed in [0, 2**63), as torch.manual_seed takes it.

    >>> step_seed(0, 1, 2, 3) == step_seed(0, 1, 2, 3) != step_seed(0, 1, 3, 2)
    True
    """
    return hash_key(seed, epoch, step, rank) >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that a step on this device draws from, as torch.manual_seed does.

    On a machine where CUDA is not in use, torch.manual_seed itself stores the call with its formatted stack for three
    kinds of device: a third of a millisecond in every step.
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
    """Crop, flip and normalize batches of images; standardize batches of features.

    Args:
        crop: pixels of zero padding on each side before a random crop back to the size; 0 for none.
        flip: mirror a random half of the images.
        mean: of each channel, or one for all, of pixels scaled to [0, 1] (for features: of the raw values); empty: 0.
        std: of each channel, or one for all, above 0; empty: 1.

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
        """Draw each sample's flip and crop for `train`, on the host.

        Args:
            ids_B: (B,) int64 sample ids.
            shape: of the network's input: (C, H, W), or (F,) for features.
            seed: of the run.
            epoch: from 0.

        Returns:
            (B,) int64: the pixel at which each sample's crop starts, in its padded image followed by the mirrored one;
            None if nothing is random.

        Raises:
            ConfigError: ids of another dtype or shape.
        """
        if ids_B.dtype != np.int64 or ids_B.ndim != 1:
            raise ConfigError(f"ids must be int64, one per sample, got {ids_B.dtype} {ids_B.shape}")
        if len(shape) != 3 or not (self.crop or self.flip):
            return None
        words_B = hash_ids(ids_B, hash_key(seed, epoch))
        rows, width = (size + 2 * self.crop for size in shape[1:])
        starts_B = _offsets(words_B, self.crop) * width + _offsets(words_B >> np.uint64(31), self.crop)
        return starts_B + (words_B >> np.uint64(63)).astype(np.int64) * (rows * width) if self.flip else starts_B

    @torch.no_grad()
    def train(self, images_BHWC: Tensor, draws_B: Tensor | None) -> Tensor:
        """Augment and normalize a training batch.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype, which are only standardized.
            draws_B: (B,) from `draws` for the batch's ids and shape, on the images' device.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32, on the images' device.

        Raises:
            ConfigError: a wrong shape or dtype, a mean or std of another length, or draws for another batch.
        """
        if draws_B is not None:
            _check_images(images_BHWC)
            if draws_B.shape != images_BHWC.shape[:1]:
                raise ConfigError(f"draws for {len(draws_B)} samples do not fit a batch of {len(images_BHWC)}")
            images_BHWC = self._flip_and_crop(images_BHWC, draws_B)
        return self.evaluate(images_BHWC)

    @torch.no_grad()
    def evaluate(self, images_BHWC: Tensor) -> Tensor:
        """Normalize a batch, without random changes.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32.

        Raises:
            ConfigError: a wrong shape or dtype, or a mean or std of another length.
        """
        channels, device = images_BHWC.shape[-1], images_BHWC.device
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, channels):
                raise ConfigError(f"{name} must have 1 or {channels} values for {channels} channels, got {len(values)}")
        if images_BHWC.ndim == 2:
            factor, term = _affine(self, 1.0, channels, 1, device)
            return images_BHWC.to(torch.float32, copy=True).mul_(factor).add_(term)
        _check_images(images_BHWC)
        batch, height, width, _ = images_BHWC.shape
        # Constants repeated along the row: the inner loop runs over W·C values instead of C.
        factor, term = _affine(self, 255.0, channels, width, device)
        rows = images_BHWC.reshape(batch, height, width * channels).float().mul_(factor).add_(term)
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
        # Every run of W pixels is a row of this overlapping view: a crop is a copy of H whole rows.
        runs = sides.as_strided((sides.numel() // channels - width + 1, width * channels), (channels, 1))
        firsts_BH = _firsts(batch, height, sides.numel() // (batch * channels), sides.shape[3], draws_B.device)
        rows_BH = firsts_BH + draws_B[:, None]
        return runs.index_select(0, rows_BH.view(-1)).view(batch, height, width, channels)


def _offsets(words_B: NDArray[np.uint64], crop: int) -> NDArray[np.int64]:
    """Map the low 31 bits to 0..2·crop, uniformly."""
    return ((words_B & np.uint64(0x7FFFFFFF)).astype(np.int64) * (2 * crop + 1)) >> 31


@lru_cache(maxsize=16)
def _firsts(batch: int, height: int, sample: int, width: int, device: torch.device) -> Tensor:
    """Return (B, H) int64: the pixel at which row h of sample b starts, padding included."""
    with torch.inference_mode(False):
        samples_B = torch.arange(batch, device=device) * sample
        return samples_B[:, None] + torch.arange(height, device=device) * width


@lru_cache(maxsize=64)
def _affine(augment: Augment, scale: float, channels: int, repeats: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a and b of (x/scale − mean)/std = x·a + b, (repeats·channels,) float32."""
    # A tensor made under inference_mode remains an inference tensor, and the cache would pass it to training.
    with torch.inference_mode(False):
        means = torch.tensor(augment.mean or (0.0,), dtype=torch.float64).expand(channels)
        stds = torch.tensor(augment.std or (1.0,), dtype=torch.float64).expand(channels)
        factor, term = 1.0 / (scale * stds), -means / stds
        return factor.repeat(repeats).to(device, torch.float32), term.repeat(repeats).to(device, torch.float32)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ConfigError(
            f"images must be uint8 (batch, height, width, channels), got {images.dtype} {tuple(images.shape)}"
        )
