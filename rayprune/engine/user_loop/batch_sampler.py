"""Plans for a DataLoader of the user's own: a batch sampler, and a Dataset whose items carry their ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, Sampler

from rayprune.errors import DataError


class ShardBatchSampler(Sampler[list[int]]):
    """Yield the ids of this worker's batches of a shard's current epoch, in the plan's order.

    `Shard.batch_sampler` returns it. One DataLoader serves the whole run.

    Args:
        epoch_ids: returns the current epoch's batches of ids, and may be called once per epoch.
        num_batches: returns their number.
    """

    def __init__(self, epoch_ids: Callable[[], Iterator[list[int]]], num_batches: Callable[[], int]) -> None:
        self._epoch_ids, self._num_batches = epoch_ids, num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._epoch_ids()

    def __len__(self) -> int:
        return self._num_batches()


class WithIds(Dataset[Any]):
    """A map-style Dataset whose items carry their ids.

    A mapping gets the key `id`; a tuple or list gets the id as its last element; any other item becomes (item, id).

    Args:
        dataset: a map-style Dataset. `__getitems__` is used if it exists.

    >>> WithIds([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _with_id(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return several items."""
        many = getattr(self.dataset, "__getitems__", None)
        items = many(indices) if many else [self.dataset[index] for index in indices]
        return [_with_id(item, index) for item, index in zip(items, indices, strict=True)]


def _with_id(item: Any, index: int) -> Any:
    if isinstance(item, Mapping):
        if "id" in item:
            raise DataError("the items have a key 'id' of their own, and rayprune adds one: rename it")
        return {**item, "id": index}
    return (*item, index) if isinstance(item, tuple | list) else (item, index)
