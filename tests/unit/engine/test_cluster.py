"""Which cluster a run means, and one line within seconds when there is none."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray

from rayprune.config import make_config
from rayprune.engine import cluster as resources
from rayprune.engine.cluster import cluster_address, connect
from tests.support.paths import ROOT


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
def test_the_config_goes_before_the_variable(
    address: str, variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(address) == expected


def test_a_port_where_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # A process of its own: this one may be connected to a Ray that other tests have started.
    words = ["configs/digits_full.yaml", f"run.address=127.0.0.1:{port}", "train.epochs=1", "run.name=none"]
    command = [sys.executable, "-m", "rayprune", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert line.startswith(
        f"error: no Ray cluster answers at 127.0.0.1:{port} ([Errno 111] Connection refused): start it"
    )
    assert line.endswith("run.address=local")


def test_a_port_of_something_else_is_refused_within_seconds() -> None:
    """Ray itself goes on trying for two minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"answers at 127.0.0.1:\d+ \(nothing within 5 s\): start it"):
            connect(f"127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - start < 15


def test_a_server_that_is_no_head_node_is_refused_at_once() -> None:
    """It speaks the head node's protocol, so Ray itself would try for most of a minute."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=r"\(what listens there is no head node of Ray\): start it"):
            connect(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_a_clients_address_is_refused_with_the_way_to_submit(address: str) -> None:
    with pytest.raises(ValueError, match=r"is one for clients.*ray job submit"):
        connect(address)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'..:6379' names no host: start it"):
        connect("..:6379")
    for address in ("head", "127.0.0.1:99999"):
        with pytest.raises(ValueError, match=rf"'{address}' is none of auto, local, HOST:PORT"):
            connect(address)


def test_a_cluster_that_asks_for_a_token_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        try:
            raise RuntimeError("ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379") from error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ValueError, match=r"on this machine asks for a token.*RAY_AUTH_MODE=token"):
        connect("auto")


def test_no_free_port_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        ValueError, match=r"no Ray starts on this machine \(\[Errno 98\] Address already in use\): free"
    ):
        resources.start_ray(address="local")


def test_where_a_run_trains_is_no_part_of_it() -> None:
    assert make_config({"run": {"address": "10.0.0.1:6379"}}).digest() == make_config({}).digest()


def test_a_storage_path_is_a_folder_that_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.storage_path = 's3://bucket/runs': must be a folder: mount the storage"):
        make_config({"run": {"storage_path": "s3://bucket/runs"}})
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(ValueError, match=r"'runs' lies in the working directory of a Ray job, which Ray deletes"):
        make_config({}).run.storage_folder()
