"""Check keys and values against a dataclass's annotations; every mistake is one line.

Supported annotations are int, float, bool, str, None, Literal, tuple, Sequence, dict and unions of them; any other
annotation accepts any value. A bool is not a number, an int is a float, a float is finite, and a list is a tuple. An
int is at most MAX_INT unless its annotation has another bound.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from rayprune.core.references import closest
from rayprune.errors import ConfigError

_SINGULAR = {int: "a whole number", float: "a number", str: "text", NoneType: "null", None: "null"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}
_MAX_REPR = 100
# Almost every whole number in a config counts things that are made. One above this is a slip that would fill the memory
# or never end; keys that need more, or have to stay lower, say so by AtMost.
MAX_INT = 1_000_000


@dataclasses.dataclass(frozen=True)
class AtMost:
    """The largest number of an annotation: `Annotated[int, AtMost(100)]`; pydantic's `Field(le=100)` does the same."""

    le: int


UNBOUNDED = AtMost(2**63 - 1)  # for numbers that are only compared with others


def check_keys(cls: type, keys: Mapping[Any, Any], owner: str, what: str) -> None:
    """Check the keys from which a dataclass is to be built.

    Args:
        cls: the dataclass.
        keys: field name → value.
        owner: the section that messages put before the key, such as "method".
        what: the object that the keys configure, such as "method 'infobatch'".

    Raises:
        ConfigError: an unknown key (with the closest match), a missing key, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in keys:
        if key not in fields:
            raise ConfigError(f"unknown key {f'{owner}.{key}'!r} of {what}: {closest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in keys:
            raise ConfigError(f"{owner}.{name} is missing: {what} needs it")
    _check_values(cls, keys, owner)


def check_fields(instance: Any) -> None:
    """Make a dataclass's fields `plain` and check them against their annotations; for `__post_init__`.

    Raises:
        ConfigError: a value of another type.
    """
    values = {field.name: plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}
    for name, value in values.items():
        object.__setattr__(instance, name, value)
    _check_values(type(instance), values, type(instance).__name__)


def plain(value: Any) -> Any:
    """Return NumPy scalars as Python numbers, and lists and arrays as tuples; anything else unchanged.

    Plain hyperparameters compare, hash and serialize to JSON and YAML.

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


