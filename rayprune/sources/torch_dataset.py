"""Map-style torch Datasets, and whatever else has `__len__` and `__getitem__`; torch itself is not imported.

A dataset whose items differ at each visit (by a random transform) has no content to go by: its fingerprint is that of
its labels, and its rows are never kept in the decoded cache.

Items of a map-style torch Dataset as columns of NumPy arrays; knows torch only by what its objects can do.

Shapes: B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.core.references import closest, is_reference, load_object
from rayprune.errors import DataError
from rayprune.sources.base import Column, SampleSource, Schema, Splits, check_ids, count_classes, holdout
from rayprune.sources.cache import check_mode, decoded
from rayprune.sources.fingerprint import array_digest, digest
from rayprune.sources.images import DEEP_MODES, GREY_MODES
from rayprune.sources.registry import register_source

IMAGE_CHANNELS = (1, 3)
RESERVED = {"id", "weight"}


def item_values(item: Any, names: tuple[str, ...] | None, float_features: bool = False) -> dict[str, np.ndarray]:
    """Return one item's columns.

    Args:
        item: a mapping, a tuple or list, or a single value, of tensors, arrays, Pillow images and numbers.
        names: of a tuple's entries, or those to keep of a mapping; None for `image` or `features` and `label`, or for
            all of a mapping.
        float_features: turn whole numbers called `features` into float32 too, which holds them exactly up to 2**24.

    Raises:
        ValueError: the names do not fit, or a value is no number or array of numbers.
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
            raise DataError(f"has {len(entries)} entries and columns are {names}: give each entry a name of its own")
    for name in values:
        if name in RESERVED:
            raise DataError(f"has a column {name!r}, the engine's own name: set columns to other names")
    return {name: _column(name, value, float_features) for name, value in values.items()}


def _default_names(entries: Sequence[Any]) -> tuple[str, ...]:
    if len(entries) not in {1, 2}:
        raise DataError(f"has {len(entries)} entries: name them with columns, as in ('image', 'mask', 'label')")
    return ("image" if _is_image(entries[0]) else "features", "label")[: len(entries)]


def _is_image(value: Any) -> bool:
    if hasattr(value, "getbands"):
        return True
    array = _array("features", value)
    channels = array.ndim == 3 and (array.shape[0] in IMAGE_CHANNELS or array.shape[2] in IMAGE_CHANNELS)
    return channels or (array.dtype == np.uint8 and array.ndim == 2)


def _column(name: str, value: Any, float_features: bool) -> np.ndarray:
    array = _array(name, value)
    if name == "label" and array.shape == (1,):
        array = array.reshape(())
    if name == "label" and array.dtype.kind in "biu" and array.ndim == 0:
        return array.astype(np.int64)
    if name == "features" and array.ndim == 1 and (float_features or array.dtype.kind == "f"):
        return array.astype(np.float32)
    if name == "image" and array.dtype == np.uint8:
        return _channels_last(array, first=hasattr(value, "detach"))
    return array


def _array(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "getbands"):  # a Pillow image
        if value.mode.startswith(DEEP_MODES):
            raise DataError(f"column {name!r} is an image of mode {value.mode}: convert the images to 8 bits")
        return np.asarray(value.convert("L" if value.mode in GREY_MODES else "RGB"))
    if hasattr(value, "detach"):  # a tensor, of any device
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        line = " ".join(str(error).split())[:80]
        raise DataError(f"column {name!r} is no array ({line}): return a tensor, an array or a number") from None
    if array.dtype.kind not in "biuf":
        what = "text" if array.dtype.kind in "US" else type(value).__name__
        raise DataError(f"column {name!r} is {what}: return numbers, or leave it out with columns")
    return array


def _channels_last(array: np.ndarray, first: bool) -> np.ndarray:
    """Return an image as (H, W, C); where both ends could be channels, `first` says which are."""
    if array.ndim == 2:
        return array[:, :, None]
    ends = [axis for axis in (0, 2) if array.ndim == 3 and array.shape[axis] in IMAGE_CHANNELS]
    return array.transpose(1, 2, 0) if ends == [0] or (ends and first and 0 in ends) else array


def input_name(columns: Mapping[str, Column]) -> str:
    """Return which column a classifier of the package can take: `image`, `features`, or an empty name for none."""
    image, features = columns.get("image"), columns.get("features")
    if image is not None and image.dtype == "uint8" and len(image.shape) == 3 and image.shape[2] in IMAGE_CHANNELS:
        return "image"
    return "features" if features is not None and features.dtype == "float32" and len(features.shape) == 1 else ""


def stack_items(
    items: Sequence[dict[str, np.ndarray]], columns: Mapping[str, Column], named: Callable[[int], str], first: str
) -> dict[str, np.ndarray]:
    """Stack a batch.

    Args:
        items: of B samples.
        columns: what every item has to be.
        named: says which item a position of the batch is, for messages.
        first: says which item the columns were taken from.

    Raises:
        ValueError: an item has other columns, shapes or types.
    """
    rows = {name: np.empty((len(items), *column.shape), column.dtype) for name, column in columns.items()}
    for position, item in enumerate(items):
        if set(item) != set(columns):
            raise DataError(
                f"{named(position)} has columns {sorted(item)} and {first} {sorted(columns)}: make them alike"
            )
        for name, value in item.items():
            column = columns[name]
            if value.shape != column.shape:
                raise DataError(
                    f"{named(position)} column {name!r} is {value.shape} and that of {first} {column.shape}: "
                    "bring all items to one shape in the dataset, such as with a Resize transform"
                )
            if value.dtype != column.dtype:
                raise DataError(
                    f"{named(position)} column {name!r} is {value.dtype} and that of {first} {column.dtype}: "
                    "return one type"
                )
            rows[name][position] = value
    return rows


def stored_labels(dataset: Any) -> np.ndarray | None:
    """Return the labels that a Dataset keeps in an attribute, (N,) int64, or those of the one it is a Subset of."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        whole, chosen = stored_labels(dataset.dataset), np.asarray(dataset.indices, dtype=np.int64)
        return None if whole is None or (len(chosen) and chosen.max() >= len(whole)) else whole[chosen]
    for name in ("targets", "labels", "tensors"):
        values = getattr(dataset, name, None)
        if name == "tensors" and values is not None:
            values = values[-1]
        if values is None or isinstance(values, Mapping | str):
            continue
        try:
            found = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        except (TypeError, ValueError):
            continue
        if found.dtype.kind in "biu" and found.ndim == 1:
            return found.astype(np.int64)
    return None


def class_names(dataset: Any) -> tuple[str, ...]:
    """Return the `classes` of a Dataset, or of the one it is a Subset of; empty where it has none."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return class_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    plain = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if plain and names else ()


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
            raise DataError(
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
            raise DataError(f"data.dataset {self.dataset!r} can't be called with data.options: {error}") from None
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
            raise DataError(
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
        raise DataError(f"{type(dataset).__name__} is no map-style Dataset: give one with __len__ and __getitem__")
    source = ItemSource(dataset, None if columns is None else tuple(columns), num_classes, floats)
    if source.random or source.schema.num_classes is None:
        if cache in {"memory", "disk"}:
            why = "its items differ at each visit" if source.random else "its samples have no class label"
            raise DataError(
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
            raise DataError(f"{type(dataset).__name__} is empty: give a dataset of at least one item")
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
            raise DataError(
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
            raise DataError(
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
                raise DataError(f"{type(self._dataset).__name__} item {position} {error}") from None
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
