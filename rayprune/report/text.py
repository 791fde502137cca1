"""Numbers and names as text, the same on the page and in a terminal; without imports that slow a command's start."""

from __future__ import annotations

from collections.abc import Mapping


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number, or return – for None and NaN.

    >>> number(0.5), number(1234, ",d"), number(None)
    ('0.5000', '1,234', '–')
    """
    return "–" if value is None or value != value else format(value, form)


def share(value: float | None, digits: int = 2) -> str:
    """Format a fraction as a percentage, never as -0.0%, or return – for None and NaN.

    >>> share(0.256), share(-0.0001, 1), share(None)
    ('25.60%', '0.0%', '–')
    """
    return number(value, f"z.{digits}%")


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


def training_seconds(seconds: Mapping[str, float | None]) -> float:
    """Return the training seconds of an epoch: all of it but validation, so selection and checkpoints count.

    >>> training_seconds({"epoch": 3.0, "validate": 0.5, "select": 0.25})
    2.5
    """
    return (seconds.get("epoch") or 0.0) - (seconds.get("validate") or 0.0)


def short(name: str, most: int) -> str:
    """Cut the middle out of a name that has more than `most` characters."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
