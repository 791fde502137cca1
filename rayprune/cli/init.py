"""The command `rayprune init`: copy a shipped config into the current folder, or list the shipped configs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from rayprune.cli.console import aligned, debug_option, say
from rayprune.errors import ConfigError


@click.command()
@click.argument("name", required=False)
@click.argument("path", required=False)
@debug_option
def init(name: str | None, path: str | None) -> None:
    """Write the shipped config NAME to PATH, by default NAME.yaml in the current folder; without NAME, list them all.

    PATH is a .yaml file or a folder. A file that exists is not overwritten.
    """
    from rayprune.config.shipped import config_hint, find_shipped, shipped_configs

    shipped = None if name is None else find_shipped(name)
    if shipped is None:
        for line in aligned([(key, _first_line(file)) for key, file in shipped_configs().items()], words=(0, 1)):
            say(line)
        if name is not None:
            raise ConfigError(f"no shipped config is named {name!r}: {config_hint(name)}")
        say("\nrayprune init NAME copies one to NAME.yaml; rayprune train NAME runs it as it is.")
        return
    text, name = shipped.read_text(encoding="utf-8"), shipped.stem
    file = Path(path or ".").expanduser()
    if file.suffix not in {".yaml", ".yml"}:
        file = file / f"{name}.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{file.parent} can't be made ({error.strerror}): name a .yaml file or a folder") from None
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists: delete it, or name another place: rayprune init {name} PATH") from None
    except OSError as error:
        raise ConfigError(f"{file} can't be written ({error.strerror}): name a .yaml file or a folder") from None
    say(f"wrote {file}")
    say(f"next: {_usage(text, name).replace(name, shlex.quote(str(file)), 1)}")


def _first_line(file: Path) -> str:
    """Return what a config is for, the first line of its comment."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _usage(text: str, name: str) -> str:
    """Return the command in a config's comment, `rayprune train NAME …`."""
    found = re.search(rf"^#   (rayprune \w+ {name}\b.*?)(?: &&|$)", text, flags=re.MULTILINE)
    assert found is not None, name
    return found[1]
