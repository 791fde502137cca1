"""`rayprune.prune` and its kin: pruned data for a training loop of the user's own, with Ray Train or without."""

from __future__ import annotations

import itertools
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray
import ray.data
import ray.train
import torch
from numpy.typing import NDArray
from ray.train.collective import broadcast_from_rank_zero

from rayprune.core.plan import LastBatch
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.engine.cluster import Stream
from rayprune.engine.data.device import DeviceStream, check_columns
from rayprune.engine.data.ray_data import (
    GUARANTEES,
    FilteredStream,
    IdColumn,
    Pick,
    SourceMetadata,
    plan_dataset,
    stored,
    task_rows,
)
from rayprune.engine.data.transport import LocalStream, RayStream, Transport
from rayprune.engine.scoring.actor import ScoreSpec
from rayprune.engine.scoring.client import LoopClient
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.user_loop.shard import Shard
from rayprune.errors import ConfigError
from rayprune.methods import Method
from rayprune.methods.fixed import Fixed
from rayprune.sources import SampleSource, as_source
from rayprune.sources.selection_files import read_chosen

_KEY = "rayprune"
# Actors end with the process that made them, or with `close`: a data set alone must keep its own alive.
_ALIVE: dict[str, Any] = {}
_generations = itertools.count(1)


@dataclass(frozen=True)
class _Told:
    """What a pruned data set tells the workers: where its scores are, and how rows come."""

    scores: LoopClient
    stream: Stream | Literal["filtered"]
    source: SampleSource | None = None


