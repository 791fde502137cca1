"""Ray for a run: which cluster, what each worker gets, and how many runs fit at the same time.

All of it is checked first. Ray itself tries for minutes to reach a wrong address, prints tracebacks of several
processes and may end the process; and it waits forever for resources that the cluster does not have.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import ray
import torch

from rayprune.config import Config
from rayprune.config.schema import ScalingSection
from rayprune.core.references import DRIVER_FOLDER
from rayprune.engine import local_ray
from rayprune.engine.data.device import check_columns
from rayprune.engine.monitoring import kept_handlers
from rayprune.errors import ClusterError, ConfigError
from rayprune.sources import SampleSource

Stream = Literal["ray", "local", "device"]
Machines = Sequence[Mapping[str, float]]  # what each one has, as Ray counts it

_ANSWER_S = 5.0
_TOKEN_FILE = "~/.ray/auth_token"  # where ray.init keeps the token that it makes
# How Ray's own processes check that a head node is alive.
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CURES = (
    "start it (ray start --head), correct run.address or RAY_ADDRESS, or train on this machine alone with "
    "run.address=local"
)
_LEAST_AUTO_CPUS = 0.5  # fewer CPUs for each worker mean that the machine is far too small for them
_LEAST_TRIAL_CPUS = 0.25
_LEAST_ADDRESS_SPACE = 32 * 2**30  # Ray aborts at 9 GiB
_NAMED_MACHINES = 8  # in a message
_TRIAL_ACTOR_CPUS = 0.1  # the actor of a trial with workers only waits for them


def start_ray(debug: bool = False, *, elastic: bool = False, dashboard: bool = False, address: str = "auto") -> None:
    """Connect to a cluster, or start a local Ray instance.

    Args:
        debug: show Ray's own logs.
        elastic: the number of workers may change during the run.
        dashboard: start Ray's dashboard too; without it, a Ray Train run that Ray Tune ends keeps its CPUs.
        address: `run.address`; see `cluster_address`.

    Raises:
        ClusterError: no cluster answers, or Ray does not start here; one line with the cure.
    """
    # By default the controller polls for reports every 2 s, which would cost a second an epoch. Ray Train passes the
    # driver's setting on to its controller, on an existing cluster too.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if elastic:
        # Ray counts on a lost machine for up to 20 s and waits for workers there; by default, it waits a minute before
        # it looks at the remaining machines.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": "INFO" if debug else "ERROR"}
    if (cluster := cluster_address(address)) is not None:
        with kept_handlers(signal.SIGTERM):
            connect(cluster, job_config=_job_config(), **options)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_address_space()
    _ensure_token()
    if not dashboard:
        # Nobody reads Ray's metrics and task records then, and they grow by some 3 MB an epoch.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    allowed = len(os.sched_getaffinity(0))  # Ray ignores the affinity
    if allowed < (os.cpu_count() or allowed):
        options["num_cpus"] = allowed
    try:
        with kept_handlers(signal.SIGTERM):
            local_ray.start(job_config=_job_config(), include_dashboard=dashboard, **options)
    except Exception as error:  # Ray raises a bare one where a process does not start in time
        ray.shutdown()
        raise ClusterError(
            f"no Ray starts on this machine ({_first_line(error)}): free ports and memory (other Ray processes: "
            "ps -C raylet), or train in this process with scaling.num_workers=0"
        ) from error


def _job_config() -> ray.job_config.JobConfig:
    config = ray.job_config.JobConfig()
    config._py_driver_sys_path = _WorkerPath()
    return config


class _WorkerPath(list[str]):
    """The folders that Ray puts first on the workers' path, without the current folder unless this process has it.

    A file in the current folder, such as secrets.py, would be imported instead of a library. Workers only need the
    folder for `module:name` in a config, and find it as a mark, which Python ignores.
    """

    def extend(self, folders: Iterable[str]) -> None:
        current = str(Path.cwd())
        hidden = set() if {"", current} & set(sys.path) else {current}
        super().extend(f"{DRIVER_FOLDER}{folder}" if folder in hidden else folder for folder in folders)


def _check_address_space() -> None:
    """Refuse a limit under which Ray's processes abort with a dump of their stacks."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _LEAST_ADDRESS_SPACE:
        raise ClusterError(
            f"Ray does not start within {limit / 2**30:.1f} GiB of address space: raise the limit (ulimit -v "
            "unlimited), or train in this process with scaling.num_workers=0"
        )


