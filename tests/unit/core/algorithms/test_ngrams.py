"""Hashed bags of words and word pairs: what counts, lengths, and cosines that n-grams in common explain."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from rayprune.core.algorithms.ngrams import hashed_ngrams, tokens_of


def cosine(one: list[Any], other: list[Any]) -> float:
    """The cosine of bags of tokens and of neighboring pairs, without hashing."""
    bags = [Counter([*row, *pairwise(row)]) for row in (one, other)]
    product = sum(bags[0][key] * bags[1][key] for key in bags[0])
    return float(product / np.sqrt(np.prod([sum(count**2 for count in bag.values()) for bag in bags])))


def test_cosines_are_about_those_of_n_grams() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 40, size=size).tolist() for size in (30, 50, 3, 1, 80)]
    rows.append([*rows[1][:25], *rows[4][:10]])
    vectors = hashed_ngrams([np.array(row) for row in rows], 1 << 16)
    expected = [[cosine(one, other) for other in rows] for one in rows]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=0.02)


def test_pairs_do_not_cross_rows() -> None:
    both = hashed_ngrams([np.array([1, 2]), np.array([3, 4])])
    np.testing.assert_array_equal(both[0], hashed_ngrams([np.array([1, 2])])[0])
    np.testing.assert_array_equal(both[1], hashed_ngrams([np.array([3, 4])])[0])


def test_the_order_of_words_counts() -> None:
    one, other = hashed_ngrams(["dog bites man", "man bites dog"])
    assert one @ other < 0.9


@pytest.mark.parametrize("row", ["", None, b"", np.zeros(0, np.int64), []])
def test_a_row_without_tokens_is_zero(row: Any) -> None:
    vectors = hashed_ngrams([row, "word"])
    assert not vectors[0].any()
    assert np.linalg.norm(vectors[1]) == pytest.approx(1.0)


def test_texts_without_words_differ() -> None:
    vectors = hashed_ngrams(["!!!", "???", "!!!"])
    assert vectors[0] @ vectors[2] == pytest.approx(1.0)
    assert vectors[0] @ vectors[1] < 0.5


def test_bytes_are_text() -> None:
    assert tokens_of(b"Caf\xc3\xa9 noir").tolist() == tokens_of("café NOIR").tolist()


def test_negative_token_ids_are_taken() -> None:
    assert hashed_ngrams([np.array([-100, 5])]).any()
