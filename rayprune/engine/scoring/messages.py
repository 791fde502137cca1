"""What workers and the ScoreActor say to each other.

An *attempt* is one start of the worker group, and its *generation* is its number: each start takes a higher one, and
calls of an earlier group are refused. A *pass* goes over one plan once (train, forward-only or validation).
Observations travel as one packed buffer a push, numbered per rank and epoch, so that a push that came twice is folded
once and one that got lost is asked for again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["train", "forward", "validate"]
Moment = Literal["snapshot", "close"]

# One signal's place in a packed buffer: name, dtype, shape.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]

# One rank's rows of a plan: ids (R,), weights (R,), and False where a row is padding (R,).
RankRows = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]

# One block of the stream: ids (R,), weights (R,).
PlanBlock = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class AttemptKey:
    """Which attempt calls, and where it began the epoch.

    Attributes:
        generation: the attempt's number.
        epoch: the running epoch.
        resume_step: the step of the epoch that this attempt began at; a restarted actor goes back to its checkpoint.
    """

    generation: int
    epoch: int
    resume_step: int = 0


@dataclass(frozen=True)
class PlanPass:
    """One pass over one plan by all ranks.

    Attributes:
        key: the attempt and the epoch.
        phase: which of the epoch's plans.
        world_size: how many ranks share it.
        start_step: where in the plan the pass begins.
    """

    key: AttemptKey
    phase: Phase
    world_size: int
    start_step: int = 0


@dataclass(frozen=True)
class Push:
    """Observations of one rank, packed into one buffer.

    Attributes:
        rank: who observed.
        sequence: number of the push in the rank's epoch, from 0.
        layout, buffer: ids and signals, as `pack` returns them.
        sweep: whether a forward-only pass observed them.
    """

    rank: int
    sequence: int
    layout: Layout
    buffer: NDArray[np.uint8]
    sweep: bool = False


@dataclass(frozen=True)
class Barrier:
    """Where all ranks meet with all their observations.

    Attributes:
        moment: `snapshot` inside an epoch; `close` at its end, when the next epoch's samples are selected.
        step: the step before which they meet.
        world_size: how many ranks must come.
    """

    moment: Moment
    step: int
    world_size: int


@dataclass(frozen=True)
class PlanHeader:
    """What every rank must know of a plan without holding it.

    Attributes:
        plan_pass: which pass goes over it.
        num_steps: global batches, the meta batches included.
        num_rows: rows that are trained on.
        num_kept, num_samples, num_forward_only, requested, realised, lr_scale: of the selection.
        hash: of ids, weights and order; "" for passes that do not train.
        select_s: seconds that laying out the plan took.
        facts: the selection's own, for metrics.jsonl.
        num_train_steps: global batches that train.
        batch_rows: one rank's part of a global batch.
        meta_every: a meta batch precedes every so many batches that train; 0 for none.
    """

    plan_pass: PlanPass
    num_steps: int
    num_rows: int
    num_kept: int
    num_samples: int
    num_forward_only: int
    requested: float
    realised: float
    lr_scale: float
    hash: str
    select_s: float
    facts: Mapping[str, Any]
    num_train_steps: int
    batch_rows: int
    meta_every: int = 0


@dataclass(frozen=True)
class EpochSnapshot:
    """The Selector's state when all observations so far have arrived.

    Attributes:
        state: its arrays, those of the next epoch's selection included at an epoch's end.
        select_s: seconds that the selection took.
        num_nonfinite, nonfinite_ids: losses that were NaN or infinite, and the first samples that had one.
        score_quantiles: quantiles of each score, as `column_quantiles` returns them.
    """

    state: dict[str, NDArray[Any]]
    select_s: float
    num_nonfinite: int
    nonfinite_ids: list[int]
    score_quantiles: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pulse:
    """What a rank was doing when it was last heard.

    Attributes:
        silent_s: seconds since then.
        doing: such as "waits for the stream".
        doing_s: for how long it had been doing that.
    """

    silent_s: float
    doing: str
    doing_s: float


def pack(ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]]) -> tuple[Layout, NDArray[np.uint8]]:
    """Lay ids (B,) and signals (B, …) into one byte buffer: one object to send instead of several.

    >>> layout, buffer = pack(np.array([7]), {"loss": np.array([0.5], np.float32)})
    >>> unpack(layout, buffer)["loss"]
    array([0.5], dtype=float32)
    """
    arrays = {"id": np.asarray(ids, dtype=np.int64), **signals}
    layout = tuple((name, array.dtype.str, array.shape) for name, array in arrays.items())
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays.values()]
    return layout, np.concatenate(parts)


def unpack(layout: Layout, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return the arrays of `pack` as views into the buffer; the ids are under "id"."""
    arrays = {}
    start = 0
    for name, dtype, shape in layout:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = buffer[start : start + size].view(dtype).reshape(shape)
        start += size
    return arrays
