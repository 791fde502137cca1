"""RANet: sub-networks from low to high resolution, each of which reuses the features of the one before.

Yang, Han, Chen, Song, Dai, Huang: Resolution Adaptive Networks for Efficient Inference, CVPR 2020, arXiv 2003.07326.
Layers and counts are those of the published program. Sub-network i has num_blocks + block_step·i blocks: one fusion
block for each block of its predecessor, whose features it reads, and then dense blocks with a classifier each. A fusion
block whose number equals one of the last (scale − 1) predecessors' block counts halves its map, so that every
classifier reads a map of the lowest resolution. Every block also returns the maps before and after each of its layers,
which the next sub-network reads.

Deviations: classifiers average their whole map (see `multi_exit`); gradient equilibrium, which the authors did not use,
balances the map that a classifier reads.

Shapes: B batch, C classes, K exits, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.errors import ConfigError
from rayprune.nn.models.multi_exit import (
    LayerCount,
    MultiExit,
    MultiScaleStem,
    balance_gradients,
    bottlenecked,
    check_factors,
    check_growth,
    choose_scales,
    choose_stem,
    classifier,
    convolution,
    initialize,
)
from rayprune.nn.models.registry import image_channels, register_model

Maps = list[Tensor]


@dataclass(frozen=True)
class Widths:
    """The width of a sub-network.

    Args:
        growth: g, the channels that a layer adds.
        factor: of its bottlenecks; None for none.
        low_factor: of the bottlenecks that read the previous sub-network.
        compress_factor: the fraction of a fusion's channels that come from the previous sub-network.
        reduction: the fraction of channels that a transition keeps.
    """

    growth: int
    factor: int | None
    low_factor: int | None
    compress_factor: float
    reduction: float


class FusionLayer(nn.Module):
    """A dense layer that also reads a map of the previous sub-network; `own` and `low` are the maps' channels."""

    def __init__(self, own: int, low: int, widths: Widths, stride: int) -> None:
        super().__init__()
        from_low = int(widths.growth * widths.compress_factor)
        self.up = bottlenecked(low, from_low, widths.low_factor)
        self.normal = bottlenecked(own, widths.growth - from_low, widths.factor, stride=stride)

    def forward(self, own: Tensor, low: Tensor) -> Tensor:
        """Return (B, own + growth, H/stride, W/stride) of the map (B, own, H, W) and the lower one."""
        added = self.normal(own)
        return torch.cat([_resize(own, added), _resize(self.up(low), added), added], dim=1)


class DenseBlock(nn.Module):
    """Dense layers, and a 1×1 transition if `ends_stage`."""

    def __init__(self, in_channels: int, num_layers: int, widths: Widths, *, ends_stage: bool) -> None:
        super().__init__()
        self.map_channels = [in_channels + layer * widths.growth for layer in range(num_layers + 1)]
        self.layers = nn.ModuleList(
            bottlenecked(channels, widths.growth, widths.factor) for channels in self.map_channels[:-1]
        )
        self.transition, self.out_channels = _transition(self.map_channels[-1], widths, ends_stage)

    def forward(self, own: Tensor) -> tuple[Tensor, Maps]:
        """Return the block's map, and the maps before and after each of its layers."""
        maps = [own]
        for layer in self.layers:
            maps.append(torch.cat([maps[-1], layer(maps[-1])], dim=1))
        return self.transition(maps[-1]), maps


class FusionBlock(nn.Module):
    """Fusion layers, the last low map compressed and appended, and a 1×1 transition if `ends_stage`.

    Args:
        low: channels of the maps of its counterpart in the previous sub-network, one more than it has layers.
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
        """Return the block's map, and the maps before and after each of its layers."""
        maps = [own]
        for layer, below in zip(self.layers, low, strict=False):
            maps.append(layer(maps[-1], below))
        compressed = _resize(self.last(low[-1]), maps[-1])
        return self.transition(torch.cat([maps[-1], compressed], dim=1)), maps


