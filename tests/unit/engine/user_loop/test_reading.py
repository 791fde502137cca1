"""A torch Dataset read by processes of rayprune, and by a DataLoader of the user's own."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import rayprune
from rayprune.engine.user_loop.shard import Shard
from tests.unit.engine.user_loop.loops import BATCH, METHOD, N, X

LABELS = (X[:, 0] > 0).astype(np.int64)


class Rows(Dataset[Any]):
    """The rows of X as dicts; with noise, a random transform draws from three generators."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.from_numpy(X[index])
        if self.noise:
            x = x + random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002
        return {"x": x, "label": int(LABELS[index])}


class Pairs(Rows):
    """The same as tuples."""

    def __getitem__(self, index: int) -> Any:
        return tuple(super().__getitem__(index).values())


def shard_of(dataset: Any, **changes: Any) -> Shard:
    return rayprune.local_loader(
        dataset, **{"method": METHOD, "num_epochs": 3, "batch_size": BATCH, "seed": 5, **changes}
    )


def batches_of(shard: Shard) -> Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor]]:
    for epoch in shard:
        for batch in epoch:
            epoch.weigh(batch, batch["x"].square().sum(1))
            yield epoch.index, batch["id"].tolist(), batch["x"], batch["label"]


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])
        for a, b in zip(ours, theirs, strict=True)
    )


def test_processes_give_the_batches_and_scores_of_the_thread() -> None:
    thread, processes = shard_of(Rows()), shard_of(Rows(), num_workers=2)
    assert equal(list(batches_of(thread)), list(batches_of(processes)))
    ours, theirs = processes.scores(), thread.scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)


def test_random_transforms_depend_neither_on_the_number_of_processes_nor_on_a_resume() -> None:
    one = list(batches_of(shard_of(Rows(noise=True), num_workers=1, num_epochs=2)))
    two = shard_of(Rows(noise=True), num_workers=2, num_epochs=2)
    before = torch.get_rng_state()
    first, state = [], {}
    for batch in batches_of(two):
        first.append(batch)
        if len(first) == 13:
            state = two.state_dict()
            break
    assert torch.equal(torch.get_rng_state(), before), "the user's own generator is left alone"
    again = shard_of(Rows(noise=True), num_workers=2, num_epochs=2)
    again.load_state_dict(state)
    assert equal(first + list(batches_of(again)), one)
    assert not equal(list(batches_of(shard_of(Rows(noise=True), num_workers=1, num_epochs=2, seed=6))), one)


def test_columns_that_tensors_cannot_hold_travel_too() -> None:
    data = {
        "x": X,
        "day": np.arange(N).astype("datetime64[D]"),
        "text": np.array([f"row {i}" for i in range(N)], object),
    }
    for batch in next(shard_of(data, num_workers=1).epochs()):
        assert batch["text"][0] == f"row {batch['id'][0]}"
        assert batch["day"][0] == data["day"][batch["id"][0]]


def test_a_shorter_last_item_is_seen_at_the_start() -> None:
    class Text(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"tokens": torch.arange(16 if index < N - 1 else 9)}

    for batch in next(shard_of(Text()).epochs()).iter_torch_batches(collate_fn=lambda columns: columns):
        assert batch["tokens"].dtype == object


def test_nothing_is_printed_when_the_interpreter_ends_inside_an_epoch() -> None:
    program = """
import numpy as np, rayprune
for workers in (0, 1):
    shard = rayprune.local_loader({"x": np.zeros(99)}, rayprune.Full(), 2, 8, num_workers=workers)
    batches = iter(next(shard.epochs()))
    kept = [batches, next(batches)]
    globals()[f"kept_{workers}"] = kept
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_of_an_item_is_raised_in_the_loop() -> None:
    class Broken(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 77 and torch.utils.data.get_worker_info() is not None:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="the disk is gone"):
        list(batches_of(shard_of(Broken(), num_workers=1)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [Rows(), Pairs()], ids=["dicts", "tuples"])
def test_a_data_loader_of_the_users_own_follows_the_plan(dataset: Any, num_workers: int) -> None:
    ours, theirs = shard_of(dataset), shard_of(Rows())
    loader = DataLoader(
        rayprune.torch.WithIds(dataset),
        batch_sampler=ours.batch_sampler(),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    expected = batches_of(theirs)
    for epoch in ours:
        total = 0.0
        assert len(loader) == epoch.num_steps
        for batch in loader:
            x, labels, ids = batch.values() if isinstance(batch, dict) else batch
            index, planned, planned_x, planned_labels = next(expected)
            assert (epoch.index, ids.tolist()) == (index, planned)
            assert torch.equal(x, planned_x)
            assert torch.equal(labels, planned_labels)
            total += float(epoch.weigh(batch if isinstance(batch, dict) else ids, x.square().sum(1)))
        assert total > 0
    assert next(expected, None) is None
    scores, others = ours.scores(), theirs.scores()
    assert all(np.array_equal(scores[name], others[name], equal_nan=True) for name in others)


def test_a_data_loader_resumes_after_the_newest_weighed_batch() -> None:
    def run(shard: Shard, stop: int | None = None) -> tuple[list[Any], dict[str, Any]]:
        loader = DataLoader(rayprune.torch.WithIds(Pairs()), batch_sampler=shard.batch_sampler(), num_workers=1)
        trained: list[Any] = []
        for epoch in shard:
            for x, _, ids in loader:
                trained.append((epoch.index, ids.tolist(), float(epoch.weigh(ids, x.square().sum(1)))))
                if len(trained) == stop:
                    return trained, shard.state_dict()
        return trained, {}

    whole, _ = run(shard_of(Pairs()))
    first, state = run(shard_of(Pairs()), 13)
    again = shard_of(Pairs())
    again.load_state_dict(state)
    assert first + run(again)[0] == whole


def test_misuse_of_the_batch_sampler_is_explained() -> None:
    shard = shard_of(Rows())
    loader = DataLoader(rayprune.torch.WithIds(Rows()), batch_sampler=shard.batch_sampler())
    with pytest.raises(TypeError, match="number of batches is known in the body"):
        len(loader)
    with pytest.raises(RuntimeError, match="use batch_sampler in the body"):
        next(iter(loader))
    epoch = next(shard.epochs())
    list(loader)
    with pytest.raises(RuntimeError, match="epoch 0 was iterated already"):
        list(epoch)
    with pytest.raises(ValueError, match="key 'id' of their own"):
        rayprune.torch.WithIds([{"id": 3}])[0]
    assert rayprune.torch.WithIds(torch.arange(3))[1] == (torch.tensor(1), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_workers": -1}, "num_workers -1 must be 0 or a number of processes"),
        ({"num_workers": 2, "stream": "device"}, "num_workers 2 needs stream='local'"),
    ],
)
def test_wrong_numbers_of_processes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shard_of(Rows(), **changes)
