"""Which resources a run takes, checked before Ray would wait for them without a word."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch

from rayprune.config import Config
from rayprune.engine.connecting import cluster_address, connect, first_line
from rayprune.engine.device_stream import check_columns
from rayprune.sources import SampleSource

# Below this an automatic share means that the machine is far too small for so many workers.
_LEAST_AUTO_CPUS = 0.5

Stream = Literal["ray", "local", "device"]


@dataclass(frozen=True)
class Resources:
    """What each worker gets and how its rows come."""

    num_workers: int | tuple[int, int]
    use_gpu: bool
    cpus_per_worker: float
    threads: int
    stream: Stream
    why: str


def start_ray(debug: bool = False, *, elastic: bool = False, dashboard: bool = False, address: str = "auto") -> None:
    """Connect to a cluster, or start a Ray of this machine on the loopback interface.

    Args:
        debug: show Ray's own logs.
        elastic: the number of workers may change while the run trains.
        dashboard: start Ray's dashboard too: without it the CPUs of a Ray Train that Ray Tune ended stay taken.
        address: `run.address`; see `cluster_address`.

    Raises:
        ValueError: no cluster answers there, or no Ray starts here; one line with the cure.
    """
    # The controller looks for reports every 2 s by default: that would cost a second an epoch. Ray Train hands the
    # driver's setting on to it, also on a cluster that is there already.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if elastic:
        # When a machine is lost, Ray counts on it for up to 20 s more and waits for workers there, by default for a
        # minute before it looks again what is left.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if ray.is_initialized():
        return
    threading.Thread(target=_import_for_optimizers, daemon=True).start()
    quiet: dict[str, Any] = {"log_to_driver": debug, "logging_level": "INFO" if debug else "ERROR"}
    if (cluster := cluster_address(address)) is not None:
        connect(cluster, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not dashboard:
        # Nobody looks at Ray's metrics and its record of tasks then; they grow by some 3 MB an epoch, for ever.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    allowed = len(os.sched_getaffinity(0))  # Ray does not look at that by itself
    if allowed < (os.cpu_count() or allowed):
        quiet["num_cpus"] = allowed
    try:
        # "local" always starts a cluster of its own: without it Ray joins whatever cluster it finds on the machine.
        ray.init("local", include_dashboard=dashboard, _node_ip_address="127.0.0.1", **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise ValueError(
            f"no Ray starts on this machine ({first_line(error)}): free ports and memory (other Ray processes: "
            "ps -C raylet), or train in this process with scaling.num_workers=0"
        ) from error


def _import_for_optimizers() -> None:
    """Import what torch imports for the first optimiser of a process: a second, in which Ray starts."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch._dynamo")


def resolve_resources(config: Config, source: SampleSource) -> Resources:
    """Settle every `auto` of the scaling section.

    Raises:
        ValueError: the cluster can never place the workers, in one line with the cure.
    """
    scaling = config.scaling
    if scaling.stream == "device":
        check_columns(source.schema)
    if scaling.num_workers == 0:
        device = scaling.stream == "device"
        why = "stream ray needs workers" if scaling.stream == "ray" else "as configured" if device else "no workers"
        use_gpu = torch.cuda.is_available() if scaling.use_gpu == "auto" else scaling.use_gpu
        threads = len(os.sched_getaffinity(0)) if scaling.threads == "auto" else int(scaling.threads)
        return Resources(
            0, _checked_gpu(use_gpu, torch.cuda.device_count(), 1), 0.0, threads, "device" if device else "local", why
        )
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    use_gpu = gpus > 0 if scaling.use_gpu == "auto" else scaling.use_gpu
    fewest, most = scaling.worker_range
    _checked_gpu(use_gpu, int(gpus), fewest)
    stream, why = _pick_stream(scaling.stream, source)
    # An elastic run starts as soon as its fewest workers fit; the shares are made for the most that fit today.
    today = max(fewest, min(most, int(cpus)))
    cpus_per_worker = _cpus_per_worker(scaling.cpus_per_worker, today, fewest, cpus, stream)
    threads = max(1, int(cpus // today)) if scaling.threads == "auto" else int(scaling.threads)
    return Resources(scaling.num_workers, use_gpu, cpus_per_worker, threads, stream, why)


def _pick_stream(stream: Literal["auto", "ray", "local", "device"], source: SampleSource) -> tuple[Stream, str]:
    if stream != "auto":
        return stream, "as configured"
    if source.row_cost == "cheap":
        return "local", "rows are cheap to read: memory-mapped or in memory"
    return "ray", "rows are expensive to read: Ray Data spreads the decoding"


def _cpus_per_worker(asked: float | str, today: int, num_workers: int, cpus: float, stream: str) -> float:
    for_data = 1.0 if stream == "ray" and cpus > 1 else 0.0
    share = (cpus - for_data) / today
    # Whole CPUs where there are enough; a fraction is only Ray's book-keeping, threads are set apart.
    automatic = float(int(share)) if share >= 1 else max(share, _LEAST_AUTO_CPUS)
    each = automatic if asked == "auto" else float(asked)
    if each * num_workers + for_data > cpus + 1e-6:
        data = " + 1 CPU for Ray Data" if for_data else ""
        most = max(0, int((cpus - for_data) / each))
        raise ValueError(
            f"scaling.num_workers {num_workers} × {each:g} CPUs{data} is more than the {cpus:g} CPUs of the cluster; "
            f"Ray would wait for ever: set scaling.num_workers={max(most, 1)} or scaling.cpus_per_worker={share:.2g}"
        )
    return each


def _checked_gpu(use_gpu: bool, gpus: int, workers: int) -> bool:
    if use_gpu and gpus < workers:
        raise ValueError(
            f"scaling.use_gpu with {workers} workers needs {workers} GPUs, there are {gpus}: set scaling.use_gpu=false"
            + (f" or scaling.num_workers={gpus}" if gpus else "")
        )
    return use_gpu
