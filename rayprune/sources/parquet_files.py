"""Parquet files on any file system, and which of them can be used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayprune.sources.fingerprint import digest, file_digest
from rayprune.sources.storage import Storage, one_line, public

logger = logging.getLogger(__name__)

LEFT_OUT = "or leave it out with data.on_error=skip"
# The end of a file that is not local: its footer names the place, size and statistics of every column chunk.
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardFile:
    """One Parquet file; pickles into its place.

    Attributes:
        storage: the folder, or the file itself.
        relative: the path below the folder; empty for the file itself.
    """

    storage: Storage
    relative: str = ""

    def __str__(self) -> str:
        place = public(self.storage.path)
        return f"{place.rstrip('/')}/{self.relative}" if self.relative else place

    @property
    def name(self) -> str:
        """The name without its folders."""
        return str(self).rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.removesuffix(".parquet")

    @property
    def _where(self) -> str:
        return self.storage.full(self.relative)

    def open(self) -> pq.ParquetFile:
        """Open the file; far away, neighbouring columns come in one request."""
        return pq.ParquetFile(
            self._where, filesystem=self.storage.filesystem, pre_buffer=not self.storage.is_local, memory_map=False
        )

    def metadata(self) -> pq.FileMetaData:
        """Read the footer."""
        return pq.read_metadata(self._where, filesystem=self.storage.filesystem)

    def schema(self) -> pa.Schema:
        """Read the schema."""
        return pq.read_schema(self._where, filesystem=self.storage.filesystem)

    def column(self, name: str) -> pa.ChunkedArray:
        """Read one column whole; dictionary-encoded values come as plain ones."""
        table = pq.read_table(self._where, filesystem=self.storage.filesystem, columns=[name], partitioning=None)
        return plain_values(table.column(name))

    def digest(self) -> str:
        """Return the content's digest; of a file that is not local that of its length and its last MiB.

        Reading it all over a network would cost as much as an epoch.
        """
        if self.storage.is_local:
            return file_digest(Path(self._where))
        with self.storage.open(self.relative) as file:
            size = file.size()
            start = max(0, size - _TAIL_BYTES)
            return digest("tail", size, bytes(file.read_at(size - start, start)).hex())


def plain_values(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without its dictionary."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def usable_files(
    files: tuple[ShardFile, ...], check: Callable[[ShardFile], object], skip_errors: bool
) -> tuple[ShardFile, ...]:
    """Return the files that `check` can read and finds no fault with.

    Raises:
        ValueError: a file is damaged or at fault, and skip_errors is off.
    """
    usable = []
    for file in files:
        try:
            check(file)
        except (ValueError, OSError) as error:  # pyarrow's own error is a ValueError too
            damaged = isinstance(error, pa.ArrowInvalid | OSError)
            fault = f"{file} is not a readable Parquet file ({one_line(error, 120)})" if damaged else str(error)
            if not skip_errors:
                raise ValueError(f"{fault}: {'restore' if damaged else 'correct'} it, {LEFT_OUT}") from None
            logger.warning("left out: %s", fault)
        else:
            usable.append(file)
    return tuple(usable)
