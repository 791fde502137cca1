"""WebDataset's tar shards: images and labels side by side, read by id.

Only the bytes of the images are read, and small gaps between neighbors, with one request per run of neighbors.

Shapes: N samples, B batch, M samples of a shard, H height, W width, C channels.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.errors import DataError, UnreadableImage
from rayprune.sources.base import Column, SampleSource, Schema, Splits, check_ids, count_classes, holdout
from rayprune.sources.cache import CacheMode, cache_root, cached_arrays, decoded, leave_out_unreadable
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images import LEAVE_OUT, ImageShape, check_size, decode_each, decode_rows, first_shape
from rayprune.sources.registry import register_source
from rayprune.sources.storage import (
    DEFAULT_VALIDATION,
    REMOTE_THREADS,
    RangeReader,
    Storage,
    StoredFile,
    public,
    split_shards,
)
from rayprune.sources.webdataset.index import SampleKeys, shard_name, shard_samples

logger = logging.getLogger(__name__)

HOLDOUT_SEED = 0
CHUNK_ROWS = 256
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_NUMBER = re.compile(r"-?\d{1,18}")


@register_source("webdataset")
@dataclass(frozen=True)
class WebDataset:
    """A tar shard, or a folder of them in the order of their names, on a local disk or any file system of Storage.

    Attributes:
        path: a .tar file or a folder, a path or a URI.
        train_shards: pattern of the names below the folder, without .tar; if none matches, all that are not for
            validation.
        validation_shards: pattern of the names; the default also tries "*val*"; "" for none.
        image_key: suffix of the image's member; default: the first with the suffix of an image.
        label_key: suffix of a member that holds the label, a number or a name, as text; or `json:field`; default:
            `cls`, else `json:label`.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out. Default: the images' own
            size, which must be the same for all.
        num_channels: 1 or 3; default: those of the first image.
        validation_fraction: held out, stratified, if no shard is for validation; 0 for no validation.
        num_classes: default: the number of class names, else the largest training label + 1.
        on_error: "skip" leaves out samples and shards that can't be read, for which it decodes all once; "fail" refuses
            them.
        cache: see `cache.decoded`.
        cache_dir: see `cache.cache_root`; the shards' index is kept there too.
    """

    path: str
    train_shards: str = "*train*"
    validation_shards: str = DEFAULT_VALIDATION
    image_key: str | None = None
    label_key: str | None = None
    image_size: int | None = None
    num_channels: Literal[1, 3] | None = None
    validation_fraction: float = 0.1
    num_classes: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    cache: CacheMode = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_size(self.image_size)

    def open(self) -> Splits:
        """Index the shards and read the labels; with on_error=skip decode all, to know which can be read.

        Raises:
            ValueError: shards are missing, unsuitable or (on_error=fail) damaged.
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
            index.all_images(),
            index.name,
            self.num_channels,
            self.image_size,
            on_error=self.on_error,
            owner=public(self.path),
        )
        configured = (len(names) or None) if self.num_classes is None else self.num_classes
        num_classes = count_classes(labels, f"the labels of {public(self.path)}", configured)
        columns = {"image": Column(images.shape, "uint8"), "label": Column((), "int64")}
        schema = Schema(columns, "image", num_classes, names if len(names) == num_classes else ())
        train = self._open_shards(shards, schema, names, images)
        if validation_files:
            validation_shards = replace(shards, files=validation_files)
            return Splits(train, self._open_shards(validation_shards, schema, names, images))
        if self.validation_fraction == 0:
            return Splits(train, None)
        return holdout(train, self.validation_fraction, HOLDOUT_SEED)

    def _split_files(self, storage: Storage) -> tuple[tuple[StoredFile, ...], tuple[StoredFile, ...]]:
        if storage.is_file():
            files = {storage.full(""): storage.file()}
        elif storage.is_folder():
            files = {file.name: file for file in storage.files()}
        else:
            braces = "; give the folder, and set data.train_shards to a pattern" if "{" in storage.path else ""
            raise DataError(f"data.path {storage.public()!r} does not exist: correct it{braces}")
        tars = {name.removesuffix(".tar"): file for name, file in files.items() if name.endswith(".tar")}
        if not tars:
            packed = next((name for name in files if name.endswith(COMPRESSED)), None)
            cure = f"unpack {packed} first, a compressed tar can't be read by id" if packed else "correct data.path"
            raise DataError(f"data.path {storage.public()!r} holds no .tar shard: {cure}")
        if storage.is_file():
            return tuple(tars.values()), ()
        return split_shards(tars, self.train_shards, self.validation_shards, "shard")

    def _open_shards(self, shards: Shards, schema: Schema, names: tuple[str, ...], images: ImageShape) -> SampleSource:
        source = TarSource(shards, schema, names, images)
        if not shards.skip_errors:
            return decoded(source, self.cache, self.cache_dir)
        readable = cached_arrays(
            f"webdataset-readable-{digest(source.fingerprint)}",
            cache_root(self.cache_dir),
            lambda folder: np.save(folder / "readable.npy", source.readable()),
            len(source),
        )["readable"]
        return decoded(leave_out_unreadable(source, readable, source.name), self.cache, self.cache_dir)


