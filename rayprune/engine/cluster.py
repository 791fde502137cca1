"""Which resources a run takes, checked before Ray would wait for them without a word.

Connecting to a Ray cluster: which one a run means, and one line within seconds when it does not answer.

Ray itself tries for minutes, prints tracebacks of several processes, and then may end the process.

How many runs go at once and what each gets, settled before Ray would wait for resources without a word.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import ray
import torch
from ray._private.grpc_utils import init_grpc_channel

from rayprune.config import Config
from rayprune.engine.data.device import check_columns
from rayprune.errors import ClusterError
from rayprune.sources import SampleSource

_ANSWER_S = 5.0
_LAST_PORT = 65_535
# What Ray's own processes ask a head node, to hear whether it is alive.
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CURES = (
    "start it (ray start --head), correct run.address or RAY_ADDRESS, or train on this machine alone with "
    "run.address=local"
)


def cluster_address(address: str) -> str | None:
    """Return the address of the cluster that `run.address` means, None for a Ray of this machine's own.

    Args:
        address: auto (RAY_ADDRESS where it is set, else this machine's own), local, or host:port.
    """
    named = os.environ.get("RAY_ADDRESS", "").strip() if address == "auto" else address
    return None if named in {"", "local"} else named


def connect(address: str, **options: Any) -> None:
    """Connect to a cluster of which this machine is a part.

    Args:
        address: host:port of its head, or auto for the one that runs on this machine.
        **options: as for ray.init.

    Raises:
        ValueError: it does not answer within seconds, or can't be joined from here; one line with the cure.
    """
    if "://" in address:
        raise ClusterError(
            f"Ray address {address} is one for clients, and a run needs a machine of the cluster itself: submit it "
            "with ray job submit --address http://HEAD:8265 --working-dir . -- rayprune train CONFIG, or name HEAD:6379"
        )
    if address != "auto":
        _check_answer(address)
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        where = "on this machine" if address == "auto" else f"at {address}"
        if _is_about_a_token(error):
            raise _asks_for_a_token(where) from error
        raise ClusterError(f"no Ray cluster can be joined {where} ({first_line(error)}): {_CURES}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _asks_for_a_token(where: str) -> ValueError:
    return ClusterError(
        f"the Ray cluster {where} asks for a token that this process does not send: set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here and on every machine of the cluster"
    )


def _is_about_a_token(error: BaseException | None) -> bool:
    while error is not None and "AuthenticationError" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ClusterError(f"Ray address {address!r} is none of auto, local, HOST:PORT (such as 10.0.0.1:6379)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        # Something listens; Ray would wait for minutes to hear that it is no head node, or one that hangs.
        channel = init_grpc_channel(address)
        with contextlib.closing(channel):
            channel.unary_unary(_ALIVE)(b"", timeout=_ANSWER_S)
    except grpc.RpcError as error:
        if error.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
            raise _asks_for_a_token(f"at {address}") from None
        late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        why = f"nothing within {_ANSWER_S:g} s" if late else "what listens there is no head node of Ray"
        raise ClusterError(f"no Ray cluster answers at {address} ({why}): {_CURES}") from None
    except UnicodeError:
        raise ClusterError(f"Ray address {address!r} names no host: {_CURES}") from None
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({first_line(error)}): {_CURES}") from None


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
        raise ClusterError(
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
        raise ClusterError(
            f"scaling.num_workers {num_workers} × {each:g} CPUs{data} is more than the {cpus:g} CPUs of the cluster; "
            f"Ray would wait for ever: set scaling.num_workers={max(most, 1)} or scaling.cpus_per_worker={share:.2g}"
        )
    return each


def _checked_gpu(use_gpu: bool, gpus: int, workers: int) -> bool:
    if use_gpu and gpus < workers:
        raise ClusterError(
            f"scaling.use_gpu with {workers} workers needs {workers} GPUs, there are {gpus}: set scaling.use_gpu=false"
            + (f" or scaling.num_workers={gpus}" if gpus else "")
        )
    return use_gpu


# The actor of a trial with workers only waits for them.
_WAITING_CPUS = 0.1
_LEAST_CPUS = 0.25


@dataclass(frozen=True)
class TrialResources:
    """What each run gets.

    Attributes:
        num_concurrent: runs that go at once.
        reserved: what Ray reserves for a run's own actor.
        scaling: the keys of `scaling` that its config gets.
        text: the same for a person.
    """

    num_concurrent: int
    reserved: dict[str, float]
    scaling: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Asked:
    """Who asks for how many runs at once, for messages that name the key.

    Attributes:
        value: a number, or "auto".
        key: where it was asked.
        noun: what a run is called there.
    """

    value: int | Literal["auto"]
    key: str = "sweep.max_concurrent"
    noun: str = "trial"


def share_resources(
    config: Config, source: SampleSource, num_runs: int, asked: Asked, total: Mapping[str, float]
) -> TrialResources:
    """Settle how many runs go at once.

    Args:
        config: of the runs.
        source: of the training data.
        num_runs: runs to make.
        asked: how many at once, and who says so.
        total: the resources that there are, as Ray counts them.

    Raises:
        ValueError: no run can have what the config asks for, or not so many at once; with the cure.
    """
    if isinstance(config.scaling.num_workers, tuple):
        fewest = config.scaling.num_workers[0]
        raise ClusterError(f"{asked.noun}s at once need a fixed number of workers: set scaling.num_workers={fewest}")
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    if config.scaling.num_workers == 0:
        return _in_process(config, num_runs, asked, cpus, gpus)
    return _with_workers(config, source, num_runs, asked, cpus, gpus)


def _in_process(config: Config, num_runs: int, asked: Asked, cpus: float, gpus: float) -> TrialResources:
    scaling = config.scaling
    use_gpu = gpus >= 1 if scaling.use_gpu == "auto" else scaling.use_gpu
    threads = 1 if scaling.threads == "auto" else scaling.threads
    _check(asked, threads, cpus, "threads", f"scaling.threads={max(1, int(cpus))}")
    if use_gpu:
        _check(asked, 1, gpus, "GPU", "scaling.use_gpu=false")
    most = int(min(cpus // threads, gpus if use_gpu else math.inf))
    concurrent = _concurrent(asked, most, num_runs)
    if scaling.threads == "auto":
        threads = max(1, int(cpus // concurrent))
    reserved = {"CPU": float(threads), **({"GPU": 1.0} if use_gpu else {})}
    text = f"{concurrent} at once, {threads} thread{'s' if threads > 1 else ''} each" + (", a GPU each" * use_gpu)
    stream = "device" if scaling.stream == "device" else "local"
    return TrialResources(concurrent, reserved, {"threads": threads, "use_gpu": use_gpu, "stream": stream}, text)


def _with_workers(
    config: Config, source: SampleSource, num_runs: int, asked: Asked, cpus: float, gpus: float
) -> TrialResources:
    scaling = config.scaling
    workers = scaling.num_workers
    assert isinstance(workers, int)
    alone = resolve_resources(config, source)
    beside = _WAITING_CPUS + (1.0 if alone.stream == "ray" and cpus > 1 else 0.0)  # the actor, and Ray Data
    largest = math.floor((cpus - beside) / workers * 100) / 100
    each = float(scaling.cpus_per_worker) if scaling.cpus_per_worker != "auto" else min(1.0, largest)
    if each > largest or each < _LEAST_CPUS:
        cure = f"scaling.cpus_per_worker={largest:g}" if largest >= _LEAST_CPUS else "scaling.num_workers=0"
        raise ClusterError(
            f"no {asked.noun} can have its {workers} workers × {max(each, _LEAST_CPUS):g} CPUs + {beside:g} CPUs "
            f"beside them: the cluster has {cpus:g}, Ray would wait for ever: set {cure}"
        )
    most = int(cpus // (workers * each + beside))
    if alone.use_gpu:
        most = min(most, int(gpus // workers))
    concurrent = _concurrent(asked, most, num_runs)
    if scaling.cpus_per_worker == "auto":
        each = math.floor((cpus / concurrent - beside) / workers * 100) / 100
        each = float(int(each)) if each >= 1 else each
    threads = max(1, int(cpus // (workers * concurrent))) if scaling.threads == "auto" else scaling.threads
    settled = {"threads": threads, "use_gpu": alone.use_gpu, "stream": alone.stream, "cpus_per_worker": each}
    text = f"{concurrent} at once, {workers} worker{'s' if workers > 1 else ''} of {each:g} CPUs each"
    return TrialResources(concurrent, {"CPU": _WAITING_CPUS}, settled, text)


def _check(asked: Asked, needed: float, there: float, what: str, cure: str) -> None:
    if needed > there:
        raise ClusterError(
            f"no {asked.noun} can have {needed:g} {what}: the cluster has {there:g}, Ray would wait for ever: "
            f"set {cure}"
        )


def _concurrent(asked: Asked, most: int, num_runs: int) -> int:
    if asked.value == "auto":
        return max(1, min(most, num_runs))
    if asked.value > most:
        raise ClusterError(
            f"{asked.key} {asked.value} is more than there is room for ({most} at a time): set {asked.key}={most}"
        )
    return asked.value
