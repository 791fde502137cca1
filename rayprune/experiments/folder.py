"""The folder of a sweep or a comparison: created, or checked to be of the same one, and locked while it is in use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rayprune.config import Config
from rayprune.engine.storage.resume import lock_folder
from rayprune.engine.storage.run_folder import read_config, write_whole
from rayprune.errors import RunFolderError

# The file that holds the config → what its folder is.
KINDS = {"config.yaml": "run", "sweep.yaml": "sweep", "compare.yaml": "comparison"}


@dataclass(frozen=True)
class ExperimentFolder:
    """A folder for many runs.

    Attributes:
        path: of the folder.
        stored: the file in it that holds the config: "sweep.yaml" or "compare.yaml".
        digest: returns a short hash of the settings that must stay the same when it is resumed.
    """

    path: Path
    stored: str
    digest: Callable[[Config], str]

    def check(self, config: Config) -> None:
        """Refuse a folder that holds something else.

        Raises:
                RunFolderError: it does; nothing was changed.
        """
        own = KINDS[self.stored]
        for file, kind in KINDS.items():
            if file != self.stored and (self.path / file).exists():
                raise RunFolderError(f"{self.path} holds a {kind}, not a {own}: choose another run.name")
        if not (self.path / self.stored).exists():
            return
        before, now = self.digest(read_config(self.path / self.stored)), self.digest(config)
        if before != now:
            raise RunFolderError(
                f"{self.path} holds another {own} (of config {before}, this is {now}): choose another run.name, or "
                "leave it out"
            )

    @contextlib.contextmanager
    def open(self, config: Config) -> Iterator[None]:
        """Create the folder or check it, write its config, and hold its lock while the block runs.

        Raises:
            ValueError: it holds something else, is in use, or cannot be written.
        """
        self.check(config)
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(self.path))
                write_whole(self.path / self.stored, config.to_yaml())
            except OSError as error:
                raise RunFolderError(
                    f"folder {self.path} can't be written ({error.strerror}): set run.storage_path"
                ) from None
            yield
