"""Train steps: one optimisation step that returns per-sample signals."""

from rayprune.nn.steps.base import TrainStep
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.psp import PspStep, WithProxy

# What a method's step() or train.step names.
STEPS: dict[str, type[PlainStep]] = {"plain": PlainStep, "psp": PspStep, "exits": ExitStep}
# Those for networks with several exits; they take their number as num_exits.
MULTI_EXIT_STEPS = ("exits",)

__all__ = ["MULTI_EXIT_STEPS", "STEPS", "ExitStep", "PlainStep", "PspStep", "TrainStep", "WithProxy"]
