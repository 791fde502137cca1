"""The Recorder: which rows it pushes, and that NaN losses are counted, named, kept out of the table, and stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.engine.scoring import recorder
from rayprune.engine.scoring.channel import LocalChannel
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, unpack
from rayprune.engine.scoring.recorder import PendingCopy, Recorder
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import train
from rayprune.errors import TrainingStopped
from tests.support.runs import run_config, scores_of, user

KEY = AttemptKey(1, 0)


class KeptPushes(LocalChannel):
    """A channel that keeps what it is sent."""

    def __init__(self) -> None:
        self.pushes: list[dict[str, np.ndarray]] = []

    def post(self, method: str, *args: Any) -> None:
        key, push = args
        assert (method, key, push.sequence, push.sweep) == ("observe", KEY, len(self.pushes), False)
        self.pushes.append({name: array.copy() for name, array in unpack(push.layout, push.buffer).items()})


def record_all(client: KeptPushes, losses: np.ndarray, batch: int, real: np.ndarray) -> Recorder:
    """Record ids 0..N−1 in batches; return the Recorder after its last push."""
    one = Recorder(ScoreClient(client), 0, ("loss",))
    one.start_epoch(KEY)
    ids = np.arange(losses.size)
    for start in range(0, losses.size, batch):
        rows = slice(start, start + batch)
        one.record(ids[rows], real[rows], {"loss": torch.from_numpy(losses[rows]), "unused": torch.zeros(batch, 2)})
    one.push()
    assert one.num_pushes == len(client.pushes)
    return one


@pytest.mark.parametrize(("batch", "sizes"), [(5, [20, 20, 10]), (8, [16, 16, 18]), (20, [40, 10])])
def test_pushes_are_whole_batches_and_at_least_two_of_them(
    monkeypatch: pytest.MonkeyPatch, batch: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(recorder, "PUSH_ROWS", 20)
    client, losses = KeptPushes(), np.arange(50, dtype=np.float32)
    record_all(client, losses, batch, np.ones(50, dtype=bool))
    assert [push["id"].size for push in client.pushes] == sizes
    assert np.concatenate([push["id"] for push in client.pushes]).tolist() == list(range(50))
    assert np.array_equal(np.concatenate([push["loss"] for push in client.pushes]), losses)
    assert all(set(push) == {"id", "loss"} for push in client.pushes)


@pytest.mark.parametrize("late", [1, 2, 3, 100])
def test_late_device_copies_are_pushed_whole_and_in_order(monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    """As on a GPU: a copy takes the time of `late` batches, in which the buffers are written again."""

    class Late(PendingCopy):
        def __init__(self, ids: np.ndarray, signals: dict[str, torch.Tensor], sweep: bool) -> None:
            super().__init__(ids, {name: tensor.clone() for name, tensor in signals.items()}, sweep)
            self.num_queries = 0

        def is_complete(self) -> bool:
            self.num_queries += 1
            return self.num_queries > late

    monkeypatch.setattr(recorder, "PUSH_ROWS", 20)
    monkeypatch.setattr(recorder, "PendingCopy", Late)
    client, losses = KeptPushes(), np.arange(50, dtype=np.float32)
    losses[33] = np.nan
    one = record_all(client, losses, 5, np.ones(50, dtype=bool))
    assert [push["id"].size for push in client.pushes] == [20, 20, 10]
    assert np.concatenate([np.sort(push["id"]) for push in client.pushes]).tolist() == list(range(50))
    assert all(np.array_equal(losses[push["id"]], push["loss"], equal_nan=True) for push in client.pushes)
    assert (one.num_nonfinite, one.nonfinite_ids) == (1, [33])


def test_padding_is_never_recorded() -> None:
    client, real = KeptPushes(), np.arange(12) % 3 != 2
    record_all(client, np.arange(12, dtype=np.float32), 4, real)
    assert client.pushes[0]["id"].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert client.pushes[0]["loss"].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]


def test_nothing_is_pushed_for_a_method_without_signals() -> None:
    client = KeptPushes()
    silent = Recorder(ScoreClient(client), 0, ())
    silent.start_epoch(KEY)
    silent.record(np.arange(4), np.ones(4, dtype=bool), {"loss": torch.zeros(4)})
    silent.push()
    assert silent.num_pushes == 0
    assert client.pushes == []


def test_nonfinite_rows_are_counted_with_their_ids() -> None:
    losses = np.arange(10, dtype=np.float32)
    losses[[2, 7]] = np.nan, np.inf
    one = record_all(KeptPushes(), losses, 5, np.ones(10, dtype=bool))
    assert (one.num_nonfinite, one.nonfinite_ids) == (2, [2, 7])


def nan_run(tmp_path: Path, rows: int, max_nonfinite: int) -> Any:
    return run_config(
        tmp_path,
        model={"name": user("nan_rows"), "rows": rows},
        method={"name": "infobatch", "prune_ratio": 0.0},
        train={"epochs": 2, "batch_size": 32, "max_nonfinite": max_nonfinite},
        data={"source": "digits", "limit": 64},
    )


def test_nan_losses_stay_out_of_the_table(tmp_path: Path) -> None:
    result = train(nan_run(tmp_path, rows=1, max_nonfinite=4))  # one in each of two batches of two epochs
    scores = scores_of(result.folder)
    assert np.isfinite(scores["loss"]).all()
    assert (scores["last_visit"] == 0).sum() == 2, "in the last epoch two samples were not observed"
    assert (scores["last_visit"] == 1).sum() == 62


@pytest.mark.parametrize(("rows", "max_nonfinite", "epochs_done", "count"), [(1, 3, 1, 4), (32, 10, 0, 64)])
def test_too_many_nan_losses_stop_the_run(
    tmp_path: Path, rows: int, max_nonfinite: int, epochs_done: int, count: int
) -> None:
    with pytest.raises(TrainingStopped, match=rf"{count} losses were NaN .* {max_nonfinite}; first sample ids \[\d+, "):
        train(nan_run(tmp_path, rows, max_nonfinite))
    assert len(read_metrics(tmp_path / "run")) == epochs_done


def test_a_full_buffer_stops_a_run_in_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PUSH_ROWS", 64)
    config = nan_run(tmp_path, rows=32, max_nonfinite=10)
    longer = config.model_copy(update={"data": config.data.model_copy(update={"limit": 128})})
    with pytest.raises(TrainingStopped, match="64 losses were NaN"):  # of the epoch's 128
        train(longer)
