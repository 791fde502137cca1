"""A small file system of its own for the runs' storage, so that it can be full; needs the right to mount."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SIZE = "48m"


@contextmanager
def small_file_system(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs on `folder` for the with-block; yields False where that is not allowed."""
    folder.mkdir(parents=True)
    mounted = False
    if shutil.which("mount"):
        command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
