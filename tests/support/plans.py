"""An epoch's plan computed apart from any trainer, by a Selector that is told the losses of the trainer's visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rayprune
from rayprune.core.plan import LastBatch

# (ids, signals) of an epoch's visits.
Observed = tuple[Sequence[int], dict[str, Any]]


def expected_epochs(
    selector: rayprune.Selector,
    global_rows: int,
    observed: Callable[[int, NDArray[np.int64]], Observed],
    last_batch: LastBatch = "pad",
) -> list[tuple[list[int], list[float]]]:
    """Return (ids, weights) of each epoch in order of the visits; `observed(epoch, ids)` gives the losses to fold."""
    epochs = []
    for epoch in range(selector.num_epochs):
        plan = rayprune.Plan.of_selection(selector.begin_epoch(epoch), global_rows, selector.seed, epoch, last_batch)
        ids = plan.order[: plan.num_rows].astype(np.int64)
        epochs.append((ids.tolist(), plan.weights(0, plan.num_rows).tolist()))
        seen, signals = observed(epoch, ids)
        if len(seen):
            selector.observe(np.asarray(seen), signals, epoch)
    return epochs
