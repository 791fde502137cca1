"""The command `rayprune doctor`: check everything that a run needs on this machine."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import click

from rayprune.cli.console import debug, debug_option, say
from rayprune.cli.errors import CommandFailed
from rayprune.errors import one_line

_PACKAGES = ("ray", "torch", "torchvision", "numpy", "pandas", "pyarrow", "pydantic", "sklearn", "rich", "tensorboardX")
_GIB = 1024**3


@click.command()
@debug_option
def doctor() -> None:
    """Check this machine: versions, devices, Ray, resources, and what is missing."""
    # Name → a check, which returns its finding or raises, and the cure. The slowest checks come last.
    checks: dict[str, tuple[Callable[[], str], str]] = {
        "python": (lambda: f"{platform.python_version()} (3.11 or newer)", ""),
        **{name: (partial(_package, name), "pip install rayprune installs it") for name in _PACKAGES},
        "torch pair": (_torch_pair, "pip install --upgrade torch torchvision, both in one command, so that they match"),
        "processor": (_processor, ""),
        "GPU": (_gpus, ""),
        "disk": (_disk, "free some space"),
        "Ray cluster": (_ray_cluster, "--debug shows Ray's own logs"),
        "network": (_network, "correct the line before"),
    }
    sound = True
    for name, (check, cure) in checks.items():
        try:
            mark, finding = "ok     ", check()
        except Exception as error:
            sound = False
            mark, finding = "MISSING", f"{one_line(error)}: {cure}".removesuffix(": ")
        say(f"{mark} {name:<14} {finding}")
    if not sound:
        raise CommandFailed("something is missing: correct each line that is marked MISSING")


def _package(name: str) -> str:
    importlib.import_module(name)
    return metadata.version({"sklearn": "scikit-learn"}.get(name, name))


def _torch_pair() -> str:
    import torch

    try:
        import torchvision.ops

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except RuntimeError as error:
        raise RuntimeError(f"torchvision was built for another torch ({one_line(error)})") from None
    return "torchvision's operators run with this torch"


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    return f"{cores} cores, {memory:.0f} GiB memory"


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "none: training runs on the CPU"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    if free < 1:
        raise RuntimeError(f"{free:.2f} GiB free here")
    return f"{free:.0f} GiB free here"


def _ray_cluster() -> str:
    import ray

    from rayprune.engine.cluster import start_ray

    start_ray(debug())
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    where = os.environ.get("RAY_ADDRESS", "local")
    finding = f"{where}: {nodes} node, {cpus:g} CPUs, {gpus:g} GPUs"
    if not cpus:
        raise RuntimeError(finding)
    return finding


def _network() -> str:
    """Return where this command and the Ray that it has started listen, from the sockets themselves."""
    import ray

    from rayprune.engine.cluster import cluster_address
    from rayprune.engine.local_ray import listening

    if not ray.is_initialized():
        raise RuntimeError("Ray is not running")
    if (address := cluster_address("auto")) is not None:
        return f"the cluster at {address} listens as it was started: docs/cluster.md"
    sockets = listening()
    outside = sorted({f"{name} on {address}" for name, address in sockets if not address.startswith("127.")})
    where = f"some of them elsewhere: {', '.join(outside)}" if outside else "all of them on 127.0.0.1"
    return f"Ray listens on {len(sockets)} ports, {where}; with workers, also PyTorch's rendezvous on all interfaces"
