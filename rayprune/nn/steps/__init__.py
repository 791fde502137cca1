"""Train steps: one optimisation step that returns per-sample signals."""

from rayprune.nn.steps.base import TrainStep
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.l2w import L2wStep
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.psp import PspStep, WithProxy

# What a method's step() or train.step names.
STEPS: dict[str, type[PlainStep]] = {"plain": PlainStep, "psp": PspStep, "exits": ExitStep, "l2w": L2wStep}
# Those for networks with several exits; they take their number as num_exits.
MULTI_EXIT_STEPS = ("exits", "l2w")
# Those with parameters of their own, drawn by the seed that they take.
SEEDED_STEPS = ("l2w",)
# Those that call the network as a whole and no derivative of it by hand: it may be compiled.
COMPILED_STEPS = ("plain", "exits")

__all__ = [
    "COMPILED_STEPS",
    "MULTI_EXIT_STEPS",
    "SEEDED_STEPS",
    "STEPS",
    "ExitStep",
    "L2wStep",
    "PlainStep",
    "PspStep",
    "TrainStep",
    "WithProxy",
]
