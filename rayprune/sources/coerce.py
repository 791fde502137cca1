"""What a user has at hand, as a SampleSource."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.memory import MemorySource


def as_source(data: Any) -> SampleSource:
    """Turn data into a source."""
    if isinstance(data, SampleSource):
        return data
    if isinstance(data, Splits):
        return data.train
    if isinstance(data, Mapping):
        return MemorySource(data)
    raise ValueError(f"{type(data).__name__} is no source")
