"""Messages between the workers and the ScoreActor.

An *attempt* is one start of the worker group. Its *generation* is its number: every start takes a higher one, and the
actor refuses calls of earlier attempts. A *pass* goes once over one plan: to train, to score samples without training
(forward-only), or to validate. A rank sends its observations in *pushes*, one packed buffer each. Pushes are numbered
per rank and epoch, so that the actor folds a repeated push once and can name a lost one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["train", "forward", "validate"]
Moment = Literal["snapshot", "close"]

# The arrays in a packed buffer, in order: name, dtype, shape.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]

# One rank's rows of a plan: ids (R,), weights (R,), and a mask (R,) that is False for padding.
RankRows = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]

# One block of the Ray Data stream: ids (R,), weights (R,).
PlanBlock = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class AttemptKey:
    """An attempt in an epoch.

    Attributes:
        generation: the attempt's number.
        epoch: the current epoch.
        resume_step: the step at which this attempt started the epoch. A restarted actor returns to its checkpoint.
    """

    generation: int
    epoch: int
    resume_step: int = 0


@dataclass(frozen=True)
class PlanPass:
    """One pass of all ranks over one plan.

    Attributes:
        key: the attempt and the epoch.
        phase: which of the epoch's plans.
        world_size: the number of ranks.
        start_step: the first step of the plan to deliver.
    """

    key: AttemptKey
    phase: Phase
    world_size: int
    start_step: int = 0


@dataclass(frozen=True)
class Push:
    """Observations of one rank, packed into one buffer.

    Attributes:
        rank: the observing rank.
        sequence: the push's number in the rank's epoch, from 0.
        layout, buffer: ids and signals, as `pack` returns them.
        sweep: whether a forward-only pass made the observations.
    """

    rank: int
    sequence: int
    layout: Layout
    buffer: NDArray[np.uint8]
    sweep: bool = False


@dataclass(frozen=True)
class Barrier:
    """A point that all ranks reach before the actor takes a snapshot.

    Attributes:
        moment: `snapshot` inside an epoch; `close` at its end, where the actor selects the next epoch's samples.
        step: the number of steps before it in the epoch; the same on every rank.
        world_size: the number of ranks.
        number: the number of barriers before it in the attempt's epoch.
    """

    moment: Moment
    step: int
    world_size: int
    number: int = 0

    def __str__(self) -> str:
        return f"step {self.step}" + (", the end of the epoch" if self.moment == "close" else "")


@dataclass(frozen=True)
class PlanHeader:
    """The summary of a plan that every rank gets; the plan itself stays in the actor.

    Attributes:
        plan_pass: the announced pass.
        num_steps: global batches, meta batches included.
        num_rows: rows with a weight, without padding and meta rows.
        num_kept, num_samples, num_forward_only, requested, realised, mean_weight, lr_scale: the selection's.
        hash: of ids, weights and order; "" for passes that do not train.
        select_s: seconds it took to lay out the plan.
        facts: what the method reports about the selection, for metrics.jsonl.
        num_train_steps: global batches that train.
        batch_rows: rows of a global batch on one rank.
        meta_every: training batches per meta batch; 0 for no meta batches.
    """

    plan_pass: PlanPass
    num_steps: int
    num_rows: int
    num_kept: int
    num_samples: int
    num_forward_only: int
    requested: float
    realised: float
    mean_weight: float
    lr_scale: float
    hash: str
    select_s: float
    facts: Mapping[str, Any]
    num_train_steps: int
    batch_rows: int
    meta_every: int = 0


@dataclass(frozen=True)
class EpochSnapshot:
    """The Selector's state at a barrier, with every observation made before it.

    Attributes:
        state: the Selector's arrays; at an epoch's end they include the next selection.
        select_s: seconds the selection took.
        num_nonfinite, nonfinite_ids: the number of NaN and infinite losses, and the first samples that had one.
        score_quantiles: score name → quantiles, as `column_quantiles` returns them.
    """

    state: dict[str, NDArray[Any]]
    select_s: float
    num_nonfinite: int
    nonfinite_ids: list[int]
    score_quantiles: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class StopReason:
    """Why the run cannot continue, in one line; `failed` tells an error from a run that stopped itself."""

    text: str
    failed: bool


@dataclass(frozen=True)
class Pulse:
    """A rank's last sign of life.

    Attributes:
        silent_s: seconds since then.
        doing: such as "waiting for the stream".
        doing_s: for how long.
    """

    silent_s: float
    doing: str
    doing_s: float


def pack(ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]]) -> tuple[Layout, NDArray[np.uint8]]:
    """Pack ids (B,) and signals (B, …) into one byte buffer, so that a push is one object.

    >>> layout, buffer = pack(np.array([7]), {"loss": np.array([0.5], np.float32)})
    >>> unpack(layout, buffer)["loss"]
    array([0.5], dtype=float32)
    """
    arrays = {"id": np.asarray(ids, dtype=np.int64), **signals}
    layout = tuple((name, array.dtype.str, array.shape) for name, array in arrays.items())
    parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays.values()]
    return layout, np.concatenate(parts)


def unpack(layout: Layout, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return the packed arrays as views into the buffer; the ids are named "id"."""
    arrays = {}
    start = 0
    for name, dtype, shape in layout:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = buffer[start : start + size].view(dtype).reshape(shape)
        start += size
    return arrays


class ReceivedPushes:
    """The pushes that an actor has received in an epoch.

    Attributes:
        num_observed: the observations in them.
    """

    def __init__(self) -> None:
        self._sequences: dict[int, set[int]] = {}
        self.num_observed = 0

    def fold(self, push: Push, epoch: int, observe: Callable[..., object]) -> None:
        """Call `observe(ids, signals, epoch, sweep=…)` with a push, unless it was folded before."""
        received = self._sequences.setdefault(push.rank, set())
        if push.sequence in received:
            return
        signals = unpack(push.layout, push.buffer)
        ids = signals.pop("id")
        observe(ids, signals, epoch, sweep=push.sweep)
        received.add(push.sequence)
        self.num_observed += ids.size

    def lost(self, rank: int, num_pushes: int) -> list[int]:
        """Return which of a rank's pushes have not come, given how many it has sent."""
        return sorted(set(range(num_pushes)) - self._sequences.get(rank, set()))
