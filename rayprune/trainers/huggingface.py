"""Selection in the Trainer of Hugging Face transformers, and in those built on it, such as TRL's SFTTrainer.

    class Trainer(rayprune.huggingface.PrunedTrainer, SFTTrainer): ...

The Trainer keeps its loop. This class brings the batches of each epoch's plan, weighs their losses, and corrects what
the loop takes for constant: the number of steps of an epoch, the total, the schedule's position, the resume position.
Tried with transformers 4.57 and 5.23; they differ in where an epoch's length is read.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rayprune.core.method import Method
from rayprune.core.selector import Selector
from rayprune.errors import ConfigError, RunFolderError, UsageError
from rayprune.nn.signals import signals_per_sample
from rayprune.trainers.example_losses import ExampleLosses, example_losses, get_output
from rayprune.trainers.loader import PlannedLoader, check_map_style
from rayprune.trainers.run import PlannedBatch, PlannedRun, check_method
from rayprune.trainers.schedules import StepPacer, scale_learning_rates

logger = logging.getLogger(__name__)

STATE_FILE = "rayprune_selection.pt"
_ID_KEY = "rayprune_id"
# Relative difference of the model's loss to ours, which is computed in float32.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-4, 1e-2


class PrunedTrainer(Trainer):
    """A Trainer that selects the samples of every epoch; use it alone, or as the first base of a subclass.

    Sample ids are positions in `train_dataset`, as it is after the trainer has prepared it.

    Args:
        *args, **kwargs: as for the Trainer.
        method: the selection method, such as `rayprune.InfoBatch()`. Methods of whole sequences need `loss` only.
        labels: (N,) integers from 0, for methods that need classes; default: the column `label` or `labels`.

    Attributes:
        run: the planned run, from `train()` on: plan, position, progress.
        selector: has the scores, `trainer.selector.scores()`.

    Raises:
        ConfigError: an argument that no pruned run can follow, such as max_steps or packing.

    Example::

        trainer = rayprune.huggingface.PrunedTrainer(
            model=model, args=args, train_dataset=dataset, method=rayprune.InfoBatch(prune_ratio=0.5)
        )
        trainer.train()
        trainer.selector.scores()["loss"]
    """

    def __init__(self, *args: Any, method: Method, labels: ArrayLike | None = None, **kwargs: Any) -> None:
        if not isinstance(method, Method):
            raise ConfigError(f"method must be a rayprune method such as InfoBatch(), got {type(method).__name__}")
        check_method(method)
        _check_packing(kwargs.get("args", args[1] if len(args) > 1 else None))  # before a trainer packs the data
        if kwargs.get("train_dataset") is not None:
            check_map_style(kwargs["train_dataset"])
        super().__init__(*args, **kwargs)
        self._method, self._labels = method, labels
        self._run: PlannedRun | None = None
        self._batch: PlannedBatch | None = None
        self._loss_rule, self._has_tokens = "", None  # type: str, bool | None
        self._resume_from: Path | None = None
        self._loader: _Loader | None = None
        _check_arguments(self)
        self.add_callback(_Follow(self))

    @property
    def run(self) -> PlannedRun:
        """The planned run: plan, position, progress.

        Raises:
            UsageError: before `train()`.
        """
        if self._run is None:
            raise UsageError("there is no plan yet, and no scores: call train() first")
        return self._run

    @property
    def selector(self) -> Selector:
        """The Selector, which has the scores and the current epoch's selection."""
        return self.run.selector

    def example_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> ExampleLosses:
        """Return the loss of every example of a batch; override it for a model whose loss is not a cross entropy.

        Args:
            outputs: the model's outputs.
            inputs: the batch, with labels, on the device.
        """
        assert self._batch is not None
        config = getattr(self.model, "config", None)
        if "labels" not in inputs and (name := next((each for each in self.label_names if each in inputs), None)):
            inputs = {**inputs, "labels": inputs[name]}
        return example_losses(
            outputs,
            inputs,
            max(1, self._batch.ids.size),
            shifts_labels=_shifts_labels(self),
            label_smoothing=0.0 if self.label_smoother is None else float(self.args.label_smoothing_factor),
            problem_type=getattr(config, "problem_type", None),
        )

    # What follows overrides methods of the Trainer.

    def get_train_dataloader(self) -> Any:
        """Return a loader of the plan's batches; a run starts, or goes on from a checkpoint."""
        if self._loader is not None:
            return self._loader  # that of the running training
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ConfigError("training needs samples: give train_dataset=")
        run = self._run = self._new_run(dataset)
        self._loss_rule, self._has_tokens = "", None
        if self._resume_from is not None:
            run.load_state_dict(_read_state(self._resume_from))
        run.begin_epoch(min(run.resume_epoch, run.selector.num_epochs - 1))
        collate_fn: Any = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate_fn = self._get_collator_with_removed_columns(collate_fn, description="training")
        args = self.args
        options: dict[str, Any] = {}
        if args.dataloader_num_workers:
            options = {"prefetch_factor": args.dataloader_prefetch_factor}
            options["persistent_workers"] = args.dataloader_persistent_workers
        loader = _Loader(
            run,
            dataset,
            collate_fn,
            id_key=_ID_KEY,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            **options,
        )
        if self.is_in_train:
            self._loader = loader
        return loader

    def _new_run(self, dataset: Any) -> PlannedRun:
        args = self.args
        labels = self._labels
        if labels is None and (self._method.class_floor > 0 or self._method.needs_labels):
            labels = _labels_of(dataset)
        return PlannedRun(
            self._method,
            len(dataset),
            args.num_train_epochs,
            self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            labels=labels,
            last_batch="drop" if args.dataloader_drop_last else "pad",
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # The plan knows where to go on; the loop would skip batches of another length.
        resume = kwargs.get("resume_from_checkpoint", args[2] if len(args) > 2 else None)
        self._resume_from = Path(resume) if resume else None
        skips, self.args.ignore_data_skip, self._loader = self.args.ignore_data_skip, True, None
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.ignore_data_skip, self._resume_from, self._loader = skips, None, None

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loop's constants, with those that a plan changes.

        A resumed loop takes its epoch from global_step // (steps per epoch): a divisor is given that leads to the
        plan's epoch, or to none if the run had ended. The total is that of a run without pruning; the schedule is built
        for it.
        """
        values: list[Any] = list(super().set_initial_training_values(*args, **kwargs))
        run = self.run
        if self._resume_from is not None:
            step = _global_step(self._resume_from)
            epoch = run.resume_epoch if run.updates_left else run.selector.num_epochs
            values[1] = step / (epoch + 0.5) if step else values[1]
        values[-1] = run.num_full_updates
        return tuple(values)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers 5 passes the first epoch's length to all epochs; 4.57 has no such method and asks the loader.
        run = self.run
        run.begin_epoch(kwargs["epoch"])
        batches = run.num_batches - run.step
        kwargs["steps_in_epoch"] = batches
        kwargs["num_update_steps_per_epoch"] = -(-batches // run.accumulation)
        return super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch of the plan."""
        run = self.run
        ids, self._batch = np.asarray(inputs.pop(_ID_KEY)), run.next_batch()
        run.check_ids(ids[ids >= 0], self._batch)
        step = run.step
        try:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._batch = None
        if run.step == step:
            raise UsageError(
                f"{type(self).__name__} computes its loss without PrunedTrainer: make PrunedTrainer the first base, "
                "and do not override compute_loss above it; for a loss of your own, override example_losses"
            )
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Return the batch's weighted loss in training, and the Trainer's loss otherwise."""
        batch = self._batch
        if batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        given, captured = dict(inputs), _Captured(model)
        with captured:
            loss: Any = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        with torch.no_grad() if batch.is_plain else contextlib.nullcontext():
            losses = self.example_losses(captured.outputs, given)
        has_other = get_output(captured.outputs, "aux_loss") is not None
        loss = self._weighted(loss, losses, num_items_in_batch, has_other=has_other)
        return (loss, captured.outputs) if return_outputs else loss

    def _weighted(self, loss: Tensor, losses: ExampleLosses, num_items: Any, *, has_other: bool) -> Tensor:
        """Record the losses; return the model's own loss if all weights are 1, and the weighted one otherwise.

        With `has_other`, the model's loss has a further term, such as that of balanced experts, which keeps its weight.
        """
        run, batch = self.run, self._batch
        assert batch is not None
        if not batch.ids.size:  # a row of padding
            run.record(batch, {})
            return losses.sums.sum() * 0.0
        signals = self._signals(losses)
        own_divisors = self._divisors(losses, batch.ids.size, num_items)
        if has_other:
            self._loss_rule = next(iter(own_divisors))
        elif not self._loss_rule or run.step == 0:
            self._loss_rule = _matching_rule(loss, losses.sums.sum(), own_divisors)
        run.record(batch, signals)
        if batch.is_plain:
            return loss
        weights = torch.from_numpy(batch.weights).to(losses.sums.device, losses.sums.dtype)
        divisors = self._divisors(losses, batch.mean_rows, num_items)
        weighted = (losses.sums * weights).sum() / divisors[self._loss_rule]
        if has_other:
            weighted = weighted + loss - losses.sums.sum() / own_divisors[self._loss_rule]
        return weighted

    def _divisors(self, losses: ExampleLosses, rows: float, num_items: Any) -> dict[str, Any]:
        """Return what the loss may divide the sum of `rows` losses by; the Trainer's versions and the models differ.

        With several processes, the Trainer multiplies the loss by their number, also that of a model that does not
        divide by the items of all of them.
        """
        divisors: dict[str, Any] = {}
        if num_items is not None:
            divisors = {"items of all processes": num_items / self.args.world_size, "items": num_items}
            if self.args.world_size == 1 or not self.args.average_tokens_across_devices:
                divisors = {"items": num_items}
        if self._has_tokens is None:  # asked once: the host waits for the answer
            self._has_tokens = losses.logits is None and bool((losses.counts != 1).any())
        positions = losses.counts.sum().clamp(min=1) if self._has_tokens else rows
        divisors["positions of the batch"] = positions
        if num_items is not None and self.args.world_size > 1:
            divisors["positions of the batch, times processes"] = positions / self.args.world_size
        return divisors

    def _signals(self, losses: ExampleLosses) -> dict[str, Tensor]:
        names = self._method.signals
        if losses.logits is None and (other := [name for name in names if name != "loss"]):
            raise ConfigError(
                f"method {self._method.name!r} needs {', '.join(other)}, and examples of many tokens have a loss only: "
                "use a method that needs the loss, such as InfoBatch"
            )
        return signals_per_sample(names, losses.means, logits=losses.logits, targets=losses.targets)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule for the steps of a run without pruning; `_Follow` advances it by the progress."""
        scheduler = super().create_scheduler(*args, **kwargs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, torch.optim.Optimizer) and not getattr(optimizer, "_rayprune_scaled", False):
            scale_learning_rates(optimizer, lambda: 1.0 if self._run is None else self._run.lr_scale)
            optimizer._rayprune_scaled = True  # type: ignore[attr-defined]  # train() may be called again
        return scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = self.run
        state = run.state_dict()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # Before the Trainer's own files: a checkpoint that has them has the selection, too.
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / STATE_FILE)
        super()._save_checkpoint(model, trial)


