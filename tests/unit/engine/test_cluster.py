"""Which cluster a run uses and what its workers get; one line within seconds if there is none, or too little."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.exceptions import AuthenticationError

from rayprune.config import Config, make_config
from rayprune.engine import cluster
from rayprune.engine.cluster import ConcurrencyRequest, cluster_address, connect, divide_resources, resolve_resources
from rayprune.sources import open_data
from tests.support.paths import ROOT

TOKEN = "t" * 64


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token may be


@pytest.mark.parametrize(
    ("address", "variable", "expected"),
    [
        ("auto", None, None),
        ("auto", "", None),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "auto", "auto"),
        ("auto", "local", None),
        ("local", "10.0.0.1:6379", None),
        ("10.0.0.2:6379", "10.0.0.1:6379", "10.0.0.2:6379"),
    ],
)
def test_the_config_overrides_the_variable(
    address: str, variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(address) == expected


def test_a_port_without_a_server_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # In a process of its own: this one may be connected to a Ray that other tests have started.
    words = ["configs/digits_full.yaml", f"run.address=127.0.0.1:{port}", "train.epochs=1", "run.name=none"]
    command = [sys.executable, "-m", "rayprune", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert line.startswith(
        f"error: no Ray cluster answers at 127.0.0.1:{port} ([Errno 111] Connection refused): start it"
    )
    assert line.endswith("run.address=local")


def test_another_programs_port_is_refused_within_seconds() -> None:
    """Ray itself tries for more than a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"answers at 127.0.0.1:\d+ \(no answer within 5 s\): start it"):
            connect(f"127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - start < 15


@contextmanager
def grpc_server(*services: grpc.GenericRpcHandler, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Run a gRPC server; yield its address."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=services)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def head_node(token: str = "") -> grpc.GenericRpcHandler:
    """Return a service that answers as a head node does, one that requires a token if there is one."""

    def check_alive(request: bytes, context: grpc.ServicerContext) -> bytes:
        if token and ("authorization", f"Bearer {token}") not in tuple(context.invocation_metadata()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    method = grpc.unary_unary_rpc_method_handler(check_alive)
    return grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": method})


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the addresses that ray.init gets from now on."""
    addresses: list[str] = []
    monkeypatch.setattr(ray, "init", lambda address, **_: addresses.append(address))
    return addresses


def test_a_server_that_is_not_a_head_node_is_refused_at_once() -> None:
    """It speaks the head node's protocol; Ray itself tries for more than a minute."""
    start = time.monotonic()
    with grpc_server() as address, pytest.raises(ValueError, match=r"\(the server there is not a Ray head node\): sta"):
        connect(address)
    assert time.monotonic() - start < 5


def test_a_head_node_is_joined(joined: list[str]) -> None:
    with grpc_server(head_node()) as address:
        connect(address)
    assert joined == [address]


def test_a_missing_or_wrong_token_is_refused_at_once(joined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries for 20 s."""
    with grpc_server(head_node(TOKEN)) as address:
        for variables in ({}, {"RAY_AUTH_TOKEN": "wrong"}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN}):
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                with pytest.raises(ValueError, match=rf"at {address} requires a token.*RAY_AUTH_MODE=token"):
                    connect(address)
    assert joined == []


@pytest.mark.parametrize("place", ["variable", "named file", "Ray's own file"])
def test_the_token_is_found_where_ray_finds_it(
    place: str, joined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    else:
        file = tmp_path / ("token" if place == "named file" else ".ray/auth_token")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{TOKEN}\n")
        if place == "named file":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with grpc_server(head_node(TOKEN)) as address:
        connect(address)
    assert joined == [address]


def test_a_token_of_kubernetes_is_left_to_ray(joined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_K8S_TOKEN_AUTH", "true")
    with grpc_server(head_node(TOKEN)) as address:
        connect(address)
    assert joined == [address]


def certificate() -> tuple[bytes, bytes]:
    """Return a private key and its self-signed certificate for 127.0.0.1, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(alternative, critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*plain), signed.public_bytes(serialization.Encoding.PEM)


def test_a_head_node_with_tls_is_joined_with_rays_certificates(
    joined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")  # a requirement of ray[default]'s own requirements
    key, signed = certificate()
    credentials = grpc.ssl_server_credentials([(key, signed)], signed, require_client_auth=True)
    with grpc_server(head_node(), credentials=credentials) as address:
        with pytest.raises(ValueError, match="is not a Ray head node"):
            connect(address)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        with pytest.raises(ValueError, match="RAY_USE_TLS is set and 'RAY_TLS_CA_CERT' is not"):
            connect(address)
        for name, content in (("CA_CERT", signed), ("SERVER_CERT", signed), ("SERVER_KEY", key)):
            (tmp_path / name).write_bytes(content)
            monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / name))
        connect(address)
    assert joined == [address]


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_a_clients_address_is_refused_with_the_way_to_submit(address: str) -> None:
    with pytest.raises(ValueError, match=r"is for Ray clients.*ray job submit"):
        connect(address)


def test_an_invalid_address_is_refused() -> None:
    with pytest.raises(ValueError, match=r"answers at \.\.:6379 \(the host name is invalid\): start it"):
        connect("..:6379")
    for address in ("head", "127.0.0.1:99999"):
        with pytest.raises(ValueError, match=rf"'{address}' is not auto, local or HOST:PORT"):
            connect(address)


@pytest.mark.parametrize(
    "cause",
    [RuntimeError("ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"), None],
    ids=["wrong", "none"],
)
def test_a_token_error_of_ray_itself_is_one_line(cause: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        if cause is None:
            raise AuthenticationError("Token authentication is enabled but no authentication token was found.")
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from cause

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ValueError, match=r"on this machine requires a token.*RAY_AUTH_MODE=token"):
        connect("auto")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(98, "Address already in use"), r"\[Errno 98\] Address already in use"),
        (Exception("The current node timed out during startup. This could"), "The current node timed out.*"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ValueError, match=rf"no Ray starts on this machine \({words}\): free"):
        cluster.start_ray(address="local")


@pytest.mark.parametrize("writable", [True, False])
def test_without_a_writable_home_folder_a_local_ray_gets_its_token_from_this_process(
    writable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir() if writable else home.touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # set back after the test
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    found: list[str] = []
    monkeypatch.setattr(cluster.local_ray, "start", lambda **_: found.append(os.environ["RAY_AUTH_TOKEN"]))
    cluster.start_ray(address="local")
    assert len(found[0]) == (0 if writable else 64)


def test_the_address_does_not_change_the_digest() -> None:
    assert make_config({"run": {"address": "10.0.0.1:6379"}}).digest() == make_config({}).digest()


def test_a_storage_path_must_be_a_folder_that_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert str(make_config({"run": {"storage_path": "s3://bucket/runs"}}).run.storage_folder()) == "s3://bucket/runs"
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(ValueError, match=r"'runs' lies in the working directory of a Ray job, which Ray deletes"):
        make_config({}).run.storage_folder()


# Resources: the digits are cheap to read


DIGITS = open_data("digits", limit=64).train


def config_of(scaling: dict[str, Any]) -> Config:
    return make_config({"scaling": scaling, "train": {"batch_size": 720_720}})  # divides by up to 16 workers


@pytest.fixture
def total(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the resources of a pretended cluster: 8 CPUs and 2 GPUs, unless the test changes them."""
    resources = {"CPU": 8.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
    monkeypatch.setattr(cluster.torch.cuda, "device_count", lambda: int(resources["GPU"]))
    monkeypatch.setattr(cluster.os, "sched_getaffinity", lambda _: set(range(int(resources["CPU"]))))
    return resources


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"num_workers": 2}, (2, True, 4.0, 4, "local")),
        ({"num_workers": 2, "stream": "ray"}, (2, True, 3.0, 4, "ray")),
        ({"num_workers": 2, "use_gpu": False, "cpus_per_worker": 0.5, "threads": 3}, (2, False, 0.5, 3, "local")),
        ({"num_workers": [1, 4]}, ((1, 4), True, 4.0, 4, "local")),
        ({"num_workers": [2, 16]}, ((2, 16), True, 4.0, 4, "local")),
        ({"num_workers": [2, 16], "use_gpu": False}, ((2, 16), False, 1.0, 1, "local")),
        ({"num_workers": 0}, (0, True, 0.0, 8, "local")),
        ({"num_workers": 0, "stream": "ray", "use_gpu": False, "threads": 2}, (0, False, 0.0, 2, "local")),
        ({"num_workers": 0, "stream": "device"}, (0, True, 0.0, 8, "device")),
    ],
)
def test_auto_becomes_what_the_cluster_has(
    scaling: dict[str, Any], expected: tuple[Any, ...], total: dict[str, float]
) -> None:
    resources = resolve_resources(config_of(scaling), DIGITS)
    names = ("num_workers", "use_gpu", "cpus_per_worker", "threads", "stream")
    assert tuple(getattr(resources, name) for name in names) == expected


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"num_workers": 3}, r"use_gpu needs 3 GPUs, there are 2: set scaling.use_gpu=false or scaling.num_workers=2"),
        (
            {"num_workers": 12, "use_gpu": False, "cpus_per_worker": 1},
            r"num_workers 12 × 1 CPUs is more than the 8 CPUs.*num_workers=8 or scaling.cpus_per_worker=0.66",
        ),
        (
            {"num_workers": 8, "use_gpu": False, "cpus_per_worker": 1, "stream": "ray"},
            r"num_workers 8 × 1 CPUs \+ 1 CPU for Ray Data is more than the 8 CPUs.*scaling.num_workers=7",
        ),
    ],
)
def test_workers_that_can_never_be_placed_are_refused(
    scaling: dict[str, Any], words: str, total: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_resources(config_of(scaling), DIGITS)


@pytest.mark.parametrize(
    ("scaling", "value", "expected"),
    [
        ({"num_workers": 0}, "auto", (2, {"CPU": 4.0, "GPU": 1.0}, 4)),
        ({"num_workers": 0, "use_gpu": False}, "auto", (5, {"CPU": 1.0}, 1)),
        ({"num_workers": 0, "use_gpu": False, "threads": 3}, "auto", (2, {"CPU": 3.0}, 3)),
        ({"num_workers": 0, "use_gpu": False}, 2, (2, {"CPU": 4.0}, 4)),
        ({"num_workers": 2, "use_gpu": False}, 2, (2, {"CPU": 0.1}, 2)),
        ({"num_workers": 2}, "auto", (1, {"CPU": 0.1}, 4)),
    ],
)
def test_runs_at_the_same_time_divide_the_resources(
    scaling: dict[str, Any], value: Any, expected: tuple[Any, ...], total: dict[str, float]
) -> None:
    config = config_of(scaling)
    resources = divide_resources(config, DIGITS, ConcurrencyRequest(5, value), [total])
    assert (resources.num_concurrent, resources.reserved, resources.scaling["threads"]) == expected
    workers = scaling["num_workers"]
    each = workers * resources.scaling.get("cpus_per_worker", 0.0) + resources.reserved["CPU"]
    assert resources.num_concurrent * each <= total["CPU"]
    assert config_of({**scaling, **resources.scaling}).scaling.threads == resources.scaling["threads"]


@pytest.mark.parametrize(
    ("scaling", "value", "words"),
    [
        ({"num_workers": [1, 2]}, "auto", "trials at the same time need a fixed number of workers.*num_workers=1"),
        ({"num_workers": 0, "threads": 9}, "auto", r"no trial can have 9 threads: a machine has at most 8.*threads=8"),
        ({"num_workers": 0}, 3, r"sweep.max_concurrent 3 is more than fit at a time \(2\): set sweep.max_concurrent=2"),
        (
            {"num_workers": 8, "use_gpu": False, "cpus_per_worker": 1},
            "auto",
            r"no trial can have its 8 workers × 1 CPUs and 0.1 CPUs for itself.*cpus_per_worker=0.98",
        ),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    scaling: dict[str, Any], value: Any, words: str, total: dict[str, float]
) -> None:
    config = config_of(scaling)
    with pytest.raises(ValueError, match=words):
        divide_resources(config, DIGITS, ConcurrencyRequest(5, value), [total])


# A head node without work, a large machine and two small ones.
FOUR = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}]


@pytest.fixture
def four_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": each} for each in FOUR]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])


@pytest.mark.usefixtures("four_machines")
@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"num_workers": 1, "use_gpu": False}, (8.0, 8)),
        ({"num_workers": 2, "use_gpu": False}, (4.0, 4)),
        ({"num_workers": 2}, (2.0, 2)),
        ({"num_workers": 4, "use_gpu": False, "stream": "ray"}, (2.0, 3)),
        ({"num_workers": 12, "use_gpu": False}, (1.0, 1)),
        ({"num_workers": 16, "use_gpu": False}, (0.666667, 1)),
    ],
)
def test_no_worker_gets_more_than_a_machine_has(scaling: dict[str, Any], expected: tuple[float, int]) -> None:
    resources = resolve_resources(config_of(scaling), DIGITS)
    assert (round(resources.cpus_per_worker, 6), resources.threads) == expected


@pytest.mark.usefixtures("four_machines")
@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (
            {"num_workers": 3, "use_gpu": False, "cpus_per_worker": 4},
            "of 0, 8, 2, 2 CPUs, have room for 2 workers with 4 CPUs, and .* for 3: set scaling.num_workers=2",
        ),
        (
            {"num_workers": 1, "use_gpu": False, "cpus_per_worker": 9},
            "have room for 0 workers with 9 CPUs.*set scaling.cpus_per_worker=8",
        ),
        (
            {"num_workers": 2, "cpus_per_worker": 4},
            "CPUs and 0, 1, 1, 0 GPUs, have room for 1 workers with 4 CPUs and a GPU",
        ),
        (  # 1.2 CPUs would be left, but no machine would have one of them
            {"num_workers": 12, "use_gpu": False, "cpus_per_worker": 0.9, "stream": "ray"},
            "have room for 11 workers with 0.9 CPUs beside 1 CPU for Ray Data.*set scaling.num_workers=11",
        ),
    ],
)
def test_workers_that_no_machine_has_room_for_are_refused(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_resources(config_of(scaling), DIGITS)


@pytest.mark.parametrize(
    ("scaling", "value", "expected"),
    [
        ({"num_workers": 0, "use_gpu": False}, 1, (1, 8)),
        ({"num_workers": 0, "use_gpu": False}, 2, (2, 4)),
        ({"num_workers": 0, "use_gpu": False, "threads": 2}, "auto", (5, 2)),
        ({"num_workers": 0}, "auto", (2, 2)),
    ],
)
def test_no_trial_gets_more_than_a_machine_has(scaling: dict[str, Any], value: Any, expected: tuple[int, int]) -> None:
    resources = divide_resources(config_of(scaling), DIGITS, ConcurrencyRequest(5, value), FOUR)
    assert (resources.num_concurrent, resources.scaling["threads"]) == expected
