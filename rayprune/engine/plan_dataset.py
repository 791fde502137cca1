"""The Dataset of a run: its read tasks are the blocks of the ScoreActor's current plan.

One Dataset and one streaming_split serve the whole run, because the split coordinator plans anew for every iteration.
`Datasource` and `ReadTask` are no stable API of Ray: they are used here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata

from rayprune.core.plan import BLOCK_ROWS
from rayprune.engine.client import ScoreClient
from rayprune.engine.stream import BYTES_READ
from rayprune.sources import SampleSource

# From 0.1 to 0.2 s of decoding small images.
_LEAST_ROWS, _DECODED_ROWS = 2_048, 8_192
_MOST_TASKS = 4_096  # an epoch, as Ray plans them one by one
# A source that holds its data is not sent with each read task.
_LARGE_SOURCE_BYTES = 256 * 1024


class PlanDatasource(Datasource):
    """Serve the blocks of the ScoreActor's current plan as read tasks.

    Planning happens on the driver at construction and more than once an epoch, so it only looks and changes nothing;
    before the first turn there are no blocks. Row counts stay out of the metadata: Ray would keep the first plan's.

    Attributes:
        asks: whether planning asks for the plan; False for an answer without blocks.
    """

    def __init__(self, scores: ScoreClient, sources: Mapping[str, SampleSource]) -> None:
        super().__init__()
        self._scores, self.asks = scores, True
        self._sources = {name: _sent(source) for name, source in sources.items()}

    def get_name(self) -> str:
        """Return the name that Ray shows."""
        return "Plan"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: it differs from epoch to epoch."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task for each block of the current plan, in the plan's order."""
        if not self.asks:
            return []
        phase, blocks = self._scores.blocks()
        source = self._sources["validation" if phase == "validate" else "train"]
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Read(source, ids, weights), metadata) for ids, weights in blocks]


def _sent(source: SampleSource) -> SampleSource | ray.ObjectRef:
    """Return what read tasks carry of a source: itself, or where it is large a reference, sent to each node once."""
    return ray.put(source) if len(ray.cloudpickle.dumps(source)) > _LARGE_SOURCE_BYTES else source


@functools.lru_cache(maxsize=4)
def _fetched(reference: ray.ObjectRef) -> SampleSource:
    """Return a source, one for all tasks of this process."""
    source: SampleSource = ray.get(reference)
    return source


@dataclass(frozen=True)
class _Read:
    """Read one block; holds a copy of its ids, so that no task depends on an object that the actor owns."""

    source: SampleSource | ray.ObjectRef
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    # By this name Ray warns of tasks above 1 MiB, and fails where a task that is no function has none.
    __name__ = "Plan"

    def __call__(self) -> list[Any]:
        source = _fetched(self.source) if isinstance(self.source, ray.ObjectRef) else self.source
        columns, num_bytes = source.read(self.ids)
        # The count travels with the rows: all of it with the first one.
        read = np.zeros(self.ids.size, dtype=np.int64)
        read[:1] = num_bytes
        return [BlockAccessor.batch_to_block({**columns, "id": self.ids, "weight": self.weights, BYTES_READ: read})]


def task_rows(source: SampleSource, num_cpus: float) -> int:
    """Return how many rows a read task takes at most.

    Many where rows are cheap, as a task costs some 25 ms whatever it reads, and where rows lie in groups, which are
    read whole. Rows that are decoded are spread over the CPUs, twice over.

    Args:
        source: the training source.
        num_cpus: of the cluster.
    """
    if source.row_cost == "cheap" or source.groups is not None:
        return BLOCK_ROWS
    spread = min(_DECODED_ROWS, int(len(source) / (2 * max(num_cpus, 1))))
    return max(_LEAST_ROWS, spread, min(BLOCK_ROWS, len(source) // _MOST_TASKS))


def plan_dataset(scores: ScoreClient, sources: Mapping[str, SampleSource], *, elastic: bool = False) -> Any:
    """Return the one Dataset of a run; set the order-keeping option that TorchTrainer's DataConfig picks up.

    Args:
        scores: whose plan is read.
        sources: "train" and, where there is one, "validation".
        elastic: the number of workers may change. Ray Train then fills every CPU with workers, so that reading must do
            without a reserved one: it would wait for ever.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    source = PlanDatasource(scores, sources)
    source.asks = False  # there is no plan yet, and the actor may still be starting: it is not waited for
    dataset = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0.0 if elastic else None)
    source.asks = True
    return dataset
