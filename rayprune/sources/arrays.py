"""NumPy arrays: a folder of .npy files, or an .npz archive.

The .npy files are memory-mapped in place; the members of an archive are extracted once into the decoded cache.

Shapes: N samples, H height, W width, C channels, F features.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfileobj

import numpy as np

from rayprune.errors import ConfigError, DataError, one_line
from rayprune.sources.base import NumClasses, SampleSource, Schema, Splits, check_labels, count_classes
from rayprune.sources.cache import cache_root, cached_arrays
from rayprune.sources.fingerprint import array_digest, digest, file_digest
from rayprune.sources.memory import RowSource
from rayprune.sources.registry import register_source
from rayprune.sources.views import holdout

TRAIN_NAMES = (("x_train", "y_train"), ("x", "y"))
VALIDATION_NAMES = (("x_test", "y_test"), ("x_val", "y_val"))
FILE_NAMES = [f"{name}.npy" for names in (*TRAIN_NAMES, *VALIDATION_NAMES) for name in names]
IMAGE_CHANNELS = (1, 3)
CHUNK_VALUES = 1 << 22
MAX_COMPRESSION = 1_100  # deflate makes a byte of at most 1,032

Opener = Callable[[], Mapping[str, np.ndarray]]


@register_source("arrays")
@dataclass(frozen=True)
class Arrays:
    """Inputs and labels as NumPy arrays.

    Inputs are images, uint8 (N, H, W, C), (N, C, H, W) with 1 or 3 channels, or (N, H, W), delivered as (H, W, C), or
    any other numeric (N, F), delivered as finite float32 features. Labels are integers of shape (N,) or (N, 1).

    Attributes:
        path: a folder with x_train.npy and y_train.npy (or x and y), and optionally x_test/y_test or x_val/y_val; or
            an .npz archive of the same names.
        validation_fraction: held out, stratified, if there is no test part; 0 for no validation.
        num_classes: default: the largest training label + 1.
        cache_dir: where an archive is extracted to; default: $RAYPRUNE_CACHE, else ~/.cache/rayprune.
    """

    path: str
    validation_fraction: float = 0.1
    num_classes: NumClasses = None
    cache_dir: str | None = None

    def open(self) -> Splits:
        """Open the arrays, and hold out a validation part if none is stored.

        Raises:
            ConfigError: path is neither a folder nor an .npz archive, or validation_fraction is outside its range.
            DataError: missing or damaged files, arrays of an unsuitable shape, dtype or length, features that are NaN
                or infinite, or labels that are not class numbers.
        """
        path = Path(self.path).expanduser().absolute()
        opener = _opener(path, self.cache_dir)
        arrays = opener()
        train_names = next((names for names in TRAIN_NAMES if set(names) <= set(arrays)), None)
        if train_names is None:
            known = ", ".join(sorted(arrays)) or "none of these"
            raise DataError(f"{path} holds no x_train and y_train, or x and y (found: {known}): add them")
        train = _open_part(path, opener, train_names, self.num_classes)
        for names in VALIDATION_NAMES:
            present = set(names) & set(arrays)
            if len(present) == 1:
                raise DataError(f"{path} holds {present.pop()} without its partner: store {names[0]} and {names[1]}")
            if present:
                return Splits(train, _open_part(path, opener, names, train.schema.num_classes))
        return holdout(train, self.validation_fraction)


def _opener(path: Path, cache_dir: str | None) -> Opener:
    if path.is_dir():
        return partial(map_folder, path)
    if not path.exists():
        raise ConfigError(f"data.path {str(path)!r} does not exist: correct it")
    if path.suffix != ".npz" or not path.is_file():
        raise ConfigError(f"data.path {str(path)!r} is neither a folder of .npy files nor an .npz archive: correct it")
    key = f"arrays-{digest('npz', file_digest(path))}"
    return partial(cached_arrays, key, cache_root(cache_dir), partial(extract_archive, path), _archive_bytes(path))


def map_folder(folder: Path, archive: Path | None = None) -> dict[str, np.ndarray]:
    """Memory-map the .npy files of known names in a folder; `archive` names the .npz file in messages."""
    files = [folder / name for name in FILE_NAMES if (folder / name).exists()]
    return {file.stem: map_array(file, str(file) if archive is None else f"{archive}: {file.name}") for file in files}


def map_array(file: Path, name: str) -> np.ndarray:
    """Memory-map a .npy file, called `name` in messages.

    Raises:
        DataError: it is not a .npy file, is truncated, or holds Python objects.
    """
    try:
        return np.asarray(np.lib.format.open_memmap(file, mode="r"))
    except (ValueError, OSError, tokenize.TokenError) as error:  # the last one from a header cut in the middle
        raise DataError(
            f"{name} is truncated, or is not a .npy file of numbers ({one_line(error)}): write it again"
        ) from None


def _archive_bytes(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _known_members(archive)
            for member in members:
                _check_member(path, archive, member)
            return sum(member.file_size for member in members)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, one_line(error)) from None


def _known_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [archive.getinfo(name) for name in sorted(set(archive.namelist()) & set(FILE_NAMES))]


def _check_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse an array whose header, or whose place in the archive, does not fit its size; nothing else is unpacked."""
    if member.file_size > MAX_COMPRESSION * member.compress_size:
        raise _damaged(path, f"{member.filename} claims {member.file_size:,} bytes in {member.compress_size:,}")
    try:
        with archive.open(member) as packed:
            version = np.lib.format.read_magic(packed)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(packed)
            claimed = packed.tell() + math.prod(shape) * dtype.itemsize
    except (ValueError, tokenize.TokenError) as error:
        raise _damaged(path, f"{member.filename}: {one_line(error)}") from None
    if claimed != member.file_size and not dtype.hasobject:
        problem = f"{member.filename} claims {claimed:,} bytes, of shape {shape}, and has {member.file_size:,}"
        raise _damaged(path, problem)


