"""A folder of someone else's: modules with the names of libraries, each of which leaves a mark when it is imported."""

from __future__ import annotations

from pathlib import Path

_LIBRARIES = ["click", "jinja2", "json", "logging", "matplotlib", "numpy", "pandas", "PIL", "psutil", "pyarrow"]
_LIBRARIES += [
    "pydantic",
    "ray",
    "rich",
    "scipy",
    "secrets",
    "selectors",
    "signal",
    "sklearn",
    "socket",
    "torch",
    "yaml",
]
_MARK = """
import pathlib
pathlib.Path({mark!r}).touch()
raise ImportError("a module of the current folder hides {name}")
"""
# The project's own code in the same folder: a source of a class of its own, and a module that it imports.
_SOURCE = """
from own_model import digits
from rayprune.sources import SampleSource, Splits

class Own(SampleSource):
    def __init__(self, source):
        self.source = source
    def __len__(self):
        return len(self.source)
    schema = property(lambda self: self.source.schema)
    fingerprint = property(lambda self: self.source.fingerprint)
    labels = property(lambda self: self.source.labels)
    def take(self, ids):
        return self.source.take(ids)

def own():
    splits = digits()
    return Splits(Own(splits.train), splits.validation)
"""
_MODEL = """
from rayprune.nn.models import build_model
from rayprune.sources import open_data

def digits():
    return open_data("digits", limit=128)

def net(*, num_classes, input_shape):
    return build_model("mlp", num_classes=num_classes, input_shape=input_shape, hidden=[8])
"""
_CONFIG = "data: {source: 'own_source:own'}\nmodel: {name: 'own_model:net'}\ntrain: {epochs: 1, batch_size: 64}\n"


_METHOD = """
from pathlib import Path
from rayprune.methods.infobatch import InfoBatch
Path(__file__).with_name("executed").touch()
class Mine(InfoBatch):
    pass
"""


def code_with_a_mark(folder: Path, name: str = "evil") -> str:
    """Write code that leaves `executed` in its folder; return a reference to it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(_METHOD)
    return f"{folder}/{name}.py:Mine"


def make_foreign(folder: Path) -> None:
    """Write the modules."""
    for name in _LIBRARIES:
        (folder / f"{name}.py").write_text(_MARK.format(mark=str(folder / f"imported-{name}"), name=name))


def write_own(folder: Path) -> Path:
    """Write a config that names modules of the folder; return it."""
    for name, text in (("own_source.py", _SOURCE), ("own_model.py", _MODEL), ("own.yaml", _CONFIG)):
        (folder / name).write_text(text)
    return folder / "own.yaml"


def imported(folder: Path) -> list[str]:
    """Return the names of the foreign modules that were imported."""
    return sorted(mark.name.removeprefix("imported-") for mark in folder.glob("imported-*"))
