"""Parquet files, as the Hugging Face hub stores datasets: encoded images, or numeric columns.

By default the first open decodes every row into the decoded cache, and later ones memory-map it. With data.cache=none,
rows are decoded from their row groups at every visit, and an epoch shuffles windows of row groups. Files are split by
their names, and columns found by name and type; the config can set both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from rayprune.core.validation import UNBOUNDED
from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import NumClasses, SampleSource, Schema, Splits, check_labels, count_classes
from rayprune.sources.cache import (
    CacheMode,
    cache_root,
    cached_arrays,
    check_mode,
    decoded,
    has_room,
    leave_out_unreadable,
)
from rayprune.sources.fingerprint import digest
from rayprune.sources.images.decode import MAX_PIXELS, MaxPixels, check_size
from rayprune.sources.memory import RowSource
from rayprune.sources.parquet.layout import (
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
from rayprune.sources.storage import DEFAULT_VALIDATION, public
from rayprune.sources.views import holdout


@register_source("parquet")
@dataclass(frozen=True)
class Parquet:
    """A Parquet file, or a folder of them in the order of their names.

    Attributes:
        path: a .parquet file, or a folder of them: a local path or a URI such as s3://bucket/folder.
        train_files: pattern of the names without .parquet; if none matches, all that are not for validation.
        validation_files: pattern of the names; the default also tries "*val*"; "" for none.
        image_column: encoded images, binary or a struct with `bytes`; default: found by name and type.
        label_column: integers or strings; default: found by name, else the only integer column.
        feature_columns: numeric columns, in this order; default if there is no image: all except the label and pandas'
            index.
        validation_fraction: held out, stratified, if no file is for validation; 0 for no validation.
        num_classes: default: the number of class names stored, else the largest training label + 1.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out. Default: the images' own
            size, which must be the same for all.
        max_pixels: refuse images whose header claims more pixels, width times height, before they are decoded.
        on_error: "skip" leaves out unreadable rows and files, and files with other columns; "fail" refuses them.
        cache: see `cache.decoded`; `auto` refuses to start if the disk has less than twice the room.
        cache_dir: folder of the cache; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
        buffer_bytes: with cache none, the size of the encoded row groups that each process keeps.
    """

    path: str
    train_files: str = "*train*"
    validation_files: str = DEFAULT_VALIDATION
    image_column: str | None = None
    label_column: str | None = None
    feature_columns: tuple[str, ...] | None = None
    validation_fraction: float = 0.1
    num_classes: NumClasses = None
    image_size: int | None = None
    max_pixels: MaxPixels = MAX_PIXELS
    on_error: Literal["fail", "skip"] = "fail"
    cache: CacheMode = "auto"
    cache_dir: str | None = None
    buffer_bytes: Annotated[int, UNBOUNDED] = BUFFER_BYTES
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_size(self.image_size, self.max_pixels)
        if self.feature_columns == ():
            raise ConfigError("data.feature_columns = []: name at least one column, or leave it out for all")
        if self.buffer_bytes < 0:
            raise ConfigError(f"data.buffer_bytes = {self.buffer_bytes}: must be at least 0")

    def open(self) -> Splits:
        """Find the files and columns and read the labels; with on_error=skip, decode all rows to find unreadable ones.

        Raises:
            ConfigError: there are no such files, keys contradict one another, or validation_fraction is outside its
                range.
            DataError: columns are missing, or columns or files are unsuitable or (on_error=fail) damaged.
        """
        train_rows, validation_rows, class_names = self._find_rows()
        if self.image_size is not None and train_rows.image_column is None:
            raise ConfigError(f"data.image_size is set and {public(self.path)} has no image column: leave it out")
        labels, _ = read_labels(train_rows)
        if len(labels) == 0:
            raise DataError(
                f"the training files in {public(self.path)!r} have no rows: correct data.path or data.train_files"
            )
        if train_rows.image_column is not None:
            train_rows = replace(train_rows, images=first_image_shape(train_rows, self.image_size, self.max_pixels))
        owner = f"column {train_rows.label_column!r} of {public(self.path)}"
        num_classes = count_classes(labels, owner, self.num_classes, class_names)
        check_labels(labels, num_classes, train_rows.row_name, class_names)
        input_name = "features" if train_rows.image_column is None else "image"
        schema = Schema.for_classification(input_name, train_rows.shape, num_classes, class_names)
        train = self._open_rows(train_rows, schema, labels)
        if validation_rows.files:
            validation_rows = replace(validation_rows, images=train_rows.images)
            labels, _ = read_labels(validation_rows)
            check_labels(labels, num_classes, validation_rows.row_name)
            return Splits(train, self._open_rows(validation_rows, schema, labels))
        return holdout(train, self.validation_fraction)

    def _find_rows(self) -> tuple[ParquetRows, ParquetRows, tuple[str, ...]]:
        """Return the training and the validation rows, without the images' shape, and the class names."""
        skip = self.on_error == "skip"
        train, validation = (
            usable_files(files, ShardFile.check_rows, skip)
            for files in split_files(self.path, self.train_files, self.validation_files)
        )
        if not train:
            raise DataError(f"data.path {public(self.path)!r} holds no training file that can be read: restore one")
        file_schema = train[0].schema()
        image, label, features = find_columns(
            str(train[0]), file_schema, self.image_column, self.label_column, self.feature_columns
        )
        check = partial(check_columns, first=file_schema, image=image, label=label, features=features)
        for step in (check, partial(ShardFile.column, name=label)):
            train, validation = (usable_files(files, step, skip) for files in (train, validation))
        if not train:
            raise DataError(
                f"data.path {public(self.path)!r} holds no training file whose labels can be read: restore one"
            )
        names = string_labels(train, label)
        rows = ParquetRows(train, label, names, image, features, skip)
        return rows, replace(rows, files=validation), names or hub_class_names(file_schema, label)

    def _open_rows(self, rows: ParquetRows, schema: Schema, labels: np.ndarray) -> SampleSource:
        columns = [rows.image_column or "", rows.label_column, *rows.feature_columns]
        columns += [] if self.image_size is None else [f"size {self.image_size}"]
        fingerprint = digest("parquet", *columns, str(rows.shape), labels, *(file.digest() for file in rows.files))
        groups = ParquetGroups(rows, schema, fingerprint, labels, self.buffer_bytes)
        check_mode(self.cache)
        if self.cache in {"memory", "none"}:
            source = _without_bad_rows(groups, groups.readable(), rows) if rows.skip_errors else groups
            return decoded(source, self.cache)
        # Which rows are left out depends on max_pixels; the others are the same.
        key = f"parquet-{digest(fingerprint, *(['skip', self.max_pixels] if rows.skip_errors else ['fail']))}"
        num_bytes = len(labels) * (schema.row_bytes + 1)  # of `readable`
        root = cache_root(self.cache_dir)
        if self.cache == "auto":
            has_room(groups, num_bytes, root / key)
        open_arrays = partial(cached_arrays, key, root, partial(build_rows, rows), num_bytes)
        cached = RowSource(open_arrays, schema, fingerprint, labels)
        return _without_bad_rows(cached, cached.arrays()["readable"], rows) if rows.skip_errors else cached


def _without_bad_rows(source: SampleSource, readable: np.ndarray, rows: ParquetRows) -> SampleSource:
    return leave_out_unreadable(source, readable, lambda row: rows.row_name(row).rpartition("/")[2])