def cluster_address(address: str) -> str | None:
    """Return the address of the cluster that `run.address` means, or None for a Ray of this machine's own.

    Args:
        address: auto (RAY_ADDRESS if it is set, otherwise this machine's own), local, or host:port.
    """
    resolved = os.environ.get("RAY_ADDRESS", "").strip() if address == "auto" else address
    return None if resolved in {"", "local"} else resolved


def connect(address: str, **options: Any) -> None:
    """Connect to a cluster that this machine is part of.

    Args:
        address: host:port of its head node, or auto for the cluster that runs on this machine.
        **options: as for ray.init.

    Raises:
        ClusterError: it does not answer within seconds, or can't be joined from here; one line with the cure.
    """
    if "://" in address:
        raise ClusterError(
            f"Ray address {address} is for Ray clients, and a run must start on a machine of the cluster: submit it "
            "with ray job submit --address http://HEAD:8265 --working-dir . -- rayprune train CONFIG, or use HEAD:6379"
        )
    if address != "auto":
        _check_head_node(address)
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray raises bare ones, too
        ray.shutdown()
        where = "on this machine" if address == "auto" else f"at {address}"
        if _is_about_token(error):
            raise _token_error(where) from error
        raise ClusterError(f"no Ray cluster can be joined {where} ({_first_line(error)}): {_CURES}") from error


def _check_head_node(address: str) -> None:
    """Refuse an address without a head node that answers, or one that refuses this process's token."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ClusterError(f"Ray address {address!r} is not auto, local or HOST:PORT (such as 10.0.0.1:6379)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        # A server listens, but it may be another program's, or a head node that hangs.
        with contextlib.closing(_open_channel(address)) as channel:
            channel.unary_unary(_CHECK_ALIVE)(b"", timeout=_ANSWER_S, metadata=_token_header())
        return
    except grpc.RpcError as error:
        if error.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
            if "RAY_ENABLE_K8S_TOKEN_AUTH" in os.environ:
                return  # ray.init gets this process's token from Kubernetes
            raise _token_error(f"at {address}") from None
        is_late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        reason = f"no answer within {_ANSWER_S:g} s" if is_late else "the server there is not a Ray head node"
    except KeyError as error:
        reason = f"RAY_USE_TLS is set and {error} is not"
    except UnicodeError:
        reason = "the host name is invalid"
    except OSError as error:
        reason = _first_line(error)
    raise ClusterError(f"no Ray cluster answers at {address} ({reason}): {_CURES}")


def _open_channel(address: str) -> grpc.Channel:
    """Open a channel with the settings of Ray's own: no HTTP proxy, and TLS if RAY_USE_TLS is set."""
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"}:
        return grpc.insecure_channel(address, options)
    names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
    return grpc.secure_channel(
        address, grpc.ssl_channel_credentials(*(Path(os.environ[name]).read_bytes() for name in names)), options
    )


def _token_header() -> list[tuple[str, str]]:
    """Return the header with the token that ray.init will send, if this process has one."""
    token = _token() if _needs_token() else ""
    return [("authorization", f"Bearer {token}")] if token else []


def _needs_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _token() -> str:
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", _TOKEN_FILE)).expanduser()
    return (os.environ.get("RAY_AUTH_TOKEN") or (file.read_text() if file.is_file() else "")).strip()


def _ensure_token() -> None:
    """Give a Ray of this machine's own a token for this process, where Ray can't keep one in the home folder."""
    if not _needs_token() or _token():
        return
    try:
        folder = Path(_TOKEN_FILE).expanduser().parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home folder
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex()


def _is_about_token(error: BaseException | None) -> bool:
    while error is not None and "AuthenticationError" not in repr(error):
        error = error.__cause__ or error.__context__
    return error is not None


