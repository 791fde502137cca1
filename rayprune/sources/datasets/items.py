"""Items of map-style Datasets, and of other objects with `__len__` and `__getitem__`; torch itself is not imported.

`ItemColumns` delivers the items as they are. If they differ at each visit (random transforms), the fingerprint is
computed from the columns that stay the same, and the rows are never kept in the decoded cache.

Shapes: N samples, B batch, H height, W width, C channels.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import (
    RESERVED_NAMES,
    Column,
    DescribedSource,
    RowCost,
    SampleSource,
    Schema,
    check_ids,
    spaced_ids,
)
from rayprune.sources.cache import CacheMode, check_mode, decoded
from rayprune.sources.datasets.columns import (
    NO_LABELS,
    NUMBERS,
    Allocate,
    as_column,
    as_row,
    column_digest,
    column_of,
    empty_column,
    find_label,
    fits,
)
from rayprune.sources.fingerprint import digest
from rayprune.sources.images.decode import DEEP_MODES, GREY_MODES

logger = logging.getLogger(__name__)

IMAGE_CHANNELS = (1, 3)
FINGERPRINT_ITEMS = 256
# A random flip leaves these items unchanged, and goes unnoticed, once in 65,536 times.
TWICE_READ_ITEMS = 16
CHECKED_LABELS = 16
CHUNK_ITEMS = 256
_INTEGERS = frozenset(np.dtype(code).name for code in np.typecodes["AllInteger"] + "?")


def columns_from_torch(
    dataset: Any,
    *,
    columns: Sequence[str] | None = None,
    label_column: str | None = None,
    cache: CacheMode = "none",
    cache_dir: str | None = None,
) -> SampleSource:
    """Return the items of a map-style Dataset as they are.

    Names, dtypes and the order of axes stay, except that Pillow images become (H, W, C) uint8, gray ones with one
    channel. Lists of numbers become arrays. Columns may be ragged, and hold text and other Python objects.

    Args:
        dataset: as in `from_torch`.
        columns: names of a tuple's entries, or the entries of a mapping to keep; default: `image` or `features`, and
            `label`, or all of a mapping.
        label_column: integers, for methods that need labels; default: `label` or `labels`.
        cache: `memory` or `disk` keeps the items; see `cache.decoded`.
        cache_dir: see `cache.cache_root`.

    Raises:
        ConfigError: `cache` is unknown, or cannot keep these items.
        DataError: it is not a map-style Dataset, it is empty, or an item is unsuitable.
    """
    check_mode(cache)
    source = ItemColumns(dataset, None if columns is None else tuple(columns), label_column)
    if source.random and cache in {"memory", "disk"}:
        raise ConfigError(f"data.cache is {cache!r} and items of {source.name} differ at each visit: set it to none")
    return source if source.random else decoded(source, cache, cache_dir)


def is_map_style(dataset: Any) -> bool:
    """Return whether an object is read by position; torch's IterableDataset inherits a `__getitem__` that raises."""
    iterable = any(cls.__name__ == "IterableDataset" for cls in type(dataset).__mro__)
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not iterable


