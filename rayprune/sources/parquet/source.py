"""Parquet files, as the Hugging Face hub stores data sets: encoded images, or numeric columns.

By default the first open decodes every row into the decoded cache, later ones memory-map it. Where the disk is too
small for that, or with data.cache=none, rows are decoded from their row groups at every visit, and the shuffle goes by
windows of row groups. The shards are matched by the stems of their names, the columns by name and type; both can be
set.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import DataError
from rayprune.sources.base import Column, SampleSource, Schema, Splits, Subset, count_classes, holdout
from rayprune.sources.cache import cache_root, cached_arrays, check_mode, decoded
from rayprune.sources.fingerprint import digest
from rayprune.sources.memory import RowSource
from rayprune.sources.parquet.layout import (
    DEFAULT_VALIDATION_FILES,
    check_columns,
    find_columns,
    hub_class_names,
    split_files,
    string_labels,
)
from rayprune.sources.parquet.reader import (
    ParquetRows,
    ShardFile,
    build_rows,
    first_image_shape,
    read_labels,
    usable_files,
)
from rayprune.sources.parquet.row_groups import BUFFER_BYTES, ParquetGroups
from rayprune.sources.registry import register_source
from rayprune.sources.storage import public

logger = logging.getLogger(__name__)

HOLDOUT_SEED = 0


@register_source("parquet")
@dataclass(frozen=True)
class Parquet:
    """A Parquet file, or a folder of them in the order of their names.

    Attributes:
        path: a .parquet file, or a folder of them: a local path or a URI such as s3://bucket/folder.
        train_files: pattern of the stems; where none matches, all that are not for validation.
        validation_files: pattern of the stems; the default also tries "*val*"; "" for none.
        image_column: encoded images, binary or a struct with `bytes`; default: found by name and type.
        label_column: integers or strings; default: found by name, else the only integer column.
        feature_columns: numeric columns, in this order; default where there is no image: all but the label and pandas'
            index.
        validation_fraction: held out, stratified, where no validation file matches; 0 for no validation.
        num_classes: default: the number of class names stored, else the largest training label + 1.
        image_size: scale the shorter side of every image to this and cut out the middle square; default: images must
            have one size.
        on_error: "skip" leaves out rows and files that can't be read, and files of other columns; "fail" refuses them.
        cache: `disk` keeps decoded rows in the decoded cache, `memory` in each process; `none` decodes at every visit;
            `auto` is `disk` where the disk has twice the room, else `none`.
        cache_dir: see `cache.cache_root`.
        buffer_bytes: with cache none, how much of the row groups read last each process keeps, encoded.
    """

    path: str
    train_files: str = "*train*"
    validation_files: str = DEFAULT_VALIDATION_FILES
    image_column: str | None = None
    label_column: str | None = None
    feature_columns: tuple[str, ...] | None = None
    validation_fraction: float = 0.1
    num_classes: int | None = None
    image_size: int | None = None
    on_error: str = "fail"
    cache: str = "auto"
    cache_dir: str | None = None
    buffer_bytes: int = BUFFER_BYTES
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        if self.on_error not in {"fail", "skip"}:
            raise DataError(f"data.on_error is {self.on_error!r}: {closest(self.on_error, ('fail', 'skip'))}")
        if self.feature_columns == ():
            raise DataError("data.feature_columns = []: name at least one column, or leave it out for all")
        if self.image_size is not None and self.image_size < 1:
            raise DataError(f"data.image_size = {self.image_size}: must be at least 1 pixel")
        if self.buffer_bytes < 0:
            raise DataError(f"data.buffer_bytes = {self.buffer_bytes}: must be at least 0")
        check_mode(self.cache)

    def open(self) -> Splits:
        """Find the files and columns and read the labels; with on_error=skip also decode, to know which rows remain.

        Raises:
            ValueError: files or columns are missing, unsuitable or (on_error=fail) damaged.
        """
        train_rows, validation_rows, class_names = self._find_rows()
        if self.image_size is not None and train_rows.image_column is None:
            raise DataError(f"data.image_size is set and {public(self.path)} has no image column: leave it out")
        labels, _ = read_labels(train_rows)
        if len(labels) == 0:
            raise DataError(
                f"the training files in {public(self.path)!r} have no rows: correct data.path or data.train_files"
            )
        if train_rows.image_column is not None:
            train_rows = replace(train_rows, shape=first_image_shape(train_rows))
        named = f"column {train_rows.label_column!r} of {public(self.path)}"
        given = (len(class_names) or None) if self.num_classes is None else self.num_classes
        num_classes = count_classes(labels, named, given)
        schema = _row_schema(train_rows, num_classes, class_names if len(class_names) == num_classes else ())
        train = self._open_rows(train_rows, schema)
        if validation_rows.files:
            validation_rows = replace(validation_rows, shape=train_rows.shape)
            return Splits(train, self._open_rows(validation_rows, schema))
        if self.validation_fraction == 0:
            return Splits(train, None)
        return holdout(train, self.validation_fraction, HOLDOUT_SEED)

    def _find_rows(self) -> tuple[ParquetRows, ParquetRows, tuple[str, ...]]:
        """Return the training rows (images still without shape), the validation rows, and the class names."""
        skip = self.on_error == "skip"
        train, validation = (
            usable_files(files, ShardFile.metadata, skip)
            for files in split_files(self.path, self.train_files, self.validation_files)
        )
        if not train:
            raise DataError(
                f"data.path {public(self.path)!r} holds no training file: correct data.path or data.train_files"
            )
        file_schema = train[0].schema()
        image, label, features = find_columns(
            train[0], file_schema, self.image_column, self.label_column, self.feature_columns
        )
        check = partial(check_columns, first=file_schema, image=image, label=label, features=features)
        for step in (check, partial(ShardFile.column, name=label)):
            train, validation = (usable_files(files, step, skip) for files in (train, validation))
        if not train:
            raise DataError(
                f"data.path {public(self.path)!r} holds no training file whose labels can be read: restore one"
            )
        names = string_labels(train, label)
        rows = ParquetRows(train, label, names, image, features, (len(features),), skip, self.image_size)
        return rows, replace(rows, files=validation), names or hub_class_names(file_schema, label)

    def _open_rows(self, rows: ParquetRows, schema: Schema) -> SampleSource:
        labels, _ = read_labels(rows)
        chosen = [rows.image_column or "", rows.label_column, *rows.feature_columns]
        chosen += [] if rows.image_size is None else [f"size {rows.image_size}"]
        fingerprint = digest("parquet", *chosen, str(rows.shape), labels, *(file.digest() for file in rows.files))
        groups = ParquetGroups(rows, schema, fingerprint, labels, self.buffer_bytes)
        if self.cache == "memory" or decoded(groups, self.cache, self.cache_dir) is groups:
            kept = _without_bad_rows(groups, groups.readable(), rows) if rows.skip_errors else groups
            return decoded(kept, "memory" if self.cache == "memory" else "none")
        key = f"parquet-{digest(fingerprint, 'skip' if rows.skip_errors else 'fail')}"
        num_bytes = math.prod(rows.shape) * np.dtype(schema.columns[schema.input].dtype).itemsize + 9
        build = partial(build_rows, rows)
        open_arrays = partial(cached_arrays, key, cache_root(self.cache_dir), build, len(labels) * num_bytes)
        source = RowSource(open_arrays, schema, fingerprint, labels)
        return _without_bad_rows(source, source.arrays()["readable"], rows) if rows.skip_errors else source


def _row_schema(rows: ParquetRows, num_classes: int, class_names: tuple[str, ...]) -> Schema:
    name, dtype = ("features", "float32") if rows.image_column is None else ("image", "uint8")
    columns = {name: Column(rows.shape, dtype), "label": Column((), "int64")}
    return Schema(columns, name, num_classes, class_names)


def _without_bad_rows(source: SampleSource, readable: np.ndarray, rows: ParquetRows) -> SampleSource:
    if readable.all():
        return source
    left_out = np.flatnonzero(~readable)
    starts = np.cumsum([0, *(file.metadata().num_rows for file in rows.files)])
    named = []
    for row in left_out[:5]:
        position = int(np.searchsorted(starts, row, side="right")) - 1
        named.append(f"{rows.files[position].name} row {row - starts[position]}")
    logger.warning("left out %d of %d rows, first: %s", len(left_out), len(readable), ", ".join(named))
    return Subset(source, np.flatnonzero(readable))
