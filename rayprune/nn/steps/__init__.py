"""Train steps: one optimisation step that returns per-sample signals."""

from rayprune.nn.steps.plain import PlainStep

__all__ = ["PlainStep"]
