"""Convert data of users to a source: arrays, a Hugging Face Dataset, a torch Dataset, or a source itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayprune.errors import DataError
from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.huggingface import from_huggingface
from rayprune.sources.memory import MemorySource
from rayprune.sources.torch_dataset import from_torch, is_map_style

_NAME_COLUMNS = "give named columns, {'image': images, 'label': labels}"
_CURES = {
    "DataLoader": "give its dataset, loader.dataset",
    "IterableDataset": "it can't be read by id, give a map-style Dataset (with __len__ and __getitem__)",
    "DatasetDict": "choose a split, as in data['train']",
    "IterableDatasetDict": "choose a split, and load it without streaming",
    "DataFrame": "give its columns, {name: frame[name].to_numpy() for name in frame}",
    "Tensor": _NAME_COLUMNS,
    "ndarray": _NAME_COLUMNS,
    "list": _NAME_COLUMNS,
    "tuple": _NAME_COLUMNS,
    "str": "open it with rayprune.sources.open_data('parquet', path=...).train, or another source",
}


def as_source(data: Any) -> SampleSource:
    """Return data of any supported kind as a source.

    Args:
        data: a SampleSource; Splits, for their training part; a mapping of equally long arrays; a `datasets.Dataset`;
            or a map-style torch Dataset.

    Raises:
        DataError: it is of another kind, or unsuitable.
    """
    if isinstance(data, SampleSource):
        return data
    if isinstance(data, Splits):
        return data.train
    packages = {cls.__name__: cls.__module__.split(".")[0] for cls in type(data).__mro__}
    for name, cure in _CURES.items():
        if name in packages:
            raise DataError(f"{type(data).__name__} is not a source of samples: {cure}")
    if isinstance(data, Mapping):
        return MemorySource(data)
    if packages.get("Dataset") == "datasets":
        return from_huggingface(data)
    if is_map_style(data):
        return from_torch(data)
    raise DataError(
        f"{type(data).__name__} is not a source of samples: give a SampleSource, a mapping of arrays, a "
        "datasets.Dataset, or an object with __len__ and __getitem__"
    )
