"""WebDataset's tar shards: images and labels side by side, read by id with one request for each run of neighbours.

Shapes: N samples, B batch, H height, W width, C channels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rayprune.core.objects import closest
from rayprune.sources.base import Column, SampleSource, Schema, Splits
from rayprune.sources.cache import cache_root, cached_arrays
from rayprune.sources.classes import count_classes
from rayprune.sources.decoded import check_mode, decoded
from rayprune.sources.encoded import ImageShape, check_size, first_shape, is_readable
from rayprune.sources.fingerprint import digest
from rayprune.sources.parquet_layout import DEFAULT_VALIDATION_FILES, OTHER_VALIDATION_FILES
from rayprune.sources.registry import register_source
from rayprune.sources.storage import Storage, StoredFile, public
from rayprune.sources.views import Subset, holdout
from rayprune.sources.webdataset_index import SampleKeys
from rayprune.sources.webdataset_rows import Shards, TarSource, class_names, class_numbers

logger = logging.getLogger(__name__)

HOLDOUT_SEED = 0
CHUNK_ROWS = 256
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@register_source("webdataset")
@dataclass(frozen=True)
class WebDataset:
    """A tar shard, or a folder of them in the order of their names; on a local disk or any file system of Storage.

    Attributes:
        path: a .tar file or a folder, a path or a URI.
        train_shards: pattern of the names below the folder, without .tar; where none matches, all that are not for
            validation.
        validation_shards: likewise; the default also tries "*val*"; "" for none.
        image_key: suffix of the image's member; default: the first with the suffix of an image.
        label_key: suffix of a member that holds the label, a number or a name, as text; or `json:field`; default:
            `cls`, else `json:label`.
        image_size: pixels that the shorter side is scaled to, before the middle square is cut out; default: as stored.
        num_channels: 1 or 3; default: those of the first image.
        validation_fraction: held out, stratified, where no validation shard matches; 0 for no validation.
        num_classes: default: the number of class names, else the largest training label + 1.
        on_error: "skip" leaves out samples and shards that can't be read, for which it decodes all once; "fail" refuses
            them.
        cache: see `decoded.decoded`.
        cache_dir: see `cache.cache_root`; the shards' index is kept there too.
    """

    path: str
    train_shards: str = "*train*"
    validation_shards: str = DEFAULT_VALIDATION_FILES
    image_key: str | None = None
    label_key: str | None = None
    image_size: int | None = None
    num_channels: int | None = None
    validation_fraction: float = 0.1
    num_classes: int | None = None
    on_error: str = "fail"
    cache: str = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_mode(self.cache)
        check_size(self.image_size)
        if self.on_error not in {"fail", "skip"}:
            raise ValueError(f"data.on_error is {self.on_error!r}: {closest(self.on_error, ('fail', 'skip'))}")
        if self.num_channels not in {None, 1, 3}:
            raise ValueError(f"data.num_channels is {self.num_channels}: set 1 for grey or 3 for colour images")

    def open(self) -> Splits:
        """Index the shards and read the labels; with on_error=skip also decode, to know which samples remain.

        Raises:
            ValueError: shards are missing, unsuitable or (on_error=fail) damaged.
        """
        storage = Storage(self.path)
        train_files, validation_files = _split(
            storage, _shard_files(storage), self.train_shards, self.validation_shards
        )
        keys, skip = SampleKeys(self.image_key, self.label_key), self.on_error == "skip"
        shards = Shards(storage, train_files, keys, self.cache_dir, skip)
        index = shards.index()
        if len(index) == 0:
            raise ValueError(f"the training shards in {public(self.path)!r} hold no samples: correct data.path")
        texts = index.label_texts()
        names = class_names(texts)
        labels = class_numbers(texts, names, index.name)
        images = first_shape(index.all_images(), index.name, self.num_channels, self.image_size, skip)
        given = (len(names) or None) if self.num_classes is None else self.num_classes
        num_classes = count_classes(labels, f"the labels of {public(self.path)}", given)
        columns = {"image": Column(images.shape, "uint8"), "label": Column((), "int64")}
        schema = Schema(columns, "image", num_classes, names if len(names) == num_classes else ())
        train = self._source(shards, schema, names, images)
        if validation_files:
            held = Shards(storage, validation_files, keys, self.cache_dir, skip)
            return Splits(train, self._source(held, schema, names, images))
        if self.validation_fraction == 0:
            return Splits(train, None)
        return holdout(train, self.validation_fraction, HOLDOUT_SEED)

    def _source(self, shards: Shards, schema: Schema, names: tuple[str, ...], images: ImageShape) -> SampleSource:
        source: SampleSource = TarSource(shards, schema, names, images)
        if shards.skip_errors:
            source = _readable(source, shards, images, self.cache_dir)
        return decoded(source, self.cache, self.cache_dir)


def _shard_files(storage: Storage) -> list[StoredFile]:
    if storage.is_file():
        files = [storage.file()]
        names = [storage.full("")]
    else:
        if not storage.is_folder():
            braces = "; give the folder, and set data.train_shards to a pattern" if "{" in storage.path else ""
            raise ValueError(f"data.path {public(storage.path)!r} does not exist: correct it{braces}")
        files = storage.files()
        names = [file.name for file in files]
    tars = [file for file, name in zip(files, names, strict=True) if name.endswith(".tar")]
    if not tars:
        packed = next((name for name in names if name.endswith(COMPRESSED)), None)
        reason = f": unpack {packed} first, a compressed tar can't be read by id" if packed else ": correct data.path"
        raise ValueError(f"data.path {public(storage.path)!r} holds no .tar shard{reason}")
    return tars


def _split(
    storage: Storage, files: list[StoredFile], train: str, validation: str
) -> tuple[tuple[StoredFile, ...], tuple[StoredFile, ...]]:
    """Sort shards into training and validation; one that matches both patterns is for training."""
    if storage.is_file():
        return tuple(files), ()
    training = [file for file in files if _matches(file, train)]
    others = [file for file in files if file not in training]
    held = [file for file in others if _matches(file, validation)]
    if not held and validation == DEFAULT_VALIDATION_FILES:
        held = [file for file in others if _matches(file, OTHER_VALIDATION_FILES)]
    elif not held and validation:
        stems = closest(validation, [_stem(file) for file in others])
        raise ValueError(f"data.validation_shards {validation!r} matches no shard left for validation: {stems}")
    training = training or [file for file in others if file not in held]
    if not training:
        stems = closest(train, [_stem(file) for file in files])
        raise ValueError(f"data.train_shards {train!r} matches no shard left for training: {stems}")
    return tuple(training), tuple(held)


def _stem(file: StoredFile) -> str:
    return file.name.removesuffix(".tar")


def _matches(file: StoredFile, pattern: str) -> bool:
    return fnmatchcase(_stem(file), pattern) or fnmatchcase(Path(_stem(file)).name, pattern)


def _readable(source: SampleSource, shards: Shards, images: ImageShape, cache_dir: str | None) -> SampleSource:
    key = f"webdataset-readable-{digest(source.fingerprint)}"
    build = partial(_find_readable, shards, images)
    readable = cached_arrays(key, cache_root(cache_dir), build, len(source))["readable"]
    if readable.all():
        return source
    left_out, index = np.flatnonzero(~readable), shards.index()
    named = ", ".join(index.name(int(row)) for row in left_out[:5])
    logger.warning("left out %d of %d samples with unreadable images, first: %s", len(left_out), len(readable), named)
    return Subset(source, np.flatnonzero(readable))


def _find_readable(shards: Shards, images: ImageShape, folder: Path) -> None:
    index = shards.index()
    encoded = enumerate(index.all_images(CHUNK_ROWS))
    readable = [is_readable(content, images, index.name(sample)) for sample, content in encoded]
    np.save(folder / "readable.npy", np.array(readable, dtype=bool))
