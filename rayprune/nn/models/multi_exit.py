"""Networks with several exits: what they return, and what they offer to stop early.

A network is multi-exit when its forward returns a list or a tuple of K ≥ 2 logit tensors (B, C), the earliest exit
first. That suffices to train and to evaluate it, so that any `nn.Module` may be one without importing this module. To
stop early it also has `num_exits`, `begin` and `advance`, of `MultiExitModel`; `MultiExit` builds the forward from
them.

A state holds what later exits still need: a tensor, or lists and tuples, nested as they may be, of tensors whose first
axis is the batch, so that rows which have left can be dropped between exits.

Shapes: B batch, C classes, K exits.

What the multi-scale networks with exits are built of: stem, convolutions, classifier, gradient equilibrium.

The convolutions, stems and classifiers are those of MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844), which RANet
shares. Gradient equilibrium is that of Li et al.: Improved Techniques for Training Adaptive Deep Networks, ICCV 2019,
arXiv 1908.06294. Deviation: a classifier averages its whole map, where the published ones average windows of 2×2,
which is the same for the images that they take (32×32, 224×224) and works for others.

Shapes: B batch, C classes, K exits, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rayprune.errors import ConfigError

CURE = "a network with exits returns a list of at least 2 logit tensors (batch, classes), the earliest exit first"


@runtime_checkable
class MultiExitModel(Protocol):
    """What an exit-by-exit evaluation calls; exits count from 0."""

    num_exits: int

    def begin(self, inputs: Any) -> Any:
        """Give the state before exit 0 of a batch of inputs."""
        ...

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Give the logits (B, C) at `exit`, and the state that exit + 1 starts from."""
        ...


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
        """Give the state before exit 0: the inputs themselves, unless a subclass says otherwise."""
        return inputs

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Give the logits (B, C) at `exit`, and the state that exit + 1 starts from."""
        raise TypeError(f"{type(self).__name__} must define advance(exit, state) -> (logits, state)")

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Give the logits (B, C) of all exits, the earliest first."""
        state = self.begin(inputs)
        exits = []
        for exit in range(self.num_exits):
            logits, state = self.advance(exit, state)
            exits.append(logits)
        return exits


def is_multi_exit(output: object) -> bool:
    """Tell whether a network's output is one of exits: a plain list or tuple, not a named tuple of other things.

    >>> is_multi_exit([1, 2]), is_multi_exit(1)
    (True, False)
    """
    return isinstance(output, list | tuple) and not hasattr(output, "_fields")


def as_exits(output: object, num_classes: int | None = None) -> list[Tensor]:
    """Check what a network with exits returned.

    Args:
        output: what its forward gave.
        num_classes: C, where it is known.

    Returns:
        The logits of the K exits, each (B, C), the earliest first.

    Raises:
        ConfigError: fewer than 2 exits, something that is no tensor (batch, classes), exits of different batches or
            numbers of classes, or other than num_classes.

    >>> import torch
    >>> [tuple(logits.shape) for logits in as_exits((torch.zeros(4, 3), torch.zeros(4, 3)))]
    [(4, 3), (4, 3)]
    >>> as_exits([torch.zeros(4, 3), torch.zeros(4, 5)])
    Traceback (most recent call last):
    rayprune.errors.ConfigError: the exits' logits differ in shape, (4, 3) and (4, 5): every exit must \
score the same batch and classes
    """
    if isinstance(output, Tensor):
        raise ConfigError(f"the model returns one tensor {tuple(output.shape)}: {CURE}")
    if not isinstance(output, list | tuple) or not is_multi_exit(output):
        raise ConfigError(f"the model returns a {type(output).__name__}: {CURE}")
    if len(output) < 2:
        raise ConfigError(f"the model returns a list of {len(output)}: {CURE}")
    exits: list[Tensor] = []
    for exit, logits in enumerate(output):
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ConfigError(f"exit {exit} of the model gives {found}: {CURE}")
        exits.append(logits)
    shapes = [tuple(logits.shape) for logits in exits]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise ConfigError(
            f"the exits' logits differ in shape, {shapes[0]} and {other}: "
            "every exit must score the same batch and classes"
        )
    if num_classes is not None and shapes[0][1] != num_classes:
        raise ConfigError(
            f"the exits score {shapes[0][1]} classes, the data have {num_classes}: build the model for them"
        )
    return exits


CLASSIFIER_CHANNELS = 128
IMAGENET_SIDE = 96  # from here on images are large enough to lose three quarters of each side in the stem
SMALLEST_MAP = 4  # the side below which no further scale is taken unless asked for
STEMS = ("cifar", "imagenet")


