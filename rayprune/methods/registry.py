"""The registry of methods by name, and building a method from a config's `method:` section."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rayprune.core.method import Method
from rayprune.core.references import closest, is_reference, load_object
from rayprune.core.validation import check_keys, short_repr
from rayprune.errors import ConfigError

METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])


def register(name: str) -> Callable[[_M], _M]:
    """Register a Method class under the name that configs use."""

    def add(cls: _M) -> _M:
        if name in METHODS and METHODS[name].__qualname__ != cls.__qualname__:
            raise ConfigError(
                f"method {name!r} is registered twice, by {METHODS[name].__qualname__} and {cls.__qualname__}: "
                "rename one"
            )
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


def method_class(name: str) -> type[Method]:
    """Return the class of a registered name or of a `module:Class` reference.

    Raises:
        ConfigError: an unknown name (with the closest match), or a reference to something other than a Method.
    """
    if not is_reference(name):
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}: {closest(name, METHODS)}")
        return METHODS[name]
    cls = load_object(name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ConfigError(f"method {name!r} is not a subclass of rayprune.methods.Method")
    if METHODS.get(cls.name) is not cls or not cls.__module__.startswith("rayprune.methods."):
        cls.name = name  # so that checkpoints and workers find the class again; our own keep their registered names
    return cls


def method_fields(cls: type[Method]) -> dict[str, Any]:
    """Return hyperparameter name → default (None where there is none)."""
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}


def build_method(spec: Method | str | Mapping[str, Any], key: str = "method") -> Method:
    """Build a method from its name, or from a mapping of `name` and hyperparameters; return a method as it is.

    Messages name the setting `key`.

    Raises:
        ConfigError: unknown name or key (with the closest match), or a value of another type or out of range.

    >>> build_method({"name": "infobatch", "prune_ratio": 0.3}).prune_ratio(0, 10)
    0.3
    """
    if isinstance(spec, Method):
        return spec
    options: Any = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, Mapping):
        raise ConfigError(f"{key} = {short_repr(spec)}: must be a name or a mapping, such as {{name: infobatch}}")
    options = dict(options)
    if "name" not in options:
        raise ConfigError(f"{key} has no name: {closest('', METHODS)}")
    name = options.pop("name")
    if not isinstance(name, str):
        raise ConfigError(f"{key}.name = {short_repr(name)}: must be text: {closest(str(name), METHODS)}")
    cls = method_class(name)
    check_keys(cls, options, key, f"method {name!r}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ConfigError(f"method {name!r}: {error}") from None
