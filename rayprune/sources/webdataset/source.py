"""WebDataset tar shards, read by id.

Only the bytes of the requested images are read. Neighbors are read with one request, including small gaps between them.

Shapes: N samples, B batch, M samples of a shard, H height, W width, C channels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.errors import ConfigError, DataError
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
)
from rayprune.sources.cache import CacheMode, cache_root, cached_arrays, decoded, leave_out_unreadable
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images.decode import (
    LEAVE_OUT,
    MAX_PIXELS,
    ImageShape,
    MaxPixels,
    check_size,
    decode_rows,
    first_shape,
    readable_rows,
)
from rayprune.sources.registry import register_source
from rayprune.sources.storage import (
    DEFAULT_VALIDATION,
    OPEN_FILES,
    REMOTE_THREADS,
    RangeReader,
    Storage,
    StoredFile,
    in_threads,
    public,
    split_shards,
)
from rayprune.sources.views import holdout
from rayprune.sources.webdataset.index import SampleKeys, shard_name, shard_samples

logger = logging.getLogger(__name__)

CHUNK_ROWS = 256
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_NUMBER = re.compile(r"-?\d{1,18}")


@register_source("webdataset")
@dataclass(frozen=True)
class WebDataset:
    """A tar shard, or a folder of shards in the order of their names, on any file system of Storage.

    Attributes:
        path: a .tar file or a folder, local or a URI.
        train_shards: pattern of the names below the folder, without .tar; if none matches, all shards that are not
            for validation.
        validation_shards: pattern of the names; the default also tries "*val*"; "" for none.
        image_key: suffix of the member with the image; default: the first member with the suffix of an image.
        label_key: suffix of the member with the label, a number or a name as text; or `json:field`; default: `cls`,
            else `json:label`.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out. Default: the images' own
            size, which must be the same for all.
        max_pixels: refuse images whose header claims more pixels, width times height, before they are decoded.
        num_channels: 1 or 3; default: those of the first image.
        validation_fraction: held out, stratified, if no shard is for validation; 0 for no validation.
        num_classes: default: the number of class names, else the largest training label + 1.
        on_error: "skip" decodes all samples once and leaves out unreadable samples and shards; "fail" refuses them.
        cache: see `cache.decoded`.
        cache_dir: folder of the cache and of the shards' index; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
    """

    path: str
    train_shards: str = "*train*"
    validation_shards: str = DEFAULT_VALIDATION
    image_key: str | None = None
    label_key: str | None = None
    image_size: int | None = None
    max_pixels: MaxPixels = MAX_PIXELS
    num_channels: Literal[1, 3] | None = None
    validation_fraction: float = 0.1
    num_classes: NumClasses = None
    on_error: Literal["fail", "skip"] = "fail"
    cache: CacheMode = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_size(self.image_size, self.max_pixels)

    def open(self) -> Splits:
        """Index the shards and read the labels; with on_error=skip, decode all images to find the unreadable ones.

        Raises:
            ConfigError: there are no such shards, or validation_fraction is outside its range.
            DataError: shards are unsuitable or (on_error=fail) damaged.
        """
        storage = Storage(self.path)
        train_files, validation_files = self._split_files(storage)
        keys = SampleKeys(self.image_key, self.label_key)
        shards = Shards(storage, train_files, keys, self.cache_dir, self.on_error == "skip")
        index = shards.index()
        if len(index) == 0:
            raise DataError(f"the training shards in {public(self.path)!r} hold no samples: correct data.path")
        texts = index.label_texts()
        names = class_names(texts)
        labels = class_numbers(texts, names, index.name)
        images = first_shape(
            (index.images(np.array([sample]))[0][0] for sample in range(len(index))),
            index.name,
            self.num_channels,
            self.image_size,
            on_error=self.on_error,
            owner=public(self.path),
            max_pixels=self.max_pixels,
        )
        num_classes = count_classes(labels, f"the labels of {public(self.path)}", self.num_classes, names)
        check_labels(labels, num_classes, index.name)
        schema = Schema.for_classification("image", images.shape, num_classes, names)
        train = self._open_shards(index, schema, names, images)
        if validation_files:
            validation_index = replace(shards, files=validation_files).index()
            texts = validation_index.label_texts()
            check_labels(class_numbers(texts, names, validation_index.name), num_classes, validation_index.name)
            return Splits(train, self._open_shards(validation_index, schema, names, images))
        return holdout(train, self.validation_fraction)

    def _split_files(self, storage: Storage) -> tuple[tuple[StoredFile, ...], tuple[StoredFile, ...]]:
        if storage.is_file():
            files = {storage.full(""): storage.file()}
        elif storage.is_folder():
            files = {file.name: file for file in storage.files()}
        else:
            braces = "; give the folder, and set data.train_shards to a pattern" if "{" in storage.path else ""
            raise ConfigError(f"data.path {storage.public()!r} does not exist: correct it{braces}")
        tars = {name.removesuffix(".tar"): file for name, file in files.items() if name.endswith(".tar")}
        if not tars:
            packed = next((name for name in files if name.endswith(COMPRESSED)), None)
            cure = f"unpack {packed} first, a compressed tar can't be read by id" if packed else "correct data.path"
            raise ConfigError(f"data.path {storage.public()!r} holds no .tar shard: {cure}")
        if storage.is_file():
            return tuple(tars.values()), ()
        return split_shards(tars, self.train_shards, self.validation_shards, "shard")

    def _open_shards(self, index: Index, schema: Schema, names: tuple[str, ...], images: ImageShape) -> SampleSource:
        source = TarSource(index, schema, names, images)
        if self.on_error == "fail":
            return decoded(source, self.cache, self.cache_dir)
        readable = cached_arrays(
            f"webdataset-readable-{digest(source.fingerprint, self.max_pixels)}",
            cache_root(self.cache_dir),
            lambda folder: np.save(folder / "readable.npy", source.readable()),
            len(source),
        )["readable"]
        return decoded(leave_out_unreadable(source, readable, source.name), self.cache, self.cache_dir)


class TarSource(DescribedSource):
    """Samples of tar shards, decoded at every visit; `names` are those of the classes, if labels are names."""

    process_local = ("_index", "_labels")
    row_cost: RowCost = "expensive"

    def __init__(self, index: Index, schema: Schema, names: tuple[str, ...], images: ImageShape) -> None:
        self._shards, self._names, self._images = index.shards, names, images
        self._index: Index | None = index
        labels = class_numbers(index.label_texts(), names, index.name)
        shape = f"{images.shape} {images.size}"
        fingerprint = digest("webdataset", shape, labels, index.num_bytes, index.crc)
        super().__init__(len(index), schema, fingerprint, labels)

    def _open(self) -> Index:
        with self._lock:
            if self._index is None:
                self._index = self._shards.index()
            return self._index

    def _read_labels(self) -> np.ndarray:
        index = self._open()
        return class_numbers(index.label_texts(), self._names, index.name)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        index = self._open()
        encoded, num_bytes = index.images(ids)
        pixels = decode_rows(encoded, self._images, index.names(ids))
        return {"image": pixels, "label": self.labels[ids]}, num_bytes

    def readable(self) -> np.ndarray:
        """Decode all images, and return which can be read, (N,) bool.

        Raises:
            DataError: an image has another size, or more than 8 bits per channel.
        """
        index, readable = self._open(), np.zeros(len(self), dtype=bool)
        for ids in np.array_split(np.arange(len(self)), range(CHUNK_ROWS, len(self), CHUNK_ROWS)):
            readable[ids] = readable_rows(index.images(ids)[0], self._images, index.names(ids))
        return readable

    def name(self, sample: int) -> str:
        """Return a sample's name in messages."""
        return self._open().name(sample)


