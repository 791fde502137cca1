"""Scores of training visits against the arrays of published programs, and against transcriptions without NumPy.

ccs_dynamics.npz is of the program of CCS (arXiv 2210.15809), dual_*.npz of that of DUAL (arXiv 2502.06905).

Shapes: T epochs, N samples, C classes, J window.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.methods.dual import beta_parameters, log_beta_weights
from rayprune.nn.signals import compute_signals
from tests.support.paths import GOLDEN


def golden(name: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def visited(config: dict[str, Any], num_samples: int, seed: int = 0, labels: Any = None) -> Selector:
    method = build_method(config)
    return Selector(method, num_samples, method.collect_epochs + 1, seed, labels)


def on_logits(
    config: dict[str, Any], logits_TNC: NDArray[Any], targets_N: NDArray[Any], index_TN: NDArray[Any] | None = None
) -> Selector:
    """Observe the signals of logits as a train step computes them; row n of epoch t is the id index_TN[t, n]."""
    selector = visited(config, targets_N.size)
    for epoch, logits_NC in enumerate(logits_TNC[: selector.method.collect_epochs]):
        selector.begin_epoch(epoch)
        ids = np.arange(targets_N.size) if index_TN is None else index_TN[epoch]
        logits, targets = torch.from_numpy(logits_NC), torch.from_numpy(targets_N[ids])
        signals = compute_signals(selector.method.signals, logits, targets, torch.zeros(ids.size))
        selector.observe(ids, {name: values.numpy() for name, values in signals.items()}, epoch)
    return selector


def on_values(config: dict[str, Any], values_TN: NDArray[Any], seed: int = 0) -> Selector:
    """Observe one signal."""
    selector = visited(config, values_TN.shape[1], seed)
    for epoch, values_N in enumerate(values_TN):
        selector.observe(np.arange(values_N.size), {selector.method.signals[0]: values_N}, epoch)
    return selector


def scores_of(selector: Selector) -> NDArray[Any]:
    (scores,) = selector.scores().values()
    return scores


# CCS's program


def ccs_dynamics(config: dict[str, Any]) -> NDArray[Any]:
    stored = golden("ccs_dynamics")
    config = {"score_epochs": len(stored["logits"]), **config}
    return scores_of(on_logits(config, stored["logits"], stored["targets"], stored["index"]))


def test_forgetting_equals_ccs_where_never_learned_counts_zero() -> None:
    stored = golden("ccs_dynamics")
    assert ccs_dynamics({"name": "forgetting", "never_learned": "zero"}).tolist() == stored["forgetting"].tolist()
    # The default is the paper's treatment, which is another one for the 11 samples that were never learned.
    never = stored["correctness"] == 0
    assert np.count_nonzero(never) == 11
    assert stored["forgetting"][never].tolist() == [0] * 11
    scores = ccs_dynamics({"name": "forgetting"})
    assert scores[never].tolist() == [12.0] * 11
    assert scores[~never].tolist() == stored["forgetting"][~never].tolist()
    assert scores[~never].max() < 12


def test_aum_equals_ccs() -> None:
    stored = golden("ccs_dynamics")
    scores = ccs_dynamics({"name": "aum"})
    # The program sums, and its log-probabilities are float16.
    np.testing.assert_allclose(12 * scores, stored["aum"], rtol=0, atol=1e-3)
    assert ccs_dynamics({"name": "ccs"}).tobytes() == scores.tobytes()
    of_logits = ccs_dynamics({"name": "aum", "margin_of": "logits"})
    assert np.abs(12 * of_logits - stored["aum"]).max() > 1
    logits, targets = stored["logits"].astype(np.float64), stored["targets"]
    for sample in range(40):
        rows = [epoch[list(index).index(sample)] for epoch, index in zip(logits, stored["index"], strict=True)]
        margins = [row[targets[sample]] - max(np.delete(row, targets[sample])) for row in rows]
        assert of_logits[sample] == pytest.approx(math.fsum(margins) / 12, abs=1e-5)


def test_el2n_equals_ccs() -> None:
    stored = golden("ccs_dynamics")
    for config in ({"score_epochs": 10}, {"last_epoch": 10}):
        scores = ccs_dynamics({"name": "el2n", **config})
        np.testing.assert_allclose(10 * scores, stored["el2n_sum_first10"], rtol=0, atol=1e-3)
    for config in ({}, {"first_epoch": 1, "last_epoch": 11}):
        assert np.abs(10 * ccs_dynamics({"name": "el2n", **config}) - stored["el2n_sum_first10"]).max() > 0.05


def test_the_strata_of_ccs_have_the_programs_budgets() -> None:
    stored = golden("ccs_strat_r0.1_m0.3")
    config = {"name": "ccs", "score_epochs": 1, "prune_ratio": 0.9, "drop_hardest": 0.3}
    scores, easy = stored["score"], stored["easy_index"]
    low, high = scores[easy].min(), scores[easy].max() * 1.0001
    bins = np.minimum((scores - low) / ((high - low) / 50), 49).astype(int)
    draws = []
    for seed in range(3):
        selection = on_values(config, scores[None], seed).begin_epoch(1)
        assert np.isin(selection.ids, easy).all()
        assert np.bincount(bins[selection.ids], minlength=50).tolist() == stored["budgets"].tolist()
        draws.append(selection.ids.tolist())
    assert draws[0] != draws[1] != draws[2]
    # Without strata the budgets are others, and without the cut the hardest samples are drawn too.
    lowest = on_values({**config, "rule": None}, scores[None]).begin_epoch(1).ids
    assert np.bincount(bins[lowest], minlength=50).tolist() != stored["budgets"].tolist()
    assert not np.isin(on_values({**config, "drop_hardest": 0.0}, scores[None]).begin_epoch(1).ids, easy).all()


# DUAL's program


@pytest.mark.parametrize("window", [5, 10])
@pytest.mark.parametrize("name", ["dyn_unc", "dual"])
def test_windows_equal_duals_program(name: str, window: int) -> None:
    stored = golden("dual_dynunc_small")
    config = {"name": name, "score_epochs": 14, "window_size": window}
    scores = scores_of(on_logits(config, stored["logits_by_index"], stored["targets"]))
    expected = stored[f"{name.replace('_', '')}_W{window}"]
    np.testing.assert_allclose(10 * scores, expected, rtol=1e-5, atol=1e-6)
    # Known-wrong formulas give other scores: without the last window, and with J in the denominator.
    windows = np.lib.stride_tricks.sliding_window_view(stored["target_probs"].astype(np.float64), window, axis=0)
    factor = 1.0 if name == "dyn_unc" else 1.0 - windows.mean(axis=-1)
    right = (windows.std(axis=-1, ddof=1) * factor).mean(axis=0)
    np.testing.assert_allclose(scores, right, rtol=1e-5, atol=1e-6)
    for wrong in ((windows.std(axis=-1, ddof=1) * factor)[:-1], windows.std(axis=-1) * factor):
        assert np.abs(wrong.mean(axis=0) - right).max() > 1e-3


def test_forgetting_and_el2n_equal_duals_program() -> None:
    stored = golden("dual_dynunc_small")
    logits, targets = stored["logits_by_index"], stored["targets"]
    config = {"name": "forgetting", "score_epochs": 14, "never_learned": "zero"}
    assert scores_of(on_logits(config, logits, targets)).tolist() == stored["forgetting"].tolist()
    config = {"name": "el2n", "score_epochs": 4, "first_epoch": 3}
    np.testing.assert_allclose(scores_of(on_logits(config, logits, targets)), stored["el2n_ep3"], rtol=1e-5)
    last = compute_signals(["entropy"], torch.from_numpy(logits[-1]), torch.from_numpy(targets), torch.zeros(64))
    np.testing.assert_allclose(last["entropy"], stored["entropy_last"], rtol=0, atol=1e-6)


def test_beta_sampling_has_the_programs_weights() -> None:
    stored = golden("dual_beta_p0.3")
    config = {"name": "dual", "score_epochs": 14, "window_size": 5, "prune_ratio": 0.3, "beta_sampling": True}
    selector = on_values(config, stored["target_probs"])
    scores, means = scores_of(selector), selector.table["mean_prob"]
    np.testing.assert_allclose(10 * scores, stored["score"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(means, stored["target_probs"].astype(np.float64).mean(axis=0), rtol=1e-12)
    a, b = beta_parameters(means, scores, 0.3)
    assert (a, b) == pytest.approx((float(stored["y_a"]), float(stored["y_b"])), abs=1e-5)
    assert abs(beta_parameters(means, scores, 0.3, power=6.0)[1] - b) > 0.05
    # One constant, that of the Beta distribution, is left out.
    expected = np.log(stored["pdf"]) + np.log(scores.astype(np.float64))
    constant = log_beta_weights(means, scores, a, b) - expected
    np.testing.assert_allclose(constant, constant[0], rtol=0, atol=1e-4)
    assert constant[0] == pytest.approx(math.lgamma(a) + math.lgamma(b) - math.lgamma(16), abs=1e-4)
    selection = selector.begin_epoch(14)
    # 64 − floor(0.3·64); the program keeps int((1 − 0.3)·64), one less.
    assert (selection.num_kept, stored["selected"].size) == (45, 44)
    facts = {name: selection.facts[name] for name in ("score", "beta_a", "beta_b")}
    assert facts == {"score": "dual", "beta_a": round(a, 6), "beta_b": round(b, 6)}


def test_the_draw_of_beta_sampling_has_the_probabilities_of_its_weights() -> None:
    values_TN = np.random.default_rng(1).beta(2, 2, (4, 5)).astype(np.float32)
    config = {"name": "dual", "score_epochs": 4, "window_size": 2, "prune_ratio": 0.6, "beta_sampling": True}
    first = on_values(config, values_TN)
    scores, means = scores_of(first), first.table["mean_prob"]
    weights = np.exp(log_beta_weights(means, scores, *beta_parameters(means, scores, 0.6)))
    weights /= weights.sum()
    expected: Counter[int] = Counter()
    for one, other in permutations(range(5), 2):
        probability = weights[one] * weights[other] / (1 - weights[one])
        expected.update({one: probability, other: probability})
    num_draws, counts = 4000, Counter[int]()
    for seed in range(num_draws):
        first.seed, first.epoch = seed, -1
        counts.update(first.begin_epoch(4).ids.tolist())
    shares = [counts[sample] / num_draws for sample in range(5)]
    assert shares == pytest.approx([expected[sample] for sample in range(5)], abs=4 * 0.5 / math.sqrt(num_draws))
    assert max(shares) - min(shares) > 0.2, "the weights matter"


# Transcriptions


def naive_windows(values_T: list[float], window: int, dual: bool) -> float:
    parts = [values_T[k : k + window] for k in range(len(values_T) - window + 1)]
    return statistics.fmean(statistics.stdev(p) * (1 - statistics.fmean(p) if dual else 1) for p in parts)


def naive_forgetting(correct_T: list[bool], paper: bool) -> int:
    if paper and not any(correct_T):
        return len(correct_T)
    return sum(before and not now for before, now in pairwise(correct_T))


@given(st.integers(0, 2**32 - 1), st.integers(2, 15), st.integers(2, 15), st.booleans())
def test_windows_equal_the_transcription(seed: int, length: int, window: int, dual: bool) -> None:
    window = min(window, length)
    rng = np.random.default_rng(seed)
    values_TN = rng.random((length, int(rng.integers(1, 30)))).astype(np.float32)
    values_TN[:, : rng.integers(0, 4)] = rng.choice([0.0, 0.1, 1.0])
    config = {"name": "dual" if dual else "dyn_unc", "score_epochs": length, "window_size": window}
    scores = scores_of(on_values(config, values_TN))
    expected = [naive_windows(column.astype(float).tolist(), window, dual) for column in values_TN.T]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 15), st.booleans())
def test_forgetting_equals_the_transcription(seed: int, length: int, paper: bool) -> None:
    rng = np.random.default_rng(seed)
    correct_TN = rng.random((length, int(rng.integers(1, 30)))) < rng.choice([0.1, 0.5, 0.9])
    never_learned = "most_forgettable" if paper else "zero"
    config = {"name": "forgetting", "score_epochs": length, "never_learned": never_learned}
    scores = scores_of(on_values(config, correct_TN))
    assert scores.tolist() == [naive_forgetting(column.tolist(), paper) for column in correct_TN.T]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([1.0, 1e-30, 1e30]))
def test_means_equal_the_transcription(seed: int, length: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values_TN = (rng.normal(size=(length, int(rng.integers(1, 30)))) * scale).astype(np.float32)
    first = int(rng.integers(0, length))
    last = int(rng.integers(first + 1, length + 1))
    config = {"name": "el2n", "score_epochs": length, "first_epoch": first, "last_epoch": last}
    expected = [statistics.fmean(column[first:last].astype(float)) for column in values_TN.T]
    np.testing.assert_allclose(scores_of(on_values(config, values_TN)), expected, rtol=1e-6, atol=1e-8 * scale)
    aum = scores_of(on_values({"name": "aum", "score_epochs": length}, values_TN))
    expected = [statistics.fmean(column.astype(float)) for column in values_TN.T]
    np.testing.assert_allclose(aum, expected, rtol=1e-6, atol=1e-8 * scale)
