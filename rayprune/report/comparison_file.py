"""compare.json as a report reads it: whole and of its kinds, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_CURE = "run the same rayprune compare again"
# Points of accuracy; far beyond what an interval of two seeds can be, and still to be drawn.
_Points = Annotated[float, Field(ge=-1e6, le=1e6)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Difference(_Part):
    mean: _Points
    low: _Points | None = None
    high: _Points | None = None


class _Share(_Part):
    mean: float | None = None


class _Run(_Part):
    folder: str
    accuracy: _Points


class _Arm(_Part):
    name: str
    baseline: str
    accuracy: _Points
    to_full: _Difference
    runs: list[_Run] = Field(min_length=1)
    epochs: list[int] = Field(min_length=1)
    # Figures beside the verdict: older versions did not write all of them.
    accuracy_sd: float | None = None
    worst_class: float | None = None
    samples_trained: float | None = None
    compute: float | None = None
    compute_saved: float | None = None
    flops: float | None = None
    seconds: float | None = None
    seconds_to_full: _Share = _Share()
    matched: str = ""


class _Judged(_Part):
    outcome: str
    sentence: str


class _Verdict(_Part):
    sentence: str


class _Comparison(_Part):
    arms: list[_Arm] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    margin: _Points
    confidence: float
    methods: dict[str, _Judged]
    verdict: _Verdict
    timing: str = "–"
    uneven_seconds: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    notes: list[str] = []


def read_comparison(file: Path) -> dict[str, Any]:
    """Read compare.json; what older versions did not write is None.

    Raises:
        ValueError: it is no JSON, or lacks what a comparison says; one line with the cure.
    """
    try:
        found = _Comparison.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise ValueError(f"{file} is not what rayprune compare writes ({place}: {first['msg']}): {_CURE}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is no JSON: {_CURE}") from None
    if found.arms[0].baseline != "full":
        raise ValueError(f"{file} does not begin with the arm of full training: {_CURE}")
    for arm in found.arms:
        if len(arm.runs) != len(found.seeds):
            raise ValueError(f"{file} has {len(arm.runs)} runs of {arm.name} for {len(found.seeds)} seeds: {_CURE}")
    return found.model_dump()