def fields_to_yaml(instance: Any) -> dict[str, Any]:
    """Return a dataclass's fields in plain YAML types: tuples as lists, schedules and methods as their configs."""
    return {field.name: _to_yaml(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _to_yaml(value: Any) -> Any:
    if hasattr(value, "to_config"):
        return value.to_config()
    return [_to_yaml(item) for item in value] if isinstance(value, tuple) else value


def short_repr(value: Any) -> str:
    """Return a value for a message: on one line, long values shortened.

    >>> short_repr([1, 2]), short_repr("a" * 200)[-7:]
    ('[1, 2]', 'aaaa...')
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_REPR else f"{text[:_MAX_REPR]}..."


def mismatch(value: Any, hint: Any) -> str:
    """Return the requirement that a value of another type than annotated fails; "" if it matches.

    >>> mismatch(3, float), mismatch(True, float | None), mismatch([1, "a"], tuple[int, ...])
    ('', 'must be a number or null', 'must be a list of whole numbers')
    >>> mismatch([[90]], tuple[tuple[int, int], ...])
    'must be a list of lists of 2 whole numbers'
    >>> mismatch(1.5, Literal["auto"] | bool), mismatch(math.inf, float)
    ('must be auto, true or false', 'must be a finite number')
    >>> mismatch(10**9, int), mismatch((1, 200), tuple[Annotated[int, AtMost(100)], ...])
    ('must be at most 1,000,000', 'must be at most 100')
    """
    value = plain(value)
    if _matches(value, hint):
        bound = exceeded(value, hint)
        return "" if bound is None else f"must be at most {bound:,}"
    if get_origin(_bare(hint)) is Literal and isinstance(value, str):
        return closest(value, _choices(hint))
    words = in_words(hint)
    return f"must be {words if _all_finite(value) else re.sub('(?<!whole )number', 'finite number', words)}"


def exceeded(value: Any, hint: Any, bound: int = MAX_INT) -> int | None:
    """Return the bound that a whole number in a value exceeds; None if there is none.

    >>> exceeded([5, 2_000_000], Sequence[int]), exceeded(2_000_000, Annotated[int | None, UNBOUNDED])
    (1000000, None)
    """
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        # pydantic checks `lt`, the bound of seeds, itself.
        bounds = [getattr(each, "le", getattr(each, "lt", None)) for each in metadata]
        bound = next((each for each in bounds if each is not None), bound)
    origin, args, value = get_origin(hint), get_args(hint), plain(value)
    if origin in {Union, UnionType}:
        fitting = [member for member in args if _matches(value, member)]
        return exceeded(value, fitting[0], bound) if fitting else None
    if isinstance(value, tuple) and origin in {tuple, Sequence}:
        members = args if len(args) == len(value) and args[-1] is not Ellipsis else args[:1] * len(value)
        found = (exceeded(item, member, bound) for item, member in zip(value, members, strict=True))
        return next((each for each in found if each is not None), None)
    return bound if hint is int and isinstance(value, int) and value > bound else None


def in_words(hint: Any) -> str:
    """Return the values that an annotation accepts, in words.

    >>> in_words(Literal["auto"] | float | None), in_words(tuple[int, ...])
    ('auto, a number or null', 'a list of whole numbers')
    """
    *others, last = _choices(hint)
    return f"{', '.join(others)} or {last}" if others else last


def check_ratio(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is a prune ratio, a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} {value!r} is outside [0, 1): 0 keeps everything, 0.5 drops half")


def check_share(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} {value!r} is outside [0, 1]")


def _check_values(cls: type, values: Mapping[str, Any], owner: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, value in values.items():
        default = defaults[key]
        if type(value) is type(default) and value == default:
            continue  # a default of another type than annotated, such as None, is the author's choice
        if problem := mismatch(value, type_hints(cls).get(key, Any)):
            raise ConfigError(f"{owner}.{key} = {short_repr(value)}: {problem}")


@cache
def type_hints(thing: Any) -> dict[str, Any]:
    """Return the annotations of a class or function; {} if they cannot be resolved here."""
    try:
        return get_type_hints(thing, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}  # a user's annotation that only a type checker can resolve


def _matches(value: Any, hint: Any) -> bool:
    hint = _bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        return any(_matches(value, member) for member in args)
    if origin is Literal:
        return any(type(value) is type(member) and value == member for member in args)
    if origin is tuple:
        members = [args[0]] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(members) and all(map(_matches, value, members))
    if hint in (int, float):
        number = isinstance(value, int) or (isinstance(value, float) and hint is float)
        return number and not isinstance(value, bool) and _all_finite(value)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping) and all(_matches(key, args[0] if args else Any) for key in value)
    return value is None if hint in (None, NoneType) else True


def _all_finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _bare(hint: Any) -> Any:
    """Return an annotation without its metadata, and a sequence as a tuple of any length."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return tuple[get_args(hint)[0], ...] if get_origin(hint) is Sequence else hint  # type: ignore[misc]


def _choices(hint: Any) -> list[str]:
    """Return the values that an annotation accepts, in words."""
    hint = _bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        return [choice for member in args for choice in _choices(member)]
    if origin is Literal:
        return [str(member) for member in args]
    if origin is tuple:
        return [f"a list of {_members(args)}"]
    return ["true", "false"] if hint is bool else [_SINGULAR.get(hint, "a mapping of keys")]


def _members(args: tuple[Any, ...]) -> str:
    count, member = "" if args[-1] is Ellipsis else f"{len(args)} ", _bare(args[0])
    plural = f"lists of {_members(get_args(member))}" if get_origin(member) is tuple else _PLURAL.get(member, "values")
    return f"{count}{plural}"
