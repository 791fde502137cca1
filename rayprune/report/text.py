"""Numbers and names as text, the same on the page and in a terminal; imports nothing, so that commands start fast."""

from __future__ import annotations


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number, or return – for None and NaN.

    >>> number(0.5), number(1234, ",d"), number(None)
    ('0.5000', '1,234', '–')
    """
    return "–" if value is None or value != value else format(value, form)


def share(value: float | None, digits: int = 2) -> str:
    """Format a fraction as a percentage, or return – for None and NaN."""
    return number(value, f".{digits}%")


def percent(fraction: float) -> str:
    """Format a fraction as a percentage with as many digits as it has, at most five.

    >>> percent(0.95), percent(0.9875)
    ('95%', '98.75%')
    """
    return f"{100 * fraction:.5g}%"


def count_of(num: int, word: str) -> str:
    """Return a count with its noun.

    >>> count_of(1, "epoch"), count_of(2000, "epoch")
    ('1 epoch', '2,000 epochs')
    """
    return f"{num:,} {word}{'s' * (num != 1)}"


def short(name: str, most: int) -> str:
    """Cut the middle out of a name that has more than `most` characters."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
