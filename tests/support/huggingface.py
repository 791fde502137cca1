"""Tiny models and data for the Hugging Face Trainer, and a trainer that writes down what it trains on."""

from __future__ import annotations

import collections
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import rayprune
from rayprune.core.method import Method
from rayprune.huggingface import PrunedTrainer
from tests.support.plans import expected_epochs

N, EPOCHS, ROWS = 53, 4, 4
METHOD = rayprune.InfoBatch(prune_ratio=0.7, anneal_start=1.0)
_RNG = np.random.default_rng(0)
TOKENS = _RNG.integers(1, 30, (N, 8))
LABELS = (TOKENS[:, 0] > 15).astype(int)
LENGTHS = _RNG.integers(3, 9, N)
TEXTS = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]

CLASSES = datasets.Dataset.from_dict(
    {"input_ids": TOKENS.tolist(), "labels": LABELS.tolist(), "text": [str(i) for i in range(N)]}
)
LANGUAGE = datasets.Dataset.from_dict({"input_ids": TEXTS})


class Items(Dataset[Any]):
    """The classes as a map-style torch Dataset."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": TOKENS[index], "labels": int(LABELS[index]), "text": str(index)}


TINY: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def pad_tokens(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate ragged token ids for a causal language model."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor([[*item["input_ids"], *[0] * (longest - len(item["input_ids"]))] for item in items])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def classifier(dropout: float = 0.0) -> torch.nn.Module:
    set_seed(1)
    config = BertConfig(**TINY, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertForSequenceClassification(config)


def language_model() -> torch.nn.Module:
    set_seed(1)
    return LlamaForCausalLM(LlamaConfig(**TINY))


class Recording:
    """A mixin: keeps (epoch, ids, means of the losses) of each of this rank's batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visits: list[tuple[int, list[int], list[float]]] = []
        self.rates: list[float] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = [code for code in inputs["rayprune_id"].tolist() if code >= 0]
        self.visits.append((self.run.epoch, ids, []))
        return super().training_step(model, inputs, *args, **kwargs)

    def example_losses(self, outputs: Any, inputs: Any) -> Any:
        losses = super().example_losses(outputs, inputs)
        if self.visits[-1][1]:
            self.visits[-1][2].extend(losses.means.tolist())
        return losses


class RecordingTrainer(Recording, PrunedTrainer):
    """A PrunedTrainer that keeps its visits."""


class Stop(TrainerCallback):
    """Raise KeyboardInterrupt, or kill this process, after an optimizer step."""

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step, self.kill = step, kill

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


class Rates(TrainerCallback):
    """Keep the learning rate of every optimizer step, as the optimizer sees it."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def new_trainer(
    folder: Path,
    method: Method = METHOD,
    task: str = "classes",
    trainer: type[Any] = RecordingTrainer,
    labels: Any = None,
    callbacks: list[Any] | None = None,
    dropout: float = 0.0,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Return a trainer of a tiny model; `changes` are arguments of TrainingArguments, `more` of the trainer."""
    given: dict[str, Any] = {"model": classifier(dropout), "train_dataset": CLASSES}
    if task == "language":
        given = {"model": language_model(), "train_dataset": LANGUAGE, "data_collator": pad_tokens}
    given |= {"args": arguments(folder, **changes), "callbacks": callbacks, **(more or {})}
    return trainer(method=method, labels=labels, **given)


def fit(folder: Path, resume: Any = None, **options: Any) -> Any:
    """Train; an interruption by `Stop` ends it quietly."""
    trainer = new_trainer(folder, **options)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    except KeyboardInterrupt:
        trainer.stopped = True
    return trainer


def visited(trainers: list[Any], epochs: int = EPOCHS) -> list[list[int]]:
    """Return the sorted ids of each epoch, over all the trainers."""
    ids: list[list[int]] = [[] for _ in range(epochs)]
    for trainer in trainers:
        for epoch, batch, _ in getattr(trainer, "visits", trainer):
            ids[epoch] += batch
    return [sorted(epoch) for epoch in ids]


def planned(trainers: list[Any], method: Method, global_rows: int, epochs: int = EPOCHS, **options: Any) -> Any:
    """Return the ids of each epoch as a Selector plans them that is told the trainers' own losses."""
    seen: dict[int, dict[int, float]] = collections.defaultdict(dict)
    for trainer in trainers:
        for epoch, batch, losses in getattr(trainer, "visits", trainer):
            seen[epoch] |= dict(zip(batch, losses, strict=True))
    selector = rayprune.Selector(method, N, epochs, options.pop("seed", 42))

    def observed(epoch: int, ids: Any) -> Any:
        return list(seen[epoch]), {"loss": np.array(list(seen[epoch].values()), dtype=np.float32)}

    return [sorted(ids) for ids, _ in expected_epochs(selector, global_rows, observed, **options)]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


class InOrder(Sampler[int]):
    """Visit the ids of each epoch in the given order."""

    def __init__(self, orders: list[list[int]]) -> None:
        self.orders, self.epoch = orders, 0

    def __len__(self) -> int:
        return len(self.orders[0])

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(self.orders[self.epoch - 1])


class OrderedTrainer(Trainer):
    """An unpruned Trainer with a given order."""

    orders: list[list[int]]

    def _get_train_sampler(self, *args: Any) -> Any:
        return InOrder(self.orders)


def unpruned(folder: Path, orders: list[list[int]], task: str = "classes", **changes: Any) -> OrderedTrainer:
    """Train an unpruned Trainer on the same order."""

    def build(method: Any, labels: Any, **given: Any) -> OrderedTrainer:
        return OrderedTrainer(**given)

    trainer: OrderedTrainer = new_trainer(folder, task=task, trainer=build, **changes)
    trainer.orders = orders
    trainer.train()
    return trainer


def train_rank(rank: int, world_size: int, port: int, folder: str, jobs: dict[str, dict[str, Any]]) -> None:
    """Train each job as one of several processes, and save what it trained on and its weights."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for name, options in jobs.items():
        try:
            trainer = fit(Path(folder) / name, **{**options, "ddp_backend": "gloo"})
        except Exception as error:  # the tests read it
            torch.save({"error": str(error)}, Path(folder) / f"{name}-{rank}.pt")
            continue
        result = {
            "visits": trainer.visits,
            "weights": weights(trainer),
            "steps": trainer.state.global_step,
            "max_steps": trainer.state.max_steps,
            "rates": trainer.lr_scheduler.get_last_lr(),
            "loss": torch.from_numpy(trainer.selector.scores()["loss"]),
        }
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def train_and_die(folder: str, options: dict[str, Any], step: int) -> None:
    """Train until this process kills itself at a step."""
    torch.set_num_threads(1)
    fit(Path(folder), **options, callbacks=[Stop(step, kill=True)])
