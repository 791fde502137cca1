"""Convert data of users to a source: arrays, a Hugging Face Dataset, a torch Dataset, or a source itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.datasets.columns import options_of_a_call
from rayprune.sources.datasets.huggingface_columns import columns_from_huggingface
from rayprune.sources.datasets.items import columns_from_torch, is_map_style
from rayprune.sources.memory import MemorySource

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


def as_source(data: Any, **options: Any) -> SampleSource:
    """Return data of any supported kind as a source that delivers the columns as they are.

    Args:
        data: a SampleSource; Splits, for their training part; a mapping of columns, each N rows long; a
            `datasets.Dataset`; or a map-style torch Dataset.
        **options: the keyword arguments of MemorySource, `columns_from_huggingface` or `columns_from_torch`, whichever
            reads the data; none for a SampleSource.

    Raises:
        ConfigError: data of this kind do not take an option, or its value is wrong.
        DataError: it is of another kind, or unsuitable.
    """
    packages = {cls.__name__: cls.__module__.split(".")[0] for cls in type(data).__mro__}
    for name, cure in _CURES.items():
        if name in packages and not isinstance(data, SampleSource | Splits):
            raise DataError(f"{type(data).__name__} is not a source of samples: {cure}")
    open_source: Callable[..., SampleSource]
    if isinstance(data, SampleSource | Splits):
        kind, open_source = "a source", _opened
    elif isinstance(data, Mapping):
        kind, open_source = "a mapping of columns", MemorySource
    elif packages.get("Dataset") == "datasets" and data.format["type"] != "custom":
        kind, open_source = "a datasets.Dataset", columns_from_huggingface
    elif is_map_style(data):  # also a datasets.Dataset with a transform, which runs at every visit
        kind, open_source = f"{type(data).__name__}, a map-style Dataset,", columns_from_torch
    else:
        raise DataError(
            f"{type(data).__name__} is not a source of samples: give a SampleSource, a mapping of columns, a "
            "datasets.Dataset, or an object with __len__ and __getitem__"
        )
    valid = list(inspect.signature(open_source).parameters)[1:]
    check_options(kind, options, valid)
    with options_of_a_call():
        return open_source(data, **options)


def check_options(kind: str, options: Mapping[str, Any], valid: Sequence[str]) -> None:
    """Refuse options that data of a kind do not take.

    Raises:
        ConfigError: names the first one, and those that are taken.
    """
    for name in options:
        if name not in valid:
            takes = f"it takes {', '.join(valid)}" if valid else "give it when you open the source"
            raise ConfigError(f"{kind} takes no option {name!r}: {takes}")


def _opened(data: SampleSource | Splits) -> SampleSource:
    return data.train if isinstance(data, Splits) else data
