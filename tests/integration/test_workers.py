"""Runs with Ray Train workers: transports and numbers of workers agree, and no failure changes the result."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rayprune.config import Config, make_config
from rayprune.config.schema import TRACKERS
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.run_folder import read_selection
from rayprune.engine.storage.trackers import failures
from rayprune.engine.train.driver import RunResult, train
from rayprune.errors import TrainingFailed, TrainingStopped
from rayprune.sources import open_data
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import assert_same_run, results, run_config, scores_of, tracked, user

EPOCHS = 3


def workers_config(tmp_path: Path, name: str, workers: int, stream: str = "local", **sections: Any) -> Config:
    """Return a run of three epochs that differs from its siblings in nothing that decides the result."""
    scaling = {"num_workers": workers, "cpus_per_worker": 1 if workers else "auto", "threads": 1, "stream": stream}
    base: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [32]},
        "method": {"name": "infobatch", "ema": 0.5, "anneal_start": 1.0},  # prunes up to the last epoch
        "train": {"epochs": EPOCHS, "batch_size": 32},
        "scaling": scaling,
    }
    return run_config(tmp_path, name, **{**base, **sections})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Two workers that read for themselves."""
    return train(workers_config(tmp_path_factory.mktemp("runs"), "local", 2))


def test_both_transports_give_the_same_run(tmp_path: Path, undisturbed: RunResult) -> None:
    streamed = train(workers_config(tmp_path, "streamed", 2, "ray"))
    assert_same_run(streamed, undisturbed)
    assert streamed.metrics[-1]["world_size"] == 2


def test_the_union_of_ranks_is_the_selection(undisturbed: RunResult) -> None:
    selections = [read_selection(undisturbed.folder, epoch) for epoch in range(EPOCHS)]
    assert selections[1].num_kept < 301, "301 digits: whole batches of 32 for two ranks need padding"
    trained = np.cumsum([selection.num_kept for selection in selections]).tolist()
    padded = np.cumsum([-selection.num_kept % 32 for selection in selections]).tolist()
    assert [line["samples_trained"] for line in undisturbed.metrics] == trained
    assert [line["samples_padded"] for line in undisturbed.metrics] == padded
    last_visit = np.max([np.where(s.codes > 0, epoch, -1) for epoch, s in enumerate(selections)], axis=0)
    assert scores_of(undisturbed.folder)["last_visit"].tolist() == last_visit.tolist()


def test_the_classes_of_a_validation_are_counted_over_all_ranks(undisturbed: RunResult) -> None:
    last, validation = undisturbed.metrics[-1], open_data("digits").validation
    assert validation is not None
    correct = np.array(last["val_class_accuracy"]) * np.bincount(validation.labels)
    assert correct == pytest.approx(correct.round(), abs=1e-3), "each class counts its own samples"
    assert correct.sum() / len(validation) == pytest.approx(last["val_accuracy"], abs=1e-6)


GUARDED = {"source": user("not_in_actors"), "augment": {"crop": 1, "flip": False}, "limit": 301}


def test_streamed_workers_never_open_the_source_and_equal_no_workers(tmp_path: Path) -> None:
    alone = train(workers_config(tmp_path, "alone", 0, data=GUARDED))
    streamed = train(workers_config(tmp_path, "streamed", 1, "ray", data=GUARDED))
    assert_same_run(streamed, alone)


def test_the_guard_of_the_test_above_notices_a_worker_that_reads(tmp_path: Path) -> None:
    config = workers_config(tmp_path, "local", 1, data=GUARDED, run={"max_failures": 0})
    with pytest.raises(TrainingFailed, match="PermissionError: a worker opened the source"):
        train(config)


def test_a_killed_worker_changes_nothing(tmp_path: Path, undisturbed: RunResult) -> None:
    marker = tmp_path / "died"
    # Epoch 0 has ten steps: the thirteenth is in the middle of epoch 1.
    dies = {"name": user("dies_once"), "step": 13, "marker": str(marker)}
    trackers = [name for name in TRACKERS if find_spec(name)]  # tests/unit/test_engine_trackers.py skips without them
    result = train(workers_config(tmp_path, "killed", 2, model=dies, run={"trackers": trackers}))
    assert marker.exists()
    assert_same_run(result, undisturbed)
    assert not failures(result.folder, make_config({"run": {"trackers": trackers}}))
    for name in ("tensorboard", *trackers):
        assert json.loads((result.folder / name / "run.json").read_text())["epoch"] == EPOCHS - 1
    if "mlflow" in trackers:
        runs, points = tracked(result.folder)
        assert len(runs) == 1, "rank 0 alone tracks, and goes on in its run after it was started again"
        assert sorted(step for step, _ in points["train_loss"]) == list(range(EPOCHS))


