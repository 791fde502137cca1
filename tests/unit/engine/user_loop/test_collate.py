"""The format of a loop's batches: dtypes, devices and collate functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rayprune
from tests.unit.engine.user_loop.loops import BATCH, N, X, local_shard


def test_dtypes_and_devices() -> None:
    for device, dtypes, expected in (
        (None, None, torch.float32),
        ("cpu", torch.float64, torch.float64),
        ("auto", {"x": torch.bfloat16}, torch.bfloat16),
    ):
        batch = next(next(local_shard().epochs()).iter_torch_batches(device=device, dtypes=dtypes))
        assert batch["x"].dtype == expected
        assert batch["label"].dtype == torch.int64
        assert (batch["id"].dtype, batch["weight"].dtype) == (torch.int64, torch.float32)
        assert batch["x"].shape == (BATCH, 5)


@pytest.mark.parametrize("num_prefetched", [0, 1, 4])
def test_a_collate_function_gets_the_columns_and_its_batch_can_be_weighed(num_prefetched: int) -> None:
    epoch = next(local_shard().epochs())
    num_batches = 0
    pairs = epoch.iter_torch_batches(
        collate_fn=lambda columns: (torch.from_numpy(columns["x"]), columns["id"]), prefetch_batches=num_prefetched
    )
    for batch in pairs:
        inputs, ids = batch
        assert np.array_equal(inputs.numpy(), X[ids])
        epoch.weigh(batch, inputs.abs().sum(1))
        num_batches += 1
    assert num_batches == epoch.num_steps == len(epoch)


@pytest.mark.parametrize(
    "options", [{"dtypes": {"nope": torch.float32}}, {"dtypes": torch.float16, "collate_fn": dict}]
)
def test_a_wrong_format_is_refused_before_the_epoch_starts(options: dict[str, Any]) -> None:
    epoch = next(local_shard().epochs())
    with pytest.raises(ValueError, match="dtypes"):
        next(epoch.iter_torch_batches(**options))


def test_changing_a_batch_in_place_does_not_change_the_plan() -> None:
    epoch = next(local_shard().epochs())
    for batch in epoch.iter_torch_batches():
        ids = batch["id"].clone()
        batch["weight"].mul_(0)
        assert epoch.weigh(batch, torch.ones(BATCH)) > 0
        assert len(set(ids.tolist())) == BATCH


RAGGED = {"tokens": [np.arange(row % 5) for row in range(N)], "text": [f"row {row}" for row in range(N)]}


def test_ragged_columns_and_text_reach_the_collate_function() -> None:
    def pad(columns: dict[str, Any]) -> dict[str, Any]:
        rows = [torch.from_numpy(row) for row in columns["tokens"]]
        assert all(row.flags.writeable for row in columns["tokens"])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return {"tokens": padded, "text": list(columns["text"]), "id": columns["id"]}

    shard = rayprune.local_loader(RAGGED, rayprune.Full(), num_epochs=1, batch_size=BATCH)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches(collate_fn=pad):
            assert (batch["tokens"] >= 0).sum(1).tolist() == [row % 5 for row in batch["id"]]
            assert batch["text"] == [f"row {row}" for row in batch["id"]]
            epoch.weigh(batch, batch["tokens"].float().mean(1))
    assert np.isfinite(shard.scores()["last_visit"]).all()


def test_a_ragged_column_without_a_collate_function_is_refused_and_text_is_not() -> None:
    epoch = next(rayprune.local_loader(RAGGED, rayprune.Full(), num_epochs=1, batch_size=BATCH).epochs())
    with pytest.raises(ValueError, match=r"column 'tokens' is ragged, .* a collate_fn that pads it") as caught:
        next(epoch.iter_torch_batches())
    assert "\n" not in str(caught.value)
    texts = rayprune.local_loader({"text": RAGGED["text"]}, rayprune.Full(), num_epochs=1, batch_size=BATCH)
    batch = next(next(texts.epochs()).iter_torch_batches())
    assert batch["text"].tolist() == [f"row {row}" for row in batch["id"]]
