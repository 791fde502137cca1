"""Values out of files, which may be odd or missing, and the texts of a table's cells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MOST = 2**53  # of a count: above it a float is another number


def as_number(value: Any) -> float | None:
    """Return a number as a float, None for anything else and for an infinite one.

    >>> as_number(2), as_number("2"), as_number(True), as_number(10**400), as_number(float("inf"))
    (2.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return None if math.isinf(found) else found


def as_count(value: Any) -> int | None:
    """Return a whole number from 0 on, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping, an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def share(value: Any, digits: int = 2) -> str:
    """Return a share as a percentage, – where there is none."""
    return number(value, f".{digits}%")


def number(value: Any, form: str = ".4f") -> str:
    """Return a number as text, – where there is none."""
    found = as_number(value)
    return "–" if found is None or found != found else format(value, form)


def count_of(num: int, word: str) -> str:
    """Return how many there are of a thing, in words.

    >>> count_of(1, "epoch"), count_of(2, "epoch")
    ('1 epoch', '2 epochs')
    """
    return f"{num:,} {word}{'s' * (num != 1)}"


def short(name: str, most: int) -> str:
    """Return a name cut in its middle to at most so many characters."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
