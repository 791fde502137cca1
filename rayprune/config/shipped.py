"""The configs that come with rayprune, by name: the files of `configs/`, which the wheel carries in the package.

`configs/recipes/` holds published settings. A recipe is named like any other config, with or without its subfolder.
"""

from __future__ import annotations

import difflib
from pathlib import Path

# In a checkout, a link to the folder at its root.
_FOLDER = Path(__file__).parents[1] / "configs"
_SUBFOLDERS = ("", "recipes")  # configs/cluster holds other files


def shipped_configs() -> dict[str, Path]:
    """Return name → file of every shipped config: the examples sorted by name, then the recipes."""
    return {file.stem: file for folder in _SUBFOLDERS for file in sorted((_FOLDER / folder).glob("*.yaml"))}


def find_shipped(name: str) -> Path | None:
    """Return the shipped config of a name, with or without its subfolder: cifar10_dynams or recipes/cifar10_dynams."""
    for stem, file in shipped_configs().items():
        if name in (stem, file.relative_to(_FOLDER).with_suffix("").as_posix()):
            return file
    return None


def find_config(path: str | Path) -> Path:
    """Return the file that a command's CONFIG means; it exists if any does.

    The user's files come first: `digits_full` is ./digits_full, or ./digits_full.yaml, or the shipped digits_full.
    """
    file = Path(path)
    candidates = [file] if file.suffix in {".yaml", ".yml"} else [file, Path(f"{path}.yaml")]
    found = next((own for own in candidates if own.is_file()), None)
    return found or find_shipped(str(path)) or file


def config_hint(path: str | Path) -> str:
    """Return the cure for a CONFIG that does not exist, for the end of an error message."""
    name = Path(path).stem
    if name in shipped_configs():
        return f"the shipped config is named {name!r}, without folder and suffix; rayprune init {name} copies it here"
    match = difflib.get_close_matches(name, shipped_configs(), n=1)
    return (f"did you mean {match[0]!r}? " if match else "") + "rayprune init lists the shipped configs"
