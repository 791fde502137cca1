"""Threshold samples: draws, the columns of a run without them, and a whole audit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rayprune.core.audit.threshold_samples import (
    draw_threshold_samples,
    rate_by_threshold_samples,
    without_threshold_samples,
)
from rayprune.errors import ConfigError
from rayprune.experiments.audit.runner import audit, evidence_of
from rayprune.sources import open_data
from rayprune.sources.threshold_samples import with_threshold_samples
from tests.support.audits import audit_config, noisy_digits


def test_runs_draw_different_samples_until_none_is_left() -> None:
    runs = [draw_threshold_samples(1003, 9, seed=3, number=number) for number in range(10)]
    assert {run.size for run in runs} == {100}
    assert np.unique(np.concatenate(runs)).size == 1000
    assert draw_threshold_samples(1003, 9, seed=4).tolist() != runs[0].tolist()
    assert draw_threshold_samples(2, 9, seed=0, number=5).size == 1


def test_margins_are_relative_to_the_99th_percentile() -> None:
    rng = np.random.default_rng(0)
    margins, drawn = rng.normal(size=60).astype(np.float32), np.arange(0, 60, 3)
    margins[3] = np.nan  # left out of the run
    probs = rng.dirichlet([1.0, 1.0, 2.0], 60).astype(np.float32)
    probs[7], probs[8] = [0, 0, 1], np.nan
    columns = {"probs": probs, "held_out": probs[::-1], "loss": rng.random(60).astype(np.float32), "margin": margins}
    columns |= {"correct": np.ones(60, dtype=np.float32), "visits": np.ones(60, dtype=np.int32)}
    found = without_threshold_samples(columns, drawn)
    assert set(found) == {"probs", "held_out", "loss", "margin", "correct"}
    ordered = sorted(margins[sample] for sample in drawn if sample != 3)
    place = 0.99 * (len(ordered) - 1)
    threshold = ordered[int(place)] + (place - int(place)) * (ordered[int(place) + 1] - ordered[int(place)])
    own = np.setdiff1d(np.arange(60), drawn)
    np.testing.assert_allclose(found["margin"][own], margins[own] - threshold, atol=1e-6)
    for name in ("margin", "loss", "correct"):
        assert np.isnan(found[name][drawn]).all()
        assert np.isfinite(found[name][own]).all()
    assert np.isnan(found["probs"][drawn]).all()
    np.testing.assert_allclose(found["probs"][10], probs[10, :2] / probs[10, :2].sum(), rtol=1e-6)
    assert found["probs"][7].tolist() == [0.5, 0.5]
    assert np.isnan(found["probs"][8]).all()
    np.testing.assert_allclose(found["held_out"][59], probs[0, :2] / probs[0, :2].sum(), rtol=1e-6)


def test_the_rate_is_the_share_below_the_thresholds() -> None:
    margins = np.float32([[1.0, -1.0, np.nan, 0.0, np.nan], [-0.5, 2.0, -3.0, 0.0, np.nan]])
    assert rate_by_threshold_samples(margins) == 0.5
    assert np.isnan(rate_by_threshold_samples(margins[:, 4:]))


def test_data_with_an_extra_class() -> None:
    data = {"source": "digits", "limit": 300}
    plain, splits = open_data(**data), with_threshold_samples(data, seed=2, number=1)
    drawn = draw_threshold_samples(300, 10, 2, 1)
    expected = plain.train.labels.copy()
    expected[drawn] = 10
    assert splits.train.labels.tolist() == expected.tolist()
    assert splits.train.take(np.arange(300))["label"].tolist() == expected.tolist()
    assert splits.train.schema.num_classes == 11
    assert splits.train.schema.class_names == plain.train.schema.class_names
    assert splits.train.fingerprint != plain.train.fingerprint
    assert splits.validation is not None
    assert plain.validation is not None
    assert splits.validation.schema.num_classes == 11
    assert splits.validation.labels.tolist() == plain.validation.labels.tolist()


def test_an_audit_with_threshold_samples(tmp_path: Path) -> None:
    digits = noisy_digits(tmp_path)
    settings = {"threshold_samples": True, "rule": "margin", "duplicates": False}
    config = audit_config(digits.path, tmp_path, audit=settings)
    found = audit(config)
    assert roc_auc_score(digits.wrong, found.table.p_wrong) > 0.95
    assert found.summary["noise_rate_threshold_samples"] == pytest.approx(digits.wrong.mean(), abs=0.08)
    margins = found.table.statistics["margin"]
    assert (margins <= 0).mean() == pytest.approx(found.summary["noise_rate_threshold_samples"], abs=0.005)
    assert roc_auc_score(digits.wrong, -margins) > 0.95
    evidence = evidence_of(config, found.table.label)
    assert evidence.held_out.shape == (604, 10)
    np.testing.assert_allclose(evidence.held_out.sum(axis=1), 1.0, rtol=1e-5)
    # A run leaves out a third of the samples, and 54 others are its threshold samples.
    trained = np.isfinite(evidence.margins).sum(axis=1)
    assert (abs(trained - (604 * 2 / 3 - 54 * 2 / 3)) < 20).all()


def test_one_fold_is_refused(tmp_path: Path) -> None:
    digits = noisy_digits(tmp_path)
    config = audit_config(digits.path, tmp_path, audit={"threshold_samples": True, "folds": 1})
    with pytest.raises(ConfigError, match="use more folds"):
        audit(config)