@dataclass(frozen=True)
class Shards:
    """The shards of a source, in the order of the samples; all that a process needs to read their samples.

    With `skip_errors`, samples that can't be used are left out instead of refused.
    """

    storage: Storage
    files: tuple[StoredFile, ...]
    keys: SampleKeys
    cache_dir: str | None
    skip_errors: bool

    def index(self) -> Index:
        """Find the samples; a shard is only read when it is first opened.

        Raises:
            DataError: a sample or shard is damaged and skip_errors is off, or a shard can't be read.
        """
        whole = sum(file.num_bytes for file in self.files) <= WHOLE_BYTES

        def find(file: StoredFile) -> np.ndarray:
            samples = shard_samples(self.storage, file, self.keys, self.cache_dir, whole)
            # Each memory map holds an open file.
            return np.array(samples) if len(self.files) > OPEN_FILES else samples

        records = in_threads(find, self.files, 1 if self.storage.is_local else REMOTE_THREADS)
        for position, (file, samples) in enumerate(zip(self.files, records, strict=True)):
            faulty = samples["fault"] != b""
            if faulty.any():
                self._report(file, samples[faulty][0], int(faulty.sum()))
                records[position] = samples[~faulty]
        return Index(self, records)

    def _report(self, file: StoredFile, sample: Any, count: int) -> None:
        name, fault = (sample[field].decode(errors="replace") for field in ("name", "fault"))
        line = f"{shard_name(self.storage, file)}{f' sample {name!r}' if name else ''} {fault}"
        if not self.skip_errors:
            raise DataError(f"{line}: correct it, or {LEAVE_OUT}")
        logger.warning("left out %d samples of a shard: %s", count, line)


