"""Batched augmentation on the device, keyed by (seed, epoch, sample id).

Every random draw is a hash of its key, and no generator exists: a sample looks the same in an epoch whatever its batch,
the order, the number of workers or the device, and a resumed run has no state to restore. The hash is SplitMix64
(Steele, Lea, Flood, OOPSLA 2014). One 64-bit word per sample gives the flip (bit 63) and the two offsets of the crop
(31 bits each). The host draws: arithmetic on a few hundred integers takes it microseconds, where a GPU would launch
thirty kernels.

The augmentation is the usual one for small images (He et al., arXiv 1512.03385, section 4.2), with the flip before the
zero padding and crop: the distribution is the same, and the crop is then one gather of whole rows. Padding is 0 in
pixel values, so black, not the mean as when images are normalized first.

For ImageNet it is the random-resized crop of Szegedy et al. (arXiv 1409.4842, section 6): a rectangle of 8 to 100 % of
the area and of a ratio of sides between 3/4 and 4/3, resized to a square. The rectangle is drawn as torchvision's
RandomResizedCrop draws it: up to ten times, then the largest central one. Deviations: it is cut out of the stored
image, which is the central square of the original where the source has an `image_size`; resizing is bilinear without
antialiasing and without rounding to bytes. With images stored at 8/7 of the network's size, such as 256 for 224, no
rectangle shrinks by more than 8/7, and evaluation sees the usual central square.

Shapes: B batch, H height, W width, C channels, F features, S side of the resized crop.
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
RATIO = (3 / 4, 4 / 3)  # width to height of a random-resized crop
ATTEMPTS = 10


def channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (C, H, W) of stored images (H, W, C); any other shape as it is.

    >>> channels_first((32, 24, 3)), channels_first((10,))
    ((3, 32, 24), (10,))
    """
    return (shape[2], shape[0], shape[1]) if len(shape) == 3 else tuple(shape)


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
        resized_crop: side of the square to which a random part of each image is resized, and which evaluation cuts out
            of the middle; 0 for none.
        scale: the smallest and the largest share of the image's area in that part, in (0, 1].
        mean: of each channel, or one for all, of pixels scaled to [0, 1] (for features: of the raw values); empty: 0.
        std: of each channel, or one for all, above 0; empty: 1.

    Raises:
        ConfigError: a value is outside its range.
    """

    crop: int = 0
    flip: bool = False
    resized_crop: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("crop", self.crop), ("resized_crop", self.resized_crop)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be an integer of at least 0, got {value!r}")
        if self.crop and self.resized_crop:
            raise ConfigError(
                f"crop {self.crop} and resized_crop {self.resized_crop} exclude each other: leave one out"
            )
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ConfigError(f"scale must ascend in (0, 1], got {list(self.scale)}")
        if not all(math.isfinite(value) for value in self.mean):
            raise ConfigError(f"mean must be finite, got {self.mean}")
        if not all(value > 0.0 and math.isfinite(value) for value in self.std):
            raise ConfigError(f"std must be above 0, got {self.std}")

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the network's input for stored rows of a shape, (C, H, W) or (F,).

        Raises:
            ConfigError: a resized crop of features, or of images that are smaller than the crop.
        """
        if not self.resized_crop:
            return shape
        if len(shape) != 3:
            raise ConfigError(
                f"resized_crop = {self.resized_crop} is for images, and the data has features: leave it out"
            )
        if min(shape[1:]) < self.resized_crop:
            raise ConfigError(
                f"resized_crop = {self.resized_crop} is more than the side of images of {shape[1]}×{shape[2]}: set "
                f"data.image_size={round(self.resized_crop * 8 / 7)}, or a smaller resized_crop"
            )
        return (shape[0], self.resized_crop, self.resized_crop)

    def draws(
        self, ids_B: NDArray[np.int64], shape: tuple[int, ...], *, seed: int, epoch: int
    ) -> NDArray[np.int64] | None:
        """Draw each sample's flip and crop for `train`, on the host.

        Args:
            ids_B: (B,) int64 sample ids.
            shape: of the stored rows, channels first: (C, H, W), or (F,) for features.
            seed: of the run.
            epoch: from 0.

        Returns:
            (B,) int64: the pixel at which each sample's crop starts, in its padded image followed by the mirrored one.
            For resized crops (B, 4) int64: top, left, height and width, with a negative width to mirror. None if
            nothing is random.

        Raises:
            ConfigError: ids of another dtype or shape.
        """
        if ids_B.dtype != np.int64 or ids_B.ndim != 1:
            raise ConfigError(f"ids must be int64, one per sample, got {ids_B.dtype} {ids_B.shape}")
        if len(shape) != 3 or not (self.crop or self.flip or self.resized_crop):
            return None
        words_B = hash_ids(ids_B, hash_key(seed, epoch))
        if self.resized_crop:
            return self._boxes(ids_B, words_B, (shape[1], shape[2]), seed=seed, epoch=epoch)
        rows, width = (size + 2 * self.crop for size in shape[1:])
        starts_B = _below(words_B, 2 * self.crop + 1) * width + _below(words_B >> np.uint64(31), 2 * self.crop + 1)
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
            if draws_B.shape[:1] != images_BHWC.shape[:1]:
                raise ConfigError(f"draws for {len(draws_B)} samples do not fit a batch of {len(images_BHWC)}")
            if self.resized_crop:
                return self._resize_boxes(images_BHWC, draws_B)
            images_BHWC = self._flip_and_crop(images_BHWC, draws_B)
        return self._normalize(images_BHWC)

    @torch.no_grad()
    def evaluate(self, images_BHWC: Tensor) -> Tensor:
        """Normalize a batch, without random changes; with `resized_crop`, the central square of that side.

        Args:
            images_BHWC: (B, H, W, C) uint8, or features (B, F) of any real dtype.

        Returns:
            (B, C, H, W) float32 in channels_last memory layout, or (B, F) float32.

        Raises:
            ConfigError: a wrong shape or dtype, or a mean or std of another length.
        """
        if self.resized_crop and images_BHWC.ndim == 4:
            top, left = (round((side - self.resized_crop) / 2) for side in images_BHWC.shape[1:3])
            images_BHWC = images_BHWC[:, top : top + self.resized_crop, left : left + self.resized_crop]
        return self._normalize(images_BHWC)

    def _normalize(self, images_BHWC: Tensor) -> Tensor:
        channels, device = images_BHWC.shape[-1], images_BHWC.device
        self._check_channels(channels)
        if images_BHWC.ndim == 2:
            factor, term = _affine(self, 1.0, channels, 1, device)
            return images_BHWC.to(torch.float32, copy=True).mul_(factor).add_(term)
        _check_images(images_BHWC)
        batch, height, width, _ = images_BHWC.shape
        # Constants repeated along the row: the inner loop runs over W·C values instead of C.
        factor, term = _affine(self, 255.0, channels, width, device)
        rows = images_BHWC.reshape(batch, height, width * channels).float().mul_(factor).add_(term)
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _check_channels(self, channels: int) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, channels):
                raise ConfigError(f"{name} must have 1 or {channels} values for {channels} channels, got {len(values)}")

    def _boxes(
        self, ids_B: NDArray[np.int64], words_B: NDArray[np.uint64], sides: tuple[int, int], *, seed: int, epoch: int
    ) -> NDArray[np.int64]:
        """Draw the part of each image that is resized: (B, 4) as `draws` returns."""
        height, width = sides
        boxes_B4 = np.empty((ids_B.size, 4), dtype=np.int64)
        boxes_B4[:, 2:] = _largest_box(height, width)
        pending = np.arange(ids_B.size)
        for attempt in range(ATTEMPTS):
            # The third part of the key keeps these words apart from those of the position and the flip.
            size_words = hash_ids(ids_B[pending], hash_key(seed, epoch, attempt))
            area = height * width * _uniform(size_words, *self.scale)
            ratio = np.exp(_uniform(size_words >> np.uint64(31), *map(math.log, RATIO)))
            rows, columns = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
            fits = (rows >= 1) & (rows <= height) & (columns >= 1) & (columns <= width)
            boxes_B4[pending[fits], 2:] = np.stack((rows, columns), axis=1)[fits]
            pending = pending[~fits]
            if not pending.size:
                break
        boxes_B4[:, 0] = _below(words_B, height - boxes_B4[:, 2] + 1)
        boxes_B4[:, 1] = _below(words_B >> np.uint64(31), width - boxes_B4[:, 3] + 1)
        boxes_B4[pending, :2] = (np.array(sides) - boxes_B4[pending, 2:]) // 2
        if self.flip:
            boxes_B4[:, 3] *= 1 - 2 * (words_B >> np.uint64(63)).astype(np.int64)
        return boxes_B4

    def _resize_boxes(self, images_BHWC: Tensor, boxes_B4: Tensor) -> Tensor:
        """Return the parts of the images, resized and normalized, (B, C, S, S)."""
        _, height, width, channels = images_BHWC.shape
        self._check_channels(channels)
        tops_B, lefts_B, heights_B, widths_B = boxes_B4.float().unbind(1)
        ys_BS = _sampled(tops_B, heights_B, self.resized_crop) * (2 / height) - 1
        xs_BS = _sampled(lefts_B, widths_B, self.resized_crop) * (2 / width) - 1
        grid_BSS2 = torch.stack(torch.broadcast_tensors(xs_BS[:, None, :], ys_BS[:, :, None]), dim=3)
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        resized = functional.grid_sample(images_BCHW, grid_BSS2, padding_mode="border", align_corners=False)
        factor, term = (values[:, None, None] for values in _affine(self, 255.0, channels, 1, images_BHWC.device))
        return resized.mul_(factor).add_(term).contiguous(memory_format=torch.channels_last)

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


