"""Runs with Ray Train workers: neither the transport nor the number of workers nor a failure changes the result."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rayprune.config import Config, make_config
from rayprune.config.schema import TRACKERS
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.run_folder import read_selection, read_validation
from rayprune.engine.storage.trackers import failures
from rayprune.engine.train.driver import RunResult, train
from rayprune.errors import TrainingFailed, TrainingStopped
from rayprune.sources import open_data
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import assert_same_run, results, run_config, scores_of, tracked, user

EPOCHS = 3


def workers_config(
    tmp_path: Path, name: str, workers: int, stream: str = "local", num_shards: int = 1, **sections: Any
) -> Config:
    """Return a run of three epochs; no argument but `sections` changes its result, nor do the faults of a model."""
    scaling = {"num_workers": workers, "cpus_per_worker": 1 if workers else "auto", "threads": 1, "stream": stream}
    scaling["score_shards"] = num_shards
    base: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [32]},
        "method": {"name": "infobatch", "ema": 0.5, "anneal_start": 1.0},  # prunes up to the last epoch
        "train": {"epochs": EPOCHS, "batch_size": 32},
        "scaling": scaling,
    }
    return run_config(tmp_path, name, **{**base, **sections})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of two workers that read the data themselves."""
    return train(workers_config(tmp_path_factory.mktemp("runs"), "local", 2))


