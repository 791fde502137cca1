"""The selection methods and their registry; every module of this package registers itself."""

from __future__ import annotations

import importlib
import pkgutil

from rayprune.core.method import Method
from rayprune.methods.registry import METHODS, build_method, method_fields, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Export classes under their own names (`rayprune.methods.InfoBatch`), so that a new method needs no line here.
globals().update({_cls.__name__: _cls for _cls in METHODS.values()})

__all__ = ["METHODS", "Method", "build_method", "method_fields", "register"]
