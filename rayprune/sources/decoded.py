"""Decode once: any source's rows as arrays on disk, memory-mapped, or in the memory of each process that reads."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from rayprune.core.objects import closest
from rayprune.sources.base import SampleSource
from rayprune.sources.cache import cache_root, cached_arrays, has_entry, new_array
from rayprune.sources.rows import RowSource

logger = logging.getLogger(__name__)

MODES = ("auto", "memory", "disk", "none")
CHUNK_BYTES = 1 << 26
# With `auto` the cache never takes more than this share of what is free.
_SHARE_OF_FREE = 0.5


def check_mode(mode: str) -> None:
    """Refuse a mode that is none.

    Raises:
        ValueError: with the closest one.
    """
    if mode not in MODES:
        raise ValueError(f"data.cache is {mode!r}: {closest(mode, MODES)}")


def decoded(source: SampleSource, mode: str = "auto", cache_dir: str | None = None) -> SampleSource:
    """Return a source of the same samples whose rows are decoded once.

    Args:
        source: labelled samples whose `take` decodes.
        mode: `disk` keeps the rows in the decoded cache; `memory` in each process that reads (a copy in each); `none`
            decodes at every visit; `auto` is `disk` where decoding is expensive and the disk has twice the room.
        cache_dir: see `cache.cache_root`.

    Raises:
        ValueError: an unknown mode; at the first use: the cache can't be written.
    """
    check_mode(mode)
    if mode == "none" or (mode == "auto" and source.row_cost == "cheap"):
        return source
    if mode == "memory":
        return RowSource(partial(_in_memory, source), source.schema, source.fingerprint, source.labels)
    num_bytes = len(source) * source.schema.row_bytes
    root, key = cache_root(cache_dir), f"decoded-{source.fingerprint}"
    # An entry that is there already takes no more room.
    if mode == "auto" and num_bytes > _SHARE_OF_FREE * _free_bytes(root) and not has_entry(key, root):
        logger.warning(
            "decoded, the samples take %.1f GB, more than half of what is free at %s: they are decoded at every visit; "
            "set data.cache=disk, or data.cache_dir to a larger disk",
            num_bytes / 1e9,
            root,
        )
        return source
    open_arrays = partial(cached_arrays, key, root, partial(_build, source), num_bytes)
    return RowSource(open_arrays, source.schema, source.fingerprint, source.labels)


def _free_bytes(root: Path) -> int:
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def _in_memory(source: SampleSource) -> dict[str, np.ndarray]:
    columns = source.schema.columns
    arrays = {name: np.empty((len(source), *column.shape), column.dtype) for name, column in columns.items()}
    _fill(source, arrays)
    return arrays


def _build(source: SampleSource, folder: Path) -> None:
    columns = source.schema.columns
    arrays = {
        name: new_array(folder, name, column.dtype, (len(source), *column.shape)) for name, column in columns.items()
    }
    _fill(source, arrays)
    for array in arrays.values():
        array.flush()


def _fill(source: SampleSource, arrays: dict[str, np.ndarray] | dict[str, np.memmap]) -> None:
    rows = max(1, CHUNK_BYTES // max(1, source.schema.row_bytes))
    for start in range(0, len(source), rows):
        stop = min(start + rows, len(source))
        for name, values in source.take(np.arange(start, stop, dtype=np.int64)).items():
            arrays[name][start:stop] = values
