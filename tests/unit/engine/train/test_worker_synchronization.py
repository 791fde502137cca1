"""A training step does not synchronize with the device: the host reads no tensor value between two pushes.

On a GPU, reading a value blocks the host until all launched kernels are done. On a CPU nothing blocks, so the calls
that would block are caught: in Python (item, tolist, cpu, bool …) and in the dispatcher (boolean masks, whose True
values must be counted).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rayprune.config.yaml import merge
from rayprune.engine.data.batch import PlacedRows
from rayprune.engine.scoring.recorder import Recorder
from rayprune.engine.train import run, worker
from rayprune.engine.train.driver import train
from rayprune.engine.train.metrics import CorrectRows, MetricSums
from rayprune.errors import TrainingPaused
from rayprune.nn.device import Copies
from rayprune.nn.steps import PlainStep, l2w
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import run_config

PYTHON_CALLS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
    "allclose",
} | {f"__{name}__" for name in ("bool", "float", "int", "index", "array", "contains")}
DISPATCHER_CALLS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "equal",
    "repeat_interleave.Tensor",
}


class SyncLog:
    """The calls that would synchronize, and where in the package; none is logged while `paused`."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.calls = 0
        self.paused = False

    def add(self, call: str) -> None:
        places = [
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack() if "/rayprune/" in f.filename
        ]
        if not self.paused:
            self.entries.append(f"{call} at {' < '.join(reversed(places[-3:]))}")


class PythonCalls(TorchFunctionMode):
    """Logs synchronizing calls in Python."""

    def __init__(self, log: SyncLog) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in PYTHON_CALLS or (name == "to" and "cpu" in args[1:]):
            self._log.add(name)
        return func(*args, **(kwargs or {}))


class DispatcherCalls(TorchDispatchMode):
    """Logs synchronizing operators in the dispatcher."""

    def __init__(self, log: SyncLog) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self._log.calls += 1
        masked = name.startswith(("index.", "index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or name in DISPATCHER_CALLS or name.partition(".")[0] in DISPATCHER_CALLS:
            self._log.add(name)
        return func(*args, **(kwargs or {}))


def log_synchronizations(monkeypatch: pytest.MonkeyPatch) -> SyncLog:
    """Log the synchronizations of training and forward-only passes, except in pushes and at the end of a pass."""
    log = SyncLog()

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with PythonCalls(log), DispatcherCalls(log):
                return function(*args, **kwargs)

        return inside

    def unlogged(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            before, log.paused = log.paused, True
            try:
                return function(*args, **kwargs)
            finally:
                log.paused = before

        return inside

    monkeypatch.setattr(worker.Worker, "_train", logged(worker.Worker._train))
    monkeypatch.setattr(worker.Worker, "_forward", logged(worker.Worker._forward))
    for name in ("push", "_start_copy", "_send"):
        monkeypatch.setattr(Recorder, name, unlogged(getattr(Recorder, name)))
    monkeypatch.setattr(l2w, "leaving_counts", unlogged(l2w.leaving_counts))  # reads fractions on the host
    monkeypatch.setattr(torch.optim.Adam, "step", unlogged(torch.optim.Adam.step))  # reads its counter on the host
    monkeypatch.setattr(Copies, "__call__", unlogged(Copies.__call__))  # to the device, which is the CPU here
    for end_of_pass in (MetricSums, CorrectRows):
        monkeypatch.setattr(end_of_pass, "total", unlogged(end_of_pass.total))
    return log


SMALL: dict[str, Any] = {"data": {"limit": 101, "augment": {"crop": 1, "flip": True}}, "train": {"epochs": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}, "model": {"name": "resnet8"}},
    "infobatch, clipped": {"train": {"clip_norm": 1.0, "label_smoothing": 0.1}},
    "infobatch, bf16, in micro-batches": {"train": {"accumulate": 2, "precision": "bf16"}},
    "boundaries, swept": {"method": {"name": "dynams", "budget": 0.6, "block_epochs": 1}},
    "a proxy": {"method": {"name": "dynams", "budget": 0.6, "block_epochs": 1, "proxy_width": 0.5}},
    "every signal": {"train": {"record": ["entropy", "el2n", "margin", "confidence", "prob_label", "boundary"]}},
    "learned weights": {  # in batches without padding, which the host would have to count
        "data": {"limit": 96},
        "method": {"name": "full"},
        "model": {"name": f"{MULTI_EXIT_MODELS}:tower"},
        "train": {"step": {"name": "l2w", "hidden": 16}},
    },
    "several exits": {
        "model": {"name": f"{MULTI_EXIT_MODELS}:tower"},
        "train": {"step": {"name": "exits", "score": "depth"}},
    },
}


@pytest.mark.parametrize("stream", ["local", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_synchronize_with_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stream: str
) -> None:
    log = log_synchronizations(monkeypatch)
    sections = merge(merge(SMALL, KINDS[kind]), {"scaling": {"stream": stream}})
    train(run_config(tmp_path, **sections))
    assert log.calls > 100
    assert sorted(set(log.entries)) == []


def test_a_synchronization_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronizing(
        sums: MetricSums, signals: dict[str, torch.Tensor], rows: PlacedRows, *rest: Any, **more: Any
    ) -> None:
        assert signals["loss"].mean().item() > 0
        assert len(signals["loss"][rows.real])

    log = log_synchronizations(monkeypatch)
    monkeypatch.setattr(MetricSums, "add", synchronizing)
    train(run_config(tmp_path, **merge(SMALL, {"train": {"epochs": 1}})))
    assert {"item", "_local_scalar_dense", "index.Tensor"} <= {call.partition(" ")[0] for call in log.entries}


@pytest.mark.parametrize("stream", ["local", "device"])
@pytest.mark.parametrize("kind", ["full", "infobatch, clipped", "infobatch, bf16, in micro-batches", "several exits"])
def test_steps_run_with_fake_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stream: str) -> None:
    """On torch's meta device, reading a value or mixing its tensors with those of the host fails."""
    steps = []

    def epoch(self: worker.Worker, number: int) -> None:
        self._session.start_epoch(number)
        sums, _ = self._train(number, self._session.announce())
        steps.append(sums)
        self._forward("validate", record=False)
        raise TrainingPaused("one epoch is enough")

    monkeypatch.setattr(worker.Worker, "_run_epoch", epoch)
    monkeypatch.setattr(worker, "pick_device", lambda use_gpu: torch.device("meta"))
    monkeypatch.setattr(run, "pick_device", lambda use_gpu: torch.device("meta"))
    monkeypatch.setattr(PlainStep, "_mixed", lambda self, inputs: nullcontext())  # autocast does not know the device
    monkeypatch.setattr(Recorder, "_start_copy", lambda self: setattr(self, "_num_rows", 0))
    with pytest.raises(TrainingPaused):
        train(run_config(tmp_path, **merge(merge(SMALL, KINDS[kind]), {"scaling": {"stream": stream}})))
    assert [sums.device.type for sums in steps] == ["meta"]
