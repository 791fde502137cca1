"""The telling samples of a run, out of its gallery/: what they are called on the page, pictures as data inside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayprune.errors import RunFolderError
from rayprune.report.read import RunRecord, as_count, count_of, number, share

_TITLES = {
    "hardest": "Hardest",
    "easiest": "Easiest",
    "often_pruned": "Most often pruned",
    "probably_mislabelled": "Probably mislabelled",
}
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_BYTES = 200_000  # of one picture: a page with a hundred of them still opens on a phone


def gallery_of(run: RunRecord) -> dict[str, Any] | None:
    """Return a run's telling samples for the page; None where it has no gallery.

    Raises:
        ValueError: gallery.json is not what a run writes.
    """
    if run.gallery is None:
        return None
    file = run.folder / "gallery" / "gallery.json"
    try:
        kinds: list[dict[str, Any]] = [
            {"title": title, "samples": [_sample(file.parent, sample) for sample in run.gallery["kinds"][kind]]}
            for kind, title in _TITLES.items()
        ]
        text = (
            f"Label → prediction. Hardest and easiest by {run.gallery['by']}; predictions are the network's after "
            f"{_epochs(run.gallery['epochs'])}. Probably mislabelled: hard, and it is sure of another class and "
            "hardly believes the label."
        )
    except (KeyError, TypeError, AttributeError, ValueError, OSError):
        raise RunFolderError(f"{file} is not what a run writes: delete its folder, the report does without") from None
    empty = [kind["title"].lower() for kind in kinds if not kind["samples"]]
    if empty:
        text += f" None here: {', '.join(empty)}."
    return {"name": run.name, "text": text, "kinds": [kind for kind in kinds if kind["samples"]]}


def _sample(folder: Path, sample: Mapping[str, Any]) -> dict[str, Any]:
    sure = f"sure {share(sample['probability'], 1)}"
    if sample["prediction"] not in (None, sample["label"]):
        sure += f", label {share(sample['label_probability'], 1)}"
    lines = [f"id {sample['id']}", sure, f"loss {number(sample['loss'], '.3g')}"]
    if sample["times_pruned"]:
        lines.append(f"pruned {sample['times_pruned']}×")
    return {
        "id": sample["id"],
        "label": _named(sample["label"], sample["label_name"]),
        "prediction": _named(sample["prediction"], sample["prediction_name"]),
        "lines": lines,
        "image": _data(folder, sample["image"]),
    }


def _epochs(value: Any) -> str:
    return "– epochs" if as_count(value) is None else count_of(value, "epoch")


def _named(label: Any, name: Any) -> str | None:
    if label is None:
        return None
    return str(label) if not isinstance(name, str) or name in ("", str(label)) else f"{name} ({label})"


def _data(folder: Path, name: str | None) -> str | None:
    """Return a picture as a data URI; None where there is none."""
    if not name or Path(name).name != name or not (folder / name).is_file():
        return None
    content = (folder / name).read_bytes()
    if not content.startswith(_PNG) or len(content) > _LARGEST_BYTES:
        return None
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
