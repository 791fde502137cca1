"""The control arm: any method with its scores permuted across samples.

It prunes as much as the inner method, by the same rule and with the same weights, but the scores belong to other
samples. The inner method's gain over this arm is the value of its scores. For a method that picks inside batches, the
signals of every batch are permuted across its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.registry import build_method, register

_PERMUTATION = 2  # keeps the permutation's generator apart from the inner method's
_INNER_ATTRIBUTES = ("signals", "unbiased", "fixed", "needs_labels", "sweep_signals", "sweep_part")
_INNER_METHODS = ("columns", "check", "fold", "fold_sweep", "condense", "scores")


@register("shuffled")
@dataclass(frozen=True)
class Shuffled(Method):
    """Select by another method's rule on scores that are permuted anew whenever it chooses anew.

    Args:
        of: the inner method, a Method or its config such as `{name: infobatch, prune_ratio: 0.5}`.
    """

    kind = "control"
    keeps = "another method's, scores permuted"
    paper = "control: permuted scores"

    of: Any = "infobatch"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = build_method(self.of, "method.of")
        if inner.name == "fixed":
            raise ConfigError("method.of = fixed has no scores to permute: use {name: random, prune_ratio: …} instead")
        object.__setattr__(self, "of", inner)
        # All but the selection is the inner method's, unless a subclass overrides it.
        for name in (*_INNER_ATTRIBUTES, *_INNER_METHODS):
            if getattr(type(self), name) is getattr(Shuffled, name):
                object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "class_floor", max(self.class_floor, inner.class_floor))
        if inner.kind == "in_batch" and self.class_floor > 0:
            raise ConfigError(f"class_floor = {self.class_floor}: {inner.name} chooses inside batches: leave it out")

    @property
    def cost(self) -> str:
        """That of the inner method."""
        return str(self.of.cost)

    @property
    def collect_epochs(self) -> int:
        return int(self.of.collect_epochs)

    def step(self) -> tuple[str, dict[str, Any]]:
        """Return the inner method's step; one that picks inside batches gets permuted signals."""
        name, options = self.of.step()
        return name, {**options, "permuted": True} if name == "in_batch" else options

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Select on a permuted copy of the table; a choice that holds for several epochs keeps its permutation."""
        rng = context.derived_rng(_PERMUTATION, epoch=self.of.chosen_at(context))
        selection: Selection = self.of.select(table.permuted(rng.permutation(len(table))), context)
        return selection
