"""The Pareto front and the tables of a sweep, from made-up trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.cli.sweep import say_results
from rayprune.config import load_config, make_config
from rayprune.engine.storage.costs import PriorCost, costs_of
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.experiments.folder import ExperimentFolder
from rayprune.experiments.sweep.folder import (
    TrialState,
    finished_rows,
    mark_front,
    pareto_front,
    read_states,
    result_row,
    write_results,
    write_state,
)
from rayprune.experiments.sweep.space import sweep_digest
from rayprune.report.plots.experiments import save_pareto

SPACE = {"method.name": ["infobatch", "random_epoch"], "method.prune_ratio": [0.3, {"schedule": "linear", "end": 0.6}]}
# Few different values, so that ties occur.
_small = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(_small, _small), max_size=12))
def test_the_front_has_exactly_the_points_that_none_dominates(points: list[tuple[float, float]]) -> None:
    front = pareto_front([gain for gain, _ in points], [cost for _, cost in points])
    for (gain, cost), flag in zip(points, front, strict=True):
        dominated = any(g >= gain and c <= cost and (g > gain or c < cost) for g, c in points)
        assert flag == (not dominated)


@given(st.lists(st.tuples(_small, _small), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(points: list[tuple[float, float]], random: Any) -> None:
    shuffled = random.sample(points, len(points))
    both = [
        sorted(p for p, flag in zip(order, pareto_front(*zip(*order, strict=True)), strict=True) if flag)
        for order in (points, shuffled)
    ]
    assert both[0] == both[1] != []


def test_nan_is_never_on_the_front() -> None:
    assert pareto_front([float("nan"), 0.5, 0.9], [0.0, 1.0, float("nan")]) == [False, True, False]


def trial(
    folder: Path, state: TrialState, accuracies: list[float], compute: float, flops: int = 7, **collected: Any
) -> None:
    write_state(folder, state)
    lines = [
        {
            "epoch": epoch,
            "num_samples": 100,
            "val_accuracy": accuracy,
            "samples_trained": 80 * (epoch + 1),
            "samples_forwarded": 0,
            "compute": compute * (epoch + 1),
            "wall_time": float(epoch + 1),
            "seconds": {"epoch": 0.9, "validate": 0.2},
            **{**PriorCost().metrics, **collected},
        }
        for epoch, accuracy in enumerate(accuracies)
    ]
    file = folder / "trials" / state.name / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file.with_name("environment.json").write_text(json.dumps({"forward_flops_per_sample": flops}))


def swept(folder: Path) -> list[dict[str, Any]]:
    ramp = SPACE["method.prune_ratio"][1]
    trial(
        folder,
        TrialState("000-a", {"method.name": "infobatch", "method.prune_ratio": 0.3}, "finished"),
        [0.5, 0.9, 0.8],
        80,
    )
    trial(
        folder,
        TrialState("001-b", {"method.name": "infobatch", "method.prune_ratio": ramp}, "finished"),
        [0.7, 0.7, 0.7],
        90,
    )
    trial(
        folder,
        TrialState("002-c", {"method.name": "random_epoch", "method.prune_ratio": 0.3}, "finished"),
        [0.6, 0.6, 0.6],
        50,
    )
    trial(
        folder, TrialState("003-d", {"method.name": "random_epoch", "method.prune_ratio": ramp}, "stopped"), [0.1], 40
    )
    broken = {"method.name": "random_epoch", "method.prune_ratio": 0.9}
    write_state(folder, TrialState("004-e", broken, "failed", "losses were NaN"))
    return mark_front([result_row(folder, state) for state in read_states(folder).values()])


def test_a_row_has_the_last_epoch_not_the_best(tmp_path: Path) -> None:
    first, _, _, stopped, failed = swept(tmp_path)
    assert (first["val_accuracy"], first["epochs"], first["compute"], first["compute_share"]) == (0.8, 3, 240, 0.8)
    assert first["flops"] == 3 * 7 * 240  # a step is three forward passes
    assert stopped["epochs"] == 1
    assert (failed["val_accuracy"], failed["error"]) == (None, "losses were NaN")


def test_only_finished_trials_are_on_the_front(tmp_path: Path) -> None:
    assert [row["pareto"] for row in swept(tmp_path)] == [True, False, True, False, False]


def test_tables_and_configs_are_written(tmp_path: Path) -> None:
    base = make_config({"sweep": {"space": SPACE}, "train": {"epochs": 3}})
    rows = swept(tmp_path)
    write_results(tmp_path, base, rows)
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert list(table["trial"]) == [row["trial"] for row in rows]
    assert list(table["method.prune_ratio"])[:2] == ["0.3", "{schedule: linear, end: 0.6}"]
    assert table["epochs"].isna().sum() == 1
    assert list(pd.read_csv(tmp_path / "results.csv")["status"]) == list(table["status"])
    configs = sorted((tmp_path / "pareto").iterdir())
    assert [file.stem for file in configs] == ["000-a", "002-c"]
    config = load_config(configs[1])
    assert (config.method["name"], config.method["prune_ratio"]) == ("random_epoch", 0.3)
    assert config.sweep.space == {}
    write_results(tmp_path, base, mark_front(rows[1:]))  # a second time, with another front
    assert [file.stem for file in sorted((tmp_path / "pareto").iterdir())] == ["001-b", "002-c"]
    assert not list(tmp_path.glob("*.partial"))


def test_the_table_is_sorted_by_accuracy_with_the_front_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say_results(swept(tmp_path), list(SPACE))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:6]] == ["000-a", "001-b", "002-c", "003-d", "004-e"]
    assert [line.startswith("*") for line in lines[1:6]] == [True, False, True, False, False]
    assert lines[6] == "failed   004-e: losses were NaN"


def test_the_front_compares_flops_between_networks(tmp_path: Path) -> None:
    for name, compute, flops in (("000-a", 90.0, 100), ("001-b", 80.0, 1000)):
        trial(tmp_path, TrialState(name, {"model.name": name}, "finished"), [0.8], compute, flops)
    rows = mark_front([result_row(tmp_path, state) for state in read_states(tmp_path).values()])
    assert [row["pareto"] for row in rows] == [True, False]


def test_a_scoring_run_is_shared_only_if_requested(tmp_path: Path) -> None:
    state = TrialState("000-a", {"method.name": "tdds"}, "finished")
    collected = {
        "samples_collected": 120,
        "samples_forwarded_collected": 0,
        "compute_collected": 120.0,
        "wall_time_collected": 1.0,
        "seconds_collected": {"epoch": 0.8, "validate": 0.2},
    }
    trial(tmp_path, state, [0.5, 0.9, 0.8], 80, **collected)
    folder = tmp_path / "trials" / "000-a"
    whole, part = (costs_of(folder, read_metrics(folder), share) for share in (1, 4))
    assert (whole.samples_trained, part.samples_trained) == (240, 240 - 90)
    assert (whole.compute, part.compute) == (240.0, 150.0)
    assert (whole.flops, part.flops) == (3 * 7 * 240, 3 * 7 * 150)
    assert (round(whole.seconds, 6), round(part.seconds, 6)) == (2.7, 2.25)
    assert (whole.wall_time, part.wall_time) == (3.0, 2.25)
    assert result_row(tmp_path, state, 4)["compute"] == 150.0


def test_a_sweep_is_finished_when_all_its_trials_have_ended(tmp_path: Path) -> None:
    base = make_config({"sweep": {"space": {"train.seed": [0, 1]}}, "train": {"epochs": 3}})
    experiment = ExperimentFolder(tmp_path, "sweep.yaml", sweep_digest)

    def sweep(second: str) -> list[dict[str, Any]]:
        with experiment.open(base):
            for seed, status in enumerate(("finished", second)):
                trial(tmp_path, TrialState(f"00{seed}-a", {"train.seed": seed}, status), [0.5], 80)
            rows = mark_front([result_row(tmp_path, state) for state in read_states(tmp_path).values()])
            write_results(tmp_path, base, rows)
            return rows

    assert finished_rows(base, tmp_path) is None
    for status in ("unfinished", "failed"):
        sweep(status)
        assert finished_rows(base, tmp_path) is None
    for status in ("stopped", "finished"):
        rows = sweep(status)
        assert finished_rows(base, tmp_path) == rows
    longer = make_config({"sweep": {"space": {"train.seed": [0, 1]}}, "train": {"epochs": 4}})
    assert finished_rows(longer, tmp_path) is None
    with experiment.open(base):  # a start that was stopped before it wrote results
        pass
    assert finished_rows(base, tmp_path) is None


def test_the_plot_is_a_png_file(tmp_path: Path) -> None:
    write_results(tmp_path, make_config({"sweep": {"space": SPACE}}), swept(tmp_path))
    file = save_pareto(tmp_path)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob("*.partial"))
