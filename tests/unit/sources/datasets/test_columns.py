"""Columns as they are: dense, ragged, text and other Python objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import Column, Schema
from rayprune.sources.datasets.columns import (
    as_column,
    as_row,
    check_names,
    column_digest,
    column_of,
    find_label,
    fits,
    object_array,
    options_of_a_call,
)


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([1, 2, 3], Column((), "int64")),
        ([1.5, 2], Column((), "float64")),
        ([[1, 2], [3, 4]], Column((2,), "int64")),
        ([torch.zeros(3, 4, dtype=torch.uint8)] * 2, Column((3, 4), "uint8")),
        ([[1, 2], [3], []], Column((-1,), "int64")),
        ([[], [1.5]], Column((-1,), "float64")),
        ([[], []], Column((0,), "float64")),
        ([np.zeros((3, 4, 2)), np.zeros((3, 5, 2))], Column((3, -1, 2), "float64")),
        ([np.zeros(1, np.int8), np.zeros(2, np.int16)], Column((-1,), "int16")),
        (["a", "", None], Column((), "object")),
        ([b"a", {"x": 1}, ["b"]], Column((), "object")),
    ],
)
def test_rows_make_a_column(rows, column):
    values = as_column([as_row(row) for row in rows])
    assert column_of(values) == column
    assert len(values) == len(rows)
    assert (values.dtype == object) == column.in_objects
    if column.is_ragged:
        for row, expected in zip(values, rows, strict=True):
            assert row.dtype == column.dtype
            np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, "a"], "numbers in some rows and str in others"),
        ([[1], None], "numbers in some rows and NoneType in others"),
        ([[1], [[2]]], r"arrays of \[1, 2\] axes"),
        ([torch.zeros(2, dtype=torch.bfloat16)], "is not an array"),
    ],
)
def test_rows_that_make_no_column_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        as_column([as_row(row) for row in rows])


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        (np.zeros(3), Column((3,), "float64"), True),
        (np.zeros(2), Column((3,), "float64"), False),
        (np.zeros(2), Column((-1,), "float32"), True),
        (np.zeros(2), Column((-1,), "int64"), False),
        (np.zeros(0), Column((-1,), "int64"), True),
        (np.zeros((2, 2)), Column((-1,), "float64"), False),
        ("a", Column((), "object"), True),
        (np.zeros(2), Column((), "object"), False),
        ("a", Column((), "int64"), False),
    ],
)
def test_a_row_fits_a_column_that_holds_it_without_loss(row, column, expected):
    assert fits(row, column) == expected


def test_the_size_of_a_row_counts_ragged_columns_by_their_mean():
    ragged = column_of(as_column([np.zeros(1, np.int16), np.zeros(5, np.int16)]))
    assert ragged.row_bytes == 6
    assert Schema({"x": Column((2, 3), "float32"), "r": ragged}).row_bytes == 30
    assert column_of(object_array(["a" * 1000])).row_bytes > 1000


def test_the_digest_of_a_ragged_column_changes_with_values_and_boundaries():
    def digest_of(*rows):
        return column_digest(as_column([as_row(row) for row in rows]))

    assert digest_of([1, 2], [3]) == digest_of([1, 2], [3])
    digests = {digest_of([1, 2], [3]), digest_of([1], [2, 3]), digest_of([1, 2], [4]), digest_of("ab", "c")}
    assert len(digests | {digest_of("a", "bc"), digest_of({"x": 1}, "c"), digest_of(None, "c")}) == 7


def test_names_and_labels():
    with pytest.raises(DataError, match="column 'weight' has a name that rayprune adds itself"):
        check_names(["x", "weight"])
    assert find_label(["x", "labels"], None) == "labels"
    assert find_label(["labels", "label"], None) == "label"
    assert find_label(["x"], None) is None
    assert find_label(["x", "kind"], "kind") == "kind"
    with pytest.raises(DataError, match="no column 'knid' for label_column: did you mean 'kind'"):
        find_label(["x", "kind"], "knid")


def test_errors_of_a_call_name_its_options():
    message = "set data.image_size=4, or data.cache; see /x/data.cache and data.limit"
    expected = r"^set image_size=4, or cache; see /x/data\.cache and data\.limit$"
    with pytest.raises(ConfigError, match=expected), options_of_a_call():
        raise ConfigError(message)
