"""Image files in class folders, on a local path or any file system: `<path>/train/<class>/…/<image>`.

Which image files a class-folder tree holds: the splits, the classes, and the names, kept small.

The class of an image is the first folder below its split; images may lie at any depth below that one. Hidden files and
folders and files of other kinds are left out.

Image files decoded at every visit, by all CPUs of the process.

Shapes: N samples, B batch, H height, W width, C channels, S pixels a side.

ImageNet (Russakovsky et al., 2015, arXiv:1409.0575) as extracted: `train/` and `val/` by WordNet id.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import DataError, UnreadableImage
from rayprune.sources.base import Column, SampleSource, Schema, Splits, Subset, check_ids, holdout
from rayprune.sources.cache import cache_root, cached_arrays, check_mode, decoded
from rayprune.sources.fingerprint import WHOLE_BYTES, digest
from rayprune.sources.images import ROWS_PER_TASK, decode_all, decode_image, in_threads, num_cpus
from rayprune.sources.registry import register_source
from rayprune.sources.storage import Storage, StoredFile, one_line, public

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({"jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"})
TRAIN_FOLDER = "train"
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
# What splits are called elsewhere, in any case: taken for classes, they would be what a model learns to tell apart.
_TRAIN_NAMES = {"train", "training"}
_SPLIT_NAMES = _TRAIN_NAMES | {"val", "valid", "validation", "test", "testing", "dev"}


class FileNames:
    """File names in one block of bytes; pickles compressed, and unpacks once a process, not once a copy.

    Args:
        names: N texts without a zero character, which no file system allows.
    """

    def __init__(self, names: list[str]) -> None:
        self._num_names = len(names)
        self._packed = zlib.compress("".join(f"{name}\0" for name in names).encode())

    def __len__(self) -> int:
        return self._num_names

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


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split, ordered by class, then by name.

    Attributes:
        storage: where they lie.
        folder: of the split, relative to the storage; "" for the root.
        names: relative to that folder, `<class>/…/<file>`.
        starts: (C + 1,) int64, class c has the ids starts[c]..starts[c+1]-1.
        class_names: one a class, sorted.
    """

    storage: Storage
    folder: str
    names: FileNames
    starts: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the labels of samples, (B,) int64."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def name(self, sample: int) -> str:
        """Return a sample's file, relative to the storage."""
        return f"{self.folder}/{self.names[sample]}" if self.folder else self.names[sample]

    def named(self, sample: int) -> str:
        """Return a sample's file for messages."""
        return f"{public(self.storage.path).rstrip('/')}/{self.name(sample)}"

    def read(self, sample: int) -> bytes:
        """Return a sample's encoded image.

        Raises:
            OSError: it can't be read.
        """
        return self.storage.read(self.name(sample))


def find_images(storage: Storage) -> list[StoredFile]:
    """List the images below a folder.

    Raises:
        ValueError: the path is no folder, or can't be reached.
    """
    if not storage.is_folder():
        raise DataError(
            f"data.path {public(storage.path)!r} is no folder: set it to the one that holds the class folders"
        )
    return [file for file in storage.files() if _is_image(file.name)]


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith(".") and "/." not in name


def split_folders(
    path: str, found: list[StoredFile], train: str | None, validation: str | None
) -> tuple[str, str | None]:
    """Choose the folders of the training and the validation part.

    Args:
        path: for messages.
        found: all images below it.
        train, validation: as configured; None to look for the usual names, "" for the path itself and for none.

    Returns:
        Training folder, "" for the path itself, and validation folder or None.

    Raises:
        ValueError: the path holds a validation folder only, or splits by names that are not looked for.
    """
    with_classes = {file.name.split("/", 1)[0] for file in found if file.name.count("/") > 1}
    if train is None:
        train = TRAIN_FOLDER if TRAIN_FOLDER in with_classes else ""
        tops = {file.name.split("/", 1)[0] for file in found if "/" in file.name}
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


def class_images(storage: Storage, found: list[StoredFile], folder: str) -> list[StoredFile]:
    """Return the images that lie in class folders below a folder, named relative to it.

    Raises:
        ValueError: there are none.
    """
    prefix = f"{folder}/" if folder else ""
    start = len(prefix)
    inside = [
        StoredFile(file.name[start:], file.num_bytes)
        for file in found
        if file.name.startswith(prefix) and file.name.find("/", start) > 0
    ]
    if not inside:
        where = f"{public(storage.path).rstrip('/')}/{folder}".rstrip("/")
        raise DataError(
            f"{where} holds no images in class folders (<class>/<image>, of {', '.join(sorted(SUFFIXES))}): "
            "correct data.path, data.train or data.validation"
        )
    return inside


