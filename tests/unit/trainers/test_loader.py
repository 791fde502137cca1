"""Batches of a planned run through a DataLoader: ids, padding, collate functions, options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import rayprune
from rayprune.errors import ConfigError, DataError, UsageError
from rayprune.trainers.loader import PlannedLoader
from rayprune.trainers.run import PlannedRun, split_ids

N = 11


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([index * index])}


class Fetched(Squares):
    """Fetches a batch at once."""

    calls: list[list[int]]

    def __getitems__(self, ids: list[int]) -> list[Any]:
        self.calls.append(ids)
        return [self[each] for each in ids]


def begun(rank: int = 0, world_size: int = 1, num_samples: int = N, rows: int = 4) -> PlannedRun:
    run = PlannedRun(rayprune.Full(), num_samples, 2, rows, rank=rank, world_size=world_size)
    run.begin_epoch(0)
    return run


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_carry_the_ids_of_their_rows(num_workers: int) -> None:
    run = begun()
    batches = list(PlannedLoader(run, Squares(), num_workers=num_workers))
    assert [len(batch["id"]) for batch in batches] == [4, 4, 3], "no padding row reaches the collate function"
    for batch in batches:
        assert isinstance(batch["id"], np.ndarray)
        assert batch["x"].flatten().tolist() == (batch["id"] ** 2).tolist()
    assert np.concatenate([batch["id"] for batch in batches]).tolist() == run.plan.order[:N].tolist()


def test_the_loader_follows_the_runs_epoch_and_step() -> None:
    run = begun()
    loader = PlannedLoader(run, Squares())
    run.record(run.next_batch(), {"loss": torch.zeros(4)})
    assert len(list(loader)) == 2
    run.begin_epoch(1)
    assert next(iter(loader))["id"].tolist() == run.plan.order[:4].tolist()


def test_tuples_and_other_batches_get_the_ids_last() -> None:
    tensors = TensorDataset(torch.arange(N), -torch.arange(N))
    for batch in PlannedLoader(begun(), tensors):
        assert isinstance(batch, tuple)
        ids, (x, y) = split_ids(batch)
        assert x.tolist() == ids.tolist()
        assert y.tolist() == (-ids).tolist()
    batch = next(iter(PlannedLoader(begun(), list(range(N)))))
    assert batch[0].tolist() == batch[1].tolist()
    batch = next(iter(PlannedLoader(begun(), list(range(N)), collate_fn=sum)))
    assert batch[0] == batch[1].sum()


def test_a_dataset_that_fetches_batches_gets_whole_batches() -> None:
    data = Fetched()
    data.calls = []
    batches = list(PlannedLoader(begun(), data))
    assert data.calls == [batch["id"].tolist() for batch in batches]


def test_a_rank_without_real_rows_gets_one_row_of_padding() -> None:
    (batch,) = PlannedLoader(begun(rank=1, world_size=2, num_samples=4), Squares())
    assert batch["id"].shape == (1,)
    assert batch["id"][0] < 0
    assert batch["x"].item() == int(~batch["id"][0]) ** 2


def test_a_key_of_the_same_name_is_refused() -> None:
    with pytest.raises(DataError, match="the batches have a key 'x' of their own, and rayprune adds one: rename it"):
        next(iter(PlannedLoader(begun(), Squares(), id_key="x")))


@pytest.mark.parametrize("option", ["batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"])
def test_options_that_the_plan_sets_are_refused(option: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{option} can't be set, as the plan sets the batches and their order: leave it out"
    ):
        PlannedLoader(begun(), Squares(), **{option: None})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield 1


@pytest.mark.parametrize("data", [Stream(), iter([1]), 5])
def test_data_that_cannot_be_read_by_id_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{type(data).__name__} can't be read by id"):
        PlannedLoader(begun(), data)


def test_a_loader_without_a_plan_says_so() -> None:
    with pytest.raises(UsageError, match="the loader has no plan: give the Trainer its callback"):
        next(iter(PlannedLoader(None, Squares())))


def test_going_on_inside_an_epoch_draws_no_random_number() -> None:
    """A resumed run must not shift the random numbers that a checkpoint restored, such as those of dropout."""
    run = begun()
    loader = PlannedLoader(run, Squares())
    run.record(run.next_batch(), {"loss": torch.zeros(4)})
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), expected)
