"""Networks with several exits: their interface, and the blocks that MSDNet and RANet are built of.

A network is multi-exit when its forward returns a list or a tuple of K ≥ 2 logit tensors (B, C), the earliest exit
first. That is enough to train and evaluate it, so any `nn.Module` can be one without importing this module. To stop
early it also needs `num_exits`, `begin` and `advance`, the methods of `MultiExitModel`; `MultiExit` builds the forward
from them.

A state holds what later exits still need: a tensor whose first axis is the batch, or nested lists and tuples of such
tensors, so that rows which have left can be dropped between exits.

The stems, convolutions and classifiers are those of MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844), which RANet
shares. Gradient equilibrium is that of Li et al.: Improved Techniques for Training Adaptive Deep Networks, ICCV 2019,
arXiv 1908.06294. Deviation: a classifier averages its whole map, where the published ones average windows of 2×2. That
is the same for their images (32×32, 224×224), and works for others.

Shapes: B batch, C classes, K exits, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from rayprune.core.validation import AtMost
from rayprune.errors import ConfigError

CLASSIFIER_CHANNELS = 128
IMAGENET_SIDE = 96  # the smallest image that can lose three quarters of each side in the stem
SMALLEST_MAP = 4  # the smallest side of a map that a default number of scales leads to
STEMS = ("cifar", "imagenet")
# Later layers read all earlier ones: the network grows with the square of its layers.
LayerCount = Annotated[int, AtMost(100)]


@runtime_checkable
class MultiExitModel(Protocol):
    """A network that can run exit by exit; exits count from 0."""

    num_exits: int

    def begin(self, inputs: Any) -> Any:
        """Return the state before exit 0 for a batch of inputs."""
        ...

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Return the logits (B, C) at `exit`, and the state from which exit + 1 starts."""
        ...


def check_stepwise(model: nn.Module) -> MultiExitModel:
    """Return a model as one that can run exit by exit.

    Raises:
        ConfigError: the model lacks an attribute of MultiExitModel.
    """
    missing = [name for name in ("num_exits", "begin", "advance") if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} can't be run exit by exit, it lacks {', '.join(missing)}: add num_exits, "
            "begin(inputs) -> state and advance(exit, state) -> (logits, state)"
        )
    return cast(MultiExitModel, model)


class MultiExit(nn.Module):
    """A network whose forward is its `begin` and all its `advance`s.

    Args:
        num_exits: K, at least 2.
    """

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        if num_exits < 2:
            raise ConfigError(f"a network with exits has at least 2, not {num_exits}: give it more blocks")
        self.num_exits = num_exits

    def begin(self, inputs: Tensor) -> Any:
        """Return the state before exit 0: the inputs, unless a subclass overrides this."""
        return inputs

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Return the logits (B, C) at `exit`, and the state from which exit + 1 starts."""
        raise TypeError(f"{type(self).__name__} must define advance(exit, state) -> (logits, state)")

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Return the logits (B, C) of all exits, the earliest first."""
        state = self.begin(inputs)
        exits = []
        for exit in range(self.num_exits):
            logits, state = self.advance(exit, state)
            exits.append(logits)
        return exits


def balance_gradients(features: Tensor, exit: int, num_exits: int) -> tuple[Tensor, Tensor]:
    """Return an exit's features twice, for its classifier and for all that follows, with gradients in equilibrium.

    The features' gradient is (g_classifier + (K − exit − 1)·g_following) / (K − exit): each of the K − exit losses
    from here on has an equal share in it.

    >>> x = torch.ones(1, requires_grad=True)
    >>> own, following = balance_gradients(x, exit=1, num_exits=4)
    >>> (5 * own + 7 * following).backward()
    >>> x.grad  # (5 + 2·7) / 3
    tensor([6.3333])
    """
    own = _scale_gradient(features, 1 / (num_exits - exit))
    return own, _scale_gradient(own, num_exits - exit - 1)


def _scale_gradient(inputs: Tensor, factor: float) -> Tensor:
    """Return the inputs, with their derivative scaled in reverse mode and in forward mode (L2W's meta-gradient)."""
    constant = inputs.detach()
    return torch.add(constant, inputs - constant, alpha=factor)


