"""Small runs for the engine's tests: configs, results of finished runs, and passes over the data without a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rayprune.config import Config, make_config
from rayprune.config.yaml import merge
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import Transport
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, Barrier, Phase, PlanPass
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.storage.checkpoint import newest_checkpoint
from rayprune.engine.storage.costs import PriorCost
from rayprune.engine.train.driver import RunResult
from tests.support.paths import USER_CODE

# The values that decide a result; times differ between equal runs.
RESULT_KEYS = ("epoch", "kept", "samples_trained", "train_loss", "val_accuracy", "plan_hash", "lr")
# What position.json of a checkpoint holds beside epoch and step.
POSITION: dict[str, Any] = {
    "digest": "d",
    "fingerprint": "f",
    "shuffle": "",
    "wall_time": 1.5,
    "counts": PriorCost().counts,
    "metrics": None,
    "sums": [],
}


def user(name: str) -> str:
    """Return the reference of an object in the tests' user code."""
    return f"{USER_CODE}:{name}"


def run_config(tmp_path: Path, name: str = "run", **sections: dict[str, Any]) -> Config:
    """Return the config of a short run: 301 digits, an MLP, InfoBatch with a moving average, no Ray cluster."""
    base: dict[str, Any] = {
        "data": {"source": "digits", "limit": 301},
        "model": {"name": "mlp"},
        "method": {"name": "infobatch", "ema": 0.5},
        "train": {"epochs": 4, "batch_size": 32},
        "optim": {"lr": 0.02},
        "scaling": {"num_workers": 0, "threads": 1},
        "run": {"storage_path": str(tmp_path), "name": name},
    }
    return make_config(merge(base, sections))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the network's tensors in the newest checkpoint."""
    newest = newest_checkpoint(folder)
    assert newest is not None, f"{folder} has no valid checkpoint"
    with (newest / "model.pt").open("rb") as stream:
        loaded: dict[str, torch.Tensor] = torch.load(stream, weights_only=True)
    return loaded


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two runs ended with the same weights, bit for bit."""
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def results(metrics: Iterable[dict[str, Any]], keys: Iterable[str] = RESULT_KEYS) -> list[dict[str, Any]]:
    """Return the values that decide a run's result, epoch by epoch."""
    return [{key: line[key] for key in keys} for line in metrics]


def scores_of(folder: Path) -> pd.DataFrame:
    """Return scores.parquet."""
    with (folder / "scores.parquet").open("rb") as stream:
        return pd.read_parquet(stream)


def assert_same_run(one: RunResult, other: RunResult) -> None:
    """Assert that two runs have the same plans, weights and scores, bit for bit."""
    assert results(one.metrics) == results(other.metrics)
    assert same_weights(one.folder, other.folder)
    pd.testing.assert_frame_equal(scores_of(one.folder), scores_of(other.folder), check_exact=True)


def losses_of(epoch: int, num_samples: int) -> np.ndarray:
    """Return synthetic losses, (N,) float32, which depend only on epoch and id."""
    return np.random.default_rng([9, epoch]).random(num_samples, dtype=np.float32)


def pass_of(
    epoch: int = 0, phase: Phase = "train", world_size: int = 1, start_step: int = 0, generation: int = 1
) -> PlanPass:
    """Return a pass of the first attempt, which started at the epoch's first step."""
    return PlanPass(AttemptKey(generation, epoch), phase, world_size, start_step)


def stream_pass(client: ScoreClient, plan_pass: PlanPass, via: Transport, rank: int = 0) -> Iterator[Batch]:
    """Announce a pass; return one rank's batches."""
    header = client.announce(plan_pass)
    session = ScoringSession(client, plan_pass.key.generation, rank, plan_pass.world_size)
    return session.batches(header, via.batches)


def close_epoch(client: ScoreClient, key: AttemptKey, *num_pushes: int) -> dict[str, Any] | None:
    """End an epoch for ranks that made `num_pushes` pushes each; return the state, or None when pushes are missing."""
    barrier = Barrier("close", 0, len(num_pushes))
    for rank, count in enumerate(num_pushes):
        client.arrive(key, barrier, rank, count)
    snapshot = client.pass_barrier(key, barrier)
    return None if snapshot is None else snapshot.state


def tracked(folder: Path) -> tuple[list[Any], dict[str, list[tuple[int, float]]]]:
    """Return the MLflow runs of a run folder, and the (epoch, value) points of each metric of the first run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rayprune")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id]))
    history = {name: client.get_metric_history(runs[0].info.run_id, name) for name in runs[0].data.metrics}
    return runs, {name: [(point.step, point.value) for point in points] for name, points in history.items()}
