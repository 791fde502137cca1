"""Settings without secrets: what a run writes to files and trackers, and compares with what it has written.

Secrets are the user and password of a URL, the values of its query (signed URLs), and the values of keys such as
`password` or `api_key`. A run is the same with another token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rayprune.errors import REDACTED, ConfigError, redacted_url

_SECRET_KEY = re.compile(
    r"(?i)(\w+_)?(secret|password|passwd|passphrase|credentials?|api_?key|(secret_?)?access_?key|(account|private|secret)_?key)"
    r"|((\w+_)?(access|auth|api|session|security|sas|bearer|refresh|hf|hub|id)_)?token"
)
# How an error of a missing secret ends.
_CURE = "or take credentials from the environment or the file system's own configuration"


def redacted_tree(value: Any, key: str = "") -> Any:
    """Return settings with *** in place of each secret; their structure stays.

    Args:
        value: a mapping, a list, or a value of plain types.
        key: the last part of its dotted key.

    >>> redacted_tree({"path": "s3://key:secret@bucket/a?region=eu&token=x", "options": {"api_key": "x"}, "lr": 0.1})
    {'path': 's3://***@bucket/a?region=eu&token=***', 'options': {'api_key': '***'}, 'lr': 0.1}
    """
    if isinstance(value, Mapping):
        is_secret = _SECRET_KEY.fullmatch(key) is not None
        return {name: redacted_tree(inner, key if is_secret else _last(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(inner, key) for inner in value]
    if value and not isinstance(value, bool) and _SECRET_KEY.fullmatch(key):
        return REDACTED
    return redacted_url(value) if isinstance(value, str) else value


def secrets_of(tree: Any) -> dict[str, Any]:
    """Return what `with_secrets` needs to undo `redacted_tree`: dotted key, and redacted URL → the value."""
    hidden = dict(leaves(redacted_tree(tree)))
    found = {key: value for key, value in leaves(tree) if value != hidden[key]}
    return found | {hidden[key]: value for key, value in found.items() if hidden[key] != REDACTED}


def with_secrets(tree: Any, secrets: Mapping[str, Any], key: str = "") -> Any:
    """Return redacted settings with the secrets of `secrets_of`; those at another key, too, if they are URLs."""
    if isinstance(tree, Mapping):
        return {
            name: with_secrets(value, secrets, f"{key}.{name}" if key else str(name)) for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [with_secrets(value, secrets, f"{key}[{number}]") for number, value in enumerate(tree)]
    if not _is_redacted(tree):
        return tree
    known = secrets.get(key)
    return known if known is not None and redacted_tree(known, _last(key)) == tree else secrets.get(tree, tree)


def check_secrets(tree: Mapping[str, Any], file: str) -> None:
    """Refuse to use settings whose secrets were left out when they were written.

    Raises:
        ConfigError: one line that names the file, the keys and the cure.
    """
    if missing := [key for key, value in leaves(tree) if _is_redacted(value)]:
        keys = " ".join(f"{key}=…" for key in missing)
        raise ConfigError(f"{file} does not hold the secret of {', '.join(missing)}: name it again, {keys}, {_CURE}")


def _last(key: Any) -> str:
    return str(key).rpartition(".")[2]


def _is_redacted(value: Any) -> bool:
    return isinstance(value, str) and (value == REDACTED or ("://" in value and REDACTED in value))


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key, with the numbers of list items, and the value of each leaf of settings.

    >>> list(leaves({"compare": {"methods": ["full", {"name": "tdds"}]}}))
    [('compare.methods[0]', 'full'), ('compare.methods[1].name', 'tdds')]
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{key}[{number}]")
    else:
        yield key, value
