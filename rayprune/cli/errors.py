"""The gate for every error that leaves the command line: one line that names what failed and the cure, and a code.

A library's exceptions are recognized by their module and name, so that the library need not be imported.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayprune.cli.output import printable
from rayprune.errors import ClusterError, ConfigError, DataError, RaypruneError, RunFolderError, one_line

USER, OTHER, INTERRUPTED = 2, 1, 130
_CREDENTIALS = re.compile(r"(\w://)[^\s/@'\"]+@")  # of an address
_LONGEST = 600  # characters of an error's own text
_MISTAKE = (ConfigError, DataError, RunFolderError, ClusterError)  # with the cure in their message
# The text of one from a worker, or of a TrainingStopped.
_COMPLETE = re.compile(rf": ({'|'.join(kind.__name__ for kind in _MISTAKE)}): |: training stopped: ")

# Optional dependencies: module → extra of rayprune.
_EXTRAS = {name: name for name in ("cleanlab", "accelerate", "lightning", "trl", "optuna", "mlflow", "wandb")} | {
    "datasets": "huggingface",
    "transformers": "huggingface",
}


class CommandFailed(RaypruneError):
    """A command has done its work and found something wrong; the message has the cure."""


@dataclass(frozen=True)
class Cure:
    """What a person can do about an error, and the exit code that goes with it."""

    text: str
    code: int = USER


_MEMORY = Cure(
    "there is not enough memory: lower train.batch_size or data.limit, use fewer workers or threads, or raise the "
    "limit (ulimit -v, the job's or the container's)"
)
_GPU_MEMORY = Cure("the GPU's memory is full: lower train.batch_size, or end other programs on the GPU (nvidia-smi)")
_SPACE = Cure("free space there, or choose another place: run.storage_path, --output, or TMPDIR for temporary files")
_HANDLES = Cure("raise the limit of open files, ulimit -n 4096, or use fewer workers")
_NETWORK = Cure("check the address and the network, then run the same command again", OTHER)
_DAMAGED_DATA = Cure("the file is damaged or has another format: restore it, or leave it out of the data")
_DAMAGED_STATE = Cure(
    "the file is damaged, or was written by other code: restore it, or delete it and run the same command again"
)
_TEXT = Cure("the file is not valid: correct it, or write it again")
_PATH = Cure("correct the path")
_ACCESS = Cure("give this user access to it, or choose another place")
_DISK = Cure("the disk, or the network file system, has failed: check it, then run the same command again", OTHER)
_RAY = Cure("run the same command again, which continues; --debug shows Ray's own logs", OTHER)
_RAY_PLACE = Cure("use fewer workers or CPUs (scaling.num_workers, scaling.cpus_per_worker), or a larger cluster")
_RAY_MEMORY = Cure("lower train.batch_size or the number of workers, or use machines with more memory")
_DATABASE = Cure("end other programs that use the database file, or delete it: it is written again")
_DATA_VALUES = Cure("a file of the data has values that do not fit: correct it, or leave it out of the data")
_STORAGE = Cure("check its address and your credentials for it, then run the same command again")
_GLOO = Cure(
    "the workers can't reach each other: open the network between the machines, and set GLOO_SOCKET_IFNAME on each one "
    "to its interface there",
    OTHER,
)
_PACKAGE = Cure("install it in this environment with pip")
_TRACKER = Cure("check the tracker's server and login, or leave it out of run.trackers")
_NESTED = Cure("a config, file or model is nested too deeply: make it flatter")
_PROCESS = Cure("run the same command again; --debug shows where it failed", OTHER)
_REPORT = Cure(
    "this is unexpected; --debug shows where it happened: if that is not in your own code, please report it", OTHER
)

_ERRNO: dict[int, Cure] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _HANDLES),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ACCESS),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EILSEQ), _PATH),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), Cure("move it away, or choose another place")),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EUCLEAN), _DISK),
    errno.ENAMETOOLONG: Cure("choose a shorter path or name"),
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _MEMORY,  # of a thread or process that can't start
    errno.ENOEXEC: Cure("it is not a program of this machine: install it again"),
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), Cure("end the program that uses it")),
    **dict.fromkeys((errno.EADDRINUSE, errno.EADDRNOTAVAIL), Cure("end the program that uses the port, ss -ltnp")),
    **{
        getattr(errno, name): _NETWORK
        for name in errno.errorcode.values()
        if name.startswith(("ECONN", "EHOST", "ENET")) or name in {"EPIPE", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN"}
    },
}
_RESOURCES = {_SPACE, _HANDLES, _MEMORY, _DISK}  # what can lie below any error

# By a part of the text, for libraries that raise a RuntimeError or a ValueError for everything.
_PHRASES: tuple[tuple[str, Cure], ...] = (
    (r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED", _GPU_MEMORY),
    (r"connectFullMesh", _GLOO),
    (r"CUDA error|CUDNN_STATUS|NCCL", Cure("check the GPU and its driver with nvidia-smi", OTHER)),
    (r"No space left on device|Disk quota exceeded|unexpected pos \d+|file write failed|No usable temporary", _SPACE),
    (r"Too many open files", _HANDLES),
    (r"allocate memory|not enough memory|bad_alloc|Unable to allocate|malloc of size|out of memory", _MEMORY),
    (r"failed to map segment|returned NULL without setting an exception", _MEMORY),  # of modules that don't fit
    (r"can't start new thread|Resource temporarily unavailable|pthread_create", _MEMORY),
    (r"Read-only file system|Permission denied", _ACCESS),
    (r"Input/output error|Stale file handle|Bus error", _DISK),
    (r"maximum recursion depth", _NESTED),
    (r"embedded null|null character", Cure("remove the character \\0 from the path or name")),
    (r"[Cc]orrupt|[Dd]ecompress|Truncated|truncated|Parquet magic|CRC|Unexpected end of (stream|file)", _DAMAGED_DATA),
    (r"Weights only load failed|PytorchStreamReader|invalid header or archive|unpickl", _DAMAGED_STATE),
    (r"loading state_dict|size mismatch for", _DAMAGED_STATE),
    (r"Cannot load file containing pickled data|allow_pickle", _DAMAGED_STATE),
    (r"Address already in use", Cure("end the program that uses the port, ss -ltnp")),
    (r"AWS Error|curlCode", _STORAGE),
    (r"DataLoader worker .* (exited|is killed)", _MEMORY),
    (r"Failed to connect to GCS|raylet|GCS|has ended, perhaps for lack of memory$", _RAY),
)

# By `module.name`, or by a module's beginning, of the exception's class or one of its bases; the nearest class wins.
_NAMES: dict[str, Cure] = {
    "builtins.MemoryError": _MEMORY,
    "builtins.RecursionError": _NESTED,
    "builtins.UnicodeError": Cure("the text is not valid UTF-8: save the file as UTF-8, or rename it"),
    "builtins.ImportError": _PACKAGE,
    "builtins.FileNotFoundError": _PATH,
    "builtins.PermissionError": _ACCESS,
    "builtins.TimeoutError": _NETWORK,
    "builtins.ConnectionError": _NETWORK,
    "builtins.EOFError": _DAMAGED_DATA,
    "builtins.SyntaxError": Cure("correct this line of the Python file"),
    "torch.OutOfMemoryError": _GPU_MEMORY,
    "torch.AcceleratorError": Cure("check the GPU and its driver with nvidia-smi", OTHER),
    "torch.distributed": Cure("check the network between the workers, then run the same command again", OTHER),
    "ray.exceptions.OutOfMemoryError": _RAY_MEMORY,
    "ray.exceptions.ObjectStoreFullError": _RAY_MEMORY,
    "ray.exceptions.OutOfDiskError": _SPACE,
    "ray.exceptions.AuthenticationError": Cure("set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on the cluster"),
    "ray.exceptions.RuntimeEnvSetupError": Cure("correct the job's runtime_env"),
    "ray.exceptions.TaskUnschedulableError": _RAY_PLACE,
    "ray.exceptions.ActorUnschedulableError": _RAY_PLACE,
    "ray": _RAY,
    "grpc": _RAY,
    "pyarrow.lib.ArrowMemoryError": _MEMORY,
    "pyarrow": _DAMAGED_DATA,
    "PIL": _DAMAGED_DATA,
    "zipfile": _DAMAGED_DATA,
    "tarfile": _DAMAGED_DATA,
    "gzip": _DAMAGED_DATA,
    "zlib": _DAMAGED_DATA,
    "_lzma": _DAMAGED_DATA,
    "lzma": _DAMAGED_DATA,
    "struct": _DAMAGED_DATA,
    "binascii": _DAMAGED_DATA,
    "_pickle": _DAMAGED_STATE,
    "pickle": _DAMAGED_STATE,
    "yaml": _TEXT,
    "json": _TEXT,
    "csv": _TEXT,
    "_csv": _TEXT,
    "tomllib": _TEXT,
    "configparser": _TEXT,
    "xml": _TEXT,
    "pydantic": Cure("correct this setting; rayprune schema lists them all"),
    "pydantic_core": Cure("correct this setting; rayprune schema lists them all"),
    "pandas": _DATA_VALUES,
    "numpy": _DATA_VALUES,
    "datasets": _DATA_VALUES,
    "sqlite3": _DATABASE,
    "sqlalchemy": _DATABASE,
    "optuna": Cure("correct sweep.search, or choose another run.name for a new study"),
    "mlflow": _TRACKER,
    "wandb": _TRACKER,
    **dict.fromkeys(("requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "ssl", "socket"), _NETWORK),
    **dict.fromkeys(("fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "boto3", "google", "azure"), _STORAGE),
    "huggingface_hub": _STORAGE,
    **dict.fromkeys(("subprocess", "concurrent", "multiprocessing", "asyncio", "psutil"), _PROCESS),
    "builtins.OSError": Cure("check this file or device, then run the same command again", OTHER),
}


def explain(error: BaseException) -> tuple[str, int]:
    """Return an error as one line with its cure, and the exit code: 2 what a person can mend, 130 Ctrl-C, 1 all others.

    >>> explain(FileNotFoundError(2, "No such file or directory", "a.npy"))
    ('a.npy: No such file or directory: correct the path', 2)
    """
    if isinstance(error, KeyboardInterrupt):
        return _text(error) if str(error) else "stopped", INTERRUPTED
    if isinstance(error, SystemExit):
        return (
            f"SystemExit({error.code!r}) ended the command: remove the call of exit() from your model, data or other "
            "code that the config names",
            OTHER,
        )
    if _has(error, "click"):
        return _of_click(error)
    if isinstance(error, RaypruneError):
        return _of_rayprune(error)
    cure = _cure_of(error) or _REPORT
    return f"{_text(error)}: {cure.text}", cure.code


def _of_rayprune(error: RaypruneError) -> tuple[str, int]:
    """Return an error that the project raises: its message has the cure, unless it ended training unexpectedly."""
    text = _text(error)
    if isinstance(error, _MISTAKE):
        return text, USER
    if type(error).__name__ in {"TrainingStopped", "TrainingPaused", "UsageError", "CommandFailed"}:
        return text, OTHER
    # Of workers, only the text of their error may be left.
    causes = [cause for cause in _chain(error) if cause is not error]
    cure = next((found for cause in causes if (found := _cure_of(cause)) is not None), None) or _by_phrase(text)
    if cure is None and (_COMPLETE.search(text) or any(isinstance(cause, _MISTAKE) for cause in causes)):
        return text, OTHER
    return f"{text}: {(cure or _REPORT).text}", OTHER


def _of_click(error: BaseException) -> tuple[str, int]:
    try:
        text = _get(error, "format_message")()
    except Exception:  # it has none, or was not initialized
        text = _raw(error)
    code, context = _get(error, "exit_code"), _get(error, "ctx")
    command = "rayprune" if context is None else context.command_path
    text = _shortened(text).rstrip(".") or type(error).__name__
    return f"{text}: {command} --help shows what is possible", code or OTHER


def _cure_of(error: BaseException) -> Cure | None:
    """Return the cure of an error, of what caused it, or of the lack of a resource below it."""
    causes = list(_chain(error))
    # Ray's errors around another one say where it happened, not what to do.
    causes = [cause for cause in causes if not _has(cause, "ray")] or causes
    for find in (_by_number, lambda cause: _by_phrase(_raw(cause)), _by_name):
        if (cure := next(filter(None, map(find, causes)), None)) is not None:
            return cure
    while (below := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        cure, error = _by_number(below), below
        if cure in _RESOURCES:
            return cure
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, also where Ray keeps causes."""
    seen: set[int] = set()
    left: list[object] = [error]
    while left:
        found = left.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        left += [found.__cause__, _get(found, "cause"), _get(found, "controller_failure")]
        left += _get(found, "exceptions") or ()  # of a group
        failures = _get(found, "worker_failures")  # rank → error
        left += failures.values() if isinstance(failures, dict) else ()


