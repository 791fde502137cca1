"""Map-style torch Datasets, and whatever else has `__len__` and `__getitem__`; torch itself is not imported.

A dataset whose items differ at each visit (by a random transform) has no content to go by: its fingerprint is that of
its labels, and its rows are never kept in the decoded cache.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.core.objects import is_reference, load_object
from rayprune.sources.base import Column, SampleSource, Schema, Splits, check_ids
from rayprune.sources.classes import count_classes
from rayprune.sources.decoded import check_mode, decoded
from rayprune.sources.fingerprint import array_digest, digest
from rayprune.sources.registry import register_source
from rayprune.sources.torch_items import class_names, input_name, item_values, stack_items, stored_labels
from rayprune.sources.views import holdout

logger = logging.getLogger(__name__)

HOLDOUT_SEED = 0
FINGERPRINT_ITEMS = 256
# A flip that is drawn with even odds shows in one of these items but for once in 65,536.
TWICE_READ_ITEMS = 16
CHECKED_LABELS = 16
CHUNK_ITEMS = 256


@register_source("torch_dataset")
@dataclass(frozen=True)
class TorchDataset:
    """A map-style Dataset that a function of the user's returns.

    Attributes:
        dataset: `module:function` or `path.py:function`; returns a Dataset, or a pair (train, validation or None).
        options: what the function is called with.
        columns: see from_torch.
        validation_fraction: held out, stratified, where the function returns no validation part; 0 for none.
        num_classes: default: the number of the dataset's `classes`, else the largest training label + 1.
        cache: see `decoded.decoded`; items that differ at each visit are never kept.
        cache_dir: see `cache.cache_root`.
    """

    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    validation_fraction: float = 0.1
    num_classes: int | None = None
    cache: str = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_mode(self.cache)
        if not is_reference(self.dataset):
            raise ValueError(
                f"data.dataset {self.dataset!r} is no reference: write 'module:function' or 'path.py:function'"
            )

    def open(self) -> Splits:
        """Call the function and read the labels.

        Raises:
            ValueError: the function returns something else, or items that no classifier of the package can take.
        """
        function = load_object(self.dataset)
        try:
            inspect.signature(function).bind(**self.options)
        except TypeError as error:
            raise ValueError(f"data.dataset {self.dataset!r} can't be called with data.options: {error}") from None
        made = function(**self.options)
        train_items, validation_items = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        train = self._part(train_items, self.num_classes)
        if validation_items is not None:
            return Splits(train, self._part(validation_items, train.schema.num_classes))
        if self.validation_fraction == 0:
            return Splits(train, None)
        return holdout(train, self.validation_fraction, HOLDOUT_SEED)

    def _part(self, dataset: Any, num_classes: int | None) -> SampleSource:
        # The command's models take float32; loops of the user's own get the numbers as they are.
        source = _open_items(dataset, self.columns, num_classes, self.cache, self.cache_dir, floats=True)
        if not source.schema.input:
            described = {name: f"{column.dtype} {column.shape}" for name, column in source.schema.columns.items()}
            raise ValueError(
                f"data.dataset {self.dataset!r} gives {described}: return uint8 images (PIL or PILToTensor rather than "
                "ToTensor, the model's input is normalised later) as 'image', or vectors as 'features'"
            )
        return source


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
            tensors, arrays, Pillow images and numbers, each of one shape throughout. uint8 images come as (H, W, C).
        columns: names of a tuple's entries, or the entries of a mapping to keep; default: `image` or `features`, and
            `label`, or all of a mapping. Whole numbers called `label` are classes; floating `features` become float32.
        num_classes: default: the number of the dataset's `classes`, else the largest label + 1.
        cache, cache_dir: see `decoded.decoded`; items that differ at each visit are never kept.

    Returns:
        A source that pickles with the dataset, and reads one item at a time.

    Raises:
        ValueError: it is no map-style Dataset or empty, or an item is unsuitable.
    """
    return _open_items(dataset, columns, num_classes, cache, cache_dir, floats=False)


def _open_items(
    dataset: Any, columns: Sequence[str] | None, num_classes: int | None, cache: str, folder: str | None, floats: bool
) -> SampleSource:
    check_mode(cache)
    if not is_map_style(dataset):
        raise ValueError(f"{type(dataset).__name__} is no map-style Dataset: give one with __len__ and __getitem__")
    source = ItemSource(dataset, None if columns is None else tuple(columns), num_classes, floats)
    if source.random or source.schema.num_classes is None:
        if cache in {"memory", "disk"}:
            why = "its items differ at each visit" if source.random else "its samples have no class label"
            raise ValueError(
                f"data.cache is {cache!r} and {type(dataset).__name__} can't be kept, {why}: set it to none"
            )
        return source
    return decoded(source, cache, folder)


def is_map_style(dataset: Any) -> bool:
    """Whether an object is read by position; torch's IterableDataset inherits a `__getitem__` that only raises."""
    iterable = any(cls.__name__ == "IterableDataset" for cls in type(dataset).__mro__)
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not iterable


