"""The train steps that `train.step` can name, with their options; torch is not needed to read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayprune.core.fields import check_keys, shown
from rayprune.core.objects import closest
from rayprune.core.plain import plain


@dataclass(frozen=True)
class PlainOptions:
    """The network's usual step: `exits` with its defaults for a network with several exits."""


@dataclass(frozen=True)
class ExitsOptions:
    """The plain step of a network with several exits.

    Args:
        score: whose signals selection methods see: an exit's (1..K, or last), their mean, or the depth at which a
            sample would leave.
        confident: the probability at which it would.
    """

    score: int | Literal["last", "mean", "depth"] = "last"
    confident: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.score, int) and self.score < 1:
            raise ValueError(f"train.step.score = {self.score}: must be an exit from 1 on, last, mean or depth")
        if not 0.0 < self.confident <= 1.0:
            raise ValueError(f"train.step.confident = {self.confident}: must be in (0, 1]")


STEP_OPTIONS: dict[str, type] = {"plain": PlainOptions, "exits": ExitsOptions}


def step_config(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's name and all its options, from its name, or from its name and some of them.

    Raises:
        ValueError: an unknown name or option, or a value outside its range.

    >>> step_config("exits")
    {'name': 'exits', 'score': 'last', 'confident': 0.9}
    >>> step_config({"name": "exits", "scor": 1})
    Traceback (most recent call last):
    ValueError: unknown key 'train.step.scor' of train step 'exits': did you mean 'score'? (valid: confident, score)
    """
    keys = {"name": value} if isinstance(value, str) else dict(value)
    name = keys.pop("name", None)
    if name is None:
        raise ValueError("train.step has no name: write train.step: {name: exits}, or train.step: exits")
    if name not in STEP_OPTIONS:
        raise ValueError(f"unknown train.step {shown(name)}: {closest(str(name), STEP_OPTIONS)}")
    options = STEP_OPTIONS[name]
    check_keys(options, keys, "train.step", f"train step {name!r}")
    return {"name": name, **dataclasses.asdict(options(**{key: plain(each) for key, each in keys.items()}))}