def class_names_of(storage: Storage, folder: str, images: list[StoredFile]) -> tuple[str, ...]:
    """Return the sorted class names; class folders without an image are no classes, and a warning names them."""
    names = sorted({file.name.split("/", 1)[0] for file in images})
    empty = [name for name in storage.folders(folder) if not name.startswith(".") and name not in set(names)]
    if empty:
        logger.warning(
            "%d folders in %s/%s hold no image and are no class, first %s",
            len(empty),
            public(storage.path),
            folder,
            empty[0],
        )
    return tuple(names)


def arrange(
    storage: Storage, folder: str, images: list[StoredFile], class_names: tuple[str, ...]
) -> tuple[ImageFiles, np.ndarray]:
    """Order images by class and name.

    Returns:
        The files, and their sizes in bytes (N,) int64.

    Raises:
        ValueError: an image's class is not among the class names.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    parts = ((file.name.partition("/"), file.num_bytes) for file in images)
    ordered = sorted((name, rest, size) for (name, _, rest), size in parts)
    for name, rest, _ in ordered:
        if name not in labels:
            where = f"{public(storage.path).rstrip('/')}/{folder}/{name}"
            raise DataError(f"{where} is a class without a training image ({rest}): add some, or move the folder away")
    counts = np.bincount([labels[name] for name, _, _ in ordered], minlength=len(class_names))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = FileNames([f"{name}/{rest}" for name, rest, _ in ordered])
    sizes = np.array([num_bytes for _, _, num_bytes in ordered], dtype=np.int64)
    return ImageFiles(storage, folder, names, starts, class_names), sizes


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
            raise DataError(
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
        raise DataError(f"{files.named(sample)}: {error}") from None


def unreadable(files: ImageFiles, sample: int, error: UnreadableImage) -> ValueError:
    """Return the error that names a file that can't be read."""
    return DataError(f"{files.named(sample)} is no readable image ({error}): restore it, {LEFT_OUT}")


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


HOLDOUT_SEED = 0


