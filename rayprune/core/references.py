"""Load a user's object by a `module:name` or `path/to/file.py:name` reference, and take its code to other machines."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rayprune.errors import ConfigError, RaypruneError, one_line

# Prefix of modules loaded from a file; other processes cannot import them by name.
_USER_MODULE_PREFIX = "rayprune_user_"
# Before a folder on sys.path, where Python ignores it: the driver's current folder, for `module:name` in workers.
DRIVER_FOLDER = "rayprune-driver-folder:"
_REFERENCE = re.compile(r"(?P<source>(?s:.+)\.py|[^\W\d]\w*(?:\.[^\W\d]\w*)*):[^\W\d]\w*")
# Files of exit() and of the sys.exit that W&B puts in place of Python's.
_EXITS = ("_sitebuiltins>", "_sitebuiltins.py", "wandb/sdk/lib/exit_hooks.py")
# Names of modules of the current folder, which other processes do not have on their path.
_from_current_folder: set[str] = set()


def closest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for the end of an error message: the closest match and all valid names.

    >>> closest("infobach", ["full", "infobatch"])
    "did you mean 'infobatch'? (valid: full, infobatch)"
    >>> closest("x", ["full", "infobatch"]), closest("x", [])
    ('choose one of full, infobatch', 'there is none, leave it out')
    """
    names = sorted(valid)
    if match := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {match[0]!r}? (valid: {', '.join(names)})"
    return f"choose one of {', '.join(names)}" if names else "there is none, leave it out"


def is_reference(name: str) -> bool:
    """Return whether a name is a `module:name` reference rather than a registered name.

    >>> is_reference("my_package.losses:Mine"), is_reference("infobatch")
    (True, False)
    """
    return ":" in name


def names_code(text: Any) -> bool:
    """Return whether `load_object` would run code for a value: the one form of references that it takes.

    >>> names_code("my_package.losses:Mine"), names_code("nets/mine.py:Net"), names_code("s3://bucket/a")
    (True, True, False)
    """
    return isinstance(text, str) and _REFERENCE.fullmatch(text) is not None


def load_object(reference: str) -> Any:
    """Import the object that `module:name` or `path/to/file.py:name` refers to.

    Raises:
        ConfigError: the reference has another form, or the module, file or attribute does not exist.
    """
    if not names_code(reference):
        raise ConfigError(f"{reference!r} is not a reference: write 'module:name' or 'path/to/file.py:name'")
    source, _, attribute = reference.rpartition(":")
    with refusing_exit():
        module = _load_file(source) if source.endswith(".py") else _load_module(source)
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(f"{source!r} has no {attribute!r}: {closest(attribute, public)}") from None


