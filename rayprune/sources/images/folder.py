"""Image files in class folders, `<path>/train/<class>/…/<image>`, and ImageNet, on a local path or any file system.

The class of an image is the first folder below its split; images may lie at any depth below that one. Hidden files and
folders and files of other types are left out.

Shapes: N samples, B batch, C classes.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.errors import ConfigError, DataError, UnreadableImage
from rayprune.sources.base import DescribedSource, RowCost, SampleSource, Schema, Splits, check_ids
from rayprune.sources.cache import CacheMode, cache_root, cached_arrays, decoded, leave_out_unreadable
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images.decode import (
    LEAVE_OUT,
    MAX_PIXELS,
    ROWS_PER_TASK,
    ImageShape,
    MaxPixels,
    check_size,
    decode_rows,
    first_shape,
    num_cpus,
    readable_rows,
)
from rayprune.sources.registry import register_source
from rayprune.sources.storage import REMOTE_THREADS, Storage, StoredFile, cure_of, in_threads, one_line
from rayprune.sources.views import holdout

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"})
TRAIN_FOLDER = "train"
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
# Names of splits in other layouts, in any case: if taken for classes, a model would learn to tell the splits apart.
_TRAIN_NAMES = {"train", "training"}
_SPLIT_NAMES = _TRAIN_NAMES | {"val", "valid", "validation", "test", "testing", "dev"}
# The number of files that the fingerprint reads if all together exceed 1 GiB: a million files open in seconds.
SAMPLED_FILES = 256


@register_source("image_folder")
@dataclass(frozen=True)
class ImageFolder:
    """Images in class folders: a label is the position of the folder's name among the sorted ones.

    Attributes:
        path: a folder, local or a URI such as s3://bucket/folder.
        train: folder with the training classes; default: `train` if it exists, else the path itself, "".
        validation: folder with the validation classes, "" for none; default: `val`, `valid`, `validation` or `test`
            next to the training folder.
        validation_fraction: held out, stratified, if there is no validation folder; 0 for no validation.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out. Default: the images' own
            size, which must be the same for all.
        max_pixels: refuse images whose header claims more pixels, width times height, before they are decoded.
        num_channels: 1 or 3; default: those of the first training image.
        on_error: "skip" decodes all files once and leaves out unreadable ones; "fail" refuses them.
        cache: see `cache.decoded`.
        cache_dir: folder of the cache; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
    """

    path: str
    train: str | None = None
    validation: str | None = None
    validation_fraction: float = 0.1
    image_size: int | None = None
    max_pixels: MaxPixels = MAX_PIXELS
    num_channels: Literal[1, 3] | None = None
    on_error: Literal["fail", "skip"] = "fail"
    cache: CacheMode = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_size(self.image_size, self.max_pixels)

    def open(self) -> Splits:
        """List the files and decode the first one; with on_error=skip, decode all to find the unreadable ones.

        Raises:
            ConfigError: path is not a folder, or validation_fraction is outside its range.
            DataError: there are no images in class folders, or an image is unsuitable or (on_error=fail) damaged.
        """
        storage = Storage(self.path)
        if not storage.is_folder():
            raise ConfigError(
                f"data.path {storage.public()!r} is not a folder: set it to the one that holds the class folders"
            )
        images = [file for file in storage.files() if _is_image(file.name)]
        train_folder, validation_folder = split_folders(storage.public(), images, self.train, self.validation)
        files, sizes = list_split(storage, images, train_folder)
        encoded = map(files.read if self.on_error == "fail" else files.try_read, range(len(files)))
        shape = first_shape(
            encoded,
            files.name,
            self.num_channels,
            self.image_size,
            on_error=self.on_error,
            owner=storage.public(train_folder),
            max_pixels=self.max_pixels,
        )
        train = self._open_files(files, sizes, shape)
        if validation_folder is not None:
            split = list_split(storage, images, validation_folder, files.class_names)
            return Splits(train, self._open_files(*split, shape))
        return holdout(train, self.validation_fraction)

    def _open_files(self, files: ImageFiles, sizes: np.ndarray, shape: ImageShape) -> SampleSource:
        if self.on_error == "fail" and not sizes.all():
            raise DataError(f"{files.name(int(np.argmin(sizes)))} is empty: restore it, or {LEAVE_OUT}")
        fingerprint = digest("image_folder", str(shape.shape), self.image_size or 0, sampled_digest(files, sizes))
        rows = ImageRows(files, shape, fingerprint)
        readable_part = self._readable_part(rows, files) if self.on_error == "skip" else rows
        return decoded(readable_part, self.cache, self.cache_dir)

    def _readable_part(self, rows: ImageRows, files: ImageFiles) -> SampleSource:
        everything = np.arange(len(rows))
        if self.cache == "none":
            readable = rows.readable(everything)
        else:
            # Kept in the cache too, so that only the first open decodes the images to check them.
            key, root = f"readable-{rows.fingerprint}", cache_root(self.cache_dir)
            entry = cached_arrays(
                key, root, lambda folder: np.save(folder / "readable.npy", rows.readable(everything)), len(rows)
            )
            readable = entry["readable"].copy()
            # Files that were out of reach, or had wrong permissions, may be readable now.
            readable[~readable] = rows.readable(np.flatnonzero(~readable))
        if not readable.any():
            raise DataError(f"{files.storage.public(files.folder)} holds no readable image: restore the files")
        return leave_out_unreadable(rows, readable, files.path)


@register_source("imagenet")
@dataclass(frozen=True)
class ImageNet:
    """ImageNet (Russakovsky et al., 2015, arXiv:1409.0575) as extracted, or any part of its classes, in color.

    Class names are the WordNet ids; `val` is for validation.

    Attributes:
        path: torchvision's root, local or a URI, with `train/<wnid>/` and `val/<wnid>/`.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out.
        max_pixels: refuse images whose header claims more pixels, width times height, before they are decoded.
        on_error: "skip" decodes all files once and leaves out unreadable ones; "fail" refuses them.
        cache: see `cache.decoded`.
        cache_dir: folder of the cache; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
        download: refused, because the archives are given to registered users only.
    """

    path: str
    image_size: int = 224
    max_pixels: MaxPixels = MAX_PIXELS
    on_error: Literal["fail", "skip"] = "fail"
    cache: CacheMode = "auto"
    cache_dir: str | None = None
    download: bool = False
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": True}

    def open(self) -> Splits:
        """Open both parts as `image_folder` does.

        Raises:
            DataError: a folder is missing, or `image_folder` refuses the images.
        """
        storage = Storage(self.path)
        missing = {"train", "val"} - set(storage.folders() if storage.is_folder() else [])
        if missing or self.download:
            problem = f"{storage.public(min(missing))} is missing" if missing else "data.download is true"
            raise DataError(
                f"{problem}: ImageNet can't be downloaded, get the archives from image-net.org and let "
                "torchvision.datasets.ImageNet extract them"
            )
        return ImageFolder(
            self.path,
            train="train",
            validation="val",
            image_size=self.image_size,
            max_pixels=self.max_pixels,
            num_channels=3,
            on_error=self.on_error,
            cache=self.cache,
            cache_dir=self.cache_dir,
        ).open()


def split_folders(
    path: str, images: list[StoredFile], train: str | None, validation: str | None
) -> tuple[str, str | None]:
    """Return the training folder, "" for the path itself, and the validation folder or None.

    Args:
        path: for messages.
        images: all below the path.
        train, validation: as configured; None to look for the usual names.

    Raises:
        DataError: the path holds only a validation folder, or splits with unknown names.
    """
    with_classes = {file.name.split("/", 1)[0] for file in images if file.name.count("/") > 1}
    if train is None:
        train = TRAIN_FOLDER if TRAIN_FOLDER in with_classes else ""
        tops = {file.name.split("/", 1)[0] for file in images if "/" in file.name}
        if not train and with_classes and tops <= set(VALIDATION_FOLDERS):
            raise DataError(
                f"{path} holds images in {', '.join(sorted(tops))} only: set data.train to the folder to train on"
            )
        names = {top.casefold() for top in tops}
        if not train and with_classes and names <= _SPLIT_NAMES and (len(names) > 1 or names & _TRAIN_NAMES):
            raise DataError(
                f"{path} holds {', '.join(sorted(tops))}, which are splits rather than classes: set data.train and "
                'data.validation to two of them (data.train="" takes them for classes)'
            )
    train = train.strip("/")
    if validation is None and train:
        others = (name for name in VALIDATION_FOLDERS if name in with_classes and name != train)
        validation = next(others, None)
    return train, (validation or "").strip("/") or None


def list_split(
    storage: Storage, images: list[StoredFile], folder: str, class_names: tuple[str, ...] | None = None
) -> tuple[ImageFiles, np.ndarray]:
    """Return the files of one split, ordered by class and name, and their sizes in bytes, (N,) int64.

    Args:
        storage: of the images.
        images: all below the storage.
        folder: of the split; "" for the root.
        class_names: of the training part; default: the class folders of this split.

    Raises:
        DataError: there are no images in class folders, or their class is not among the class names.
    """
    prefix = f"{folder}/" if folder else ""
    start = len(prefix)
    inside = [file for file in images if file.name.startswith(prefix) and file.name.find("/", start) > 0]
    if not inside:
        raise DataError(
            f"{storage.public(folder).rstrip('/')} holds no images in class folders "
            f"(<class>/<image>, of {', '.join(sorted(SUFFIXES))}): correct data.path, data.train or data.validation"
        )
    parts = ((file.name[start:].partition("/"), file.num_bytes) for file in inside)
    ordered = sorted((name, rest, num_bytes) for (name, _, rest), num_bytes in parts)
    if class_names is None:
        class_names = tuple(sorted({name for name, _, _ in ordered}))
        _warn_of_empty_classes(storage, folder, class_names)
    labels = {name: label for label, name in enumerate(class_names)}
    for name, rest, _ in ordered:
        if name not in labels:
            raise DataError(
                f"{storage.public(f'{folder}/{name}')} is a class without a training image ({rest}): "
                "add some, or move the folder away"
            )
    counts = np.bincount([labels[name] for name, _, _ in ordered], minlength=len(class_names))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = FileNames([f"{name}/{rest}" for name, rest, _ in ordered])
    sizes = np.array([num_bytes for _, _, num_bytes in ordered], dtype=np.int64)
    return ImageFiles(storage, folder, names, starts, class_names), sizes


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith(".") and "/." not in name


def _warn_of_empty_classes(storage: Storage, folder: str, class_names: tuple[str, ...]) -> None:
    empty = [name for name in storage.folders(folder) if not name.startswith(".") and name not in set(class_names)]
    if empty:
        logger.warning(
            "%d folders in %s hold no image and are not classes, first %s",
            len(empty),
            storage.public(folder),
            empty[0],
        )


def sampled_digest(files: ImageFiles, sizes: np.ndarray) -> str:
    """Hash all names and sizes and the content: of all files up to 1 GiB, above that of evenly spaced ones."""
    count = len(files) if int(sizes.sum()) <= WHOLE_BYTES else SAMPLED_FILES
    samples = np.unique(np.linspace(0, len(files) - 1, count).astype(np.int64))

    def content(sample: int) -> str:
        encoded = files.try_read(sample)
        return "" if encoded is None else digest("file", np.frombuffer(encoded, dtype=np.uint8))

    contents = in_threads(content, samples.tolist(), files.num_threads)
    return digest("\0".join(files.class_names), files.names.block, sizes, *contents)


class ImageRows(DescribedSource):
    """Images of one shape, read and decoded by id, on all CPUs of the process."""

    row_cost: RowCost = "expensive"

    def __init__(self, files: ImageFiles, images: ImageShape, fingerprint: str) -> None:
        schema = Schema.for_classification("image", images.shape, len(files.class_names), files.class_names)
        super().__init__(len(files), schema, fingerprint)
        self._files, self._images = files, images

    def _read_labels(self) -> np.ndarray:
        return self._files.labels_of(np.arange(len(self)))

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        pixels = np.empty((len(ids), *self._images.shape), dtype=np.uint8)

        def fill(start: int) -> int:
            samples = ids[start : start + ROWS_PER_TASK].tolist()
            # All reads before all decodes: otherwise threads pass Python's lock back and forth at every system call.
            encoded = [self._files.read(sample) for sample in samples]
            rows = pixels[start : start + ROWS_PER_TASK]
            decode_rows(encoded, self._images, lambda position: self._files.name(samples[position]), rows)
            return sum(map(len, encoded))

        num_bytes = sum(in_threads(fill, range(0, len(ids), ROWS_PER_TASK), self._files.num_threads))
        return {"image": pixels, "label": self._files.labels_of(ids)}, num_bytes

    def file_of(self, sample: int) -> str | None:
        return self._files.name(sample)

    def readable(self, ids: np.ndarray) -> np.ndarray:
        """Decode images, and return which can be read, (B,) bool.

        Raises:
            DataError: an image has another size than the first one, or more than 8 bits per channel.
        """

        def check(start: int) -> np.ndarray:
            samples = ids[start : start + ROWS_PER_TASK].tolist()
            encoded = [self._files.try_read(sample) for sample in samples]
            return readable_rows(encoded, self._images, lambda position: self._files.name(samples[position]))

        parts = in_threads(check, range(0, len(ids), ROWS_PER_TASK), self._files.num_threads)
        return np.concatenate([np.zeros(0, dtype=bool), *parts])


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split, ordered by class, then by name.

    Attributes:
        storage: of the files.
        folder: of the split, relative to the storage; "" for the root.
        names: relative to that folder, `<class>/…/<file>`.
        starts: (C + 1,) int64, class c has the ids starts[c]..starts[c+1]-1.
        class_names: one per class, sorted.
    """

    storage: Storage
    folder: str
    names: FileNames
    starts: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the labels of samples, (B,) int64."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def path(self, sample: int) -> str:
        """Return a sample's file, relative to the storage."""
        return f"{self.folder}/{self.names[sample]}" if self.folder else self.names[sample]

    def name(self, sample: int) -> str:
        """Return a sample's file for messages."""
        return self.storage.public(self.path(sample))

    def read(self, sample: int) -> bytes:
        """Return a sample's encoded image.

        Raises:
            UnreadableImage: it can't be read.
        """
        try:
            return self.storage.read(self.path(sample))
        except OSError as error:
            reason = error.strerror or one_line(error, 120)
            usual = f"restore it, or {LEAVE_OUT}"
            cure = cure_of(error, usual)
            fault = UnreadableImage if cure == usual else DataError  # only the first is left out
            raise fault(f"{self.name(sample)} is not a readable image ({reason}): {cure}") from None

    def try_read(self, sample: int) -> bytes | None:
        """Return a sample's encoded image; None if it can't be read."""
        try:
            return self.read(sample)
        except UnreadableImage:
            return None

    @property
    def num_threads(self) -> int:
        """The number of threads that read and decode: one per CPU of the process, more for remote files."""
        return num_cpus() if self.storage.is_local else max(num_cpus(), REMOTE_THREADS)


class FileNames:
    """File names in one block of bytes, ended by zeros, which no file system allows in a name.

    Pickles are compressed, and unpacked once per process rather than once per copy.
    """

    def __init__(self, names: list[str]) -> None:
        self._packed = zlib.compress("".join(f"{name}\0" for name in names).encode())

    def __getitem__(self, position: int) -> str:
        text, ends = _unpacked(self._packed)
        start = int(ends[position - 1]) + 1 if position else 0
        return text[start : int(ends[position])].decode()

    @property
    def block(self) -> np.ndarray:
        """All names, each ended by a zero byte, as uint8."""
        return np.frombuffer(_unpacked(self._packed)[0], dtype=np.uint8)


@lru_cache(maxsize=4)
def _unpacked(packed: bytes) -> tuple[bytes, np.ndarray]:
    text = zlib.decompress(packed)
    return text, np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == 0)
