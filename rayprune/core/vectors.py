"""Vectors of all samples, such as embeddings, kept until a forward-only pass is complete.

They are too large for memory and for checkpoints: a memory-mapped temporary file holds them on the ScoreActor's
machine, and goes with its process. A method condenses them to a few numbers per sample as soon as the pass is complete;
a run that stops before resumes before the pass and makes it again.

Shapes: N samples, B observed, d numbers of a vector.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.errors import ConfigError

logger = logging.getLogger(__name__)

Storage = Literal["float32", "float16"]

# Cures for samples without a value of the forward-only pass.
SWEEP_CURE = "in a loop of your own, call shard.sweep(score) after the batches of every epoch"
MISSING_CURE = f"if theirs are NaN or infinite, lower optim.lr; {SWEEP_CURE}"


@dataclass(frozen=True)
class VectorColumn:
    """In `Method.columns()`: a column of vectors of a forward-only pass, which `Method.condense` reads.

    Attributes:
        storage: float32, or float16 in half the space.
    """

    storage: Storage = "float32"


class Vectors:
    """Hold one vector per sample in a memory-mapped temporary file, made when the first vectors come.

    Args:
        name: of the signal, for messages.
        num_samples: N.
        storage: the dtype on disk.

    Attributes:
        seen: (N,) True where a vector was stored.
    """

    def __init__(self, name: str, num_samples: int, storage: Storage) -> None:
        self.name, self._num_samples, self._storage = name, num_samples, storage
        self._file: NDArray[Any] | None = None
        self.seen: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    @property
    def is_empty(self) -> bool:
        """Whether no vector was stored."""
        return self._file is None

    @property
    def array(self) -> NDArray[Any]:
        """(N, d) memory map of the storage's dtype.

        Raises:
            ConfigError: a sample has no vector.
        """
        missing = np.flatnonzero(~self.seen) if self._file is not None else np.arange(self._num_samples)
        if self._file is None or missing.size:
            raise ConfigError(
                f"{missing.size} of {self._num_samples} samples have no {self.name}, "
                f"ids {missing[:5].tolist()}: {MISSING_CURE}"
            )
        return self._file

    def put(self, ids: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Store (B, d) vectors of (B,) ids.

        Raises:
            ConfigError: no room on the disk, another length, or numbers beyond float16.
        """
        if self._file is None:
            self._file = self._make(values.shape[1])
            self.seen = np.zeros(self._num_samples, dtype=bool)
        if values.shape[1] != self._file.shape[1]:
            raise ConfigError(
                f"{self.name} has {values.shape[1]} numbers and had {self._file.shape[1]} before: use one length"
            )
        if self._storage == "float16" and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise ConfigError(f"{self.name} is beyond the range of float16: use method.storage=float32")
        self._file[ids] = values
        self.seen[ids] = True

    def clear(self) -> None:
        """Forget all vectors, and free the disk."""
        self._file, self.seen = None, np.zeros(0, dtype=bool)

    def _make(self, length: int) -> NDArray[Any]:
        size, folder = check_disk(self.name, self._num_samples, length, self._storage), tempfile.gettempdir()
        text = f"{self.name} of {self._num_samples:,} samples, {length} numbers each, in {self._storage}"
        logger.info("%s: %.1f MiB in %s", text, size / 2**20, folder)
        # Without a name on the disk, so that it goes with the process, however that ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, not as a SIGBUS later
            return np.memmap(file, dtype=self._storage, mode="w+", shape=(self._num_samples, length))


def check_disk(name: str, num_samples: int, length: int, storage: Storage) -> int:
    """Return the bytes of one vector per sample.

    Raises:
        ConfigError: the temporary folder of this machine has less room.
    """
    folder, size = tempfile.gettempdir(), num_samples * length * np.dtype(storage).itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        half = ", or method.storage=float16" if storage == "float32" else ""
        raise ConfigError(
            f"{name} of {num_samples:,} samples, {length} numbers each, in {storage}, takes {size / 2**30:.1f} GiB, "
            f"and {folder} has {free / 2**30:.1f} GiB free: set TMPDIR to a folder with more room{half}"
        )
    return size
