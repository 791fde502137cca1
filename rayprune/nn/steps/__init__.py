"""Train steps: one optimization step that returns per-sample signals."""

from rayprune.nn.steps.embed import EmbedStep
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.l2w import L2wStep
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.psp import PspStep

# The type of all train steps: each is the plain step with some of its methods replaced.
TrainStep = PlainStep

# The steps by the name that a method's step() or train.step gives.
STEPS: dict[str, type[PlainStep]] = {
    "plain": PlainStep,
    "psp": PspStep,
    "exits": ExitStep,
    "l2w": L2wStep,
    "embed": EmbedStep,
}
# For networks with several exits; they take the number of exits as num_exits.
MULTI_EXIT_STEPS = ("exits", "l2w")
# With parameters of their own, drawn from the seed that they take.
SEEDED_STEPS = ("l2w",)
# The network may be compiled: they call it as a whole and compute none of its derivatives by hand.
COMPILED_STEPS = ("plain", "exits")

__all__ = [
    "COMPILED_STEPS",
    "MULTI_EXIT_STEPS",
    "SEEDED_STEPS",
    "STEPS",
    "EmbedStep",
    "ExitStep",
    "L2wStep",
    "PlainStep",
    "PspStep",
    "TrainStep",
]