class ItemSource(DescribedSource):
    """Base class of the items of a map-style Dataset.

    One thread at a time reads items, as in a DataLoader's worker: datasets keep open files and random states. A
    subclass sets `_schema`, `_fingerprint`, `random` and `_label`.

    Args:
        dataset, columns: see from_torch.

    Attributes:
        name: the dataset's class, for messages.
        random: whether items differ at each visit.
        allocate: makes the dense columns that `take` fills, such as arrays in shared memory.

    Raises:
        DataError: it is not a map-style Dataset, or it is empty.
    """

    row_cost: RowCost = "expensive"
    random: bool

    def __init__(self, dataset: Any, columns: tuple[str, ...] | None = None) -> None:
        self.name = type(dataset).__name__
        if not is_map_style(dataset):
            raise DataError(f"{self.name} is not a map-style Dataset: give one with __len__ and __getitem__")
        if len(dataset) == 0:
            raise DataError(f"{self.name} is empty: give a dataset of at least one item")
        super().__init__(len(dataset), Schema({}), "")
        self._dataset, self._names = dataset, columns
        self.allocate: Allocate = np.empty
        self._label: str | None = "label"
        self._has_stored_labels = False  # in an attribute of the dataset, checked against its items

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        columns, raw = self.schema.columns, self._read(ids)
        if (stacked := self._stacked(raw)) is not None:
            self._check_labels(ids, stacked)
            return stacked
        rows = {name: empty_column(column, len(ids), self.allocate) for name, column in columns.items()}
        items = self._named(ids, raw)
        if not all(item.keys() == columns.keys() for item in items):
            self._check_items(ids, items)
        for name, column in columns.items():
            values = [item[name] for item in items]
            if values and not column.in_objects and _are_like(values, column):
                np.stack(values, out=rows[name])
                continue
            self._check_items(ids, items)
            for position, value in enumerate(values):
                rows[name][position] = value.astype(column.dtype) if column.is_ragged else value
        self._check_labels(ids, rows)
        return rows

    @abc.abstractmethod
    def _row(self, name: str, value: Any) -> Any:
        """Return a value of an item as its column has it."""

    def _stacked(self, items: Sequence[Any]) -> dict[str, np.ndarray] | None:
        """Return the columns of items that need no conversion, quickly; None for all others."""
        return None

    def _items(self, ids: np.ndarray) -> list[dict[str, Any]]:
        return self._named(ids, self._read(ids))

    def _read(self, ids: np.ndarray) -> Sequence[Any]:
        positions = np.asarray(ids).tolist()
        with self._lock:
            if not positions or not hasattr(self._dataset, "__getitems__"):
                return [self._dataset[position] for position in positions]
            items: Sequence[Any] = self._dataset.__getitems__(positions)
        if len(items) != len(positions):
            raise DataError(f"{self.name}: __getitems__ gave {len(items)} items for {len(positions)} positions")
        return items

    def _named(self, ids: np.ndarray, items: Sequence[Any]) -> list[dict[str, Any]]:
        columns = []
        for position, item in zip(np.asarray(ids).tolist(), items, strict=True):
            try:
                values = named_values(item, self._names)
                if self._names is None and not isinstance(item, Mapping):
                    self._names = tuple(values)  # found once, because the default names need a look at the values
                columns.append({name: self._row(name, value) for name, value in values.items()})
            except DataError as error:
                raise DataError(f"{self.name} item {position} {error}") from None
        return columns

    def _check_items(self, ids: np.ndarray, items: Sequence[dict[str, Any]]) -> None:
        for sample, item in zip(ids, items, strict=True):
            self._check_item(item, f"item {sample}")

    def _check_item(self, item: dict[str, Any], item_name: str) -> None:
        """Refuse an item whose columns, shapes or dtypes do not fit those of the schema."""
        columns = self.schema.columns
        if set(item) != set(columns):
            raise DataError(f"{item_name} has columns {sorted(item)} and item 0 {sorted(columns)}: make them alike")
        for name, value in item.items():
            if not self._fits(value, columns[name]):
                kind = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
                raise DataError(
                    f"{item_name} column {name!r} is {kind} and that of item 0 {columns[name].dtype} "
                    f"{columns[name].shape}: return one type and one shape, such as with a Resize transform"
                )

    def _fits(self, value: Any, column: Column) -> bool:
        return fits(value, column)

    def _check_labels(self, ids: np.ndarray, rows: dict[str, np.ndarray]) -> None:
        if self._labels is None and self._has_stored_labels:
            self._labels = _stored_labels(self._dataset)
        if self._labels is None:
            return
        labels = rows[str(self._label)].reshape(-1)
        differs = np.flatnonzero(labels != self._labels[ids])
        if len(differs):
            sample = int(ids[differs[0]])
            earlier, cure = "had before", "give each item one label"
            if self._has_stored_labels:
                earlier, cure = "its targets say", "correct them, or remove the attribute"
            raise DataError(
                f"{self.name} item {sample} has label {labels[differs[0]]} and {earlier} {self._labels[sample]}: {cure}"
            )

    def _warn_of_random_items(self, hashed: str) -> None:
        logger.warning(
            "items of %s differ at each visit: its fingerprint is that of %s, and its rows are not kept; "
            "leave random transforms to the training step",
            self.name,
            hashed,
        )

    def _read_labels(self) -> np.ndarray:
        label = str(self._label)
        kind = self.schema.columns.get(label)
        if kind is None or kind.dtype not in _INTEGERS or kind.shape not in {(), (1,)}:
            raise DataError(self._no_labels())
        stored = _stored_labels(self._dataset)
        if stored is not None and self._has_stored_labels:
            return stored
        if stored is not None and len(stored) == len(self):
            ids = spaced_ids(len(self), CHECKED_LABELS)
            if np.array_equal(self.take(ids)[label].reshape(-1), stored[ids]):
                self._has_stored_labels = True
                return stored
        logger.info(
            "reading all %d items of %s for their labels: its `targets` or `labels` would save that",
            len(self),
            self.name,
        )
        starts = range(0, len(self), CHUNK_ITEMS)
        chunks = (np.arange(start, min(start + CHUNK_ITEMS, len(self))) for start in starts)
        return np.concatenate([self.take(chunk)[label] for chunk in chunks]).reshape(-1).astype(np.int64)

    def _no_labels(self) -> str:
        return "these items have no whole number called 'label': name it with columns, or set class_floor=0"


