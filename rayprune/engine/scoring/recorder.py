"""Buffer per-sample signals on the device and push them to the ScoreActor in large pieces.

A push per step would cost 0.5–1 ms; a buffer on the device and a push per 262,144 samples costs a few µs per step.
Nothing waits for the GPU: a push is copied to the host asynchronously and sent when the copy is complete. A push is
sorted by id, so that the one actor writes to rising addresses (several times faster) and the many workers sort.

An actor that dies loses calls that it acknowledged, so a rank keeps its pushes until the epoch is closed. Signals that
are vectors (probabilities, embeddings) are too large to keep. If they are lost with the actor, the attempt ends and the
run resumes from its last checkpoint.

Shapes: B rows of a batch on this rank, R rows of a push.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.engine.scoring.messages import AttemptKey, Push, pack
from rayprune.errors import ObservationsLost
from rayprune.nn.device import Copies

PUSH_ROWS = 262_144
# Slow steps push sooner, so that progress shows and a diverging run is noticed inside the epoch.
PUSH_SECONDS = 2.0
_PUSH_BYTES = 64 * 1024 * 1024


class PendingCopy:
    """An in-flight device-to-host copy; already complete on the CPU.

    Args:
        ids: (R,) int64 on the host.
        signals: name → (R, …) on the device; later writes to them do not change the copy.
        sweep: whether a forward-only pass made the observations.
    """

    def __init__(self, ids: NDArray[np.int64], signals: dict[str, Tensor], sweep: bool) -> None:
        self.ids, self.sweep = ids, sweep
        self._copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in signals.items()}
        device = next((tensor.device for tensor in signals.values() if tensor.is_cuda), None)
        self._event = None if device is None else torch.cuda.current_stream(device).record_event()

    def is_complete(self) -> bool:
        """Return whether the copy is complete."""
        return self._event is None or self._event.query()

    def wait(self) -> dict[str, NDArray[Any]]:
        """Wait for the copy; return name → (R, …) on the host."""
        if self._event is not None:
            self._event.synchronize()
        return {name: copy.numpy() for name, copy in self._copies.items()}


class Observer(Protocol):
    """Takes pushes: the ScoreActor's client, or a run inside another trainer."""

    def observe(self, key: AttemptKey, push: Push, *, wait: bool = True) -> None:
        """Take a push; with `wait=False`, maybe later."""