def convolution(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Build a convolution without bias, batch normalization and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def bottlenecked(in_channels: int, out_channels: int, factor: int | None, stride: int = 1) -> nn.Sequential:
    """Build a 3×3 convolution, after a 1×1 one to at most factor·out_channels unless the factor is None."""
    if factor is None:
        return convolution(in_channels, out_channels, stride=stride)
    inner = min(in_channels, factor * out_channels)
    return nn.Sequential(*convolution(in_channels, inner, size=1), *convolution(inner, out_channels, stride=stride))


class MultiScaleStem(nn.Module):
    """The first map of every scale, each computed from the finer one.

    Args:
        in_channels: of the images.
        widths: channels of every scale, the finest first.
        strides: of all scales but the finest.
        stem: "cifar", a 3×3 convolution, or "imagenet", a 7×7 one and max-pooling, each of which halves the sides.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], strides: Sequence[int], stem: str) -> None:
        super().__init__()
        if stem == "imagenet":
            finest = nn.Sequential(
                nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3),
                nn.BatchNorm2d(widths[0]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        else:
            finest = convolution(in_channels, widths[0])
        pairs = zip(widths[:-1], widths[1:], strides, strict=True)
        self.scales = nn.ModuleList([finest, *(convolution(finer, own, stride=stride) for finer, own, stride in pairs)])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps (B, width, H, W) of images (B, channels, H, W), the finest first."""
        maps = []
        for scale in self.scales:
            images = scale(images)
            maps.append(images)
        return maps


def classifier(in_channels: int, num_classes: int, stem: str) -> nn.Sequential:
    """Build two 3×3 convolutions of stride 2, the mean over the map, and a linear layer, to logits (B, C).

    The convolutions have 128 channels after the stem "cifar", and as many as their input after "imagenet".
    """
    width = in_channels if stem == "imagenet" else CLASSIFIER_CHANNELS
    return nn.Sequential(
        convolution(in_channels, width, stride=2),
        convolution(width, width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def initialize(model: nn.Module) -> None:
    """Draw weights as published: convolutions from N(0, 2/(size²·out_channels)), a linear layer's bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def choose_stem(name: str, input_shape: tuple[int, ...], stem: str | None) -> str:
    """Return the requested stem, or by default the one for images (channels, H, W) of this size.

    >>> choose_stem("msdnet", (3, 32, 32), None), choose_stem("msdnet", (3, 224, 224), None)
    ('cifar', 'imagenet')
    """
    if stem is None:
        return "imagenet" if min(input_shape[1:]) >= IMAGENET_SIDE else "cifar"
    if stem not in STEMS:
        raise ConfigError(f"model {name!r} has no stem {stem!r}: choose one of {', '.join(STEMS)}, or leave it out")
    return stem


def choose_scales(name: str, option: str, input_shape: tuple[int, ...], stem: str, requested: int | None) -> int:
    """Return the requested number of scales, or by default up to 3 while the coarsest map keeps sides of at least 4.

    Args:
        name, option: the model and its option, for the error.
        input_shape: (channels, H, W).
        stem: of STEMS.
        requested: at least 1, or None for the default.

    Raises:
        ConfigError: so many scales would halve a map of one pixel.

    >>> [choose_scales("msdnet", "num_scales", (1, side, side), "cifar", None) for side in (4, 8, 28, 64)]
    [1, 2, 3, 3]
    """
    side = min(input_shape[1:])
    if stem == "imagenet":
        side = -(-side // 4)
    if requested is None:
        return next((scales for scales in (3, 2) if side >> (scales - 1) >= SMALLEST_MAP), 1)
    if not isinstance(requested, int) or not 1 <= requested <= side.bit_length():
        most = side.bit_length()
        raise ConfigError(
            f"model {name!r} can't have {requested} scales for images of {input_shape[1]}×{input_shape[2]}: a map of "
            f"side {side} can be halved {most - 1} times, so give {option} of 1 to {most} scales"
        )
    return requested


def check_growth(name: str, step_mode: str, reduction: float, **counts: int) -> None:
    """Refuse an unknown step_mode, a reduction outside (0, 1], and counts that are not integers of at least 1.

    Raises:
        ConfigError: with the option's name, its value and the allowed range.
    """
    if step_mode not in ("even", "lin_grow"):
        raise ConfigError(f"model {name!r} has no step_mode {step_mode!r}: choose even or lin_grow")
    if not 0 < reduction <= 1:
        raise ConfigError(f"model {name!r} needs a reduction above 0 and at most 1, got {reduction}")
    for option, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"model {name!r} needs {option} of at least 1, a whole number, got {value!r}")


def check_factors(name: str, option: str, factors: Sequence[int], num_scales: int) -> tuple[int, ...]:
    """Return the factors of the scales as a tuple: one per scale, each at least 1.

    Raises:
        ConfigError: with the option's name and value.
    """
    if len(factors) != num_scales or min(factors) < 1:
        raise ConfigError(
            f"model {name!r} needs {option} of {num_scales} numbers of at least 1, one per scale, got {list(factors)}"
        )
    return tuple(factors)
