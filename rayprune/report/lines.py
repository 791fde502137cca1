"""metrics.jsonl as a report reads it: the last line of each epoch, every value of its kind or None.

Whatever comes after the reading may take the kinds for granted: what is odd in a line is shown as missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayprune.report.cells import as_count, as_mapping, as_number, count_of

Line = Mapping[str, Any]
_NEEDED = ("epoch", "num_samples", "samples_trained", "pruned_fraction")  # anything else of a line may be missing
_COUNTS = ("num_samples", "samples_trained", "world_size")
_NUMBERS = (
    "pruned_fraction",
    "requested_prune_ratio",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "wall_time",
)
_NUM_QUANTILES = 7


def read_lines(file: Path) -> tuple[list[Line], list[str]]:
    """Return each epoch's last line, in order of epochs, and notes; a torn last line is left out.

    Args:
        file: metrics.jsonl.

    Raises:
        ValueError: there is none, it holds no whole line, or a line before the last is no epoch's; one line with the
            cure.
    """
    if not file.is_file():
        if (file.parent / "config.yaml").is_file():
            raise ValueError(f"{file.parent} has no metrics.jsonl: its first epoch has not ended, try again later")
        raise ValueError(f"{file.parent} is no run folder (it has no metrics.jsonl): name one, such as runs/NAME")
    by_epoch: dict[int, Line] = {}
    notes = []
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            by_epoch[record["epoch"]] = record
        elif number < len(lines) or (number == 1 and text.endswith("\n")):
            raise ValueError(f"{file}, line {number} is no epoch's record of a run: restore the file")
        else:
            notes.append(f"the last line of metrics.jsonl (line {number}) is torn and was left out")
    if not by_epoch:
        raise ValueError(f"{file} holds no finished epoch: try again when the first has ended, or restore the file")
    if lacking := max(by_epoch) + 1 - len(by_epoch):
        notes.append(f"metrics.jsonl has no line of {count_of(lacking, 'epoch')} before the last")
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], notes


def _record(line: str) -> Line | None:
    """Return a line's values; None where it is no epoch's record."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or any(key not in read for key in _NEEDED) or as_count(read["epoch"]) is None:
        return None
    return {
        "epoch": read["epoch"],
        **{key: as_count(read.get(key)) for key in _COUNTS},
        **{key: as_number(read.get(key)) for key in _NUMBERS},
        "seconds": _seconds(read.get("seconds")),
        "seconds_collected": _seconds(read.get("seconds_collected")),
        "selection": _selection(read.get("selection")),
        "score_quantiles": _quantiles(read.get("score_quantiles")),
    }


def _seconds(value: Any) -> dict[str, float]:
    found = {key: as_number(inner) for key, inner in as_mapping(value).items()}
    return {key: seconds for key, seconds in found.items() if seconds is not None and 0 <= seconds < float("inf")}


def _selection(value: Any) -> dict[str, Any]:
    facts = {key: inner for key, inner in as_mapping(value).items() if key not in ("threshold", "class_kept")}
    facts["budget_so_far"] = as_number(facts.get("budget_so_far"))
    if "threshold" in as_mapping(value):
        facts["threshold"] = as_number(value["threshold"])
    kept = as_mapping(value).get("class_kept")
    if isinstance(kept, list) and all(share is None or as_number(share) is not None for share in kept):
        facts["class_kept"] = kept
    return facts


def _quantiles(value: Any) -> dict[str, list[float | None]]:
    return {
        name: [as_number(edge) for edge in edges]
        for name, edges in as_mapping(value).items()
        if isinstance(edges, list) and len(edges) == _NUM_QUANTILES
    }
