"""Which image files a class-folder tree holds: the splits, the classes, and the names, kept small.

The class of an image is the first folder below its split; images may lie at any depth below that one. Hidden files and
folders and files of other kinds are left out.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rayprune.sources.storage import Storage, StoredFile, public

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
        raise ValueError(
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
            raise ValueError(
                f"{path} holds images in {', '.join(sorted(tops))} only: set data.train to the folder to train on"
            )
        names = {top.casefold() for top in tops}
        if not train and with_classes and names <= _SPLIT_NAMES and (len(names) > 1 or names & _TRAIN_NAMES):
            raise ValueError(
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
        raise ValueError(
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
            raise ValueError(f"{where} is a class without a training image ({rest}): add some, or move the folder away")
    counts = np.bincount([labels[name] for name, _, _ in ordered], minlength=len(class_names))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = FileNames([f"{name}/{rest}" for name, rest, _ in ordered])
    sizes = np.array([num_bytes for _, _, num_bytes in ordered], dtype=np.int64)
    return ImageFiles(storage, folder, names, starts, class_names), sizes
