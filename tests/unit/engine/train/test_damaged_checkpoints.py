"""A damaged checkpoint is named, and the run continues from the one before it, as if the damaged one did not exist.

Checksums find what changed after a checkpoint was written. Here they are also made to match, as where a program has
written a wrong checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import checkpoint_path, newest_checkpoint
from rayprune.engine.storage.costs import PriorCost
from rayprune.engine.train.driver import RunResult, train
from rayprune.errors import RunFolderError
from tests.support.runs import assert_same_run, run_config

EPOCHS, STOP = 4, 3
Damage = Callable[[Path], None]


def make(folder: Path, stop_after: int | None = None, **model: Any) -> Config:
    train_section = {"epochs": EPOCHS, **({"stop_after": stop_after} if stop_after else {})}
    return run_config(folder, train=train_section, model=model, run={"keep_checkpoints": 3})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The run that each damaged one must equal."""
    return train(make(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def stopped(tmp_path: Path, whole: RunResult) -> Path:
    """A copy of that run as it was after STOP epochs, with the checkpoints of the last two."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(checkpoint_path(folder, EPOCHS))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:STOP]))
    config = (folder / "config.yaml").read_text().replace(str(whole.folder.parent), str(tmp_path))
    (folder / "config.yaml").write_text(config)
    assert newest_checkpoint(folder) == checkpoint_path(folder, STOP)
    return folder


def sign(folder: Path) -> None:
    """Make the manifest match the files."""
    files = [file for file in folder.iterdir() if file.name != "manifest.json"]
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "manifest.json").write_text(json.dumps(sums))


def text(name: str, content: str) -> Damage:
    """Replace a file."""
    return lambda folder: (folder / name).write_text(content) and None


def cut(name: str) -> Damage:
    """Keep the first half of a file."""
    return lambda folder: (
        (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2]) and None
    )


def position(**changes: Any) -> Damage:
    """Change entries of position.json; None removes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "position.json").read_text())
        content.update(changes)
        content = {name: value for name, value in content.items() if value is not None}
        (folder / "position.json").write_text(json.dumps(content))

    return damage


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change what a file of torch holds; `change` may return other content."""

    def damage(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=False)
        changed = change(content)
        torch.save(content if changed is None else changed, folder / name)

    return damage


def arrays(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the arrays of selector.npz."""

    def damage(folder: Path) -> None:
        with np.load(folder / "selector.npz") as stored:
            content = dict(stored)
        change(content)
        np.savez(folder / "selector.npz", **content)

    return damage


def header(**changes: Any) -> Damage:
    """Change entries of the header of selector.npz."""

    def change(content: dict[str, Any]) -> None:
        entries = {**json.loads(bytes(content["header"]).decode()), **changes}
        content["header"] = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)

    return arrays(change)


def first(content: dict[str, Any]) -> str:
    return next(iter(content))


