"""Prompt selection for reinforcement learning with verifiable rewards; only `actor` and `sampler` know Ray."""

from rayprune.prompts.selector import PromptSelector
from rayprune.prompts.strategies import (
    GRESO,
    STRATEGIES,
    BetaStrategy,
    Learnability,
    MoPPS,
    Uniform,
    ZeroVariance,
    build_strategy,
)
from rayprune.prompts.strategy import PassStrategy, PromptTable, Strategy

__all__ = [
    "GRESO",
    "STRATEGIES",
    "BetaStrategy",
    "Learnability",
    "MoPPS",
    "PassStrategy",
    "PromptSelector",
    "PromptTable",
    "Strategy",
    "Uniform",
    "ZeroVariance",
    "build_strategy",
]
