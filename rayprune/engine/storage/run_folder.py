"""The run folder: config.yaml, environment.json, metrics.jsonl, selections/, scores.parquet, validation.parquet.

Other programs can read all of them: YAML, JSON, Parquet, and NumPy arrays without pickle.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayprune.core.redaction import redacted_tree
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.errors import RunFolderError, one_line
from rayprune.paths import ObjectPath, replace_file
from rayprune.sources.tables import scores

_VALIDATION = "validation.parquet"
RUN_SCHEMA = 1  # of environment.json and gallery.json
_PACKAGES = ("rayprune", "ray", "torch", "torchvision", "numpy", "pandas", "pyarrow", "scikit-learn")


def write_whole(file: Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically: a kill leaves the old file or the new one.

    Args:
        file: the file.
        text: its content.
        private: it has settings: only the user may read it, where the file system has permissions.
    """
    with replace_file(file) as partial:
        if private:
            partial.unlink(missing_ok=True)  # of a kill, with any permissions
            partial.touch(mode=0o600)
        partial.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    """Return the content of a JSON file of a run or an experiment.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cure = "restore it or choose another run.name"
        raise RunFolderError(f"{file} can't be read ({one_line(error)}): {cure}") from None


def write_environment(run_folder: Path, **facts: Any) -> None:
    """Write environment.json: versions, hardware, and the caller's facts (seed, fingerprint, devices)."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    machine = {"system": platform.platform(), "processor": platform.machine(), "python": platform.python_version()}
    environment = {"schema": RUN_SCHEMA, "versions": versions, "machine": machine, **facts}
    write_whole(run_folder / "environment.json", json.dumps(environment, indent=1) + "\n")


def start_metrics(run_folder: Path) -> None:
    """Create metrics.jsonl, unless it exists.

    Raises:
        OSError: the folder, or the file, can't be written.
    """
    file = run_folder / "metrics.jsonl"
    if not (isinstance(file, ObjectPath) and file.exists()):
        file.open("a").close()


def append_metrics(run_folder: Path, record: Mapping[str, Any]) -> None:
    """Append one epoch's line to metrics.jsonl, after removing a line that a kill has cut short."""
    file = run_folder / "metrics.jsonl"
    if not isinstance(file, ObjectPath):  # where a write appears as a whole
        _remove_partial_line(file)
    with file.open("a") as stream:
        stream.write(json.dumps(_without_nan(record)) + "\n")


def mend_metrics(run_folder: Path, last: Mapping[str, Any] | None) -> None:
    """Append the newest checkpoint's line (None in epoch 0) if a kill came between the checkpoint and the line."""
    if last is not None and all(record["epoch"] != last["epoch"] for record in read_metrics(run_folder)):
        append_metrics(run_folder, last)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the last line of each epoch, in order of epochs; an incomplete last line is ignored."""
    file = run_folder / "metrics.jsonl"
    by_epoch = {record["epoch"]: record for record in _complete_lines(file)} if file.exists() else {}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_text().splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                yield json.loads(line)
            except ValueError:
                raise RunFolderError(
                    f"{file}, line {number} is not valid JSON: restore the file or choose another run.name"
                ) from None


def _remove_partial_line(file: Path) -> None:
    if not file.exists():
        return
    with file.open("rb+") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.truncate(content.rfind(b"\n") + 1)


def _without_nan(value: Any) -> Any:
    """Return a value with null for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_selection(run_folder: Path, epoch: int, selection: Selection, keep: int) -> None:
    """Write selections/epoch-NNNNNN.npz (bitmap and weight codes) and delete all but the newest `keep`."""
    if not keep:
        return
    folder = run_folder / "selections"
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Any] = selection.to_arrays()
    with (folder / f"epoch-{epoch:06d}.npz").open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    for old in sorted(folder.glob("epoch-*.npz"), reverse=True)[keep:]:
        old.unlink(missing_ok=True)


def read_selection(run_folder: Path, epoch: int) -> Selection:
    """Return an epoch's Selection from selections/."""
    file = run_folder / "selections" / f"epoch-{epoch:06d}.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        return Selection.from_arrays(dict(stored))


def write_validation(run_folder: Path, correct_V: NDArray[np.bool_]) -> None:
    """Write validation.parquet: id, and whether the trained network classifies the sample correctly.

    Args:
        run_folder: the folder.
        correct_V: (V,) bool, in the order of the validation split's ids.
    """
    with replace_file(run_folder / _VALIDATION) as partial:
        pq.write_table(
            pa.table({"id": np.arange(correct_V.size), "correct": correct_V}), partial, write_page_checksum=True
        )


def read_validation(run_folder: Path, num_samples: int) -> NDArray[np.bool_]:
    """Return (V,) bool, whether each validation sample is classified correctly after the last epoch.

    Raises:
        RunFolderError: validation.parquet is missing or damaged, or is not of V samples.
    """
    file = run_folder / _VALIDATION
    cure = "restore it, or delete the run folder to train the run again"
    try:
        with file.open("rb") as stream:
            table = pq.read_table(stream, page_checksum_verification=True)
        correct_V = np.asarray(table["correct"].to_numpy())
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunFolderError(f"{file} can't be read ({one_line(error)}): {cure}") from None
    if correct_V.shape != (num_samples,) or correct_V.dtype != bool:
        raise RunFolderError(f"{file} is not of {num_samples} samples: {cure}")
    return correct_V


def write_scores(
    run_folder: Path,
    selector: Selector,
    labels: NDArray[np.int64] | None,
    fingerprint: str,
    *,
    extra: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
) -> Path:
    """Write scores.parquet: id, label, the (N,) columns of `extra`, the scores, last_visit, times_pruned.

    `method` is the config of the method that scored; by default, the Selector's.
    """
    return scores.write_scores(
        run_folder / "scores.parquet",
        selector.num_samples,
        selector.scores(),
        labels=labels,
        extra=extra,
        last_visit=selector.table.last_visit,
        times_pruned=selector.table.times_pruned,
        fingerprint=fingerprint,
        about={"method": redacted_tree(method or selector.method.to_config()), "seed": selector.seed},
    )
