"""Training with Lightning or Accelerate and a pruned loader, in one or several processes; records what was trained.

As a program: `python -m tests.support.trainer_loops KIND OUT KEY=VALUE …` in each process of a group, with torchrun's
variables. Rank r writes OUT/rank_r.pt.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import rayprune
from tests.support.paths import ROOT

N, FEATURES, EPOCHS, BATCH = 100, 6, 4, 8
RATE = 0.1


class Points(Dataset[Any]):
    """N points of two classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, FEATURES, generator=generator)
        self.y = (self.x[:, 0] + 0.5 * torch.randn(N, generator=generator) > 0).long()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


def new_model() -> torch.nn.Module:
    """Return the same small network each time."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def new_method(ratio: float) -> rayprune.Method:
    """Return InfoBatch, or no pruning at ratio 0."""
    return rayprune.InfoBatch(prune_ratio=ratio) if ratio else rayprune.Full()


@dataclass
class Record:
    """What one process trained.

    Attributes:
        visits: (epoch, real ids, their losses) of every batch.
        rates: the learning rate after every batch.
        weights: the model's at the end.
        scores: the Selector's.
        validated: epochs that Lightning validated.
    """

    visits: list[tuple[int, list[int], list[float]]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    scores: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    validated: list[int] = field(default_factory=list)
    steps: int = 0

    def visit(self, epoch: int, ids: Any, losses: torch.Tensor) -> None:
        """Note a batch."""
        real = [int(each) for each in ids if each >= 0]
        self.visits.append((epoch, real, losses.detach().flatten()[: len(real)].tolist()))

    def end(self, model: torch.nn.Module, selector: rayprune.Selector) -> Record:
        """Note the results."""
        self.weights = [parameter.detach().clone() for parameter in model.parameters()]
        self.scores = selector.scores()
        return self


def planned_visits(ratio: float, records: Iterable[Record], rows: int, seed: int = 0) -> dict[int, Counter[int]]:
    """Return the ids of each epoch that a Selector of its own plans, given the recorded losses."""
    losses: dict[int, dict[int, float]] = {epoch: {} for epoch in range(EPOCHS)}
    for record in records:
        for epoch, ids, values in record.visits:
            losses[epoch].update(zip(ids, values, strict=True))
    selector, planned = rayprune.Selector(new_method(ratio), N, EPOCHS, seed), {}
    for epoch in range(EPOCHS):
        plan = rayprune.Plan.of_selection(selector.begin_epoch(epoch), rows, seed, epoch)
        planned[epoch] = Counter(plan.order[: plan.num_rows].tolist())
        ids = sorted(losses[epoch])
        selector.observe(ids, {"loss": np.array([losses[epoch][each] for each in ids], np.float32)}, epoch)
    return planned


def visits_of(records: Iterable[Record]) -> dict[int, Counter[int]]:
    """Return how often each epoch visited each id, over all processes."""
    counts: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(EPOCHS)}
    for record in records:
        for epoch, ids, _ in record.visits:
            counts[epoch].update(ids)
    return counts


def train_lightning(
    *,
    ratio: float = 0.7,
    accumulation: int = 1,
    batch_size: int = BATCH,
    save_every: int = 0,
    folder: str = "",
    resume: str = "",
    stop_after: int = 0,
    devices: int = 1,
    schedule_steps: int = 0,
    **trainer_options: Any,
) -> Record:
    """Train with Lightning; with stop_after, the process is killed after so many batches."""
    import lightning.pytorch as pl

    pruning, record, data = rayprune.lightning.PruneCallback(new_method(ratio)), Record(), Points()

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = new_model()

        def train_dataloader(self) -> Any:
            return pruning.loader(data, batch_size=batch_size)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_size=N)

        def training_step(self, batch: Any, index: int) -> Any:
            x, y, ids = batch
            losses = cross_entropy(self.net(x), y, reduction="none")
            record.visit(self.current_epoch, ids, losses)
            if stop_after and len(record.visits) == stop_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return pruning.weigh(batch, losses)

        def validation_step(self, batch: Any, index: int) -> None:
            record.validated.append(self.current_epoch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
            schedule = torch.optim.lr_scheduler.LinearLR(
                optimizer, 1.0, 1e-3, total_iters=schedule_steps or pruning.num_steps
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_train_batch_end(self, *_: Any) -> None:
            record.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    callbacks: list[Any] = [pruning, *trainer_options.pop("callbacks", ())]
    if save_every:
        saving = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=save_every, save_top_k=-1)
        callbacks.append(saving)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **trainer_options}
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulation,
        enable_checkpointing=bool(save_every),
        num_sanity_val_steps=0,
        **quiet,
    )
    model = Model()
    trainer.fit(model, ckpt_path=resume or None)
    record.steps = trainer.global_step
    return record.end(model, pruning.selector)


def train_accelerate(
    *,
    ratio: float = 0.7,
    accumulation: int = 1,
    batch_size: int = BATCH,
    save_every: int = 0,
    folder: str = "",
    resume: str = "",
    stop_after: int = 0,
) -> Record:
    """Train with Accelerate; with stop_after, the process is killed after so many batches."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()  # several runs in one process of the tests
    GradientState._reset_state()
    accelerator, record = Accelerator(cpu=True, gradient_accumulation_steps=accumulation), Record()
    net = new_model()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    loader = rayprune.accelerate.PrunedLoader(Points(), new_method(ratio), EPOCHS, batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=loader.num_steps)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    accelerator.register_for_checkpointing(loader, schedule)
    if resume:
        accelerator.load_state(resume)
    for epoch in loader.epochs():
        for batch in loader:
            x, y, ids = batch
            with accelerator.accumulate(net):
                losses = cross_entropy(net(x), y, reduction="none")
                record.visit(epoch, ids, losses)
                accelerator.backward(loader.weigh(batch, losses))
                optimizer.step()
                loader.step_schedule(schedule)
                optimizer.zero_grad()
            record.rates.append(optimizer.param_groups[0]["lr"])
            record.steps += accelerator.sync_gradients
            if stop_after and len(record.visits) == stop_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if save_every and accelerator.sync_gradients and record.steps % save_every == 0:
                accelerator.save_state(f"{folder}/step={record.steps}")
    return record.end(net, loader.selector)


TRAIN = {"lightning": train_lightning, "accelerate": train_accelerate}


def in_processes(kind: str, world_size: int, out: Path, *, fails: bool = False, **options: Any) -> list[Record]:
    """Train in a group of processes and return their records; with `fails`, the group is expected to die."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.support.trainer_loops", kind, str(out)]
    group: Mapping[str, str] = {}
    if world_size > 1:
        group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(world_size), "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} if world_size > 1 else {}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **group, **own}
        given = [f"{name}={value}" for name, value in options.items()]
        processes.append(subprocess.Popen([*command, *given], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=180)[1] for process in processes]
    if fails:
        assert all(process.returncode for process in processes)
        return []
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [torch.load(out / f"rank_{rank}.pt", weights_only=False) for rank in range(world_size)]


def main() -> None:
    """Train as the command line says."""
    kind, out, *given = sys.argv[1:]
    torch.set_num_threads(1)
    pairs = (option.split("=", 1) for option in given)
    texts = ("folder", "resume")
    options = {
        name: value if name in texts else float(value) if name == "ratio" else int(value) for name, value in pairs
    }
    record = TRAIN[kind](**options)  # type: ignore[operator]
    torch.save(record, Path(out) / f"rank_{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    sys.modules["tests.support.trainer_loops"] = sys.modules["__main__"]  # so that a Record pickles by its real name
    Record.__module__ = "tests.support.trainer_loops"
    main()
