"""WebDataset's tar shards: images and labels side by side, read by id with one request for each run of neighbours.

Shapes: N samples, B batch, H height, W width, C channels.

Samples of tar shards, read by id: only the bytes of their images, and what little lies between neighbours.

Shapes: N samples, B batch, H height, W width, C channels.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import DataError
from rayprune.sources.base import Column, SampleSource, Schema, Splits, Subset, check_ids, count_classes, holdout
from rayprune.sources.cache import cache_root, cached_arrays, check_mode, decoded
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images import ImageShape, check_size, decode_rows, first_shape, is_readable
from rayprune.sources.parquet.layout import DEFAULT_VALIDATION_FILES, OTHER_VALIDATION_FILES
from rayprune.sources.registry import register_source
from rayprune.sources.storage import REMOTE_THREADS, RangeReader, Storage, StoredFile, public
from rayprune.sources.webdataset.index import SampleKeys, shard_name, shard_samples

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class Shards:
    """Which samples of which shards: all a process needs to read them for itself.

    Attributes:
        storage: the folder or the file.
        files: in the order of the samples.
        keys: which members are read.
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
            ValueError: a sample or shard is damaged and skip_errors is off, or a shard can't be read.
        """
        whole = sum(file.num_bytes for file in self.files) <= WHOLE_BYTES
        find = partial(shard_samples, self.storage, keys=self.keys, cache_dir=self.cache_dir, whole=whole)
        with ThreadPoolExecutor(1 if self.storage.is_local else REMOTE_THREADS) as pool:
            shards = list(pool.map(find, self.files))
        rows = []
        for file, samples in zip(self.files, shards, strict=True):
            faulty = np.flatnonzero(samples["fault"] != b"")
            if len(faulty):
                self._report(file, samples[faulty[0]], len(faulty))
            rows.append(np.flatnonzero(samples["fault"] == b""))
        return Index(self, shards, rows)

    def reader(self) -> RangeReader:
        """Return a reader of the shards, for one process."""
        return RangeReader(self.storage, tuple(file.name for file in self.files))

    def _report(self, file: StoredFile, sample: Any, count: int) -> None:
        name, fault = (sample[field].decode(errors="replace") for field in ("name", "fault"))
        line = f"{shard_name(self.storage, file)}{f' sample {name!r}' if name else ''} {fault}"
        if not self.skip_errors:
            raise DataError(f"{line}: correct it, or leave it out with data.on_error=skip")
        logger.warning("left out %d samples of a shard: %s", count, line)


class Index:
    """Where the images of all shards lie.

    Args:
        shards: which shards.
        samples: their records.
        rows: which of the records are samples.
    """

    def __init__(self, shards: Shards, samples: list[np.ndarray], rows: list[np.ndarray]) -> None:
        self._shards, self._samples = shards, samples
        self._rows = np.concatenate(rows)
        self.shard = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        self.offset, self.num_bytes, self.crc = (
            np.concatenate([part[name][chosen] for part, chosen in zip(samples, rows, strict=True)])
            for name in ("offset", "num_bytes", "crc")
        )

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, ids: np.ndarray, reader: RangeReader) -> tuple[list[bytes], int]:
        """Return images, encoded, and the bytes that were read for them."""
        return reader.read(self.shard[ids], self.offset[ids], self.num_bytes[ids])

    def all_images(self, num_rows: int = 1) -> Iterator[bytes]:
        """Yield all images, encoded, in order; so many at once are read."""
        reader = self._shards.reader()
        for start in range(0, len(self), num_rows):
            yield from self.images(np.arange(start, min(start + num_rows, len(self))), reader)[0]

    def label_texts(self) -> np.ndarray:
        """Return all labels as stored, (N,) bytes."""
        chosen = [self._rows[self.shard == number] for number in range(len(self._samples))]
        return np.concatenate([part["label"][rows] for part, rows in zip(self._samples, chosen, strict=True)])

    def name(self, sample: int) -> str:
        """Say which sample it is, for messages."""
        shard = int(self.shard[sample])
        name = self._samples[shard]["name"][self._rows[sample]].decode(errors="replace")
        return f"{shard_name(self._shards.storage, self._shards.files[shard])} sample {name!r}"


def class_names(texts: np.ndarray) -> tuple[str, ...]:
    """Return the sorted names among labels; empty where all are whole numbers."""
    names = sorted(text.decode() for text in np.unique(texts))
    return () if all(_NUMBER.fullmatch(name) for name in names) else tuple(names)


def class_numbers(texts: np.ndarray, names: tuple[str, ...], named: Callable[[int], str]) -> np.ndarray:
    """Return labels as numbers, (N,) int64.

    Args:
        texts: (N,) bytes.
        names: of the classes 0, 1, …; empty where labels are numbers.
        named: says which sample it is, for messages.

    Raises:
        ValueError: a label is none of the names, or no number.
    """
    unique, inverse = np.unique(texts, return_inverse=True)
    numbers = {name: number for number, name in enumerate(names)}
    values = np.zeros(len(unique), dtype=np.int64)
    for position, text in enumerate(text.decode() for text in unique):
        if text not in numbers if names else not _NUMBER.fullmatch(text):
            sample = named(int(np.argmax(inverse == position)))
            raise DataError(f"{sample} has label {text!r}, which no training sample has: correct it")
        values[position] = numbers[text] if names else int(text)
    return values[inverse]


class TarSource(SampleSource):
    """Samples of tar shards, decoded at every visit.

    Args:
        shards: which samples.
        schema: the columns.
        names: of the classes, where labels are names.
        images: what every image is brought to.
    """

    def __init__(self, shards: Shards, schema: Schema, names: tuple[str, ...], images: ImageShape) -> None:
        self._shards, self._schema, self._names, self._images = shards, schema, names, images
        self._forget()
        index, labels = self._opened()
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

    def _opened(self) -> tuple[Index, np.ndarray]:
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
        return self._opened()[1]

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return "expensive"

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        index, labels = self._opened()
        encoded, num_bytes = index.images(ids, self._reader)
        pixels = decode_rows(encoded, self._images, lambda position: index.name(int(ids[position])))
        return {"image": pixels, "label": labels[ids]}, num_bytes


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
            raise DataError(f"data.on_error is {self.on_error!r}: {closest(self.on_error, ('fail', 'skip'))}")
        if self.num_channels not in {None, 1, 3}:
            raise DataError(f"data.num_channels is {self.num_channels}: set 1 for grey or 3 for colour images")

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
            raise DataError(f"the training shards in {public(self.path)!r} hold no samples: correct data.path")
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
            raise DataError(f"data.path {public(storage.path)!r} does not exist: correct it{braces}")
        files = storage.files()
        names = [file.name for file in files]
    tars = [file for file, name in zip(files, names, strict=True) if name.endswith(".tar")]
    if not tars:
        packed = next((name for name in names if name.endswith(COMPRESSED)), None)
        reason = f": unpack {packed} first, a compressed tar can't be read by id" if packed else ": correct data.path"
        raise DataError(f"data.path {public(storage.path)!r} holds no .tar shard{reason}")
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
        raise DataError(f"data.validation_shards {validation!r} matches no shard left for validation: {stems}")
    training = training or [file for file in others if file not in held]
    if not training:
        stems = closest(train, [_stem(file) for file in files])
        raise DataError(f"data.train_shards {train!r} matches no shard left for training: {stems}")
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
