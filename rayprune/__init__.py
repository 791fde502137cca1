"""rayprune: train each epoch only on the samples worth training on, and prove what that saved.

Public names load when they are first used: `import rayprune` alone loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Plan": "rayprune.core.plan",
    "Schedule": "rayprune.core.schedule",
    "ScoreTable": "rayprune.core.table",
    "Selection": "rayprune.core.selection",
    "Selector": "rayprune.core.selector",
    "EpochContext": "rayprune.core.selector",
    "Method": "rayprune.methods.base",
    "build_method": "rayprune.methods.registry",
    "get_dataset_shard": "rayprune.engine.user_loop.api",
    "local_loader": "rayprune.engine.user_loop.api",
    "prune": "rayprune.engine.user_loop.api",
}


def _method_classes() -> dict[str, Any]:
    methods = importlib.import_module("rayprune.methods")
    return {cls.__name__: cls for cls in methods.METHODS.values()}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*_WHERE, *_method_classes(), "__version__"])
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if not name.startswith("_") and name[0].isupper():
        classes = _method_classes()
        if name in classes:
            return classes[name]
    raise AttributeError(f"module 'rayprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_WHERE, *_method_classes(), "__version__"])
