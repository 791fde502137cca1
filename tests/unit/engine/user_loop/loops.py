"""A classifier trained in a custom loop, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import rayprune
from rayprune.engine.user_loop.shard import Shard

N, EPOCHS, BATCH = 301, 5, 32
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
DATA = {"x": X, "label": (X[:, 0] > 0).astype(np.int64)}
METHOD = rayprune.InfoBatch(prune_ratio=0.5, anneal_start=1.0)
# (epoch, ids, weights, losses) of each batch
Batches = list[tuple[int, list[int], list[float], list[float]]]


def local_shard(**changes: Any) -> Shard:
    return rayprune.local_loader(
        **{"source": DATA, "method": METHOD, "num_epochs": EPOCHS, "batch_size": BATCH, **changes}
    )


class Loop:
    """A small classifier, with every batch that it was trained on."""

    def __init__(self, shard: Shard) -> None:
        torch.manual_seed(0)
        self.shard, self.model = shard, torch.nn.Linear(5, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.batches: Batches = []
        self.hashes: dict[int, str] = {}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.shard.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.shard.load_state_dict(state["data"])

    def run(self, stop: tuple[int, int] | None = None, save: Callable[[], None] | None = None) -> Loop:
        for epoch in self.shard.epochs():
            self.hashes[epoch.index] = epoch.plan_hash
            for batch in epoch.iter_torch_batches():
                losses = cross_entropy(self.model(batch["x"]), batch["label"], reduction="none")
                loss = epoch.weigh(batch, losses)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.batches.append((epoch.index, batch["id"].tolist(), batch["weight"].tolist(), losses.tolist()))
                if (epoch.index, epoch.step) == stop:
                    assert save is not None
                    save()
                    return self
        return self
