"""Selection in a loop with Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState, PartialState
from accelerate.utils import send_to_device
from numpy.typing import ArrayLike

from rayprune.core.method import Method
from rayprune.core.plan import LastBatch
from rayprune.core.selector import Selector
from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError, UsageError
from rayprune.trainers.loader import PlannedLoader
from rayprune.trainers.run import PlannedRun
from rayprune.trainers.schedules import StepPacer


class PrunedLoader(PlannedLoader, DataLoaderStateMixin):
    """The training loader of a loop with an Accelerator; it selects the samples of every epoch.

    It gives each process its own rows, on its device. `accelerator.prepare` leaves it as it is.

    Args:
        dataset: a map-style Dataset.
        method: the selection method, such as `rayprune.InfoBatch()`.
        num_epochs: the epochs of the whole run.
        batch_size: B, the rows of each process's batch, as for a DataLoader.
        collate_fn: as for a DataLoader; it must keep the order of its items.
        seed: with the losses, it determines every selection and every order.
        labels: (N,) integers from 0, for methods that need classes.
        last_batch: `pad` trains on all kept samples; `drop` leaves out an epoch's incomplete last batch.
        **options: for the DataLoader, such as num_workers.

    Example::

        accelerator = Accelerator(gradient_accumulation_steps=2)
        loader = rayprune.accelerate.PrunedLoader(dataset, rayprune.InfoBatch(), num_epochs=10, batch_size=32)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(loader)
        for epoch in loader.epochs():
            for batch in loader:
                with accelerator.accumulate(model):
                    x, y, ids = batch
                    loss = loader.weigh(batch, cross_entropy(model(x), y, reduction="none"))
                    accelerator.backward(loss)
                    optimizer.step()
                    loader.step_schedule(scheduler)
                    optimizer.zero_grad()
    """

    def __init__(
        self,
        dataset: Any,
        method: Method,
        num_epochs: int,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        seed: int = 0,
        labels: ArrayLike | None = None,
        last_batch: LastBatch = "pad",
        **options: Any,
    ) -> None:
        super().__init__(None, dataset, collate_fn, **options)
        if isinstance(num_epochs, bool) or not isinstance(num_epochs, int):
            raise ConfigError(f"num_epochs {short_repr(num_epochs)} must be an integer of at least 1")
        state = PartialState()
        self._device, self.gradient_state = state.device, GradientState()
        self.run = PlannedRun(
            method,
            len(dataset),
            num_epochs,
            batch_size,
            seed=seed,
            labels=labels,
            last_batch=last_batch,
            accumulation=self.gradient_state.num_steps,
            rank=state.process_index,
            world_size=state.num_processes,
        )
        self._pacer = StepPacer(self.run)
        self._is_open = False

    @property
    def selector(self) -> Selector:
        """The Selector, which has the scores and the current epoch's selection."""
        return self.planned.selector

    @property
    def num_steps(self) -> int:
        """The steps that a learning-rate schedule must be built for; `step_schedule` advances it by the progress."""
        return self.planned.num_full_updates

    @property
    def progress(self) -> float:
        """The fraction of the run's planned optimizer steps that were made, in [0, 1]."""
        return self.planned.progress

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs that are left; when the body ends, the next epoch's samples are selected.

        Raises:
            UsageError: the epochs were iterated before, or the Accelerator was made after the loader.
        """
        run = self.planned
        if run.epoch > run.resume_epoch:
            raise UsageError("epochs() can be iterated once: make a new loader for another run")
        if run.accumulation != self.gradient_state.num_steps:
            raise UsageError(
                "the loader was made before the Accelerator, which sets the accumulation: make it after it"
            )
        for epoch in range(run.resume_epoch, run.selector.num_epochs):
            run.begin_epoch(epoch)
            self._pacer = StepPacer(run) if epoch == run.resume_epoch else self._pacer
            self._is_open = True
            try:
                yield epoch
            finally:
                self._is_open = False
            run.end_epoch()

    def __len__(self) -> int:
        """Return the number of batches that are left of the current epoch."""
        return self.planned.num_batches - self.planned.step

    def __iter__(self) -> Iterator[Any]:
        """Yield the current epoch's batches, on the device; they end with their ids.

        Raises:
            UsageError: not in the body of `for epoch in loader.epochs()`.
        """
        if not self._is_open:
            raise UsageError("iterate the loader in the body of `for epoch in loader.epochs()`")
        self.begin()
        try:
            batches = super().__iter__()
            # One ahead: `accumulate` must know the last batch of an epoch before it is trained.
            batch = next(batches, None)
            while batch is not None:
                following = next(batches, None)
                self.end_of_dataloader = following is None
                yield send_to_device(batch, self._device)
                batch = following
        finally:
            self.end()

    def weigh(self, batch: Any, losses: Any, **outputs: Any) -> Any:
        """Record a batch's losses and return their weighted mean, for `accelerator.backward`.

        Args:
            batch: as the loader gave it, with the ids.
            losses: (b,), not reduced.
            **outputs: `logits`, `targets`, `embeddings`, `head`, `mask`, `token_axis`, as for `rayprune.Epoch.weigh`.
        """
        return self.planned.weigh(batch, losses, **outputs)

    def step_schedule(self, scheduler: Any) -> None:
        """Advance a schedule of `num_steps` steps by the progress; call it after `optimizer.step()`.

        Args:
            scheduler: a scheduler of torch or transformers that counts steps, not prepared by the Accelerator.
        """
        inner = getattr(scheduler, "scheduler", scheduler)
        for _ in range(self._pacer.steps()):
            inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Return position and scores; collective, as `accelerator.save_state` is."""
        return self.planned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, before `epochs()`; `accelerator.load_state` calls it.

        Raises:
            UsageError: an epoch is running.
            ConfigError, RunFolderError: the state is of another run.
        """
        if self._is_open:
            raise UsageError("load a state before `for epoch in loader.epochs()`")
        self.planned.load_state_dict(state)

    @property
    def sampler(self) -> Any:
        # skip_first_batches asks for it.
        raise ConfigError("leave skip_first_batches out: after load_state, the loader goes on inside the epoch itself")

    @property
    def total_batch_size(self) -> int:
        # DataLoaderStateMixin asks for it.
        return self.planned.global_rows
