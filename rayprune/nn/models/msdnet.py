"""MSDNet: dense connections over several scales, and a classifier after every block.

Huang, Chen, Li, Wu, van der Maaten, Weinberger: Multi-Scale Dense Networks for Resource Efficient Image
Classification, ICLR 2018, arXiv 1703.09844. Layers and counts are those of the published program: with n layers and S
scales, the finest scale is dropped every ⌈n/S⌉ layers (its `prune=max`), and the layer that drops it is followed by
1×1 convolutions that keep the fraction `reduction` of the channels. Deviations: a layer of odd growth gives the extra
channel to the same-scale connection; maps that neither a later layer nor a classifier reads are not computed, because
DDP refuses parameters without gradients (no published configuration has such maps); and the classifiers average their
whole map (see `multi_exit`).

Shapes: B batch, C classes, K exits, H height, W width; S scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


class Connections(nn.Module):
    """One scale of a layer: new channels from its own map and, except at the finest scale, from the finer map halved.

    Args:
        own, finer: channels of both maps; finer is None at the finest scale.
        growth: g, the channels that it adds.
        factor, finer_factor: of the bottlenecks; None for none.
    """

    def __init__(self, own: int, finer: int | None, growth: int, factor: int | None, finer_factor: int | None) -> None:
        super().__init__()
        halved = 0 if finer is None else growth // 2
        self.down = None if finer is None else bottlenecked(finer, halved, finer_factor, stride=2)
        self.normal = bottlenecked(own, growth - halved, factor)

    def forward(self, own: Tensor, finer: Tensor | None) -> Tensor:
        """Return (B, own + growth, H, W) of the map (B, own, H, W) and the finer one."""
        halved = [] if self.down is None else [self.down(finer)]
        return torch.cat([own, *halved, self.normal(own)], dim=1)


class Layer(nn.Module):
    """One layer of all remaining scales.

    Args:
        widths: channels of all S scales, the finest first.
        growths: the channels added to each.
        factors: of the bottlenecks at each.
        first: the finest remaining scale.
        drops: whether the layer reads the scale finer than that and then drops it.
    """

    def __init__(
        self, widths: Sequence[int], growths: Sequence[int], factors: Sequence[int | None], first: int, drops: bool
    ) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for scale in range(first, len(widths)):
            finer = None if scale == first and not drops else scale - 1
            connections = Connections(
                widths[scale],
                None if finer is None else widths[finer],
                growths[scale],
                factors[scale],
                None if finer is None else factors[finer],
            )
            self.scales.append(connections)

    def forward(self, maps: Maps) -> Maps:
        """Return the maps of the remaining scales, the finest first."""
        dropped = len(maps) - len(self.scales)
        pairs = zip(maps[dropped:], [None, *maps][dropped:], self.scales, strict=False)
        return [scale(own, finer) for own, finer, scale in pairs]


class Transition(nn.Module):
    """A 1×1 convolution of each scale."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(convolution(before, after, size=1) for before, after in pairs)

    def forward(self, maps: Maps) -> Maps:
        """Return the maps with fewer channels."""
        return [scale(own) for scale, own in zip(self.scales, maps, strict=True)]


