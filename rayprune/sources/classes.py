"""How many classes the labels stand for."""

from __future__ import annotations

import numpy as np

# With more classes than this the labels are numbers of something else.
MAX_LABEL = 2**31 - 1
SPARE_CLASSES, CLASSES_A_SAMPLE = 1_000, 10


def count_classes(labels: np.ndarray, named: str, given: int | None) -> int:
    """Return the number of classes: the one given, else the largest label + 1.

    Args:
        labels: (N,) integers of any width, N at least 1.
        named: where they come from, for messages.
        given: data.num_classes.

    Raises:
        ValueError: the labels are too large, or too sparse to be numbered classes.
    """
    largest = int(labels.max())
    if largest > MAX_LABEL:
        raise ValueError(f"{named} holds {largest}: labels must be below 2**31, number the classes from 0")
    if given is None and largest + 1 > CLASSES_A_SAMPLE * len(labels) + SPARE_CLASSES:
        raise ValueError(
            f"{named} look like ids, no labels: the largest of {len(labels)} is {largest}; number the classes from 0, "
            "name another column or set data.num_classes"
        )
    return largest + 1 if given is None else given
