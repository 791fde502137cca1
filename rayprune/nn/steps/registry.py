"""The train steps by name; a step of the user's own is named by a reference, as a method is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from rayprune.core.references import closest, is_reference, load_object
from rayprune.core.step_options import STEP_OPTIONS
from rayprune.errors import ConfigError

if TYPE_CHECKING:
    from rayprune.nn.steps.plain import PlainStep

_S = TypeVar("_S", bound="type[PlainStep]")

# The steps by the name that a method's step() or train.step gives.
STEPS: dict[str, type[PlainStep]] = {}


def register_step(name: str) -> Callable[[_S], _S]:
    """Register a PlainStep class under a name; with `options_class`, `train.step` may name it.

    The name is known in processes that import the class's module. Workers import only what a config refers to: in
    configs, name a step of your own by its reference, `module:Class` or `path/to/file.py:Class`.
    """

    def add(cls: _S) -> _S:
        if name in STEPS and STEPS[name].__qualname__ != cls.__qualname__:
            raise ConfigError(
                f"train step {name!r} is registered twice, by {STEPS[name].__qualname__} and "
                f"{cls.__qualname__}: rename one"
            )
        STEPS[name] = cls
        if cls.options_class is not None:
            STEP_OPTIONS.setdefault(name, cls.options_class)
        return cls

    return add


def step_class(name: str) -> type[PlainStep]:
    """Return the class of a registered name or of a reference.

    Raises:
        ConfigError: an unknown name, or a reference to something other than a PlainStep.
    """
    if not is_reference(name):
        if name not in STEPS:
            raise ConfigError(f"unknown train step {name!r}: {closest(name, STEPS)}")
        return STEPS[name]
    cls: Any = load_object(name)
    if not (isinstance(cls, type) and issubclass(cls, STEPS["plain"])):
        raise ConfigError(f"train step {name!r} is not a subclass of rayprune.nn.steps.PlainStep")
    return cls
