"""A file behind a user, a password and a signed URL, on the loopback interface."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd


def samples() -> bytes:
    """Return a Parquet file of 200 samples of four classes."""
    labels = np.arange(200) % 4
    file = io.BytesIO()
    pd.DataFrame({**{f"x{i}": (labels == i).astype(np.float32) for i in range(4)}, "label": labels}).to_parquet(file)
    return file.getvalue()


def files_with(secret: str, folder: Path) -> list[str]:
    """Return the files of a folder that hold a secret."""
    found = []
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # replaced meanwhile
            if file.is_file() and secret.encode() in file.read_bytes():
                found.append(str(file))
    return found


@contextlib.contextmanager
def serve(content: bytes, name: str, credentials: str, tokens: Collection[str]) -> Iterator[str]:
    """Serve a file to those who know `user:password` and one of the tokens; yield `HOST:PORT/NAME`."""
    authorization = f"Basic {base64.b64encode(credentials.encode()).decode()}"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            url = urlsplit(self.path)
            if (
                self.headers.get("Authorization") != authorization
                or parse_qs(url.query).get("token", [""])[0] not in tokens
            ):
                self.send_error(401)
                return
            start, stop = 0, len(content)
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last) + 1, stop) if last else stop
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Accept-Ranges", "bytes")
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            self.end_headers()
            if with_body:
                self.wfile.write(content[start:stop])

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}/{name}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
