"""Gather per-sample signals on the device and push them to the ScoreActor in large pieces.

A push of every step would cost 0.5–1 ms; a buffer on the device and a push of 262,144 samples costs some µs a step.
Nothing waits for a GPU: what is pushed is copied behind the steps that it has to do, and sent when it has arrived. A
push is sorted by id: the one actor then writes to rising addresses, several times faster, and the many workers do the
sorting. What was pushed in an epoch is kept until the epoch is closed, because an actor that dies loses calls that
it acknowledged. Signals that are vectors (probabilities, embeddings) are too large to keep: when they are lost with the
actor, the attempt ends and the run goes back to its last checkpoint.

Shapes: B rows of a batch (this worker's share).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, Push, pack
from rayprune.errors import ObservationsLost
from rayprune.nn.device import Copies

PUSH_ROWS = 262_144
# Sooner where steps are slow, so that progress shows and a diverging run is noticed inside the epoch.
PUSH_SECONDS = 2.0
_PUSH_BYTES = 64 * 1024 * 1024


class PendingCopy:
    """Rows on their way from the device to the host; where that is one, they are here and must be taken at once.

    Args:
        ids: (R,) on the host.
        signals: name → (R, …) on the device; what is written there later comes after the copy.
        sweep: whether a forward-only pass reports them.
    """

    def __init__(self, ids: NDArray[np.int64], signals: dict[str, Tensor], sweep: bool) -> None:
        self.ids, self.sweep = ids, sweep
        self._copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in signals.items()}
        on_gpu = next((tensor.device for tensor in signals.values() if tensor.is_cuda), None)
        self._copied = None if on_gpu is None else torch.cuda.current_stream(on_gpu).record_event()

    def here(self) -> bool:
        """Return whether they have arrived."""
        return self._copied is None or self._copied.query()

    def signals(self) -> dict[str, NDArray[Any]]:
        """Return name → (R, …), once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return {name: copy.numpy() for name, copy in self._copies.items()}


class Recorder:
    """Buffer, push and log one rank's observations.

    Args:
        client: the ScoreActor.
        rank: this worker's rank.
        signals: names that are kept of what `record` is given in training.
    """

    def __init__(self, client: ScoreClient, rank: int, signals: tuple[str, ...]) -> None:
        self._client, self._rank = client, rank
        self._trained = self._signals = signals
        self._sweep = False
        self._ids = np.empty(0, dtype=np.int64)
        self._buffers: dict[str, Tensor] = {}
        self._rows = 0
        self._arriving: PendingCopy | None = None
        self._key = AttemptKey(0, -1)
        self._pushed_at = 0.0
        self._log: list[Push | None] = []
        self.num_nonfinite = 0
        self.nonfinite_ids: list[int] = []

    def start_epoch(self, key: AttemptKey) -> None:
        """Begin an epoch; what was logged of the last one is let go."""
        self._key, self._rows, self._arriving, self._log = key, 0, None, []
        self._pushed_at = time.perf_counter()
        self.num_nonfinite, self.nonfinite_ids = 0, []
        self._buffer_for(self._trained, sweep=False)

    def start_sweep(self, signals: tuple[str, ...]) -> None:
        """Go on with a forward-only pass of the same epoch, which reports these signals."""
        self.push()
        self._buffer_for(signals, sweep=True)

    def _buffer_for(self, signals: tuple[str, ...], sweep: bool) -> None:
        if signals != self._signals:
            self._buffers = {}
        self._signals, self._sweep = signals, sweep

    def record(self, ids: NDArray[np.int64], real: NDArray[np.bool_], signals: dict[str, Tensor]) -> None:
        """Keep the signals of the real rows.

        Args:
            ids: (B,) on the host.
            real: (B,) False where a row is padding, which is never recorded.
            signals: name → (B, …) detached tensors on the device.
        """
        if not self._signals or not real.any():
            return
        if not real.all():
            ids = ids[real]
            # By places, which the host knows: a mask would wait for the device to count it.
            (places,) = Copies(signals[self._signals[0]].device)(torch.from_numpy(np.flatnonzero(real)))
            signals = {name: signals[name].index_select(0, places) for name in self._signals}
        if not self._buffers:
            self._allocate(real.size, signals)
        if self._rows + ids.size > self._ids.size:
            self._copy()
        rows = slice(self._rows, self._rows + ids.size)
        self._ids[rows] = ids
        for name, buffer in self._buffers.items():
            buffer[rows].copy_(signals[name])
        self._rows += ids.size
        if time.perf_counter() - self._pushed_at > PUSH_SECONDS:
            self._copy()
        self._send_what_is_here()

    def _allocate(self, batch_rows: int, signals: dict[str, Tensor]) -> None:
        """Size the buffers by the first batch: fewer rows where a signal is a long vector, at least two batches."""
        row_bytes = sum(4 * signals[name][0].numel() for name in self._signals) + 8
        capacity = max(2 * batch_rows, min(PUSH_ROWS, _PUSH_BYTES // row_bytes))
        self._ids = np.empty(capacity, dtype=np.int64)
        for name in self._signals:
            shape = (capacity, *signals[name].shape[1:])
            self._buffers[name] = torch.empty(shape, dtype=torch.float32, device=signals[name].device)

    def push(self) -> None:
        """Send what is buffered, and wait until the device has done what it takes."""
        self._copy()
        self._send()

    def _copy(self) -> None:
        """Let what is buffered leave the device, and make room for more."""
        self._pushed_at = time.perf_counter()
        self._send()  # one after the other
        if self._rows:
            signals = {name: buffer[: self._rows] for name, buffer in self._buffers.items()}
            self._arriving = PendingCopy(self._ids[: self._rows].copy(), signals, self._sweep)
            self._rows = 0
            self._send_what_is_here()

    def _send_what_is_here(self) -> None:
        if self._arriving is not None and self._arriving.here():
            self._send()

    def _send(self) -> None:
        """Send what has left the device, when it has arrived."""
        arriving, self._arriving = self._arriving, None
        if arriving is None:
            return
        seen, rows = arriving.signals(), arriving.ids
        finite = np.ones(rows.size, dtype=bool)
        for array in seen.values():
            finite &= np.isfinite(array).reshape(rows.size, -1).all(axis=1)
        # Rows that never enter the table come last, as they occurred: the first of them is where to look.
        sound, bad = np.flatnonzero(finite), np.flatnonzero(~finite)
        order = np.concatenate([sound[np.argsort(rows[sound])], bad])
        ids = rows[order]
        signals: dict[str, NDArray[Any]] = {name: array[order] for name, array in seen.items()}
        self.num_nonfinite += bad.size
        self.nonfinite_ids += rows[bad][:5].tolist()
        push = Push(self._rank, len(self._log), *pack(ids, signals), arriving.sweep)
        self._client.observe(self._key, push, wait=False)
        self._log.append(None if any(array.ndim > 1 for array in signals.values()) else push)

    @property
    def num_pushes(self) -> int:
        """Pushes of this epoch so far."""
        return len(self._log)

    def push_again(self, sequences: Iterable[int]) -> None:
        """Repeat pushes that got lost, and wait for the answer.

        Raises:
            ObservationsLost: a push held vectors, which are not kept.
        """
        for sequence in sequences:
            push = self._log[sequence]
            if push is None:
                raise ObservationsLost(
                    f"epoch {self._key.epoch}: push {sequence} of vector signals was lost with the ScoreActor"
                )
            self._client.observe(self._key, push)
