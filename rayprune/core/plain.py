"""Hyperparameters as plain Python values, so that equality, hashing, JSON and YAML see no NumPy scalar and no list."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return NumPy scalars as Python numbers, and lists and arrays as tuples; anything else unchanged.

    >>> plain([np.float64(0.25), 1])
    (0.25, 1)
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def make_fields_plain(instance: Any) -> None:
    """Replace the fields of a dataclass, frozen or not, by `plain` values; for `__post_init__`."""
    for field in dataclasses.fields(instance):
        object.__setattr__(instance, field.name, plain(getattr(instance, field.name)))