class TarSource(SampleSource):
    """Samples of tar shards, decoded at every visit.

    Args:
        shards: of the samples.
        schema: the columns.
        names: of the classes, if labels are names.
        images: the shape of every image.
    """

    def __init__(self, shards: Shards, schema: Schema, names: tuple[str, ...], images: ImageShape) -> None:
        self._shards, self._schema, self._names, self._images = shards, schema, names, images
        self._forget()
        index, labels = self._open()
        self._num_samples = len(index)
        shape = f"{images.shape} {images.size}"
        self._fingerprint = digest("webdataset", shape, labels, index.num_bytes, index.crc)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._index: tuple[Index, np.ndarray] | None = None
        self._reader = self._shards.reader()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"_lock", "_index", "_reader"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _open(self) -> tuple[Index, np.ndarray]:
        """Return the index and the labels."""
        with self._lock:
            if self._index is None:
                index = self._shards.index()
                self._index = index, class_numbers(index.label_texts(), self._names, index.name)
            return self._index

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
        return self._open()[1]

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return "expensive"

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        index, labels = self._open()
        encoded, num_bytes = index.images(ids, self._reader)
        pixels = decode_rows(encoded, self._images, index.names(ids))
        return {"image": pixels, "label": labels[ids]}, num_bytes

    def readable(self) -> np.ndarray:
        """Decode all images, and return which can be read, (N,) bool.

        Raises:
            DataError: an image has another size, or more than 8 bits per channel.
        """
        index, readable = self._open()[0], np.zeros(len(self), dtype=bool)
        for ids in np.array_split(np.arange(len(self)), range(CHUNK_ROWS, len(self), CHUNK_ROWS)):
            encoded, _ = index.images(ids, self._reader)
            pixels = decode_each(encoded, self._images, index.names(ids))
            readable[ids] = [not isinstance(image, UnreadableImage) for image in pixels]
        return readable

    def name(self, sample: int) -> str:
        """Return what messages call a sample."""
        return self._open()[0].name(sample)


@dataclass(frozen=True)
class Shards:
    """The shards of a source; all that a process needs to read their samples.

    Attributes:
        storage: the folder or the file.
        files: in the order of the samples.
        keys: the members to read.
        cache_dir: of the index.
        skip_errors: leave out samples that can't be used instead of refusing them.
    """

    storage: Storage
    files: tuple[StoredFile, ...]
    keys: SampleKeys
    cache_dir: str | None
    skip_errors: bool

    def index(self) -> Index:
        """Find the samples; only the first open of a shard reads it.

        Raises:
            DataError: a sample or shard is damaged and skip_errors is off, or a shard can't be read.
        """
        whole = sum(file.num_bytes for file in self.files) <= WHOLE_BYTES
        find = partial(shard_samples, self.storage, keys=self.keys, cache_dir=self.cache_dir, whole=whole)
        with ThreadPoolExecutor(1 if self.storage.is_local else REMOTE_THREADS) as pool:
            records = list(pool.map(find, self.files))
        for position, (file, samples) in enumerate(zip(self.files, records, strict=True)):
            faulty = samples["fault"] != b""
            if faulty.any():
                self._report(file, samples[faulty][0], int(faulty.sum()))
                records[position] = samples[~faulty]
        return Index(self, records)

    def reader(self) -> RangeReader:
        """Return a reader of the shards, for one process."""
        return RangeReader(self.storage, tuple(file.name for file in self.files))

    def _report(self, file: StoredFile, sample: Any, count: int) -> None:
        name, fault = (sample[field].decode(errors="replace") for field in ("name", "fault"))
        line = f"{shard_name(self.storage, file)}{f' sample {name!r}' if name else ''} {fault}"
        if not self.skip_errors:
            raise DataError(f"{line}: correct it, or {LEAVE_OUT}")
        logger.warning("left out %d samples of a shard: %s", count, line)


class Index:
    """The positions of the images of all shards.

    Args:
        shards: of the samples.
        samples: the records of each shard's samples, (M,); see `shard_samples`.
    """

    def __init__(self, shards: Shards, samples: list[np.ndarray]) -> None:
        self._shards, self._samples = shards, samples
        self._first = np.cumsum([0, *map(len, samples)])
        self.shard = np.repeat(np.arange(len(samples)), [len(part) for part in samples])
        self.offset, self.num_bytes, self.crc = (
            np.concatenate([part[name] for part in samples]) for name in ("offset", "num_bytes", "crc")
        )

    def __len__(self) -> int:
        return len(self.shard)

    def images(self, ids: np.ndarray, reader: RangeReader) -> tuple[list[bytes], int]:
        """Return encoded images, and the number of bytes that were read for them."""
        return reader.read(self.shard[ids], self.offset[ids], self.num_bytes[ids])

    def all_images(self) -> Iterator[bytes]:
        """Yield all encoded images in order, each read when it is needed."""
        reader = self._shards.reader()
        for sample in range(len(self)):
            yield self.images(np.array([sample]), reader)[0][0]

    def label_texts(self) -> np.ndarray:
        """Return all labels as stored, (N,) bytes."""
        return np.concatenate([part["label"] for part in self._samples])

    def name(self, sample: int) -> str:
        """Return what messages call a sample."""
        shard = int(self.shard[sample])
        name = self._samples[shard]["name"][sample - self._first[shard]].decode(errors="replace")
        return f"{shard_name(self._shards.storage, self._shards.files[shard])} sample {name!r}"

    def names(self, ids: np.ndarray) -> Callable[[int], str]:
        """Return a function: position in a batch → what messages call the sample."""
        return lambda position: self.name(int(ids[position]))


def class_names(texts: np.ndarray) -> tuple[str, ...]:
    """Return the sorted names among labels; empty where all are whole numbers."""
    names = sorted(text.decode() for text in np.unique(texts))
    return () if all(_NUMBER.fullmatch(name) for name in names) else tuple(names)


def class_numbers(texts: np.ndarray, names: tuple[str, ...], sample_name: Callable[[int], str]) -> np.ndarray:
    """Return labels as numbers, (N,) int64.

    Args:
        texts: (N,) bytes.
        names: of the classes 0, 1, …; empty where labels are numbers.
        sample_name: id → what messages call the sample.

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
