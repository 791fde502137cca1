"""Validation of keys and values against annotations, and its messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from rayprune.core.validation import check_fields, check_keys, mismatch, short_repr


@dataclass(frozen=True)
class Keys:
    """One field of every kind."""

    path: str
    ratio: float = 0.5
    count: int | None = None
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    flag: bool = False
    mode: Literal["fast", "exact"] = "fast"
    own: Callable[[], int] | Any = 3
    odd: int = None  # type: ignore[assignment]  # a default of another type than annotated


@pytest.mark.parametrize(
    "keys",
    [
        {"ratio": 1, "count": 3, "names": ["a"], "pair": [0, 1]},
        {"ratio": np.float32(0.5), "count": np.int64(3), "names": np.array(["a"]), "pair": np.array([0.0, 1.0])},
        {"flag": np.bool_(True), "count": None, "odd": None, "own": object(), "mode": "exact"},
    ],
)
def test_matching_values_are_accepted(keys: dict[str, Any]) -> None:
    check_keys(Keys, {"path": "x", **keys}, "data", "source 'keys'")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"path": 3}, "data.path = 3: must be text"),
        ({"path": None}, "data.path = None: must be text"),
        ({"ratio": True}, "data.ratio = True: must be a number"),
        ({"ratio": "a\nb"}, r"data.ratio = 'a\nb': must be a number"),
        ({"ratio": float("inf")}, "data.ratio = inf: must be a finite number"),
        ({"ratio": np.zeros((9, 9))}, "data.ratio = array("),
        ({"count": 2.5}, "data.count = 2.5: must be a whole number or null"),
        ({"count": False}, "data.count = False: must be a whole number or null"),
        ({"names": "abc"}, "data.names = 'abc': must be a list of texts"),
        ({"names": ["a", 3]}, "data.names = ['a', 3]: must be a list of texts"),
        ({"pair": [1]}, "data.pair = [1]: must be a list of 2 numbers"),
        ({"pair": [1, float("nan")]}, "data.pair = [1, nan]: must be a list of 2 finite numbers"),
        ({"flag": 1}, "data.flag = 1: must be true or false"),
        ({"mode": "fats"}, "data.mode = 'fats': did you mean 'fast'?"),
        ({"mode": 3}, "data.mode = 3: must be fast or exact"),
        ({"odd": "x"}, "data.odd = 'x': must be a whole number"),
        ({"raito": 3}, "unknown key 'data.raito' of source 'keys': did you mean 'ratio'?"),
        ({1: 3}, "unknown key 'data.1' of source 'keys': "),
    ],
)
def test_a_mistake_is_one_line(keys: dict[Any, Any], line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        check_keys(Keys, {"path": "x", **keys}, "data", "source 'keys'")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"^data\.path is missing: source 'keys' needs it$"):
        check_keys(Keys, {"ratio": 1}, "data", "source 'keys'")


def test_the_fields_of_an_instance_are_checked() -> None:
    check_fields(Keys("x"))
    with pytest.raises(ValueError, match=r"^Keys\.names = 3: must be a list of texts$"):
        check_fields(Keys("x", names=3))  # type: ignore[arg-type]


def test_an_unresolvable_annotation_accepts_any_value() -> None:
    class Hidden:
        """Not a global of the module, so annotations cannot be resolved."""

    @dataclass(frozen=True)
    class Local:
        value: Hidden | int = 3

    check_keys(Local, {"value": "anything"}, "data", "a class")


def test_long_values_are_shortened() -> None:
    assert len(short_repr("x" * 1000)) < 110
    assert mismatch({"a": 1}, dict[str, Any] | None) == ""
