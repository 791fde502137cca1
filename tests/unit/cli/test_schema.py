"""`rayprune schema`, and the keys that it describes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from click.testing import CliRunner
from pydantic import BaseModel, Field

from rayprune.cli.schema import REQUIRED, docstring_parts, keys_of, meanings, schema


class Section(BaseModel):
    """A section."""

    rate: float = Field(0.1, gt=0, le=1, description="of learning")


@dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
        path: where it is,
            in any folder.
        mode: of the base.
    """

    path: str
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Derived(Base):
    """A subclass.

    More about it.

    Args:
        mode: of the subclass.
        low, high: bounds: both included.

    Raises:
        ValueError: low is above high.
    """

    low: int = 0
    high: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def build(*, num: int, width: int = 3) -> None:
    """Build it.

    Args:
        num: how many.
        width: how wide.
    """


def test_the_command_prints_json() -> None:
    printed = CliRunner().invoke(schema, catch_exceptions=False).output
    assert {"data", "method", "sweep", "compare"} <= json.loads(printed)["properties"].keys()


def test_meanings_are_inherited_and_overridden() -> None:
    assert meanings(Derived) == {
        "path": "where it is, in any folder.",
        "mode": "of the subclass.",
        "low": "bounds: both included.",
        "high": "bounds: both included.",
    }


def test_a_docstring_is_divided_into_its_parts() -> None:
    assert [heading for heading, _ in docstring_parts(Derived)] == ["", "", "Args", "Raises"]


def test_keys_of_a_dataclass() -> None:
    keys = {key.name: key for key in keys_of(Derived, without={"low"})}
    assert list(keys) == ["path", "mode", "high", "options"]
    assert keys["path"].default is REQUIRED
    assert (keys["mode"].hint, keys["mode"].default) == (Literal["a", "b"], "a")
    assert (keys["options"].default, keys["options"].meaning) == ({}, "")


def test_keys_of_a_section_have_limits() -> None:
    (key,) = keys_of(Section)
    assert (key.name, key.hint, key.default, key.meaning) == ("rate", float, 0.1, "of learning")
    assert key.limits == {"gt": 0, "le": 1}


def test_keys_of_a_function() -> None:
    assert [(key.name, key.hint, key.meaning) for key in keys_of(build, {"num"})] == [("width", int, "how wide")]
