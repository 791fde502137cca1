"""Datasets of the Hugging Face library `datasets`: a folder that it saved, or a Dataset in Python.

Folders are read with `load_from_disk`, and nothing is ever downloaded. rayprune decodes the images itself, so a folder
and a Dataset give the same pixels. The fingerprint is computed from the samples: the library's own fingerprint depends
on how a dataset was loaded, and a digest of the files on the number of shards.

Shapes: N samples, B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError, one_line
from rayprune.sources.base import (
    DescribedSource,
    NumClasses,
    RowCost,
    SampleSource,
    Schema,
    Splits,
    check_ids,
    check_labels,
    count_classes,
    spaced_ids,
)
from rayprune.sources.cache import CacheMode, decoded
from rayprune.sources.datasets.columns import options_of_a_call
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images.decode import MAX_PIXELS, ImageShape, MaxPixels, check_size, decode_rows, first_shape
from rayprune.sources.parquet.layout import check_class_names, find_columns, hub_class_names
from rayprune.sources.parquet.reader import encoded_values, is_text, text_labels, text_numbers
from rayprune.sources.registry import register_source
from rayprune.sources.views import holdout

VALIDATION_SPLITS = ("validation", "valid", "val", "test")
CHUNK_ROWS = 256


@register_source("huggingface")
@dataclass(frozen=True)
class HuggingFace:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Attributes:
        path: the folder.
        train_split: of a DatasetDict; a Dataset has no splits, and all of it is for training.
        validation_split: default: the first of validation, valid, val and test that exists; "" for none.
        image_column: of type Image, binary or a struct with `bytes`; default: found by name and type.
        label_column: ClassLabel, integers or strings; default: found by name, else the only ClassLabel or integer one.
        feature_columns: numbers, or lists of equally many numbers, in this order; default if there is no image: all
            except the label.
        image_size: pixels that the shorter side is scaled to, before the center square is cut out; default: as stored.
        max_pixels: refuse images whose header claims more pixels, width times height, before they are decoded.
        validation_fraction: held out, stratified, if there is no validation split; 0 for no validation.
        num_classes: default: the number of class names, else the largest training label + 1.
        cache: see `cache.decoded`.
        cache_dir: folder of the cache; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
    """

    path: str
    train_split: str = "train"
    validation_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    feature_columns: tuple[str, ...] | None = None
    image_size: int | None = None
    max_pixels: MaxPixels = MAX_PIXELS
    validation_fraction: float = 0.1
    num_classes: NumClasses = None
    cache: CacheMode = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_size(self.image_size, self.max_pixels)
        if self.feature_columns == ():
            raise ConfigError("data.feature_columns = []: name at least one column, or leave it out for all")

    def open(self) -> Splits:
        """Find the splits and columns and read the labels.

        Raises:
            ConfigError: the package is not installed, path is not a saved dataset, a split is missing, or
                validation_fraction is outside its range.
            DataError: the folder is damaged, or a column is missing or unsuitable.
        """
        folder = _saved_folder(self.path)
        loaded = load_dataset(str(folder), None)
        train_split = validation_split = None
        if isinstance(loaded, dict):
            train_split = self.train_split
            if train_split not in loaded:
                raise ConfigError(
                    f"data.train_split {train_split!r} is not in {folder}: {closest(train_split, loaded)}"
                )
            validation_split = self._find_validation(folder, [name for name in loaded if name != train_split])
        train = self._open_split(folder, train_split)
        if validation_split is None:
            return holdout(self._with_cache(train), self.validation_fraction)
        return Splits(self._with_cache(train), self._with_cache(self._open_split(folder, validation_split, train)))

    def _open_split(self, folder: Path, split: str | None, train: HuggingFaceSource | None = None) -> HuggingFaceSource:
        open_dataset = partial(load_dataset, str(folder), split)
        return HuggingFaceSource(open_dataset, str(folder / (split or "")), self, train)

    def _find_validation(self, folder: Path, others: list[str]) -> str | None:
        if self.validation_split is None:
            return next((name for name in VALIDATION_SPLITS if name in others), None)
        if self.validation_split and self.validation_split not in others:
            name = self.validation_split
            raise ConfigError(f"data.validation_split {name!r} is not in {folder}: {closest(name, others)}")
        return self.validation_split or None

    def _with_cache(self, source: SampleSource) -> SampleSource:
        return decoded(source, self.cache, self.cache_dir)


