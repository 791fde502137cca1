"""Items of a map-style torch Dataset as columns of NumPy arrays; knows torch only by what its objects can do.

Shapes: B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rayprune.core.objects import closest
from rayprune.sources.base import Column
from rayprune.sources.images import DEEP_MODES, GREY_MODES

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
            raise ValueError(f"has no column {missing[0]!r}: {closest(missing[0], [str(name) for name in item])}")
        values = {str(name): item[name] for name in chosen}
    else:
        entries = list(item) if isinstance(item, tuple | list) else [item]
        values = dict(zip(names or _default_names(entries), entries, strict=False))
        if len(values) != len(entries):
            raise ValueError(f"has {len(entries)} entries and columns are {names}: give each entry a name of its own")
    for name in values:
        if name in RESERVED:
            raise ValueError(f"has a column {name!r}, the engine's own name: set columns to other names")
    return {name: _column(name, value, float_features) for name, value in values.items()}


def _default_names(entries: Sequence[Any]) -> tuple[str, ...]:
    if len(entries) not in {1, 2}:
        raise ValueError(f"has {len(entries)} entries: name them with columns, as in ('image', 'mask', 'label')")
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
            raise ValueError(f"column {name!r} is an image of mode {value.mode}: convert the images to 8 bits")
        return np.asarray(value.convert("L" if value.mode in GREY_MODES else "RGB"))
    if hasattr(value, "detach"):  # a tensor, of any device
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        line = " ".join(str(error).split())[:80]
        raise ValueError(f"column {name!r} is no array ({line}): return a tensor, an array or a number") from None
    if array.dtype.kind not in "biuf":
        what = "text" if array.dtype.kind in "US" else type(value).__name__
        raise ValueError(f"column {name!r} is {what}: return numbers, or leave it out with columns")
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
            raise ValueError(
                f"{named(position)} has columns {sorted(item)} and {first} {sorted(columns)}: make them alike"
            )
        for name, value in item.items():
            column = columns[name]
            if value.shape != column.shape:
                raise ValueError(
                    f"{named(position)} column {name!r} is {value.shape} and that of {first} {column.shape}: "
                    "bring all items to one shape in the dataset, such as with a Resize transform"
                )
            if value.dtype != column.dtype:
                raise ValueError(
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
