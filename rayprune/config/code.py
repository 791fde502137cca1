"""The code that a stored config names, and whether it may run.

A reference anywhere in a config, `module:name` or `path/to/file.py:name`, runs code. In a config that the user names,
the code is the user's. A run folder may come from anyone: the code that its config names runs if the same command names
it and its file has not changed since the run was started, or if the user trusts it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rayprune.core.redaction import leaves
from rayprune.core.references import names_code
from rayprune.errors import ConfigError

# True, or the digest of the code that the user has read.
Trust = bool | str
_HEX_DIGITS = 32  # half of SHA-256: nobody finds other code with the digest of given code


def code_references(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted key → reference of all code that a config names.

    >>> code_references({"model": {"name": "nets.py:Net"}, "compare": {"methods": ["full", {"name": "mine:Best"}]}})
    {'model.name': 'nets.py:Net', 'compare.methods[1].name': 'mine:Best'}
    """
    texts = ((key, value) for key, value in leaves(tree) if isinstance(value, str))
    return {key: text for key, text in texts if names_code(text) and not text.startswith("torchvision:")}


def file_digests(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return reference → digest of its file, for all files of code that a config names; for environment.json."""
    references = sorted(set(code_references(tree).values()))
    return {reference: digest for reference in references if (digest := _file_digest(reference)) is not None}


def _file_digest(reference: str) -> str | None:
    """Return the digest of a reference's file; None for a module, or a file that can't be read."""
    source, _, _ = reference.rpartition(":")
    try:
        return _digest(Path(source).read_bytes()) if source.endswith(".py") else None
    except (OSError, ValueError):
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_HEX_DIGITS]


def code_digest(references: Mapping[str, str]) -> str:
    """Return a digest of dotted keys, references and the content of their files; of a module, only its name counts."""
    content = {key: [reference, _file_digest(reference)] for key, reference in references.items()}
    return _digest(json.dumps(content, sort_keys=True).encode())


def check_code(
    tree: Mapping[str, Any],
    file: Path,
    *,
    named: Collection[str] = (),
    recorded: Mapping[str, Any] | None = None,
    trust: Trust = False,
) -> None:
    """Refuse a stored config that names code which the user neither names nor trusts.

    Args:
        tree: the config.
        file: where it is stored, for the message.
        named: the references that the user named in the same command.
        recorded: reference → digest of its file when the run was started.
        trust: run all code, or the code of this digest.

    Raises:
        ConfigError: one line that names the file, keys, code, digest and cure.
    """
    digests = {_tail(reference): digest for reference, digest in (recorded or {}).items()}
    unnamed = {
        key: reference
        for key, reference in code_references(tree).items()
        if reference not in named or _file_digest(reference) != digests.get(_tail(reference))
    }
    if not unnamed or trust is True:
        return
    digest = code_digest(unnamed)
    if trust == digest:
        return
    code = ", ".join(f"{key} = {reference}" for key, reference in unnamed.items())
    other = f", not {trust}" if trust else ""
    raise ConfigError(f"{file} names code, {code} (digest {digest}{other}): read it, then add --trust")


def with_named_code(tree: Any, named: Collection[str]) -> Any:
    """Return a stored config with the user's references in place of those that differ only in the folder of a file.

    A run continues where its code has been moved; the code at the place that the run folder names never runs.
    """
    if isinstance(tree, Mapping):
        return {key: with_named_code(value, named) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [with_named_code(value, named) for value in tree]
    if not names_code(tree) or tree in named:
        return tree
    return next((reference for reference in named if _tail(reference) == _tail(tree)), tree)


def _tail(reference: str) -> str:
    """Return a reference without the folder of its file."""
    return Path(reference).name if ".py:" in reference else reference
