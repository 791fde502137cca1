"""DynaMS: keep the samples near the decision boundary, chosen again every few epochs.

Wang et al., "DynaMS: Dynamic Margin Selection for Efficient Deep Learning", ICLR 2023. The paper's text and code are
not publicly available in a form we could read.

From the paper: keep the samples nearest the current classification boundary; choose again every Q epochs; keep less and
less by a schedule (power law) with budget 0.6; a parameter-sharing proxy (PSP), a leading slice of every layer that is
trained jointly and computes the margins for the choice.

Decisions of this project, each an option: the margin is the exact distance to the nearest boundary of the last linear
layer (MASE, Emam et al. 2021, arXiv 2111.12880), from the predicted class, unsigned; every label keeps the same number
(other labels make up for a label with too few samples), or BASE of the same paper; block 1 of Q = 10 epochs uses all
samples; the budget is a share of all N·E visits, warm-up included; weights are 1; scores come from a forward-only sweep
over all samples in eval mode, without augmentation, through the full network; ties go to the lower id. The proxy is
trained as slimmable networks are: both losses in one step, separate batch statistics, weight 1.

Shapes: N samples, C classes, K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from rayprune.core.choosing import Balance, choose, choose_by_boundary, num_pruned
from rayprune.core.method import EpochContext, Method
from rayprune.core.schedule import Family, Schedule, block_starts, kept_by_block
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.core.vectors import MISSING_CURE
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_SIGNALS = {"predicted": "boundary", "label": "boundary_label", "label_unsigned": "boundary_label_unsigned"}


@register("dynams")
@dataclass(frozen=True)
class DynaMS(Method):
    """Keep the samples nearest the decision boundary; score and choose again every block of epochs.

    Scoring costs a forward pass over all samples per block: in units of full training, a run costs kept + 1/(3Q) with
    the full network, and kept·(1 + φ) + φ/(3Q) with a proxy of φ times its MACs. The proxy pays off only for blocks
    shorter than Q = (1 − φ)/(3·φ·kept): for budget 0.6 and ResNet-18 below 8.3 epochs at width 0.25 (φ 0.063), below
    1.7 at width 0.5 (φ 0.25). metrics.jsonl counts both: `samples_forwarded`, and `compute`, everything in units of
    samples trained.

    Args:
        budget: share of all N·E visits that the run keeps, warm-up and block 1 included, in (0, 1].
        schedule: how the kept ratio falls from block to block; its one free parameter is solved for the budget.
        power: exponent of the polynomial schedule, above 0.
        milestones: shares of the run after which the step schedule falls.
        prune_ratio: a ratio or schedule to use in each block instead of the budget.
        block_epochs: Q, epochs between choices; null is 10, or a fifth of a run of less than 50 epochs.
        warmup_epochs: epochs on all samples before block 1.
        anchor: the class whose boundary counts: the predicted one, or the label, with a sign (negative =
            misclassified) or without.
        balance: `even` keeps the same number of every label, `none` the nearest of all, `base` fills each class's quota
            by the distance to that class's boundary.
        proxy_width: share of each layer's channels in the proxy, in (0, 1]; null scores with the full network.
        proxy_weight: weight of the proxy's loss; the full network's has weight 1.
    """

    kind = "dynamic"
    keeps = "those nearest the decision boundary"
    paper = "Wang et al., ICLR 2023 (DynaMS)"
    signals = ("loss",)

    budget: float = 0.6
    schedule: Family = "power"
    power: float = 2.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    prune_ratio: float | Schedule | None = None
    block_epochs: int | None = None
    warmup_epochs: int = 0
    anchor: Literal["predicted", "label", "label_unsigned"] = "predicted"
    balance: Literal["even", "none", "base"] = "even"
    proxy_width: float | None = None
    proxy_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_ratio is not None:
            self._set_schedule("prune_ratio")
        if not 0.0 < self.budget <= 1.0:
            raise ConfigError(f"budget {self.budget!r} is outside (0, 1]: 0.6 keeps 60 % of all visits")
        for name, value, least in (("block_epochs", self.block_epochs, 1), ("warmup_epochs", self.warmup_epochs, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{name} {value} must be at least {least}")
        if not self.power > 0 or not self.proxy_weight > 0:
            raise ConfigError(f"power {self.power!r} and proxy_weight {self.proxy_weight!r} must be above 0")
        if not all(a < b for a, b in pairwise((0.0, *self.milestones, 1.0))):
            raise ConfigError(f"milestones {self.milestones} must ascend between 0 and 1: shares of the run")
        if self.proxy_width is not None and not 0.0 < self.proxy_width <= 1.0:
            raise ConfigError(f"proxy_width {self.proxy_width!r} is outside (0, 1]; null scores with the full network")
        if self.balance == "base" and self.anchor != "predicted":
            raise ConfigError(f"balance base measures from the predicted class: leave anchor {self.anchor!r} out")
        signal = "boundary_classes" if self.balance == "base" else _SIGNALS[self.anchor]
        object.__setattr__(self, "sweep_signals", (signal,))
        object.__setattr__(self, "sweep_part", "model" if self.proxy_width is None else "proxy")
        object.__setattr__(self, "needs_labels", self.balance == "even")

    @property
    def cost(self) -> str:
        """The scoring of each block."""
        epochs = self.block_epochs or "10"
        return f"a forward pass every {epochs} epochs" + (", the proxy's training" if self.proxy_width else "")

    def step(self) -> tuple[str, dict[str, Any]]:
        """Return the step that also trains the proxy if there is one."""
        proxy = {"width": self.proxy_width, "weight": self.proxy_weight}
        return ("plain", {}) if self.proxy_width is None else ("psp", proxy)

    def columns(self) -> Mapping[str, Any]:
        """Return the loss and the distance, one float32 each; with `base` a distance per class."""
        distance = (np.float32, (None,)) if self.balance == "base" else np.float32
        return {"loss": np.float32, self.sweep_signals[0]: distance}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep the nearest samples; request a sweep over all samples in the epoch before each choice.

        Raises:
            ConfigError: the budget cannot be reached in so many epochs, or distances are missing.
        """
        starts = block_starts(context.num_epochs, self._block_epochs(context.num_epochs), self.warmup_epochs)
        kept = self._kept(starts, context.num_epochs)
        block = sum(start <= context.epoch for start in starts) - 1
        ratio = kept[block] if block > 0 else 1.0
        selection = self._nearest(table, ratio, context) if ratio < 1.0 else Selection.full(context.num_samples)
        following = context.epoch + 1
        sweeps = following in starts[1:] and kept[starts.index(following)] < 1.0
        return replace(selection, sweep="all" if sweeps else None).with_facts(
            block=block + 1, asked_keep=round(ratio, 6)
        )

    def chosen_at(self, context: EpochContext) -> int:
        """Return the first epoch of the block, or 0 in the warm-up."""
        starts = block_starts(context.num_epochs, self._block_epochs(context.num_epochs), self.warmup_epochs)
        return max((start for start in starts if start <= context.epoch), default=0)

    def _block_epochs(self, num_epochs: int) -> int:
        return self.block_epochs or min(10, max(1, num_epochs // 5))

    def _kept(self, starts: list[int], num_epochs: int) -> list[float]:
        """Return the keep ratio of each block."""
        if self.prune_ratio is not None:
            schedule = Schedule.of(self.prune_ratio)
            if len(starts) < 2 and any(schedule(epoch, num_epochs) for epoch in range(num_epochs)):
                full = f"all {num_epochs} epochs are warm-up and block 1, which use all samples"
                raise ConfigError(f"prune_ratio can't be reached: {full}; lower warmup_epochs or block_epochs")
            return [1.0, *(1.0 - schedule(start, num_epochs) for start in starts[1:])]
        blocks = (num_epochs, self._block_epochs(num_epochs), self.warmup_epochs)
        return kept_by_block(self.schedule, self.budget, *blocks, power=self.power, milestones=self.milestones)

    def _nearest(self, table: ScoreTable, ratio: float, context: EpochContext) -> Selection:
        distances = table[self.sweep_signals[0]]
        unknown = np.isnan(distances if distances.ndim == 1 else distances.sum(axis=1))
        if unknown.any() or distances.shape[1:] == (0,):
            some = f"{np.count_nonzero(unknown) or len(table)} samples (ids {np.flatnonzero(unknown)[:5].tolist()})"
            raise ConfigError(f"epoch {context.epoch}: {some} have no distance to the boundary: {MISSING_CURE}")
        num = context.num_samples
        # A budget rounds to the nearest count; a prune ratio rounds the pruned samples down, as in other methods.
        count = max(1, round(ratio * num) if self.prune_ratio is None else num - num_pruned(1.0 - ratio, num))
        if distances.ndim == 2:
            selection = choose_by_boundary(distances, count)
        else:
            balance: Balance = "even" if self.balance == "even" else "none"
            selection = choose(distances, count, "bottom", labels=context.labels, balance=balance)
        nearest = distances[selection.ids] if distances.ndim == 1 else distances[selection.ids].min(axis=1)
        requested = 1.0 - ratio if selection.realised else 0.0
        return replace(selection, requested=requested).with_facts(threshold=round(float(nearest.max()), 6))
