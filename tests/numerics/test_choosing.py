"""Strata and the middle against the reference programs, and against a naive transcription of the paper.

tests/golden/ccs_strat_*.npz and moderate_distance.npz hold the choices of the programs published with CCS (arXiv
2210.15809) and Moderate (ICLR 2023) on synthetic scores.

Shapes: N samples, S strata.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core.choosing import choose, num_pruned, strata_budgets
from tests.support.paths import GOLDEN


def golden(name: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def strata_of(scores: NDArray[Any], num_strata: int) -> list[list[int]]:
    """Bin sample by sample as the paper's program does; samples above the last edge belong to the last bin."""
    low, high = float(scores.min()), float(scores.max())
    width = (high + abs(high) * 1e-4 - low) / num_strata
    bins: list[list[int]] = [[] for _ in range(num_strata)]
    for sample, score in enumerate(scores.tolist()):
        above = [number for number in range(num_strata) if score >= low + number * width]
        bins[above[-1]].append(sample)
    return bins


def budgets_of(sizes: list[int], count: int) -> list[int]:
    """Divide a count among strata, smallest first, as the paper's program does."""
    budgets = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    for position, number in enumerate(order):
        budgets[number] = min(sizes[number], count // (len(order) - position))
        count -= budgets[number]
    return budgets


def test_budgets_equal_the_references() -> None:
    stored = golden("ccs_strat_r0.1_m0.3")
    scores, easy = stored["score"], np.sort(stored["easy_index"])
    # The reference drops the lowest AUM, the samples hardest to learn and most likely mislabelled.
    assert choose(scores, easy.size, "top").ids.tolist() == easy.tolist()
    selection = choose(scores, 200, "strata", drop_bottom=0.3, rng=np.random.default_rng(0))
    assert np.isin(selection.ids, easy).all()
    bins = strata_of(scores[easy], int(stored["n_strata"]))
    assert [len(members) for members in bins] == stored["strata_counts"].tolist()
    counts = [int(np.isin(selection.ids, easy[members]).sum()) for members in bins]
    assert counts == stored["budgets"].tolist()
    assert strata_budgets(stored["strata_counts"], 200).tolist() == stored["budgets"].tolist()


def test_a_negative_maximum_is_in_the_last_stratum() -> None:
    stored = golden("ccs_strat_negative_scores")
    scores, easy = stored["score"], np.sort(stored["easy_index"])
    assert stored["strata_counts"].sum() == easy.size - 1, "the reference loses one sample"
    sizes = np.array([len(members) for members in strata_of(scores[easy], 50)])
    assert np.flatnonzero(sizes - stored["strata_counts"]).tolist() == [49], "ours puts it into the last stratum"
    options: Any = {"drop_bottom": 0.1, "reweigh": True}
    draws = [choose(scores, 100, "strata", rng=np.random.default_rng(seed), **options) for seed in range(60)]
    for draw in draws:
        assert draw.num_kept == 100
        np.testing.assert_allclose(draw.weights.sum(), easy.size, rtol=1e-6)
    assert any(int(scores.argmax()) in draw.ids for draw in draws)


def test_the_range_of_negative_scores_ends_above_the_maximum() -> None:
    scores = np.linspace(-100.02, -100.0, 40)  # to -100 + 0.01, the fourth stratum empty; not to -100 - 0.01
    bins = strata_of(scores, 4)
    assert [len(members) for members in bins] == [15, 15, 10, 0]
    selection = choose(scores, 10, "strata", num_strata=4, rng=np.random.default_rng(0))
    assert [int(np.isin(members, selection.ids).sum()) for members in bins] == [3, 4, 3, 0]


def test_the_middle_equals_moderates() -> None:
    stored = golden("moderate_distance")
    count = round(float(stored["keep_fraction"]) * stored["distance"].size)
    middle = choose(stored["distance"], count, "middle").ids
    assert middle.tolist() == stored["kept_middle_global"].tolist()
    assert middle.tolist() != stored["kept_by_d2_port"].tolist()
    # The block around the median's rank, not the smallest distances from the median's value.
    nearest = np.argsort(np.abs(stored["distance"] - np.median(stored["distance"])))[:count]
    assert set(middle) != set(nearest)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float64", "int64"]), st.sampled_from([-9.0, 0.0, 2.0]))
def test_strata_equal_a_naive_transcription(seed: int, dtype: str, shift: float) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.gamma(1.0, 3.0, rng.integers(2, 120)) + shift).astype(dtype)
    num_strata, share = int(rng.integers(1, 12)), float(rng.choice([0.0, 0.1, 0.3]))
    dropped = num_pruned(share, scores.size)
    order = sorted(range(scores.size), key=lambda sample: (scores[sample], -sample))
    candidates = np.array(sorted(order[dropped:]))
    count = int(rng.integers(1, candidates.size + 1))
    bins = strata_of(scores[candidates], num_strata)
    selection = choose(scores, count, "strata", drop_bottom=share, num_strata=num_strata, rng=rng)
    counts = [int(np.isin(selection.ids, candidates[members]).sum()) for members in bins]
    assert counts == budgets_of([len(members) for members in bins], count)
    assert sum(counts) == count


def test_the_draw_inside_a_stratum_is_uniform() -> None:
    scores, rng = np.repeat([0.0, 1.0], [10, 30]), np.random.default_rng(0)
    times = np.zeros(40)
    for _ in range(3000):
        times[choose(scores, 10, "strata", num_strata=2, rng=rng).ids] += 1
    np.testing.assert_allclose(times[:10] / 3000, 0.5, atol=0.04)
    np.testing.assert_allclose(times[10:] / 3000, 5 / 30, atol=0.03)


def test_budgets_are_equal_not_proportional() -> None:
    sizes = np.array([10, 100, 1000])
    assert strata_budgets(sizes, 111).tolist() == [10, 50, 51]