class _Follow(TrainerCallback):
    """Keep the loop's counters and the learning rate with the plan."""

    def __init__(self, trainer: PrunedTrainer) -> None:
        self._trainer, self._pacer = trainer, None  # type: PrunedTrainer, StepPacer | None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._trainer.run
        self._pacer = StepPacer(run)
        if not run.updates_left:  # resumed after its end
            state.max_steps = state.global_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._trainer.run
        if run.has_ended:
            run.begin_epoch(run.epoch + 1)
        # Exact in the last epoch, where it ends the run; before that only a guess, and more than this epoch has.
        later = max(0.0, run.num_epochs - run.epoch - 1)
        state.max_steps = state.global_step + run.updates_left + math.ceil(later * max(1, run.num_updates))
        for callback in self._trainer.callback_handler.callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.total = state.max_steps
                bar.refresh()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, scheduler = self._trainer.run, self._trainer.lr_scheduler
        assert self._pacer is not None
        state.epoch = run.progress * run.num_epochs
        # The loop has made one step of the schedule.
        for _ in range(self._pacer.steps() - 1):
            if scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._trainer.run
        run.end_epoch()


class _Loader(PlannedLoader):
    """The loader that the training loop iterates in every epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it has begun."""
        self.planned.begin_epoch(epoch)

    def __len__(self) -> int:
        # At least 1, as the loop refuses an empty loader: that of a finished run, which it will not iterate.
        return max(1, self.planned.num_batches - self.planned.step)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if batch[_ID_KEY][0] < 0:  # padding: the tokens must not be counted
                for name in ("labels", "shift_labels"):
                    if isinstance(batch.get(name), Tensor) and not batch[name].is_floating_point():
                        batch[name] = torch.full_like(batch[name], -100)
            yield batch


