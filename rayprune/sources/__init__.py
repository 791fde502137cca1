"""Data sources: labeled samples read by id, from memory, arrays, Parquet, image files or a function of the user."""

from rayprune.sources import (  # noqa: F401  # registers the sources
    arrays,
    digits,
    huggingface,
    image_folder,
    torch_dataset,
    torchvision,
)
from rayprune.sources.adapt import as_source
from rayprune.sources.base import Column, SampleSource, Schema, Splits
from rayprune.sources.cache import cached_arrays
from rayprune.sources.huggingface import from_huggingface
from rayprune.sources.huggingface_columns import columns_from_huggingface
from rayprune.sources.items import columns_from_torch
from rayprune.sources.memory import MemorySource
from rayprune.sources.parquet import source as _parquet  # noqa: F401
from rayprune.sources.registry import SOURCES, default_augment, input_statistics, open_data, register_source
from rayprune.sources.torch_dataset import from_torch
from rayprune.sources.views import Limited, Subset, holdout
from rayprune.sources.webdataset import source as _webdataset  # noqa: F401

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
    "columns_from_huggingface",
    "columns_from_torch",
    "default_augment",
    "from_huggingface",
    "from_torch",
    "holdout",
    "input_statistics",
    "open_data",
    "register_source",
]
