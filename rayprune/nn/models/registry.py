"""Models by name: built-in ones, torchvision's, and functions of the user's.

Shapes: C channels, H height, W width, F features; an input shape is that of one sample as the model sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from rayprune.core.references import call_object, closest, is_reference, load_object
from rayprune.core.validation import mismatch, short_repr, type_hints
from rayprune.errors import ConfigError

ModelBuilder = Callable[..., nn.Module]
MODELS: dict[str, ModelBuilder] = {}
_B = TypeVar("_B", bound=ModelBuilder)
_GIVEN = {"num_classes", "input_shape"}  # what every builder takes; they are no options

# With their auxiliary heads they return named tuples in training, where train steps expect logits.
AUXILIARY_HEADS = ("googlenet", "inception_v3")


def register_model(builder: _B) -> _B:
    """Add a function or class of num_classes, input_shape and options to MODELS, under its name in lower case."""
    MODELS[builder.__name__.lower()] = builder
    return builder


def build_model(name: str, *, num_classes: int, input_shape: tuple[int, ...], **options: Any) -> nn.Module:
    """Build a classifier from (batch, *input_shape) to (batch, num_classes) logits, with new random weights.

    Args:
        name: a key of MODELS, "torchvision:NAME", or "module:function" or "path/to/file.py:function" of a function
            that takes num_classes, input_shape and the options.
        num_classes: at least 1.
        input_shape: (C, H, W) of images or (F,) of features.
        **options: passed to the builder.

    Raises:
        ConfigError: an unknown name, an option that the builder does not take, an input shape that the model cannot
            take, or a function that raises an error or does not return a module.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, got {num_classes}")
    if len(input_shape) not in (1, 3) or min(input_shape) < 1:
        raise ConfigError(f"input_shape must be (channels, height, width) or (features,), got {tuple(input_shape)}")
    if name.startswith("torchvision:"):
        return _build_torchvision(name.removeprefix("torchvision:"), num_classes, input_shape, options)
    if is_reference(name):
        builder = load_object(name)
        if not callable(builder):
            raise ConfigError(
                f"model {name!r} is of type {type(builder).__name__}, not a function: name one that "
                "returns a torch.nn.Module"
            )
    elif name in MODELS:
        builder = MODELS[name]
    else:
        raise ConfigError(f"unknown model {name!r}: {closest(name, MODELS)}, or torchvision:NAME, or module:function")
    arguments = {"num_classes": num_classes, "input_shape": tuple(input_shape), **options}
    _check_arguments(name, builder, arguments)
    if is_reference(name):
        model = call_object(f"model {name!r}", builder, **arguments)
    else:
        model = _build_if_it_fits(name, partial(builder, **arguments))
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def image_channels(name: str, input_shape: tuple[int, ...]) -> int:
    """Return C of an image's shape (C, H, W).

    Raises:
        ConfigError: the shape is not that of an image.
    """
    if len(input_shape) != 3:
        raise ConfigError(
            f"model {name!r} takes images (channels, height, width), got input shape {tuple(input_shape)}: "
            "for numeric features use 'mlp'"
        )
    return input_shape[0]


def _check_arguments(name: str, builder: ModelBuilder, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(builder)
    except ValueError:  # a builtin without a signature checks its own arguments
        return
    parameters = signature.parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        valid = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
        for argument in arguments:
            if argument not in valid:
                cure = "add this parameter" if argument in _GIVEN else closest(argument, set(valid) - _GIVEN)
                raise ConfigError(f"model {name!r} takes no {argument!r}: {cure}")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"model {name!r} can't be called ({error}): correct the options under model") from None
    if name not in MODELS:
        return  # the user's own function knows its options
    hints = type_hints(builder.__init__ if isinstance(builder, type) else builder)  # type: ignore[misc]
    for argument, value in arguments.items():
        if problem := mismatch(value, hints.get(argument, Any)):
            raise ConfigError(f"model.{argument} = {short_repr(value)}: {problem}")


def _build_if_it_fits(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model after its weights have been counted; weights on the device `meta` take no memory and no draws."""
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        num_bytes = sum(weight.nbytes for weight in build().parameters())
    free = psutil.virtual_memory().available
    if num_bytes > free:
        raise ConfigError(
            f"model {name!r} has weights of {num_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free: "
            "lower the options under model, or data.num_classes"
        )
    return build()


def _build_torchvision(name: str, num_classes: int, input_shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    from torchvision import models  # takes a second or more

    channels = image_channels(f"torchvision:{name}", input_shape)
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        raise ConfigError(f"unknown torchvision model {name!r}: {closest(name, classifiers)}")
    if name in AUXILIARY_HEADS:
        options = {"aux_logits": False, "init_weights": True, **options}
    try:
        keys = {"weights": None, "num_classes": num_classes, **options}
        model = _build_if_it_fits(f"torchvision:{name}", partial(models.get_model, name, **keys))
    except TypeError as error:
        raise ConfigError(
            f"model 'torchvision:{name}' can't be built ({error}): correct the options under model"
        ) from error
    if channels != 3:
        _replace_first_convolution(model, channels)
    return model


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    """Replace the convolution that reads the image by one with this many input channels."""
    path, old = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        dilation=old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
