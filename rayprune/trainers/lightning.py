"""Selection in Lightning: a callback that plans the epochs, brings their batches and weighs their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from numpy.typing import ArrayLike
from torch import Tensor

from rayprune.core.method import Method
from rayprune.core.plan import LastBatch
from rayprune.core.selector import Selector
from rayprune.errors import ConfigError, UsageError
from rayprune.trainers.loader import PlannedLoader
from rayprune.trainers.run import PlannedRun
from rayprune.trainers.schedules import StepPacer, scale_learning_rates


class PruneCallback(Callback):
    """Select the samples of every epoch.

    Give it to the Trainer, take the training loader from `loader`, and let `weigh` average the losses. Epochs may have
    any length; validation, accumulation, DDP and checkpoints work as without it. Checkpoints hold its state, and a
    resumed run goes on inside the epoch.

    Args:
        method: the selection method, such as `rayprune.InfoBatch()`.
        seed: with the losses, it determines every selection and every order.
        labels: (N,) integers from 0, for methods that need classes.
        last_batch: `pad` trains on all kept samples; `drop` leaves out an epoch's incomplete last batch.

    Example::

        pruning = rayprune.lightning.PruneCallback(rayprune.InfoBatch(prune_ratio=0.5))

        class Model(LightningModule):
            def train_dataloader(self):
                return pruning.loader(dataset, batch_size=32)

            def training_step(self, batch, batch_idx):
                x, y, ids = batch
                return pruning.weigh(batch, cross_entropy(self(x), y, reduction="none"))

        Trainer(max_epochs=10, callbacks=[pruning]).fit(Model())
        pruning.selector.scores()["loss"]
    """

    def __init__(
        self, method: Method, *, seed: int = 0, labels: ArrayLike | None = None, last_batch: LastBatch = "pad"
    ) -> None:
        self._method, self._seed, self._labels, self._last_batch = method, seed, labels, last_batch
        self._trainer: Trainer | None = None
        self._run: PlannedRun | None = None
        self._loader: _Loader | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._pacer: StepPacer | None = None

    def loader(
        self, dataset: Any, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Any
    ) -> PlannedLoader:
        """Return the training loader: pass it to `fit`, or return it from `train_dataloader`.

        Args:
            dataset: a map-style Dataset.
            batch_size: B, the rows of each process's batch, as for a DataLoader.
            collate_fn: as for a DataLoader; it must keep the order of its items.
            **options: for the DataLoader, such as num_workers.

        Returns:
            The loader. Its batches end with their ids: the key `id` of a mapping, the last element of a tuple.
        """
        self._loader = _Loader(self, dataset, collate_fn, **options)
        self._loader.batch_size = batch_size
        self._connect()
        return self._loader

    def weigh(self, batch: Any, losses: Tensor, **outputs: Any) -> Tensor:
        """Record a batch's losses and return their weighted mean, the loss of `training_step`.

        Args:
            batch: as `training_step` got it, with the ids.
            losses: (b,), not reduced.
            **outputs: `logits`, `targets`, `embeddings`, `head`, `mask`, `token_axis`, as for `rayprune.Epoch.weigh`.
        """
        return self.run.weigh(batch, losses, **outputs)

    @property
    def run(self) -> PlannedRun:
        """The planned run: plan, position, progress.

        Raises:
            UsageError: `fit` has not begun, or `loader` was not called.
        """
        if self._loader is None and self._trainer is not None:
            self._trainer.fit_loop.setup_data()
        if self._run is None:
            raise UsageError("there is no plan yet: take the training loader from loader(), and call fit")
        return self._run

    @property
    def selector(self) -> Selector:
        """The Selector, which has the scores and the current epoch's selection."""
        return self.run.selector

    @property
    def num_steps(self) -> int:
        """The steps that a learning-rate schedule must be built for; the callback advances it by the progress."""
        return self.run.num_full_updates

    def _connect(self) -> None:
        """Make the run once both the trainer and the data are known; a loader that is made again keeps it."""
        trainer, loader = self._trainer, self._loader
        if trainer is None or loader is None:
            return
        run, size = self._run, (len(loader.dataset), loader.batch_size)
        if run is None:
            run = self._new_run(trainer, *size)
        elif (run.selector.num_samples, run.batch_rows) != size:
            raise ConfigError(
                f"a loader of {size[0]} samples in batches of {size[1]} replaces one of {run.selector.num_samples} in "
                f"batches of {run.batch_rows}: a run keeps its data and its batch size"
            )
        loader.run = self._run = run

    def _new_run(self, trainer: Trainer, num_samples: int, batch_size: int) -> PlannedRun:
        has_epochs = trainer.max_epochs is not None and trainer.max_epochs >= 1
        if not has_epochs or (trainer.max_steps not in (-1, None) and not trainer.fast_dev_run):  # type: ignore[attr-defined]
            raise ConfigError("selection is planned by epochs: give the Trainer max_epochs, and no max_steps")
        run = PlannedRun(
            self._method,
            num_samples,
            trainer.max_epochs or 1,
            batch_size,
            seed=self._seed,
            labels=self._labels,
            last_batch=self._last_batch,
            accumulation=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        if self._loaded is not None:
            run.load_state_dict(self._loaded)
        return run

    # What follows are the hooks of a Callback.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trainer, self._run, self._loaded = trainer, None, None
            self._connect()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self.run
        _check_trainer(trainer, run)
        if trainer.limit_train_batches not in (1.0, None) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError("limit_train_batches cuts the plan of an epoch: leave it out, or use a smaller dataset")
        self._pacer = StepPacer(run)
        for optimizer in trainer.optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)
            if isinstance(inner, torch.optim.Optimizer):
                scale_learning_rates(inner, lambda: run.lr_scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._pacer is not None
        # Lightning has made one step of each schedule that counts steps.
        for _ in range(self._pacer.steps() - 1):
            for config in trainer.lr_scheduler_configs:
                if config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau:
                    config.scheduler.step()  # type: ignore[call-arg]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return position and scores; collective, as saving a checkpoint is."""
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the data are known."""
        self._loaded = state_dict or None
        if self._loaded is not None and self._run is not None:
            self._run.load_state_dict(self._loaded)


def _check_trainer(trainer: Trainer, run: PlannedRun) -> None:
    """Refuse what would train other epochs than the plan's, or leave a schedule at the wrong place."""
    if trainer.current_epoch > run.resume_epoch:
        raise ConfigError(
            f"the Trainer goes on at epoch {trainer.current_epoch} without the selection's state: give fit the "
            "checkpoint of a run with this callback (ckpt_path=…), or make a new Trainer"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError("GradientAccumulationScheduler changes the steps of an epoch: use accumulate_grad_batches")
    for config in trainer.lr_scheduler_configs:
        if config.interval != "step":
            continue
        if config.frequency != 1:
            raise ConfigError(f"a schedule with frequency {config.frequency} can't follow the plan: use frequency 1")
        if _length_of(config.scheduler) == -1:
            raise ConfigError(
                "a schedule was built for -1 steps, as trainer.estimated_stepping_batches says of epochs that differ: "
                "build it for the callback's num_steps"
            )


def _length_of(scheduler: Any) -> Any:
    """Return the steps that a schedule was built for, as far as it tells."""
    names = ("total_iters", "total_steps", "T_max")
    given = [getattr(scheduler, name, None) for name in names]
    for function in getattr(scheduler, "lr_lambdas", ()):
        given.append(getattr(function, "keywords", {}).get("num_training_steps"))
    return next((length for length in given if length is not None), None)


class _Loader(PlannedLoader):
    """The loader of the current epoch; without a length, which Lightning would read only once."""

    batch_size = 1

    def __init__(self, callback: PruneCallback, dataset: Any, collate_fn: Any, **options: Any) -> None:
        super().__init__(None, dataset, collate_fn, **options)
        self._callback = callback

    def __iter__(self) -> Iterator[Any]:
        run, trainer = self.planned, self._callback._trainer
        assert trainer is not None
        # Lightning takes the first iterator before it restores its epoch. If the state was saved after an epoch's last
        # batch, it only ends that epoch, and then trains the next one.
        epoch = max(trainer.current_epoch, run.resume_epoch)
        if epoch >= run.selector.num_epochs:
            return iter(())
        run.begin_epoch(epoch)
        return super().__iter__()
