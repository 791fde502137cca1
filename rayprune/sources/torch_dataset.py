"""Map-style torch Datasets, and other objects with `__len__` and `__getitem__`; torch itself is not imported.

If items differ at each visit (random transforms), their content cannot be hashed: the fingerprint is computed from the
labels alone, and the rows are never kept in the decoded cache.

Shapes: N samples, B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayprune.core.references import closest, is_reference
from rayprune.errors import ConfigError, DataError, one_line
from rayprune.sources.base import (
    RESERVED_NAMES,
    Column,
    DescribedSource,
    RowCost,
    SampleSource,
    Schema,
    Splits,
    check_ids,
    count_classes,
    holdout,
    spaced_ids,
)
from rayprune.sources.cache import CacheMode, check_mode, decoded
from rayprune.sources.fingerprint import array_digest, digest
from rayprune.sources.images import DEEP_MODES, GREY_MODES
from rayprune.sources.registry import call_with_keys, register_source

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = (1, 3)
FINGERPRINT_ITEMS = 256
# A random flip leaves these items unchanged, and goes unnoticed, once in 65,536 times.
TWICE_READ_ITEMS = 16
CHECKED_LABELS = 16
CHUNK_ITEMS = 256


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
    num_classes: int | None = None
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
        # Built-in models take float32; users' own loops get the numbers unchanged.
        source = ItemSource(dataset, self.columns, num_classes, float_features=True)
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
    """Return the samples of a map-style Dataset.

    Args:
        dataset: has `__len__` and `__getitem__`, or `__getitems__`; its items are tuples, mappings or single values of
            tensors, arrays, Pillow images and numbers, each of one shape throughout. uint8 images become (H, W, C).
        columns: names of a tuple's entries, or the entries of a mapping to keep; default: `image` or `features`, and
            `label`, or all of a mapping. Whole numbers called `label` are classes; floating `features` become float32.
        num_classes: default: the number of the dataset's `classes`, else the largest label + 1.
        cache, cache_dir: see `cache.decoded`; items that differ at each visit are never kept.

    Returns:
        A source that pickles with the dataset, and reads one item at a time.

    Raises:
        ConfigError: `cache` is memory or disk, and the items differ at each visit or have no class.
        DataError: it is not a map-style Dataset, it is empty, an item is unsuitable, or `cache` is unknown.
    """
    check_mode(cache)
    source = ItemSource(dataset, None if columns is None else tuple(columns), num_classes)
    return _with_cache(source, cache, cache_dir)


def _with_cache(source: ItemSource, cache: str, cache_dir: str | None) -> SampleSource:
    if not source.random and source.schema.num_classes is not None:
        return decoded(source, cache, cache_dir)
    if cache in {"memory", "disk"}:
        reason = "its items differ at each visit" if source.random else "its samples have no class label"
        raise ConfigError(f"data.cache is {cache!r} and {source.name} can't be kept, {reason}: set it to none")
    return source


def is_map_style(dataset: Any) -> bool:
    """Return whether an object is read by position; torch's IterableDataset inherits a `__getitem__` that raises."""
    iterable = any(cls.__name__ == "IterableDataset" for cls in type(dataset).__mro__)
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not iterable


