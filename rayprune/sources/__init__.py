"""Data sources: labelled samples read by id, from memory, arrays, Parquet, image files or the user's own function."""

from rayprune.sources import (  # noqa: F401  # registers the sources
    arrays,
    cifar,
    digits,
    fashion_mnist,
    huggingface,
    image_folder,
    imagenet,
    parquet,
    torch_dataset,
    webdataset,
)
from rayprune.sources.base import Column, SampleSource, Schema, Splits
from rayprune.sources.cache import cached_arrays
from rayprune.sources.coerce import as_source
from rayprune.sources.huggingface import from_huggingface
from rayprune.sources.memory import MemorySource
from rayprune.sources.registry import SOURCES, default_augment, open_data, register_source
from rayprune.sources.statistics import input_statistics
from rayprune.sources.torch_dataset import from_torch
from rayprune.sources.views import Limited, Subset, holdout

__all__ = [
    "SOURCES",
    "Column",
    "Limited",
    "MemorySource",
    "SampleSource",
    "Schema",
    "Splits",
    "Subset",
    "as_source",
    "cached_arrays",
    "default_augment",
    "from_huggingface",
    "from_torch",
    "holdout",
    "input_statistics",
    "open_data",
    "register_source",
]
