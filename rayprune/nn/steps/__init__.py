"""Train steps: one optimization step that returns per-sample signals."""

from rayprune.core.step_options import StepOptions
from rayprune.nn.steps.embed import EmbedStep
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.in_batch import InBatchStep
from rayprune.nn.steps.l2w import L2wStep
from rayprune.nn.steps.plain import BatchPlace, PlainStep, RowCounts
from rayprune.nn.steps.psp import PspStep
from rayprune.nn.steps.registry import STEPS, register_step, step_class

# The type of all train steps: each is the plain step with some of its methods replaced.
TrainStep = PlainStep

__all__ = [
    "STEPS",
    "BatchPlace",
    "EmbedStep",
    "ExitStep",
    "InBatchStep",
    "L2wStep",
    "PlainStep",
    "PspStep",
    "RowCounts",
    "StepOptions",
    "TrainStep",
    "register_step",
    "step_class",
]
