"""Vectors of texts and token ids for near-duplicates: hashed bags of words and of pairs of neighboring words.

Every n-gram adds 1 or -1 to one of d numbers, both drawn by a hash (Weinberger et al., ICML 2009, arXiv 0902.2206), so
that the scalar product of two vectors is about the number of n-grams that they share. Vectors have length 1.

Shapes: B rows, T tokens of all of them, d numbers of a vector.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
_GAMMA, _FIRST, _SECOND = (np.uint64(each) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hashed_ngrams(rows: Sequence[Any], width: int = 512) -> NDArray[np.float32]:
    """Return vectors of length 1, (B, d); 0 for a row without tokens.

    Args:
        rows: B texts or arrays of token ids. Texts are split into words, in lower case; a text without words is one.
        width: d.

    >>> vectors = hashed_ngrams(["a cat sat", "A cat, sat!", ""])
    >>> (vectors @ vectors[0]).round(3).tolist()
    [1.0, 1.0, 0.0]
    """
    tokens = [tokens_of(row) for row in rows]
    sizes = np.array([each.size for each in tokens], dtype=np.int64)
    if sizes.sum() == 0:
        return np.zeros((len(tokens), width), dtype=np.float32)
    owner_T, flat_T = np.repeat(np.arange(sizes.size), sizes), _mixed(np.concatenate(tokens))
    together = owner_T[1:] == owner_T[:-1]
    pairs = _mixed(flat_T[:-1][together] * _GAMMA + flat_T[1:][together])
    owners, keys = np.concatenate([owner_T, owner_T[1:][together]]), np.concatenate([flat_T, pairs])
    places = owners * width + (keys % np.uint64(width)).astype(np.int64)
    signs = 1.0 - 2.0 * (keys >> np.uint64(63)).astype(np.float64)
    vectors = np.bincount(places, signs, minlength=sizes.size * width).reshape(-1, width)
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def tokens_of(row: Any) -> NDArray[np.uint64]:
    """Return the token ids of a row: its own, or hashes of the words of a text."""
    if isinstance(row, bytes):
        row = row.decode("utf-8", "replace")
    if isinstance(row, str):
        words = _WORD.findall(row.lower()) or ([row] if row else [])
        return np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    if row is None:
        return np.zeros(0, dtype=np.uint64)
    return np.asarray(row).reshape(-1).astype(np.int64).view(np.uint64)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each word, that of SplitMix64."""
    words = words + _GAMMA
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
