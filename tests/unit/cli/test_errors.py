"""Every error that leaves the command line: one line that ends with a cure, and the documented exit code."""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import itertools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import rayprune.errors
from rayprune.cli.errors import CommandFailed, explain
from rayprune.errors import ConfigError, DataError, RunFolderError, TrainingFailed

LIBRARIES = [
    "builtins",
    "asyncio.exceptions",
    "concurrent.futures",
    "csv",
    "gzip",
    "http.client",
    "json",
    "lzma",
    "multiprocessing",
    "pickle",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "tarfile",
    "urllib.error",
    "zipfile",
    "zlib",
    "click",
    "click.exceptions",
    "fsspec.exceptions",
    "grpc",
    "numpy.exceptions",
    "numpy.linalg",
    "optuna.exceptions",
    "pandas.errors",
    "PIL",
    "PIL.Image",
    "psutil",
    "pyarrow.lib",
    "pydantic",
    "pydantic_core._pydantic_core",
    "ray.exceptions",
    "ray.train",
    "ray.tune.error",
    "requests.exceptions",
    "torch",
    "torch._C",
    "torch.distributed",
    "urllib3.exceptions",
    "yaml",
]
HOSTILE = "boom \x1b[31m[red]\n two \x07\u202e"
_OWN_ENDS = {"GeneratorExit", "KeyboardInterrupt", "Abort", "Exit"}


def exception_types() -> Iterator[type[BaseException]]:
    """Yield every exception type that the libraries define, each once."""
    seen: set[type[BaseException]] = set()
    for name in LIBRARIES:
        for found in vars(importlib.import_module(name)).values():
            if inspect.isclass(found) and issubclass(found, BaseException) and found not in seen:
                seen.add(found)
                if not issubclass(found, Warning):
                    yield found


def made(cls: type[BaseException]) -> BaseException:
    """Return an instance: with a hostile message if its constructor takes one, else one that was never initialized."""
    more = [(), (HOSTILE, HOSTILE), (1, HOSTILE, "file\n.bin"), (HOSTILE, [ValueError(HOSTILE)]), ("bool_type",)]
    makers = [cls, getattr(cls, "from_exception_data", cls), functools.partial(cls.__new__, cls)]  # pydantic's; bare
    for make, arguments in itertools.product(makers, [(HOSTILE,), *more, (HOSTILE, [])]):
        try:
            return make(*arguments)
        except Exception:
            continue
    raise AssertionError(f"no instance of {cls} can be made")


def check(line: str, code: int) -> None:
    """Assert that a line is one, printable, and ends with a cure."""
    assert line == " ".join(line.split())
    assert line.isprintable()
    before, colon, cure = line.rpartition(": ")
    assert before.strip(), line
    assert colon, line
    assert len(cure.split()) >= 3, line
    assert len(line) < 1000
    assert code in {1, 2, 130, 141}


def test_every_exception_of_every_library_is_one_line_with_a_cure() -> None:
    types = list(exception_types())
    assert len(types) > 250
    for cls in types:
        line, code = explain(made(cls))
        if cls.__name__ not in _OWN_ENDS:
            check(line, code)


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_errno_is_one_line_with_the_file_and_a_cure(number: int) -> None:
    line, code = explain(OSError(number, "reason", "folder/[b]x\x1b[0m"))
    check(line, code)
    assert line.startswith("folder/[b]x\\x1b[0m: reason: ")


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free space", 2),
        (OSError(errno.EMFILE, "Too many open files", "a.npy"), "a.npy: .*ulimit -n", 2),
        (OSError(errno.EIO, "Input/output error", "a.npy"), "a.npy: .*file system, has failed", 1),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: .*choose another place", 2),
        (MemoryError(), "MemoryError: .*not enough memory", 2),
        (RuntimeError("can't start new thread"), "not enough memory", 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory", 2),
        (RuntimeError("unexpected pos 134336 vs 134230"), "free space", 2),
        (RecursionError("maximum recursion depth exceeded"), "flatter", 2),
        (ValueError("embedded null byte"), "remove the character", 2),
        (OSError("Corrupt snappy compressed data."), "damaged", 2),
        (zipfile.BadZipFile("File is not a zip file"), "damaged", 2),
        (ModuleNotFoundError("No module named 'mlflow'", name="mlflow.client"), r"pip install 'rayprune\[mlflow\]'", 2),
        (ModuleNotFoundError("No module named 'x'", name="x.y"), "pip install x,", 2),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UTF-8", 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "GPU's memory", 2),
        (RuntimeError("Gloo connectFullMesh failed with [pair.cc:1] refused"), "set GLOO_SOCKET_IFNAME", 1),
        (RuntimeError("boom"), "RuntimeError: boom: this is unexpected; --debug shows", 1),
        (KeyError("x"), "KeyError: 'x': this is unexpected", 1),
        (SystemExit(0), r"SystemExit\(0\) ended the command: remove", 1),
        (KeyboardInterrupt(), "stopped", 130),
        (ConfigError("a: b"), "^a: b$", 2),
    ],
)
def test_the_cure_and_the_code_of(error: BaseException, words: str, code: int) -> None:
    line, found = explain(error)
    assert re.search(words, line), line
    assert found == code


def test_the_cause_of_an_error_tells_its_cure() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/x/model.pt")
    failed = TrainingFailed("training failed: OSError: [Errno 28] No space left on device")
    failed.__cause__ = full
    line, code = explain(failed)
    assert "free space" in line
    assert code == 1

    below = RuntimeError("writer failed")
    below.__context__ = full
    assert "free space" in explain(below)[0]
    # What an error only follows says nothing of it.
    below.__context__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "optional")
    assert "this is unexpected" in explain(below)[0]


def test_a_mistake_keeps_its_own_cure_behind_training_failed() -> None:
    failed = TrainingFailed("training failed: DataError: x.npy is cut: restore it")
    failed.__cause__ = DataError("x.npy is cut: restore it")
    assert explain(failed) == (str(failed), 1)
    failed.__cause__ = None  # of a worker
    assert explain(failed) == (str(failed), 1)


def test_a_stopped_training_and_a_failed_command_have_their_own_cures() -> None:
    for start in ("no trial finished; the first error", "no learning rate works for full"):
        failed = TrainingFailed(f"{start}: training stopped: 12 losses were NaN or infinite: lower optim.lr")
        assert explain(failed) == (str(failed), 1)
    assert explain(CommandFailed("something is missing: see above")) == ("something is missing: see above", 1)


def test_notes_are_part_of_the_line() -> None:
    error = RuntimeError("boom")
    error.add_note("in sample 17")
    assert "boom in sample 17: " in explain(error)[0]


def test_errors_of_real_libraries_are_recognized(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"x": np.zeros(3)}, file)
    with pytest.raises(Exception, match="weights_only") as unsafe:
        torch.load(file, weights_only=True)
    line, code = explain(unsafe.value)
    assert "the file is damaged, or was written by other code" in line
    assert code == 2


def test_the_projects_own_errors_are_known() -> None:
    names = [
        name for name, found in vars(rayprune.errors).items() if inspect.isclass(found) and name != "RaypruneError"
    ]
    assert {"ConfigError", "TrainingFailed", "ScoringError"} <= set(names)
    for name in names:
        line, code = explain(getattr(rayprune.errors, name)("text: what to do about it"))
        check(line, code)
        assert (code == 2) == issubclass(
            getattr(rayprune.errors, name), ConfigError | DataError | RunFolderError | rayprune.errors.ClusterError
        )
