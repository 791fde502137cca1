"""Deliver a planned run's batches through a torch DataLoader.

The batch sampler yields *codes*: the id of a real row, and ~id (negative) of padding. Only real rows reach the user's
collate function, so an epoch's last batch may be short, as without pruning. A rank with no real row gets one row of
padding, because all ranks must make the same number of forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from rayprune.errors import ConfigError, DataError, UsageError
from rayprune.trainers.run import ID_KEY, PlannedRun


class PlannedLoader:
    """Iterate over the current epoch's batches; the base of the loaders that the trainers get.

    It has no length for those that would remember it: epochs differ.

    Args:
        run: the planned run; None if it is made later, and set before the first iteration.
        dataset: a map-style Dataset of N items.
        collate_fn: as for a DataLoader. It must keep the order of its items.
        id_key: the key of the ids in a batch that is a mapping.
        **options: for the DataLoader, such as num_workers and pin_memory.

    Attributes:
        run, dataset: as passed.

    Raises:
        ConfigError: an option that the plan sets itself, or a dataset that can't be read by id.
    """

    def __init__(
        self,
        run: PlannedRun | None,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        id_key: str = ID_KEY,
        **options: Any,
    ) -> None:
        check_map_style(dataset)
        if taken := options.keys() & {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"}:
            raise ConfigError(
                f"{', '.join(sorted(taken))} can't be set, as the plan sets the batches and their order: leave it out"
            )
        self.run, self.dataset = run, dataset
        collate: Any = _Collate(default_collate if collate_fn is None else collate_fn, id_key)
        self.data_loader = DataLoader(_CodedItems(dataset), batch_sampler=_Codes(self), collate_fn=collate, **options)

    @property
    def planned(self) -> PlannedRun:
        """The planned run.

        Raises:
            UsageError: there is none yet.
        """
        if self.run is None:
            raise UsageError(
                "the loader has no plan: give the Trainer its callback (callbacks=[…]), and make the loader of "
                "validation data with a DataLoader"
            )
        return self.run

    def __iter__(self) -> Iterator[Any]:
        """Yield batches with their ids."""
        run = self.planned
        # torch draws a number for its workers at every start. Inside an epoch it must not be one of the global
        # generator's, whose state a checkpoint has restored.
        seed = [run.selector.seed, max(0, run.epoch), run.step, run.rank]
        number = int(np.random.default_rng(seed).integers(2**63))
        self.data_loader.generator = torch.Generator().manual_seed(number) if run.step else None
        return iter(self.data_loader)


def check_map_style(dataset: Any) -> None:
    """Raise ConfigError unless items can be read by id."""
    if isinstance(dataset, Mapping):
        raise ConfigError(
            f"{type(dataset).__name__} is a mapping of datasets or columns: choose a split, as in data['train']"
        )
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"{type(dataset).__name__} can't be read by id, and selection needs that: give a map-style dataset (with "
            "__len__ and __getitem__)"
        )


class _Codes(Sampler[list[int]]):
    def __init__(self, loader: PlannedLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader.planned.codes()


class _CodedItems(Dataset[Any]):
    """Fetch the real rows of a batch of codes, or one row of padding."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, codes: list[int]) -> tuple[list[int], list[Any]]:
        kept = [code for code in codes if code >= 0] or codes[:1]
        ids = [code if code >= 0 else ~code for code in kept]
        many = getattr(self._dataset, "__getitems__", None)
        return kept, many(ids) if many else [self._dataset[each] for each in ids]


@dataclass(frozen=True)
class _Collate:
    """Call the user's collate function and add the ids to its result."""

    collate_fn: Callable[[list[Any]], Any]
    id_key: str

    def __call__(self, coded: tuple[list[int], list[Any]]) -> Any:
        codes, items = coded
        ids, batch = np.array(codes, dtype=np.int64), self.collate_fn(items)
        if isinstance(batch, Mapping):
            if self.id_key in batch:
                raise DataError(
                    f"the batches have a key {self.id_key!r} of their own, and rayprune adds one: rename it"
                )
            return {**batch, self.id_key: ids}
        return (*batch, ids) if isinstance(batch, tuple | list) else (batch, ids)
