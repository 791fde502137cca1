"""Nothing in a step waits for the device: no value of a tensor is asked for between two pushes of the recorder.

On a GPU such a question stops the host until all that was launched is done. On a CPU nothing waits, so the questions
themselves are caught: at Python's level (item, tolist, cpu, bool …) and in the dispatcher (masks that must be counted).
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
from rayprune.engine.train import driver as run
from rayprune.engine.train import worker
from rayprune.engine.train.driver import train
from rayprune.engine.train.metrics import MetricSums
from rayprune.errors import TrainingPaused
from rayprune.nn.device import Copies
from rayprune.nn.steps import PlainStep
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import run_config

ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "allclose"} | {
    f"__{name}__" for name in ("bool", "float", "int", "index", "array", "contains")
}
COUNTING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "repeat_interleave.Tensor"}


class Listening:
    """What was asked, and where in the package; nothing is heard while `paused`."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.calls = 0
        self.paused = False

    def hear(self, what: str) -> None:
        places = [
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack() if "/rayprune/" in f.filename
        ]
        if not self.paused:
            self.heard.append(f"{what} at {' < '.join(reversed(places[-3:]))}")


class Asked(TorchFunctionMode):
    """Python's questions."""

    def __init__(self, to: Listening) -> None:
        super().__init__()
        self._to = to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ASKING or (name == "to" and "cpu" in args[1:]):
            self._to.hear(name)
        return func(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """The dispatcher's."""

    def __init__(self, to: Listening) -> None:
        super().__init__()
        self._to = to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self._to.calls += 1
        masked = name.startswith(("index.", "index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or name in COUNTING or name.partition(".")[0] in COUNTING:
            self._to.hear(name)
        return func(*args, **(kwargs or {}))


def listen(monkeypatch: pytest.MonkeyPatch) -> Listening:
    """Hear what training and forward-only passes ask, but for pushes and what a phase ends with."""
    to = Listening()

    def heard(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with Asked(to), Counted(to):
                return function(*args, **kwargs)

        return inside

    def unheard(function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            before, to.paused = to.paused, True
            try:
                return function(*args, **kwargs)
            finally:
                to.paused = before

        return inside

    monkeypatch.setattr(worker.Worker, "_train", heard(worker.Worker._train))
    monkeypatch.setattr(worker.Worker, "_forward", heard(worker.Worker._forward))
    for name in ("push", "_start_copy", "_send"):
        monkeypatch.setattr(Recorder, name, unheard(getattr(Recorder, name)))
    monkeypatch.setattr(Copies, "__call__", unheard(Copies.__call__))  # to the device, which is the CPU here
    monkeypatch.setattr(MetricSums, "total", unheard(MetricSums.total))
    return to


SMALL: dict[str, Any] = {"data": {"limit": 101, "augment": {"crop": 1, "flip": True}}, "train": {"epochs": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}, "model": {"name": "resnet8"}},
    "infobatch, clipped": {"train": {"clip_norm": 1.0, "label_smoothing": 0.1}},
    "infobatch, bf16, in micro-batches": {"train": {"accumulate": 2, "precision": "bf16"}},
    "boundaries, swept": {"method": {"name": "dynams", "budget": 0.6, "block_epochs": 1}},
    "a proxy": {"method": {"name": "dynams", "budget": 0.6, "block_epochs": 1, "proxy_width": 0.5}},
    "every signal": {"train": {"record": ["entropy", "el2n", "margin", "confidence", "prob_label", "boundary"]}},
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
    to = listen(monkeypatch)
    sections = merge(merge(SMALL, KINDS[kind]), {"scaling": {"stream": stream}})
    train(run_config(tmp_path, **sections))
    assert to.calls > 100
    assert sorted(set(to.heard)) == []


def test_a_synchronization_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asking(sums: MetricSums, signals: dict[str, torch.Tensor], rows: PlacedRows, *rest: Any) -> None:
        assert signals["loss"].mean().item() > 0
        assert len(signals["loss"][rows.real])

    to = listen(monkeypatch)
    monkeypatch.setattr(MetricSums, "add", asking)
    train(run_config(tmp_path, **merge(SMALL, {"train": {"epochs": 1}})))
    assert {"item", "_local_scalar_dense", "index.Tensor"} <= {what.partition(" ")[0] for what in to.heard}


@pytest.mark.parametrize("stream", ["local", "device"])
@pytest.mark.parametrize("kind", ["full", "infobatch, clipped", "infobatch, bf16, in micro-batches", "several exits"])
def test_steps_run_with_fake_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stream: str) -> None:
    """On torch's meta device whatever asks for a value fails, and so does what mixes its tensors with the host's."""
    steps = []

    def epoch(self: worker.Worker, number: int) -> None:
        self._session.start_epoch(number)
        sums, _ = self._train(number, self._session.announce())
        steps.append(sums)
        self._forward("validate", record=False)
        raise TrainingPaused("that was it")

    monkeypatch.setattr(worker.Worker, "_run_epoch", epoch)
    monkeypatch.setattr(worker, "pick_device", lambda use_gpu: torch.device("meta"))
    monkeypatch.setattr(run, "pick_device", lambda use_gpu: torch.device("meta"))
    monkeypatch.setattr(PlainStep, "_mixed", lambda self, inputs: nullcontext())  # autocast does not know the device
    monkeypatch.setattr(Recorder, "_start_copy", lambda self: setattr(self, "_num_rows", 0))
    with pytest.raises(TrainingPaused):
        train(run_config(tmp_path, **merge(merge(SMALL, KINDS[kind]), {"scaling": {"stream": stream}})))
    assert [sums.device.type for sums in steps] == ["meta"]
