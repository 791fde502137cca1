"""Where the time of a second worker goes: two ranks ÷ one, in plain processes, with DDP, and in rayprune.

ResNet-8 in channels_last on 32×32 images in memory, one thread per process, SGD. One process trains batches of 128; two
train batches of 64 each: side by side without exchanging anything, then with DistributedDataParallel over Gloo, then as
two workers of rayprune (InfoBatch at ratio 0). Each step from one to the next adds one cost: smaller batches, a shared
machine, the exchange of gradients, and rayprune with the processes of Ray.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Figure, alternate, ratios
from benchmarks.images import random_images
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train
from rayprune.nn.models import build_model

ROWS, BATCH, ROUNDS = 2_048, 128, 4
WARM_UP = 5


def figures() -> Iterator[Figure]:
    """Yield samples per second of each kind, and the ratios between them."""
    kinds = {
        "one plain process": lambda: plain_rate(1, BATCH, exchanges=False),
        "one plain process, half the batch": lambda: plain_rate(1, BATCH // 2, exchanges=False),
        "two plain processes side by side": lambda: plain_rate(2, BATCH // 2, exchanges=False),
        "two processes of DDP": lambda: plain_rate(2, BATCH // 2, exchanges=True),
    }
    rates = alternate(kinds, ROUNDS)
    start_ray()
    with tempfile.TemporaryDirectory() as name:
        images, labels = random_images(ROWS)
        np.save(Path(name, "x_train.npy"), images)
        np.save(Path(name, "y_train.npy"), labels)
        rates |= {f"rayprune, {n} worker{'s' * (n > 1)}": _engine_rates(Path(name), n) for n in (1, 2)}
    for kind, values in rates.items():
        yield Figure(f"{kind}, samples/s", values)
    steps = list(rates)
    for over, under in ((1, 0), (2, 1), (3, 2), (3, 0), (4, 0), (5, 3), (5, 4)):
        yield Figure(f"{steps[over]} ÷ {steps[under]}", ratios(rates[steps[over]], rates[steps[under]]))


def plain_rate(num_processes: int, batch: int, *, exchanges: bool) -> float:
    """Return the samples per second of all processes together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (num_processes, batch, exchanges, port, answers), nprocs=num_processes)
    return ROWS / max(answers.get() for _ in range(num_processes))


def _rank(rank: int, num_processes: int, batch: int, exchanges: bool, port: int, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=num_processes)
    images, labels = random_images(ROWS)
    inputs = torch.from_numpy(images[rank::num_processes]).permute(0, 3, 1, 2).float() / 255
    inputs, targets = inputs.to(memory_format=torch.channels_last), torch.from_numpy(labels[rank::num_processes]).long()
    model: Any = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if exchanges:
        model = DistributedDataParallel(model)
    starts = range(0, len(inputs), batch)
    for start in [*starts[:WARM_UP], -1, *starts]:
        if start < 0:
            dist.barrier()
            started = time.perf_counter()
            continue
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(inputs[start : start + batch]), targets[start : start + batch]).backward()
        optimizer.step()
    answers.put(time.perf_counter() - started)
    dist.barrier()
    dist.destroy_process_group()


def _engine_rates(folder: Path, workers: int) -> list[float]:
    config = make_config(
        {
            "data": {"source": "arrays", "path": str(folder), "validation_fraction": 0},
            "model": {"name": "resnet8"},
            "method": {"name": "infobatch", "prune_ratio": 0.0},
            "train": {"epochs": ROUNDS + 1, "batch_size": BATCH},
            "scaling": {"num_workers": workers, "threads": 1, "cpus_per_worker": 0.5, "use_gpu": False},
            "run": {"storage_path": str(folder), "name": f"workers-{workers}"},
        }
    )
    return [ROWS / line["seconds"]["epoch"] for line in train(config).metrics[1:]]
