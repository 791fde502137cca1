"""Weights of the published MSDNet program in our MSDNet.

The authors' program in PyTorch, which the program of L2W-DEN is built on, has the same layers under other names:

    ours                                  theirs
    stem.scales.S.I                       blocks.0.0.layers.S.net.I (ImageNet's finest scale: blocks.0.0.layers.0.I)
    blocks.B.J.scales.S.down.I            blocks.B.J.layers.S.conv_down.net.I
    blocks.B.J.scales.S.normal.I          blocks.B.J.layers.S.conv_normal.net.I
    blocks.B.J.scales.S.I (transition)    blocks.B.J.m.S.net.I
    classifiers.K.L.I, classifiers.K.4    classifier.K.m.L.net.I, classifier.K.linear

In block 0 their J is one higher, because the stem is its first layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rayprune.errors import ConfigError
from rayprune.nn.models.msdnet import MSDNet

_LINEAR = 4  # the position of the linear layer in our classifiers
_COUNTER = "num_batches_tracked"  # of batch normalization; programs before PyTorch 0.4.1 did not save it


def reference_names(model: nn.Module) -> dict[str, str]:
    """Return our name → the published program's name of every parameter and buffer, in the order of our state_dict.

    Raises:
        ConfigError: the model is not an MSDNet.

    >>> names = reference_names(MSDNet(num_classes=100, input_shape=(3, 32, 32)))
    >>> names["blocks.0.0.scales.1.down.3.weight"], names["classifiers.2.4.bias"]
    ('blocks.0.1.layers.1.conv_down.net.3.weight', 'classifier.2.linear.bias')
    """
    if not isinstance(model, MSDNet):
        raise ConfigError(
            f"only the names of the published MSDNet are known, and the model is a {type(model).__name__}"
        )
    imagenet_stem = isinstance(model.stem.scales[0][-1], nn.MaxPool2d)  # type: ignore[index]
    return {name: _reference_name(name, imagenet_stem) for name in model.state_dict()}


def load_reference(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the published program's weights.

    Args:
        model: an MSDNet with the options that the weights were trained with.
        state: a state_dict of the program, or a checkpoint with one under "state_dict"; the prefix "module." of a
            DataParallel model is removed.

    Raises:
        ConfigError: the model is not an MSDNet, or a name or shape differs; the model is then unchanged.
    """
    names = reference_names(model)
    tensors: Mapping[str, Tensor] = state.get("state_dict", state)
    found = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    loaded = {}
    for name, own in model.state_dict().items():
        reference = names[name]
        if reference not in found and name.endswith(_COUNTER):
            loaded[name] = own
        elif reference not in found:
            raise ConfigError(
                f"the weights have no {reference!r}: build the model with the options they were trained with"
            )
        elif found[reference].shape != own.shape:
            shapes = f"{tuple(found[reference].shape)} in the weights and {tuple(own.shape)} in the model"
            raise ConfigError(f"{reference!r} is {shapes}: build the model with the options they were trained with")
        else:
            loaded[name] = found.pop(reference)
    if unknown := next((name for name in found if name not in names.values()), None):
        raise ConfigError(f"the model has no {unknown!r}: build it with the options that the weights were trained with")
    model.load_state_dict(loaded)


def _reference_name(name: str, imagenet_stem: bool) -> str:
    part, first, rest = name.split(".", 2)
    if part == "stem":
        scale, inner = rest.split(".", 1)
        return f"blocks.0.0.layers.{scale}.{'' if imagenet_stem and scale == '0' else 'net.'}{inner}"
    if part == "classifiers":
        layer, inner = rest.split(".", 1)
        return f"classifier.{first}.{'linear' if layer == str(_LINEAR) else f'm.{layer}.net'}.{inner}"
    found = re.fullmatch(r"(\d+)\.scales\.(\d+)\.(?:(down|normal)\.)?(.*)", rest)
    assert found is not None, name
    position, scale, connection, inner = found.groups()
    number = int(position) + (first == "0")
    if connection is None:
        return f"blocks.{first}.{number}.m.{scale}.net.{inner}"
    return f"blocks.{first}.{number}.layers.{scale}.conv_{connection}.net.{inner}"
