"""A file of chosen samples that belongs to a source."""

from __future__ import annotations

from rayprune.sources.base import SampleSource
from rayprune.sources.selection_file import ChosenFile, read_selection_file


def read_chosen(path: str, source: SampleSource) -> ChosenFile:
    """Read the samples of a source that a method `fixed` is to train on.

    Raises:
        ValueError: no path, a file that can't be read, or one that was chosen on other data.
    """
    if not path:
        raise ValueError("method.path is missing: method fixed trains on a file that `rayprune select` wrote")
    read = read_selection_file(path, len(source))
    if read.fingerprint is not None and read.fingerprint != source.fingerprint:
        raise ValueError(
            f"{path} was chosen on other data (fingerprint {read.fingerprint[:12]}, here {source.fingerprint[:12]}): "
            "score and select these data"
        )
    return read