class ItemSource(SampleSource):
    """Items of a map-style Dataset, as the Dataset gives them.

    Items are read by one thread at a time, as in a DataLoader's worker: datasets keep open files and random states.

    Args:
        dataset, columns, num_classes: see from_torch.
        float_features: see `torch_items.item_values`.

    Raises:
        ValueError: the dataset is empty, or an item is unsuitable.
    """

    def __init__(
        self, dataset: Any, columns: tuple[str, ...] | None, num_classes: int | None, float_features: bool = False
    ) -> None:
        self._dataset, self._names, self._float_features = dataset, columns, float_features
        self._num_samples = len(dataset)
        if self._num_samples == 0:
            raise ValueError(f"{type(dataset).__name__} is empty: give a dataset of at least one item")
        self._forget()
        self._has_stored = False
        first = self._items(np.zeros(1, np.int64))[0]
        self._columns = {name: Column(value.shape, value.dtype.name) for name, value in first.items()}
        self._schema = Schema(self._columns, input_name(self._columns))
        self.random = self._differs()
        if self._columns.get("label") == Column((), "int64"):
            self._labels: np.ndarray | None = self._read_labels()
            names = class_names(dataset)
            given = (len(names) or None) if num_classes is None else num_classes
            num_classes = count_classes(self._labels, f"the labels of {type(dataset).__name__}", given)
            names = names if len(names) == num_classes else ()
            self._schema = Schema(self._columns, input_name(self._columns), num_classes, names)
        self._fingerprint = self._digest()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._labels = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"_lock", "_labels"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return self._num_samples

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        if self._schema.num_classes is None:
            raise ValueError(
                "these items have no whole number called 'label': name it with columns, or set class_floor=0"
            )
        if self._labels is None:
            self._labels = self._read_labels()
        return self._labels

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return "expensive"

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, self._num_samples)
        items = self._items(ids)
        rows = stack_items(items, self._columns, lambda position: f"item {ids[position]}", "item 0")
        self._check_labels(ids, rows)
        return rows

    def _check_labels(self, ids: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        if self._labels is None and self._has_stored:
            self._labels = stored_labels(self._dataset)
        known = self._labels
        if known is None:
            return
        differs = np.flatnonzero(rows["label"] != known[ids])
        if len(differs):
            row = int(ids[differs[0]])
            before = "its targets say" if self._has_stored else "had before"
            cure = "correct them, or remove the attribute" if self._has_stored else "give each item one label"
            raise ValueError(
                f"{type(self._dataset).__name__} item {row} has label {rows['label'][differs[0]]} and {before} "
                f"{known[row]}: {cure}"
            )

    def _items(self, ids: np.ndarray) -> list[dict[str, np.ndarray]]:
        positions = np.asarray(ids).tolist()
        with self._lock:
            if positions and hasattr(self._dataset, "__getitems__"):
                items = self._dataset.__getitems__(positions)
            else:
                items = [self._dataset[position] for position in positions]
        found = []
        for position, item in zip(positions, items, strict=True):
            try:
                found.append(item_values(item, self._names, self._float_features))
            except ValueError as error:
                raise ValueError(f"{type(self._dataset).__name__} item {position} {error}") from None
        return found

    def _spaced(self, count: int) -> np.ndarray:
        count = min(count, self._num_samples)
        return np.arange(count, dtype=np.int64) * self._num_samples // count

    def _differs(self) -> bool:
        ids = self._spaced(TWICE_READ_ITEMS)
        once, again = self.take(ids), self.take(ids)
        differs = any(not np.array_equal(once[name], again[name], equal_nan=True) for name in once)
        if differs:
            logger.warning(
                "items of %s differ at each visit: its fingerprint is that of its labels, and its rows are not kept; "
                "leave random transforms to the training step",
                type(self._dataset).__name__,
            )
        return differs

    def _digest(self) -> str:
        columns = [f"{name} {column.dtype} {column.shape}" for name, column in self._columns.items()]
        labels = [] if self._labels is None else [self._labels]
        items = {} if self.random else self.take(self._spaced(FINGERPRINT_ITEMS))
        content = [array_digest(values) for values in items.values()]
        return digest("torch", self._num_samples, *columns, *labels, *content)

    def _read_labels(self) -> np.ndarray:
        stored = stored_labels(self._dataset)
        if stored is not None and self._has_stored:
            return stored
        if stored is not None and len(stored) == self._num_samples:
            ids = self._spaced(CHECKED_LABELS)
            if np.array_equal(self.take(ids)["label"], stored[ids]):
                self._has_stored = True
                return stored
        logger.info(
            "reading all %d items of %s for their labels: its `targets` or `labels` would save that",
            self._num_samples,
            type(self._dataset).__name__,
        )
        starts = range(0, self._num_samples, CHUNK_ITEMS)
        chunks = (np.arange(start, min(start + CHUNK_ITEMS, self._num_samples)) for start in starts)
        return np.concatenate([self.take(chunk)["label"] for chunk in chunks])
