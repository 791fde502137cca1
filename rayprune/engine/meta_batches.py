"""What a step that learns weights is given in an epoch that prunes: each batch, and the meta batch that precedes it.

Nothing is trained between the two: a run that stops there goes on before the meta batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rayprune.core.roles import is_meta, train_step_of
from rayprune.engine.stream import Batch


@dataclass(frozen=True)
class Turned:
    """A batch to be trained.

    Attributes:
        place: the step of the plan to go on from, should the run stop before this batch.
        step: batches trained before it in the epoch.
        batch: the batch.
        meta: rows of the unpruned stream that came with it.
    """

    place: int
    step: int
    batch: Batch
    meta: Batch | None = None


def with_meta_batches(batches: Iterable[Batch], first: int, meta_every: int) -> Iterator[Turned]:
    """Yield the batches that train, each with the meta batch before it.

    Args:
        batches: of a plan, in order.
        first: the plan's step that they begin at.
        meta_every: of the plan.
    """
    meta: Batch | None = None
    for place, batch in enumerate(batches, start=first):
        if is_meta(place, meta_every):
            meta = batch
            continue
        yield Turned(place if meta is None else place - 1, train_step_of(place, meta_every), batch, meta)
        meta = None