def _below(words_B: NDArray[np.uint64], bounds: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Map the low 31 bits to 0..bounds − 1, uniformly."""
    return ((words_B & np.uint64(0x7FFFFFFF)).astype(np.int64) * bounds) >> 31


def _uniform(words_B: NDArray[np.uint64], low: float, high: float) -> NDArray[np.float64]:
    """Map the low 31 bits to [low, high), uniformly."""
    return low + (high - low) * ((words_B & np.uint64(0x7FFFFFFF)).astype(np.float64) / 2.0**31)


def _largest_box(height: int, width: int) -> tuple[int, int]:
    """Return the height and width of the largest part of an image with a ratio of sides in RATIO.

    >>> _largest_box(256, 256), _largest_box(90, 300), _largest_box(300, 90)
    ((256, 256), (90, 120), (120, 90))
    """
    return min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))


def _sampled(starts_B: Tensor, lengths_B: Tensor, side: int) -> Tensor:
    """Return where bilinear resizing reads along one axis, (B, side), in pixels from the image's edge.

    A box is |length| pixels from the start on, and mirrored if the length is negative. Nothing beyond its outer pixels'
    centers is read, as if the box were cut out first.
    """
    centers = (torch.arange(side, device=starts_B.device) + 0.5) / side
    sizes_B1 = lengths_B.abs()[:, None]
    inside_BS = torch.where(lengths_B[:, None] < 0, 1 - centers, centers) * sizes_B1
    return starts_B[:, None] + inside_BS.clamp(min=0.5).minimum(sizes_B1 - 0.5)


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