def extract_archive(path: Path, folder: Path) -> None:
    """Write an archive's arrays of known names into a folder as .npy files.

    Raises:
        DataError: the archive is damaged, or an array holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _known_members(archive)
            for member in members:
                _check_member(path, archive, member)
            for member in members:
                with archive.open(member) as packed, (folder / member.filename).open("wb") as unpacked:
                    copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(path, one_line(error)) from None
    map_folder(folder, path)  # refuse Python objects before the entry is published


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} is damaged ({problem}): save it again with np.savez")


def load_part(opener: Opener, x_name: str, y_name: str) -> dict[str, np.ndarray]:
    """Return one part's columns: views of its inputs as (N, H, W, C) or (N, F), and its labels (N,)."""
    arrays = opener()
    inputs = _channels_last(arrays[x_name])
    return {"image" if inputs.ndim == 4 else "features": inputs, "label": arrays[y_name].reshape(-1)}


def _channels_last(inputs: np.ndarray) -> np.ndarray:
    if inputs.ndim == 3:
        return inputs[..., None]
    if inputs.ndim == 4 and inputs.shape[3] not in IMAGE_CHANNELS:
        return inputs.transpose(0, 2, 3, 1)
    return inputs


def _open_part(path: Path, opener: Opener, names: tuple[str, str], num_classes: int | None) -> SampleSource:
    arrays = opener()
    inputs, targets = arrays[names[0]], arrays[names[1]]
    _check_inputs(path, names[0], inputs)
    _check_finite(path, names[0], inputs)
    _check_labels(path, names, inputs, targets)
    num_classes = count_classes(targets, f"{names[1]} in {path}", num_classes)
    labels = np.asarray(targets, dtype=np.int64).reshape(-1)
    check_labels(labels, num_classes, lambda row: f"{names[1]} in {path} row {row}")
    rows = _channels_last(inputs)
    schema = Schema.for_classification("image" if rows.ndim == 4 else "features", rows.shape[1:], num_classes)
    fingerprint = digest("arrays", array_digest(inputs), labels)
    return RowSource(partial(load_part, opener, *names), schema, fingerprint, labels)


def _check_inputs(path: Path, name: str, inputs: np.ndarray) -> None:
    described = f"{name} in {path} is {inputs.dtype} of shape {inputs.shape}"
    if inputs.size == 0:
        raise DataError(f"{described}: it is empty, store at least one sample")
    if inputs.ndim == 2:
        if not (np.issubdtype(inputs.dtype, np.number) or inputs.dtype == bool) or inputs.dtype.kind == "c":
            raise DataError(f"{described}: features must be real numbers")
    elif inputs.ndim not in {3, 4}:
        raise DataError(f"{described}: images have 3 or 4 axes and features 2, reshape it")
    elif inputs.dtype != np.uint8:
        raise DataError(f"{described}: images must be uint8 in 0..255, store (x * 255).round().astype('uint8')")
    elif inputs.ndim == 4 and not {inputs.shape[1], inputs.shape[3]} & set(IMAGE_CHANNELS):
        raise DataError(f"{described}: neither axis 1 nor axis 3 has 1 or 3 channels, store (N, H, W, 1 or 3)")


def _check_finite(path: Path, name: str, inputs: np.ndarray) -> None:
    if inputs.dtype.kind != "f":
        return
    num_rows = max(1, CHUNK_VALUES // inputs.shape[1])
    for start in range(0, len(inputs), num_rows):
        values = inputs[start : start + num_rows]
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32, copy=False))
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise DataError(
                f"{name} in {path} row {start + row}, column {column} is {values[row, column]:g}: features must be "
                "finite float32 numbers, correct it or leave the row out"
            )


def _check_labels(path: Path, names: tuple[str, str], inputs: np.ndarray, targets: np.ndarray) -> None:
    described = f"{names[1]} in {path} is {targets.dtype} of shape {targets.shape}"
    if not np.issubdtype(targets.dtype, np.integer) or targets.ndim == 0 or targets.shape[1:] not in {(), (1,)}:
        raise DataError(f"{described}: labels must be integers of shape (N,), one class number per sample")
    if len(targets) != len(inputs):
        raise DataError(f"{described}, but {names[0]} has {len(inputs)} rows: store one label per sample")