def score_actor_names() -> list[str]:
    """Return the names of the ScoreActors of all active runs."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith("rayprune-scores-")]


class ActorKiller(threading.Thread):
    """Kill the run's ScoreActor, or a shard of it, once inside an epoch of which it has already folded observations.

    Attributes:
        killed_at: (epoch, samples observed, samples planned) at the kill; None before.
    """

    def __init__(self, epoch: int, shard: int | None = None) -> None:
        super().__init__(daemon=True)
        self.killed_at: tuple[int, int, int] | None = None
        self._epoch, self._shard = epoch, shard
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.05):
            for name in score_actor_names():
                if "-shard-" in name:
                    continue
                actor = ray.get_actor(name)
                epoch, observed, planned = ray.get(actor.progress.remote())
                if self._shard is not None:
                    actor = ray.get_actor(f"{name}-shard-{self._shard}")
                    observed = ray.get(actor.num_observed.remote())
                if epoch == self._epoch and 0 < observed < planned:
                    self.killed_at = epoch, observed, planned
                    ray.kill(actor, no_restart=False)
                    return

    def __enter__(self) -> ActorKiller:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join(10)


@dataclass(frozen=True)
class FaultyRun:
    """The run of the fixture `faulty`, with the evidence of its faults."""

    result: RunResult
    notices: list[str]
    marker: Path
    killer: ActorKiller
    trackers: list[str]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> FaultyRun:
    """The run of `undisturbed`, but through Ray Data and with three faults.

    Rank 1 hangs in epoch 0 until the stall is reported, and dies in epoch 1. The ScoreActor is killed in epoch 2.
    """
    folder = tmp_path_factory.mktemp("faulty")
    marker, pids, notices = folder / "died", folder / "pids", list[str]()
    pids.mkdir()
    # Epoch 0 has ten steps, so the thirteenth is inside epoch 1.
    model = {"name": user("faulty"), "pause_s": 0.1, "push_rows": 32, "pid_folder": str(pids)}
    model |= {"die_at": 13, "marker": str(marker)}
    trackers = [name for name in TRACKERS if find_spec(name)]  # tests/unit skips the others
    run = {"trackers": trackers, "stall_seconds": 3}
    stopper = threading.Thread(target=stop_process, args=(pids / "1", notices), daemon=True)
    stopper.start()
    with ActorKiller(epoch=2) as killer:
        config = workers_config(folder, "faulty", 2, "ray", model=model, run=run)
        result = train(config, on_notice=notices.append)
    stopper.join(10)
    return FaultyRun(result, notices, marker, killer, trackers)


def stop_process(pid_file: Path, notices: list[str]) -> None:
    """Stop rank 1 by SIGSTOP until a notice reports it. It is then silent but alive, like a machine that hangs."""
    deadline = time.monotonic() + 180
    while not pid_file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGSTOP)
    while not any("rank 1 has been silent" in line for line in notices) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGCONT)


def test_a_stopped_rank_is_reported_and_the_run_continues(faulty: FaultyRun) -> None:
    assert any(line.startswith("stall: rank 1 has been silent for") for line in faulty.notices), faulty.notices
    assert [line["epoch"] for line in faulty.result.metrics] == list(range(EPOCHS))


def test_killed_workers_and_actors_and_the_transport_change_nothing(faulty: FaultyRun, undisturbed: RunResult) -> None:
    assert faulty.marker.exists()
    assert faulty.killer.killed_at is not None, "the actor was not killed inside the epoch"
    assert faulty.result.metrics[-1]["world_size"] == 2
    assert_same_run(faulty.result, undisturbed)


def test_a_killed_shard_of_the_score_table_changes_nothing(tmp_path: Path, undisturbed: RunResult) -> None:
    model = {"name": user("faulty"), "pause_s": 0.05, "push_rows": 32}
    with ActorKiller(epoch=1, shard=1) as killer:
        sharded = train(workers_config(tmp_path, "local", 2, num_shards=3, model=model))
    assert killer.killed_at is not None, "the shard was not killed inside the epoch"
    assert_same_run(sharded, undisturbed)


def test_trackers_continue_after_a_restart(faulty: FaultyRun) -> None:
    folder = faulty.result.folder
    assert not failures(folder, make_config({"run": {"trackers": faulty.trackers}}))
    for name in ("tensorboard", *faulty.trackers):
        assert json.loads((folder / name / "run.json").read_text())["epoch"] == EPOCHS - 1
    if "mlflow" in faulty.trackers:
        runs, points = tracked(folder)
        assert len(runs) == 1, "only rank 0 tracks, and it continues its run after the restart"
        assert sorted(step for step, _ in points["train_loss"]) == list(range(EPOCHS))


@pytest.mark.scenario
def test_a_lost_actor_between_checkpoints_costs_the_epochs_since_the_last(
    tmp_path: Path, undisturbed: RunResult
) -> None:
    model = {"name": user("faulty"), "pause_s": 0.1, "push_rows": 32}
    run = {"checkpoint_epochs": EPOCHS}
    with ActorKiller(epoch=1) as killer:
        result = train(workers_config(tmp_path, "seldom", 2, model=model, run=run))
    assert killer.killed_at is not None, "the actor was not killed inside the epoch"
    lines = (tmp_path / "seldom" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 0, 1, 2], "the run started again"
    assert_same_run(result, undisturbed)


def test_the_union_of_ranks_is_the_selection(undisturbed: RunResult) -> None:
    selections = [read_selection(undisturbed.folder, epoch) for epoch in range(EPOCHS)]
    assert selections[1].num_kept < 301, "301 digits: whole batches of 32 for two ranks need padding"
    trained = np.cumsum([selection.num_kept for selection in selections]).tolist()
    padded = np.cumsum([-selection.num_kept % 32 for selection in selections]).tolist()
    assert [line["samples_trained"] for line in undisturbed.metrics] == trained
    assert [line["samples_padded"] for line in undisturbed.metrics] == padded
    last_visit = np.max([np.where(s.codes > 0, epoch, -1) for epoch, s in enumerate(selections)], axis=0)
    assert scores_of(undisturbed.folder)["last_visit"].tolist() == last_visit.tolist()


def test_class_accuracies_are_summed_over_all_ranks(undisturbed: RunResult) -> None:
    last, validation = undisturbed.metrics[-1], open_data("digits").validation
    assert validation is not None
    correct = np.array(last["val_class_accuracy"]) * np.bincount(validation.labels)
    assert correct == pytest.approx(correct.round(), abs=1e-3), "every class counts its own samples"
    assert correct.sum() / len(validation) == pytest.approx(last["val_accuracy"], abs=1e-6)
    rows = read_validation(undisturbed.folder, len(validation))
    by_class = np.bincount(np.asarray(validation.labels)[rows], minlength=correct.size)
    assert by_class.tolist() == correct.round().tolist()


GUARDED = {"source": user("not_in_actors"), "augment": {"crop": 1, "flip": False}, "limit": 301}


def test_streamed_workers_never_read_the_source_and_equal_no_workers(tmp_path: Path) -> None:
    alone = train(workers_config(tmp_path, "alone", 0, data=GUARDED))
    streamed = train(workers_config(tmp_path, "streamed", 1, "ray", data=GUARDED))
    assert_same_run(streamed, alone)


def test_an_error_in_a_worker_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """The error is that of the guard above, so this also shows that the guard notices a worker that reads."""
    config = workers_config(tmp_path, "local", 1, data=GUARDED, run={"max_failures": 0})
    with pytest.raises(TrainingFailed, match=r"^training failed on rank 0: PermissionError: a worker read .* source$"):
        train(config)


PICKING = {"method": {"name": "es", "start": 0.0, "keep": 0.3}}


def test_rows_picked_inside_batches_are_the_same_with_two_workers(tmp_path: Path) -> None:
    alone, two = (train(workers_config(tmp_path, f"with_{num}", num, **PICKING)) for num in (0, 2))
    counts = ("samples_trained", "samples_forwarded", "samples_skipped", "plan_hash", "lr")
    assert results(two.metrics, counts) == results(alone.metrics, counts)
    assert two.metrics[-1]["samples_skipped"] > 0
    ours, theirs = scores_of(two.folder), scores_of(alone.folder)
    assert ours["picked_mean"].tolist() == theirs["picked_mean"].tolist()
    assert ours["loss"].to_numpy() == pytest.approx(theirs["loss"].to_numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.scenario
def test_rows_picked_inside_batches_survive_a_dead_worker(tmp_path: Path) -> None:
    """The checkpoint inside the epoch restores the moving averages of all samples."""
    model = {"name": user("faulty"), "die_at": 18, "marker": str(tmp_path / "died")}
    run = {"checkpoint_steps": 3}
    killed = train(workers_config(tmp_path, "killed", 2, "ray", model=model, run=run, **PICKING))
    assert (tmp_path / "died").exists()
    assert_same_run(killed, train(workers_config(tmp_path, "whole", 2, **PICKING)))


@pytest.mark.scenario
def test_lost_vectors_restart_the_run_from_its_checkpoint(tmp_path: Path) -> None:
    """Workers keep no copy of probabilities. When the actor dies with them, the steps since the checkpoint are lost."""
    sections = {"method": {"name": "tdds", "trajectory_len": 3, "window_size": 3}, "collect": {"fresh": False}}
    model = {"name": user("faulty"), "pause_s": 0.1, "push_rows": 32}
    notices: list[str] = []
    with ActorKiller(epoch=1) as killer:
        killed = train(workers_config(tmp_path, "killed", 1, model=model, **sections), on_notice=notices.append)
    assert killer.killed_at is not None, "the actor was not killed inside the epoch"
    assert "no copy of the signal probs (10 numbers per sample" in notices[0]
    assert_same_run(killed, train(workers_config(tmp_path, "whole", 0, **sections)))
    assert scores_of(killed.folder)["tdds"].notna().all()


@pytest.mark.scenario
def test_sweeps_through_a_proxy_survive_a_dead_worker(tmp_path: Path) -> None:
    """The checkpoint restores the proxy's statistics, and every sample is swept once, with either transport."""
    method = {"name": "dynams", "budget": 0.7, "block_epochs": 1, "proxy_width": 0.5}
    model = {"name": user("faulty"), "die_at": 27, "marker": str(tmp_path / "died")}
    killed = train(workers_config(tmp_path, "killed", 2, "ray", method=method, model=model))
    assert (tmp_path / "died").exists()
    assert_same_run(killed, train(workers_config(tmp_path, "whole", 2, method=method)))
    num = killed.metrics[0]["num_samples"]
    assert [line["samples_forwarded"] for line in killed.metrics] == [num, 2 * num, 2 * num]
    assert killed.metrics[-1]["selection"]["budget_so_far"] == pytest.approx(0.7, abs=0.01)


