"""Look over a machine for `rayprune doctor`: each thing that a run needs, tried for real."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click

from rayprune.cli.console import console, debug_option

_PACKAGES = ("ray", "torch", "torchvision", "numpy", "pandas", "pyarrow", "pydantic", "sklearn", "rich", "tensorboardX")
_GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    ok: bool
    name: str
    text: str


def diagnose(debug: bool = False) -> Iterator[Finding]:
    """Yield findings one by one, the slow ones last."""
    yield Finding(sys.version_info >= (3, 11), "python", f"{sys.version.split()[0]} (3.11 or newer)")
    for name in _PACKAGES:
        yield _package(name)
    yield _vision_pair()
    yield from _devices()
    yield _disk()
    yield _ray(debug)


def _package(name: str) -> Finding:
    distribution = {"sklearn": "scikit-learn"}.get(name, name)
    try:
        importlib.import_module(name)
        return Finding(True, name, metadata.version(distribution))
    except Exception as error:
        return Finding(False, name, f"{error}: pip install rayprune installs it")


def _vision_pair() -> Finding:
    try:
        import torch
        import torchvision.ops

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        return Finding(True, "torch pair", "torchvision's operators run with this torch")
    except Exception as error:
        cure = "pip install --upgrade torch torchvision, both in one command"
        return Finding(False, "torch pair", f"torchvision was built for another torch ({error}): {cure}")


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    yield Finding(True, "processor", f"{cores} cores, {memory:.0f} GiB memory")
    try:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding(True, "GPU", ", ".join(names) or "none: training runs on the CPU")
    except Exception as error:
        yield Finding(False, "GPU", str(error))


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    return Finding(free > 1, "disk", f"{free:.0f} GiB free here")


def _ray(debug: bool) -> Finding:
    try:
        import ray

        from rayprune.engine.cluster import start_ray

        start_ray(debug)
        total = ray.cluster_resources()
        where = os.environ.get("RAY_ADDRESS", "local")
        nodes = sum(node["Alive"] for node in ray.nodes())
        text = f"{where}: {nodes} node, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        return Finding(total.get("CPU", 0) > 0, "Ray cluster", text)
    except Exception as error:
        return Finding(False, "Ray cluster", f"does not start: {error}")


@click.command()
@debug_option
@click.pass_obj
def doctor(debug: bool, debug_here: bool) -> None:
    """Check this machine: versions, devices, Ray, resources, what is missing."""
    sound = True
    for finding in diagnose(debug or debug_here):
        sound &= finding.ok
        mark = "ok     " if finding.ok else "MISSING"
        console.print(f"{mark} {finding.name:<14} {finding.text}", highlight=False)
    if not sound:
        raise RuntimeError("something is missing: see above")
