"""The record of looks: which judgment is a new one, and which looks count for the seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rayprune.config.experiments import CompareSection
from rayprune.experiments.compare.looks import Criteria, Looks, criteria_of
from rayprune.experiments.compare.statistics import ArmRuns, RunOutcome


def arms_of(num_seeds: int, timed: list[int]) -> list[ArmRuns]:
    """Return full training with so many seeds, some of them timed."""
    costs: dict[str, Any] = dict.fromkeys(("samples_trained", "samples_forwarded", "compute", "flops", "seconds"), 1.0)
    runs = [
        RunOutcome(seed, f"full-seed{seed}", 1, "", 90.0, 80.0, **costs, learning_rate=0.1, mean_step_scale=1.0)
        for seed in range(num_seeds)
    ]
    return [ArmRuns("full", "full", "", runs, np.ones((num_seeds, 10), bool), timed)]


def judged(folder: Path, num_seeds: int, timed: list[int], **keys: Any) -> Criteria:
    """Judge a comparison and store the record, as `compare` does."""
    section = CompareSection(seeds=num_seeds, **keys)
    looks = Looks(folder, section)
    criteria, record = looks.judge(criteria_of(section, 1), arms_of(num_seeds, timed))
    report = {"seeds": list(range(num_seeds)), "first_confidence": section.confidence, "looks": record, "arms": []}
    (folder / "compare.json").write_text(json.dumps(report))
    return criteria


def test_only_new_timed_seeds_are_a_look_at_the_seconds(tmp_path: Path) -> None:
    first = [0, 1, 2]
    found = [
        judged(tmp_path, 3, first),
        judged(tmp_path, 6, first),
        judged(tmp_path, 12, list(range(6))),
        judged(tmp_path, 24, list(range(6))),
        judged(tmp_path, 3, first),
    ]
    assert [(criteria.look, criteria.time_look) for criteria in found] == [(1, 1), (2, 1), (3, 2), (4, 2), (1, 1)]


def test_another_margin_is_another_look(tmp_path: Path) -> None:
    assert [judged(tmp_path, 3, [0], margin=margin).look for margin in (1.0, 2.0, 1.0)] == [1, 2, 1]
    assert judged(tmp_path, 3, [0], margin=1.0, rival_margin=0.5).look == 3


def test_the_record_survives_a_single_seed(tmp_path: Path) -> None:
    assert judged(tmp_path, 1, [0]).look == 1
    assert judged(tmp_path, 2, [0, 1]).look == 1
