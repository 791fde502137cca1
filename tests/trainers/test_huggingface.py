"""Selection inside the real Hugging Face Trainer: visits, weights, schedules, resume, several processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import socket
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

import rayprune
from rayprune.core.method import Method
from rayprune.errors import ConfigError, RunFolderError, UsageError
from rayprune.huggingface import ExampleLosses, PrunedTrainer
from tests.support import huggingface as hf
from tests.support.huggingface import EPOCHS, LABELS, METHOD, ROWS, N, fit, new_trainer, planned, visited

STEPS = {"save_strategy": "steps", "save_steps": 4}


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def orders(trainer: Any) -> list[list[int]]:
    """Return each epoch's ids in the order of their visits."""
    return [[i for epoch, ids, _ in trainer.visits if epoch == index for i in ids] for index in range(EPOCHS)]


def check_end(trainer: Any) -> None:
    """Check what holds at the end of every run."""
    assert trainer.state.global_step == trainer.state.max_steps
    assert trainer.run.progress == 1.0
    assert trainer.state.epoch == pytest.approx(trainer.args.num_train_epochs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Any, Path]]:
    """Uninterrupted runs, (task, accumulation) → the trainer and its folder; the classifier has dropout."""
    runs = {}
    for task in ("classes", "language"):
        for accumulation in (1, 3):
            folder = tmp_path_factory.mktemp("whole")
            dropout = 0.1 if task == "classes" else 0.0
            options = {"gradient_accumulation_steps": accumulation, **STEPS}
            runs[task, accumulation] = fit(folder, task=task, dropout=dropout, **options), folder
    return runs


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", ["classes", "language"])
def test_visits_are_the_selectors_own_plan(whole: Any, task: str, accumulation: int) -> None:
    trainer, _ = whole[task, accumulation]
    plan = planned([trainer], METHOD, ROWS)
    assert visited([trainer]) == plan
    assert [len(epoch) for epoch in plan] == [trainer.selector.num_samples, *map(len, plan[1:])]
    assert max(map(len, plan[1:])) < N
    updates = sum(math.ceil(math.ceil(len(epoch) / ROWS) / accumulation) for epoch in plan)
    assert trainer.state.global_step == updates
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    check_end(trainer)
    last = {id: loss for _, ids, losses in trainer.visits for id, loss in zip(ids, losses, strict=True)}
    np.testing.assert_allclose(trainer.selector.scores()["loss"], [last[id] for id in range(N)], rtol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", ["classes", "language"])
def test_without_pruning_the_weights_are_those_of_the_unpruned_trainer(
    tmp_path: Path, task: str, accumulation: int
) -> None:
    options = {"task": task, "gradient_accumulation_steps": accumulation, "dropout": 0.1 * (task == "classes")}
    rates, own_rates = hf.Rates(), hf.Rates()
    trainer = fit(tmp_path, method=rayprune.Full(), callbacks=[rates], **options)
    unpruned = hf.unpruned(tmp_path, orders(trainer), callbacks=[own_rates], **options)
    assert trainer.state.global_step == unpruned.state.global_step
    assert rates.rates == own_rates.rates
    ratio_zero = fit(tmp_path, method=rayprune.InfoBatch(prune_ratio=0.0), **options)
    for pruned in (trainer, ratio_zero):
        assert all(torch.equal(own, hf.weights(pruned)[name]) for name, own in hf.weights(unpruned).items())


def test_a_weighted_batch_has_the_weighted_gradient(tmp_path: Path) -> None:
    """One step of SGD from the same weights, with the losses weighted by hand."""
    for task in ("classes", "language"):
        trainer = new_trainer(
            tmp_path, rayprune.InfoBatch(prune_ratio=0.7, anneal_start=1.0), task, optim="sgd", max_grad_norm=0
        )
        seen: dict[str, Any] = {}

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                gradients = {
                    name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None
                }
                seen.setdefault("gradients", []).append((hf.weights(trainer), gradients))  # noqa: B023

        trainer.add_callback(Look())
        trainer.train()
        run, shift = trainer.run, int(hasattr(trainer, "_loss_shifts_labels"))  # 4.57 counts first tokens, too
        run_ids = [(epoch, ids) for epoch, ids, _ in trainer.visits]
        selector, at, checked = rayprune.Selector(METHOD, N, EPOCHS, 42), 0, 0
        for epoch in range(2):
            plan = rayprune.Plan.of_selection(selector.begin_epoch(epoch), ROWS, 42, epoch)
            batch_losses = {}
            for step in range(plan.num_steps):
                ids = plan.order[step * ROWS : min(plan.num_rows, (step + 1) * ROWS)].tolist()
                weights = torch.from_numpy(plan.weights(step * ROWS, step * ROWS + len(ids)))
                assert run_ids[at] == (epoch, ids)
                if epoch == 1 and (weights != 1).any():
                    state, gradients = seen["gradients"][at]
                    model = hf.classifier() if task == "classes" else hf.language_model()
                    model.load_state_dict(state)
                    batch = [trainer.train_dataset[i] for i in ids]
                    collated = trainer.data_collator([{k: v for k, v in row.items() if k != "text"} for row in batch])
                    losses = torch.stack([_loss_sum(model, collated, row) for row in range(len(ids))])
                    count = len(ids) if task == "classes" else int((collated["labels"][:, shift:] != -100).sum())
                    ((losses * weights).sum() / count).backward()
                    for name, parameter in model.named_parameters():
                        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
                    checked += 1
                batch_losses |= dict(zip(ids, trainer.visits[at][2], strict=True))
                at += 1
            selector.observe(list(batch_losses), {"loss": np.array(list(batch_losses.values()), "f4")}, epoch)
        assert checked > 2
        assert run.progress == 1.0


def _loss_sum(model: Any, batch: Any, row: int) -> torch.Tensor:
    one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    loss = model(**one).loss
    return loss if one["labels"].ndim == 1 else loss * (one["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize(
    ("task", "accumulation", "keep"),
    [("classes", 1, 14), ("classes", 1, 5), ("language", 1, 8), ("classes", 3, 2), ("language", 3, 1)],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: Any, tmp_path: Path, task: str, accumulation: int, keep: int
) -> None:
    """`keep` is the checkpoint that it goes on from, counted from the first; that of classes 1, 14 is the last."""
    trainer, folder = whole[task, accumulation]
    found = checkpoints(folder)
    start = found[min(keep, len(found)) - 1]
    options = {"task": task, "gradient_accumulation_steps": accumulation, "dropout": 0.1 * (task == "classes")}
    resumed = fit(tmp_path, resume=start, **options, **STEPS)
    done = json.loads((start / "trainer_state.json").read_text())["global_step"]
    assert resumed.visits == trainer.visits[len(trainer.visits) - len(resumed.visits) :]
    assert (len(resumed.visits) == 0) == (done == trainer.state.global_step)
    assert hf.largest_difference(hf.weights(resumed), hf.weights(trainer)) == 0.0
    assert resumed.lr_scheduler.get_last_lr() == trainer.lr_scheduler.get_last_lr()
    assert np.array_equal(resumed.selector.scores()["loss"], trainer.selector.scores()["loss"])
    check_end(resumed)


def test_a_run_resumes_after_an_epochs_last_step_with_workers(whole: Any, tmp_path: Path) -> None:
    trainer, _ = whole["classes", 1]
    options = {"dropout": 0.1, "dataloader_num_workers": 2}
    first = -(-N // ROWS)
    stopped = fit(tmp_path, callbacks=[hf.Stop(first)], save_strategy="epoch", **options)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{first}"]
    resumed = fit(tmp_path, resume=True, save_strategy="epoch", **options)
    assert stopped.visits + resumed.visits == trainer.visits
    assert hf.largest_difference(hf.weights(resumed), hf.weights(trainer)) == 0.0
    ends = np.cumsum([-(-len(ids) // ROWS) for ids in visited([stopped, resumed])])
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{end}" for end in ends]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_may_end_inside_an_epoch_and_is_then_finished(tmp_path: Path, accumulation: int) -> None:
    options = {"num_train_epochs": 2.5, "gradient_accumulation_steps": accumulation, "save_strategy": "epoch"}
    trainer = fit(tmp_path, **options)
    check_end(trainer)
    plan, seen = planned([trainer], METHOD, ROWS, 3), visited([trainer], 3)
    assert seen[:2] == plan[:2]
    assert set(seen[2]) < set(plan[2])
    assert len(seen[2]) == pytest.approx(len(plan[2]) / 2, abs=ROWS * accumulation)
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    again = fit(tmp_path, resume=checkpoints(tmp_path)[-1], **options)
    assert again.visits == []
    check_end(again)
    if accumulation == 1:
        full = fit(tmp_path, method=rayprune.Full(), num_train_epochs=2.5)
        assert full.state.global_step == 35


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Start processes that have the imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.huggingface"])
    return context


def test_a_killed_run_goes_on_as_if_it_had_not_been(whole: Any, tmp_path: Path, processes: ForkServerContext) -> None:
    """The process dies in the middle of epoch 1."""
    trainer, _ = whole["classes", 3]
    options = {"dropout": 0.1, "gradient_accumulation_steps": 3, "save_strategy": "steps", "save_steps": 2}
    process = processes.Process(target=hf.train_and_die, args=(str(tmp_path), options, 7))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    resumed = fit(tmp_path, resume=True, **options)
    assert resumed.visits[0][0] == 1
    assert resumed.visits == trainer.visits[6 * 3 - 1 :], "epoch 0 has 14 batches, so its fifth step has two"
    assert hf.largest_difference(hf.weights(resumed), hf.weights(trainer)) == 0.0
    check_end(resumed)


# Two processes


RANDOM = rayprune.RandomEpoch(prune_ratio=0.5)  # 27 kept: rank 1 has only padding in the last of 4 batches
STEP_2 = {"save_strategy": "steps", "save_steps": 2}
# SGD, as Adam makes a step of rounding errors where a gradient is zero.
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
JOBS: dict[str, dict[str, Any]] = {
    "classes-1": SGD,
    "classes-3": {"gradient_accumulation_steps": 3, **SGD},
    "language-1": {"task": "language", **STEP_2},
    "language-3": {"task": "language", "gradient_accumulation_steps": 3},
    "padding-1": {"task": "language", "method": RANDOM},
    "padding-3": {"method": RANDOM, "gradient_accumulation_steps": 3, **SGD},
    "local-3": {"task": "language", "gradient_accumulation_steps": 3, "average_tokens_across_devices": False},
    "one-batch": {"per_device_train_batch_size": 30, "num_train_epochs": 2},
    "stopped-1": {"task": "language", **STEP_2, "callbacks": [hf.Stop(11)]},
    "resumed-1": {"task": "language", **STEP_2, "resume": "stopped-1/checkpoint-10"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, processes: ForkServerContext) -> tuple[dict[str, list[Any]], Path]:
    """What two processes trained, name of the job → the ranks' results."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {name: dict(options) for name, options in JOBS.items()}
    jobs["resumed-1"]["resume"] = folder / JOBS["resumed-1"]["resume"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        processes.Process(target=hf.train_rank, args=(rank, 2, port, str(folder), jobs), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    results = {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)] for name in jobs
    }
    return results, folder


@pytest.mark.parametrize("name", ["classes-1", "classes-3", "language-1", "language-3", "padding-1", "padding-3"])
def test_two_processes_visit_the_plan_and_train_the_weights_of_one(two: Any, tmp_path: Path, name: str) -> None:
    ranks, options = two[0][name], {**JOBS[name], "save_strategy": "no"}
    visits = [rank["visits"] for rank in ranks]
    method = options.get("method", METHOD)
    assert visited(visits) == planned(visits, method, 2 * ROWS)
    assert len(visits[0]) == len(visits[1]), "both ranks make the same number of forward passes"
    if name.startswith("padding"):
        assert [ids for _, ids, _ in visits[1]].count([]) == EPOCHS
    np.testing.assert_array_equal(ranks[0]["loss"], ranks[1]["loss"])
    assert hf.largest_difference(ranks[0]["weights"], ranks[1]["weights"]) == 0.0
    if "optim" in options and new_trainer(tmp_path).model_accepts_loss_kwargs:
        # A classifier's loss, which transformers 5 multiplies by the number of processes.
        options["learning_rate"] *= 2
    one = fit(tmp_path, **options, per_device_train_batch_size=2 * ROWS)
    assert visited([one]) == visited(visits)
    assert hf.largest_difference(ranks[0]["weights"], hf.weights(one)) < 1e-4
    assert ranks[0]["steps"] == ranks[0]["max_steps"] == one.state.global_step
    assert ranks[0]["rates"] == one.lr_scheduler.get_last_lr() == [0.0] * len(ranks[0]["rates"])


def test_processes_that_count_their_own_tokens_train_the_plan(two: Any) -> None:
    visits = [rank["visits"] for rank in two[0]["local-3"]]
    assert visited(visits) == planned(visits, METHOD, 2 * ROWS)


def test_an_epoch_of_one_incomplete_batch_is_trained(two: Any) -> None:
    """30 and 23 rows: the ranks' own means are not those of the batch."""
    ranks = two[0]["one-batch"]
    assert "error" not in ranks[0]
    assert len(visited([rank["visits"] for rank in ranks], 2)[0]) == N


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_of_two_processes_resumes_with_as_many_and_with_one(two: Any, tmp_path: Path, world_size: int) -> None:
    results, folder = two
    uninterrupted = results["language-1"]
    start = folder / JOBS["resumed-1"]["resume"]
    if world_size == 2:
        if "restore data location" in results["resumed-1"][0].get("error", ""):
            pytest.skip("this accelerate can't load an optimizer in several CPU processes with this torch")
        visits = [rank["visits"] for rank in results["resumed-1"]]
        weights = results["resumed-1"][0]["weights"]
        assert hf.largest_difference(weights, uninterrupted[0]["weights"]) == 0.0
    else:
        settings = {"task": "language", "per_device_train_batch_size": 2 * ROWS}
        if not hasattr(PrunedTrainer, "_run_epoch"):  # transformers 4.57 takes the batch size of the checkpoint
            with pytest.raises(ConfigError, match="num_steps"):
                fit(tmp_path, resume=start, **settings)
            return
        one = fit(tmp_path, resume=start, **settings)
        visits, weights = [one.visits], hf.weights(one)
        assert hf.largest_difference(weights, uninterrupted[0]["weights"]) < 1e-4
    expected = [rank["visits"][10:] for rank in uninterrupted]
    assert visits[0][0][0] == 1
    assert visited(visits) == visited(expected)


# Learning rates


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_ends_where_the_schedule_ends(tmp_path: Path, kind: str) -> None:
    rates = hf.Rates()
    trainer = fit(tmp_path, lr_scheduler_type=kind, warmup_steps=6, callbacks=[rates])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.01 if "warmup" in kind else 0.0)
    assert trainer.lr_scheduler.last_epoch == 56, "the steps of the run without pruning"
    assert trainer.state.global_step < 56
    assert rates.rates[:7] == pytest.approx([0.01 * step / 6 for step in range(7)]), "epoch 0 is not pruned"
    assert len(rates.rates) == trainer.state.global_step


def test_a_given_optimizer_and_schedule_are_followed(tmp_path: Path) -> None:
    model = hf.classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=14, gamma=0.5)
    rates = hf.Rates()
    trainer = fit(
        tmp_path,
        callbacks=[rates],
        max_grad_norm=0.1,
        more={"model": model, "optimizers": (optimizer, schedule)},
    )
    by_epoch: list[set[float]] = [set() for _ in range(EPOCHS)]
    for (epoch, _, _), rate in zip(trainer.visits, rates.rates, strict=True):
        by_epoch[epoch].add(rate)
    assert by_epoch == [{1.0}, {0.5}, {0.25}, {0.125}], "a period is an epoch of the unpruned run"
    assert schedule.get_last_lr() == [0.0625]


@dataclass(frozen=True)
class Scaled(rayprune.RandomEpoch):
    """Asks for a third of the learning rate from epoch 1 on."""

    def select(self, table: Any, context: Any) -> Any:
        return replace(super().select(table, context), lr_scale=1.0 if context.epoch == 0 else 1 / 3)


class Stepped(torch.optim.SGD):
    """Keeps the rate that each step is made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.made.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_a_methods_factor_on_the_learning_rate_is_applied(tmp_path: Path) -> None:
    model = hf.classifier()
    optimizer = Stepped(model.parameters(), lr=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = fit(tmp_path, method=Scaled(prune_ratio=0.5), more={"model": model, "optimizers": (optimizer, schedule)})
    assert optimizer.made == pytest.approx([0.9 if epoch == 0 else 0.3 for epoch, _, _ in trainer.visits])
    assert optimizer.param_groups[0]["lr"] == 0.9
    trainer.visits.clear()
    optimizer.made.clear()
    trainer.train()
    assert optimizer.made == pytest.approx([0.9 if epoch == 0 else 0.3 for epoch, _, _ in trainer.visits])


# Evaluation, data, methods


class Evaluations(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


@pytest.mark.parametrize("every", ["epoch", "steps"])
def test_every_epoch_is_evaluated_and_the_best_model_loaded(whole: Any, tmp_path: Path, every: str) -> None:
    seen = Evaluations()
    trainer = fit(
        tmp_path,
        callbacks=[seen],
        more={"eval_dataset": hf.CLASSES},
        eval_strategy=every,
        save_strategy=every,
        eval_steps=10,
        save_steps=10,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    check_end(trainer)
    ends = np.cumsum([-(-len(ids) // ROWS) for ids in visited([trainer])]).tolist()
    assert len(set(ends)) == EPOCHS
    if every == "epoch":
        assert sorted(set(seen.steps)) == ends
    else:
        assert set(range(10, ends[-1] + 1, 10)) <= set(seen.steps)
    assert trainer.state.best_model_checkpoint is not None
    best = min(line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    before = len(trainer.visits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best)
    assert trainer.predict(hf.CLASSES).predictions.shape == (N, 2)
    assert len(trainer.visits) == before


@pytest.mark.parametrize("kind", ["torch", "list"])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_map_style_dataset_gives_the_same_run(tmp_path: Path, kind: str, workers: int) -> None:
    """Their column of text is removed before the collator, as the Trainer does it."""
    data = hf.Items() if kind == "torch" else [hf.CLASSES[index] for index in range(N)]
    options = {"num_train_epochs": 2, "dataloader_num_workers": workers}
    trainer = fit(tmp_path, more={"train_dataset": data}, **options)
    assert visited([trainer], 2) == planned([trainer], METHOD, ROWS, 2)
    columns = fit(tmp_path, **options)
    assert columns.visits == trainer.visits
    assert hf.largest_difference(hf.weights(columns), hf.weights(trainer)) == 0.0


def test_a_collator_sees_the_columns_that_the_user_kept(tmp_path: Path) -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        assert {item["text"] for item in items} <= {str(index) for index in range(N)}
        return {
            "input_ids": torch.tensor([item["input_ids"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }

    trainer = fit(tmp_path, more={"data_collator": collate}, remove_unused_columns=False, num_train_epochs=1)
    assert visited([trainer], 1) == [list(range(N))]


def test_incomplete_batches_may_be_dropped(tmp_path: Path) -> None:
    trainer = fit(tmp_path, dataloader_drop_last=True)
    assert visited([trainer]) == planned([trainer], METHOD, ROWS, last_batch="drop")
    assert {len(ids) for _, ids, _ in trainer.visits} == {ROWS}
    check_end(trainer)
    with pytest.raises(ConfigError, match="epoch 0 keeps 53 samples, which is less than a batch of 60"):
        fit(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=60)


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        (rayprune.RandomEpoch(prune_ratio=0.5), [27, 27, 27, 27]),
        (rayprune.Random(prune_ratio=0.5), [27, 27, 27, 27]),
        (rayprune.EL2N(prune_ratio=0.5, score_epochs=2), [53, 53, 27, 27]),
        (rayprune.TDDS(prune_ratio=0.5, trajectory_len=3, window_size=3), [53, 53, 53, 27]),
        (rayprune.RCAP(), [53, 27, 27, 27]),
    ],
)
def test_methods_select_what_they_select_elsewhere(tmp_path: Path, method: Method, counts: list[int]) -> None:
    trainer = fit(tmp_path, method=method, labels=LABELS)
    seen = visited([trainer])
    assert [len(ids) for ids in seen] == counts
    assert all(len(set(ids)) == len(ids) for ids in seen)
    check_end(trainer)
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    if method.fixed:
        assert seen[-1] == np.flatnonzero(trainer.selector.begin_epoch(EPOCHS - 1).codes).tolist()
        if not method.collect_epochs:
            assert seen[0] == seen[-1]
            assert trainer.lr_scheduler.last_epoch == trainer.state.global_step


def test_the_classes_come_from_the_dataset_or_from_labels(tmp_path: Path) -> None:
    method = rayprune.RandomEpoch(prune_ratio=0.9, class_floor=0.5)
    trainer = fit(tmp_path, method=method, num_train_epochs=2)
    for ids in visited([trainer], 2):
        for label in (0, 1):
            assert (LABELS[ids] == label).sum() >= (label == LABELS).sum() / 2
    with pytest.raises(ConfigError, match="needs classes, and the dataset has no column 'label': give labels="):
        fit(tmp_path, method=method, more={"train_dataset": hf.Items()})
    given = fit(tmp_path, method=method, num_train_epochs=2, labels=LABELS, more={"train_dataset": hf.Items()})
    assert given.visits == trainer.visits


def test_a_trainer_trains_twice(tmp_path: Path) -> None:
    trainer = fit(tmp_path, num_train_epochs=2)
    first = trainer.run
    trainer.visits.clear()
    trainer.train()
    assert trainer.run is not first
    assert visited([trainer], 2) == planned([trainer], METHOD, ROWS, 2)
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    check_end(trainer)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_weighted_too(tmp_path: Path, smoothing: float) -> None:
    for task in ("classes", "language"):
        options = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": 3}
        trainer = fit(tmp_path, task=task, **options)
        assert visited([trainer]) == planned([trainer], METHOD, ROWS)
        if smoothing:
            assert min(loss for _, _, losses in trainer.visits for loss in losses) > 0.2


# Sequence to sequence, and TRL


class Pairs(hf.Recording, PrunedTrainer, Seq2SeqTrainer):
    """Seq2SeqTrainer with selection."""


def test_a_sequence_to_sequence_trainer_selects(tmp_path: Path) -> None:
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    torch.manual_seed(0)
    args = hf.arguments(tmp_path).to_dict()
    kept = {name: args[name] for name in ("per_device_train_batch_size", "use_cpu", "disable_tqdm", "report_to")}
    trainer = Pairs(
        model=T5ForConditionalGeneration(config),
        args=Seq2SeqTrainingArguments(
            str(tmp_path), num_train_epochs=2, save_strategy="no", gradient_accumulation_steps=3, **kept
        ),
        train_dataset=hf.LANGUAGE,
        data_collator=hf.pad_tokens,
        method=METHOD,
    )
    trainer.train()
    assert visited([trainer], 2) == planned([trainer], METHOD, ROWS, 2)
    check_end(trainer)


def sft_trainer(folder: Path, **changes: Any) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    try:
        from trl import SFTConfig, SFTTrainer
    except Exception as error:  # an older transformers
        pytest.skip(f"TRL {trl.__version__} does not work with this transformers: {type(error).__name__}")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(30)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )

    class Tuner(hf.Recording, PrunedTrainer, SFTTrainer):
        pass

    settings = {**{k: v for k, v in hf.arguments(folder).to_dict().items() if k in ("report_to", "use_cpu")}}
    args = SFTConfig(
        str(folder),
        **{
            **settings,
            "num_train_epochs": 3,
            "per_device_train_batch_size": ROWS,
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_length": None,
            **changes,
        },
    )
    return Tuner(
        model=hf.language_model(), args=args, train_dataset=hf.LANGUAGE, processing_class=tokenizer, method=METHOD
    )


@pytest.mark.parametrize("padding_free", [False, True])
def test_an_sft_trainer_selects_examples(tmp_path: Path, padding_free: bool) -> None:
    trainer = sft_trainer(tmp_path, padding_free=padding_free)
    trainer.train()
    assert visited([trainer], 3) == planned([trainer], METHOD, ROWS, 3)
    assert len(visited([trainer], 3)[1]) < N
    check_end(trainer)
    first = trainer.visits[0]
    with torch.no_grad():
        losses = [
            hf.language_model()(input_ids=torch.tensor([hf.TEXTS[i]]), labels=torch.tensor([hf.TEXTS[i]])).loss.item()
            for i in first[1]
        ]
    assert first[2] == pytest.approx(losses, rel=1e-2), "a fused head computes in its own precision"


def test_packing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"packing joins examples .*: set packing=False and padding_free=True"):
        sft_trainer(tmp_path, packing=True, max_length=8)


# What is refused


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (rayprune.SelectiveBackprop(), "'selective_backprop' picks rows inside a train step"),
        (rayprune.Entropy(prune_ratio=0.5), "'entropy' needs passes without training"),
        (rayprune.Kakurenbo(prune_ratio=0.5), "'kakurenbo' needs forward passes over the hidden samples"),
    ],
)
def test_methods_that_no_trainer_can_follow_are_refused_at_the_start(
    tmp_path: Path, method: Method, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        new_trainer(tmp_path, method)


def test_a_method_that_needs_classes_is_refused_for_sequences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'el2n' needs el2n, and examples of many tokens have a loss only"):
        fit(tmp_path, method=rayprune.EL2N(prune_ratio=0.5, score_epochs=1), task="language")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": 5}, "max_steps 5 counts optimizer steps, .*: give num_train_epochs"),
        ({"method": "infobatch"}, r"method must be a rayprune method such as InfoBatch\(\), got str"),
        ({"more": {"train_dataset": iter([1])}}, "can't be read by id"),
        ({"more": {"train_dataset": hf.CLASSES.to_iterable_dataset()}}, "can't be read by id"),
    ],
)
def test_arguments_that_no_plan_can_follow_are_refused(tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        new_trainer(tmp_path, **options)


def test_an_order_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    args = hf.arguments(tmp_path)
    if hasattr(args, "train_sampling_strategy"):
        args.train_sampling_strategy = "group_by_length"
    else:
        args.group_by_length = True
    with pytest.raises(ConfigError, match="group_by_length and train_sampling_strategy set an order of their own"):
        new_trainer(tmp_path, more={"args": args})


class OtherLoss(torch.nn.Module):
    """A classifier whose loss is not the cross entropy of its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.linear(input_ids.float() / 30)
        return {"loss": (logits[:, 0] - labels).abs().mean(), "logits": logits}


class Absolute(hf.RecordingTrainer):
    """Tells the loss of OtherLoss by example."""

    def example_losses(self, outputs: Any, inputs: Any) -> ExampleLosses:
        losses = (outputs["logits"][:, 0] - inputs["labels"]).abs()
        self.visits[-1][2].extend(losses.tolist())
        return ExampleLosses(losses, torch.ones(len(losses)))


def test_a_loss_of_another_kind_is_refused_until_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"its loss is not the cross entropy of its logits; return an added loss as aux_loss"
    ):
        fit(tmp_path, more={"model": OtherLoss()})
    trainer = fit(tmp_path, more={"model": OtherLoss()}, trainer=Absolute)
    assert visited([trainer]) == planned([trainer], METHOD, ROWS)
    assert len(visited([trainer])[1]) < N


def test_scores_and_data_are_asked_for_in_time(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, more={"train_dataset": None})
    with pytest.raises(UsageError, match=r"no scores: call train\(\) first"):
        trainer.selector.scores()
    with pytest.raises(ConfigError, match="training needs samples: give train_dataset="):
        trainer.get_train_dataloader()


def test_a_checkpoint_without_a_readable_selection_is_refused_in_one_line(whole: Any, tmp_path: Path) -> None:
    _, folder = whole["classes", 1]
    start = checkpoints(folder)[1]
    copy = tmp_path / start.name
    copy.mkdir()
    for path in start.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"of another run \(num_epochs 4.* → 5"):
        fit(tmp_path / "out", resume=copy, num_train_epochs=5)
    with pytest.raises(RunFolderError, match="of another run: method"):
        fit(tmp_path / "out", resume=copy, method=rayprune.Full())
    (copy / "rayprune_selection.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(RunFolderError, match=r"rayprune_selection\.pt can't be read \(\w+\): resume from another"):
        fit(tmp_path / "out", resume=copy)
    (copy / "rayprune_selection.pt").unlink()
    with pytest.raises(RunFolderError, match=r"has no rayprune_selection\.pt: it is not a checkpoint of a Pruned"):
        fit(tmp_path / "out", resume=copy)


def test_the_loss_of_balanced_experts_keeps_its_weight(tmp_path: Path) -> None:
    config = MixtralConfig(
        **hf.TINY,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    pairs = []

    class Trainer(hf.RecordingTrainer):
        def _weighted(self, loss: Any, losses: Any, num_items: Any, *, has_other: bool) -> Any:
            assert has_other
            batch = self._batch
            weighted = super()._weighted(loss, losses, num_items, has_other=has_other)
            other = loss - losses.sums.sum() / num_items
            expected = (losses.sums * torch.from_numpy(batch.weights)).sum() / num_items + other
            pairs.append((float(weighted.detach()), float(expected.detach()), float(other.detach())))
            return weighted

    fit(tmp_path, task="language", trainer=Trainer, more={"model": MixtralForCausalLM(config)})
    own, expected, other = np.array(pairs).T
    np.testing.assert_allclose(own, expected, rtol=1e-5)
    assert other.min() > 0.4  # half of the term, which is at least 1


def test_a_small_added_loss_is_not_dropped(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self, coefficient: float, named: bool) -> None:
            super().__init__()
            self.net, self.extra = hf.classifier(), torch.nn.Parameter(torch.ones(()))
            self.coefficient, self.named = coefficient, named

        def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
            outputs = self.net(input_ids=input_ids, labels=labels)
            added = {"aux_loss": self.extra} if self.named else {}
            return {"loss": outputs.loss + self.coefficient * self.extra, "logits": outputs.logits, **added}

    with pytest.raises(ConfigError, match="return an added loss as aux_loss"):
        fit(tmp_path, more={"model": Model(0.005, named=False)})
    gradients = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients.append(float(model.extra.grad))

    fit(tmp_path, more={"model": Model(0.005, named=True)}, callbacks=[Watch()], max_grad_norm=0.0)
    np.testing.assert_allclose(gradients, 0.005, rtol=1e-4)


def test_the_loader_of_a_running_training_is_not_made_twice(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.get_train_dataloader()

    trainer = new_trainer(tmp_path, callbacks=[Look()])
    trainer.train()
    assert visited([trainer.visits]) == planned([trainer.visits], METHOD, ROWS)


def test_a_loss_of_the_users_above_the_mixin_is_refused(tmp_path: Path) -> None:
    class Own(hf.RecordingTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss

    with pytest.raises(UsageError, match="make PrunedTrainer the first base"):
        fit(tmp_path, trainer=Own)
