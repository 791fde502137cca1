"""SeTa: slide a window over groups of similar losses, from easy to hard, again and again.

Zhou et al., "Scale Efficient Training for Large Datasets", CVPR 2025, arXiv 2503.13385. A random share 1 − r of all
samples stays; k-means on their losses makes G groups, in ascending order; the epoch keeps the w = round(G·s) groups
from e mod (G − w + 1) on in epoch e, and all groups in epoch 0. From epoch floor(δE) on it keeps a new random share
1 − r in each epoch (partial annealing; all samples for r = 0). Weights are 1: biased. Half numbers round to the even
one: (G, s) = (5, 0.9) gives w = 4. The authors' (r, G, s): (0.1, 5, 0.9) for CIFAR, (0, 5, 0.6) for ImageNet.

Deliberate deviations from the reference program: k-means of one-dimensional losses is solved exactly (there, from
random starts); epoch 0 uses all samples, so that all get a loss; samples without a loss are in every window; with fewer
distinct losses than G all groups are kept (there, equal losses are cut into G parts by their order).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayprune.core.algorithms.kmeans_1d import kmeans_1d
from rayprune.core.bases.dynamic import DynamicMethod
from rayprune.core.choosing import num_pruned
from rayprune.core.draws import draw_uniform
from rayprune.core.method import EpochContext
from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("seta")
@dataclass(frozen=True)
class SeTa(DynamicMethod):
    """Keep a random share of the samples whose losses are in the epoch's window of groups.

    Args:
        prune_ratio: r, the share of all samples to drop at random; a number in [0, 1) or a schedule.
        num_groups: G in 1..255, the number of groups of losses.
        window: s in (0, 1], the share of the groups that an epoch keeps; at least one group.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run drops the share r at random, and no groups.
    """

    keeps = "a window of losses, easy to hard"
    paper = "Zhou et al., CVPR 2025, arXiv 2503.13385"

    prune_ratio: float | Schedule = 0.1
    num_groups: int = 5
    window: float = 0.9
    anneal_start: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")
        if not 1 <= self.num_groups <= 255:
            raise ConfigError(f"num_groups {self.num_groups} is outside 1..255")
        if not 0.0 < self.window <= 1.0:
            raise ConfigError(f"window {self.window!r} is outside (0, 1]: 1 keeps all groups")

    def groups_at(self, epoch: int) -> range:
        """Return the groups of an epoch's window, epoch 0 excepted."""
        width = max(1, round(self.num_groups * self.window))
        start = epoch % (self.num_groups - width + 1)
        return range(start, start + width)

    def full(self, context: EpochContext) -> Selection:
        """Keep all samples in epoch 0, and a random share in the epochs of partial annealing."""
        num = context.num_samples
        ratio = Schedule.of(self.prune_ratio)(context.epoch, context.num_epochs)
        drops = min(num_pruned(ratio, num), num - 1)
        if context.epoch == 0 or not drops:
            return Selection.full(num)
        return Selection.of_mask(draw_uniform(np.ones(num, dtype=bool), num - drops, context.rng), ratio, drops)

    def prune(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Draw, then keep the groups of the window."""
        kept = self.full(context).codes != 0
        loss = table["loss"]
        ids = np.flatnonzero(kept & ~np.isnan(loss))
        groups = kmeans_1d(loss[ids], self.num_groups)
        window, sizes = self.groups_at(context.epoch), np.bincount(groups)
        if sizes.size == self.num_groups:
            kept[ids[(groups < window.start) | (groups >= window.stop)]] = False
        dropped = kept.size - int(np.count_nonzero(kept))
        selection = Selection.of_mask(kept, dropped / kept.size, dropped)
        return selection.with_facts(group_sizes=sizes.tolist(), window=[window.start, window.stop])
