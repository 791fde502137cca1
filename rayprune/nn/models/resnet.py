"""Residual networks for small images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385. The stages are the
paper's. The stem is the 3×3 convolution of its CIFAR networks (section 4.2) without max-pooling, in resnet18, 34 and 50
too, so that an 8×8 image still has an 8×8 map after it. Deviations: shortcuts that change the shape are projections
(the paper's option B) in resnet8 and resnet56 as well; a bottleneck strides in its 3×3 convolution, as torchvision's
does.

Shapes: B batch, C classes, H height, W width, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from rayprune.nn.models.registry import image_channels, register_model

WIDTHS = (64, 128, 256, 512)  # of the four stages for ImageNet


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, width, H/stride, W/stride) of (B, in_channels, H, W)."""
        residual = functional.relu(self.bn1(self.conv1(inputs)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(inputs), inplace=True)


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a four times wider 1×1 convolution, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _convolution(in_channels, width, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, out_channels, 1, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, 4·width, H/stride, W/stride) of (B, in_channels, H, W)."""
        residual = functional.relu(self.bn1(self.conv1(inputs)), inplace=True)
        residual = functional.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        return functional.relu(residual + self.shortcut(inputs), inplace=True)


class ResNet(nn.Module):
    """A 3×3 stem, stages that halve the map, average pooling, and the classifier `fc`."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: Sequence[int],
        widths: Sequence[int],
        *,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, widths[0], 3, 1)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        stages = []
        for stage, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            blocks = []
            for position in range(count):
                blocks.append(block(channels, width, stride=2 if stage > 0 and position == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> Tensor:
        """Return the embedding before the classifier, (B, D), of images (B, channels, H, W)."""
        maps = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.stages(maps).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, channels, H, W)."""
        return self.fc(self.features(images))


@register_model
def resnet8(*, num_classes: int, input_shape: tuple[int, ...]) -> ResNet:
    """Build the 8-layer network of the CIFAR family, n = 1: widths 16, 32, 64."""
    channels = image_channels("resnet8", input_shape)
    return ResNet(BasicBlock, (1, 1, 1), (16, 32, 64), in_channels=channels, num_classes=num_classes)


@register_model
def resnet56(*, num_classes: int, input_shape: tuple[int, ...]) -> ResNet:
    """Build ResNet-56 of the CIFAR family, n = 9: widths 16, 32, 64."""
    channels = image_channels("resnet56", input_shape)
    return ResNet(BasicBlock, (9, 9, 9), (16, 32, 64), in_channels=channels, num_classes=num_classes)


@register_model
def resnet18(*, num_classes: int, input_shape: tuple[int, ...]) -> ResNet:
    """Build ResNet-18 with the stem for small images."""
    channels = image_channels("resnet18", input_shape)
    return ResNet(BasicBlock, (2, 2, 2, 2), WIDTHS, in_channels=channels, num_classes=num_classes)


@register_model
def resnet34(*, num_classes: int, input_shape: tuple[int, ...]) -> ResNet:
    """Build ResNet-34 with the stem for small images."""
    channels = image_channels("resnet34", input_shape)
    return ResNet(BasicBlock, (3, 4, 6, 3), WIDTHS, in_channels=channels, num_classes=num_classes)


@register_model
def resnet50(*, num_classes: int, input_shape: tuple[int, ...]) -> ResNet:
    """Build ResNet-50 with the stem for small images."""
    channels = image_channels("resnet50", input_shape)
    return ResNet(Bottleneck, (3, 4, 6, 3), WIDTHS, in_channels=channels, num_classes=num_classes)


def _convolution(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(_convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
