"""Map-style torch Datasets for `rayprune train`: labeled images and features; torch itself is not imported.

If items differ at each visit (random transforms), their content cannot be hashed: the fingerprint is computed from the
labels alone, and the rows are never kept in the decoded cache.

Shapes: N samples, H height, W width, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayprune.core.references import is_reference
from rayprune.errors import ConfigError, DataError, one_line
from rayprune.sources.base import (
    Column,
    NumClasses,
    SampleSource,
    Schema,
    Splits,
    check_labels,
    count_classes,
    spaced_ids,
)
from rayprune.sources.cache import CacheMode, check_mode, decoded
from rayprune.sources.datasets.columns import (
    options_of_a_call,
)
from rayprune.sources.datasets.items import (
    FINGERPRINT_ITEMS,
    IMAGE_CHANNELS,
    TWICE_READ_ITEMS,
    ItemSource,
    from_pillow,
    is_pillow,
    is_tensor,
)
from rayprune.sources.fingerprint import array_digest, digest
from rayprune.sources.registry import call_with_keys, register_source
from rayprune.sources.views import holdout


@register_source("torch_dataset")
@dataclass(frozen=True)
class TorchDataset:
    """A map-style Dataset that a function of the user returns.

    Attributes:
        dataset: `module:function` or `path.py:function`; returns a Dataset, or a pair (train, validation or None).
        options: the function's keyword arguments.
        columns: names of a tuple's entries, or the entries of a mapping to keep; default: `image` or `features`, and
            `label`, or all of a mapping.
        validation_fraction: held out, stratified, if the function returns no validation part; 0 for none.
        num_classes: default: the number of the dataset's `classes`, else the largest training label + 1.
        cache: see `cache.decoded`; items that differ at each visit are never kept.
        cache_dir: folder of the cache; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
    """

    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    validation_fraction: float = 0.1
    num_classes: NumClasses = None
    cache: CacheMode = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not is_reference(self.dataset):
            raise ConfigError(
                f"data.dataset {self.dataset!r} is not a reference: write 'module:function' or 'path.py:function'"
            )

    def open(self) -> Splits:
        """Call the function and read the labels.

        Raises:
            ConfigError: the function can't be called, or its items can't be cached or held out as the keys say.
            DataError: the function returns something else, or items that no built-in classifier can take.
        """
        result = call_with_keys("data.dataset", self.dataset, self.options, "data.options")
        train_items, validation_items = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        train = self._open_part(train_items, self.num_classes)
        if validation_items is not None:
            return Splits(train, self._open_part(validation_items, train.schema.num_classes))
        return holdout(train, self.validation_fraction)

    def _open_part(self, dataset: Any, num_classes: int | None) -> SampleSource:
        source = LabeledItems(dataset, self.columns, num_classes)
        if not source.schema.input:
            columns = {name: f"{column.dtype} {column.shape}" for name, column in source.schema.columns.items()}
            raise DataError(
                f"data.dataset {self.dataset!r} gives {columns}: return uint8 images (PIL or PILToTensor rather than "
                "ToTensor, the model's input is normalized later) as 'image', or vectors as 'features'"
            )
        return _with_cache(source, self.cache, self.cache_dir)


def from_torch(
    dataset: Any,
    columns: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    cache: str = "none",
    cache_dir: str | None = None,
) -> SampleSource:
    """Return the labeled images or features of a map-style Dataset, as `rayprune train` needs them.

    `prune` and `local_loader` take a Dataset itself, and deliver its items as they are.

    Args:
        dataset: has `__len__` and `__getitem__`; its items are tuples, mappings or single values of tensors, arrays,
            Pillow images and numbers, each of one shape throughout. uint8 images become (H, W, C).
        columns: names of a tuple's entries, or the entries of a mapping to keep; default: `image` or `features`, and
            `label`, or all of a mapping. Whole numbers called `label` are classes; `features` become float32.
        num_classes: default: the number of the dataset's `classes`, else the largest label + 1.
        cache, cache_dir: see `cache.decoded`; items that differ at each visit are never kept.

    Returns:
        A source that pickles with the dataset, and reads one item at a time.

    Raises:
        ConfigError: `cache` is memory or disk, and the items differ at each visit or have no class.
        DataError: it is not a map-style Dataset, it is empty, an item is unsuitable, or `cache` is unknown.
    """
    with options_of_a_call():
        check_mode(cache)
        source = LabeledItems(dataset, None if columns is None else tuple(columns), num_classes)
        return _with_cache(source, cache, cache_dir)


def _with_cache(source: ItemSource, cache: str, cache_dir: str | None) -> SampleSource:
    if not source.random and source.schema.num_classes is not None:
        return decoded(source, cache, cache_dir)
    if cache in {"memory", "disk"}:
        reason = "its items differ at each visit" if source.random else "its samples have no class label"
        raise ConfigError(f"data.cache is {cache!r} and {source.name} can't be kept, {reason}: set it to none")
    return source


class LabeledItems(ItemSource):
    """Labeled images, (H, W, C) uint8, or features, float32.

    Args:
        dataset, columns, num_classes: see from_torch.

    Raises:
        DataError: it is not a map-style Dataset, it is empty, or an item is unsuitable.
    """

    def __init__(self, dataset: Any, columns: tuple[str, ...] | None = None, num_classes: int | None = None) -> None:
        super().__init__(dataset, columns)
        first = self._items(np.zeros(1, np.int64))[0]
        kinds = {name: Column(values.shape, values.dtype.name) for name, values in first.items()}
        self._schema = Schema(kinds, _input_name(kinds))
        self.random = self._items_differ()
        if kinds.get("label") == Column((), "int64"):
            self._labels = self._read_labels()
            class_names = _class_names(dataset)
            num_classes = count_classes(self._labels, f"the labels of {self.name}", num_classes, class_names)
            check_labels(self._labels, num_classes, lambda item: f"{self.name} item {item}", class_names)
            class_names = class_names if len(class_names) == num_classes else ()
            self._schema = Schema(kinds, _input_name(kinds), num_classes, class_names)
        self._fingerprint = self._digest()

    def _row(self, name: str, value: Any) -> np.ndarray:
        return _column(name, value)

    def _fits(self, value: Any, column: Column) -> bool:
        return Column(value.shape, value.dtype.name) == column

    def _items_differ(self) -> bool:
        ids = spaced_ids(len(self), TWICE_READ_ITEMS)
        first, second = self.take(ids), self.take(ids)
        differ = any(not np.array_equal(first[name], second[name], equal_nan=True) for name in first)
        if differ:
            self._warn_of_random_items("its labels")
        return differ

    def _digest(self) -> str:
        columns = [f"{name} {column.dtype} {column.shape}" for name, column in self.schema.columns.items()]
        labels = [] if self._labels is None else [self._labels]
        items = {} if self.random else self.take(spaced_ids(len(self), FINGERPRINT_ITEMS))
        content = [array_digest(values) for values in items.values()]
        return digest("torch", len(self), *columns, *labels, *content)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Return the `classes` of a Dataset, or of the Dataset of a Subset; empty for none."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return _class_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else ()


def _column(name: str, value: Any) -> np.ndarray:
    """Return a value as a column of `rayprune train`; integers called `features` are exact up to 2**24."""
    array = _as_array(name, value)
    if name == "label" and array.shape == (1,):
        array = array.reshape(())
    if name == "label" and array.dtype.kind in "biu" and array.ndim == 0:
        return array.astype(np.int64)
    if name == "features" and array.ndim == 1:
        return array.astype(np.float32)
    if name == "image" and array.dtype == np.uint8:
        return _channels_last(array, channels_first=is_tensor(value))
    return array


def _as_array(name: str, value: Any) -> np.ndarray:
    if is_pillow(value):
        try:
            return from_pillow(value)
        except DataError as error:
            raise DataError(f"column {name!r} {error}") from None
    try:
        array = np.asarray(value.detach().cpu() if is_tensor(value) else value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {name!r} is not an array ({one_line(error)}): return a tensor, an array or a number"
        ) from None
    if array.dtype.kind not in "biuf":
        kind = "text" if array.dtype.kind in "US" else type(value).__name__
        raise DataError(f"column {name!r} is {kind}: return numbers, or leave it out with columns")
    return array


def _channels_last(array: np.ndarray, channels_first: bool) -> np.ndarray:
    """Return an image as (H, W, C); `channels_first` decides if both ends could be the channels."""
    if array.ndim == 2:
        return array[:, :, None]
    ends = [axis for axis in (0, 2) if array.ndim == 3 and array.shape[axis] in IMAGE_CHANNELS]
    return array.transpose(1, 2, 0) if ends == [0] or (channels_first and 0 in ends) else array


def _input_name(columns: Mapping[str, Column]) -> str:
    """Return the column that built-in classifiers can take: `image`, `features`, or "" for none."""
    image, features = columns.get("image"), columns.get("features")
    if image is not None and image.dtype == "uint8" and len(image.shape) == 3 and image.shape[2] in IMAGE_CHANNELS:
        return "image"
    return "features" if features is not None and features.dtype == "float32" and len(features.shape) == 1 else ""
