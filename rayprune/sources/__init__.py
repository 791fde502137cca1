"""Data sources: labelled samples read by id, from memory, arrays, Parquet, image files or the user's own function."""

from rayprune.sources import (  # noqa: F401  # registers the sources
    arrays,
    cifar,
    digits,
    fashion_mnist,
    image_folder,
    imagenet,
    parquet,
)
from rayprune.sources.base import Column, SampleSource, Schema, Splits
from rayprune.sources.cache import cached_arrays
from rayprune.sources.registry import SOURCES, default_augment, open_data, register_source
from rayprune.sources.statistics import input_statistics
from rayprune.sources.views import Limited, Subset, holdout

__all__ = [
    "SOURCES",
    "Column",
    "Limited",
    "SampleSource",
    "Schema",
    "Splits",
    "Subset",
    "cached_arrays",
    "default_augment",
    "holdout",
    "input_statistics",
    "open_data",
    "register_source",
]
