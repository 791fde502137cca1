"""Training data in which some samples have an extra class (`rayprune.core.audit.threshold_samples`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayprune.core.audit.threshold_samples import draw_threshold_samples
from rayprune.sources.base import Splits
from rayprune.sources.registry import open_data
from rayprune.sources.views import Relabeled


def with_threshold_samples(data: Mapping[str, Any], seed: int, number: int) -> Splits:
    """Open data with one more class, C, which the training part's threshold samples have.

    Args:
        data: keyword arguments of `open_data`.
        seed, number: of `draw_threshold_samples`.
    """
    splits = open_data(**data)
    labels, num_classes = splits.train.labels.copy(), splits.train.schema.num_classes or 0
    labels[draw_threshold_samples(labels.size, num_classes, seed, number)] = num_classes
    train = Relabeled(splits.train, labels, num_classes + 1)
    if splits.validation is None:
        return Splits(train, None)
    return Splits(train, Relabeled(splits.validation, splits.validation.labels, num_classes + 1))
