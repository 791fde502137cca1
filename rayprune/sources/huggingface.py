"""Data sets of the Hugging Face library `datasets`: a folder that it has saved, or a Dataset in Python.

Only folders of `save_to_disk` are read, by `load_from_disk`: nothing is ever downloaded. Images are decoded by this
package, so that both ways of storing them give the same pixels.

Shapes: N samples, B batch, H height, W width, C channels, F features.

Rows of a Dataset of the Hugging Face library, read by id from its Arrow tables.

The fingerprint is made of what the samples hold: the library's own changes with the way a data set was loaded, and the
shards' content with their number.

Shapes: N samples, B batch, H height, W width, C channels, F features.

Columns of a Hugging Face Dataset: which hold the inputs and labels, and their Arrow values as NumPy's.

Shapes: N samples, B batch, F features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayprune.core.references import closest
from rayprune.errors import DataError
from rayprune.sources.base import Column, SampleSource, Schema, Splits, check_ids, count_classes, holdout
from rayprune.sources.cache import check_mode, decoded
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images import ImageShape, check_size, decode_rows, first_shape
from rayprune.sources.parquet.layout import check_class_names, find_columns, hub_class_names
from rayprune.sources.registry import register_source


@dataclass(frozen=True)
class Columns:
    """Which columns to read, and how: the user's keys, None where they are to be found."""

    image: str | None
    label: str | None
    features: tuple[str, ...] | None
    image_size: int | None


def choose_columns(named: Path, schema: pa.Schema, columns: Columns) -> tuple[str | None, str, tuple[str, ...]]:
    """Choose the columns as for Parquet files, where a list of numbers counts as one.

    Args:
        named: the data set, for messages.
        schema: Arrow's, with the library's metadata.
        columns: the user's choice.

    Returns:
        The image column or None, the label column, and the feature columns, which are empty for images.

    Raises:
        ValueError: a column given is missing or of a wrong type, or none suits.
    """
    kinds = [field.with_type(pa.float64()) if _is_vector(field.type) else field for field in schema]
    label = columns.label
    if label is None:
        classes = [name for name in schema.names if hub_class_names(schema, name)]
        label = classes[0] if len(classes) == 1 else None
    return find_columns(named, pa.schema(kinds, schema.metadata), columns.image, label, columns.features)