def from_huggingface(
    dataset: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    feature_columns: tuple[str, ...] | None = None,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    num_classes: int | None = None,
    cache: str = "none",
    cache_dir: str | None = None,
) -> SampleSource:
    """Return the labeled images or features of a `datasets.Dataset`, as `rayprune train` needs them.

    `prune` and `local_loader` take a Dataset itself, and deliver its columns as they are. A Dataset on disk pickles
    into its paths, others with their data.

    Args:
        dataset: the Dataset; its own format and transform are ignored.
        image_column, label_column, feature_columns, image_size, max_pixels, num_classes, cache, cache_dir: as in
            HuggingFace.

    Raises:
        ConfigError: feature_columns is empty, or image_size or cache is wrong.
        DataError: it is not a Dataset, or a column is missing or unsuitable.
    """
    check_dataset(dataset)
    with options_of_a_call():
        keys = HuggingFace(
            "",
            image_column=image_column,
            label_column=label_column,
            feature_columns=feature_columns,
            image_size=image_size,
            max_pixels=max_pixels,
            num_classes=num_classes,
        )
        return decoded(HuggingFaceSource(partial(same_dataset, dataset), "the dataset", keys), cache, cache_dir)


def check_dataset(dataset: Any) -> None:
    """Refuse anything but a `datasets.Dataset`.

    Raises:
        DataError: names its type.
    """
    if not all(hasattr(dataset, name) for name in ("with_format", "features", "__len__")) or hasattr(dataset, "keys"):
        raise DataError(
            f"{type(dataset).__name__} is not a datasets.Dataset: choose a split, as in dataset['train'], "
            "and do not stream it"
        )


def _saved_folder(path: str) -> Path:
    if "://" in path:
        raise ConfigError(f"data.path {path!r} is a URI: copy the folder to a local disk, or store Parquet files")
    folder = Path(path).expanduser().absolute()
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        other = ", or set data.source=parquet" if any(folder.glob("**/*.parquet")) else ""
        raise ConfigError(f"data.path {path!r} is not a folder written by Dataset.save_to_disk: correct it{other}")
    return folder


def load_dataset(folder: str, split: str | None) -> Any:
    """Return the Dataset that a folder holds, or a split of its DatasetDict; without a split, all of it.

    Raises:
        ConfigError: the package is not installed.
        DataError: the folder is damaged.
    """
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"source 'huggingface' needs the package {error.name}: pip install 'rayprune[huggingface]'"
        ) from None
    try:
        loaded = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{folder} is damaged ({one_line(error)}): save the dataset again") from None
    return loaded if split is None else loaded[split]


def same_dataset(dataset: Any) -> Any:
    """Return the Dataset; a `functools.partial` of this function opens a Dataset that is pickled with the source."""
    return dataset


