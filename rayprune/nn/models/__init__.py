"""Models by name: the built-in ones, torchvision's, and the user's own."""

from rayprune.nn.models import mlp, msdnet, ranet, resnet
from rayprune.nn.models.reference_weights import load_reference, reference_names
from rayprune.nn.models.registry import MODELS, build_model, image_channels, register_model

__all__ = [
    "MODELS",
    "build_model",
    "image_channels",
    "load_reference",
    "mlp",
    "msdnet",
    "ranet",
    "reference_names",
    "register_model",
    "resnet",
]
