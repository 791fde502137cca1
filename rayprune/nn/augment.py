"""Batched augmentation on the device, keyed by (seed, epoch, sample id).

Every draw is a hash of its key and no generator exists: a sample looks the same in an epoch whatever the batch it came
in, the order, the number of workers or the device, and a resumed run has no state to restore. The hash is SplitMix64
(Steele, Lea, Flood, OOPSLA 2014); one 64-bit word a sample gives the flip (bit 63) and the two offsets of the crop
(31 bits each).

The augmentation is the usual one of small images (He et al., arXiv 1512.03385, section 4.2), with the flip before the
zero padding and crop: the distribution is the same, and the crop is then one gather of whole rows. The padding is 0 in
pixels, so black, and not the mean as where one normalises first.

Shapes: B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

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


def hash_key(*parts: int) -> int:
    """Hash integers, in order, into one in [0, 2**64)."""
    state = 0
    for part in parts:
        word = (state + GOLDEN_GAMMA + part) & MASK64
        word = ((word ^ (word >> 30)) * MULTIPLIER_1) & MASK64
        word = ((word ^ (word >> 27)) * MULTIPLIER_2) & MASK64
        state = word ^ (word >> 31)
    return state


def hash_ids(ids_B: Tensor, key: int) -> Tensor:
    """Hash ids under a key: the id-th word of the SplitMix64 stream that starts at the key.

    Args:
        ids_B: (B,) int64.
        key: in [0, 2**64).

    Returns:
        (B,) int64: the words in two's complement.
    """
    word_B = (ids_B + 1) * _signed(GOLDEN_GAMMA) + _signed(key)
    word_B = (word_B ^ _shift_right(word_B, 30)) * _signed(MULTIPLIER_1)
    word_B = (word_B ^ _shift_right(word_B, 27)) * _signed(MULTIPLIER_2)
    return word_B ^ _shift_right(word_B, 31)


@dataclass(frozen=True)
class Augment:
    """Crop, flip and normalise batches of images; standardise batches of features.

    Args:
        crop: pixels of zero padding on each side before a random crop back to the size; 0 for none.
        flip: mirror a random half of the images.
        mean: per channel, of pixels scaled to [0, 1] (of the raw values for features), or one for all; empty for 0.
        std: likewise, above 0; empty for 1.

    Raises:
        ValueError: a value is outside its range.
    """

    crop: int = 0
    flip: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise ValueError(f"crop must be an integer of at least 0, got {self.crop!r}")
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not all(value > 0.0 and math.isfinite(value) for value in self.std):
            raise ValueError(f"std must be above 0, got {self.std}")

    @torch.no_grad()
    def train(self, images_BHWC: Tensor, ids_B: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Augment and normalise a training batch.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype, which are only standardised.
            ids_B: (B,) int64 sample ids, on any device.
            seed: of the run.
            epoch: from 0.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32, on the images' device.

        Raises:
            ValueError: a wrong shape or dtype, or a mean or std of another length.
        """
        if ids_B.dtype != torch.int64 or ids_B.shape != images_BHWC.shape[:1]:
            raise ValueError(
                f"ids must be int64, one a sample ({len(images_BHWC)}), got {ids_B.dtype} {tuple(ids_B.shape)}"
            )
        if images_BHWC.ndim == 4 and (self.crop or self.flip):
            _check_images(images_BHWC)
            words_B = hash_ids(ids_B, hash_key(seed, epoch)).to(images_BHWC.device)
            images_BHWC = self._flip_and_crop(images_BHWC, words_B)
        return self.evaluate(images_BHWC)

    @torch.no_grad()
    def evaluate(self, images_BHWC: Tensor) -> Tensor:
        """Normalise a batch, as `train` does after its draws.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32.

        Raises:
            ValueError: a wrong shape or dtype, or a mean or std of another length.
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

    def _flip_and_crop(self, images_BHWC: Tensor, words_B: Tensor) -> Tensor:
        batch, height, width, channels = images_BHWC.shape
        padded_height, padded_width = height + 2 * self.crop, width + 2 * self.crop
        starts_B = torch.arange(batch, device=images_BHWC.device)
        pool = images_BHWC
        if self.flip:
            mirrored = images_BHWC.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)
            pool = torch.cat((images_BHWC, mirrored))
            starts_B = starts_B + (words_B < 0) * batch
        starts_B = starts_B * padded_height
        if self.crop:
            pool = functional.pad(pool, (0, 0, self.crop, self.crop, self.crop, self.crop))
            starts_B = starts_B + _offsets(words_B, self.crop)
        starts_B = starts_B * padded_width
        if self.crop:
            starts_B = starts_B + _offsets(words_B >> 31, self.crop)
        # Every run of W pixels is a row of this overlapping view, so that a crop is H rows copied whole.
        pool = pool.contiguous()
        runs = pool.as_strided((pool.numel() // channels - width + 1, width * channels), (channels, 1))
        rows_BH = starts_B[:, None] + torch.arange(height, device=starts_B.device) * padded_width
        return runs.index_select(0, rows_BH.view(-1)).view(batch, height, width, channels)


def _offsets(words_B: Tensor, crop: int) -> Tensor:
    """Map the low 31 bits to 0..2·crop, uniformly."""
    return ((words_B & 0x7FFFFFFF) * (2 * crop + 1)) >> 31


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shift_right(words_B: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: drop the copies of the sign.
    logical_B: Tensor = (words_B >> bits) & (2 ** (64 - bits) - 1)
    return logical_B


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
        raise ValueError(
            f"images must be uint8 (batch, height, width, channels), got {images.dtype} {tuple(images.shape)}"
        )


def _check_lengths(augment: Augment, channels: int) -> None:
    for name, values in (("mean", augment.mean), ("std", augment.std)):
        if len(values) not in (0, 1, channels):
            raise ValueError(f"{name} must have 1 or {channels} values for {channels} channels, got {len(values)}")
