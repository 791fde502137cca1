"""What the data sets in torchvision's folders share: finding their files, downloading them, opening their arrays.

torchvision downloads; reading is our own, because its classes refuse every file whose checksum is not the published
one, and with it copies of such sets with other labels or fewer samples, and unpickle whatever a file holds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rayprune.sources.base import Column, Schema
from rayprune.sources.cache import cache_root, cached_arrays
from rayprune.sources.fingerprint import digest, file_digest
from rayprune.sources.rows import RowSource

logger = logging.getLogger(__name__)


def find_files(root: Path, choices: Sequence[tuple[Path, ...]], dataset: str, download: bool) -> list[Path]:
    """Return the files of a data set, downloading them first where one is missing and that is wanted.

    Args:
        root: torchvision's root.
        choices: for each file, where it may lie.
        dataset: name of torchvision's class.
        download: data.download.

    Raises:
        ValueError: a file is missing, or can't be downloaded.
    """
    if download and any(_first(paths) is None for paths in choices):
        _download(root, dataset)
    found = [_first(paths) for paths in choices]
    for file, paths in zip(found, choices, strict=True):
        if file is None:
            cure = "remove what is there and try again" if download else "set data.download=true, or correct data.path"
            raise ValueError(f"{paths[0]} is missing: {cure}")
    return [file for file in found if file is not None]


def _first(paths: tuple[Path, ...]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _download(root: Path, dataset: str) -> None:
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, dataset)(str(root), download=True)
    except (OSError, RuntimeError, EOFError) as error:
        line = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{dataset} can't be downloaded to {root} ({line}): check the network, or put the files there"
        ) from None


def warn_of_changes(files: list[Path], checksums: dict[str, str]) -> None:
    """Warn of files that are not the published ones: damaged, or a variant of one's own.

    Args:
        files: those to look at.
        checksums: file name → published MD5.
    """
    changed = [
        file
        for file in files
        if file.name in checksums
        and hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != checksums[file.name]
    ]
    if changed:
        logger.warning(
            "%s differs from the published file (MD5): where that is not meant, remove it and set data.download=true",
            ", ".join(map(str, changed)),
        )


def open_files(
    name: str,
    files: list[Path],
    build: Callable[[list[Path], Path], None],
    num_bytes: int,
    shape: tuple[int, ...],
    class_names: tuple[str, ...],
    cache_dir: str | None,
) -> RowSource:
    """Open one part of a data set, kept as arrays in the decoded cache.

    Args:
        name: of the source.
        files: of this part, in order.
        build: writes image.npy (N, *shape) uint8 and label.npy (N,) int64 into a folder; a module's function.
        num_bytes: about what it writes.
        shape: of one image (H, W, C).
        class_names: one a class.
        cache_dir: see `cache.cache_root`.
    """
    fingerprint = digest(name, *(file_digest(file) for file in files))
    key = f"{name}-{fingerprint}"
    open_arrays = partial(cached_arrays, key, cache_root(cache_dir), partial(build, files), num_bytes)
    columns = {"image": Column(shape, "uint8"), "label": Column((), "int64")}
    schema = Schema(columns, "image", len(class_names), class_names)
    return RowSource(open_arrays, schema, fingerprint, np.asarray(open_arrays()["label"], dtype=np.int64))