class ItemSource(DescribedSource):
    """Items of a map-style Dataset, as the Dataset returns them.

    One thread at a time reads items, as in a DataLoader's worker: datasets keep open files and random states.

    Args:
        dataset, columns, num_classes: see from_torch.
        float_features: see `item_columns`.

    Attributes:
        name: the dataset's class, for messages.
        random: whether items differ at each visit.

    Raises:
        DataError: it is not a map-style Dataset, it is empty, or an item is unsuitable.
    """

    row_cost: RowCost = "expensive"

    def __init__(
        self,
        dataset: Any,
        columns: tuple[str, ...] | None = None,
        num_classes: int | None = None,
        float_features: bool = False,
    ) -> None:
        self.name = type(dataset).__name__
        if not is_map_style(dataset):
            raise DataError(f"{self.name} is not a map-style Dataset: give one with __len__ and __getitem__")
        if len(dataset) == 0:
            raise DataError(f"{self.name} is empty: give a dataset of at least one item")
        super().__init__(len(dataset), Schema({}), "")
        self._dataset, self._names, self._float_features = dataset, columns, float_features
        self._has_stored_labels = False  # in an attribute of the dataset, checked against its items
        first = self._items(np.zeros(1, np.int64))[0]
        kinds = {name: Column(values.shape, values.dtype.name) for name, values in first.items()}
        self._schema = Schema(kinds, _input_name(kinds))
        self.random = self._items_differ()
        if kinds.get("label") == Column((), "int64"):
            self._labels = self._read_labels()
            class_names = _class_names(dataset)
            num_classes = count_classes(self._labels, f"the labels of {self.name}", num_classes, class_names)
            class_names = class_names if len(class_names) == num_classes else ()
            self._schema = Schema(kinds, _input_name(kinds), num_classes, class_names)
        self._fingerprint = self._digest()

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        columns = self.schema.columns
        rows = {name: np.empty((len(ids), *column.shape), column.dtype) for name, column in columns.items()}
        for position, item in enumerate(self._items(ids)):
            _check_item(item, columns, f"item {ids[position]}")
            for name, values in item.items():
                rows[name][position] = values
        self._check_labels(ids, rows)
        return rows

    def _items(self, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        positions = np.asarray(ids).tolist()
        with self._lock:
            if positions and hasattr(self._dataset, "__getitems__"):
                items = self._dataset.__getitems__(positions)
                if len(items) != len(positions):
                    raise DataError(f"{self.name}: __getitems__ gave {len(items)} items for {len(positions)} positions")
            else:
                items = [self._dataset[position] for position in positions]
        columns = []
        for position, item in zip(positions, items, strict=True):
            try:
                columns.append(item_columns(item, self._names, self._float_features))
            except ValueError as error:
                raise DataError(f"{self.name} item {position} {error}") from None
        return columns

    def _check_labels(self, ids: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        if self._labels is None and self._has_stored_labels:
            self._labels = _stored_labels(self._dataset)
        if self._labels is None:
            return
        differs = np.flatnonzero(rows["label"] != self._labels[ids])
        if len(differs):
            sample = int(ids[differs[0]])
            earlier, cure = "had before", "give each item one label"
            if self._has_stored_labels:
                earlier, cure = "its targets say", "correct them, or remove the attribute"
            raise DataError(
                f"{self.name} item {sample} has label {rows['label'][differs[0]]} and {earlier} "
                f"{self._labels[sample]}: {cure}"
            )

    def _items_differ(self) -> bool:
        ids = spaced_ids(len(self), TWICE_READ_ITEMS)
        first, second = self.take(ids), self.take(ids)
        differ = any(not np.array_equal(first[name], second[name], equal_nan=True) for name in first)
        if differ:
            logger.warning(
                "items of %s differ at each visit: its fingerprint is that of its labels, and its rows are not kept; "
                "leave random transforms to the training step",
                self.name,
            )
        return differ

    def _digest(self) -> str:
        columns = [f"{name} {column.dtype} {column.shape}" for name, column in self.schema.columns.items()]
        labels = [] if self._labels is None else [self._labels]
        items = {} if self.random else self.take(spaced_ids(len(self), FINGERPRINT_ITEMS))
        content = [array_digest(values) for values in items.values()]
        return digest("torch", len(self), *columns, *labels, *content)

    def _read_labels(self) -> np.ndarray:
        if self.schema.columns.get("label") != Column((), "int64"):
            raise DataError(
                "these items have no whole number called 'label': name it with columns, or set class_floor=0"
            )
        stored = _stored_labels(self._dataset)
        if stored is not None and self._has_stored_labels:
            return stored
        if stored is not None and len(stored) == len(self):
            ids = spaced_ids(len(self), CHECKED_LABELS)
            if np.array_equal(self.take(ids)["label"], stored[ids]):
                self._has_stored_labels = True
                return stored
        logger.info(
            "reading all %d items of %s for their labels: its `targets` or `labels` would save that",
            len(self),
            self.name,
        )
        starts = range(0, len(self), CHUNK_ITEMS)
        chunks = (np.arange(start, min(start + CHUNK_ITEMS, len(self))) for start in starts)
        return np.concatenate([self.take(chunk)["label"] for chunk in chunks])


def _stored_labels(dataset: Any) -> np.ndarray | None:
    """Return the labels in an attribute of a Dataset, or of the Dataset of a Subset, (N,) int64; None for none."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        labels, indices = _stored_labels(dataset.dataset), np.asarray(dataset.indices, dtype=np.int64)
        return None if labels is None or (len(indices) and indices.max() >= len(labels)) else labels[indices]
    for name in ("targets", "labels", "tensors"):
        values = getattr(dataset, name, None)
        if name == "tensors" and values is not None:
            values = values[-1]
        if values is None or isinstance(values, Mapping | str):
            continue
        try:
            labels = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        except (TypeError, ValueError):
            continue
        if labels.dtype.kind in "biu" and labels.ndim == 1:
            return labels.astype(np.int64)
    return None


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Return the `classes` of a Dataset, or of the Dataset of a Subset; empty for none."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return _class_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    return tuple(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else ()


def item_columns(item: Any, names: tuple[str, ...] | None, float_features: bool = False) -> dict[str, np.ndarray]:
    """Return one item's columns.

    Args:
        item: a mapping, a tuple or list, or a single value, of tensors, arrays, Pillow images and numbers.
        names: of a tuple's entries, or those to keep of a mapping; None for `image` or `features` and `label`, or for
            all of a mapping.
        float_features: convert integers called `features` to float32 too, which is exact up to 2**24.

    Raises:
        DataError: the names do not fit, or a value is not a number or an array of numbers.
    """
    if isinstance(item, Mapping):
        chosen = tuple(item) if names is None else names
        missing = [name for name in chosen if name not in item]
        if missing:
            raise DataError(f"has no column {missing[0]!r}: {closest(missing[0], [str(name) for name in item])}")
        values = {str(name): item[name] for name in chosen}
    else:
        entries = list(item) if isinstance(item, tuple | list) else [item]
        values = dict(zip(names or _default_names(entries), entries, strict=False))
        if len(values) != len(entries):
            raise DataError(f"has {len(entries)} entries and columns are {names}: give each entry its own name")
    for name in values:
        if name in RESERVED_NAMES:
            raise DataError(f"has a column {name!r}, a name that rayprune adds itself: set columns to other names")
    return {name: _column(name, value, float_features) for name, value in values.items()}


def _default_names(entries: Sequence[Any]) -> tuple[str, ...]:
    if len(entries) not in {1, 2}:
        raise DataError(f"has {len(entries)} entries: name them with columns, as in ('image', 'mask', 'label')")
    return ("image" if _is_image(entries[0]) else "features", "label")[: len(entries)]


def _is_image(value: Any) -> bool:
    if _is_pillow(value):
        return True
    array = _as_array("features", value)
    has_channels = array.ndim == 3 and (array.shape[0] in IMAGE_CHANNELS or array.shape[2] in IMAGE_CHANNELS)
    return has_channels or (array.dtype == np.uint8 and array.ndim == 2)


def _is_pillow(value: Any) -> bool:
    return hasattr(value, "getbands")


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


def _column(name: str, value: Any, float_features: bool) -> np.ndarray:
    array = _as_array(name, value)
    if name == "label" and array.shape == (1,):
        array = array.reshape(())
    if name == "label" and array.dtype.kind in "biu" and array.ndim == 0:
        return array.astype(np.int64)
    if name == "features" and array.ndim == 1 and (float_features or array.dtype.kind == "f"):
        return array.astype(np.float32)
    if name == "image" and array.dtype == np.uint8:
        return _channels_last(array, channels_first=_is_tensor(value))
    return array


def _as_array(name: str, value: Any) -> np.ndarray:
    if _is_pillow(value):
        if value.mode.startswith(DEEP_MODES):
            raise DataError(f"column {name!r} is an image of mode {value.mode}: convert the images to 8 bits")
        return np.asarray(value.convert("L" if value.mode in GREY_MODES else "RGB"))
    try:
        array = np.asarray(value.detach().cpu() if _is_tensor(value) else value)
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


def _check_item(item: dict[str, np.ndarray], columns: Mapping[str, Column], item_name: str) -> None:
    """Refuse an item whose columns, shapes or types are not those of item 0."""
    if set(item) != set(columns):
        raise DataError(f"{item_name} has columns {sorted(item)} and item 0 {sorted(columns)}: make them alike")
    for name, values in item.items():
        first = columns[name]
        if Column(values.shape, values.dtype.name) != first:
            raise DataError(
                f"{item_name} column {name!r} is {values.dtype} {values.shape} and that of item 0 {first.dtype} "
                f"{first.shape}: return one type and one shape, such as with a Resize transform"
            )