class SubNetwork(nn.Module):
    """The blocks at one resolution: a fusion block for each block of the previous sub-network, then dense blocks.

    Args:
        in_channels: of the stem's map at this resolution.
        num_layers: of each of its blocks.
        low: channels of the maps of every block of the previous sub-network; empty for the first.
        scale: the number of stages into which the blocks divide; each but the last ends in a transition.
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
        # Channels of the maps inside each block, which the next sub-network reads, and after it, for the classifier.
        self.map_channels: list[list[int]] = []
        self.out_channels: list[int] = []
        stage_ends = {stage * len(num_layers) // scale for stage in range(1, scale)}
        for number, count in enumerate(num_layers, start=1):
            ends_stage = number in stage_ends
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
        """Fuse the stem's map with the lower blocks' maps: return the map after the fusion blocks, and their maps."""
        maps = []
        for block, below in zip(self.blocks[: self.num_fusions], low, strict=True):
            own, inside = block(own, below)
            maps.append(inside)
        return own, maps


def _transition(channels: int, widths: Widths, ends_stage: bool) -> tuple[nn.Module, int]:
    if not ends_stage:
        return nn.Identity(), channels
    reduced = max(int(widths.reduction * channels), 1)
    return convolution(channels, reduced, size=1), reduced


def _resize(maps: Tensor, like: Tensor) -> Tensor:
    if maps.shape[2:] == like.shape[2:]:
        return maps
    return functional.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=True)


# The map after the last block; the stem's maps for the later sub-networks; and for each block so far of the current
# sub-network, the maps that its counterpart in the next one reads.
State = tuple[Tensor, Maps, list[Maps]]


@register_model
class RANet(MultiExit):
    """The paper's network for CIFAR with 6 exits; the options are those of the published program.

    Args:
        num_classes, input_shape: C, and (channels, H, W).
        num_blocks: blocks of the first sub-network; the last has K.
        block_step: by how many blocks a sub-network exceeds the one before.
        step: layers of a block, as step_mode says.
        step_mode: `even` gives each block `step` layers, `lin_grow` step·i in block i from 1.
        scales: of every sub-network, from 1, rising by 1 where the resolution doubles and by 0 where it stays; 1, 2, 3
            by default, or fewer for images under 16 pixels.
        channels: of the stem's map, for a growth factor of 1.
        growth_rate: channels that a layer adds, for a growth factor of 1.
        growth_factors: the width of each sub-network in multiples; by default it halves when the resolution doubles.
        compress_factor: the fraction of a fusion's channels that come from the previous sub-network, in (0, 1).
        bottleneck, bottleneck_factors, reduction, stem, gradient_equilibrium: as for `msdnet`.

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        num_blocks: LayerCount = 2,
        block_step: LayerCount = 2,
        step: LayerCount = 2,
        step_mode: str = "lin_grow",
        scales: Sequence[int] | None = None,
        channels: int = 16,
        growth_rate: int = 6,
        growth_factors: Sequence[int] | None = None,
        bottleneck: bool = True,
        bottleneck_factors: Sequence[int] | None = None,
        reduction: float = 0.5,
        compress_factor: float = 0.25,
        stem: str | None = None,
        gradient_equilibrium: bool = False,
    ) -> None:
        in_channels = image_channels("ranet", input_shape)
        counts = {"num_blocks": num_blocks, "block_step": block_step, "channels": channels, "growth_rate": growth_rate}
        check_growth("ranet", step_mode, reduction, step=step, **counts)
        stem = choose_stem("ranet", input_shape, stem)
        scales = _checked_scales(scales, input_shape, stem)
        growth_factors = growth_factors or [2 ** (scales[-1] - scale) for scale in scales]
        growth = check_factors("ranet", "growth_factors", growth_factors, len(scales))
        factors = check_factors("ranet", "bottleneck_factors", bottleneck_factors or growth, len(scales))
        block_counts = [num_blocks + block_step * index for index in range(len(scales))]
        super().__init__(block_counts[-1])
        self.gradient_equilibrium = gradient_equilibrium
        num_layers = [step * number if step_mode == "lin_grow" else step for number in range(1, block_counts[-1] + 1)]
        growths = [growth_rate * factor for factor in growth]
        widths = _widths(growths, factors if bottleneck else None, compress_factor, reduction)
        strides = [2 if finer > own else 1 for finer, own in zip(scales[:0:-1], scales[-2::-1], strict=True)]
        stem_channels = [channels * factor for factor in growth]
        self.stem = MultiScaleStem(in_channels, stem_channels[::-1], strides, stem)
        self.sub_networks = nn.ModuleList()
        self.owners: list[int] = []  # the sub-network of every exit; the exit's block there has the exit's number
        low: list[list[int]] = []
        outputs: list[int] = []
        for index, (count, scale) in enumerate(zip(block_counts, scales, strict=True)):
            sub_network = SubNetwork(
                stem_channels[index],
                num_layers[:count],
                low,
                widths[index],
                scale=scale,
                halving=block_counts[max(index - scale + 1, 0) : index],
            )
            self.sub_networks.append(sub_network)
            self.owners += [index] * (count - len(low))
            outputs += sub_network.out_channels[len(low) :]
            low = sub_network.map_channels
        self.classifiers = nn.ModuleList(classifier(width, num_classes, stem) for width in outputs)
        initialize(self)

    def begin(self, inputs: Tensor) -> State:
        """Return the stem's maps of images (B, channels, H, W)."""
        lowest, *others = reversed(self.stem(inputs))
        return lowest, others, []

    def advance(self, exit: int, state: State) -> tuple[Tensor, State]:
        """Return the logits (B, C) at `exit`, and the state for the next one."""
        own, stem, maps = state
        owner = self.owners[exit]
        network = self.sub_networks[owner]
        assert isinstance(network, SubNetwork)
        if exit > 0 and self.owners[exit - 1] < owner:
            own, maps = network.fuse(stem[0], maps)
            stem = stem[1:]
        block = network.blocks[exit]
        own, inside = block(own)
        if self.gradient_equilibrium:
            for_classifier, following = balance_gradients(own, exit, self.num_exits)
            # Without a transition the next sub-network reads the same map too.
            inside = [*(following if each is own else each for each in inside)]
        else:
            for_classifier = following = own
        # Nothing reads the last sub-network's inner maps: early exit need not select rows from them.
        maps = [*maps, inside] if stem else []
        return self.classifiers[exit](for_classifier), (following, stem, maps)


