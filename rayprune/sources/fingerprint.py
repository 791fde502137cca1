"""Hex digests of samples, from their order, labels and content; never from a path or a timestamp."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

# Larger content is sampled, so that opening a source of any size takes about a second.
WHOLE_BYTES = 1 << 30
SAMPLE_BYTES = 1 << 20


def digest(*parts: str | int | np.ndarray) -> str:
    """Hash parts into 32 hex digits; types and lengths count, so that no two lists of parts run together.

    >>> digest("limited", 12) == digest("limited", 12), digest("limited", 12) == digest("limited1", 2)
    (True, False)
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"array {part.dtype.str} {part.shape}:".encode())
            state.update(np.ascontiguousarray(part).data)
        else:
            text = str(part).encode()
            state.update(f"{type(part).__name__} {len(text)}:".encode())
            state.update(text)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Hash a file's length and content: all of it up to 1 GiB, above that 1,024 evenly spaced MiB and the last one."""
    if path.stat().st_size == 0:  # an empty file can't be mapped
        return digest("bytes", 0)
    return _sampled_digest(np.memmap(path, dtype=np.uint8, mode="r"))


def array_digest(values: np.ndarray) -> str:
    """Hash an array's dtype, shape and content, sampled like a file's; a memory map is never copied as a whole."""
    content = np.ravel(values, order="K").view(np.uint8)
    return digest(values.dtype.str, str(values.shape), _sampled_digest(content))


def _sampled_digest(content: np.ndarray) -> str:
    size = len(content)
    if size <= WHOLE_BYTES:
        return digest("bytes", size, content)
    count = WHOLE_BYTES // SAMPLE_BYTES
    starts = [position * (size - SAMPLE_BYTES) // count for position in range(count + 1)]
    return digest("bytes", size, *(content[start : start + SAMPLE_BYTES] for start in starts))