@pytest.mark.scenario
def test_learned_weights_and_pruning_give_the_same_run_with_every_transport(tmp_path: Path) -> None:
    """`local` equals `device` in tests/unit/engine/data/test_device.py."""
    step = {"name": "l2w", "hidden": 16, "meta_interval": 2, "scope": "global"}
    base = {"train": {"epochs": 2, "batch_size": 32, "step": step}, "model": {"name": f"{MULTI_EXIT_MODELS}:tower"}}
    streamed, resident = (train(workers_config(tmp_path, stream, 2, stream, **base)) for stream in ("ray", "device"))
    assert streamed.metrics[-1]["samples_meta"] > 0
    assert_same_run(streamed, resident)


@pytest.mark.scenario
def test_a_run_killed_inside_an_epoch_continues_with_another_number_of_workers(
    tmp_path: Path, undisturbed: RunResult
) -> None:
    """Two workers die at a step and one continues: plan and visits are the same, sums over ranks differ by rounding."""
    log = str(tmp_path / "steps")
    model = {"name": user("counted"), "log": log, "kill_at": 18}  # inside epoch 1, where step 3 is on disk
    run = {"checkpoint_steps": 3, "max_failures": 0}
    with pytest.raises(TrainingFailed):
        train(workers_config(tmp_path, "run", 2, model=model, run=run))
    epoch, step = newest_position(tmp_path / "run")
    assert step > 0
    resumed = train(workers_config(tmp_path, "run", 1, model=model, run=run))
    assert [line["world_size"] for line in resumed.metrics] == [2] * epoch + [1] * (EPOCHS - epoch)
    # Later plans depend on losses that one rank and two round differently.
    keys = ("plan_hash", "kept", "samples_trained")
    assert results(resumed.metrics[: epoch + 1], keys) == results(undisturbed.metrics[: epoch + 1], keys)
    last_visit = scores_of(resumed.folder)["last_visit"]
    kept = [read_selection(resumed.folder, e).codes > 0 for e in range(EPOCHS)]
    assert last_visit.tolist() == np.max([np.where(k, e, -1) for e, k in enumerate(kept)], axis=0).tolist()


def test_an_observation_that_cannot_be_folded_ends_the_run(tmp_path: Path) -> None:
    config = workers_config(tmp_path, "fold", 1, method={"name": user("BrokenFold")}, run={"max_failures": 0})
    with pytest.raises(TrainingFailed, match="this fold is broken"):
        train(config)


def test_nan_losses_stop_a_run_despite_restarts(tmp_path: Path) -> None:
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
        assert time.monotonic() < deadline, "a ScoreActor is still alive"
        time.sleep(0.1)


def test_the_number_of_workers_changes_rounding_only(tmp_path: Path, undisturbed: RunResult) -> None:
    alone = train(workers_config(tmp_path, "alone", 0))
    assert alone.metrics[0]["plan_hash"] == undisturbed.metrics[0]["plan_hash"]
    assert alone.metrics[0]["train_loss"] == pytest.approx(undisturbed.metrics[0]["train_loss"], rel=1e-5)
    assert alone.metrics[0]["val_loss"] == pytest.approx(undisturbed.metrics[0]["val_loss"], rel=1e-5)