def call_object(what: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a user's function.

    Args:
        what: the setting and the reference, for messages.
        function: the object that `load_object` returned.
        **arguments: passed on.

    Raises:
        ConfigError: the function raised an error other than one of rayprune's; names its type, text and line.
    """
    try:
        with refusing_exit():
            return function(**arguments)
    except RaypruneError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = one_line(error).removeprefix(f"{type(error).__name__}: ")
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno}): correct "
            "the function"
        ) from error


@contextlib.contextmanager
def refusing_exit() -> Iterator[None]:
    """Let a user's code in the block not end the process, which would look as if all was done.

    Raises:
        ConfigError: the code has raised SystemExit; names its line.
    """
    try:
        yield
    except SystemExit as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        frame = next(frame for frame in frames if not frame.filename.endswith(_EXITS))
        raise ConfigError(
            f"{Path(frame.filename).name}, line {frame.lineno}, raised SystemExit({error.code!r}), which would end the "
            "command before its work is done: remove the call of exit()"
        ) from error


def _load_module(name: str) -> Any:
    before = set(sys.modules)
    try:
        with _current_folder_last() as folder:
            module = importlib.import_module(name)
        if folder is not None:
            _from_current_folder.update(new for new in set(sys.modules) - before if _is_only_in(folder, new))
        return module
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"module {name!r} was not found: install it or put its folder on PYTHONPATH, on every machine"
            ) from None
        raise


@contextlib.contextmanager
def _current_folder_last() -> Iterator[Path | None]:
    """Put the current folder, in a worker the driver's, last on sys.path, so that no file in it hides a library.

    Yields:
        The folder; None if it is on the path anyway.
    """
    marked = (entry.removeprefix(DRIVER_FOLDER) for entry in sys.path if entry.startswith(DRIVER_FOLDER))
    folder = next(marked, None) or str(Path.cwd())
    if "" in sys.path or folder in sys.path:
        yield None
        return
    sys.path.append(folder)
    try:
        yield Path(folder)
    finally:
        sys.path.remove(folder)


def _is_only_in(folder: Path, module: str) -> bool:
    """Return whether a loaded module is of this folder, and cannot be found without it."""
    package = module.partition(".")[0]
    loaded = sys.modules.get(package)
    places = [*getattr(loaded, "__path__", ()), getattr(loaded, "__file__", None) or ""]
    if not any(Path(place).parent == folder for place in places):
        return False
    return all(finder.find_spec(package, None) is None for finder in sys.meta_path)


def user_modules() -> list[Any]:
    """Return the loaded modules that other processes cannot import by name: of files, and of the current folder."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(_USER_MODULE_PREFIX) or name in _from_current_folder
    ]


def _load_file(path: str) -> Any:
    file = Path(path).absolute()  # unresolved: the links of this machine may be missing on others
    # One module per file and process, so that pickled instances find the same class again.
    name = f"{_USER_MODULE_PREFIX}{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)  # its code has come from another process
    if spec is None:
        if not file.is_file():
            raise ConfigError(f"file {path!r} does not exist: correct its path")
        spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def absolute_reference(reference: Any) -> Any:
    """Make the path in `path/to/file.py:name` absolute; return any other value unchanged.

    Workers and actors run in other folders.

    >>> absolute_reference("package.module:name")
    'package.module:name'
    """
    if not isinstance(reference, str):
        return reference
    file, colon, name = reference.rpartition(":")
    return f"{Path(file).expanduser().absolute()}{colon}{name}" if file.endswith(".py") else reference


class _Code(NamedTuple):
    file: str
    source: str
    is_package: bool


class UserCode:
    """Carries the user's code to other machines, which do not have the files of the command's folder.

    Where an instance is unpickled, the `user_modules` that were loaded when it was pickled can be imported from then
    on, and so can those that had come to its process in the same way. Modules without source text are left out.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        loaded = {module.__name__: code for module in user_modules() if (code := _code_of(module))}
        return _receive, (_received.modules | loaded,)


def _code_of(module: ModuleType) -> _Code | None:
    loader: Any = module.__spec__.loader if module.__spec__ is not None else None
    try:
        source = loader.get_source(module.__name__)
    except (AttributeError, ImportError, OSError):
        return None
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):  # a namespace package, of folders alone
        return _Code(module.__name__, "", is_package=True)
    return _Code(file, source, hasattr(module, "__path__")) if source is not None and file is not None else None


def _receive(modules: dict[str, _Code]) -> UserCode:
    """Make modules importable in this process, before the files of this machine; those already loaded stay."""
    _received.modules.update(modules)
    if _received not in sys.meta_path:
        sys.meta_path.insert(0, _received)
    _from_current_folder.update(modules)
    return UserCode()


class _Received(MetaPathFinder, ExecutionLoader):
    """Finds and loads the modules that came with a UserCode."""

    def __init__(self) -> None:
        self.modules: dict[str, _Code] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in self.modules else None

    def get_filename(self, fullname: str) -> str:
        return self.modules[fullname].file

    def get_source(self, fullname: str) -> str:
        return self.modules[fullname].source

    def is_package(self, fullname: str) -> bool:
        return self.modules[fullname].is_package


_received = _Received()