def convolution(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Build a convolution without bias, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def bottlenecked(in_channels: int, out_channels: int, factor: int | None, stride: int = 1) -> nn.Sequential:
    """Build a 3×3 convolution after a 1×1 one to at most factor·out_channels; a factor of None leaves that out."""
    if factor is None:
        return convolution(in_channels, out_channels, stride=stride)
    inner = min(in_channels, factor * out_channels)
    return nn.Sequential(*convolution(in_channels, inner, size=1), *convolution(inner, out_channels, stride=stride))


class MultiScaleStem(nn.Module):
    """The first maps, one a scale and each made from the finer one before it.

    Args:
        in_channels: of the images.
        widths: channels of every scale, the finest first.
        strides: of all scales but the finest.
        stem: "cifar", a 3×3 convolution, or "imagenet", a 7×7 one and max-pooling that both halve the sides.
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
        """Give the maps (B, width, H, W) of images (B, channels, H, W), the finest first."""
        maps = []
        for scale in self.scales:
            images = scale(images)
            maps.append(images)
        return maps


def classifier(in_channels: int, num_classes: int, stem: str) -> nn.Sequential:
    """Build two 3×3 convolutions of stride 2, the mean over the map, and a linear layer, to logits (B, C).

    The convolutions have 128 channels after the stem "cifar" and as many as they read after "imagenet".
    """
    width = in_channels if stem == "imagenet" else CLASSIFIER_CHANNELS
    return nn.Sequential(
        convolution(in_channels, width, stride=2),
        convolution(width, width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def initialise(model: nn.Module) -> None:
    """Draw weights as published: convolutions from N(0, 2/(size²·out_channels)), a linear layer's bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class _ScaleGradient(torch.autograd.Function):
    """The identity whose derivative is a factor, in reverse mode and, as L2W's meta-gradient needs, in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, factor: float) -> Tensor:
        return inputs.view_as(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        scaled: Tensor = tangents[0] * ctx.factor
        return scaled


def balance_gradients(features: Tensor, exit: int, num_exits: int) -> tuple[Tensor, Tensor]:
    """Give an exit's features twice, for its classifier and for all that follows, with their gradients in equilibrium.

    The features' gradient is (g_classifier + (K − exit − 1)·g_following) / (K − exit): both weigh as if every one of
    the K − exit losses behind it had its own equal share.

    >>> x = torch.ones(1, requires_grad=True)
    >>> own, following = balance_gradients(x, exit=1, num_exits=4)
    >>> (5 * own + 7 * following).backward()
    >>> x.grad  # (5 + 2·7) / 3
    tensor([6.3333])
    """
    own = _ScaleGradient.apply(features, 1 / (num_exits - exit))  # type: ignore[no-untyped-call]
    return own, _ScaleGradient.apply(own, float(num_exits - exit - 1))  # type: ignore[no-untyped-call]


def choose_stem(name: str, input_shape: tuple[int, ...], stem: str | None) -> str:
    """Give the stem asked for, or the one for images (channels, H, W) of this size.

    >>> choose_stem("msdnet", (3, 32, 32), None), choose_stem("msdnet", (3, 224, 224), None)
    ('cifar', 'imagenet')
    """
    if stem is None:
        return "imagenet" if min(input_shape[1:]) >= IMAGENET_SIDE else "cifar"
    if stem not in STEMS:
        raise ConfigError(f"model {name!r} has no stem {stem!r}: choose one of {', '.join(STEMS)}, or leave it out")
    return stem


def choose_scales(name: str, option: str, input_shape: tuple[int, ...], stem: str, asked: int | None) -> int:
    """Give the number of scales asked for, or up to 3, as long as the coarsest map keeps sides of at least 4.

    Args:
        name, option: the model and its option, for the error.
        input_shape: (channels, H, W).
        stem: of STEMS.
        asked: at least 1, or None for up to 3.

    Raises:
        ConfigError: so many scales would halve a map of one pixel.

    >>> [choose_scales("msdnet", "num_scales", (1, side, side), "cifar", None) for side in (4, 8, 28, 64)]
    [1, 2, 3, 3]
    """
    side = min(input_shape[1:])
    if stem == "imagenet":
        side = -(-side // 4)
    if asked is None:
        return next((scales for scales in (3, 2) if side >> (scales - 1) >= SMALLEST_MAP), 1)
    if not isinstance(asked, int) or not 1 <= asked <= side.bit_length():
        raise ConfigError(
            f"model {name!r} can't have {asked} scales for images of {input_shape[1]}×{input_shape[2]}, whose map of "
            f"side {side} halves {side.bit_length() - 1} times: give {option} of 1 to {side.bit_length()} scales"
        )
    return asked


def check_growth(name: str, step_mode: str, reduction: float, **counts: int) -> None:
    """Refuse an unknown step_mode, a reduction outside (0, 1], and counts that are not whole or below 1.

    Raises:
        ConfigError: with the option's name, its value and what is allowed.
    """
    if step_mode not in ("even", "lin_grow"):
        raise ConfigError(f"model {name!r} has no step_mode {step_mode!r}: choose even or lin_grow")
    if not 0 < reduction <= 1:
        raise ConfigError(f"model {name!r} needs a reduction above 0 and at most 1, got {reduction}")
    for option, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"model {name!r} needs {option} of at least 1, a whole number, got {value!r}")


def check_factors(name: str, option: str, factors: Sequence[int], num_scales: int) -> tuple[int, ...]:
    """Give the factors, of which there must be one a scale, each at least 1.

    Raises:
        ConfigError: with the option's name and value.
    """
    checked = check_list(name, option, factors)
    if len(checked) != num_scales or min(checked) < 1:
        raise ConfigError(
            f"model {name!r} needs {option} of {num_scales} numbers of at least 1, one a scale, got {list(checked)}"
        )
    return checked


def check_list(name: str, option: str, values: Sequence[int]) -> tuple[int, ...]:
    """Give whole numbers as a tuple.

    Raises:
        ConfigError: something else than a list of them.
    """
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise ConfigError(f"model {name!r} needs {option} as a list of whole numbers like [1, 2], got {values!r}")
    return tuple(values)
