"""rayprune: train each epoch only on the samples worth training on, and measure what that saves.

Public names load when they are first used: `import rayprune` alone loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; `_HOME` is the same list for the running program
    import rayprune.accelerate
    import rayprune.huggingface
    import rayprune.lightning
    import rayprune.prompts
    import rayprune.sources
    import rayprune.testing
    import rayprune.torch
    from rayprune.core.bases.in_batch import BatchContext, InBatchMethod, StepContext
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
    from rayprune.methods.aum import AUM
    from rayprune.methods.ccs import CCS
    from rayprune.methods.clean_subset import CleanSubset
    from rayprune.methods.craig import CRAIG
    from rayprune.methods.d2 import D2
    from rayprune.methods.divbs import DivBS
    from rayprune.methods.dual import DUAL
    from rayprune.methods.dyn_unc import DynUnc
    from rayprune.methods.dynams import DynaMS
    from rayprune.methods.el2n import EL2N
    from rayprune.methods.entropy import Entropy
    from rayprune.methods.epsilon_greedy import EpsilonGreedy
    from rayprune.methods.eswp import ESWP
    from rayprune.methods.evolved_sampling import EvolvedSampling
    from rayprune.methods.fixed import Fixed
    from rayprune.methods.forgetting import Forgetting
    from rayprune.methods.full import Full
    from rayprune.methods.glister import GLISTER
    from rayprune.methods.gradmatch import GradMatch
    from rayprune.methods.grand import GraNd
    from rayprune.methods.herding import Herding
    from rayprune.methods.ies import IES
    from rayprune.methods.infobatch import InfoBatch
    from rayprune.methods.infomax import InfoMax
    from rayprune.methods.k_center import KCenter
    from rayprune.methods.kakurenbo import Kakurenbo
    from rayprune.methods.least_confidence import LeastConfidence
    from rayprune.methods.margin import Margin
    from rayprune.methods.moderate import Moderate
    from rayprune.methods.orderdp import OrderDP
    from rayprune.methods.ordered_sgd import OrderedSGD
    from rayprune.methods.pdd import PDD
    from rayprune.methods.random_epoch import RandomEpoch
    from rayprune.methods.random_subset import Random
    from rayprune.methods.rcap import RCAP
    from rayprune.methods.registry import build_method
    from rayprune.methods.repb import RePB
    from rayprune.methods.rho import RHOLoss
    from rayprune.methods.s2l import S2L
    from rayprune.methods.selective_backprop import SelectiveBackprop
    from rayprune.methods.semdedup import SemDeDup
    from rayprune.methods.seta import SeTa
    from rayprune.methods.shuffled import Shuffled
    from rayprune.methods.ssp import SSP
    from rayprune.methods.tdds import TDDS
    from rayprune.methods.ucb import UCB
    from rayprune.prompts.actor import PromptClient, connect_prompts, serve_prompts
    from rayprune.prompts.selector import PromptSelector

__version__ = "0.1.0"

_HOME = {
    "core.plan": ("Plan",),
    "core.schedule": ("Schedule",),
    "core.selection": ("Selection",),
    "core.bases.in_batch": ("BatchContext", "InBatchMethod", "StepContext"),
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
    "prompts.actor": ("PromptClient", "connect_prompts", "serve_prompts"),
    "prompts.selector": ("PromptSelector",),
}
_SUBMODULES = ("accelerate", "huggingface", "lightning", "prompts", "sources", "testing", "torch")
_MODULES = {name: f"rayprune.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "TDDS",
    "BatchContext",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DynaMS",
    "Epoch",
    "EpochContext",
    "Fixed",
    "Full",
    "InBatchMethod",
    "InfoBatch",
    "LeastConfidence",
    "Method",
    "Plan",
    "PromptClient",
    "PromptSelector",
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
    "StepContext",
    "TrainingFailed",
    "TrainingPaused",
    "TrainingStopped",
    "UsageError",
    "__version__",
    "build_method",
    "connect_prompts",
    "get_dataset_shard",
    "local_loader",
    "prune",
    "serve_prompts",
    "with_ids",
]


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"rayprune.{name}")
        if name not in _MODULES:
            import difflib

            # `from rayprune import methods` would come back here for as long as the package is not loaded.
            methods = importlib.import_module("rayprune.methods")
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
