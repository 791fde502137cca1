"""Run commands in forked processes with limits, and record what they do outside their folder.

A fork of a process that has imported torch and Ray starts in milliseconds, so hundreds of commands take minutes. The
forking process is a subprocess of its own: tests may have threads, which a fork does not survive.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.command_line import environment
from tests.support.paths import ROOT

_GB = 2**30
# Audit events that only foreign code causes here. Commands without workers start no process and open no connection.
_FOREIGN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect"}
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}
# What commands import; the children need not do it again.
_IMPORTED = (
    "matplotlib.pyplot",
    "torchvision",
    "rayprune.cli.main",
    "rayprune.engine.train.driver",
    "rayprune.report.page",
    "rayprune.sources.registry",
)
_PICKLED = {"os", "posix", "subprocess", "shutil"}  # modules that a pickle needs to do harm


@dataclass(frozen=True)
class Limits:
    """What one command may take: seconds of wall time, and bytes of memory beyond the imported libraries."""

    seconds: float = 60.0
    memory: int = 2 * _GB


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: its exit code; negative: the signal that ended it, SIGALRM at the time limit.
        seconds: wall time.
        memory: bytes of memory beyond the imported libraries.
        foreign: events that a command must not cause, such as a file written outside its folder.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    foreign: list[str]

    @property
    def refusal(self) -> str:
        """The line of the error; "" if there is none."""
        return next((line for line in self.err.splitlines() if line.startswith("error: ")), "")

    def problems(self, limits: Limits, codes: frozenset[int]) -> list[str]:
        """Return which promises the command broke, one line each."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        found = [f"foreign: {event}" for event in self.foreign]
        if self.code not in codes:
            found.append(f"exit code {self.code}, not one of {sorted(codes)}")
        if self.code > 0 and len(lines) != 1:
            found.append(f"{len(lines)} lines on the error, not 1")
        if self.code == 0 and lines:
            found.append("an error, and exit code 0")
        if "Traceback" in self.err + self.out:
            found.append("a traceback")
        if "--debug" in self.refusal:  # the advice of last resort: nobody has thought of this error
            found.append("an error without a cure of its own")
        if self.memory > limits.memory:
            found.append(f"{self.memory / _GB:.1f} GB of memory")
        return found


class Sandbox:
    """A process that forks a child for each command; use it as a context manager."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def __enter__(self) -> Sandbox:
        command = [sys.executable, "-m", "tests.scenarios.fuzz.sandbox"]
        env = {**environment(), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(30)

    def run(self, folder: Path, *words: str) -> Outcome:
        """Run `rayprune WORDS` in a folder, which is also its home and the only place where it may write."""
        request = {"folder": str(folder), "words": words, "seconds": self.limits.seconds, "memory": self.limits.memory}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the sandbox ended with {self._process.wait()}")
        own = folder / _OWN
        foreign = sorted(set((own / "foreign").read_text().splitlines()))
        out, err = ((own / name).read_text(errors="replace") for name in ("out", "err"))
        return Outcome(**json.loads(answer), out=out, err=err, foreign=foreign)


_OWN = ".sandbox"


def _serve() -> None:
    """Fork a child for each request on stdin; write how it ended to stdout."""
    for name in _IMPORTED:
        importlib.import_module(name)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if (idle := os.fork()) == 0:
        os._exit(0)
    resident = os.wait4(idle, 0)[2].ru_maxrss
    for text in sys.stdin:
        request = json.loads(text)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(request, virtual)  # does not return
        _, status, usage = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        answer = {"code": code, "seconds": time.monotonic() - start, "memory": (usage.ru_maxrss - resident) * 1024}
        print(json.dumps(answer), flush=True)


def _become(request: dict[str, Any], virtual: int) -> None:
    """Run a request's command in this forked child, and exit with its code."""
    code = 70
    try:
        folder = Path(request["folder"])
        own = folder / _OWN
        own.mkdir(exist_ok=True)
        for number, name in enumerate(("out", "err"), start=1):
            os.dup2(os.open(own / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {"HOME": str(own), "TMPDIR": str(own), "XDG_CACHE_HOME": str(own)}
        os.chdir(folder)
        foreign = os.open(own / "foreign", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        limit = virtual + 2 * request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # SIGALRM ends the process, also inside C
        sys.argv = ["rayprune", *request["words"]]
        sys.addaudithook(_Watch(folder, foreign))
        from rayprune.cli.main import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Watch:
    """An audit hook that records what a command must not do."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder, self._descriptor = str(folder.resolve()) + os.sep, descriptor

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if event in _FOREIGN and values[0] != "uname":  # Python's platform module starts it
            self._record(f"{event} {values[:2]!r}")
        elif event == "open" and isinstance(values[0], (str, bytes)):
            if values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._check(event, values[0])
        elif event in _CHANGES:
            self._check(event, values[0])
        elif event == "pickle.find_class" and str(values[0]) in _PICKLED:
            self._record(f"unpickles {values!r}")
        elif event == "exec" and str(getattr(values[0], "co_filename", "")).startswith(self._folder):
            self._record(f"runs {values[0].co_filename}")

    def _check(self, event: str, path: Any) -> None:
        full = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        if not (full + os.sep).startswith(self._folder) and not full.startswith("/dev/"):
            self._record(f"{event} {full}")

    def _record(self, line: str) -> None:
        os.write(self._descriptor, (" ".join(line.split())[:300] + "\n").encode())


if __name__ == "__main__":
    _serve()