@register_model
def ranet_imagenet(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    step: LayerCount = 8,
    channels: int = 32,
    growth_rate: int = 16,
    growth_factors: Sequence[int] = (4, 2, 2, 1),
    gradient_equilibrium: bool = False,
) -> RANet:
    """Build the paper's network for ImageNet: 4 resolutions, 8 exits.

    Args:
        num_classes, input_shape, step, channels, growth_rate, growth_factors, gradient_equilibrium: as for `ranet`.
    """
    return RANet(
        num_classes=num_classes,
        input_shape=input_shape,
        step=step,
        step_mode="even",
        scales=(1, 2, 3, 4),
        channels=channels,
        growth_rate=growth_rate,
        growth_factors=growth_factors,
        stem="imagenet",
        gradient_equilibrium=gradient_equilibrium,
    )


def _checked_scales(scales: Sequence[int] | None, input_shape: tuple[int, ...], stem: str) -> tuple[int, ...]:
    """Return the requested scales, or by default as many as the images have room for."""
    if scales is None:
        return tuple(range(1, choose_scales("ranet", "scales", input_shape, stem, None) + 1))
    scales = tuple(scales)
    rises = [later - earlier for earlier, later in pairwise(scales)]
    if not scales or scales[0] != 1 or any(rise not in (0, 1) for rise in rises):
        raise ConfigError(f"model 'ranet' needs scales that start at 1 and rise by 0 or 1, got {list(scales)}")
    choose_scales("ranet", "scales", input_shape, stem, scales[-1])
    return scales


def _widths(
    growths: Sequence[int], factors: Sequence[int] | None, compress_factor: float, reduction: float
) -> list[Widths]:
    """Return the widths of every sub-network; a fusion takes at least 1 channel from both of its inputs."""
    if not 0 < compress_factor < 1:
        raise ConfigError(f"model 'ranet' needs a compress_factor above 0 and below 1, got {compress_factor}")
    if min(growths) * compress_factor < 1:
        raise ConfigError(
            f"model 'ranet' takes {compress_factor:g} of {min(growths)} channels from the previous sub-network, less "
            "than one: raise growth_rate or compress_factor"
        )
    inner: Sequence[int | None] = factors or [None] * len(growths)
    # The first sub-network has no fusions and does not use its low_factor.
    return [
        Widths(growth, own, low, compress_factor, reduction)
        for growth, own, low in zip(growths, inner, [None, *inner], strict=False)
    ]