def score_actor_names() -> list[str]:
    """Return the names of the ScoreActors of running runs."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith("rayprune-scores-")]


class Killer(threading.Thread):
    """Kill the run's ScoreActor once, in mid-epoch 1 and after it has folded observations of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.seen: tuple[int, int, int] | None = None

    def run(self) -> None:
        while not self.done.wait(0.01):
            if any(self._kill_in_mid_epoch(ray.get_actor(name)) for name in score_actor_names()):
                return

    def _kill_in_mid_epoch(self, actor: Any) -> bool:
        epoch, observed, planned = ray.get(actor.progress.remote())
        if epoch == 1 and 0 < observed < planned:
            self.seen = epoch, observed, planned
            ray.kill(actor, no_restart=False)
            return True
        return False


@contextmanager
def score_actor_killed() -> Iterator[Killer]:
    killer = Killer()
    killer.start()
    try:
        yield killer
    finally:
        killer.done.set()
        killer.join(10)


def test_a_killed_score_actor_loses_no_observation(tmp_path: Path, undisturbed: RunResult) -> None:
    slow = {"name": user("slow"), "pause_s": 0.1, "push_rows": 32}
    with score_actor_killed() as killer:
        result = train(workers_config(tmp_path, "killed", 2, model=slow))
    assert killer.seen is not None, "the actor was not killed in mid-epoch"
    assert_same_run(result, undisturbed)


def test_lost_vectors_take_the_run_back_to_its_checkpoint(tmp_path: Path) -> None:
    """Probabilities are not kept by the workers: an actor that dies with them costs the steps since the checkpoint."""
    method = {"name": "tdds", "trajectory_len": 3, "window_size": 3}
    run = {"method": method, "collect": {"fresh": False}}
    slow = {"name": user("slow"), "pause_s": 0.1, "push_rows": 32}
    notices: list[str] = []
    with score_actor_killed() as killer:
        config = workers_config(tmp_path, "killed", 2, model=slow, **run)
        result = train(config, on_notice=notices.append)
    assert killer.seen is not None, "the actor was not killed in mid-epoch"
    assert "no copy of the signal probs (10 numbers a sample" in notices[0]
    assert_same_run(result, train(workers_config(tmp_path, "whole", 2, **run)))
    assert scores_of(result.folder)["tdds"].notna().all()


def test_sweeps_through_a_proxy_survive_a_dead_worker(tmp_path: Path) -> None:
    """The proxy's statistics come back from the checkpoint, and every sample is swept once, whatever the transport."""
    method = {"name": "dynams", "budget": 0.7, "block_epochs": 1, "proxy_width": 0.5}
    model = {"name": user("dies_once"), "step": 27, "marker": str(tmp_path / "died")}
    killed = train(workers_config(tmp_path, "killed", 2, "ray", method=method, model=model))
    assert (tmp_path / "died").exists()
    assert_same_run(killed, train(workers_config(tmp_path, "whole", 2, method=method)))
    num = killed.metrics[0]["num_samples"]
    assert [line["samples_forwarded"] for line in killed.metrics] == [num, 2 * num, 2 * num]
    assert killed.metrics[-1]["selection"]["budget_so_far"] == pytest.approx(0.7, abs=0.01)


def test_learned_weights_are_the_same_by_every_transport_with_pruning(tmp_path: Path) -> None:
    step = {"name": "l2w", "hidden": 16, "meta_interval": 2, "scope": "global"}
    base = {"train": {"epochs": 2, "batch_size": 32, "step": step}, "model": {"name": f"{MULTI_EXIT_MODELS}:tower"}}
    streams = ("ray", "local", "device")
    streamed, local, resident = (train(workers_config(tmp_path, stream, 2, stream, **base)) for stream in streams)
    assert streamed.metrics[-1]["samples_meta"] > 0
    assert_same_run(streamed, local)
    assert_same_run(local, resident)


