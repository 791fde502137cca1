"""Suspects where something was not observed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rayprune.core.audit.suspects import RULES, Evidence, find_suspects
from rayprune.errors import ConfigError

N, C = 600, 3
WRONG = np.arange(0, N, 8)


def evidence() -> Evidence:
    """Probabilities of a good network, and labels of which every eighth is wrong."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, C, N)
    labels = true.copy()
    labels[WRONG] = (true[WRONG] + 1) % C
    logits = rng.normal(size=(N, C))
    logits[np.arange(N), true] += 4.0
    probs = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    own = probs[np.arange(N), labels]
    others = probs.copy()
    others[np.arange(N), labels] = 0.0
    correct = (own > others.max(axis=1)).astype(np.float32)
    return Evidence(labels, probs, probs, -np.log(own)[None], (own - others.max(axis=1))[None], correct)


def unknown(values: np.ndarray) -> np.ndarray:
    return np.full_like(values, np.nan)


def test_without_margins_the_losses_rank_and_without_losses_the_model() -> None:
    whole = evidence()
    of_losses = find_suspects(replace(whole, margins=unknown(whole.margins)))
    of_model = find_suspects(replace(whole, margins=unknown(whole.margins), losses=unknown(whole.losses)))
    for found in (find_suspects(whole), of_losses, of_model):
        assert np.isin(np.argsort(-found.p_wrong)[: WRONG.size], WRONG).mean() > 0.9
    by_model = find_suspects(whole, "held_out")
    np.testing.assert_array_equal(of_model.p_wrong, by_model.p_wrong)
    assert not np.array_equal(of_losses.p_wrong, by_model.p_wrong)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_samples_without_dynamics_are_neither_first_nor_last(rule: str) -> None:
    whole, rows = evidence(), np.arange(1, N, 16)  # right labels
    losses, margins = whole.losses.copy(), whole.margins.copy()
    losses[:, rows] = margins[:, rows] = np.nan
    found = find_suspects(replace(whole, losses=losses, margins=margins), rule)
    assert np.isfinite(found.p_wrong).all()
    assert found.p_wrong[rows].mean() < 0.3
    assert np.median(found.p_wrong[WRONG]) > 0.6


def test_a_sample_without_predictions_has_the_noise_rate_of_its_label() -> None:
    whole = evidence()
    gone = np.arange(N) < 50
    found = find_suspects(replace(whole, held_out=np.where(gone[:, None], np.nan, whole.held_out)))
    rest = find_suspects(whole.of(~gone))
    np.testing.assert_array_equal(found.p_wrong[~gone], rest.p_wrong)
    rates = 1.0 - rest.model.joint.diagonal() / rest.model.joint.sum(axis=1)
    np.testing.assert_allclose(found.p_wrong[gone], rates[whole.labels[gone]], rtol=1e-6)
    np.testing.assert_array_equal(found.suggested[gone], whole.labels[gone])
    assert np.isnan(found.statistics["loss"][gone]).all()


def test_what_a_rule_cannot_do_without_is_named() -> None:
    whole = evidence()
    with pytest.raises(ConfigError, match=r"'margin' needs the margins .* audit\.rule=ensemble"):
        find_suspects(replace(whole, margins=unknown(whole.margins)), "margin")
    with pytest.raises(ConfigError, match="no sample has finite predictions"):
        find_suspects(replace(whole, held_out=unknown(whole.held_out)))
