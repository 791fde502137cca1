"""`prune`, `get_dataset_shard` and `local_loader`: pruned data for a training loop of the user's own."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.data
import ray.train
import torch
from numpy.typing import NDArray
from ray.train.collective import broadcast_from_rank_zero

from rayprune.core.plan import LastBatch
from rayprune.core.selector import Selector
from rayprune.core.validation import short_repr
from rayprune.engine.cluster import Stream
from rayprune.engine.data.device import DeviceStream, check_columns
from rayprune.engine.data.ids import IS_NUMBERED
from rayprune.engine.data.processes import ProcessStream
from rayprune.engine.data.ray_data import (
    FILTERED_GUARANTEES,
    FilteredStream,
    IdColumn,
    KeepWantedRows,
    SourceMetadata,
    fetched,
    in_object_store,
    plan_dataset,
    task_rows,
)
from rayprune.engine.data.transport import LocalStream, RayStream, Transport
from rayprune.engine.scoring.client import LoopClient
from rayprune.engine.scoring.loop_actor import LoopSettings
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.loop_run import LoopRun
from rayprune.engine.user_loop.audit import audit_loop
from rayprune.engine.user_loop.shard import Shard, check_divisible, check_one_process
from rayprune.errors import ConfigError, DataError, one_line
from rayprune.methods import Method, build_method
from rayprune.methods.fixed import Fixed
from rayprune.paths import as_path, on_filesystem
from rayprune.sources import SampleSource, as_source
from rayprune.sources.adapt import check_options
from rayprune.sources.tables.audits import AuditTable
from rayprune.sources.tables.selections import read_selection_for

_TOKEN = "rayprune"  # the key in a DataContext under which workers find their actor
_CHECKED_SAMPLES = 1_000
# An actor ends when its handle is gone: pruned data keep theirs until `close`.
_HANDLES: dict[str, Any] = {}
_local_generations = itertools.count(1)


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
    num_workers: int = 0,
    world_size: int | None = None,
    run: str | Path | ray.train.RunConfig | None = None,
    audit: bool = False,
    **source_options: Any,
) -> PrunedData:
    """Prune a dataset for a Ray Train loop.

    Args:
        source: a map-style torch Dataset, a Hugging Face Dataset, a dict of arrays of one length, or any rayprune
            source; or a `ray.data.Dataset` with an id column, which has weaker guarantees (its own order, and it
            resumes at the end of an epoch).
        method: the selection method, such as `rayprune.InfoBatch(prune_ratio=0.5)`.
        num_epochs: the number of epochs of the whole run; schedules and annealing depend on it.
        batch_size: rows of a global batch, over all workers; must be a multiple of their number.
        seed: together with the recorded losses it determines every selection and every order.
        last_batch: `pad` fills the last global batch with rows of weight 0; `drop` leaves the batch out.
        stream: how rows reach the workers. `ray` sends decoded rows through Ray Data; workers never open the source.
            `local` lets each worker read its own rows, which is faster for arrays and memory maps. `device` keeps all
            decoded rows on each worker's device, for data that fit. With `local` and `device`, `dataset` is a token
            that cannot be mapped.
        id_column: the name of a `ray.data.Dataset`'s id column, which holds each of 0..N−1 once, in any order;
            `with_ids` adds one.
        num_workers: with `stream="local"`, each worker reads its rows in so many processes, as a DataLoader does; for
            Datasets whose items take time. 0 reads them in a thread.
        world_size: the trainer's number of workers; if given, batch_size is checked here and not when they start.
        run: a run folder to write metrics and scores to, for `rayprune report`, `show` and `select`; on storage that
            every machine sees, such as `s3://bucket/runs/mine`. The trainer's RunConfig names the folder
            `storage_path/name` on its storage. `Epoch.log` adds your own metrics. None writes nothing.
        audit: record every visit for `PrunedData.audit` and `Shard.audit`: `weigh` then needs the logits, and states
            hold the mean probabilities of all samples, N × C float32.
        **source_options: how the source is read. `label_column` for any data; also `columns`, `cache` and `cache_dir`
            for a torch or Hugging Face Dataset, `image_column` and `image_size` for a Hugging Face Dataset. See
            `rayprune.sources.columns_from_torch` and `columns_from_huggingface`.

    Returns:
        The pruned data. Give them to the trainer and call `get_dataset_shard` in its loop.

    Raises:
        ConfigError: the method or an argument cannot work with this source.
        DataError: the source cannot be read.
        RunFolderError: the run folder cannot be written, or holds another run.

    Example::

        import numpy as np, ray.train, torch, rayprune
        from ray.train import ScalingConfig
        from ray.train.torch import TorchTrainer

        x = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
        data = {"x": x, "label": (x[:, 0] > 0).astype(np.int64)}

        def train_loop():
            model = ray.train.torch.prepare_model(torch.nn.Linear(8, 2))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            shard = rayprune.get_dataset_shard("train")
            for epoch in shard.epochs():
                for batch in epoch.iter_torch_batches():
                    logits = model(batch["x"])
                    losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
                    loss = epoch.weigh(batch, losses)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

        pruned = rayprune.prune(data, rayprune.InfoBatch(prune_ratio=0.5), num_epochs=10, batch_size=64, world_size=2)
        trainer = TorchTrainer(
            train_loop, scaling_config=ScalingConfig(num_workers=2), datasets={"train": pruned}
        )
        trainer.fit()
        print(pruned.scores()["loss"])
    """
    if world_size is not None:
        check_divisible(_checked_batch_size(batch_size), world_size)
    spec_of = partial(
        _score_spec, method=method, num_epochs=num_epochs, batch_size=batch_size, seed=seed, run=run, audit=audit
    )
    if isinstance(source, ray.data.Dataset):
        _check_filtered(last_batch, stream, num_workers)
        return _filtered(source, id_column, _needs_labels(method) or audit, spec_of, source_options)
    samples = as_source(source, **source_options)
    _check_stream(stream, ("ray", "local", "device"), samples, num_workers)
    spec = spec_of(samples, last_batch=last_batch, origin=(type(source).__name__, stream))
    _start_ray()
    spec = replace(spec, task_rows=task_rows(samples, ray.cluster_resources().get("CPU", 1.0)))
    scores = _start_actor(spec)
    samples = in_object_store(samples)
    ragged = tuple(name for name, column in samples.schema.columns.items() if column.is_ragged)
    token = _Token(scores, stream, None if stream == "ray" else samples, num_workers, ragged)
    guarantees = f"stream {stream}; plans, order and resume inside epochs are exact, bit for bit"
    return PrunedData(_planned_dataset(samples, token), scores, len(samples), guarantees, samples)


class PrunedData:
    """A dataset whose samples are selected anew for every epoch.

    It goes to a trainer: `TorchTrainer(..., datasets={"train": pruned})`.

    Attributes:
        dataset: the same as a `ray.data.Dataset`. It may be mapped if the map keeps the rows, their order and the
            columns `id` and `weight`: `map_batches(f, batch_size=None)`.
        num_samples: N.
    """

    def __init__(
        self, dataset: Any, scores: LoopClient, num_samples: int, guarantees: str, source: SampleSource | None = None
    ) -> None:
        self.dataset, self.num_samples = dataset, num_samples
        self._scores, self._guarantees, self._source = scores, guarantees, source

    def __repr__(self) -> str:
        return f"PrunedData({self.num_samples} samples; {self._guarantees})"

    def __getattr__(self, name: str) -> Any:
        hint = f": use pruned.dataset.{name}" if hasattr(ray.data.Dataset, name) else ""
        raise AttributeError(f"PrunedData has no attribute {name!r}{hint}")

    def __call__(self) -> Any:
        """Return the dataset, which Ray Train asks of any callable among its datasets."""
        return self.dataset

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores, `last_visit` and `times_pruned`, name → (N,); NaN for unvisited samples."""
        return self._scores.scores()

    def audit(self, *, rule: str = "ensemble", at: float = 0.5, duplicates: bool = True) -> AuditTable:
        """Return what is probably wrong with the data, by the training visits; see `Shard.audit`.

        Call it after the training. The rows of a `ray.data.Dataset` are not compared.
        """
        return audit_loop(self._scores, self._source, rule=rule, at=at, duplicates=duplicates, write=True)

    def close(self) -> None:
        """End the ScoreActor now; otherwise it ends with this process."""
        for handle in _HANDLES.pop(self._scores.name, []):
            ray.kill(handle)