def _is_vector(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
    return False


def label_names(values: pa.ChunkedArray) -> tuple[str, ...]:
    """Return the sorted unique strings of a label column; empty where it holds no strings."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return ()
    return tuple(sorted(value for value in values.unique().to_pylist() if value is not None))


def class_numbers(values: pa.ChunkedArray, names: tuple[str, ...], named: str) -> np.ndarray:
    """Return labels as class numbers, (N,) int64.

    Args:
        values: integers or strings.
        names: the strings that stand for 0, 1, …; empty for integers.
        named: the column, for messages.

    Raises:
        ValueError: a row has no label, one that is not among the names, or labels are of another type.
    """
    if values.null_count:
        row = int(np.argmax(np.asarray(values.is_null())))
        raise DataError(f"{named} has no label in row {row}: add it, or leave the row out with Dataset.filter")
    kind = values.type
    if names and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        numbers = pc.index_in(values.cast(pa.string()), value_set=pa.array(names, pa.string()))
        if numbers.null_count:
            row = int(np.argmax(np.asarray(numbers.is_null())))
            raise DataError(
                f"{named} row {row} has label {values[row].as_py()!r}, which no training row has: correct it"
            )
        return np.asarray(numbers.cast(pa.int64()))
    if names or not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{named} is {kind}: labels must be ClassLabel, integers or strings, alike in all splits")
    return np.asarray(values.cast(pa.int64()))


def image_bytes(value: dict[str, Any] | None) -> bytes | None:
    """Return an image's bytes; those that the data set only names are read from their file."""
    if value is None:
        return None
    if value["bytes"] is not None or not value.get("path"):
        encoded: bytes | None = value["bytes"]
        return encoded
    try:
        return Path(value["path"]).read_bytes()
    except OSError:
        return None


def encoded_lengths(dataset: Any, column: str) -> np.ndarray:
    """Return the encoded images' bytes, (N,) int64; reads no image."""
    values = dataset.data.column(column)
    encoded = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
    lengths = np.array(pc.binary_length(encoded).fill_null(0), dtype=np.int64)
    if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        outside = np.flatnonzero(np.asarray(encoded.is_null()))
        paths = pc.struct_field(values, "path").take(pa.array(outside)).to_pylist()
        lengths[outside] = [_file_bytes(path) for path in paths]
    chosen = getattr(dataset, "_indices", None)  # rows that `select` or `shuffle` left, without copying them
    return lengths if chosen is None else lengths[np.asarray(chosen.column(0), dtype=np.int64)]


def _file_bytes(path: str | None) -> int:
    try:
        return Path(path).stat().st_size if path else 0
    except OSError:
        return 0


def matrix(values: pa.ChunkedArray, name: str, named: Callable[[int], str], ids: np.ndarray) -> np.ndarray:
    """Return numbers, or lists of equally many, as (B, F) float64.

    Args:
        values: B rows of a column.
        name: the column's, for messages.
        named: says which row an id is, for messages.
        ids: (B,) int64 of the rows.

    Raises:
        ValueError: a row is null, or lists are of several lengths.
    """
    if values.null_count:
        row = int(ids[int(np.argmax(np.asarray(values.is_null())))])
        raise DataError(f"{named(row)} is null in column {name!r}: correct it, or leave the row out")
    if not _is_vector(values.type):
        return np.asarray(values.cast(pa.float64(), safe=False)).reshape(-1, 1)
    lengths = np.asarray(pc.list_value_length(values))
    if len(np.unique(lengths)) > 1:
        other = int(np.argmax(lengths != lengths[0]))
        raise DataError(
            f"{named(int(ids[other]))} has {lengths[other]} numbers in column {name!r} and row {ids[0]} has "
            f"{lengths[0]}: give all rows equally many"
        )
    return np.asarray(pc.list_flatten(values).cast(pa.float64(), safe=False)).reshape(len(values), -1)


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
        raise DataError(
            f"source 'huggingface' needs the package {error.name}: pip install 'rayprune[huggingface]'"
        ) from None
    try:
        return load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        line = " ".join(str(error).split())[:160]
        raise DataError(f"{folder} is damaged ({line}): save the data set again") from None


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
        raise DataError(f"{rows.named} has no rows: save a data set that has some")
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
            raise DataError(f"{self.name_row(int(ids[0]))} has {width} features, others more or fewer: make them alike")
        with np.errstate(over="ignore"):
            values = np.concatenate(parts, axis=1).astype(np.float32)
        if len(bad := np.argwhere(~np.isfinite(values))):
            row = self.name_row(int(ids[bad[0][0]]))
            raise DataError(f"{row} has a feature that is NaN or infinite: correct it, or leave the row out")
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


VALIDATION_SPLITS = ("validation", "valid", "val", "test")
HOLDOUT_SEED = 0


@register_source("huggingface")
@dataclass(frozen=True)
class HuggingFace:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Attributes:
        path: the folder.
        train_split: of a DatasetDict; a Dataset has none and is for training as a whole.
        validation_split: default: the first of validation, valid, val and test that is there; "" for none.
        image_column: of type Image, binary or a struct with `bytes`; default: found by name and type.
        label_column: ClassLabel, integers or strings; default: found by name, else the only ClassLabel or integer one.
        feature_columns: numbers, or lists of equally many numbers, in this order; default where there is no image: all
            but the label.
        image_size: pixels that the shorter side is scaled to, before the middle square is cut out; default: as stored.
        validation_fraction: held out, stratified, where there is no validation split; 0 for no validation.
        num_classes: default: the number of class names, else the largest training label + 1.
        cache: see `decoded.decoded`.
        cache_dir: see `cache.cache_root`.
    """

    path: str
    train_split: str = "train"
    validation_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    feature_columns: tuple[str, ...] | None = None
    image_size: int | None = None
    validation_fraction: float = 0.1
    num_classes: int | None = None
    cache: str = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_mode(self.cache)
        check_size(self.image_size)
        if self.feature_columns == ():
            raise DataError("data.feature_columns = []: name at least one column, or leave it out for all")

    def open(self) -> Splits:
        """Find the splits and columns and read the labels.

        Raises:
            ValueError: the package is not installed, the folder is no saved data set or damaged, or a split or column
                is missing or unsuitable.
        """
        folder = _folder(self.path)
        rows = DatasetRows(str(folder), None)
        splits = rows.split_names()
        validation = None
        if splits:
            if self.train_split not in splits:
                raise DataError(
                    f"data.train_split {self.train_split!r} is not in {folder}: {closest(self.train_split, splits)}"
                )
            rows = replace(rows, split=self.train_split)
            validation = self._validation(folder, splits)
        columns = Columns(self.image_column, self.label_column, self.feature_columns, self.image_size)
        train = open_rows(rows, columns, self.num_classes)
        if validation is not None:
            held = open_rows(replace(rows, split=validation), columns, None, like=train)
            return Splits(self._decoded(train), self._decoded(held))
        if self.validation_fraction == 0:
            return Splits(self._decoded(train), None)
        return holdout(self._decoded(train), self.validation_fraction, HOLDOUT_SEED)

    def _validation(self, folder: Path, splits: tuple[str, ...]) -> str | None:
        others = [name for name in splits if name != self.train_split]
        if self.validation_split is None:
            return next((name for name in VALIDATION_SPLITS if name in others), None)
        if self.validation_split and self.validation_split not in others:
            name = self.validation_split
            raise DataError(f"data.validation_split {name!r} is not in {folder}: {closest(name, others)}")
        return self.validation_split or None

    def _decoded(self, source: SampleSource) -> SampleSource:
        return decoded(source, self.cache, self.cache_dir)


def from_huggingface(
    dataset: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    feature_columns: tuple[str, ...] | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    cache: str = "none",
    cache_dir: str | None = None,
) -> SampleSource:
    """Return the samples of a `datasets.Dataset`; one that lies on disk pickles into its paths, others with their data.

    Args:
        dataset: the Dataset; its own format and transform are left aside.
        image_column, label_column, feature_columns, image_size, num_classes, cache, cache_dir: as in HuggingFace.

    Raises:
        ValueError: it is no Dataset, or a column is missing or unsuitable.
    """
    check_size(image_size)
    if not all(hasattr(dataset, name) for name in ("with_format", "features", "__len__")) or hasattr(dataset, "keys"):
        raise DataError(
            f"{type(dataset).__name__} is no datasets.Dataset: choose a split, as in dataset['train'], "
            "and do not stream it"
        )
    columns = Columns(image_column, label_column, feature_columns, image_size)
    return decoded(open_rows(DatasetRows(None, None, dataset), columns, num_classes), cache, cache_dir)


def _folder(path: str) -> Path:
    if "://" in path:
        raise DataError(f"data.path {path!r} is a URI: copy the folder to a local disk, or store Parquet files")
    folder = Path(path).expanduser().absolute()
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        other = ", or set data.source=parquet" if any(folder.glob("**/*.parquet")) else ""
        raise DataError(f"data.path {path!r} is no folder written by Dataset.save_to_disk: correct it{other}")
    return folder
