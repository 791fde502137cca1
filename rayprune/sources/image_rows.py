"""Image files decoded at every visit, by all CPUs of the process.

Shapes: N samples, B batch, H height, W width, C channels, S pixels a side.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from rayprune.sources.base import Column, SampleSource, Schema, check_ids
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.image_files import ImageFiles
from rayprune.sources.images import UnreadableImage, decode_image
from rayprune.sources.storage import one_line
from rayprune.sources.threads import in_threads, num_cpus
from rayprune.sources.unlocked import ROWS_PER_TASK, decode_all

# A remote file system answers late rather than slowly.
REMOTE_THREADS = 16
LEFT_OUT = "or leave it out with data.on_error=skip"
# How many files the fingerprint reads of more than 1 GiB, so that a million are opened in seconds.
SAMPLED_FILES = 256


class ImageRows(SampleSource):
    """Images of one shape, read and decoded by id.

    Args:
        files: the images.
        shape: of every row (H, W, C).
        size: S pixels to scale and cut the images to; None where they have that shape already.
        fingerprint: of the samples.
    """

    def __init__(self, files: ImageFiles, shape: tuple[int, ...], size: int | None, fingerprint: str) -> None:
        self._files = files
        self._shape = shape
        self._size = size
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._files)

    @property
    def schema(self) -> Schema:
        columns = {"image": Column(self._shape, "uint8"), "label": Column((), "int64")}
        return Schema(columns, "image", len(self._files.class_names), self._files.class_names)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        return self._files.labels_of(np.arange(len(self), dtype=np.int64))

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return "expensive"

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Read samples, and count the bytes of their files.

        Raises:
            ValueError: an id is not in the source, or its file can't be read or has another size than the first one.
        """
        check_ids(ids, len(self))
        images = np.empty((len(ids), *self._shape), dtype=np.uint8)

        def fill(start: int) -> int:
            samples, encoded = ids[start : start + ROWS_PER_TASK].tolist(), []
            try:
                # All reads before all decodes: mixed, threads hand Python's lock to and fro at every system call.
                for sample in samples:
                    encoded.append(read_file(self._files, sample))
                decoded = decode_all(encoded, self._shape[2], self._size)
                for row, sample in enumerate(samples):
                    images[start + row] = self._pixels(sample, encoded[row], decoded[row])
            except UnreadableImage as error:
                raise unreadable(self._files, sample, error) from None
            return sum(map(len, encoded))

        num_bytes = sum(in_threads(fill, range(0, len(ids), ROWS_PER_TASK), num_threads(self._files)))
        return {"image": images, "label": self._files.labels_of(ids)}, num_bytes

    def readable(self, ids: np.ndarray) -> np.ndarray:
        """Decode images and return which can be read, (B,) bool.

        Raises:
            ValueError: an image has another size than the first one, or more than 8 bits a channel.
        """

        def can_decode(sample: int) -> bool:
            try:
                encoded = read_file(self._files, sample)
                self._pixels(sample, encoded, decode_all([encoded], self._shape[2], self._size)[0])
            except UnreadableImage:
                return False
            return True

        def check(start: int) -> list[bool]:
            return [can_decode(sample) for sample in ids[start : start + ROWS_PER_TASK].tolist()]

        parts = in_threads(check, range(0, len(ids), ROWS_PER_TASK), num_threads(self._files))
        return np.array([readable for part in parts for readable in part], dtype=bool)

    def _pixels(self, sample: int, encoded: bytes, pixels: np.ndarray | None) -> np.ndarray:
        if pixels is None:
            pixels = decode_named(self._files, sample, encoded, self._shape[2], self._size)
        if pixels.shape != self._shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], self._shape[:2]
            raise ValueError(
                f"{self._files.named(sample)} is an image of {width}×{height} pixels and the first one has "
                f"{first_width}×{first_height}: set data.image_size={min(self._shape[:2])}, or another size for all"
            )
        return pixels


def read_file(files: ImageFiles, sample: int) -> bytes:
    """Return an encoded image.

    Raises:
        UnreadableImage: it can't be read.
    """
    try:
        return files.read(sample)
    except OSError as error:
        raise UnreadableImage(error.strerror or one_line(error, 120)) from None


def decode_named(
    files: ImageFiles, sample: int, encoded: bytes, num_channels: int | None, size: int | None
) -> np.ndarray:
    """Decode one image as `images.decode_image` does; what it refuses is named by its file."""
    try:
        return decode_image(encoded, num_channels, size)
    except UnreadableImage:
        raise
    except ValueError as error:
        raise ValueError(f"{files.named(sample)}: {error}") from None


def unreadable(files: ImageFiles, sample: int, error: UnreadableImage) -> ValueError:
    """Return the error that names a file that can't be read."""
    return ValueError(f"{files.named(sample)} is no readable image ({error}): restore it, {LEFT_OUT}")


def sampled_digest(files: ImageFiles, sizes: np.ndarray) -> str:
    """Hash all names and sizes and the content: of all files up to 1 GiB, above that of evenly spaced ones."""
    count = len(files) if int(sizes.sum()) <= WHOLE_BYTES else SAMPLED_FILES
    samples = np.unique(np.linspace(0, len(files) - 1, count).astype(np.int64))

    def content(sample: int) -> str:
        try:
            return digest("file", np.frombuffer(read_file(files, sample), dtype=np.uint8))
        except UnreadableImage:
            return ""

    contents = in_threads(content, samples.tolist(), num_threads(files))
    return digest("\0".join(files.class_names), files.names.block, sizes, *contents)


def num_threads(files: ImageFiles) -> int:
    """Return how many threads read and decode: one a CPU of the process, more where files lie elsewhere."""
    return num_cpus() if files.storage.is_local else max(num_cpus(), REMOTE_THREADS)
