"""A tracker gets each line of a run once, in one tracker run; no tracker can end or change a run."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rayprune.config import make_config
from rayprune.engine.storage import trackers
from rayprune.engine.storage.run_folder import append_metrics, read_metrics
from rayprune.engine.storage.trackers import Trackers, check_trackers, failures
from rayprune.engine.train.driver import train
from rayprune.errors import RunFolderError, TrainingStopped
from tests.support.runs import assert_same_run, run_config, tracked, user


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def train_twice(tmp_path: Path, *names: str) -> Path:
    """Train two epochs, then resume for the other two; return the run folder."""
    for stop_after in (2, 4):
        train_sections: dict[str, Any] = {"epochs": 4, "batch_size": 32, "stop_after": stop_after}
        folder = train(run_config(tmp_path, train=train_sections, run={"trackers": list(names)})).folder
    return folder


def test_mlflow_has_one_run_of_all_epochs(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    folder = train_twice(tmp_path, "mlflow")
    (run,), points = tracked(folder)
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["method.name"] == "infobatch"
    metrics = read_metrics(folder)
    assert points["train_loss"] == [(line["epoch"], line["train_loss"]) for line in metrics]
    assert points["val_accuracy"] == [(line["epoch"], line["val_accuracy"]) for line in metrics]
    assert points["seconds/train"] == [(line["epoch"], line["seconds"]["train"]) for line in metrics]


def test_mlflows_variables_choose_server_and_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    folder = train(run_config(tmp_path, train={"epochs": 1}, run={"trackers": ["mlflow"]})).folder
    assert not (folder / "mlflow" / "mlflow.db").exists()
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert len(client.search_runs([client.get_experiment_by_name("mine").experiment_id])) == 1


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    block_bytes, at, parts = 32 * 1024, 7, b""
    while at + 7 <= len(content):
        if block_bytes - at % block_bytes < 7:  # too short for a header: the rest of the block is empty
            at += block_bytes - at % block_bytes
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def wandb_lines(folder: Path) -> dict[int, dict[str, Any]]:
    """Return epoch → the values in the offline files of a run folder, as `wandb sync` would send them."""
    from wandb.proto import wandb_internal_pb2

    lines: dict[int, dict[str, Any]] = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                assert items["_step"] not in lines, "an epoch was logged twice"
                lines[items["_step"]] = items
    return lines


def test_wandb_is_offline_and_continues_its_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = train_twice(tmp_path, "wandb")
    # offline-run-TIME-ID, with a number after it if two start in the same second.
    starts = [path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")]
    assert len(starts) == 2
    assert len(set(starts)) == 1, "the second start has the first one's id"
    metrics = read_metrics(folder)
    lines = wandb_lines(folder)
    assert {epoch: line["train_loss"] for epoch, line in lines.items()} == {
        line["epoch"]: pytest.approx(line["train_loss"]) for line in metrics
    }


def test_an_unreachable_server_costs_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.2)  # its client tries for minutes
    notices: list[str] = []
    result = train(run_config(tmp_path, "away", run={"trackers": ["mlflow"]}), on_notice=notices.append)
    (line,) = [notice for notice in notices if "mlflow" in notice]
    assert line.startswith("mlflow has failed (")
    assert "\n" not in line
    assert_same_run(result, train(run_config(tmp_path, "without")))


class Fails:
    """Accept one epoch, or two after a restart, then fail."""

    accepted: list[int] = []  # noqa: RUF012  # shared on purpose: each start of a run opens a new tracker

    def __init__(self, run_folder: Path, config: Any, state: dict[str, Any]) -> None:
        self.epochs = 2 if self.accepted else 1

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        if not self.epochs:
            raise OSError("no space left on device")
        self.epochs -= 1
        self.accepted.append(epoch)

    def close(self, finished: bool) -> None:
        self.accepted.append(-1)


def test_the_next_start_sends_the_epochs_that_a_tracker_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers._OPEN, "tensorboard", Fails)
    notices: list[str] = []
    for stop_after in (2, 3):
        train(run_config(tmp_path, train={"stop_after": stop_after}), on_notice=notices.append)
    assert notices == [
        "tensorboard has failed (OSError: no space left on device); the run is not affected, and its next start sends "
        "tensorboard the rest"
    ]
    assert Fails.accepted == [0, 1, 2, -1], "each epoch once"


class Hangs:
    """Block in the first epoch until `answer` is set, like a client of a server that does not answer."""

    answer = threading.Event()

    def __init__(self, run_folder: Path, config: Any, state: dict[str, Any]) -> None:
        pass

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self.answer.wait(60)

    def close(self, finished: bool) -> None:
        pass


class Accepts:
    """Accept every epoch; -1 is the end of a finished run."""

    accepted: list[int] = []  # noqa: RUF012  # read by the test

    def __init__(self, run_folder: Path, config: Any, state: dict[str, Any]) -> None:
        pass

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self.accepted.append(epoch)

    def close(self, finished: bool) -> None:
        self.accepted.append(-1 if finished else -2)


def test_a_tracker_that_hangs_delays_neither_training_nor_other_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._OPEN, "tensorboard", Hangs)
    monkeypatch.setitem(trackers._OPEN, "mlflow", Accepts)
    monkeypatch.setattr(trackers, "_CLOSE_S", 1.0)
    config = run_config(tmp_path, run={"trackers": ["mlflow"]})
    all_trackers = Trackers(tmp_path, config)
    start = time.monotonic()
    for epoch in range(4):
        line = {"epoch": epoch, "train_loss": 1.0, "seconds": {}}
        append_metrics(tmp_path, line)
        all_trackers.log(line)
    assert time.monotonic() - start < 0.5
    all_trackers.close()
    assert time.monotonic() - start < 5
    assert Accepts.accepted == [0, 1, 2, 3, -1]
    (line_of_failure,) = failures(tmp_path, config)
    assert line_of_failure.startswith("tensorboard has failed (no answer within 1 s of the end)")
    Hangs.answer.set()


def test_a_failed_tracker_is_named_even_if_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers._OPEN, "tensorboard", Fails)
    monkeypatch.setattr(Fails, "accepted", [])
    notices: list[str] = []
    config = run_config(tmp_path, model={"name": user("nan_rows"), "rows": 1}, train={"max_nonfinite": 25})
    with pytest.raises(TrainingStopped, match="NaN or infinite"):
        train(config, on_notice=notices.append)
    assert notices[-1].startswith("tensorboard has failed (OSError: no space left on device)")


def test_a_tracker_that_is_not_installed_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb, which is not installed: pip install 'rayprune\[wandb\]'$"):
        train(run_config(tmp_path, run={"trackers": ["wandb"]}))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_trackers_name_is_not_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B itself leaves one in the working directory
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"wandb, which is not installed"):
        check_trackers(make_config({"run": {"trackers": ["wandb"]}}))


def test_trackers_do_not_change_the_digest() -> None:
    assert make_config({"run": {"trackers": ["mlflow", "wandb"]}}).digest() == make_config({}).digest()
    with pytest.raises(ValueError, match=r"run.trackers = \['wanbd'\]: unknown tracker 'wanbd'.*wandb"):
        make_config({"run": {"trackers": ["wanbd"]}})


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "wandb"])
def test_a_tracker_creates_no_run_folder(tracker: str, tmp_path: Path) -> None:
    """As where the folder is moved while the tracker's client is imported."""
    if tracker != "tensorboard":
        pytest.importorskip(tracker)
    with pytest.raises(FileNotFoundError):
        trackers._OPEN[tracker](tmp_path / "run", run_config(tmp_path), {})
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_is_moved_away_ends_training_and_is_not_made_anew(tmp_path: Path) -> None:
    moved = threading.Event()

    def move(line: Mapping[str, Any]) -> None:
        if not moved.is_set():
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            moved.set()

    with pytest.raises(RunFolderError, match=r"run folder .*/run is gone: bring it .* back"):
        train(run_config(tmp_path, train={"epochs": 300}), on_epoch=move)
    assert [folder.name for folder in tmp_path.iterdir()] == ["elsewhere"]
