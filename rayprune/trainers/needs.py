"""Libraries that only one of the trainers needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say which extra to install where an import inside the `with` fails for want of a package.

    Raises:
        ImportError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rayprune"):
            raise
        raise ImportError(
            f"rayprune.{extra} needs the package {error.name}: pip install 'rayprune[{extra}]'"
        ) from error