class _Captured:
    """Keep the outputs of the first forward pass with gradients inside a `with`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self.outputs = model, None  # type: torch.nn.Module, Any

    def __enter__(self) -> _Captured:
        self._hook = self._model.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep(self, module: Any, args: Any, outputs: Any) -> None:
        if self.outputs is None and torch.is_grad_enabled():
            self.outputs = outputs


def _matching_rule(loss: Tensor, total: Tensor, divisors: dict[str, Any]) -> str:
    """Return the name of the divisor that turns the sum of the examples' losses into the model's own loss.

    Raises:
        ConfigError: none does, so the examples' losses are not those that the model trains on.
    """
    own = float(loss.detach())
    tolerance = _TOLERANCE if loss.dtype in (torch.float32, torch.float64) else _LOW_PRECISION_TOLERANCE
    found = {name: float(total.detach() / divisor) for name, divisor in divisors.items()}
    for name, value in found.items():
        if not math.isfinite(own) or math.isclose(own, value, rel_tol=tolerance, abs_tol=1e-6):
            return name
    values = ", ".join(f"{value:.5g}" for value in found.values())
    raise ConfigError(
        f"the model's loss is {own:.5g}, and the mean of its examples' losses {values}: its loss is not the cross "
        "entropy of its logits; return an added loss as aux_loss in the model's outputs, or override "
        "example_losses(outputs, inputs), which returns ExampleLosses"
    )


def _shifts_labels(trainer: Any) -> bool:
    """Return whether the model is a causal language model, which predicts the next label."""
    if hasattr(trainer, "_loss_shifts_labels"):  # transformers 5
        return bool(trainer._loss_shifts_labels)
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _labels_of(dataset: Any) -> Any:
    names = getattr(dataset, "column_names", ())
    for name in ("label", "labels"):
        if name in names:
            return np.asarray(dataset[name])
    raise ConfigError("the method needs classes, and the dataset has no column 'label': give labels=, (N,) integers")


def _global_step(checkpoint: Path) -> int:
    from transformers import TrainerState

    return int(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step)


def _read_state(checkpoint: Path) -> Any:
    path = checkpoint / STATE_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunFolderError(
            f"{checkpoint} has no {STATE_FILE}: it is not a checkpoint of a PrunedTrainer; resume from another, or "
            "start without one"
        ) from None
    except Exception as error:
        raise RunFolderError(
            f"{path} can't be read ({type(error).__name__}): resume from another checkpoint"
        ) from error


def _check_packing(args: Any) -> None:
    if getattr(args, "packing", False):
        raise ConfigError(
            "packing joins examples before training, so that none can be left out: set packing=False and "
            "padding_free=True"
        )


def _check_arguments(trainer: Any) -> None:
    """Refuse what a plan cannot follow, by name and with the cure."""
    args = trainer.args
    if args.max_steps > 0:
        raise ConfigError(
            f"max_steps {args.max_steps} counts optimizer steps, and a pruned epoch has fewer: give num_train_epochs"
        )
    _check_packing(args)
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs in one process (DataParallel): start one process a GPU, with torchrun")
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(args, "group_by_length", False) or str(getattr(strategy, "value", strategy)) not in (
        "random",
        "sequential",
    ):
        raise ConfigError("group_by_length and train_sampling_strategy set an order of their own: leave them out")
    parallel = getattr(args, "parallelism_config", None)
    sizes = [getattr(parallel, f"{kind}_size", 1) or 1 for kind in ("tp", "cp", "sp")] if parallel is not None else []
    if any(size > 1 for size in sizes):
        raise ConfigError("tensor, context and sequence parallelism share samples between processes: use data parallel")
    if trainer.train_dataset is not None:
        check_map_style(trainer.train_dataset)