class Index:
    """The positions of the images of all shards, in one process; `samples` are the records of each shard, (M,)."""

    def __init__(self, shards: Shards, samples: list[np.ndarray]) -> None:
        self.shards, self._samples = shards, samples
        self._reader = RangeReader(shards.storage, tuple(file.name for file in shards.files))
        self._first = np.cumsum([0, *map(len, samples)])
        self.shard = np.repeat(np.arange(len(samples)), [len(part) for part in samples])
        self.offset, self.num_bytes, self.crc = (
            np.concatenate([part[name] for part in samples]) for name in ("offset", "num_bytes", "crc")
        )

    def __len__(self) -> int:
        return len(self.shard)

    def images(self, ids: np.ndarray) -> tuple[list[bytes], int]:
        """Return encoded images, and the number of bytes that were read for them."""
        return self._reader.read(self.shard[ids], self.offset[ids], self.num_bytes[ids])

    def label_texts(self) -> np.ndarray:
        """Return all labels as stored, (N,) bytes."""
        return np.concatenate([part["label"] for part in self._samples])

    def name(self, sample: int) -> str:
        """Return a sample's name in messages."""
        shard = int(self.shard[sample])
        name = self._samples[shard]["name"][sample - self._first[shard]].decode(errors="replace")
        return f"{shard_name(self.shards.storage, self.shards.files[shard])} sample {name!r}"

    def names(self, ids: np.ndarray) -> Callable[[int], str]:
        """Return a function that maps a position in a batch to the sample's name in messages."""
        return lambda position: self.name(int(ids[position]))


def class_names(texts: np.ndarray) -> tuple[str, ...]:
    """Return the sorted names among labels; empty if all are whole numbers."""
    names = sorted(text.decode() for text in np.unique(texts))
    return () if all(_NUMBER.fullmatch(name) for name in names) else tuple(names)


def class_numbers(texts: np.ndarray, names: tuple[str, ...], sample_name: Callable[[int], str]) -> np.ndarray:
    """Return labels as numbers, (N,) int64.

    Args:
        texts: (N,) bytes.
        names: of the classes 0, 1, …; empty if labels are numbers.
        sample_name: maps an id to the sample's name in messages.

    Raises:
        DataError: a label is not among the names, or not a number.
    """
    unique, inverse = np.unique(texts, return_inverse=True)
    numbers = {name: number for number, name in enumerate(names)}
    values = np.zeros(len(unique), dtype=np.int64)
    for position, text in enumerate(text.decode() for text in unique):
        if text not in numbers if names else not _NUMBER.fullmatch(text):
            sample = sample_name(int(np.argmax(inverse == position)))
            raise DataError(f"{sample} has label {text!r}, which no training sample has: correct it")
        values[position] = numbers[text] if names else int(text)
    return values[inverse]
