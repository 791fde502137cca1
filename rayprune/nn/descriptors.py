"""Descriptors that show near-duplicates without a trained network.

The descriptor of an image has two parts, each of a fixed length. Edges: how strong the luminance rises in each of eight
directions, averaged over the cells of a grid, as in histograms of oriented gradients (Dalal and Triggs, CVPR 2005).
Colors: the luminance and two differences of colors, averaged over the same cells, relative to the mean luminance.
Averages over large, soft cells change little with JPEG compression, noise, and a shift by a pixel of 32; the lengths
take out brightness and contrast. Before, the image is moved and zoomed so that the center and the spread of its edges
are always the same, which takes out about half of a larger shift.

A flip permutes both parts. With s and a the sum and the difference of a descriptor and its permutation, a flip keeps s
and changes the sign of a; (s, |Wa|) is the same for both. W has orthonormal columns and twice as many rows: it keeps
lengths, and | | never lengthens a distance, so that other changes move (s, |Wa|) by no more than the descriptor.

The radius 0.2 comes from CIFAR-10 (50,000 and 10,000 images), with changed copies of 500 images. The share of copies
within a radius, and the share of test images with a training image within it:

    radius                                     0.15     0.2      0.25     0.28
    JPEG of quality 80 / 60                    1 / 1    1 / 1    1 / 1    1 / 1
    flip; noise of 3 gray levels               1; 1     1; 1     1; 1     1; 1
    10 % brighter / darker; contrast × 1.2     ≥ 0.98   ≥ 0.99   ≥ 0.99   ≥ 0.99
    shift by 1 / 2 pixels, also diagonally     .64/.20  .84/.40  .90/.61  .93/.70
    cut to 92 % and resized                    .09      .28      .45      .55
    brighter, flipped, shifted and JPEG        .42      .68      .83      .88
    test images with a training image near     1.0 %    1.9 %    3.1 %    4.1 %

Looked at by eye, the 40 closest pairs of a test and a training image are all near-duplicates, and so are about 10, 8,
9, 6 and 7 of ten pairs at the distances 0.15, 0.175, 0.2, 0.225 and 0.25. About 3.3 % of the test images have one in
the training data (Barz and Denzler, 2020, arXiv 1902.00423, by a trained network and by eye): at 0.2, by these counts,
about half of those are found; most of those that are cut or stretched are not.

Shapes: B batch, C channels, H height, W width, G cells on each side, M maps, F features, D numbers of a descriptor.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, CELLS, DIRECTIONS = 32, 4, 8
EDGE_WEIGHT = 0.5  # share of the edges in the squared length
_BLUR = 4  # pixels on each side of the box filter, applied twice
_ROUNDING = 1e-5  # smaller edges, and descriptors of a hundred times this length, are rounding errors
_FLOOR = 0.01  # parts of a smaller length are not made longer than 1
_SPREAD, _ZOOMS = 0.75, (0.6, 1.2)  # of the edges around their center, in half sides; its limits
_LUMA = (0.299, 0.587, 0.114)


def image_descriptor(images_BCHW: Tensor) -> Tensor:
    """Return the descriptors of images, (B, D) of length 1; 0 for a gray image of one brightness.

    Args:
        images_BCHW: values in [0, 1]; of other than three channels, their mean is the luminance.
    """
    images = images_BCHW.float()
    if images.shape[-2:] != (SIDE, SIDE):
        images = functional.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    luma_B1HW, chroma_BMHW = _luma_and_chroma(_centered(images))
    edges_BMGG = (_cells(_edges(luma_B1HW)) - _ROUNDING).clamp_min(0.0).sqrt()
    edges_BMGG = edges_BMGG - edges_BMGG.mean(dim=(2, 3), keepdim=True)
    colors_BMGG = _cells(torch.cat([luma_B1HW - luma_B1HW.mean(dim=(1, 2, 3), keepdim=True), chroma_BMHW], dim=1))
    mirror = [(DIRECTIONS // 2 - k) % DIRECTIONS for k in range(DIRECTIONS)]
    edges, colors = _halves(edges_BMGG, mirror), _halves(colors_BMGG, list(range(colors_BMGG.shape[1])))
    weights = (math.sqrt(EDGE_WEIGHT), math.sqrt(1.0 - EDGE_WEIGHT))
    parts = [weight * _unit(torch.cat(part, dim=1)) for part, weight in zip((edges, colors), weights, strict=True)]
    sums, differences = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
    difference_BD = torch.cat(differences, dim=1)
    frame = _frame(difference_BD.shape[1]).to(difference_BD.device)
    descriptor_BD = torch.cat([*sums, (difference_BD @ frame).abs()], dim=1)
    lengths_B1 = descriptor_BD.norm(dim=1, keepdim=True)
    return descriptor_BD / lengths_B1.clamp_min(1e-9) * (lengths_B1 > 100 * _ROUNDING)


def _centered(images: Tensor) -> Tensor:
    """Move the center of the edges to the middle of the images, and bring their spread to _SPREAD."""
    edges_BHW = _edges(_luma_and_chroma(images)[0]).square().sum(dim=1).sqrt() + _ROUNDING
    steps = (torch.arange(SIDE, device=images.device) + 0.5) * 2 / SIDE - 1.0
    total_B = edges_BHW.sum(dim=(1, 2))
    across_B = (edges_BHW.sum(dim=1) * steps).sum(dim=1) / total_B
    down_B = (edges_BHW.sum(dim=2) * steps).sum(dim=1) / total_B
    squares_BHW = (steps - across_B[:, None]).square()[:, None, :] + (steps - down_B[:, None]).square()[:, :, None]
    spread_B = ((edges_BHW * squares_BHW).sum(dim=(1, 2)) / total_B).sqrt()
    zoom_B = (spread_B / _SPREAD).clamp(*_ZOOMS)
    zero_B = torch.zeros_like(zoom_B)
    rows = [torch.stack(row, dim=1) for row in ((zoom_B, zero_B, across_B), (zero_B, zoom_B, down_B))]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _luma_and_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape[1] != 3:
        luma = images.mean(dim=1, keepdim=True)
        return luma, luma[:, :0]
    red, green, blue = images.split(1, dim=1)
    luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return luma, torch.cat([red - green, (red + green) / 2 - blue], dim=1)


def _edges(luma_B1HW: Tensor) -> Tensor:
    """Return how much the luminance rises in each direction, (B, 8, H, W)."""
    smooth = functional.avg_pool2d(luma_B1HW, 3, stride=1, padding=1, count_include_pad=False)
    padded = functional.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    angles = [2 * math.pi * k / DIRECTIONS for k in range(DIRECTIONS)]
    rises = [across * math.cos(angle) + down * math.sin(angle) for angle in angles]
    return torch.cat(rises, dim=1).clamp_min(0.0)


def _cells(maps_BMHW: Tensor) -> Tensor:
    """Return soft averages, (B, M, G, G)."""
    pooling = _pooling().to(maps_BMHW.device)
    return pooling @ maps_BMHW @ pooling.T


@lru_cache
def _pooling() -> Tensor:
    """Return the weights of each row in each row of cells, (G, H): a mean after two box filters."""
    rows = torch.eye(SIDE)[None]
    for _ in range(2):
        rows = functional.avg_pool1d(rows, 2 * _BLUR + 1, stride=1, padding=_BLUR, count_include_pad=False)
    return functional.adaptive_avg_pool1d(rows, CELLS)[0].T.contiguous()


def _halves(maps_BMGG: Tensor, mirror: list[int]) -> tuple[Tensor, Tensor]:
    """Return sum and difference of each number and the one in its place in the flipped image."""
    flipped = maps_BMGG[:, mirror].flip(3)
    left, right = maps_BMGG[..., : CELLS // 2], flipped[..., : CELLS // 2]
    return (left + right).flatten(1), (left - right).flatten(1)


def _unit(vectors_BD: Tensor) -> Tensor:
    return vectors_BD / vectors_BD.norm(dim=1, keepdim=True).clamp_min(_FLOOR)


@lru_cache
def _frame(size: int) -> Tensor:
    """Return a fixed (size, 2·size) matrix with orthonormal rows."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(random)[0].T.float().contiguous()


class ImageDescriptor(nn.Module):
    """`image_descriptor` of images; features and other vectors as they are."""

    def forward(self, inputs: Tensor) -> Tensor:
        return image_descriptor(inputs) if inputs.ndim == 4 else inputs


def embedder() -> nn.Module:
    """Return the network for `collect.embedder`."""
    return ImageDescriptor()


def placeholder(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Return a small network for runs that train nothing; it takes images or features of any shape."""
    return nn.Sequential(_ChannelMeans(), nn.Linear(input_shape[0], num_classes))


class _ChannelMeans(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2).mean(dim=2) if inputs.ndim == 4 else inputs