def _token_error(where: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster {where} requires a token, and this process has none or another: set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here and on every machine of the cluster"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Resources:
    """The `scaling` section with every `auto` resolved.

    Attributes:
        num_workers: workers, or the fewest and the most of an elastic run.
        use_gpu: whether each worker has a GPU.
        cpus_per_worker: what Ray reserves for each.
        threads: of torch in each worker.
        stream: how workers get their rows.
        stream_reason: why that stream, for a person.
    """

    num_workers: int | tuple[int, int]
    use_gpu: bool
    cpus_per_worker: float
    threads: int
    stream: Stream
    stream_reason: str


def machine_resources() -> list[dict[str, float]]:
    """Return what each machine of the connected cluster has, as Ray counts it: {"CPU": 8.0, "GPU": 1.0, …}."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _sum(machines: Machines, name: str) -> float:
    return sum(machine.get(name, 0.0) for machine in machines)


def _room(machines: Machines, cpus: float, use_gpu: bool, for_data: float = 0.0) -> int:
    """Return how many processes with so many CPUs, and a GPU, fit: each one needs them on one machine.

    One machine keeps `for_data` CPUs, which a task of Ray Data needs together.
    """

    def fit(machine: Mapping[str, float], reserve: float = 0.0) -> int:
        gpus = machine.get("GPU", 0.0) if use_gpu else math.inf
        return int(min((machine.get("CPU", 0.0) - reserve) / cpus + 1e-6, gpus))

    large = [machine for machine in machines if machine.get("CPU", 0.0) >= for_data]
    lost = min((fit(machine) - fit(machine, for_data) for machine in large), default=0)
    return sum(map(fit, machines)) - lost


def _most_cpus(machines: Machines, num_processes: int, use_gpu: bool, reserve: float, for_data: float = 0.0) -> float:
    """Return the most CPUs that each of several processes can have; 0 if they do not fit.

    Args:
        machines: what each has.
        num_processes: how many.
        use_gpu: whether each needs a GPU.
        reserve: CPUs to leave, anywhere.
        for_data: more CPUs to leave, on one machine.
    """
    even = (_sum(machines, "CPU") - reserve - for_data) / num_processes
    parts = {
        (machine.get("CPU", 0.0) - left) / count
        for machine in machines
        for count in range(1, num_processes + 1)
        for left in {0.0, for_data}
    }
    fits = [each for each in {even, *parts} if 0.0 < each <= even]
    return max((each for each in fits if _room(machines, each, use_gpu, for_data) >= num_processes), default=0.0)


def resolve_resources(config: Config, source: SampleSource) -> Resources:
    """Resolve every `auto` of the scaling section; Ray is connected, unless there are no workers.

    Raises:
        ClusterError: the cluster can never place the workers; one line with the cure.
    """
    scaling = config.scaling
    if scaling.stream == "device":
        check_columns(source.schema)
    if scaling.num_workers == 0:
        stream, reason = _in_process_stream(scaling)
        use_gpu = _resolve_gpu(scaling, torch.cuda.device_count(), 1)
        threads = len(os.sched_getaffinity(0)) if scaling.threads == "auto" else scaling.threads
        return Resources(0, use_gpu, 0.0, threads, stream, reason)
    machines = machine_resources()
    cpus = _sum(machines, "CPU")
    fewest, most = scaling.worker_range
    use_gpu = _resolve_gpu(scaling, int(_sum(machines, "GPU")), fewest)
    stream, reason = _worker_stream(scaling, source)
    # An elastic run starts as soon as its fewest workers fit; CPUs are divided among the most that fit today.
    today = max(fewest, min(most, _room(machines, 1.0, use_gpu)))
    for_data = _cpus_for_data(stream, cpus)
    largest = _most_cpus(machines, today, use_gpu, 0.0, for_data)
    cpus_per_worker = _cpus_per_worker(scaling, largest, machines, use_gpu, for_data)
    threads = max(1, int(min(cpus // today, largest + for_data))) if scaling.threads == "auto" else scaling.threads
    return Resources(scaling.num_workers, use_gpu, cpus_per_worker, threads, stream, reason)


def _in_process_stream(scaling: ScalingSection) -> tuple[Stream, str]:
    if scaling.stream == "device":
        return "device", "as configured"
    return "local", "stream ray needs workers" if scaling.stream == "ray" else "no workers"


def _worker_stream(scaling: ScalingSection, source: SampleSource) -> tuple[Stream, str]:
    if scaling.stream != "auto":
        return scaling.stream, "as configured"
    if source.row_cost == "cheap":
        return "local", "rows are cheap to read: memory-mapped or in memory"
    return "ray", "rows are expensive to read: Ray Data spreads the decoding"


def _resolve_gpu(scaling: ScalingSection, num_gpus: int, num_workers: int) -> bool:
    use_gpu = num_gpus >= 1 if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu and num_gpus < num_workers:
        raise ClusterError(
            f"scaling.use_gpu needs {num_workers} GPU{'s' if num_workers > 1 else ''}, there are {num_gpus}: set "
            "scaling.use_gpu=false" + (f" or scaling.num_workers={num_gpus}" if num_gpus else "")
        )
    return use_gpu


def _cpus_per_worker(
    scaling: ScalingSection, largest: float, machines: Machines, use_gpu: bool, for_data: float
) -> float:
    cpus = _sum(machines, "CPU")
    # Whole CPUs if there are enough. Fractions only matter to Ray's scheduler: threads are set separately.
    automatic = float(int(largest)) if largest >= 1 else max(largest, _LEAST_AUTO_CPUS)
    each = automatic if scaling.cpus_per_worker == "auto" else scaling.cpus_per_worker
    fewest = scaling.worker_range[0]
    smaller = math.floor(100 * largest) / 100
    if each * fewest + for_data > cpus + 1e-6:
        data = " + 1 CPU for Ray Data" if for_data else ""
        most = max(1, int((cpus - for_data) / each))
        raise ClusterError(
            f"scaling.num_workers {fewest} × {each:g} CPUs{data} is more than the {cpus:g} CPUs of the cluster, and "
            f"Ray would wait forever: set scaling.num_workers={most} or scaling.cpus_per_worker={smaller:g}"
        )
    if (room := _room(machines, each, use_gpu, for_data)) < fewest:
        cure = f"scaling.num_workers={room}" if room else f"scaling.cpus_per_worker={smaller:g}"
        if not room and not smaller:
            cure = "scaling.use_gpu=false, or fewer workers"
        raise ClusterError(
            f"{_each(machines, use_gpu)} have room for {room} workers with {each:g} CPUs{' and a GPU' * use_gpu}"
            f"{' beside 1 CPU for Ray Data' * bool(for_data)}, and Ray would wait forever for {fewest}: set {cure}"
        )
    return each


def _each(machines: Machines, use_gpu: bool) -> str:
    cpus = ", ".join(f"{machine.get('CPU', 0.0):g}" for machine in machines[:_NAMED_MACHINES])
    gpus = ", ".join(f"{machine.get('GPU', 0.0):g}" for machine in machines[:_NAMED_MACHINES])
    more = ", …" * (len(machines) > _NAMED_MACHINES)
    return f"the machines of the cluster, of {cpus}{more} CPUs{f' and {gpus}{more} GPUs' * use_gpu},"


def _cpus_for_data(stream: Stream, cpus: float) -> float:
    return 1.0 if stream == "ray" and cpus > 1 else 0.0


@dataclass(frozen=True)
class ConcurrencyRequest:
    """How many of several runs to make at the same time.

    Attributes:
        num_runs: runs to make.
        value: how many at the same time, or "auto".
        key: the config key of `value`, for messages.
        noun: what a run is called there.
    """

    num_runs: int
    value: int | Literal["auto"]
    key: str = "sweep.max_concurrent"
    noun: str = "trial"

    def limit(self, most: int) -> int:
        """Return how many runs go at the same time if `most` fit.

        Raises:
            ClusterError: fewer fit than are requested.
        """
        if self.value == "auto":
            return max(1, min(most, self.num_runs))
        if self.value > most:
            raise ClusterError(f"{self.key} {self.value} is more than fit at a time ({most}): set {self.key}={most}")
        return self.value


@dataclass(frozen=True)
class TrialResources:
    """What each of several runs gets.

    Attributes:
        num_concurrent: runs that go at the same time.
        reserved: what Ray reserves for a run's own actor.
        scaling: values for the keys of the run's `scaling` section.
        text: the same for a person.
    """

    num_concurrent: int
    reserved: dict[str, float]
    scaling: dict[str, Any]
    text: str


def divide_resources(
    config: Config, source: SampleSource, request: ConcurrencyRequest, machines: Machines
) -> TrialResources:
    """Divide the resources among runs that go at the same time.

    Args:
        config, source: of the runs.
        request: how many runs.
        machines: what each machine has, as from `machine_resources`.

    Raises:
        ConfigError: the number of workers is a range.
        ClusterError: they are not enough for one run, or for as many as requested; one line with the cure.
    """
    scaling = config.scaling
    if isinstance(scaling.num_workers, tuple):
        cure = f"set scaling.num_workers={scaling.num_workers[0]}"
        raise ConfigError(f"{request.noun}s at the same time need a fixed number of workers: {cure}")
    if scaling.num_workers == 0:
        return _divide_in_process(scaling, request, machines)
    alone = resolve_resources(config, source)
    return _divide_with_workers(scaling, alone, request, machines)


def _divide_in_process(scaling: ScalingSection, request: ConcurrencyRequest, machines: Machines) -> TrialResources:
    use_gpu = _resolve_gpu(scaling, int(_sum(machines, "GPU")), 1)
    threads = 1 if scaling.threads == "auto" else scaling.threads
    room = _room(machines, threads, use_gpu)
    if not room:
        largest = int(_most_cpus(machines, 1, use_gpu, 0.0))
        raise ClusterError(
            f"no {request.noun} can have {threads} threads: a machine has at most {largest} CPUs"
            f"{' beside a GPU' * use_gpu}, and Ray would wait forever: set scaling.threads={max(1, largest)}"
        )
    concurrent = request.limit(room)
    if scaling.threads == "auto":
        threads = max(1, int(_most_cpus(machines, concurrent, use_gpu, 0.0)))
    reserved = {"CPU": float(threads), **({"GPU": 1.0} if use_gpu else {})}
    settings = {"threads": threads, "use_gpu": use_gpu, "stream": _in_process_stream(scaling)[0]}
    text = f"{concurrent} at once, {threads} thread{'s' if threads > 1 else ''}{' and a GPU' if use_gpu else ''} each"
    return TrialResources(concurrent, reserved, settings, text)


def _divide_with_workers(
    scaling: ScalingSection, alone: Resources, request: ConcurrencyRequest, machines: Machines
) -> TrialResources:
    workers, cpus = scaling.worker_range[0], _sum(machines, "CPU")
    overhead = _TRIAL_ACTOR_CPUS + _cpus_for_data(alone.stream, cpus)
    largest = math.floor(_most_cpus(machines, workers, alone.use_gpu, overhead) * 100) / 100
    each = min(1.0, largest) if scaling.cpus_per_worker == "auto" else scaling.cpus_per_worker
    if each > largest or each < _LEAST_TRIAL_CPUS:
        cure = f"scaling.cpus_per_worker={largest:g}" if largest >= _LEAST_TRIAL_CPUS else "scaling.num_workers=0"
        raise ClusterError(
            f"no {request.noun} can have its {workers} workers × {max(each, _LEAST_TRIAL_CPUS):g} CPUs and "
            f"{overhead:g} CPUs for itself: the cluster has {cpus:g}, and Ray would wait forever: set {cure}"
        )
    most = min(int(cpus // (workers * each + overhead)), _room(machines, each, alone.use_gpu) // workers)
    concurrent = request.limit(most)
    if scaling.cpus_per_worker == "auto":
        each = _most_cpus(machines, workers * concurrent, alone.use_gpu, overhead * concurrent)
        each = math.floor(each * 100) / 100
        each = float(int(each)) if each >= 1 else each
    threads = max(1, int(cpus // (workers * concurrent))) if scaling.threads == "auto" else scaling.threads
    settings = {"threads": threads, "use_gpu": alone.use_gpu, "stream": alone.stream, "cpus_per_worker": each}
    text = f"{concurrent} at once, {workers} worker{'s' if workers > 1 else ''} of {each:g} CPUs each"
    return TrialResources(concurrent, {"CPU": _TRIAL_ACTOR_CPUS}, settings, text)
