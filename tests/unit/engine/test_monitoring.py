"""Listeners hear of each new epoch; stalls are reported once, with who and for how long, and so is their end."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from rayprune.engine.monitoring import (
    PulseSender,
    RunListeners,
    StallWatch,
    Watcher,
    error_line,
    kept_handlers,
    on_ctrl_c,
    on_sigterm,
)
from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import Pulse
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.run_folder import append_metrics
from rayprune.errors import TrainingPaused
from rayprune.sources import open_data

LIMIT_S = 10.0
WAITING = {0: Pulse(0.5, "waiting for the stream", 12.0)}


class RemoteActor:
    """A channel to a ScoreActor of another process: busy ones give no answer."""

    name = "actor"

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def call(self, method: str, *args: Any) -> Any:
        return self.try_call(method, 0.0)

    def post(self, method: str, *args: Any) -> None:
        self.calls.append((method, args))

    def try_call(self, method: str, timeout_s: float) -> Any:
        self.calls.append((method, ()))
        return self.answers.get(method)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def local_actor() -> ScoreActor:
    source = open_data("digits", limit=8).train
    return ScoreActor(ScoreSpec({"name": "full"}, source, 0, 1, 0, 4, "pad", 64, None, 0))


def test_new_lines_are_delivered_the_last_before_the_block_ends(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"epoch": 0})
    epochs: list[int] = []
    listeners = RunListeners(on_epoch=lambda line: epochs.append(line["epoch"]))
    with Watcher(tmp_path, ScoreClient(RemoteActor()), listeners, LIMIT_S):
        append_metrics(tmp_path, {"epoch": 1})
        wait_until(lambda: epochs == [1])
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"epo')
        append_metrics(tmp_path, {"epoch": 2})
    assert epochs == [1, 2]


def test_a_failing_listener_still_gets_the_next_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    epochs: list[int] = []

    def listen(line: dict[str, Any]) -> None:
        epochs.append(line["epoch"])
        raise RuntimeError("a listener's own mistake")

    with Watcher(tmp_path, ScoreClient(RemoteActor()), RunListeners(on_epoch=listen), LIMIT_S):
        append_metrics(tmp_path, {"epoch": 0})
        append_metrics(tmp_path, {"epoch": 1})
    assert epochs == [0, 1]
    assert "a listener's own mistake" in caplog.text


def test_progress_and_stalls_come_from_the_actor(tmp_path: Path) -> None:
    actor = RemoteActor()
    actor.answers = {"progress": (3, 10, 20), "pulses": WAITING}
    progress: list[tuple[int, ...]] = []
    notices: list[str] = []
    listeners = RunListeners(on_progress=lambda *numbers: progress.append(numbers), on_notice=notices.append)
    with Watcher(tmp_path, ScoreClient(actor), listeners, LIMIT_S):
        wait_until(lambda: len(progress) > 1)
    assert progress[0] == (3, 10, 20)
    assert notices == ["stall: rank 0 has been waiting for the stream for 12 s"]


def test_setting_pause_asks_the_actor_again_and_again(tmp_path: Path) -> None:
    """An actor that restarts has forgotten it."""
    actor, pause = RemoteActor(), threading.Event()
    with Watcher(tmp_path, ScoreClient(actor), RunListeners(pause=pause), LIMIT_S) as watcher:
        wait_until(lambda: len(actor.calls) > 1)
        assert ("pause", ()) not in actor.calls
        watcher.request_pause(signal.SIGTERM, None)
        wait_until(lambda: actor.calls.count(("pause", ())) > 1)
    assert pause.is_set()


def test_a_rank_sends_its_activity_until_it_stops() -> None:
    actor = RemoteActor()
    sender = PulseSender(ScoreClient(actor), 7, 1, 2)
    wait_until(lambda: actor.calls)
    sender.set_activity("in one step")
    wait_until(lambda: len(actor.calls) > 1)
    sender.stop()
    pulses = [args for _, args in actor.calls]
    assert [args[:4] for args in pulses[:2]] == [(7, 1, 2, "starting"), (7, 1, 2, "in one step")]
    assert all(0 <= args[4] < 10 for args in pulses)


def test_work_is_not_a_stall() -> None:
    watch = StallWatch(LIMIT_S)
    assert watch.update({}) == []
    assert watch.update({0: Pulse(1.0, "in one step", 9.0), 1: Pulse(9.0, "waiting for the stream", 9.0)}) == []


def test_a_waiting_rank_is_reported_once_and_again_when_it_continues() -> None:
    watch = StallWatch(LIMIT_S)
    pulses = {**WAITING, 1: Pulse(0.5, "in one step", 0.1)}
    assert watch.update(pulses) == ["stall: rank 0 has been waiting for the stream for 12 s"]
    assert watch.update(pulses) == []
    assert watch.update({**pulses, 0: Pulse(0.5, "in one step", 0.1)}) == ["stall over: rank 0 continues"]


def test_a_silent_rank_is_reported_with_its_last_activity() -> None:
    assert StallWatch(LIMIT_S).update({1: Pulse(11.0, "in one step", 0.2)}) == [
        "stall: rank 1 has been silent for 11 s; last activity: in one step"
    ]


def test_a_silent_actor_is_reported() -> None:
    watch = StallWatch(0.05)
    assert watch.update(None) == []
    time.sleep(0.1)
    (line,) = watch.update(None)
    assert line.startswith("stall: the ScoreActor has not answered for")
    assert watch.update(None) == []
    assert watch.update({}) == ["stall over: the ScoreActor continues"]


def test_ranks_stay_stalled_while_the_actor_does_not_answer() -> None:
    watch = StallWatch(LIMIT_S)
    assert len(watch.update(WAITING)) == 1
    assert watch.update(None) == []
    assert watch.update(WAITING) == []


def test_a_rank_that_has_never_sent_a_pulse_is_silent_too() -> None:
    actor = local_actor()
    actor.pulse(1, 0, 2, "in one step", 0.0)
    time.sleep(0.1)
    actor.pulse(1, 0, 2, "in one step", 0.0)
    (line,) = StallWatch(0.05).update(actor.pulses())
    assert line.startswith("stall: rank 1 has been silent")
    actor.pulse(2, 0, 1, "starting", 0.0)
    assert list(actor.pulses()) == [0]


# A shell starts background commands with SIGINT ignored.
@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["default", "ignored"])
def test_sigterm_interrupts_and_the_handler_is_put_back(ctrl_c: Any) -> None:
    # An earlier test of this process may have left the handlers of a user's own TorchTrainer.
    sigterm, sigint = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(TrainingPaused), on_sigterm():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, sigint)
    assert signal.getsignal(signal.SIGTERM) == sigterm


def test_the_first_ctrl_c_calls_the_handler_and_the_second_one_interrupts() -> None:
    before, calls = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        with on_ctrl_c(lambda: calls.append("saves")):
            signal.raise_signal(signal.SIGINT)
            assert calls == ["saves"]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert calls == ["saves"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_stays_ignored_in_the_background() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        calls: list[str] = []
        with on_ctrl_c(lambda: calls.append("saves")):
            signal.raise_signal(signal.SIGINT)
        assert calls == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("pulses", "is_training"),
    [
        ([], False),
        ([Pulse(60.0, "nothing yet", 0.0), Pulse(0.0, "starting", 0.0)], False),
        ([Pulse(0.0, "starting", 0.0), Pulse(0.0, "waiting for the first batch", 0.0)], False),
        ([Pulse(0.0, "waiting for the first batch", 0.0), Pulse(0.0, "in one step", 0.0)], True),
        ([Pulse(0.0, "waiting for the stream", 0.0)], True),
        ([Pulse(60.0, "starting", 0.0)], True),  # before Ctrl-C: it may train by now
        (None, True),
    ],
)
def test_ranks_that_have_trained_nothing_need_not_save(
    tmp_path: Path, pulses: list[Pulse] | None, is_training: bool
) -> None:
    remote = RemoteActor()
    remote.answers["pulses"] = None if pulses is None else dict(enumerate(pulses))
    watcher = Watcher(tmp_path, ScoreClient(remote), RunListeners(), LIMIT_S)
    ends = threading.Event()
    threading.Timer(0.5, ends.set).start()
    watcher.interrupt()
    time.sleep(0.01)
    watcher.call(lambda: None if ends.wait(10) else pytest.fail("the thread was not awaited"))
    assert ends.is_set() == is_training
    ends.wait(10)


def test_an_error_in_the_thread_reaches_the_caller(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path, ScoreClient(RemoteActor()), RunListeners(), LIMIT_S)
    with pytest.raises(ValueError, match="literal"):
        watcher.call(lambda: print(int("a")))


def test_a_person_who_waits_for_a_checkpoint_is_told_how_to_stop_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayprune.engine.monitoring._PATIENCE_S", 0.3)
    notices: list[str] = []
    remote = RemoteActor()
    with Watcher(tmp_path, ScoreClient(remote), RunListeners(on_notice=notices.append), LIMIT_S) as watcher:
        watcher.interrupt()
        assert watcher.is_interrupted
        deadline = time.monotonic() + 10
        while not notices and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
    assert [line for line in notices if "Ctrl-C" in line] == [
        "saving before the next step; press Ctrl-C again to stop without saving"
    ]
    assert ("pause", ()) in remote.calls


@pytest.mark.parametrize("ours", [lambda *_: None, signal.SIG_IGN], ids=["handled", "ignored"])
def test_handlers_that_a_library_replaces_are_restored(ours: Any) -> None:
    with on_sigterm(ours):
        with kept_handlers(signal.SIGTERM):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) == ours


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such\n  file"), "no such file"),
        (OSError("disk is full"), "OSError: disk is full"),
        (RuntimeError(), "RuntimeError"),
        (RayError("\x1b[36mray::train()\x1b[39m\n  File a.py\nValueError: lr is 0\n"), "RayError: ValueError: lr is 0"),
    ],
)
def test_an_error_is_one_line(error: BaseException, line: str) -> None:
    assert error_line(error) == line