def test_a_run_killed_inside_an_epoch_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    """Two workers die at a step, one goes on: the same plan and visits; what ranks sum up differs by rounding."""
    log = str(tmp_path / "steps")
    model = {"name": user("counted"), "log": log, "kill_at": 18}  # after step 6 of epoch 1: step 3 is on disk
    run = {"checkpoint_steps": 3, "max_failures": 0}
    with pytest.raises(TrainingFailed):
        train(workers_config(tmp_path, "run", 2, model=model, run=run))
    epoch, step = newest_position(tmp_path / "run")
    assert step > 0
    resumed = train(workers_config(tmp_path, "run", 1, model=model, run=run))
    whole = train(workers_config(tmp_path, "whole", 2))
    assert [line["world_size"] for line in resumed.metrics] == [2] * epoch + [1] * (EPOCHS - epoch)
    # Plans depend on the losses, which another number of ranks changes by rounding only until a network diverges.
    keys = ("plan_hash", "kept", "samples_trained")
    assert results(resumed.metrics[: epoch + 1], keys) == results(whole.metrics[: epoch + 1], keys)
    last_visit = scores_of(resumed.folder)["last_visit"]
    kept = [read_selection(resumed.folder, e).codes > 0 for e in range(EPOCHS)]
    assert last_visit.tolist() == np.max([np.where(k, e, -1) for e, k in enumerate(kept)], axis=0).tolist()


def test_a_broken_model_ends_in_one_line(tmp_path: Path) -> None:
    config = workers_config(tmp_path, "broken", 1, model={"name": user("broken")}, run={"max_failures": 0})
    with pytest.raises(TrainingFailed, match=r"^training failed on rank 0: ValueError: this model is broken$"):
        train(config)


def test_an_observation_that_cannot_be_folded_ends_the_run(tmp_path: Path) -> None:
    config = workers_config(tmp_path, "fold", 1, method={"name": user("BrokenFold")}, run={"max_failures": 0})
    with pytest.raises(TrainingFailed, match="this fold is broken"):
        train(config)


def test_nan_losses_stop_a_run_although_its_workers_are_restarted(tmp_path: Path) -> None:
    config = workers_config(
        tmp_path,
        "nan",
        1,
        model={"name": user("nan_rows"), "rows": 32},
        train={"epochs": EPOCHS, "batch_size": 32, "max_nonfinite": 10},
        run={"max_failures": 1},
    )
    with pytest.raises(TrainingStopped, match=r"^training stopped: \d+ losses were NaN"):
        train(config)


def test_more_workers_than_fit_are_refused_at_once(tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"scaling.num_workers 8 × 1 CPUs is more than the 4 CPUs.*num_workers=4"):
        train(workers_config(tmp_path, "many", 8))
    with pytest.raises(ValueError, match=r"4 × 1 CPUs \+ 1 CPU for Ray Data is more than the 4 CPUs.*num_workers=3"):
        train(workers_config(tmp_path, "streamed", 4, "ray"))
    assert time.perf_counter() - start < 5
    assert not (tmp_path / "many").exists()


def test_no_score_actor_outlives_its_run(undisturbed: RunResult) -> None:
    assert len(undisturbed.metrics) == EPOCHS
    deadline = time.monotonic() + 10
    while score_actor_names():
        assert time.monotonic() < deadline, "a ScoreActor is still there"
        time.sleep(0.1)


def test_the_number_of_workers_changes_rounding_only(tmp_path: Path, undisturbed: RunResult) -> None:
    alone = train(workers_config(tmp_path, "alone", 0))
    assert alone.metrics[0]["plan_hash"] == undisturbed.metrics[0]["plan_hash"]
    assert alone.metrics[0]["train_loss"] == pytest.approx(undisturbed.metrics[0]["train_loss"], rel=1e-5)
    assert alone.metrics[0]["val_loss"] == pytest.approx(undisturbed.metrics[0]["val_loss"], rel=1e-5)


def test_a_stopped_rank_is_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGSTOP stands for a machine that hangs: silent, and not dead."""
    pids = tmp_path / "pids"
    model = {"name": user("writes_pid"), "folder": str(pids), "pause_s": 0.05}
    lines: list[str] = []

    def stop_rank_one() -> None:
        deadline = time.monotonic() + 180
        while not (pids / "1").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int((pids / "1").read_text())
        os.kill(pid, signal.SIGSTOP)
        while not any("rank 1 has been silent" in line for line in lines) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(pid, signal.SIGCONT)

    stopper = threading.Thread(target=stop_rank_one)
    stopper.start()
    result = train(
        workers_config(tmp_path, "stopped", 2, model=model, run={"stall_seconds": 3}), on_notice=lines.append
    )
    stopper.join()
    assert any(line.startswith("stall: rank 1 has been silent for") for line in lines), lines
    assert [line["epoch"] for line in result.metrics] == list(range(EPOCHS))
