"""Data sources by name: open one from the keys of the config's `data:` section, and measure its inputs.

Shapes: N samples, C channels, F features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Protocol, TypeVar

import numpy as np

from rayprune.core.plan import rows_of_groups
from rayprune.core.references import call_object, closest, is_reference, load_object
from rayprune.core.validation import check_keys, plain
from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import SampleSource, Splits, spaced_ids
from rayprune.sources.tables.audits import corrected_labels
from rayprune.sources.views import Limited, Relabeled, holdout

SOURCES: dict[str, type[Any]] = {}
NO_AUGMENT = {"crop": 0, "flip": False}
CHUNK_VALUES = 1 << 22  # of inputs, read at once for their statistics
MAX_GROUPS = 64


class SourceKeys(Protocol):
    """A frozen dataclass whose fields are the keys of `data:` for one source.

    An optional class attribute `default_augment` is the augmentation that suits its samples.
    """

    def open(self) -> Splits:
        """Open the source."""
        ...


Keys = TypeVar("Keys", bound=SourceKeys)


def register_source(name: str) -> Callable[[type[Keys]], type[Keys]]:
    """Register a frozen dataclass as the source of this name."""

    def register(cls: type[Keys]) -> type[Keys]:
        SOURCES[name] = cls
        return cls

    return register


def default_augment(source_name: str) -> dict[str, Any]:
    """Return the augmentation that suits a source: `crop` in pixels of padding and `flip`; none for an unknown one."""
    return dict(getattr(SOURCES.get(source_name), "default_augment", NO_AUGMENT))


def open_data(
    source: str,
    limit: int | None = None,
    cache: str | None = None,
    hold_out: float | None = None,
    relabel: str | None = None,
    relabel_at: float = 0.5,
    **keys: Any,
) -> Splits:
    """Open a source and check its labels.

    Args:
        source: a registered name, or `module:function` or `path.py:function`; the function is called with the keys
            and returns Splits, a SampleSource, or a pair (train, validation or None).
        limit: use only the first samples of the training part.
        cache: `auto`, `memory`, `disk` or `none`; ignored by sources that do not decode.
        hold_out: share of the training part, in (0, 1), that validates in place of the source's validation part.
        relabel: the audit of the training part, after `limit` and `hold_out`; its suggested labels replace the given
            ones in the training part.
        relabel_at: replace them where the probability of a wrong label is at least this.
        **keys: the source's own keys.

    Raises:
        ConfigError: an unknown source or key, a missing key, a value of another type or out of range, or a function
            that can't be called or returns something else.
        DataError: an empty part, labels that are missing or outside 0..num_classes-1, parts that differ, or data that
            the source can't use.
        RunFolderError: the audit can't be read, or is of other data.
    """
    splits = _call_function(source, keys) if is_reference(source) else _open_registered(source, cache, keys)
    _check_part("training", splits.train)
    if splits.validation is not None:
        _check_part("validation", splits.validation)
        _check_alike(splits.train, splits.validation)
    if limit is not None:
        splits = Splits(Limited(splits.train, limit), splits.validation)
    if hold_out is not None:
        splits = holdout(splits.train, hold_out)  # its seed is fixed: the samples must not change with the run's seed
        if splits.validation is None:
            raise DataError(
                f"data.hold_out {hold_out:g} leaves nothing, as no class has two samples: leave data.hold_out "
                "out, or add samples"
            )
    if relabel is not None:  # after the holdout, so that an audit of the training part never saw what validates
        labels = corrected_labels(relabel, splits.train, relabel_at)
        splits = Splits(Relabeled(splits.train, labels), splits.validation)
    return splits


def call_with_keys(setting: str, reference: str, keys: Mapping[str, Any], keys_name: str) -> Any:
    """Call the function that a setting names as `module:function` or `path.py:function`.

    Raises:
        ConfigError: there is no such function, it does not take these keys, or it raises an error; names the setting.
    """
    function = load_object(reference)
    try:
        inspect.signature(function).bind(**keys)
    except TypeError as error:
        raise ConfigError(
            f"{setting} {reference!r} can't be called with {keys_name} ({error}): correct the keys, or the function"
        ) from None
    return call_object(f"{setting} {reference!r}", function, **keys)


def _open_registered(name: str, cache: str | None, keys: dict[str, Any]) -> Splits:
    if name not in SOURCES:
        raise ConfigError(f"data.source {name!r} is unknown: {closest(name, SOURCES)}, or give 'module:function'")
    cls = SOURCES[name]
    if cache is not None and "cache" in {field.name for field in fields(cls)}:
        keys = {"cache": cache, **keys}
    check_keys(cls, keys, "data", f"source {name!r}")
    splits: Splits = cls(**{key: plain(value) for key, value in keys.items()}).open()
    return splits


def _call_function(reference: str, keys: dict[str, Any]) -> Splits:
    match call_with_keys("data.source", reference, keys, f"the keys {sorted(keys)}"):
        case Splits() as splits:
            return splits
        case SampleSource() as train:
            return Splits(train, None)
        case (SampleSource() as train, (SampleSource() | None) as validation):
            return Splits(train, validation)
        case other:
            raise ConfigError(
                f"data.source {reference!r} returned {type(other).__name__}: "
                "return Splits, a SampleSource, or (train, validation)"
            )


def _check_part(part: str, source: SampleSource) -> None:
    if len(source) == 0:
        raise DataError(f"the {part} part of the data is empty: check data.path and the other keys of data")
    num_classes = source.schema.num_classes
    if num_classes is None:
        raise DataError(
            f"the {part} samples have no class label: `rayprune train` classifies; for other tasks write "
            "your own loop with rayprune.prune or rayprune.local_loader"
        )
    labels = source.labels
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(source),):
        raise DataError(
            f"the {part} labels are {labels.dtype} of shape {labels.shape}: give integers of shape ({len(source)},)"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise DataError(
            f"{part} row {outside[0]} has label {labels[outside[0]]}, outside 0..{num_classes - 1}: "
            "correct the label, or data.num_classes"
        )


def _check_alike(train: SampleSource, validation: SampleSource) -> None:
    ours, theirs = train.schema, validation.schema
    if dict(ours.columns) != dict(theirs.columns) or ours.num_classes != theirs.num_classes:
        shapes = [{name: column.shape for name, column in schema.columns.items()} for schema in (ours, theirs)]
        raise DataError(
            f"training and validation rows differ: {shapes[0]} and {ours.num_classes} classes, {shapes[1]} and "
            f"{theirs.num_classes} classes: bring both to one shape, dtype and number of classes"
        )


def input_statistics(source: SampleSource, num_rows: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the mean and standard deviation of the input over at most num_rows evenly spaced samples.

    If rows are read in groups, the samples come from at most MAX_GROUPS evenly spaced groups. The chunks of one
    pass are merged by the formulas of Chan, Golub and LeVeque (1979).

    Returns:
        Mean and standard deviation, float64: (C,) for images, scaled to 0..1, (F,) for features. The deviation of a
        constant is 1.
    """
    name = source.schema.input
    shape = source.schema.columns[name].shape
    ids = _evenly_spaced_ids(source, num_rows)
    chunk_rows = max(1, CHUNK_VALUES // math.prod(shape))
    # Relative to the first sample: a constant is then exactly 0, and a large offset costs no digits.
    pivot = source.take(ids[:1])[name].reshape(-1, shape[-1])[0].astype(np.float64)
    count, mean, squares = 0, np.zeros(shape[-1]), np.zeros(shape[-1])
    for start in range(0, len(ids), chunk_rows):
        inputs = source.take(ids[start : start + chunk_rows])[name]
        values = inputs.reshape(-1, shape[-1]).astype(np.float64) - pivot
        shift = values.mean(axis=0) - mean
        total = count + len(values)
        squares += len(values) * values.var(axis=0) + shift**2 * (count * len(values) / total)
        mean += shift * (len(values) / total)
        count = total
    scale = 255.0 if name == "image" else 1.0
    deviation = np.sqrt(squares / count) / scale
    deviation[deviation == 0] = 1.0
    return tuple(((mean + pivot) / scale).tolist()), tuple(deviation.tolist())


def _evenly_spaced_ids(source: SampleSource, num_rows: int) -> np.ndarray:
    groups, total = source.groups, len(source)
    starts = np.unique(groups[groups < total]) if groups is not None else np.empty(0, np.int64)
    if groups is None or len(starts) <= MAX_GROUPS:
        return spaced_ids(total, num_rows)
    rows = rows_of_groups(starts[spaced_ids(len(starts), MAX_GROUPS)], groups)
    return rows[spaced_ids(len(rows), num_rows)]
