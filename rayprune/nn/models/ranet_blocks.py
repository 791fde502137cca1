"""The blocks of RANet (Yang et al., CVPR 2020, arXiv 2003.07326): dense ones, and ones that fuse lower resolutions.

Every block gives its map and the maps before and after each of its layers, which the next sub-network reads.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.nn.models.multi_scale import bottlenecked, convolution

Maps = list[Tensor]


@dataclass(frozen=True)
class Widths:
    """How wide a sub-network is.

    Args:
        growth: g, the channels that a layer adds.
        factor: of its bottlenecks; None for none.
        low_factor: of the bottlenecks that read the sub-network before.
        compress_factor: the share of a fusion's channels that come from the sub-network before.
        reduction: the share of channels that a transition keeps.
    """

    growth: int
    factor: int | None
    low_factor: int | None
    compress_factor: float
    reduction: float


class FusionLayer(nn.Module):
    """A dense layer that also reads a map of the sub-network before.

    Args:
        own, low: channels of both maps.
        widths: of the sub-network.
        stride: 2 to halve the map.
    """

    def __init__(self, own: int, low: int, widths: Widths, stride: int) -> None:
        super().__init__()
        from_low = int(widths.growth * widths.compress_factor)
        self.up = bottlenecked(low, from_low, widths.low_factor)
        self.normal = bottlenecked(own, widths.growth - from_low, widths.factor, stride=stride)

    def forward(self, own: Tensor, low: Tensor) -> Tensor:
        """Give (B, own + growth, H/stride, W/stride) of the map (B, own, H, W) and the lower one."""
        added = self.normal(own)
        return torch.cat([_resized(own, added), _resized(self.up(low), added), added], dim=1)


class DenseBlock(nn.Module):
    """Dense layers, and a 1×1 transition where `ends_stage`.

    Args:
        in_channels: of the map that it reads.
        num_layers: at least 1.
        widths: of the sub-network.
    """

    def __init__(self, in_channels: int, num_layers: int, widths: Widths, *, ends_stage: bool) -> None:
        super().__init__()
        self.map_channels = [in_channels + layer * widths.growth for layer in range(num_layers + 1)]
        self.layers = nn.ModuleList(
            bottlenecked(channels, widths.growth, widths.factor) for channels in self.map_channels[:-1]
        )
        self.transition, self.out_channels = _transition(self.map_channels[-1], widths, ends_stage)

    def forward(self, own: Tensor) -> tuple[Tensor, Maps]:
        """Give the block's map, and the maps before and after each of its layers."""
        maps = [own]
        for layer in self.layers:
            maps.append(torch.cat([maps[-1], layer(maps[-1])], dim=1))
        return self.transition(maps[-1]), maps


class FusionBlock(nn.Module):
    """Fusion layers, the last low map compressed and appended, and a 1×1 transition where `ends_stage`.

    Args:
        in_channels: of the map that it reads.
        low: channels of the maps of its counterpart in the sub-network before, one more than it has layers.
        widths: of the sub-network.
        halves: whether its last layer halves the map.
    """

    def __init__(self, in_channels: int, low: Sequence[int], widths: Widths, *, halves: bool, ends_stage: bool) -> None:
        super().__init__()
        num_layers = len(low) - 1
        self.map_channels = [in_channels + layer * widths.growth for layer in range(num_layers + 1)]
        strides = [1] * (num_layers - 1) + [2 if halves else 1]
        sizes = zip(self.map_channels, low, strides, strict=False)
        self.layers = nn.ModuleList(FusionLayer(own, below, widths, stride) for own, below, stride in sizes)
        from_low = int(self.map_channels[-1] * widths.compress_factor)
        self.last = convolution(low[-1], from_low, size=1)
        self.transition, self.out_channels = _transition(self.map_channels[-1] + from_low, widths, ends_stage)

    def forward(self, own: Tensor, low: Maps) -> tuple[Tensor, Maps]:
        """Give the block's map, and the maps before and after each of its layers."""
        maps = [own]
        for layer, below in zip(self.layers, low, strict=False):
            maps.append(layer(maps[-1], below))
        compressed = _resized(self.last(low[-1]), maps[-1])
        return self.transition(torch.cat([maps[-1], compressed], dim=1)), maps


class SubNetwork(nn.Module):
    """The blocks at one resolution: fusion blocks, one for each of the sub-network before, then dense ones.

    Args:
        in_channels: of the stem's map at this resolution.
        num_layers: of each of its blocks.
        low: channels of the maps of every block of the sub-network before; empty for the first.
        widths: of the layers.
        scale: how many stages of the same share of blocks there are; each but the last ends in a transition.
        halving: the numbers, from 1, of the fusion blocks that halve the map.
    """

    def __init__(
        self,
        in_channels: int,
        num_layers: Sequence[int],
        low: Sequence[Sequence[int]],
        widths: Widths,
        *,
        scale: int,
        halving: Sequence[int],
    ) -> None:
        super().__init__()
        self.num_fusions = len(low)
        self.blocks = nn.ModuleList()
        # What the next sub-network and the classifiers read: channels of the maps inside and after each block.
        self.map_channels: list[list[int]] = []
        self.out_channels: list[int] = []
        ends = {stage * len(num_layers) // scale for stage in range(1, scale)}
        for number, count in enumerate(num_layers, start=1):
            ends_stage = number in ends
            block: DenseBlock | FusionBlock
            if number <= len(low):
                halves = number in halving
                block = FusionBlock(in_channels, low[number - 1], widths, halves=halves, ends_stage=ends_stage)
            else:
                block = DenseBlock(in_channels, count, widths, ends_stage=ends_stage)
            in_channels = block.out_channels
            self.blocks.append(block)
            self.map_channels.append(block.map_channels)
            self.out_channels.append(in_channels)

    def fuse(self, own: Tensor, low: Sequence[Maps]) -> tuple[Tensor, list[Maps]]:
        """Give the map after the fusion blocks and each one's maps, of the stem's map and the lower blocks' maps."""
        maps = []
        for block, below in zip(self.blocks[: self.num_fusions], low, strict=True):
            own, inside = block(own, below)
            maps.append(inside)
        return own, maps


def _transition(channels: int, widths: Widths, ends_stage: bool) -> tuple[nn.Module, int]:
    if not ends_stage:
        return nn.Identity(), channels
    kept = max(int(widths.reduction * channels), 1)
    return convolution(channels, kept, size=1), kept


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    if maps.shape[2:] == like.shape[2:]:
        return maps
    return functional.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=True)
