"""The notable samples of a run, from its gallery/: captions for the page, and thumbnails as data inside it."""

from __future__ import annotations

import base64
from pathlib import Path

from pydantic import ValidationError

from rayprune.errors import RunFolderError
from rayprune.report.read import StoredModel, read_json
from rayprune.report.text import count_of, number, share

_TITLES = {
    "hardest": "Hardest",
    "easiest": "Easiest",
    "often_pruned": "Most often pruned",
    "probably_mislabelled": "Probably mislabeled",
}
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_BYTES = 200_000  # of one thumbnail: a page with a hundred of them still opens on a phone


class Sample(StoredModel):
    """A sample of gallery.json; `image` is a file name when read and a data URI on the page."""

    id: int
    label: int
    label_name: str | None
    prediction: int | None
    prediction_name: str | None
    probability: float | None
    label_probability: float | None
    loss: float | None
    times_pruned: int
    image: str | None

    @property
    def caption(self) -> str:
        """The label and the prediction, with their class names if known."""
        label = class_text(self.label, self.label_name)
        return label if self.prediction is None else f"{label} → {class_text(self.prediction, self.prediction_name)}"

    @property
    def lines(self) -> list[str]:
        """The sample's other facts."""
        confidence = f"confidence {share(self.probability, 1)}"
        if self.prediction not in (None, self.label):
            confidence += f", label {share(self.label_probability, 1)}"
        pruned = [f"pruned {self.times_pruned}×"] if self.times_pruned else []
        return [f"id {self.id}", confidence, f"loss {number(self.loss, '.3g')}", *pruned]


class Gallery(StoredModel):
    """gallery.json: kind → samples, the score that ranks them, and the number of trained epochs."""

    by: str
    epochs: int
    kinds: dict[str, list[Sample]]

    @property
    def text(self) -> str:
        """A description of the samples."""
        text = (
            f"Label → prediction of the network after {count_of(self.epochs, 'epoch')}, and its loss. Hardest and "
            f"easiest by {self.by}. Probably mislabeled: hard samples for which the network is confident of another "
            "class and gives the label a low probability."
        )
        empty = [title.lower() for title in _TITLES.values() if title not in self.kinds]
        return f"{text} No samples: {', '.join(empty)}." if empty else text


def read_gallery(run_folder: Path) -> Gallery | None:
    """Return a run's notable samples by heading, with their thumbnails; None without a gallery.

    Raises:
        RunFolderError: gallery.json is not what a run writes, or of a newer schema.
    """
    file = run_folder / "gallery" / "gallery.json"
    content = read_json(file)
    if not content:
        return None
    try:
        stored = Gallery.model_validate(content)
        kinds = {
            title: [sample.model_copy(update={"image": data_uri(file.parent, sample.image)}) for sample in samples]
            for kind, title in _TITLES.items()
            if (samples := stored.kinds[kind])
        }
    except (ValidationError, KeyError, OSError):
        cure = "delete its folder, and the report leaves the gallery out"
        raise RunFolderError(f"{file} is not what a run writes: {cure}") from None
    return stored.model_copy(update={"kinds": kinds})


def class_text(index: int, name: str | None) -> str:
    """Return a class with its name, if that is another than its index."""
    return str(index) if name in (None, "", str(index)) else f"{name} ({index})"


def data_uri(folder: Path, name: str | None) -> str | None:
    """Return a thumbnail as a data URI; None without a valid file."""
    if not name or Path(name).name != name or not (folder / name).is_file():
        return None
    content = (folder / name).read_bytes()
    if not content.startswith(_PNG) or len(content) > _MAX_BYTES:
        return None
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
