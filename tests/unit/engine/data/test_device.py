"""`stream: device` has the plans, batches and results of `stream: local`, and refuses data that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import rayprune
from rayprune.config import Config, make_config
from rayprune.config.yaml import merge
from rayprune.engine.data import device as device_stream
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.device import DevicePlacer, DeviceStream, check_columns, pack_rows, unpack_rows
from rayprune.engine.data.transport import LocalStream, Transport
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import PlanPass
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.train.driver import RunResult, train
from rayprune.engine.train.metrics import MetricSums
from rayprune.nn.device import host_tensor
from rayprune.sources import SampleSource, Schema, open_data
from rayprune.sources.base import Column
from tests.support.runs import assert_same_run, pass_of, run_config, stream_pass

CPU = torch.device("cpu")
SOURCES = open_data("digits", limit=301).by_name


def read(via: Transport, plan_pass: PlanPass, rank: int = 0) -> list[Batch]:
    scores = ScoreClient.in_process(ScoreSpec({"name": "full"}, SOURCES["train"], 37, 3, 5, 12, "pad", 72, None, 0))
    return list(stream_pass(scores, plan_pass, via, rank))


@pytest.mark.parametrize("plan_pass", [pass_of(0, "train", 1), pass_of(0, "train", 3, 5), pass_of(0, "validate", 2)])
@pytest.mark.parametrize("span_rows", [16, 65_536])
def test_batches_are_those_of_the_local_stream(
    monkeypatch: pytest.MonkeyPatch, plan_pass: PlanPass, span_rows: int
) -> None:
    monkeypatch.setattr("rayprune.engine.scoring.session.SPAN_ROWS", span_rows)
    monkeypatch.setattr(device_stream, "LOAD_BYTES", 72 * 50)  # pieces that do not divide the data
    rank = plan_pass.world_size - 1
    local, resident = (read(via, plan_pass, rank) for via in (LocalStream(SOURCES), DeviceStream(SOURCES, CPU)))
    assert len(local) == len(resident) > 1
    place = DevicePlacer("image", CPU)
    for ours, theirs in zip(resident, local, strict=True):
        assert ours.columns.keys() == theirs.columns.keys()
        for name, column in theirs.columns.items():
            assert torch.equal(torch.as_tensor(ours.columns[name]), torch.as_tensor(column))
        one, other = place(ours), place(theirs)
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
        for name, expected in (("ids", theirs.ids), ("weights", theirs.weights), ("real", theirs.real)):
            assert np.array_equal(getattr(ours, name), expected)
            assert torch.equal(getattr(one.rows, name), torch.from_numpy(expected))
            assert torch.equal(getattr(other.rows, name), torch.from_numpy(expected))


def test_batches_prepared_in_the_reading_thread_arrive_unchanged() -> None:
    plan_pass, place = pass_of(0, "train", 1), DevicePlacer("image", CPU)
    made, plain = (read(LocalStream(SOURCES, how), plan_pass) for how in (host_tensor, None))
    for ours, theirs in zip(made, plain, strict=True):
        assert isinstance(ours.columns["image"], torch.Tensor)
        assert ours.num_bytes == theirs.num_bytes
        assert torch.equal(place(ours).inputs, place(theirs).inputs)


def test_bytes_are_counted_once_when_they_are_read() -> None:
    via = DeviceStream(SOURCES, CPU)
    every = sum(column.nbytes for column in SOURCES["train"].take(np.arange(301)).values())
    assert [batch.num_bytes for batch in read(via, pass_of(0, "train", 1))] == [every] + 25 * [0]
    assert sum(batch.num_bytes for batch in read(via, pass_of(0, "train", 1, 3))) == 0


def test_packing_keeps_ids() -> None:
    ids = np.array([0, 2**53 + 1, 2**62 + 3], np.int64)
    rows = unpack_rows(pack_rows(ids, np.array([1.5, 0, 2], np.float32), np.array([True, False, True])))
    assert rows.ids.dtype == torch.int64
    assert rows.ids.tolist() == ids.tolist()
    assert rows.weights.tolist() == [1.5, 0, 2]
    assert rows.real.tolist() == [True, False, True]
    assert rows[1:2].ids.tolist() == [2**53 + 1]


def both(tmp_path: Path, **sections: dict[str, Any]) -> list[RunResult]:
    configs = (run_config(tmp_path, name, **merge(sections, {"scaling": {"stream": name}})) for name in STREAMS)
    return [train(config) for config in configs]


STREAMS = ("local", "device")
SHORT: dict[str, Any] = {"train": {"epochs": 3, "batch_size": 32}, "data": {"augment": {"crop": 1}}}
L2W: dict[str, Any] = {
    "model": {"name": "msdnet", "num_blocks": 2, "channels": 4, "growth_rate": 2},
    "train": {"epochs": 2, "batch_size": 64, "step": {"name": "l2w", "meta_interval": 2}},
    "method": {"name": "random_epoch", "prune_ratio": 0.5},
}
# A method that scores all samples between its epochs.
SWEPT: dict[str, Any] = {"method": {"name": "dynams", "budget": 0.6, "block_epochs": 1}}


@pytest.mark.parametrize("sections", [{"method": {"name": "full"}}, {}, SWEPT], ids=["full", "infobatch", "swept"])
def test_a_run_equals_one_with_the_local_stream(tmp_path: Path, sections: dict[str, Any]) -> None:
    local, resident = both(tmp_path, **merge(SHORT, sections))
    assert_same_run(local, resident)
    assert (resident.metrics[-1]["samples_forwarded"] > 0) == (sections is SWEPT)
    read_once = sum(column.nbytes for part in SOURCES.values() for column in part.take(np.arange(len(part))).values())
    assert resident.metrics[-1]["bytes_read"] == read_once < local.metrics[-1]["bytes_read"]


def test_meta_batches_equal_those_of_the_local_stream(tmp_path: Path) -> None:
    local, resident = both(tmp_path, **L2W)
    assert resident.metrics[-1]["samples_meta"] > 0
    assert_same_run(local, resident)


def test_a_run_resumes_inside_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = merge(SHORT, {"run": {"checkpoint_steps": 3}})
    whole = train(run_config(tmp_path, "whole", **sections))
    config = run_config(tmp_path, "broken", **merge(sections, {"scaling": {"stream": "device"}}))
    with monkeypatch.context() as patched:
        patched.setattr(MetricSums, "add", _fails_after(13))
        with pytest.raises(Exception, match="pulled the plug"):
            train(config)
    assert newest_position(tmp_path / "broken")[1] > 0
    assert_same_run(whole, train(config))


def _fails_after(steps: int) -> Any:
    calls, add = iter(range(steps)), MetricSums.add

    def counted(*args: Any, **options: Any) -> None:
        if next(calls, None) is None:
            raise OSError("pulled the plug")
        add(*args, **options)

    return counted


@dataclass(frozen=True)
class Named(SampleSource):
    """The digits with a column of text."""

    def __len__(self) -> int:
        return 301

    @property
    def schema(self) -> Schema:
        known = SOURCES["train"].schema
        return Schema({**known.columns, "name": Column((), "<U4")}, "image", 10)

    @property
    def fingerprint(self) -> str:
        return "named"

    @property
    def labels(self) -> np.ndarray:
        return SOURCES["train"].labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return {**SOURCES["train"].take(ids), "name": ids.astype("<U4")}


def test_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stream device: column 'name' has dtype <U4, .*: use stream local$"):
        check_columns(Named().schema)


def test_data_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 20_000

    # Only here: the checks before it find enough for the model and a batch.
    monkeypatch.setattr(device_stream, "psutil", SimpleNamespace(virtual_memory=Little))
    with pytest.raises(ValueError, match=r"take .* GiB, more than 80% of the .* free on cpu: use .*fewer samples"):
        train(device_config(tmp_path))
    assert not (tmp_path / "run").exists()


def device_config(tmp_path: Path) -> Config:
    return make_config(merge(run_config(tmp_path).model_dump(mode="json"), {"scaling": {"stream": "device"}}))


def test_custom_loops_get_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(stream: Any) -> tuple[torch.Tensor, dict[str, np.ndarray], list[list[int]]]:
        torch.manual_seed(0)
        model, ids = torch.nn.Linear(64, 10), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        shard = rayprune.local_loader(SOURCES["train"], rayprune.InfoBatch(), 3, 64, stream=stream)
        for epoch in shard.epochs():
            for batch in epoch.iter_torch_batches():
                ids.append(batch["id"].tolist())
                logits = model(batch["image"].flatten(1) / 16)
                loss = epoch.weigh(batch, torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none"))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.weight.detach(), shard.scores(), ids

    (local, scores, ids), (resident, theirs, same) = trained("local"), trained("device")
    assert torch.equal(local, resident)
    assert ids == same
    assert all(np.array_equal(scores[name], theirs[name], equal_nan=True) for name in scores)


def test_a_loop_with_a_collate_function_is_refused() -> None:
    shard = rayprune.local_loader(SOURCES["train"], rayprune.InfoBatch(), 3, 64, stream="device")
    batches = next(shard.epochs()).iter_torch_batches(collate_fn=dict)
    with pytest.raises(ValueError, match=r"collate_fn takes NumPy columns.*prune\(stream='local'\)"):
        next(batches)
    with pytest.raises(ValueError, match="which tensors cannot hold"):
        rayprune.local_loader(Named(), rayprune.InfoBatch(), 3, 64, stream="device")
    with pytest.raises(ValueError, match="stream 'ray' is not one of local, device"):
        rayprune.local_loader(SOURCES["train"], rayprune.InfoBatch(), 3, 64, stream="ray")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda': torch finds no GPU here"):
            rayprune.local_loader(SOURCES["train"], rayprune.InfoBatch(), 3, 64, device="cuda")