def momentum(content: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state of its first parameter."""
    state: dict[str, Any] = content["optimizer"]["state"][0]
    return state


class Foreign:
    """An object that a pickle would build."""


UNSIGNED: dict[str, Damage] = {
    "manifest: a list": text("manifest.json", "[]"),
    "manifest: null": text("manifest.json", "null"),
    "manifest: an empty object": text("manifest.json", "{}"),
    "manifest: an empty file": text("manifest.json", ""),
    "manifest: numbers": text(
        "manifest.json", '{"model.pt": 1, "trainer.pt": 2, "selector.npz": 3, "position.json": 4}'
    ),
    "manifest: nested 100,000 times": text("manifest.json", "[" * 100_000),
    "manifest: another folder's file": text("manifest.json", '{"../../config.yaml": "0"}'),
    "a missing file": lambda folder: (folder / "trainer.pt").unlink(),
    "an altered file": cut("selector.npz"),
}
SIGNED: dict[str, Damage] = {
    "position: a list": text("position.json", "[]"),
    "position: not JSON": text("position.json", "{"),
    "position: not UTF-8": lambda folder: (folder / "position.json").write_bytes(b"\xff\xfe") and None,
    "position: no schema": position(schema=None),
    "position: no digest": position(digest=None),
    "position: no counts": position(counts=None),
    "position: text for the epoch": position(epoch="three"),
    "position: a bool for the step": position(step=True),
    "position: another epoch": position(epoch=7),
    "position: counts without a key": position(counts={"samples_trained": 3}),
    "position: text for a count": position(counts=dict.fromkeys(PriorCost().counts, "x")),
    "position: text for the sums": position(sums=["x"]),
    "position: too few sums": position(sums=[1.0]),
    "position: metrics without an epoch": position(metrics={"loss": 1.0}),
    "model: cut": cut("model.pt"),
    "model: empty": text("model.pt", ""),
    "model: a list": tensors("model.pt", lambda content: [1, 2]),
    "model: a pickled object": tensors("model.pt", lambda content: {"weight": Foreign()}),
    "model: a tensor of another shape": tensors(
        "model.pt", lambda content: content.update({first(content): torch.ones(2)})
    ),
    "model: a tensor missing": tensors("model.pt", lambda content: content.__delitem__(first(content))),
    "model: a number for a tensor": tensors("model.pt", lambda content: content.update({first(content): 3})),
    "trainer: cut": cut("trainer.pt"),
    "trainer: no optimizer": tensors("trainer.pt", lambda content: content.__delitem__("optimizer")),
    "trainer: an optimizer of text": tensors("trainer.pt", lambda content: content.update(optimizer="x")),
    "trainer: no groups": tensors("trainer.pt", lambda content: content["optimizer"].update(param_groups=[])),
    "trainer: momentum of another shape": tensors(
        "trainer.pt", lambda content: momentum(content).update(momentum_buffer=torch.ones(2))
    ),
    "trainer: text for momentum": tensors("trainer.pt", lambda content: momentum(content).update(momentum_buffer="x")),
    "trainer: no momentum": tensors("trainer.pt", lambda content: momentum(content).clear()),
    "trainer: momentum of no parameter": tensors(
        "trainer.pt", lambda content: content["optimizer"]["state"].update(x=momentum(content))
    ),
    "trainer: a step's state of text": tensors("trainer.pt", lambda content: content.update(step="x")),
    "selector: cut": cut("selector.npz"),
    "selector: text": text("selector.npz", "x"),
    "selector: no header": arrays(lambda content: content.pop("header")),
    "selector: text for the epoch": header(epoch="x"),
    "selector: another epoch": header(epoch=1),
    "selector: text for the schema": header(schema="x"),
    "selector: a list of texts": header(nonfinite_ids=["x"]),
    "selector: a column missing": arrays(lambda content: content.pop("table/last_visit")),
    "selector: a column of another length": arrays(
        lambda content: content.update({"table/last_visit": np.zeros(3, dtype=np.int32)})
    ),
    "selector: no bitmap": arrays(lambda content: content.pop("selection/bitmap")),
    "selector: two numbers of samples": arrays(lambda content: content.update({"selection/num_samples": np.ones(2)})),
    "selector: a selection's facts of text": arrays(
        lambda content: content.update({"selection/more": np.frombuffer(b'"x"', dtype=np.uint8)})
    ),
    "selector: objects": arrays(lambda content: content.update({"header": np.array([Foreign()], dtype=object)})),
}


@pytest.mark.parametrize("name", [*UNSIGNED, *SIGNED])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name: str, stopped: Path, whole: RunResult, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint_path(stopped, STOP)
    {**UNSIGNED, **SIGNED}[name](newest)
    if name in SIGNED:
        sign(newest)
    caplog.set_level(logging.WARNING)
    started: list[int] = []
    again = train(make(stopped.parent), on_start=lambda start: started.append(start.first_epoch))
    assert started == [STOP - 1]
    warnings = [record.getMessage() for record in caplog.records if "can't be used" in record.getMessage()]
    assert warnings
    assert all(str(newest) in line and "trying the one before it" in line and len(line) < 1000 for line in warnings)
    assert "weights_only" not in caplog.text
    assert_same_run(again, whole)


def test_checkpoints_that_all_fail_to_fit_are_refused_and_kept(stopped: Path) -> None:
    """The network has changed, not the files: to start again would throw the training away."""
    for epoch in (STOP - 1, STOP):
        tensors("model.pt", lambda content: content.update({first(content): torch.ones(2)}))(
            checkpoint_path(stopped, epoch)
        )
        sign(checkpoint_path(stopped, epoch))
    shutil.rmtree(checkpoint_path(stopped, 1), ignore_errors=True)
    with pytest.raises(RunFolderError, match=rf"epoch-00000{STOP} can't be applied .*restore the code"):
        train(make(stopped.parent))
    assert newest_checkpoint(stopped) == checkpoint_path(stopped, STOP)


def test_a_newer_versions_checkpoint_is_not_skipped(stopped: Path) -> None:
    position(schema=99)(checkpoint_path(stopped, STOP))
    sign(checkpoint_path(stopped, STOP))
    with pytest.raises(RunFolderError, match=r"has schema 99, .*upgrade"):
        train(make(stopped.parent))