def get_dataset_shard(name: str = "train") -> Shard:
    """Return this worker's Shard of a pruned dataset, inside a Ray Train loop.

    Args:
        name: the dataset's key in `TorchTrainer(datasets={...})`.

    Raises:
        ConfigError: `prune` did not make the dataset, or the trainer's DataConfig does not keep its order.
    """
    iterator = ray.train.get_dataset_shard(name)
    data_context = iterator.get_context() if hasattr(iterator, "get_context") else iterator.context
    token: _Token | None = data_context.get_config(_TOKEN, None)
    if token is None:
        raise ConfigError(
            f"the dataset {name!r} was not made by rayprune.prune: give the trainer datasets={{{name!r}: pruned}}, or "
            "use ray.train.get_dataset_shard for it"
        )
    needs_order = token.stream == "ray" or data_context.get_config(IS_NUMBERED, False)
    if needs_order and not data_context.execution_options.preserve_order:
        raise ConfigError(
            "the trainer's DataConfig does not keep the order of rows: leave dataset_config out, or set "
            "preserve_order=True in its execution_options"
        )
    context, device = ray.train.get_context(), _worker_device()
    rank = context.get_world_rank()
    settings = token.scores.settings()
    # The clock keeps generations rising if the actor restarts, the actor if the next clock is behind.
    generation = broadcast_from_rank_zero(max(token.scores.generation() + 1, time.time_ns()) if rank == 0 else 0)
    session = ScoringSession(token.scores, generation, rank, context.get_world_size(), settings.signals)
    return Shard(session, _transport(token, settings, iterator, device), settings, device, token.source)


