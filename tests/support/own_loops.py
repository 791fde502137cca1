"""A training loop as a user would write it for Ray Train. Every rank logs its batches to a file for the tests."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import prepare_model
from torch.nn.functional import cross_entropy

import rayprune

N, EPOCHS, BATCH = 701, 4, 32
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
DATA = {"x": X, "label": (X[:, 0] > 0).astype(np.int64)}
METHOD = rayprune.InfoBatch(prune_ratio=0.5, anneal_start=1.0)


def network() -> torch.nn.Module:
    """Return a small network, the same on every rank."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def shard_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """Shard the parameters over the ranks (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, shard: Any) -> None:
    """Report a checkpoint, which rank 0 writes."""
    state = {"data": shard.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if shard.rank > 0:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "state.pt")
        ray.train.report({"step": state["data"]["step"]}, checkpoint=Checkpoint.from_directory(folder))


def train_loop(config: dict[str, Any]) -> None:
    """Train; save every `every` steps; the last rank dies once at `die` = (epoch, step)."""
    torch.set_num_threads(1)
    shard = rayprune.get_dataset_shard("train")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict({name.removeprefix("module."): value for name, value in state["model"].items()})
        optimizer.load_state_dict(state["optimizer"])
        shard.load_state_dict(state["data"])
    if config.get("fsdp"):
        model = shard_parameters(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    else:
        model = prepare_model(model)
    folder, pause_s = Path(config["folder"]), config.get("pause_s", 0.0)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            logits = model(batch["x"])
            losses = cross_entropy(logits, batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses, logits=logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log_batch(folder, shard.rank, epoch, batch)
            time.sleep(pause_s)
            if config.get("every") and epoch.step % config["every"] == 0 and epoch.step < epoch.num_steps:
                save(model, optimizer, shard)
            if config.get("die") == (epoch.index, epoch.step) and shard.rank == shard.world_size - 1:
                kill_once(folder / "died")
        if config.get("every"):
            save(model, optimizer, shard)
    if config.get("audit"):
        np.save(folder / f"audit-{shard.rank}.npy", shard.audit().p_wrong)
    if shard.rank == 0 or config.get("fsdp"):
        full = {
            name: getattr(value, "full_tensor", lambda value=value: value)()
            for name, value in model.state_dict().items()
        }
        torch.save({name.removeprefix("module."): value for name, value in full.items()}, folder / "final.pt")


TEXTS = [" ".join("abcdefg"[: row % 7 + 1]) for row in range(203)]
TOKENS = [[row, *range(row % 7)] for row in range(203)]


def token_loop(config: dict[str, Any]) -> None:
    """Train on token ids without padding; every rank logs epoch, id, ids of tokens and text of each row."""
    torch.set_num_threads(1)
    shard = rayprune.get_dataset_shard("train")
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches(collate_fn=pad_tokens):
            epoch.weigh(batch, batch["input_ids"].float().mean(1))
            with (Path(config["folder"]) / f"tokens-{shard.rank}.jsonl").open("a") as lines:
                for row, length in enumerate(batch["lengths"]):
                    tokens = batch["input_ids"][row, :length].tolist()
                    lines.write(json.dumps([epoch.index, int(batch["id"][row]), tokens, batch["text"][row]]) + "\n")


def pad_tokens(columns: dict[str, Any]) -> dict[str, Any]:
    """Pad the rows of a batch to its longest."""
    rows = [torch.from_numpy(row) for row in columns["input_ids"]]
    assert all(row.dtype == torch.int32 for row in rows)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": padded, "lengths": list(map(len, rows)), "text": list(columns["text"]), "id": columns["id"]}


def log_batch(folder: Path, rank: int, epoch: Any, batch: dict[str, torch.Tensor]) -> None:
    """Append the batch that this rank trained on to its log."""
    line = [epoch.index, epoch.step - 1, rank, epoch.plan_hash, batch["id"].tolist(), batch["weight"].tolist()]
    with (folder / f"rank-{rank}.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def kill_once(marker: Path) -> None:
    """Kill this process, unless the marker says that it was killed before."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