class ItemColumns(ItemSource):
    """The columns of the items as they are.

    The first 256 of evenly spaced items show which columns are ragged, and make the fingerprint.

    Args:
        dataset, columns, label_column: see columns_from_torch.

    Raises:
        DataError: it is not a map-style Dataset, it is empty, or an item is unsuitable.
    """

    def __init__(self, dataset: Any, columns: tuple[str, ...] | None = None, label_column: str | None = None) -> None:
        super().__init__(dataset, columns)
        # With the last item, which may be a shorter rest of a text.
        ids = np.union1d(spaced_ids(len(self), FINGERPRINT_ITEMS), [len(self) - 1])
        items = self._items(ids)
        self._schema = Schema({name: Column((), "object") for name in items[0]})
        for sample, item in zip(ids, items, strict=True):
            if set(item) != set(items[0]):
                self._check_item(item, f"item {sample}")
        values = {name: self._joined(name, [item[name] for item in items]) for name in items[0]}
        self._schema = Schema({name: column_of(column) for name, column in values.items()})
        self._label = find_label(values, label_column)
        twice = spaced_ids(len(ids), TWICE_READ_ITEMS)
        again = self._items(ids[twice])
        changed = {
            name
            for position, item in zip(twice, again, strict=True)
            for name in items[0]
            if not _are_equal(items[position][name], item.get(name))
        }
        self.random = bool(changed)
        if changed:
            self._warn_of_random_items(", ".join(sorted(set(values) - changed)) or "its number of items")
        kinds = [f"{name} {column.dtype} {column.shape}" for name, column in self._schema.columns.items()]
        content = [column_digest(column) for name, column in values.items() if name not in changed]
        self._fingerprint = digest("items", len(self), *kinds, *content)

    def _row(self, name: str, value: Any) -> Any:
        try:
            if not is_pillow(value):
                return as_row(value)
            pixels = from_pillow(value)
            return pixels if pixels.ndim == 3 else pixels[:, :, None]
        except DataError as error:
            raise DataError(f"column {name!r} {error}") from None

    def _stacked(self, items: Sequence[Any]) -> dict[str, np.ndarray] | None:
        columns, names = self.schema.columns, self._names
        if names is None or not items or not all(type(item) is tuple and len(item) == len(columns) for item in items):
            return None
        rows = {}
        for name, values in zip(names, zip(*items, strict=True), strict=False):
            column = _stack(values, columns[name], self.allocate) if name in columns else None
            if column is None:
                return None
            rows[name] = column
        return rows

    def _joined(self, name: str, rows: list[Any]) -> np.ndarray:
        try:
            return as_column(rows)
        except DataError as error:
            raise DataError(f"{self.name} column {name!r} {error}") from None

    def _no_labels(self) -> str:
        return NO_LABELS


def _stack(values: Sequence[Any], column: Column, allocate: Allocate) -> np.ndarray | None:
    """Return tensors of a column's very shape and dtype, or Python integers, as an array; None for other values."""
    if column.dtype == "int64" and column.shape == () and all(type(value) is int for value in values):
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.int64)
        return None
    torch = sys.modules.get("torch")
    if torch is None or column.in_objects or type(values[0]) is not torch.Tensor:
        return None
    rows = allocate((len(values), *column.shape), column.dtype)
    out, shape = torch.from_numpy(rows), torch.Size(column.shape)
    for value in values:
        alike = type(value) is torch.Tensor and value.dtype == out.dtype and value.shape == shape
        if not alike or value.requires_grad or value.device.type != "cpu":
            return None
    torch.stack(values, out=out)
    return rows


def _are_like(values: Sequence[Any], column: Column) -> bool:
    """Return whether all values are arrays of a dense column's very shape and dtype."""
    dtype = np.dtype(column.dtype)
    return all(
        isinstance(value, np.ndarray) and value.shape == column.shape and value.dtype == dtype for value in values
    )


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")
    return repr(first) == repr(second)


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


def named_values(item: Any, names: tuple[str, ...] | None) -> dict[str, Any]:
    """Return one item's values by the names of their columns.

    Args:
        item: a mapping, a tuple or list, or a single value.
        names: of a tuple's entries, or those to keep of a mapping; None for `image` or `features` and `label`, or for
            all of a mapping.

    Raises:
        DataError: the names do not fit, or are reserved.
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
            raise DataError(
                f"has a column {name!r}, a name that rayprune adds itself: rename it, or leave it out with columns"
            )
    return values


def _default_names(entries: Sequence[Any]) -> tuple[str, ...]:
    if len(entries) not in {1, 2}:
        raise DataError(f"has {len(entries)} entries: name them with columns, as in ('image', 'mask', 'label')")
    return ("image" if _is_image(entries[0]) else "features", "label")[: len(entries)]


def _is_image(value: Any) -> bool:
    if is_pillow(value):
        return True
    try:
        array = as_row(value)
    except DataError:  # raised again, with the column's name
        return False
    if not isinstance(array, np.ndarray) or array.dtype.kind not in NUMBERS:
        return False
    has_channels = array.ndim == 3 and (array.shape[0] in IMAGE_CHANNELS or array.shape[2] in IMAGE_CHANNELS)
    return has_channels or (array.dtype == np.uint8 and array.ndim == 2)


def is_pillow(value: Any) -> bool:
    """Return whether a value is a Pillow image."""
    return hasattr(value, "getbands")


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor."""
    return hasattr(value, "detach")


def from_pillow(image: Any) -> np.ndarray:
    """Return the pixels of a Pillow image, uint8: gray, (H, W), or RGB, (H, W, 3).

    Raises:
        DataError: it has more than 8 bits per channel.
    """
    if image.mode.startswith(DEEP_MODES):
        raise DataError(f"is an image of mode {image.mode}: convert the images to 8 bits")
    return np.asarray(image.convert("L" if image.mode in GREY_MODES else "RGB"))