def local_loader(
    source: Any,
    method: Method,
    num_epochs: int,
    batch_size: int,
    seed: int = 0,
    *,
    last_batch: LastBatch = "pad",
    stream: Literal["local", "device"] = "local",
    num_workers: int = 0,
    device: torch.device | str | None = None,
    run: str | Path | ray.train.RunConfig | None = None,
    audit: bool = False,
    **source_options: Any,
) -> Shard:
    """Prune a dataset for a plain PyTorch loop in this process, without Ray.

    The epochs, batches, weights and scores are those that `prune` gives one worker.

    Args:
        source, method, num_epochs, batch_size, seed, last_batch: as for `prune`.
        stream: `local` reads rows as they are needed; `device` keeps all decoded rows on the device.
        num_workers: with stream `local`, read rows in so many processes, as a DataLoader does; for Datasets whose items
            take time. 0 reads them in a thread.
        device: where batches go; None leaves them on the host.
        run: a run folder to write metrics and scores to, for `rayprune report`, `show` and `select`. `Epoch.log` adds
            your own metrics. None writes nothing.
        audit: record every visit for `Shard.audit`, as for `prune`.
        **source_options: as for `prune`.

    Returns:
        The Shard, whose `epochs()` the loop iterates.

    Raises:
        ConfigError: as for `prune`, there is no such device, or several processes train together (torchrun, DDP).
        DataError: the source cannot be read.
        RunFolderError: the run folder cannot be written, or holds another run.

    >>> import numpy as np, torch, rayprune
    >>> data = {"x": np.arange(8, dtype=np.float32)}
    >>> shard = rayprune.local_loader(data, rayprune.InfoBatch(), num_epochs=2, batch_size=4)
    >>> for epoch in shard.epochs():
    ...     for batch in epoch.iter_torch_batches():
    ...         loss = epoch.weigh(batch, batch["x"] ** 2)
    >>> sorted(shard.scores())
    ['last_visit', 'loss', 'times_pruned']
    """
    check_one_process()
    samples = as_source(source, **source_options)
    _check_stream(stream, ("local", "device"), samples, num_workers)
    spec_of = partial(
        _score_spec, method=method, num_epochs=num_epochs, batch_size=batch_size, seed=seed, run=run, audit=audit
    )
    spec = spec_of(samples, last_batch=last_batch, origin=(type(source).__name__, stream))
    target = None if device is None else torch.device(device)
    if target is not None and target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r}: torch finds no GPU here: leave device out, or install its driver")
    token = _Token(LoopClient.in_process(spec), stream, samples, num_workers)
    loop_settings = token.scores.settings()
    session = ScoringSession(token.scores, next(_local_generations), 0, 1, loop_settings.signals)
    return Shard(session, _transport(token, loop_settings, None, target), loop_settings, target, samples)