class Recorder:
    """Buffer, push and log one rank's observations.

    Args:
        client: where pushes go, such as the ScoreActor's client.
        rank: this rank.
        signals: names of the signals to keep of training visits.

    Attributes:
        num_pushes: pushes of the current epoch.
        num_nonfinite, nonfinite_ids: rows of the epoch with a NaN or infinite signal, and the first of their ids.
    """

    def __init__(self, client: Observer, rank: int, signals: tuple[str, ...]) -> None:
        self._client, self._rank, self._train_signals = client, rank, signals
        self._key = AttemptKey(0, -1)
        # The buffer: signals of the current pass, name → (capacity, …), and how many rows are filled.
        self._signals, self._sweep = signals, False
        self._ids = np.empty(0, dtype=np.int64)
        self._buffers: dict[str, Tensor] = {}
        self._num_rows = 0
        self._pending: PendingCopy | None = None
        self._pushed_at = 0.0
        self._log: list[Push | None] = []
        self.num_nonfinite = 0
        self.nonfinite_ids: list[int] = []

    @property
    def num_pushes(self) -> int:
        return len(self._log)

    def start_epoch(self, key: AttemptKey) -> None:
        """Start an epoch and forget the pushes of the last one."""
        self._key, self._num_rows, self._pending, self._log = key, 0, None, []
        self._pushed_at = time.perf_counter()
        self.num_nonfinite, self.nonfinite_ids = 0, []
        self._use(self._train_signals, sweep=False)

    def start_sweep(self, signals: tuple[str, ...]) -> None:
        """Continue with a forward-only pass of the epoch, which observes these signals."""
        self.push()
        self._use(signals, sweep=True)

    def _use(self, signals: tuple[str, ...], sweep: bool) -> None:
        if signals != self._signals:
            self._buffers = {}
        self._signals, self._sweep = signals, sweep

    def record(self, ids: NDArray[np.int64], real: NDArray[np.bool_], signals: dict[str, Tensor]) -> None:
        """Record the signals of the real rows.

        Args:
            ids: (B,) int64 on the host.
            real: (B,) bool, False for padding, which is never recorded.
            signals: name → (B, …) detached tensors on the device.
        """
        if not self._signals or not real.any():
            return
        if not real.all():
            ids = ids[real]
            # By index, which the host knows: with a mask, the host would wait for the device to count it.
            (rows_B,) = Copies(signals[self._signals[0]].device)(torch.from_numpy(np.flatnonzero(real)))
            signals = {name: signals[name].index_select(0, rows_B) for name in self._signals}
        if not self._buffers or ids.size > self._ids.size:  # a user's loop may join batches
            self._start_copy()
            self._allocate(real.size, signals)
        if self._num_rows + ids.size > self._ids.size:
            self._start_copy()
        rows = slice(self._num_rows, self._num_rows + ids.size)
        self._ids[rows] = ids
        for name, buffer in self._buffers.items():
            buffer[rows].copy_(signals[name])
        self._num_rows += ids.size
        if time.perf_counter() - self._pushed_at > PUSH_SECONDS:
            self._start_copy()
        self._send_if_complete()

    def _allocate(self, batch_rows: int, signals: dict[str, Tensor]) -> None:
        """Size the buffers by the first batch: at least two batches, fewer rows for signals that are long vectors."""
        row_bytes = sum(4 * signals[name][0].numel() for name in self._signals) + 8
        capacity = max(2 * batch_rows, min(PUSH_ROWS, _PUSH_BYTES // row_bytes))
        self._ids = np.empty(capacity, dtype=np.int64)
        for name in self._signals:
            shape = (capacity, *signals[name].shape[1:])
            self._buffers[name] = torch.empty(shape, dtype=torch.float32, device=signals[name].device)

    def push(self) -> None:
        """Send everything buffered, after waiting for the device to produce it."""
        self._start_copy()
        self._send()

    def push_again(self, sequences: Iterable[int]) -> None:
        """Repeat lost pushes and wait for the actor to fold them.

        Raises:
            ObservationsLost: a lost push held vectors, which are not kept.
        """
        for sequence in sequences:
            push = self._log[sequence]
            if push is None:
                raise ObservationsLost(
                    f"epoch {self._key.epoch}: push {sequence} of vector signals was lost with the ScoreActor"
                )
            self._client.observe(self._key, push)

    def _start_copy(self) -> None:
        """Copy the buffer to the host, asynchronously, and empty it."""
        self._pushed_at = time.perf_counter()
        self._send()  # one copy at a time
        if self._num_rows:
            signals = {name: buffer[: self._num_rows] for name, buffer in self._buffers.items()}
            self._pending = PendingCopy(self._ids[: self._num_rows].copy(), signals, self._sweep)
            self._num_rows = 0
            self._send_if_complete()

    def _send_if_complete(self) -> None:
        if self._pending is not None and self._pending.is_complete():
            self._send()

    def _send(self) -> None:
        """Push the pending copy, once it is complete."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        unsorted, rows = pending.wait(), pending.ids
        is_finite = np.ones(rows.size, dtype=bool)
        for array in unsorted.values():
            is_finite &= np.isfinite(array).reshape(rows.size, -1).all(axis=1)
        # Rows that never enter the table come last, in the order of their visits: the first one is where to look.
        finite, nonfinite = np.flatnonzero(is_finite), np.flatnonzero(~is_finite)
        order = np.concatenate([finite[np.argsort(rows[finite])], nonfinite])
        signals: dict[str, NDArray[Any]] = {name: array[order] for name, array in unsorted.items()}
        self.num_nonfinite += nonfinite.size
        self.nonfinite_ids += rows[nonfinite][:5].tolist()
        push = Push(self._rank, len(self._log), *pack(rows[order], signals), pending.sweep)
        self._client.observe(self._key, push, wait=False)
        self._log.append(None if any(array.ndim > 1 for array in signals.values()) else push)
