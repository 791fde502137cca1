"""When what happens: drawn from the seed, all of it before anything runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .kinds import KINDS, Kind

# Steps between two disturbances of one run: each is to meet training, not the recovery from the one before.
_APART = 4


@dataclass(frozen=True)
class Planned:
    """One disturbance: its kind, and the step before whose end it comes."""

    kind: Kind
    epoch: int
    step: int


def interior(steps_per_epoch: Sequence[int]) -> list[tuple[int, int]]:
    """Return the positions strictly inside epochs: neither the first nor the last two steps of one."""
    return [(epoch, step) for epoch, steps in enumerate(steps_per_epoch) for step in range(1, steps - 2)]


def draw_kinds(kills: int, names: Sequence[str], rng: random.Random) -> list[Kind]:
    """Return `kills` kinds, each as often as the others, in a random order."""
    kinds = [KINDS[names[index % len(names)]] for index in range(kills)]
    rng.shuffle(kinds)
    return kinds


def draw_run(kinds: Sequence[Kind], steps_per_epoch: Sequence[int], rng: random.Random) -> list[Planned]:
    """Place the kinds at random positions of one run, some steps apart.

    Raises:
        ValueError: the run is too short for so many.
    """
    positions = interior(steps_per_epoch)
    starts = [sum(steps_per_epoch[:epoch]) for epoch in range(len(steps_per_epoch))]
    for _ in range(10_000):
        chosen = sorted(rng.sample(positions, len(kinds))) if len(kinds) <= len(positions) else []
        places = [starts[epoch] + step for epoch, step in chosen]
        if chosen and all(b - a >= _APART for a, b in itertools.pairwise(places)):
            return [Planned(kind, *position) for kind, position in zip(kinds, chosen, strict=True)]
    raise ValueError(f"{len(kinds)} disturbances do not fit into {len(steps_per_epoch)} epochs: take more epochs")