class HuggingFaceSource(DescribedSource):
    """Rows of a Dataset, decoded at every visit.

    Args:
        open_dataset: returns the Dataset; picklable, for the processes that read.
        name: of the Dataset, for messages.
        keys: the user's choice of columns, image size and number of classes.
        train: the training part, whose columns, classes and image size a validation part shares.

    Raises:
        DataError: a column is missing or unsuitable, a sample has no label, or there are no samples.
    """

    process_local = ("_dataset", "_labels")

    def __init__(
        self, open_dataset: Callable[[], Any], name: str, keys: HuggingFace, train: HuggingFaceSource | None = None
    ) -> None:
        self._open_dataset, self._name, self._path = open_dataset, name, keys.path
        self._dataset = open_dataset()
        if len(self._dataset) == 0:
            raise DataError(f"{name} has no rows: save a dataset that has some")
        super().__init__(len(self._dataset), Schema({}), "")
        schema = self._dataset.features.arrow_schema
        self._image, self._label, self._features = _find_columns(name, schema, keys)
        self._text_labels: tuple[str, ...] = (
            train._text_labels if train is not None else text_labels(self._column(self._label))
        )
        self._class_names = hub_class_names(schema, self._label)
        labels = self.labels
        if train is not None:
            check_class_names(name, self._class_names, train._class_names, "the training split")
            num_classes, class_names = train.schema.num_classes, train.schema.class_names
        else:
            num_classes, class_names = keys.num_classes, self._text_labels or self._class_names
        num_classes = count_classes(labels, f"column {self._label!r} of {name}", num_classes, class_names)
        check_labels(labels, num_classes, self._row_name, class_names)
        self._images: ImageShape | None = train._images if train is not None else self._first_shape(keys)
        if self._images is not None:
            input_name, shape, size = "image", self._images.shape, self._images.size
        else:
            input_name, shape, size = "features", self._matrix(np.zeros(1, np.int64)).shape[1:], None
        self._schema = Schema.for_classification(input_name, shape, num_classes, class_names)
        self._fingerprint = digest("huggingface", input_name, f"{shape} {size}", labels, *self._content())

    def _first_shape(self, keys: HuggingFace) -> ImageShape | None:
        if self._image is None:
            return None
        images = (self._encoded(np.array([row]))[0] for row in range(len(self)))
        shape = first_shape(images, self._row_name, size=keys.image_size, max_pixels=keys.max_pixels)
        return shape if self._path else replace(shape, option="image_size")

    def _content(self) -> Iterator[np.ndarray | str]:
        """Yield the content to hash: all rows, or evenly spaced ones if they have more than 1 GiB."""
        if self._image is not None:
            lengths = encoded_lengths(self._opened(), self._image)
            yield lengths
            num_bytes = int(lengths.sum())
        else:
            num_bytes = len(self) * self.schema.columns["features"].shape[0] * 4
        ids = spaced_ids(len(self), max(1, len(self) * WHOLE_BYTES // max(1, num_bytes)))
        for start in range(0, len(ids), CHUNK_ROWS):
            chunk = ids[start : start + CHUNK_ROWS]
            if self._image is None:
                yield self._matrix(chunk)
            else:
                yield digest(*(np.frombuffer(content or b"", np.uint8) for content in self._encoded(chunk)))

    @property
    def row_cost(self) -> RowCost:
        return "cheap" if self._image is None else "expensive"

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        ids = np.asarray(ids, dtype=np.int64)
        labels = self.labels[ids]
        if self._images is None:
            features = self._vectors(ids)
            return {"features": features, "label": labels}, features.nbytes + labels.nbytes
        encoded = self._encoded(ids)
        pixels = decode_rows(encoded, self._images, lambda position: self._row_name(int(ids[position])))
        return {"image": pixels, "label": labels}, sum(len(content or b"") for content in encoded) + labels.nbytes

    def _row_name(self, row: int) -> str:
        return f"{self._name} row {row}"

    def _opened(self) -> Any:
        with self._lock:
            if self._dataset is None:
                self._dataset = self._open_dataset()
            return self._dataset

    def _column(self, name: str, ids: np.ndarray | slice = slice(None)) -> pa.ChunkedArray:
        return self._opened().with_format("arrow", columns=[name])[ids].column(name)

    def _read_labels(self) -> np.ndarray:
        column_name = f"{self._name} column {self._label!r}"
        return class_numbers(self._column(self._label), self._text_labels, column_name)

    def _encoded(self, ids: np.ndarray) -> list[bytes | None]:
        """Return the encoded images of rows; None for a missing one."""
        if len(ids) == 0:
            return []
        column = self._column(str(self._image), ids)
        images: list[Any] = column.to_pylist()
        return [image_bytes(image) for image in images] if pa.types.is_struct(column.type) else images

    def _matrix(self, ids: np.ndarray) -> np.ndarray:
        """Return the feature columns of rows side by side, (B, F) float64."""
        return np.concatenate([self._numbers(name, ids) for name in self._features], axis=1)

    def _numbers(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Return a column of numbers, or of lists of equally many, as a (B, F) float64 matrix."""
        values = self._column(name, ids)
        if values.null_count:
            row = self._row_name(int(ids[_first_null(values)]))
            raise DataError(f"{row} is null in column {name!r}: correct it, or leave the row out")
        if not _is_vector(values.type):
            return np.asarray(values.cast(pa.float64(), safe=False)).reshape(-1, 1)
        lengths = np.asarray(pc.list_value_length(values))
        if len(np.unique(lengths)) > 1:
            other = int(np.argmax(lengths != lengths[0]))
            raise DataError(
                f"{self._row_name(int(ids[other]))} has {lengths[other]} numbers in column {name!r} and row {ids[0]} "
                f"has {lengths[0]}: give all rows equally many"
            )
        return np.asarray(pc.list_flatten(values).cast(pa.float64(), safe=False)).reshape(len(values), -1)

    def _vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the features of rows, (B, F) float32."""
        width = self.schema.columns["features"].shape[0]
        if len(ids) == 0:
            return np.empty((0, width), np.float32)
        matrix = self._matrix(ids)
        if matrix.shape[1] != width:
            row = self._row_name(int(ids[0]))
            raise DataError(f"{row} has {matrix.shape[1]} features and row 0 has {width}: give all rows equally many")
        with np.errstate(over="ignore"):
            vectors = np.ascontiguousarray(matrix, dtype=np.float32)
        if len(bad := np.argwhere(~np.isfinite(vectors))):
            row = self._row_name(int(ids[bad[0][0]]))
            raise DataError(f"{row} has a feature that is NaN or infinite: correct it, or leave the row out")
        return vectors


def _find_columns(name: str, schema: pa.Schema, keys: HuggingFace) -> tuple[str | None, str, tuple[str, ...]]:
    """Return the image, label and feature columns as for Parquet files; a list of numbers counts as one number."""
    kinds = [field.with_type(pa.float64()) if _is_vector(field.type) else field for field in schema]
    label = keys.label_column
    if label is None:
        classes = [column for column in schema.names if hub_class_names(schema, column)]
        label = classes[0] if len(classes) == 1 else None
    return find_columns(name, pa.schema(kinds, schema.metadata), keys.image_column, label, keys.feature_columns)


def _is_vector(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
    return False


def class_numbers(values: pa.ChunkedArray, class_texts: tuple[str, ...], column_name: str) -> np.ndarray:
    """Return labels as class numbers, (N,) int64."""
    if values.null_count:
        row = _first_null(values)
        raise DataError(f"{column_name} has no label in row {row}: add it, or leave the row out with Dataset.filter")
    kind = values.type
    if class_texts and is_text(kind):
        return np.asarray(text_numbers(values, class_texts, column_name).cast(pa.int64()))
    if class_texts or not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{column_name} is {kind}: labels must be ClassLabel, integers or strings, alike in all splits")
    try:
        return np.asarray(values.cast(pa.int64()))
    except pa.ArrowInvalid as error:
        raise DataError(f"{column_name} has a label outside int64 ({one_line(error)}): correct it") from None


def _first_null(values: pa.ChunkedArray) -> int:
    return int(np.argmax(np.asarray(values.is_null())))


def image_bytes(image: dict[str, Any] | None) -> bytes | None:
    """Return an image's bytes, from its file if the dataset only stores the path."""
    if image is None:
        return None
    encoded: bytes | None = image["bytes"]
    if encoded is not None or not image.get("path"):
        return encoded
    try:
        return Path(image["path"]).read_bytes()
    except OSError:
        return None


def encoded_lengths(dataset: Any, column: str) -> np.ndarray:
    """Return the bytes of each encoded image, (N,) int64, without reading the images."""
    values = dataset.data.column(column)
    encoded = encoded_values(values)
    lengths = np.array(pc.binary_length(encoded).fill_null(0), dtype=np.int64)
    if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        in_files = np.flatnonzero(np.asarray(encoded.is_null()))
        paths = pc.struct_field(values, "path").take(pa.array(in_files)).to_pylist()
        lengths[in_files] = [_file_bytes(path) for path in paths]
    indices = getattr(dataset, "_indices", None)  # of rows that `select` or `shuffle` chose, without a copy
    return lengths if indices is None else lengths[np.asarray(indices.column(0), dtype=np.int64)]


def _file_bytes(path: str | None) -> int:
    try:
        return Path(path).stat().st_size if path else 0
    except OSError:
        return 0
