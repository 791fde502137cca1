"""The transport of a user's loop that reads rows in processes: for Datasets whose items take time.

One task is one batch, so batches arrive whole, in shared memory. Before a task, the random generators of Python, NumPy
and torch are seeded by the epoch and the batch: random transforms then depend neither on the number of processes nor on
where a run was resumed.

Shapes: B rows of a batch on this rank.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rayprune.engine.data.batch import Batch
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.sources import SampleSource
from rayprune.sources.datasets.columns import NUMBERS
from rayprune.sources.datasets.items import ItemSource

# A batch to read: a seed and ids (B,).
_Task = tuple[int, NDArray[np.int64]]
# Smaller columns are copied through the pipe: making a file of shared memory for them takes longer.
_SHARED_BYTES = 1 << 16


class ProcessStream:
    """Reads the rows of each batch in one of several processes, ahead of training; a Transport.

    Args:
        source: the training source; it is sent to the processes, or inherited where they are forked.
        num_workers: at least 1.
        seed: the run's.
    """

    resumes_inside = True

    def __init__(self, source: SampleSource, num_workers: int, seed: int) -> None:
        self._tasks = _Tasks()
        self._seed = seed
        self._loader = DataLoader(
            _TaskReader(source),
            sampler=self._tasks,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=True,
            # A fixed generator, so that starting the processes draws no number from the user's.
            generator=torch.Generator(),
            collate_fn=_unchanged,
        )
        # Start them here, in the main thread: a process that is forked by a thread fails when it ends.
        self._iterate()

    def _iterate(self) -> Iterator[Any]:
        with torch.device("cpu"):  # whatever the default device: the generator is on the host
            return iter(self._loader)

    def batches(self, plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        waiting: deque[RankRows] = deque()

        def tasks() -> Iterator[_Task]:
            for ids, weights, real in spans:
                for start in range(0, ids.size, batch_rows):
                    rows = slice(start, start + batch_rows)
                    waiting.append((ids[rows], weights[rows], real[rows]))
                    entropy = [self._seed, plan_pass.key.epoch, *ids[rows].tolist()]
                    yield int(np.random.SeedSequence(entropy).generate_state(1)[0]), ids[rows]

        self._tasks.current = tasks()
        for columns, num_bytes in self._iterate():
            ids, weights, real = waiting.popleft()
            arrays = {name: value.numpy() if torch.is_tensor(value) else value for name, value in columns.items()}
            yield Batch(arrays, ids, weights, real, num_bytes)


def _unchanged(batch: Any) -> Any:
    return batch


class _Tasks(Sampler[_Task]):
    """The tasks of the current pass; the DataLoader, and its processes, stay."""

    def __init__(self) -> None:
        self.current: Iterator[_Task] = iter(())

    def __iter__(self) -> Iterator[_Task]:
        return self.current


class _TaskReader(Dataset[Any]):
    """Reads a task; its columns travel in shared memory, where those of items are filled at once."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __getitem__(self, task: _Task) -> tuple[dict[str, NDArray[Any] | Tensor], int]:
        seed, ids = task
        random.seed(seed)
        np.random.set_bit_generator(np.random.MT19937(seed))  # type: ignore[attr-defined]  # what np.random.rand and the like draw from
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, to remember it for CUDA
        if isinstance(self._source, ItemSource):
            self._source.allocate = _shared_array  # this process has a copy of the source
        columns, num_bytes = self._source.read(ids)
        return {name: _as_tensor(column) for name, column in columns.items()}, num_bytes


def _shared_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return an array in shared memory, whose `base` is a tensor; or, if it is small, one in the process's own."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < _SHARED_BYTES:
        return np.empty(shape, dtype)
    like = torch.from_numpy(np.empty(0, dtype))
    storage = torch.UntypedStorage._new_shared(num_bytes)
    return like.new(storage).view(like.dtype).reshape(shape).numpy()


def _as_tensor(column: NDArray[Any]) -> NDArray[Any] | Tensor:
    """Return large numbers as the tensor that they are a view of, or as a new one; and anything else as it is."""
    if isinstance(column.base, Tensor):
        return column.base
    is_large = column.dtype.kind in NUMBERS and column.nbytes >= _SHARED_BYTES
    return torch.from_numpy(column) if is_large else column
