"""The report's tables and sentences: costs of runs, samples by score, settings, and gaps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from rayprune.report.read import EpochMetrics, RunRecord, read_run
from rayprune.report.tables import above_full, facts, headline, runs_table, samples_table


def test_samples_come_in_order_of_their_score(runs: list[Path]) -> None:
    scores = pd.read_parquet(runs[1] / "scores.parquet")
    for ascending in (False, True):
        expected = scores.sort_values("loss", ascending=ascending, kind="stable")["id"].head(7).tolist()
        table = samples_table(read_run(runs[1]), "loss", 7, ascending)
        assert [int(row[0]) for row in table.rows] == expected


def test_an_unknown_score_is_refused_with_the_closest(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"no column 'los'.*loss"):
        samples_table(read_run(runs[1]), "los")


def test_a_method_within_a_method_is_listed_without_unset_options(run: Path) -> None:
    inner = "{name: infobatch, prune_ratio: 0.5, target_saving: null, quantiles: []}"
    (run / "config.yaml").write_text(f"method: {{name: shuffled, of: {inner}}}\ntrain: {{epochs: 4}}\n")
    assert dict(facts(read_run(run)))["method"] == "shuffled (of (name infobatch, prune_ratio 0.5))"


def record(**values: object) -> RunRecord:
    """A run of InfoBatch over two epochs of 100 samples, of which the second pruned 40; `values` in its last line."""
    line = {"epoch": 0, "num_samples": 100, "kept": 100, "samples_trained": 100, "pruned_fraction": 0.0}
    line["seconds"] = {"epoch": 3.0, "validate": 1.0, "select": 0.25, "record": 0.25, "forward_only": 0.5}
    last = line | {"epoch": 1, "kept": 60, "samples_trained": 160, "val_accuracy": 0.875, "wall_time": 7.0, **values}
    config = {"method": {"name": "infobatch"}, "train": {"epochs": 2}}
    return RunRecord(Path("run"), "run", config, {}, [EpochMetrics.model_validate(each) for each in (line, last)])


def test_a_runs_costs_are_those_of_all_epochs() -> None:
    table = runs_table([record(compute=170.0, samples_padded=10)])
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["saved"], row["compute"]) == ("20.0%", "85.0%")
    assert (row["train s"], row["selection s"], row["wall s"]) == ("4.0", "2.00", "7.0")


def test_a_scoring_run_counts_as_a_cost() -> None:
    seconds = {"epoch": 5.0, "validate": 0.0, "select": 1.0}
    run = record(samples_collected=50, samples_trained=210, seconds_collected=seconds)
    assert run.saved == pytest.approx(1 - 210 / 200)
    assert (run.training_seconds, run.seconds("select")) == (9.0, 1.5)
    assert (
        headline(run)[0] == "infobatch took 5.0% more than the sample visits of full training over the same 2 epochs."
    )


def test_a_saving_of_nothing_is_never_minus_zero() -> None:
    run = record(kept=100, samples_trained=200, samples_collected=0)
    assert runs_table([run]).rows[0][4] == "0.0%"
    assert runs_table([record(kept=100, samples_collected=0, num_samples=100)]).rows[0][4] == "0.0%"
    assert "-0.0" not in str(runs_table([record(kept=100, val_accuracy=-1e-9)]).rows)


def test_the_headline_of_a_run_says_what_was_saved_at_what_cost_and_against_what() -> None:
    lines = headline(record(compute=170.0))
    assert lines[0] == "infobatch saved 20.0% of the sample visits of full training over the same 2 epochs."
    assert "85.0% of training on all samples. Selection took 2.00 of 4.0 train s." in lines[1]
    assert "Validation accuracy 87.50% after epoch 2. Only a run on all samples shows" in lines[2]


def test_rows_that_are_skipped_inside_batches_are_saved_and_their_forward_passes_told() -> None:
    run = record(kept=100, samples_trained=150, samples_skipped=50, samples_forwarded=100, compute=183.3)
    assert run.saved == pytest.approx(0.25)
    lines = headline(run)
    assert lines[0] == "infobatch saved 25.0% of the sample visits of full training over the same 2 epochs."
    assert lines[1].startswith("It skipped 50 rows inside batches. 100 rows had a forward pass alone")
    assert dict(facts(run))["rows"] == "150 trained on, 100 forwarded"
    budget = record(kept=100, samples_trained=150, samples_skipped=50, selection={"budget_so_far": 1.0})
    assert dict(facts(budget))["kept so far"] == "75.0% of the sample visits of a full run"


def test_the_headline_of_an_unfinished_run_says_so() -> None:
    run = record()
    unfinished = RunRecord(Path("run"), "run", {**run.config, "train": {"epochs": 9}}, {}, run.metrics)
    assert headline(unfinished)[0].endswith("over the same 2 epochs, so far.")


def test_full_training_has_nothing_to_save(runs: list[Path]) -> None:
    lines = headline(read_run(runs[0]))
    assert lines[0] == "4 epochs on all samples."
    assert "saved" not in " ".join(lines)


def test_compute_above_full_training_is_explained() -> None:
    assert above_full([record(compute=200.0, samples_padded=40)]) == []
    (padded,) = above_full([record(compute=210.0, samples_padded=50)])
    assert padded == "run, compute above 100%: 50 rows of padding fill the last batch of each epoch"
    (scored,) = above_full([record(compute=210.0, samples_forwarded=150, samples_collected=20)])
    assert "150 samples of forward-only passes count a third; the scoring run trained on 20 samples" in scored
