"""A multilayer perceptron for numeric features.

Shapes: B batch, C classes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from rayprune.errors import ConfigError
from rayprune.nn.models.registry import register_model


@register_model
class MLP(nn.Module):
    """Hidden layers with ReLU, of the widths in `hidden`, and a linear classifier `fc`; inputs are flattened.

    Args:
        num_classes: C.
        input_shape: of a sample, of any number of axes.
        hidden: widths of the hidden layers, each at least 1; none for a linear model.

    Raises:
        ConfigError: a width is below 1.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], hidden: Sequence[int] = (256, 256)) -> None:
        if any(width < 1 for width in hidden):
            raise ConfigError(f"hidden must be widths of at least 1, got {tuple(hidden)}")
        super().__init__()
        layers: list[nn.Module] = []
        num_features = math.prod(input_shape)
        for width in hidden:
            layers += [nn.Linear(num_features, width), nn.ReLU(inplace=True)]
            num_features = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(num_features, num_classes)

    def features(self, inputs: Tensor) -> Tensor:
        """Return the embedding before the classifier, (B, last hidden width), of inputs (B, F) or (B, C, H, W)."""
        return self.layers(inputs.flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, C) of inputs (B, F) or (B, C, H, W)."""
        return self.fc(self.features(inputs))
