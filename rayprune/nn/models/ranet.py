"""RANet: sub-networks from low to high resolution, each of which reuses the features of the one before.

Yang, Han, Chen, Song, Dai, Huang: Resolution Adaptive Networks for Efficient Inference, CVPR 2020, arXiv 2003.07326.
Layers and counts are those of the published program. Sub-network i has num_blocks + block_step·i blocks: first as many
fusion blocks as its predecessor has blocks, each reading the features of its counterpart there, then dense blocks with
a classifier each. A fusion block whose number is among the last (scale − 1) block counts of the predecessors halves its
map, so that every classifier reads a map of the lowest resolution. Deviations: classifiers average their whole map (see
`multi_scale`); gradient equilibrium, which its authors did not use, balances the map that a classifier reads.

Shapes: B batch, C classes, K exits, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from rayprune.nn.models.multi_exit import MultiExit
from rayprune.nn.models.multi_scale import (
    MultiScaleStem,
    balance_gradients,
    check_factors,
    check_growth,
    choose_scales,
    choose_stem,
    classifier,
    initialise,
)
from rayprune.nn.models.ranet_blocks import Maps, SubNetwork, Widths
from rayprune.nn.models.registry import image_channels, register_model

# The map after the last block, the stem's maps for the sub-networks to come, and, for each block so far of the current
# sub-network, the maps that its counterpart in the next one reads.
State = tuple[Tensor, Maps, list[Maps]]


class RANet(MultiExit):
    """Stem, sub-networks from low to high resolution, and a classifier after each dense block.

    Args:
        block_counts: of every sub-network, increasing.
        num_layers: of every block of the last sub-network; those of the others have as many as their counterparts.
        scales: of every sub-network, not decreasing: its resolution doubles from one value to the next.
        stem_channels: of the stem's map for every sub-network.
        widths: of every sub-network.
        in_channels, num_classes, stem, gradient_equilibrium: see `ranet`.
    """

    def __init__(
        self,
        block_counts: Sequence[int],
        num_layers: Sequence[int],
        scales: Sequence[int],
        stem_channels: Sequence[int],
        widths: Sequence[Widths],
        *,
        in_channels: int,
        num_classes: int,
        stem: str,
        gradient_equilibrium: bool,
    ) -> None:
        super().__init__(block_counts[-1])
        self.gradient_equilibrium = gradient_equilibrium
        strides = [2 if finer > own else 1 for finer, own in zip(scales[:0:-1], scales[-2::-1], strict=True)]
        self.stem = MultiScaleStem(in_channels, stem_channels[::-1], strides, stem)
        self.sub_networks = nn.ModuleList()
        self.owners: list[int] = []  # the sub-network of every exit; its block there has the exit's own number
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
        self.classifiers = nn.ModuleList(classifier(channels, num_classes, stem) for channels in outputs)
        initialise(self)

    def begin(self, inputs: Tensor) -> State:
        """Give the stem's maps of images (B, channels, H, W)."""
        lowest, *others = reversed(self.stem(inputs))
        return lowest, others, []

    def advance(self, exit: int, state: State) -> tuple[Tensor, State]:
        """Give the logits (B, C) at `exit`, and what the next one needs."""
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
            # Without a transition the next sub-network reads this very map too.
            inside = [*(following if each is own else each for each in inside)]
        else:
            for_classifier = following = own
        # The last sub-network's inner maps are nobody's: rows are not to be selected from them.
        maps = [*maps, inside] if stem else []
        return self.classifiers[exit](for_classifier), (following, stem, maps)


@register_model
def ranet(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    num_blocks: int = 2,
    block_step: int = 2,
    step: int = 2,
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
) -> RANet:
    """Build the paper's network for CIFAR with 6 exits; the options are those of the published program.

    Args:
        num_classes, input_shape: C, and (channels, H, W).
        num_blocks, block_step: blocks of the first sub-network, and how many more each later one has; the last has K.
        step, step_mode: layers of a block: `step` each ("even"), or step·i in block i from 1 ("lin_grow").
        scales: of every sub-network, from 1, rising by 1 where the resolution doubles and by 0 where it stays; 1, 2, 3
            by default, or fewer for images under 16 pixels.
        channels, growth_rate: of the stem's map, and added by a layer, where the growth factor is 1.
        growth_factors: how many times wider each sub-network is; by default each halves when the resolution doubles.
        compress_factor: the share of a fusion's channels that come from the sub-network before, in (0, 1).
        bottleneck, bottleneck_factors, reduction, stem, gradient_equilibrium: as for `msdnet`.

    Raises:
        ValueError: an option out of its range.
    """
    in_channels = image_channels("ranet", input_shape)
    check_growth(
        "ranet", step_mode, reduction, num_blocks=num_blocks, block_step=block_step, step=step, channels=channels
    )
    stem = choose_stem("ranet", input_shape, stem)
    scales = _checked_scales(scales, input_shape, stem)
    growth_factors = growth_factors or [2 ** (scales[-1] - scale) for scale in scales]
    growth = check_factors("ranet", "growth_factors", growth_factors, len(scales))
    factors = check_factors("ranet", "bottleneck_factors", bottleneck_factors or growth, len(scales))
    block_counts = [num_blocks + block_step * index for index in range(len(scales))]
    return RANet(
        block_counts,
        [step * number if step_mode == "lin_grow" else step for number in range(1, block_counts[-1] + 1)],
        scales,
        [channels * factor for factor in growth],
        _widths(
            [growth_rate * factor for factor in growth], factors if bottleneck else None, compress_factor, reduction
        ),
        in_channels=in_channels,
        num_classes=num_classes,
        stem=stem,
        gradient_equilibrium=gradient_equilibrium,
    )


@register_model
def ranet_imagenet(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    step: int = 8,
    channels: int = 32,
    growth_rate: int = 16,
    growth_factors: Sequence[int] = (4, 2, 2, 1),
    gradient_equilibrium: bool = False,
) -> nn.Module:
    """Build the paper's network for ImageNet: 4 resolutions, 8 exits."""
    return ranet(
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
    """Give a scale a sub-network: those asked for, or as many as the images have room for."""
    if scales is None:
        return tuple(range(1, choose_scales("ranet", "scales", input_shape, stem, None) + 1))
    rises = [later - earlier for earlier, later in pairwise(scales)]
    if not scales or scales[0] != 1 or any(rise not in (0, 1) for rise in rises):
        raise ValueError(f"model 'ranet' needs scales that start at 1 and rise by 0 or 1, got {list(scales)}")
    choose_scales("ranet", "scales", input_shape, stem, scales[-1])
    return tuple(scales)


def _widths(
    growths: Sequence[int], factors: Sequence[int] | None, compress_factor: float, reduction: float
) -> list[Widths]:
    """Give the widths of every sub-network, whose fusions take at least 1 channel of either side."""
    if not 0 < compress_factor < 1:
        raise ValueError(f"model 'ranet' needs a compress_factor above 0 and below 1, got {compress_factor}")
    if min(growths) * compress_factor < 1:
        raise ValueError(
            f"model 'ranet' takes {compress_factor:g} of {min(growths)} channels from the sub-network before, which is "
            "none: raise growth_rate or compress_factor"
        )
    inner: Sequence[int | None] = factors or [None] * len(growths)
    # The first sub-network has no fusions, so what it finds before itself is of no matter.
    return [
        Widths(growth, own, low, compress_factor, reduction)
        for growth, own, low in zip(growths, inner, [None, *inner], strict=False)
    ]
