"""The training and validation files of a Parquet dataset, and the columns of the inputs and the labels."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pyarrow as pa

from rayprune.core.references import closest
from rayprune.errors import ConfigError, DataError
from rayprune.sources.parquet.reader import ShardFile, is_text, text_labels
from rayprune.sources.storage import Storage, split_shards

IMAGE_NAMES = ("image", "img", "images", "picture", "png", "jpg", "jpeg", "bytes")
LABEL_NAMES = ("label", "labels", "y", "target", "targets", "fine_label", "class", "cls")


def split_files(
    path: str, train_files: str, validation_files: str
) -> tuple[tuple[ShardFile, ...], tuple[ShardFile, ...]]:
    """Split the files of a folder into training and validation as `split_shards` does; a single file is for training.

    Raises:
        ConfigError: there is no file, or a pattern matches none.
    """
    storage = Storage(path)
    if storage.is_file():
        return (ShardFile(storage),), ()
    names = [file.name for file in storage.files()] if storage.is_folder() else []
    names = [name for name in names if name.endswith(".parquet") and "/" not in name]
    if not names:
        raise ConfigError(
            f"data.path {storage.public()!r} is neither a Parquet file nor a folder of *.parquet: correct it"
        )
    files = {name.removesuffix(".parquet"): ShardFile(storage, name) for name in names}
    return split_shards(files, train_files, validation_files, "file")


def find_columns(
    owner: str,
    schema: pa.Schema,
    image_column: str | None,
    label_column: str | None,
    feature_columns: Sequence[str] | None,
) -> tuple[str | None, str, tuple[str, ...]]:
    """Choose the columns to read: check the configured ones, and find the others by name and type.

    Args:
        owner: the file or dataset, for messages.
        schema: of the file or dataset.
        image_column, label_column, feature_columns: as configured; None to find them.

    Returns:
        The image column or None, the label column, and the feature columns, which are empty for images.

    Raises:
        ConfigError: an image column and feature columns are both configured.
        DataError: a configured column is missing or of a wrong type, or none suits.
    """
    configured = [name for name in (image_column, label_column, *(feature_columns or ())) if name is not None]
    _check_names(owner, configured, schema.names)
    if image_column is not None and feature_columns is not None:
        raise ConfigError("data.image_column and data.feature_columns are both set: keep one, a sample has one input")
    image = None
    if feature_columns is None:
        image = image_column or _find_image(schema)
        if image is not None and not is_image(schema.field(image).type):
            kind = schema.field(image).type
            raise DataError(f"{owner} column {image!r} is {kind}: images must be binary or a struct with `bytes`")
    label = label_column or _find_label(owner, schema)
    return image, label, () if image is not None else _find_features(owner, schema, label, feature_columns)


def check_columns(file: ShardFile, first: pa.Schema, image: str | None, label: str, features: Sequence[str]) -> None:
    """Refuse a file that lacks a column, or whose types or class names differ from those of the first file.

    Raises:
        DataError: names the file and the column.
    """
    schema = file.schema()
    names = [label, *features, *([] if image is None else [image])]
    _check_names(str(file), names, schema.names)
    for name in names:
        kind, usual = schema.field(name).type, first.field(name).type
        sort = _sort_of_label if name == label else is_image if name == image else _is_number
        if sort(kind) != sort(usual):
            raise DataError(f"{file} column {name!r} is {kind}, and {usual} in the first file")
    check_class_names(str(file), hub_class_names(schema, label), hub_class_names(first, label), "the first file")


def string_labels(files: Sequence[ShardFile], column: str) -> tuple[str, ...]:
    """Return the sorted unique strings of a label column over all files; empty for any other column."""
    return tuple(sorted({name for file in files for name in text_labels(file.column(column))}))


def hub_class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Return the class names that the Hugging Face hub stores in a file's metadata; empty for none."""
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(stored["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def check_class_names(owner: str, names: Sequence[str], usual: Sequence[str], where: str) -> None:
    """Refuse class names that are stored in two orders, so that a label would mean two classes.

    Raises:
        DataError: both have names, and they differ.
    """
    if not names or not usual or tuple(names) == tuple(usual):
        return
    pairs = list(zip(names, usual, strict=False))
    start = next((label for label, (name, other) in enumerate(pairs) if name != other), len(pairs))
    ours, theirs = (f"{len(part)} classes, from {start}: {list(part[start : start + 3])}" for part in (names, usual))
    raise DataError(f"{owner} has {ours}, and {where} {theirs}: store them with one order of names")


def _check_names(owner: str, columns: Sequence[str], valid: Sequence[str]) -> None:
    for name in columns:
        if name not in valid:
            raise DataError(f"{owner} has no column {name!r}: {closest(name, valid)}")


def is_image(kind: pa.DataType) -> bool:
    """Return whether a type can hold encoded images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_image(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _sort_of_label(kind: pa.DataType) -> str:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_text(plain):
        return "text"
    return "integer" if pa.types.is_integer(plain) or pa.types.is_boolean(plain) else str(plain)


def _index_columns(schema: pa.Schema) -> set[str]:
    """Return the columns of pandas' index, such as row numbers, from which a network could learn the rows."""
    try:
        stored = json.loads((schema.metadata or {})[b"pandas"])["index_columns"]
    except (KeyError, TypeError, ValueError):
        stored = []
    names = {name for name in stored if isinstance(name, str)}  # an index that is a range is stored as a mapping
    return names | {name for name in schema.names if re.fullmatch(r"__index_level_\d+__", name)}


def _find_image(schema: pa.Schema) -> str | None:
    usual_first = sorted(schema, key=lambda field: (*IMAGE_NAMES, field.name).index(field.name))
    return next((field.name for field in usual_first if is_image(field.type)), None)


def _find_label(owner: str, schema: pa.Schema) -> str:
    index = _index_columns(schema)
    usual = [name for name in LABEL_NAMES if name in schema.names and name not in index]
    integers: list[str] = [
        field.name for field in schema if pa.types.is_integer(field.type) and field.name not in index
    ]
    if usual or len(integers) == 1:
        return (usual or integers)[0]
    raise DataError(f"{owner} has no column with a usual label name: set data.label_column to one of {schema.names}")


def _find_features(owner: str, schema: pa.Schema, label: str, configured: Sequence[str] | None) -> tuple[str, ...]:
    numeric = [field.name for field in schema if field.name != label and _is_number(field.type)]
    for name in configured or ():
        if name not in numeric:
            raise DataError(f"{owner} column {name!r} is {schema.field(name).type}: {closest(name, numeric)}")
    index = _index_columns(schema)
    features = tuple(name for name in numeric if name not in index) if configured is None else tuple(configured)
    if not features:
        raise DataError(f"{owner} has neither an image nor a numeric column: set data.image_column")
    return features
