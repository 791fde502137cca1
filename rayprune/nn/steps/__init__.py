"""Train steps: one optimisation step that returns per-sample signals."""

from rayprune.nn.steps.base import TrainStep
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.psp import PspStep, WithProxy

# What a method's step() names.
STEPS: dict[str, type[PlainStep]] = {"plain": PlainStep, "psp": PspStep}

__all__ = ["STEPS", "PlainStep", "PspStep", "TrainStep", "WithProxy"]
