"""Learned weights with pruning: the weight network learns from all samples, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.run_folder import read_selection
from rayprune.engine.train.build import rate_at
from rayprune.engine.train.driver import train
from rayprune.nn.steps import L2wStep
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import assert_same_run, run_config, scores_of

NUM, BATCH, EVERY = 301, 32, 2


def pruned(tmp_path: Path, name: str = "run", model: dict[str, Any] | None = None, **sections: Any) -> Config:
    """Return a run of four epochs, of which the second and third train on half of the samples or so."""
    step = {"name": "l2w", "hidden": 16, "meta_lr": 1e-2, "meta_interval": EVERY}
    base: dict[str, Any] = {
        "model": model or {"name": f"{MULTI_EXIT_MODELS}:tower"},
        "method": {"name": "infobatch", "prune_ratio": 0.9, "anneal_start": 0.75},
        "data": {"augment": {"crop": 0, "flip": False}},
        "train": {"epochs": 4, "batch_size": BATCH, "step": step},
    }
    return run_config(tmp_path, name, **{**base, **sections})


def test_the_weight_network_learns_from_all_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[bool | None, Tensor | None, Tensor]] = []
    step = L2wStep.__call__

    def listening(self: L2wStep, inputs: Tensor, targets: Tensor, weights: Tensor, **more: Any) -> dict[str, Tensor]:
        meta = more.get("meta")
        heard.append((more.get("learns"), None if meta is None else meta[0].clone(), inputs.clone()))
        return step(self, inputs, targets, weights, **more)

    monkeypatch.setattr(L2wStep, "__call__", listening)
    result = train(pruned(tmp_path))
    kept = [line["kept"] for line in result.metrics]
    steps = [-(-count // BATCH) for count in kept]
    assert kept[0] == kept[3] == NUM
    assert kept[1] < 0.8 * NUM
    place, total = 0, 0
    for epoch, count in enumerate(steps):
        mine = heard[place : place + count]
        place += count
        assert [learns for learns, _, _ in mine] == [number % EVERY == 0 for number in range(count)]
        total += -(-count // EVERY) * BATCH
        line = result.metrics[epoch]
        assert line["samples_meta"] == total
        rows = line["samples_trained"] + line["samples_padded"]
        assert line["compute"] == round(rows + total * 8 / 3, 1), "what weights were learned from is counted"
        if kept[epoch] == NUM:
            assert all(meta is None for _, meta, _ in mine)
            continue
        metas = torch.cat([meta for _, meta, _ in mine if meta is not None])
        assert len(metas) == -(-count // EVERY) * BATCH
        # Distinct digits are distinct images: rows that the selection leaves out are among them.
        trained = {image.numpy().tobytes() for _, _, inputs in mine for image in inputs}
        others = [image for image in metas if image.numpy().tobytes() not in trained]
        left_out = 1 - kept[epoch] / NUM
        assert 0.4 * left_out < len(others) / len(metas) < 1.6 * left_out
    assert place == len(heard)
    assert result.metrics[-1]["samples_trained"] == sum(kept)


def test_meta_batches_do_not_change_the_selection(tmp_path: Path) -> None:
    result = train(pruned(tmp_path))
    visits = np.zeros(NUM, dtype=np.int64)
    for epoch in range(4):
        visits[read_selection(result.folder, epoch).ids] += 1
    scores = scores_of(result.folder)
    assert scores["visits"].tolist() == visits.tolist(), "a meta row is no visit"
    weights = scores[[f"weight_exit_{k}_mean" for k in (1, 2, 3)]].to_numpy()
    assert np.abs(weights.mean(axis=1) - 1.0).max() < 1e-5
    # The learning rate goes by the batches that train: meta batches are no steps of it.
    steps = -(-result.metrics[1]["kept"] // BATCH)
    assert result.metrics[1]["lr"] == rate_at(pruned(tmp_path), 1, steps - 1, steps, 1.0)


@pytest.mark.parametrize("passes", [75, 78, 81, 84])
def test_a_run_stopped_at_a_meta_batch_resumes_exactly(tmp_path: Path, passes: int) -> None:
    model = {"name": f"{MULTI_EXIT_MODELS}:fails_once", "marker": str(tmp_path / "marker"), "passes": passes}
    run = {"storage_path": str(tmp_path), "max_failures": 0, "checkpoint_steps": 1}
    ended = pruned(tmp_path, "parts", model, run={**run, "name": "parts"})
    with pytest.raises(Exception, match="on purpose"):
        train(ended)
    epoch, _ = newest_position(tmp_path / "parts")
    assert epoch in {1, 2}, "it ended in an epoch that prunes"
    parts = train(ended)
    assert_same_run(train(pruned(tmp_path, "whole", model, run={**run, "name": "whole"})), parts)
