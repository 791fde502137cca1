"""A real S3 server on loopback that can fail: errors 500 and 503, slow writes, and listings that lag."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from werkzeug.serving import make_server

from rayprune import paths

BUCKET = "s3://bucket"
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
_BROKEN = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>try again</Message></Error>"


@dataclass
class Faults:
    """What goes wrong from now on.

    Attributes:
        share: of the requests that fail, half of them with 500 and half with 503.
        slow_s: seconds that each write takes longer.
        lag_s: age of the listings that are returned.
        num_failed, num_stale: requests that failed, and listings that were out of date.
    """

    share: float = 0.0
    slow_s: float = 0.0
    lag_s: float = 0.0
    num_failed: int = 0
    num_stale: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))


class _Server:
    """moto's S3 server behind the faults."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._listings: dict[str, list[tuple[float, Any]]] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        faults = self.faults
        with self._lock:
            fails, busy = faults._random.random() < faults.share, faults._random.random() < 0.5
            faults.num_failed += fails
        if fails:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            content = _BUSY if busy else _BROKEN
            start_response("503 Slow Down" if busy else "500 Internal Server Error", [("Content-Type", "text/xml")])
            return [content]
        if environ["REQUEST_METHOD"] in {"PUT", "POST"}:
            time.sleep(faults.slow_s)
        if "list-type" in parse_qs(environ.get("QUERY_STRING", "")):
            return self._listing(environ, start_response)
        return self._inner(environ, start_response)  # type: ignore[no-any-return]

    def _listing(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Return the newest answer to the same request that is old enough, or else the present one."""
        began: list[Any] = []

        def begin(*arguments: Any) -> Callable[[bytes], object]:
            began[:] = arguments
            return lambda content: None

        content = b"".join(self._inner(environ, begin))
        now, request = time.monotonic(), f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        with self._lock:
            known = self._listings.setdefault(request, [])
            known.append((now, (began, content)))
            old = [answer for at, answer in known if at <= now - self.faults.lag_s]
            answer = (old or [known[0][1]])[-1] if self.faults.lag_s else known[-1][1]
            self.faults.num_stale += answer[1] != content
            del known[: max(0, len(old) - 1)]
        start_response(*answer[0])
        return [answer[1]]


@dataclass
class ObjectStore:
    """A running server.

    Attributes:
        url: its address.
        environment: the variables by which Arrow, and with it Ray, finds it.
    """

    url: str
    environment: dict[str, str]
    _server: _Server

    @contextmanager
    def also_at(self, listener: socket.socket) -> Iterator[dict[str, str]]:
        """Serve the same objects at another socket while the block runs; yield the variables for it."""
        host, port = listener.getsockname()[:2]
        with _serving(self._server, host, port, listener.fileno()) as url:
            yield {**self.environment, "AWS_ENDPOINT_URL": url}

    @contextmanager
    def failing(self, **faults: float) -> Iterator[Faults]:
        """Let requests fail while the block runs; see `Faults`."""
        self._server.faults = Faults(**faults)  # type: ignore[arg-type]
        try:
            yield self._server.faults
        finally:
            self._server.faults = Faults()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server with an empty bucket; this process and those that it starts use it while the block runs."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    app = _Server()
    with _serving(app, "127.0.0.1") as url, pytest.MonkeyPatch.context() as patch:
        environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": url,
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        paths._root.cache_clear()
        from pyarrow.fs import S3FileSystem

        S3FileSystem(allow_bucket_creation=True, endpoint_override=url).create_dir(BUCKET.removeprefix("s3://"))
        yield ObjectStore(url, environment, app)
    paths._root.cache_clear()


@contextmanager
def _serving(app: _Server, host: str, port: int = 0, fd: int | None = None) -> Iterator[str]:
    server = make_server(host, port, app, threaded=True, request_handler=MotoRequestHandler, fd=fd)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        thread.join()