@register_model
class MSDNet(MultiExit):
    """The paper's network for CIFAR: a stem, blocks, and a classifier of the coarsest map after each.

    The options are those of the published program.

    Args:
        num_classes, input_shape: C, and (channels, H, W).
        num_blocks: K, the number of exits.
        base: layers of the first block.
        step: layers of the others, as step_mode says.
        step_mode: `even` gives each of the others `step` layers, `lin_grow` step·i + 1 in block i from 0.
        channels: of the finest map after the stem, for a growth factor of 1.
        growth_rate: channels that a layer adds to the finest map, for a growth factor of 1.
        growth_factors: the width of each scale in multiples of these, the finest first; 1, 2, 4 … by default.
        bottleneck: whether a 1×1 convolution precedes each 3×3 one.
        bottleneck_factors: the largest width of the 1×1 convolutions at each scale, in multiples of the output of the
            3×3; the growth_factors by default.
        num_scales: S; by default as many as growth_factors, or 3, or fewer for images under 16 pixels.
        reduction: the fraction of channels kept where a scale is dropped, in (0, 1].
        stem: "cifar" or "imagenet"; by default "imagenet" for images of at least 96 pixels.
        gradient_equilibrium: balance the gradients of early and later exits (Li et al., ICCV 2019).

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_shape: tuple[int, ...],
        num_blocks: LayerCount = 5,
        base: LayerCount = 1,
        step: LayerCount = 1,
        step_mode: str = "lin_grow",
        channels: int = 16,
        growth_rate: int = 6,
        growth_factors: Sequence[int] | None = None,
        bottleneck: bool = True,
        bottleneck_factors: Sequence[int] | None = None,
        num_scales: int | None = None,
        reduction: float = 0.5,
        stem: str | None = None,
        gradient_equilibrium: bool = False,
    ) -> None:
        in_channels = image_channels("msdnet", input_shape)
        counts = {"base": base, "step": step, "channels": channels, "growth_rate": growth_rate}
        check_growth("msdnet", step_mode, reduction, num_blocks=num_blocks, **counts)
        if growth_rate < 2:  # half of it comes from the finer scale
            raise ConfigError(f"model 'msdnet' needs growth_rate of at least 2, got {growth_rate}")
        stem = choose_stem("msdnet", input_shape, stem)
        if num_scales is None and growth_factors:
            num_scales = len(growth_factors)
        scales = choose_scales("msdnet", "num_scales", input_shape, stem, num_scales)
        growth = check_factors("msdnet", "growth_factors", growth_factors or [2**s for s in range(scales)], scales)
        inner = check_factors("msdnet", "bottleneck_factors", bottleneck_factors or growth, scales)
        super().__init__(num_blocks)
        self.gradient_equilibrium = gradient_equilibrium
        factors: Sequence[int | None] = inner if bottleneck else [None] * scales
        later = [step * block + 1 if step_mode == "lin_grow" else step for block in range(1, num_blocks)]
        total, layer, first = base + sum(later), 0, 0

        def scaled(width: int) -> list[int]:
            return [width * factor for factor in growth]

        self.stem = MultiScaleStem(in_channels, scaled(channels), (2,) * (scales - 1), stem)
        self.blocks = nn.ModuleList()
        interval = -(-total // scales)
        coarsest = []
        for count in (base, *later):
            layers: list[nn.Module] = []
            for _ in range(count):
                before, first = first, max(layer // interval, scales - (total - layer))
                layers.append(Layer(scaled(channels), scaled(growth_rate), factors, first, drops=first > before))
                channels += growth_rate
                if layer > 0 and layer % interval == 0:
                    # Rounded before scaling, so that the scales' widths stay multiples of each other.
                    reduced = max(int(reduction * channels), 1)
                    layers.append(Transition(list(zip(scaled(channels), scaled(reduced), strict=True))[first:]))
                    channels = reduced
                layer += 1
            self.blocks.append(nn.Sequential(*layers))
            coarsest.append(channels * growth[-1])
        self.classifiers = nn.ModuleList(classifier(width, num_classes, stem) for width in coarsest)
        initialize(self)

    def begin(self, inputs: Tensor) -> Maps:
        """Return the stem's maps of images (B, channels, H, W), the finest first."""
        return self.stem(inputs)

    def advance(self, exit: int, state: Maps) -> tuple[Tensor, Maps]:
        """Return the logits (B, C) at `exit`, and the block's maps; no maps after the last exit."""
        maps: Maps = self.blocks[exit](state)
        own = maps[-1]
        if self.gradient_equilibrium:
            own, following = balance_gradients(own, exit, self.num_exits)
            maps = [*maps[:-1], following]
        return self.classifiers[exit](own), maps if exit + 1 < self.num_exits else []


@register_model
def msdnet_imagenet(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    step: LayerCount = 4,
    base: LayerCount | None = None,
    num_blocks: LayerCount = 5,
    gradient_equilibrium: bool = False,
) -> MSDNet:
    """Build the paper's network for ImageNet: 4 scales, 5 blocks of `step` layers (4, 6 or 7), the first of `base`.

    Args:
        num_classes, input_shape, num_blocks, gradient_equilibrium: as for `msdnet`.
        step: layers of each block.
        base: layers of the first block; default: step.
    """
    return MSDNet(
        num_classes=num_classes,
        input_shape=input_shape,
        num_blocks=num_blocks,
        base=step if base is None else base,
        step=step,
        step_mode="even",
        channels=32,
        growth_rate=16,
        growth_factors=(1, 2, 4, 4),
        stem="imagenet",
        gradient_equilibrium=gradient_equilibrium,
    )
