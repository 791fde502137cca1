"""Image files in class folders, on a local path or any file system: `<path>/train/<class>/…/<image>`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rayprune.core.objects import closest
from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.cache import cache_root, cached_arrays
from rayprune.sources.decoded import check_mode, decoded
from rayprune.sources.fingerprint import digest
from rayprune.sources.image_files import ImageFiles, arrange, class_images, class_names_of, find_images, split_folders
from rayprune.sources.image_rows import LEFT_OUT, ImageRows, decode_named, read_file, sampled_digest, unreadable
from rayprune.sources.images import UnreadableImage
from rayprune.sources.registry import register_source
from rayprune.sources.storage import Storage, public
from rayprune.sources.views import Subset, holdout

logger = logging.getLogger(__name__)

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
            raise ValueError(f"data.on_error is {self.on_error!r}: {closest(self.on_error, ('fail', 'skip'))}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"data.image_size is {self.image_size}: it must be at least 1")
        if self.num_channels not in {None, 1, 3}:
            raise ValueError(f"data.num_channels is {self.num_channels}: it must be 1 or 3")

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
        raise ValueError(
            f"{public(files.storage.path)} holds no readable image: restore the files, or correct data.path"
        )

    def _open_files(self, files: ImageFiles, sizes: np.ndarray, shape: tuple[int, ...]) -> SampleSource:
        if self.on_error == "fail" and not sizes.all():
            empty = int(np.argmin(sizes))
            raise ValueError(f"{files.named(empty)} is empty: restore it, {LEFT_OUT}")
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
            raise ValueError(f"{public(files.storage.path)}/{files.folder} holds no readable image: restore the files")
        named = ", ".join(files.name(int(sample)) for sample in left_out[:5])
        logger.warning("left out %d of %d images that can't be read, first: %s", len(left_out), len(rows), named)
        return Subset(rows, np.flatnonzero(readable))


def save_readable(rows: ImageRows, folder: Path) -> None:
    """Write a cache entry: `readable` (N,) bool."""
    np.save(folder / "readable.npy", rows.readable(np.arange(len(rows))))