@register_source("image_folder")
@dataclass(frozen=True)
class ImageFolder:
    """Images in class folders: a label is the position of the folder's name among the sorted ones.

    Attributes:
        path: a folder, local or a URI such as s3://bucket/folder.
        train: folder with the training classes; default: `train` where it exists, else the path itself, "".
        validation: folder with the validation classes, "" for none; default: `val`, `valid`, `validation` or `test`
            beside the training folder.
        validation_fraction: held out, stratified, where there is no validation folder; 0 for no validation.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out. Default: the images' own
            size, which must be one.
        num_channels: 1 or 3; default: those of the first training image.
        on_error: "skip" leaves out files that can't be read, for which it decodes them all once; "fail" refuses them.
        cache: see `decoded.decoded`.
        cache_dir: see `cache.cache_root`.
    """

    path: str
    train: str | None = None
    validation: str | None = None
    validation_fraction: float = 0.1
    image_size: int | None = None
    num_channels: int | None = None
    on_error: str = "fail"
    cache: str = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_mode(self.cache)
        if self.on_error not in {"fail", "skip"}:
            raise DataError(f"data.on_error is {self.on_error!r}: {closest(self.on_error, ('fail', 'skip'))}")
        if self.image_size is not None and self.image_size < 1:
            raise DataError(f"data.image_size is {self.image_size}: it must be at least 1")
        if self.num_channels not in {None, 1, 3}:
            raise DataError(f"data.num_channels is {self.num_channels}: it must be 1 or 3")

    def open(self) -> Splits:
        """List the files and decode the first one; with on_error=skip decode them all, to know which remain.

        Raises:
            ValueError: there are no images in class folders, or an image is unsuitable or (on_error=fail) damaged.
        """
        storage = Storage(self.path)
        found = find_images(storage)
        train_folder, validation_folder = split_folders(public(storage.path), found, self.train, self.validation)
        images = class_images(storage, found, train_folder)
        class_names = class_names_of(storage, train_folder, images)
        files, sizes = arrange(storage, train_folder, images, class_names)
        shape = self._first_shape(files)
        train = self._open_files(files, sizes, shape)
        if validation_folder is not None:
            others = class_images(storage, found, validation_folder)
            return Splits(train, self._open_files(*arrange(storage, validation_folder, others, class_names), shape))
        if self.validation_fraction == 0:
            return Splits(train, None)
        return holdout(train, self.validation_fraction, HOLDOUT_SEED)

    def _first_shape(self, files: ImageFiles) -> tuple[int, ...]:
        for sample in range(len(files)):
            try:
                encoded = read_file(files, sample)
                return decode_named(files, sample, encoded, self.num_channels, self.image_size).shape
            except UnreadableImage as error:
                if self.on_error == "fail":
                    raise unreadable(files, sample, error) from None
        raise DataError(
            f"{public(files.storage.path)} holds no readable image: restore the files, or correct data.path"
        )

    def _open_files(self, files: ImageFiles, sizes: np.ndarray, shape: tuple[int, ...]) -> SampleSource:
        if self.on_error == "fail" and not sizes.all():
            empty = int(np.argmin(sizes))
            raise DataError(f"{files.named(empty)} is empty: restore it, {LEFT_OUT}")
        fingerprint = digest("image_folder", str(shape), self.image_size or 0, sampled_digest(files, sizes))
        rows = ImageRows(files, shape, self.image_size, fingerprint)
        kept = self._readable(rows, files) if self.on_error == "skip" else rows
        return decoded(kept, self.cache, self.cache_dir)

    def _readable(self, rows: ImageRows, files: ImageFiles) -> SampleSource:
        if self.cache == "none":
            readable = rows.readable(np.arange(len(rows)))
        else:
            # Kept beside the decoded rows, so that only the first open decodes to look.
            key, root = f"readable-{rows.fingerprint}", cache_root(self.cache_dir)
            readable = cached_arrays(key, root, partial(save_readable, rows), len(rows))["readable"].copy()
            # What could not be reached then, or may not have been read, may be readable now.
            readable[~readable] = rows.readable(np.flatnonzero(~readable))
        left_out = np.flatnonzero(~readable)
        if len(left_out) == 0:
            return rows
        if len(left_out) == len(rows):
            raise DataError(f"{public(files.storage.path)}/{files.folder} holds no readable image: restore the files")
        named = ", ".join(files.name(int(sample)) for sample in left_out[:5])
        logger.warning("left out %d of %d images that can't be read, first: %s", len(left_out), len(rows), named)
        return Subset(rows, np.flatnonzero(readable))


def save_readable(rows: ImageRows, folder: Path) -> None:
    """Write a cache entry: `readable` (N,) bool."""
    np.save(folder / "readable.npy", rows.readable(np.arange(len(rows))))


TRAIN, VALIDATION = "train", "val"
NUM_CHANNELS = 3


@register_source("imagenet")
@dataclass(frozen=True)
class ImageNet:
    """ImageNet, or any part of its classes: colour images, class names are the WordNet ids; `val` validates.

    Attributes:
        path: torchvision's root, local or a URI, with `train/<wnid>/` and `val/<wnid>/`.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out.
        on_error, cache, cache_dir: as of `image_folder`.
        download: refused, because the archives are handed out to registered users only.
    """

    path: str
    image_size: int = 224
    on_error: str = "fail"
    cache: str = "auto"
    cache_dir: str | None = None
    download: bool = False
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": True}

    def open(self) -> Splits:
        """Open both parts as `image_folder` does.

        Raises:
            ValueError: a folder is missing, or what `image_folder` refuses.
        """
        storage = Storage(self.path)
        missing = {TRAIN, VALIDATION} - set(storage.folders() if storage.is_folder() else [])
        if missing or self.download:
            folder = (
                f"{public(storage.path).rstrip('/')}/{min(missing)} is missing" if missing else "data.download is true"
            )
            raise DataError(
                f"{folder}: ImageNet can't be downloaded, get the archives from image-net.org and let "
                "torchvision.datasets.ImageNet extract them"
            )
        return ImageFolder(
            self.path,
            train=TRAIN,
            validation=VALIDATION,
            image_size=self.image_size,
            num_channels=NUM_CHANNELS,
            on_error=self.on_error,
            cache=self.cache,
            cache_dir=self.cache_dir,
        ).open()
