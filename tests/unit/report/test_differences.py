"""Which settings tell runs apart: against the defaults, and against each other."""

from __future__ import annotations

from pathlib import Path

from rayprune.config import make_config
from rayprune.report.differences import from_defaults, from_each_other
from rayprune.report.read import EpochMetrics, RunRecord

LINE = EpochMetrics(epoch=0, num_samples=10, samples_trained=10, pruned_fraction=0.0)


def record(**sections: object) -> RunRecord:
    config = make_config({"run": {"name": "any"}, **sections}).model_dump(mode="json")
    return RunRecord(Path("run"), "run", config, {}, [LINE])


def test_a_run_differs_from_the_defaults_of_its_own_method() -> None:
    assert from_defaults(record()) == "nothing"
    method = {"name": "infobatch", "prune_ratio": 0.5, "ema": 0.9}
    run = record(method=method, train={"epochs": 5, "step": "l2w"}, run={"storage_path": "elsewhere"})
    assert from_defaults(run) == "method.name = infobatch, method.ema = 0.9, train.epochs = 5, train.step.name = l2w"


def test_runs_differ_in_what_they_do_not_share() -> None:
    schedule = {"schedule": "linear", "start": 0.0, "end": 0.5}
    full, slow, infobatch = (
        record(),
        record(optim={"lr": 0.05}),
        record(method={"name": "infobatch", "prune_ratio": schedule}),
    )
    assert from_each_other([full, slow]) == ["optim.lr = 0.1", "optim.lr = 0.05"]
    first, second = from_each_other([full, infobatch])
    assert first == "method.name = full"
    assert second.startswith("method.name = infobatch, method.prune_ratio = {schedule: linear, start: 0")
    assert "anneal_start" not in second  # at its default
    assert from_each_other([full, full]) == ["nothing", "nothing"]


def test_a_method_of_a_file_that_is_gone_is_listed() -> None:
    run = RunRecord(Path("run"), "run", {"method": {"name": "gone.py:Mine", "ratio": 0.3}}, {}, [LINE])
    assert from_defaults(run) == "method.name = gone.py:Mine, method.ratio = 0.3"


def test_a_config_that_is_missing_differs_in_nothing() -> None:
    assert from_defaults(RunRecord(Path("run"), "run", {}, {}, [LINE])) == "nothing"
