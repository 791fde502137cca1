"""The folder of a sweep, comparison or audit: create it or check that it belongs to the same one, and lock it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rayprune.config import Config
from rayprune.engine.storage.lock import lock_folder
from rayprune.engine.storage.run_folder import write_whole
from rayprune.engine.storage.stored_config import read_like
from rayprune.errors import RunFolderError, one_line

# File that holds the config → kind of the folder.
KINDS = {"config.yaml": "run", "sweep.yaml": "sweep", "compare.yaml": "comparison", "audit.yaml": "audit"}


@dataclass(frozen=True)
class ExperimentFolder:
    """A folder for many runs.

    Attributes:
        path: path of the folder.
        stored: name of the file with the config, a key of KINDS.
        digest: returns a short hash of the settings that must not change when the experiment continues.
    """

    path: Path
    stored: str
    digest: Callable[[Config], str]

    def check(self, config: Config) -> None:
        """Check that the folder is empty or of the same experiment, without changing it.

        Raises:
            RunFolderError: it holds something else.
        """
        own = KINDS[self.stored]
        for file, kind in KINDS.items():
            if file != self.stored and (self.path / file).exists():
                raise RunFolderError(f"{self.path} holds {_one(kind)}, not {_one(own)}: choose another run.name")
        if not (self.path / self.stored).exists():
            return
        stored, now = read_like(self.path / self.stored, config), self.digest(config)
        before = None if stored is None else self.digest(stored)
        if before != now:
            other = "of other code" if before is None else f"config digest {before}, not {now}"
            raise RunFolderError(f"{self.path} holds another {own} ({other}): choose another run.name, or leave it out")

    def is_current(self, config: Config, results: str) -> bool:
        """Return whether the newest start had the same settings and has written this file of results."""
        stored, written = self.path / self.stored, self.path / results
        if not stored.exists() or not written.exists() or written.stat().st_mtime_ns < stored.stat().st_mtime_ns:
            return False
        before = read_like(stored, config)
        return before is not None and before.shown("run", "scaling") == config.shown("run", "scaling")

    @contextlib.contextmanager
    def open(self, config: Config) -> Iterator[None]:
        """Create or check the folder, write its config, and lock it until the block ends.

        Raises:
            RunFolderError: the folder holds something else, is in use, or can't be written.
        """
        self.check(config)
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(self.path))
                write_whole(self.path / self.stored, config.to_yaml(), private=True)
            except OSError as error:
                raise RunFolderError(
                    f"folder {self.path} can't be written ({error.strerror or one_line(error)}): set run.storage_path"
                ) from None
            yield


def _one(kind: str) -> str:
    return f"an {kind}" if kind.startswith("a") else f"a {kind}"
