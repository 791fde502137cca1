"""From evidence to suspects: every rule ranks noise above clean labels, calibration, order, ties, lost samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rayprune.config.experiments import AUDIT_RULES
from rayprune.core.audit.noise_model import NoiseModel
from rayprune.core.audit.suspects import RULES, Evidence, find_suspects, label_margins, normal_scores

NUM, CLASSES, RUNS = 600, 4, 3


def noisy_evidence(num: int = NUM, seed: int = 0) -> tuple[Evidence, np.ndarray]:
    """Evidence of three runs on labels of which a fifth is wrong, and a mask of those."""
    rng = np.random.default_rng(seed)
    true = rng.integers(CLASSES, size=num)
    wrong = rng.random(num) < 0.2
    given = np.where(wrong, (true + rng.integers(1, CLASSES, num)) % CLASSES, true)
    held_out, probs = (softmax(3 * np.eye(CLASSES)[true] + rng.normal(size=(num, CLASSES))) for _ in range(2))
    rows = np.arange(num)
    own = probs[rows, given]
    left_out = rng.integers(RUNS, size=num) == np.arange(RUNS)[:, None]
    losses = np.where(left_out, np.nan, -np.log(own) + rng.normal(scale=0.1, size=(RUNS, num)))
    margins = np.where(left_out, np.nan, own - 0.5 + rng.normal(scale=0.05, size=(RUNS, num)))
    arrays = (held_out, probs, losses, margins, (own > 0.5).astype(float))
    return Evidence(given, *(array.astype(np.float32) for array in arrays)), wrong


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def reordered(evidence: Evidence, rows: np.ndarray) -> Evidence:
    runs = {name: getattr(evidence, name)[:, rows] for name in ("losses", "margins")}
    others = {name: getattr(evidence, name)[rows] for name in ("labels", "held_out", "probs", "correct")}
    return Evidence(**runs, **others)


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """The share of pairs of a wrong and a right label whose scores are in this order."""
    difference = scores[wrong][:, None] - scores[~wrong]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def test_the_rules_are_those_of_the_config() -> None:
    assert tuple(RULES) == AUDIT_RULES


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_ranks_wrong_labels_first(rule: str) -> None:
    evidence, wrong = noisy_evidence()
    suspects = find_suspects(evidence, rule)
    assert suspects.p_wrong.dtype == np.float32
    assert ((suspects.p_wrong >= 0) & (suspects.p_wrong <= 1)).all()
    assert auc(suspects.p_wrong, wrong) > 0.9
    assert suspects.p_wrong.mean() == pytest.approx(suspects.model.noise_rate, abs=0.01)
    assert (suspects.suggested != evidence.labels).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_order_is_the_rules_and_the_mean_is_the_models(rule: str) -> None:
    evidence, _ = noisy_evidence()
    rows = np.arange(NUM)
    suspects, model = find_suspects(evidence, rule), find_suspects(evidence, "held_out")
    by_model = 1 - model.model.posterior(evidence.held_out, evidence.labels)[rows, evidence.labels]
    np.testing.assert_allclose(model.p_wrong, by_model, atol=1e-6)
    np.testing.assert_allclose(np.sort(suspects.p_wrong), np.sort(by_model), atol=0.03)  # equal ranks share a mean
    assert suspects.p_wrong.mean() == pytest.approx(by_model.mean(), abs=1e-6)
    ranking = RULES[rule](evidence, by_model.astype(np.float64))
    order = np.argsort(ranking, kind="stable")
    assert (np.diff(suspects.p_wrong[order]) >= 0).all()


def test_rankings_of_plain_statistics() -> None:
    evidence, _ = noisy_evidence(50)
    by_model, rows = np.linspace(0, 1, 50), np.arange(50)
    own = evidence.probs[rows, evidence.labels]
    margins, losses = np.nanmean(evidence.margins, axis=0), np.nanmean(evidence.losses, axis=0)
    expected = {"held_out": by_model, "probability": -own, "margin": -margins}
    for rule, values in expected.items():
        np.testing.assert_allclose(RULES[rule](evidence, by_model), values, rtol=1e-5)
    for label in range(CLASSES):
        mixture = RULES["loss_mixture"](evidence, by_model)[evidence.labels == label]
        assert (np.diff(mixture[np.argsort(losses[evidence.labels == label])]) >= -1e-12).all()
    ensemble = normal_scores(by_model) + normal_scores(-margins)
    np.testing.assert_allclose(RULES["ensemble"](evidence, by_model), ensemble)


def test_agreement_needs_a_high_loss_in_every_run() -> None:
    evidence, _ = noisy_evidence(4)
    losses = np.array([[5, 4, np.nan, 1], [1, 6, 5, 2], [9, np.nan, 7, 3]], dtype=np.float32)
    ranking = RULES["agreement"](replace(evidence, losses=losses), np.zeros(4))
    assert np.argsort(ranking).tolist()[-2:] == [1, 2]


def test_suggestions_are_the_likely_classes() -> None:
    evidence, wrong = noisy_evidence()
    suspects = find_suspects(evidence)
    rows = np.flatnonzero(wrong & (suspects.p_wrong > 0.5))
    assert rows.size > 50
    assert (suspects.suggested[rows] == evidence.held_out[rows].argmax(axis=1)).mean() > 0.95


def test_statistics() -> None:
    evidence, _ = noisy_evidence(30)
    found, rows = find_suspects(evidence).statistics, np.arange(30)
    np.testing.assert_array_equal(found["held_out_probability"], evidence.held_out[rows, evidence.labels])
    np.testing.assert_array_equal(found["probability"], evidence.probs[rows, evidence.labels])
    np.testing.assert_allclose(found["loss"], np.nanmean(evidence.losses, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found["margin"], np.nanmean(evidence.margins, axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found["correct"], evidence.correct)
    margins = [
        float(row[label] - max(row[other] for other in range(CLASSES) if other != label))
        for row, label in zip(evidence.held_out, evidence.labels, strict=True)
    ]
    np.testing.assert_allclose(found["held_out_margin"], margins, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_samples_is_irrelevant(rule: str) -> None:
    evidence, _ = noisy_evidence()
    order = np.random.default_rng(1).permutation(NUM)
    one, other = find_suspects(evidence, rule), find_suspects(reordered(evidence, order), rule)
    np.testing.assert_allclose(one.p_wrong[order], other.p_wrong, atol=1e-5)
    np.testing.assert_array_equal(one.suggested[order], other.suggested)


@pytest.mark.parametrize("rule", RULES)
def test_equal_samples_are_equally_suspect(rule: str) -> None:
    evidence, _ = noisy_evidence(40)
    twice = reordered(evidence, np.repeat(np.arange(40), 2))
    p_wrong = find_suspects(twice, rule).p_wrong.reshape(40, 2)
    np.testing.assert_allclose(p_wrong[:, 0], p_wrong[:, 1], atol=1e-5)
    same = find_suspects(reordered(evidence, np.zeros(20, dtype=int)), rule)
    np.testing.assert_allclose(same.p_wrong, same.p_wrong[0])


@pytest.mark.parametrize("rule", RULES)
def test_samples_that_no_run_could_predict_have_the_rate_of_their_label(rule: str) -> None:
    evidence, wrong = noisy_evidence()
    lost = np.arange(NUM) < 5
    values = {name: getattr(evidence, name).copy() for name in ("held_out", "probs", "losses", "margins", "correct")}
    for name in ("held_out", "probs", "correct"):
        values[name][lost] = np.nan
    for name in ("losses", "margins"):
        values[name][:, lost] = np.nan
    suspects = find_suspects(replace(evidence, **values), rule)
    others = find_suspects(reordered(evidence, np.flatnonzero(~lost)), rule)
    np.testing.assert_allclose(suspects.p_wrong[~lost], others.p_wrong, atol=1e-6)
    joint = suspects.model.joint
    rate = 1 - np.diag(joint) / joint.sum(axis=1)
    np.testing.assert_allclose(suspects.p_wrong[lost], rate[evidence.labels[lost]], atol=1e-6)
    assert auc(suspects.p_wrong[~lost], wrong[~lost]) > 0.9


def test_evidence_is_merged_over_the_runs() -> None:
    nan = np.nan
    runs = [
        {"probs": [[nan] * 2, [0.4, 0.6]], "held_out": [[0.1, 0.9], [nan] * 2], "loss": [nan, 2], "margin": [nan, 1]},
        {"probs": [[0.7, 0.3], [nan] * 2], "held_out": [[nan] * 2, [0.5, 0.5]], "loss": [3, nan], "margin": [4, nan]},
    ]
    correct = ([nan, 0.5], [1.0, nan])
    columns = [
        {name: np.array(column, dtype=np.float32) for name, column in {**run, "correct": share}.items()}
        for run, share in zip(runs, correct, strict=True)
    ]
    evidence = Evidence.of_runs(np.array([0, 1]), columns)
    np.testing.assert_allclose(evidence.probs, [[0.7, 0.3], [0.4, 0.6]])
    np.testing.assert_allclose(evidence.held_out, [[0.1, 0.9], [0.5, 0.5]])
    np.testing.assert_array_equal(evidence.losses, [[nan, 2], [3, nan]])
    np.testing.assert_array_equal(evidence.correct, [1.0, 0.5])
    nothing_left_out = [{**run, "held_out": np.zeros((2, 0), dtype=np.float32)} for run in columns]
    np.testing.assert_allclose(Evidence.of_runs(np.array([0, 1]), nothing_left_out).held_out, evidence.probs)


def test_margins_of_one_class_and_normal_scores_of_ties() -> None:
    assert label_margins(np.ones((2, 1), dtype=np.float32), np.zeros(2, dtype=np.int64)).tolist() == [1, 1]
    scores = normal_scores(np.array([2.0, 1.0, 2.0, 3.0, 2.0]))
    assert scores[0] == scores[2] == scores[4] == 0.0
    assert scores[3] == pytest.approx(1.2815516) == -scores[1]  # the normal quantile of 0.9


def test_two_samples() -> None:
    evidence, _ = noisy_evidence(2)
    suspects = find_suspects(evidence)
    assert isinstance(suspects.model, NoiseModel)
    assert np.isfinite(suspects.p_wrong).all()
