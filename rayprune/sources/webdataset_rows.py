"""Samples of tar shards, read by id: only the bytes of their images, and what little lies between neighbours.

Shapes: N samples, B batch, H height, W width, C channels.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from rayprune.sources.base import SampleSource, Schema, check_ids
from rayprune.sources.encoded import ImageShape, decode_rows
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.ranges import REMOTE_THREADS, RangeReader
from rayprune.sources.storage import Storage, StoredFile
from rayprune.sources.webdataset_index import SampleKeys, shard_name, shard_samples

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
            raise ValueError(f"{line}: correct it, or leave it out with data.on_error=skip")
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
            raise ValueError(f"{sample} has label {text!r}, which no training sample has: correct it")
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