def _get(error: BaseException, name: str) -> Any:
    try:
        return getattr(error, name, None)
    except Exception:  # a property may fail
        return None


def _by_number(error: BaseException) -> Cure | None:
    number = _get(error, "errno") if isinstance(error, OSError) else None
    return _ERRNO.get(number) if isinstance(number, int) else None


def _by_phrase(text: str) -> Cure | None:
    return next((cure for phrase, cure in _PHRASES if re.search(phrase, text)), None)


def _by_name(error: BaseException) -> Cure | None:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        name = f"'rayprune[{_EXTRAS[package]}]'" if package in _EXTRAS else package
        return Cure(f"pip install {name}, or put its folder on PYTHONPATH")
    for cls in type(error).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        while name:
            if name in _NAMES:
                return _NAMES[name]
            name = name.rpartition(".")[0]
    return None


def _has(error: BaseException, package: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(error).__mro__)


def _text(error: BaseException) -> str:
    """Return what an error says, with the file it names, its type if that says more, and its notes."""
    text = _raw(error)
    if isinstance(error, OSError) and error.strerror and type(error).__module__ == "builtins":
        # Not `str(error)`, which begins with a number.
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        text = str(error.strerror) if name is None else f"{name}: {error.strerror}"
    elif not isinstance(error, RaypruneError | OSError) and type(error).__name__ not in text:
        text = f"{type(error).__name__}: {text}"
    notes = [str(note) for note in _get(error, "__notes__") or ()]
    return _shortened(" ".join([text, *notes]))


def _raw(error: BaseException) -> str:
    try:
        if _has(error, "ray"):  # a traceback, which ends with the message
            return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        return one_line(error)
    except Exception:  # its __str__ needs what its __init__ would have set
        return type(error).__name__


def _shortened(text: str) -> str:
    text = printable(" ".join(_CREDENTIALS.sub(r"\1", text).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