@dataclass(frozen=True)
class _Token:
    """Tells a worker where the scores of its pruned data are and how its rows come."""

    scores: LoopClient
    stream: Stream | Literal["filtered"]
    source: SampleSource | None = None
    num_workers: int = 0
    ragged: tuple[str, ...] = ()


def _transport(token: _Token, settings: LoopSettings, iterator: Any, device: torch.device | None) -> Transport:
    if token.stream == "filtered":
        return FilteredStream(iterator)
    if token.stream == "ray":
        return RayStream(iterator, ragged=token.ragged)
    assert token.source is not None
    if token.num_workers:
        return ProcessStream(fetched(token.source), token.num_workers, settings.identity["seed"])
    sources = {"train": token.source}
    return DeviceStream(sources, device or torch.device("cpu")) if token.stream == "device" else LocalStream(sources)


def _start_ray() -> None:
    if not ray.is_initialized():
        ray.init()  # as a trainer would: the loop's own prints must show


def _start_actor(spec: ScoreSpec) -> LoopClient:
    name = f"rayprune-loop-{uuid.uuid4().hex[:8]}"
    scores, _HANDLES[name] = LoopClient.start(spec, name)
    return scores


def _filtered(
    dataset: Any, id_column: str, labeled: bool, spec_of: Callable[..., ScoreSpec], options: dict[str, Any]
) -> PrunedData:
    """Prune a ray.data.Dataset by a filter on its ids."""
    check_options("a ray.data.Dataset", options, ["label_column"])
    _start_ray()
    # A copy with its own context: two prunes of one Dataset must not share a token.
    dataset = ray.data.Dataset.copy(dataset, _deep_copy=True)
    samples = IdColumn(dataset, id_column, labeled, **options)
    scores = _start_actor(spec_of(samples, last_batch="pad", origin=("ray.data.Dataset", "filtered")))
    dataset.context.set_config(_TOKEN, _Token(scores, "filtered"))
    keep = KeepWantedRows(scores, id_column)
    kept = dataset.map_batches(keep, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    return PrunedData(kept, scores, len(samples), FILTERED_GUARANTEES)


def _planned_dataset(samples: SampleSource, token: _Token) -> Any:
    context = ray.data.DataContext.get_current()
    context.set_config(_TOKEN, token)
    try:
        return plan_dataset(token.scores, {"train": samples})
    finally:
        context.remove_config(_TOKEN)


def _worker_device() -> torch.device | None:
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device()
    return None if device.type == "cpu" else device


def _needs_labels(method: Any) -> bool:
    return bool(getattr(method, "class_floor", 0) > 0 or getattr(method, "needs_labels", False))


def _check_stream(stream: str, streams: tuple[str, ...], samples: SampleSource, num_workers: int) -> None:
    if stream not in streams:
        raise ConfigError(f"stream {short_repr(stream)} is not one of {', '.join(streams)}: choose one of these")
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
        raise ConfigError(f"num_workers {short_repr(num_workers)} must be 0 or a number of processes that read rows")
    if num_workers and stream != "local":
        raise ConfigError(f"num_workers {num_workers} needs stream='local': with {stream!r}, no process reads rows")
    if stream == "device":
        check_columns(samples.schema)


def _check_filtered(last_batch: str, stream: str, num_workers: int) -> None:
    if stream != "ray" or num_workers:
        given = f"num_workers {num_workers}" if stream == "ray" else f"stream={stream!r}"
        raise ConfigError(f"{given} reads samples by id, and a ray.data.Dataset is filtered: leave it out")
    if last_batch == "drop":
        raise ConfigError("last_batch='drop' needs a plan, and a ray.data.Dataset is filtered without one: use 'pad'")


def _checked_batch_size(batch_size: Any) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ConfigError(
            f"batch_size {short_repr(batch_size)} must be an integer of at least 1: it is the global batch"
        )
    return int(batch_size)


def _score_spec(
    samples: SampleSource,
    *,
    method: Method,
    num_epochs: int,
    batch_size: int,
    seed: int,
    run: str | Path | ray.train.RunConfig | None,
    audit: bool,
    last_batch: LastBatch,
    origin: tuple[str, str],
) -> ScoreSpec:
    """Check the arguments of a loop and return what its ScoreActor is built from.

    `origin` names the data and the stream, for the run folder.
    """
    batch_size = _checked_batch_size(batch_size)
    if last_batch not in ("pad", "drop"):
        raise ConfigError(f"last_batch {short_repr(last_batch)} must be 'pad' or 'drop'")
    if batch_size > len(samples):
        raise ConfigError(f"batch_size {batch_size} is more than the {len(samples)} samples: give at most that many")
    if isinstance(method, Method) and method.step()[0] == "in_batch":
        raise ConfigError(
            f"method {method.name!r} picks rows inside the train step of rayprune train: in a loop of your own, use "
            "another method"
        )
    labeled, num_checked = _needs_labels(method), min(len(samples), _CHECKED_SAMPLES)
    labels = samples.labels[:num_checked] if labeled else None
    Selector(method, num_checked, num_epochs, seed, labels=labels)  # refuses a bad method, number of epochs or seed
    if audit:
        _check_labels(samples)
    spec = ScoreSpec(
        method=method,
        source=SourceMetadata(samples, labeled=labeled or audit),
        num_validation=0,
        # Plain ints, so that saved states load with weights_only.
        num_epochs=int(num_epochs),
        seed=int(seed),
        batch_size=batch_size,
        last_batch=last_batch,
        row_bytes=samples.schema.row_bytes,
        run_folder=None,
        keep_selections=0,
        labeled=labeled,
        chosen=read_selection_for(method.path, samples).selection(len(samples)) if isinstance(method, Fixed) else None,
        audits=audit,
    )
    return _with_run(spec, run, *origin)


def _check_labels(samples: SampleSource) -> None:
    """Refuse data without classes, which no audit can judge."""
    try:
        labels = samples.labels
    except DataError as error:
        cure = "name their column by label_column=, or leave audit out"
        raise ConfigError(f"audit=True needs the labels of the data ({one_line(error)}): {cure}") from None
    if labels.min(initial=0) < 0:
        raise ConfigError(f"audit=True needs labels from 0 on, and the lowest is {labels.min()}: number the classes")


def _with_run(
    spec: ScoreSpec, folder: str | Path | ray.train.RunConfig | None, source_name: str, stream: str
) -> ScoreSpec:
    """Return a loop's spec with its run folder, which is checked; the means of all losses are then recorded."""
    if folder is None:
        return spec
    if isinstance(folder, ray.train.RunConfig):
        path = on_filesystem(str(folder.storage_path), folder.storage_filesystem) / str(folder.name)
    else:
        path = as_path(folder)
    path = path.absolute()
    method = build_method(spec.method)
    config = {
        "run": {"name": path.name, "storage_path": str(path.parent)},
        "data": {"source": source_name},
        "model": {"name": "own loop"},
        "method": method.to_config(),
        "train": {"epochs": spec.num_epochs, "batch_size": spec.batch_size, "seed": spec.seed},
    }
    facts = {"seed": spec.seed, "fingerprint": spec.source.fingerprint, "stream": stream}
    run = LoopRun(path, uuid.uuid4().hex, config, facts)
    run.check()
    return replace(spec, loop_run=run, record=("loss",))