class PrunedData:
    """A data set whose every epoch is chosen anew.

    Attributes:
        dataset: give it to a trainer, `TorchTrainer(..., datasets={"train": pruned.dataset})`; it may be mapped over
            where rows, their order and the columns `id` and `weight` survive: `map_batches(f, batch_size=None)`.
        num_samples: N.
    """

    def __init__(self, dataset: Any, scores: LoopClient, num_samples: int, guarantees: str) -> None:
        self.dataset, self.num_samples = dataset, num_samples
        self._scores, self._guarantees = scores, guarantees

    def __repr__(self) -> str:
        return f"PrunedData({self.num_samples} samples; {self._guarantees})"

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores, `last_visit` and `times_pruned`, name → (N,); NaN where never visited."""
        return self._scores.scores()

    def close(self) -> None:
        """End the ScoreActor; otherwise it ends with this process."""
        handle = _ALIVE.pop(self._scores.name, None)
        if handle is not None:
            ray.kill(handle)


def prune(
    source: Any,
    method: Method,
    num_epochs: int,
    batch_size: int,
    seed: int = 0,
    *,
    last_batch: LastBatch = "pad",
    stream: Stream = "ray",
    id_column: str = "id",
) -> PrunedData:
    """Prune a data set for a Ray Train loop.

    Args:
        source: a SampleSource, arrays by name, a map-style torch Dataset, a Hugging Face Dataset; or any
            `ray.data.Dataset` with an id column, for which less is promised (`rayprune.engine.data.ray_data`).
        method: such as `rayprune.InfoBatch(prune_ratio=0.5)`.
        num_epochs: of the whole run; schedules and annealing are made for it.
        batch_size: the global batch, all workers together; it must divide by their number.
        seed: with the observations it fixes every selection and order.
        last_batch: `pad` fills the last global batch with rows of weight 0, `drop` leaves it out.
        stream: `ray` sends decoded rows through Ray Data, and workers never open the source; with `local` each worker
            reads its own rows, which is faster for memory-mapped ones, and `dataset` is a token that can't be mapped;
            so it is with `device`, where each worker keeps all decoded rows on its device: for data that fit there.
        id_column: of a `ray.data.Dataset`: each of 0..N−1 once, in any order.

    Raises:
        ConfigError: what the source, the method or the sizes do not allow; one line with the cure.
    """
    filtered = isinstance(source, ray.data.Dataset)
    if filtered and stream == "device":
        raise ConfigError("stream='device' reads samples by id, and a ray.data.Dataset is filtered: leave stream out")
    if filtered and last_batch == "drop":
        raise ConfigError("last_batch='drop' needs a plan, which a ray.data.Dataset is filtered without: use 'pad'")
    if not ray.is_initialized():
        ray.init()  # as a trainer would: the loop's own prints are to be seen
    samples: SampleSource
    if filtered:
        # A copy with a context of its own: two prunes of one Dataset must not share the token in it.
        source = ray.data.Dataset.copy(source, _deep_copy=True)
        samples = IdColumn(source, id_column, "label" if _counts_classes(method) else None)
    else:
        samples = as_source(source)
    _check(samples, method, num_epochs, batch_size, seed, stream)
    samples = stored(samples)
    name = f"rayprune-loop-{uuid.uuid4().hex[:8]}"
    spec = _spec(samples, method, num_epochs, batch_size, seed, last_batch)
    spec = replace(spec, task_rows=task_rows(samples, ray.cluster_resources().get("CPU", 1.0)))
    scores, _ALIVE[name] = LoopClient.start(spec, name)
    if filtered:
        return PrunedData(_filtered(source, scores, id_column), scores, len(samples), GUARANTEES)
    guarantees = f"stream {stream}; plans, order and resume inside epochs are exact, bit for bit"
    return PrunedData(_planned(samples, scores, stream), scores, len(samples), guarantees)


def _filtered(dataset: Any, scores: LoopClient, id_column: str) -> Any:
    # A data set's context, of which it has its own copy, tells the workers which actor is theirs.
    dataset.context.set_config(_KEY, _Told(scores, "filtered"))
    pick = Pick(scores, id_column)
    return dataset.map_batches(pick, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def _planned(samples: SampleSource, scores: LoopClient, stream: Stream) -> Any:
    context = ray.data.DataContext.get_current()
    context.set_config(_KEY, _Told(scores, stream, None if stream == "ray" else samples))
    try:
        return plan_dataset(scores, {"train": samples})
    finally:
        context.remove_config(_KEY)


def _counts_classes(method: Any) -> bool:
    return bool(getattr(method, "class_floor", 0) > 0 or getattr(method, "needs_labels", False))


def _check(
    samples: SampleSource,
    method: Method,
    num_epochs: int,
    batch_size: int,
    seed: int,
    stream: str,
    streams: tuple[str, ...] = ("ray", "local", "device"),
) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ConfigError(f"batch_size {batch_size!r} must be an integer of at least 1: it is the global batch")
    if stream not in streams:
        raise ConfigError(f"stream {stream!r} is not one of {', '.join(streams)} here: choose one of these")
    if stream == "device":
        check_columns(samples.schema)
    few = min(len(samples), 1_000)
    labels = samples.labels[:few] if _counts_classes(method) else None
    Selector(method, few, num_epochs, seed, labels=labels)  # refuses what does not fit before anything starts
    _chosen(method, samples)


def _chosen(method: Method, samples: SampleSource) -> Selection | None:
    return read_chosen(method.path, samples).selection(len(samples)) if isinstance(method, Fixed) else None


def _spec(
    samples: SampleSource, method: Method, num_epochs: int, batch_size: int, seed: int, last_batch: LastBatch
) -> ScoreSpec:
    if last_batch not in ("pad", "drop"):
        raise ConfigError(f"last_batch {last_batch!r} must be 'pad' or 'drop'")
    if last_batch == "drop" and batch_size > len(samples):
        raise ConfigError(f"batch_size {batch_size} is more than the {len(samples)} samples: use last_batch='pad'")
    return ScoreSpec(
        method=method,
        source=SourceMetadata(samples, labelled=_counts_classes(method)),
        num_validation=0,
        # States hold plain numbers only, so that they load with weights_only.
        num_epochs=int(num_epochs),
        seed=int(seed),
        batch_size=int(batch_size),
        last_batch=last_batch,
        row_bytes=samples.schema.row_bytes,
        run_folder=None,
        keep_selections=0,
        labelled=_counts_classes(method),
        chosen=_chosen(method, samples),
    )


def get_dataset_shard(name: str = "train") -> Shard:
    """Return this worker's Shard of a pruned data set, inside a Ray Train loop.

    Args:
        name: its key in `TorchTrainer(datasets={...})`.

    Raises:
        ConfigError: the data set was not made by `prune`, or the trainer's DataConfig does not keep its order.
    """
    iterator = ray.train.get_dataset_shard(name)
    data_context = iterator.get_context() if hasattr(iterator, "get_context") else iterator.context
    told = data_context.get_config(_KEY, None)
    if told is None:
        raise ConfigError(
            f"the data set {name!r} was not made by rayprune.prune: give the trainer datasets={{{name!r}: "
            "pruned.dataset}, or use ray.train.get_dataset_shard for it"
        )
    if told.stream == "ray" and not data_context.execution_options.preserve_order:
        raise ConfigError(
            "the trainer's DataConfig does not keep the order of rows: leave dataset_config out, or set "
            "preserve_order=True in its execution_options"
        )
    scores = told.scores
    context = ray.train.get_context()
    rank = context.get_world_rank()
    terms = scores.terms()
    transport: Transport
    device = _worker_device()
    if told.stream == "local":
        transport = LocalStream({"train": told.source})
    elif told.stream == "device":
        transport = DeviceStream({"train": told.source}, device or torch.device("cpu"))
    else:
        transport = FilteredStream(iterator) if told.stream == "filtered" else RayStream(iterator)
    generation = max(scores.generation() + 1, time.time_ns()) if rank == 0 else 0
    generation = broadcast_from_rank_zero(generation)
    session = ScoringSession(scores, generation, rank, context.get_world_size(), terms.signals)
    return Shard(session, transport, terms, device)


def _worker_device() -> torch.device | None:
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return None if device.type == "cpu" else device


def local_loader(
    source: Any,
    method: Method,
    num_epochs: int,
    batch_size: int,
    seed: int = 0,
    *,
    last_batch: LastBatch = "pad",
    stream: Literal["local", "device"] = "local",
    device: torch.device | str | None = None,
) -> Shard:
    """Prune a data set for a plain PyTorch loop in this process, without a Ray cluster.

    The epochs, batches, weights and scores are those that `prune` gives to one worker.

    Args:
        source, method, num_epochs, batch_size, seed, last_batch: as for `prune`.
        stream: `local` reads rows as they are needed; `device` keeps all decoded rows on the device, where they fit.
        device: where batches go; None leaves them on the host.

    Returns:
        The Shard, whose `epochs()` the loop iterates.

    Raises:
        ConfigError: as `prune`.

    >>> import numpy as np, torch, rayprune
    >>> data = {"x": np.arange(8, dtype=np.float32)}
    >>> shard = rayprune.local_loader(data, rayprune.InfoBatch(), num_epochs=2, batch_size=4)
    >>> for epoch in shard.epochs():
    ...     for batch in epoch.iter_torch_batches():
    ...         loss = epoch.weigh(batch, batch["x"] ** 2)
    >>> sorted(shard.scores())
    ['last_visit', 'loss', 'times_pruned']
    """
    samples = as_source(source)
    _check(samples, method, num_epochs, batch_size, seed, stream, ("local", "device"))
    scores = LoopClient.in_process(_spec(samples, method, num_epochs, batch_size, seed, last_batch))
    where = None if device is None else torch.device(device)
    if where is not None and where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r}: torch finds no GPU here: leave device out, or install its driver")
    terms = scores.terms()
    own = {"train": samples}
    via = DeviceStream(own, where or torch.device("cpu")) if stream == "device" else LocalStream(own)
    return Shard(ScoringSession(scores, next(_generations), 0, 1, terms.signals), via, terms, where)
