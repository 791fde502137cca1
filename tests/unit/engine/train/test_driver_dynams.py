"""DynaMS in the engine: the cost of sweeps, resuming inside a block, the proxy, custom loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rayprune
from rayprune.engine.storage.checkpoint import load_selector_state, newest_checkpoint
from rayprune.engine.train.driver import RunResult, train
from rayprune.nn.boundary import boundary_distance, pair_distances
from rayprune.nn.models import build_model
from rayprune.sources import open_data
from tests.support.runs import assert_same_run, run_config, user

METHOD = {"name": "dynams", "budget": 0.7, "block_epochs": 2}
PROXY = {**METHOD, "proxy_width": 0.5}


def dynams(tmp_path: Path, name: str = "run", method: dict[str, Any] | None = None, **sections: Any) -> Any:
    """Return a run of six epochs in three blocks on a small residual network."""
    train_section = {"epochs": 6, "batch_size": 32, **sections.pop("train", {})}
    sections = {"model": {"name": "resnet8"}, "data": {"source": "digits", "limit": 120}, **sections}
    return run_config(tmp_path, name, method=method or METHOD, train=train_section, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(dynams(tmp_path_factory.mktemp("dynams")))


@pytest.fixture(scope="module")
def with_proxy(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(dynams(tmp_path_factory.mktemp("psp"), method=PROXY))


def test_sweeps_are_counted_separately_and_the_budget_is_met(finished: RunResult) -> None:
    num = finished.metrics[0]["num_samples"]
    assert [line["samples_forwarded"] for line in finished.metrics] == [0, num, num, 2 * num, 2 * num, 2 * num]
    last = finished.metrics[-1]
    assert last["samples_trained"] == pytest.approx(0.7 * 6 * num, abs=3)
    assert last["selection"]["budget_so_far"] == pytest.approx(0.7, abs=0.01)
    assert last["compute"] == pytest.approx(last["samples_trained"] + last["samples_padded"] + 2 * num / 3, abs=0.1)
    assert last["seconds"]["forward_only"] == 0
    assert finished.metrics[1]["seconds"]["forward_only"] > 0
    thresholds = [line["selection"].get("threshold") for line in finished.metrics]
    assert thresholds[:2] == [None, None]
    assert thresholds[2] == thresholds[3] > 0
    assert all(len(line["selection"]["class_kept"]) == 10 for line in finished.metrics)


def test_the_distances_of_a_sweep_are_those_of_the_saved_network(tmp_path: Path) -> None:
    result = train(dynams(tmp_path, train={"stop_after": 2}))
    folder = newest_checkpoint(result.folder)
    assert folder is not None
    source = open_data("digits", limit=120).train
    network = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8))
    network.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    ids = np.arange(len(source))
    images = torch.from_numpy(source.take(ids)["image"])
    from rayprune.config import Config
    from rayprune.engine.train.preflight import input_spec

    config: Config = dynams(tmp_path)
    with torch.no_grad():
        logits = network.eval()(input_spec(config, source).augment.evaluate(images))
        expected = boundary_distance(logits, pair_distances(network.fc.weight))
    swept = load_selector_state(result.folder, 2)["table/column/boundary"]
    np.testing.assert_allclose(swept, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("method", ["finished", "with_proxy"])
def test_a_run_stopped_inside_a_block_resumes(
    tmp_path: Path, stop: int, method: str, request: pytest.FixtureRequest
) -> None:
    whole: RunResult = request.getfixturevalue(method)
    chosen = METHOD if method == "finished" else PROXY
    train(dynams(tmp_path, method=chosen, train={"stop_after": stop}))
    assert_same_run(whole, train(dynams(tmp_path, method=chosen)))


def test_compute_includes_the_proxy(finished: RunResult, with_proxy: RunResult) -> None:
    num = with_proxy.metrics[0]["num_samples"]
    first, last = with_proxy.metrics[0], with_proxy.metrics[-1]
    ratio = first["compute"] / (first["samples_trained"] + first["samples_padded"]) - 1
    assert 0.2 < ratio < 0.35  # a quarter of the multiply-adds, and a little of what does not shrink
    rows = last["samples_trained"] + last["samples_padded"]
    assert last["compute"] == pytest.approx(rows * (1 + ratio) + 2 * num * ratio / 3, rel=1e-3)
    assert [line["plan_hash"] for line in finished.metrics[2:]] != [
        line["plan_hash"] for line in with_proxy.metrics[2:]
    ]


def test_a_budget_of_one_trains_as_without_selection(tmp_path: Path) -> None:
    whole = train(dynams(tmp_path, "whole", method={"name": "full"}))
    all_kept = train(dynams(tmp_path, "all", method={"name": "dynams", "budget": 1.0, "block_epochs": 2}))
    keys = ("train_loss", "val_accuracy", "plan_hash", "samples_forwarded")
    assert [[line[k] for k in keys] for line in whole.metrics] == [[line[k] for k in keys] for line in all_kept.metrics]


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ({"proxy_width": 0.01}, {"name": "resnet8"}, "width"),
        ({"budget": 0.2}, {"name": "resnet8"}, r"budget 0\.2 can't be reached: 2 of 6 epochs"),
        ({"prune_ratio": 0.5, "warmup_epochs": 6}, {"name": "resnet8"}, "prune_ratio can't be reached: all 6 epochs"),
        ({"proxy_width": 1.5}, {"name": "resnet8"}, "proxy_width"),
        ({"anchor": "labels"}, {"name": "resnet8"}, "did you mean 'label'"),
        ({"schedule": "powr"}, {"name": "resnet8"}, "did you mean 'power'"),
        ({}, {"name": user("ends_in_a_convolution")}, r"not the output of an nn\.Linear"),
    ],
)
def test_an_invalid_config_is_refused_before_anything_is_written(
    tmp_path: Path, method: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(dynams(tmp_path, method={**METHOD, **method}, model=model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("balance", ["even", "none", "base"])
def test_a_custom_loop_can_sweep(balance: str) -> None:
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(90, 4)).astype(np.float32), "label": rng.integers(0, 3, 90)}
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    method = rayprune.DynaMS(budget=0.7, block_epochs=1, balance=balance)
    shard = rayprune.local_loader(data, method, num_epochs=4, batch_size=16)

    def score(batch: dict[str, Any]) -> dict[str, Any]:
        logits = model(batch["x"])
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return {"losses": losses, "logits": logits, "head": model}

    kept, swept = [], []
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            outputs = score(batch)
            epoch.weigh(batch, outputs["losses"]).backward()
        swept.append(shard.sweep(score))
        kept.append(epoch.num_kept)
    assert swept == [90, 90, 90, 0]
    assert kept[0] == 90
    assert sum(kept) == pytest.approx(0.7 * 4 * 90, abs=2)
    distances = boundary_distance(model(torch.from_numpy(data["x"])), pair_distances(model.weight))
    if balance == "none":
        nearest = np.argsort(distances.detach().numpy(), kind="stable")[: kept[1]]
        assert set(np.flatnonzero(shard.scores()["times_pruned"] == 0)) <= set(nearest)


def test_a_custom_loop_that_does_not_sweep_is_refused() -> None:
    data = {"x": np.zeros((20, 2), np.float32), "label": np.arange(20) % 2}
    shard = rayprune.local_loader(data, rayprune.DynaMS(budget=0.7, block_epochs=1), num_epochs=3, batch_size=4)

    def loop() -> None:
        for epoch in shard.epochs():
            for batch in epoch.iter_torch_batches():
                epoch.weigh(batch, torch.zeros(len(batch["id"])))

    with pytest.raises(ValueError, match=r"have no distance to the boundary.*sweep"):
        loop()
