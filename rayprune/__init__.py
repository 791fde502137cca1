"""rayprune: train each epoch only on the samples worth training on, and measure what that saves.

Public names load when they are first used: `import rayprune` alone loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; `_HOME` is the same list for the running program
    import rayprune.sources
    import rayprune.testing
    import rayprune.torch  # noqa: F401
    from rayprune.core.method import EpochContext, Method
    from rayprune.core.plan import Plan
    from rayprune.core.schedule import Schedule
    from rayprune.core.selection import Selection
    from rayprune.core.selector import Selector
    from rayprune.core.table import ScoreTable
    from rayprune.engine.data.ids import with_ids
    from rayprune.engine.user_loop.api import PrunedData, get_dataset_shard, local_loader, prune
    from rayprune.engine.user_loop.shard import Epoch, Shard
    from rayprune.errors import (
        ClusterError,
        ConfigError,
        DataError,
        RaypruneError,
        RunFolderError,
        TrainingFailed,
        TrainingPaused,
        TrainingStopped,
        UsageError,
    )
    from rayprune.methods.d2 import D2  # noqa: F401
    from rayprune.methods.dynams import DynaMS
    from rayprune.methods.entropy import Entropy  # noqa: F401
    from rayprune.methods.fixed import Fixed
    from rayprune.methods.full import Full
    from rayprune.methods.grand import GraNd  # noqa: F401
    from rayprune.methods.herding import Herding  # noqa: F401
    from rayprune.methods.infobatch import InfoBatch
    from rayprune.methods.infomax import InfoMax  # noqa: F401
    from rayprune.methods.k_center import KCenter  # noqa: F401
    from rayprune.methods.least_confidence import LeastConfidence
    from rayprune.methods.margin import Margin  # noqa: F401
    from rayprune.methods.moderate import Moderate  # noqa: F401
    from rayprune.methods.random_epoch import RandomEpoch
    from rayprune.methods.random_subset import Random
    from rayprune.methods.registry import build_method
    from rayprune.methods.semdedup import SemDeDup  # noqa: F401
    from rayprune.methods.shuffled import Shuffled
    from rayprune.methods.ssp import SSP  # noqa: F401
    from rayprune.methods.tdds import TDDS

__version__ = "0.1.0"

_HOME = {
    "core.plan": ("Plan",),
    "core.schedule": ("Schedule",),
    "core.selection": ("Selection",),
    "core.method": ("EpochContext", "Method"),
    "core.selector": ("Selector",),
    "core.table": ("ScoreTable",),
    "engine.data.ids": ("with_ids",),
    "engine.user_loop.api": ("PrunedData", "get_dataset_shard", "local_loader", "prune"),
    "engine.user_loop.shard": ("Epoch", "Shard"),
    "errors": (
        "ClusterError",
        "ConfigError",
        "DataError",
        "RaypruneError",
        "RunFolderError",
        "TrainingFailed",
        "TrainingPaused",
        "TrainingStopped",
        "UsageError",
    ),
    "methods": ("DynaMS", "Fixed", "Full", "InfoBatch", "LeastConfidence", "Random", "RandomEpoch", "Shuffled", "TDDS"),
    "methods.registry": ("build_method",),
}
_SUBMODULES = ("sources", "testing", "torch")
_MODULES = {name: f"rayprune.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "TDDS",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DynaMS",
    "Epoch",
    "EpochContext",
    "Fixed",
    "Full",
    "InfoBatch",
    "LeastConfidence",
    "Method",
    "Plan",
    "PrunedData",
    "Random",
    "RandomEpoch",
    "RaypruneError",
    "RunFolderError",
    "Schedule",
    "ScoreTable",
    "Selection",
    "Selector",
    "Shard",
    "Shuffled",
    "TrainingFailed",
    "TrainingPaused",
    "TrainingStopped",
    "UsageError",
    "__version__",
    "build_method",
    "get_dataset_shard",
    "local_loader",
    "prune",
    "with_ids",
]


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"rayprune.{name}")
        if name not in _MODULES:
            import difflib

            methods = importlib.import_module("rayprune.methods")  # `from rayprune import` would come back here
            if name in vars(methods) and name in {cls.__name__ for cls in methods.METHODS.values()}:
                return getattr(methods, name)
            names = (*_MODULES, *_SUBMODULES, *(cls.__name__ for cls in methods.METHODS.values()))
            by_lower = {public.lower(): public for public in names}
            match = difflib.get_close_matches(name.lower(), by_lower, n=1)
            hint = f": did you mean rayprune.{by_lower[match[0]]}?" if match else ""
            raise AttributeError(f"module 'rayprune' has no attribute {name!r}{hint}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    from rayprune.methods import METHODS

    return sorted({*__all__, *(cls.__name__ for cls in METHODS.values())})
