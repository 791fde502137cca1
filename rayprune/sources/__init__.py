"""Data sources: labeled samples read by id, from memory, arrays, Parquet, image files or a function of the user."""

from rayprune.sources import arrays, digits, torchvision  # noqa: F401  # registers the sources
from rayprune.sources.adapt import as_source
from rayprune.sources.base import Column, SampleSource, Schema, Splits
from rayprune.sources.cache import cached_arrays
from rayprune.sources.datasets.huggingface import from_huggingface
from rayprune.sources.datasets.huggingface_columns import columns_from_huggingface
from rayprune.sources.datasets.items import columns_from_torch
from rayprune.sources.datasets.torch_dataset import from_torch
from rayprune.sources.images import folder as _folder  # noqa: F401
from rayprune.sources.memory import MemorySource
from rayprune.sources.parquet import source as _parquet  # noqa: F401
from rayprune.sources.registry import SOURCES, default_augment, input_statistics, open_data, register_source
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
