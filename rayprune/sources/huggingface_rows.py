"""Rows of a Dataset of the Hugging Face library, read by id from its Arrow tables.

The fingerprint is made of what the samples hold: the library's own changes with the way a data set was loaded, and the
shards' content with their number.

Shapes: N samples, B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayprune.sources.base import Column, SampleSource, Schema, check_ids
from rayprune.sources.classes import count_classes
from rayprune.sources.encoded import ImageShape, decode_rows, first_shape
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.huggingface_columns import (
    Columns,
    choose_columns,
    class_numbers,
    encoded_lengths,
    image_bytes,
    label_names,
    matrix,
)
from rayprune.sources.parquet_layout import check_class_names, hub_class_names

CHUNK_ROWS = 256


@dataclass(frozen=True)
class DatasetRows:
    """Which Dataset: all a process needs to open it for itself.

    Attributes:
        folder: what `load_from_disk` reads.
        split: of a DatasetDict.
        dataset: a Dataset there already, in place of a folder.
    """

    folder: str | None
    split: str | None
    dataset: Any = None

    @property
    def named(self) -> Path:
        """What messages call it."""
        return Path("the dataset") if self.folder is None else Path(self.folder) / (self.split or "")

    def split_names(self) -> tuple[str, ...]:
        """Return the splits of a DatasetDict; none for a Dataset."""
        loaded = _load(self.folder) if self.folder is not None else self.dataset
        return tuple(loaded) if isinstance(loaded, dict) else ()

    def open(self) -> Any:
        """Return the Dataset, giving Arrow tables."""
        loaded = self.dataset if self.folder is None else _load(self.folder)
        return (loaded if self.split is None else loaded[self.split]).with_format("arrow")


def _load(folder: str) -> Any:
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError as error:
        raise ValueError(
            f"source 'huggingface' needs the package {error.name}: pip install 'rayprune[huggingface]'"
        ) from None
    try:
        return load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        line = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder} is damaged ({line}): save the data set again") from None


def open_rows(
    rows: DatasetRows, columns: Columns, num_classes: int | None, like: HuggingFaceSource | None = None
) -> HuggingFaceSource:
    """Find the columns and read the labels.

    Args:
        rows: which Dataset.
        columns: the user's choice.
        num_classes: data.num_classes.
        like: the training part, whose columns, classes and image size a validation part shares.

    Raises:
        ValueError: a column is missing or unsuitable, a sample has no label, or there are no samples.
    """
    dataset = rows.open()
    if len(dataset) == 0:
        raise ValueError(f"{rows.named} has no rows: save a data set that has some")
    schema = dataset.features.arrow_schema
    image, label, features = choose_columns(rows.named, schema, columns)
    values = dataset.with_format("arrow", columns=[label])[:].column(label)
    names = like.label_names if like else label_names(values)
    labels = class_numbers(values, names, f"{rows.named} column {label!r}")
    stored = hub_class_names(schema, label)
    if like:
        check_class_names(rows.named, stored, like.stored_names, "the training split")
        num_classes, class_names = like.schema.num_classes, like.schema.class_names
    else:
        class_names = names or stored
        given = (len(class_names) or None) if num_classes is None else num_classes
        num_classes = count_classes(labels, f"column {label!r} of {rows.named}", given)
    source = HuggingFaceSource(rows, image, label, features, names, labels, dataset)
    source.stored_names = stored
    images = None
    if image is not None:
        images = like.images if like else first_shape(source.encoded(), source.name_row, None, columns.image_size)
    source.describe(images, num_classes, class_names if len(class_names) == num_classes else ())
    return source


class HuggingFaceSource(SampleSource):
    """Rows of a Dataset, decoded at every visit.

    Args:
        rows: which Dataset.
        image: the column of encoded images; None for numeric rows.
        label: the column of labels.
        features: the numeric columns; empty for images.
        label_names: the strings that stand for the labels 0, 1, …; empty for integer labels.
        labels: (N,) int64; kept in this process only, the others read the column.
        dataset: the opened Dataset, for this process.
    """

    def __init__(
        self,
        rows: DatasetRows,
        image: str | None,
        label: str,
        features: tuple[str, ...],
        label_names: tuple[str, ...],
        labels: np.ndarray,
        dataset: Any,
    ) -> None:
        self._rows, self._image, self._label, self._features = rows, image, label, features
        self.label_names = label_names
        self.stored_names: tuple[str, ...] = ()  # a ClassLabel's
        self._num_samples = len(labels)
        self._lock = threading.Lock()
        self._labels: np.ndarray | None = labels
        self._dataset: Any = dataset
        self.images: ImageShape | None = None
        self._schema = Schema({})
        self._fingerprint = ""

    def describe(self, images: ImageShape | None, num_classes: int | None, class_names: tuple[str, ...]) -> None:
        """Set what is known only once the first row has been read, and with it the fingerprint."""
        self.images = images
        if images is not None:
            column, name = Column(images.shape, "uint8"), "image"
        else:
            width = sum(part.shape[1] for part in self._parts(np.zeros(1, np.int64)))
            column, name = Column((width,), "float32"), "features"
        self._schema = Schema({name: column, "label": Column((), "int64")}, name, num_classes, class_names)
        shape = f"{column.shape} {images and images.size}"
        self._fingerprint = digest("huggingface", name, shape, self.labels, *self._content())

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in {"_lock", "_labels", "_dataset"}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._labels, self._dataset = threading.Lock(), None, None

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
        if self._labels is None:
            values = self._open().with_format("arrow", columns=[self._label])[:].column(self._label)
            self._labels = class_numbers(values, self.label_names, self._label)
        return self._labels

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return "cheap" if self._image is None else "expensive"

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        ids = np.asarray(ids, dtype=np.int64)
        labels = self.labels[ids]
        if self.images is None:
            features = self._vectors(ids) if len(ids) else np.empty((0, *self._schema.columns["features"].shape), "f4")
            return {"features": features, "label": labels}, features.nbytes + labels.nbytes
        encoded = self._encoded(ids) if len(ids) else []
        pixels = decode_rows(encoded, self.images, lambda position: self.name_row(int(ids[position])))
        return {"image": pixels, "label": labels}, sum(len(content or b"") for content in encoded) + labels.nbytes

    def encoded(self) -> Iterator[bytes | None]:
        """Yield all images, encoded, in order."""
        for row in range(self._num_samples):
            yield self._encoded(np.array([row]))[0]

    def name_row(self, row: int) -> str:
        """Say which row it is, for messages."""
        return f"{self._rows.named} row {row}"

    def _open(self) -> Any:
        with self._lock:
            if self._dataset is None:
                self._dataset = self._rows.open()
            return self._dataset

    def _table(self, ids: np.ndarray, columns: list[str]) -> pa.Table:
        return self._open().with_format("arrow", columns=columns)[ids]

    def _encoded(self, ids: np.ndarray) -> list[bytes | None]:
        column = self._table(ids, [str(self._image)]).column(0)
        if not pa.types.is_struct(column.type):
            values: list[bytes | None] = column.to_pylist()
            return values
        return [image_bytes(value) for value in column.to_pylist()]

    def _parts(self, ids: np.ndarray) -> list[np.ndarray]:
        table = self._table(ids, list(self._features))
        return [matrix(table.column(name), name, self.name_row, ids) for name in self._features]

    def _vectors(self, ids: np.ndarray) -> np.ndarray:
        parts = self._parts(ids)
        if (width := sum(part.shape[1] for part in parts)) != self._schema.columns["features"].shape[0]:
            raise ValueError(
                f"{self.name_row(int(ids[0]))} has {width} features, others more or fewer: make them alike"
            )
        with np.errstate(over="ignore"):
            values = np.concatenate(parts, axis=1).astype(np.float32)
        if len(bad := np.argwhere(~np.isfinite(values))):
            row = self.name_row(int(ids[bad[0][0]]))
            raise ValueError(f"{row} has a feature that is NaN or infinite: correct it, or leave the row out")
        return np.ascontiguousarray(values)

    def _content(self) -> Iterator[str | int | np.ndarray]:
        """Yield what is hashed: the rows' content, of evenly spaced ones where all are more than 1 GiB."""
        total = 4 * self._num_samples * sum(column.shape[0] for column in self._schema.columns.values() if column.shape)
        if self._image is not None:
            lengths = encoded_lengths(self._open(), self._image)
            yield lengths
            total = int(lengths.sum())
        count = min(self._num_samples, max(1, self._num_samples * WHOLE_BYTES // max(1, total)))
        ids = np.arange(count, dtype=np.int64) * self._num_samples // count
        for start in range(0, count, CHUNK_ROWS):
            chunk = ids[start : start + CHUNK_ROWS]
            if self._image is None:
                yield np.concatenate(self._parts(chunk), axis=1)
            else:
                yield digest(*(np.frombuffer(content or b"", np.uint8) for content in self._encoded(chunk)))
