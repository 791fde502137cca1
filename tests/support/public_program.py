"""A user's program that uses every public name of rayprune; mypy checks it in tests/project/test_public_api.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray

import rayprune


@dataclass(frozen=True)
class KeepFirst(rayprune.Method):
    """A method of the user's own."""

    kind = "dynamic"
    paper = "none"
    signals = ("loss",)
    prune_ratio: float | rayprune.Schedule = 0.5

    def select(self, table: rayprune.ScoreTable, context: rayprune.EpochContext) -> rayprune.Selection:
        """Keep the lower half of the ids."""
        num_samples, drops = context.num_samples, context.num_samples // 2
        kept = np.arange(num_samples - drops)
        return rayprune.Selection.of_ids(kept, num_samples, requested=0.5, expected_drops=drops)


@dataclass(frozen=True)
class FirstHalf(rayprune.InBatchMethod):
    """An in-batch method of the user's own."""

    paper = "none"

    def picks(self, context: rayprune.StepContext) -> bool:
        """Pick in the second half of training."""
        return context.progress >= 0.5

    def pick(
        self, signals: Mapping[str, NDArray[Any]], context: rayprune.BatchContext
    ) -> tuple[NDArray[np.int64], NDArray[Any] | None]:
        """Keep the lower half of the ids."""
        return np.arange((context.num_rows + 1) // 2), None


METHODS: list[rayprune.Method] = [
    FirstHalf(),
    rayprune.Full(),
    rayprune.Random(prune_ratio=0.5),
    rayprune.RandomEpoch(prune_ratio=rayprune.Schedule.of(0.5)),
    rayprune.InfoBatch(prune_ratio=0.5),
    rayprune.DynaMS(budget=0.6),
    rayprune.TDDS(prune_ratio=0.3),
    rayprune.LeastConfidence(score_epochs=2),
    rayprune.Fixed(path="chosen.parquet"),
    rayprune.Shuffled(rayprune.InfoBatch()),
    rayprune.build_method({"name": "infobatch"}),
    KeepFirst(),
]


rayprune.testing.check_method(KeepFirst)


def train(data: dict[str, NDArray[Any]], model: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """Train in this process."""
    shard = rayprune.local_loader(data, METHODS[0], num_epochs=2, batch_size=8)
    assert_type(shard, rayprune.Shard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = rayprune.torch.progress_lr(optimizer, lambda progress: 1 - progress)
    epochs: Iterator[rayprune.Epoch] = shard.epochs()
    for epoch in epochs:
        for batch in epoch.iter_torch_batches():
            losses = torch.nn.functional.cross_entropy(model(batch["x"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)
            assert_type(loss, torch.Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step(assert_type(shard.progress, float), scale=epoch.lr_scale)
    shard.load_state_dict(shard.state_dict())
    return shard.scores()


def on_a_cluster(data: dict[str, NDArray[Any]]) -> rayprune.PrunedData:
    """Stream through Ray Data."""

    def loop() -> None:
        assert_type(rayprune.get_dataset_shard("train"), rayprune.Shard)

    loop()
    numbered = rayprune.with_ids(ray.data.from_numpy(data["x"]))
    rayprune.prune(numbered, rayprune.Full(), num_epochs=2, batch_size=8).close()
    return rayprune.prune(data, method=rayprune.InfoBatch(), num_epochs=2, batch_size=8, label_column="label")


def by_hand(labels: NDArray[np.int64]) -> rayprune.Plan:
    """Select without a loader."""
    selector = rayprune.Selector(rayprune.InfoBatch(), labels.size, 2, 0, labels)
    selection = selector.begin_epoch(0)
    assert_type(selection, rayprune.Selection)
    return rayprune.Plan.of_selection(selection, 8, 0, 0)


def draw_prompts(rewards: NDArray[np.float64]) -> NDArray[np.int64]:
    """Select prompts in this process and through an actor."""
    selector = rayprune.PromptSelector(100, rayprune.prompts.MoPPS(target=0.4), group_size=8)
    client = rayprune.serve_prompts(selector, "prompts")
    ids = assert_type(client, rayprune.PromptClient).next(10)
    rayprune.connect_prompts("prompts").observe(ids, rewards, wait=False)
    selector.load_state_dict(client.state_dict())
    return assert_type(selector.next(10), NDArray[np.int64])


def explain(error: rayprune.RaypruneError) -> str:
    """Say what to do about an error."""
    match error:
        case rayprune.ConfigError() | rayprune.DataError() | rayprune.RunFolderError() | rayprune.ClusterError():
            return f"{rayprune.__version__}: fix the input: {error}"
        case rayprune.TrainingPaused():
            return "run it again"
        case rayprune.TrainingStopped() | rayprune.TrainingFailed() | rayprune.UsageError():
            return "fix the program"
        case _:
            return "report it"
