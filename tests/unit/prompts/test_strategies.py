"""The strategies against numbers computed by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.errors import ConfigError
from rayprune.prompts import GRESO, Learnability, MoPPS, PromptSelector, PromptTable, Strategy, ZeroVariance

SOLVED, FAILED, MIXED = [1, 1], [0, 0], [0, 1]


def test_mopps_posterior() -> None:
    selector = PromptSelector(2, MoPPS(discount=0.5, prior=(1.0, 2.0)))
    selector.observe([0], [[1, 1, 1, 0]])  # alpha 0.5 + 0.5 + 3 = 4, beta 1 + 1 + 1 = 3
    selector.observe([0], [[0, 0, 0, 0]])  # alpha 2 + 0.5 + 0 = 2.5, beta 1.5 + 1 + 4 = 6.5
    scores = selector.scores()
    assert scores["p"].tolist() == pytest.approx([2.5 / 9, 1 / 3])
    assert scores["p_std"][0] == pytest.approx(np.sqrt(2.5 * 6.5 / (81 * 10)))


def test_mopps_prefers_prompts_near_the_target() -> None:
    selector = PromptSelector(90, MoPPS(target=0.5, discount=1.0, candidates=100), seed=0)
    ids = np.arange(90)
    rates = np.array([0.0, 0.5, 1.0])[ids % 3]
    selector.observe(ids, (np.arange(40) < 40 * rates[:, None]).astype(int))
    assert set((selector.next(25) % 3).tolist()) == {1}
    easier = PromptSelector(90, MoPPS(target=1.0, discount=1.0, candidates=100), seed=0)
    easier.observe(ids, (np.arange(40) < 40 * rates[:, None]).astype(int))
    assert set((easier.next(25) % 3).tolist()) == {2}


def test_mopps_forgets() -> None:
    selector = PromptSelector(1, MoPPS(discount=0.5))
    for _ in range(30):
        selector.observe([0], [SOLVED])
    solved = selector.scores()["p"][0]  # alpha: x = x / 2 + 0.5 + 2 → 5, beta 1
    assert solved == pytest.approx(5 / 6, abs=1e-6)


def test_learnability_takes_the_highest_p_times_one_minus_p() -> None:
    strategy = Learnability(explore=0.0, discount=1.0, candidates=100)
    selector = PromptSelector(60, strategy, seed=0)
    ids = np.arange(60)
    rates = np.array([0.0, 0.25, 0.75, 1.0])[ids % 4]
    selector.observe(ids, (np.arange(8) < 8 * rates[:, None]).astype(int))
    assert set((selector.next(30) % 4).tolist()) == {1, 2}
    p = selector.scores()["p"]
    assert p[:4].tolist() == pytest.approx([0.1, 0.3, 0.7, 0.9])
    assert selector.scores()["learnability"][:4].tolist() == pytest.approx([0.09, 0.21, 0.21, 0.09])
    exploring = PromptSelector(60, Learnability(explore=0.5, discount=1.0, candidates=100), seed=0)
    exploring.observe(ids, (np.arange(8) < 8 * rates[:, None]).astype(int))
    assert set((exploring.next(30) % 4).tolist()) == {0, 1, 2, 3}


def test_greso_keeps_with_probability_p_to_the_z() -> None:
    selector = PromptSelector(4, GRESO(p_easy=0.6, p_hard=0.5))
    selector.observe([0, 1, 1, 2, 2, 3], [SOLVED, FAILED, FAILED, FAILED, SOLVED, SOLVED])
    selector.observe([3], [MIXED])
    assert selector.scores()["streak"].tolist() == [1, 2, 2, 0]
    assert selector.scores()["keep_probability"].tolist() == pytest.approx([0.6, 0.25, 0.36, 1.0])


def test_greso_skips_as_often_as_it_says() -> None:
    selector = PromptSelector(4000, GRESO(p_hard=0.5, step=0.01), seed=0)
    ids = np.arange(4000)
    selector.observe(ids[:2000], np.tile(FAILED, (2000, 1)))
    drawn = np.concatenate([selector.next(50) for _ in range(50)])  # within the first pass: 3,000 are kept on average
    first = drawn[:2400]
    assert np.unique(first).size == 2400
    assert np.mean(first < 2000) == pytest.approx(1 / 3, abs=0.03)


def test_greso_moves_p_once_per_batch() -> None:
    selector = PromptSelector(8, GRESO(target_easy=0.25, target_hard=0.5, step=0.1))
    ids = selector.next(4)
    selector.observe(ids[:3], [SOLVED, MIXED, FAILED])
    assert _p(selector) == pytest.approx((0.5, 0.5))
    selector.observe(ids[3:], [MIXED])  # easy 1/4 ≥ 1/4: down; hard 1/4 < 1/2: up
    assert _p(selector) == pytest.approx((0.4, 0.6))
    for _ in range(8):
        selector.observe(selector.next(4), [SOLVED] * 4)
    assert _p(selector) == pytest.approx((0.1, 1.0))  # never below one step, never above 1


def _p(selector: PromptSelector) -> tuple[float, float]:
    numbers = selector._table.numbers
    return numbers["p_easy"], numbers["p_hard"]


def test_greso_draws_on_when_all_prompts_are_skipped() -> None:
    selector = PromptSelector(20, GRESO(p_easy=0.01, step=0.01), seed=0)
    for _ in range(5):
        selector.observe(np.arange(20), [SOLVED] * 20)
    assert np.unique(selector.next(20)).size == 20


def test_zero_variance_waits_longer_each_time_and_comes_back() -> None:
    """Prompt 0 never varies, 1 and 2 always do: 0 is drawn in passes 0, 2, 5 and 10."""
    selector = PromptSelector(3, ZeroVariance(max_wait=4), seed=0)
    passes: list[int] = []
    number = 0
    while number < 16:
        drawn = [selector.next(1)[0]]
        selector.observe(drawn, [SOLVED if drawn[0] == 0 else MIXED])
        number = int(selector._table.numbers["pass"])
        if drawn[0] == 0:
            passes.append(number)
    assert passes[:4] == [0, 2, 5, 10]
    assert passes[4:5] in ([], [15])


def test_zero_variance_uses_late_groups_within_a_pass() -> None:
    selector = PromptSelector(10, "zero_variance", seed=0)
    first = selector.next(3)
    others = np.setdiff1d(np.arange(10), first)
    selector.observe(others[:4], [FAILED] * 4)  # from an earlier profile
    assert set(selector.next(3).tolist()) <= set(others[4:].tolist())
    assert selector.scores()["wait"][others[:4]].tolist() == [1] * 4


def test_zero_variance_draws_when_everyone_waits() -> None:
    selector = PromptSelector(6, "zero_variance", seed=0)
    for _ in range(5):
        ids = selector.next(6)
        assert np.unique(ids).size == 6
        selector.observe(ids, [FAILED] * 6)


def test_equal_within_the_tolerance() -> None:
    selector = PromptSelector(2, "zero_variance", tolerance=0.01)
    selector.observe([0, 1], [[0.5, 0.505], [0.5, 0.52]])
    assert selector.scores()["streak"].tolist() == [1, 0]


@dataclass(frozen=True)
class Shortest(Strategy):
    """Take the lowest ids: a strategy of the user's own."""

    name: ClassVar[str] = "shortest"

    def choose(self, table: PromptTable, n: int, rng: np.random.Generator) -> NDArray[Any]:
        return np.arange(n, dtype=np.int64)


def test_a_strategy_of_ones_own() -> None:
    selector = PromptSelector(5, Shortest())
    assert selector.next(3).tolist() == [0, 1, 2]
    other = PromptSelector(5, Shortest())
    other.load_state_dict(selector.state_dict())
    assert other.scores()["draws"].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (GRESO, {"p_easy": 0.0}, "p_easy 0"),
        (GRESO, {"step": 1.5}, "step 1.5"),
        (GRESO, {"target_hard": -0.1}, "target_hard -0.1"),
        (MoPPS, {"target": 2.0}, "target 2.0"),
        (MoPPS, {"discount": 1.5}, "discount 1.5"),
        (MoPPS, {"prior": (0.0, 1.0)}, "prior"),
        (MoPPS, {"candidates": 0}, "candidates 0"),
        (Learnability, {"explore": -0.5}, "explore -0.5"),
        (ZeroVariance, {"max_wait": 0}, "max_wait 0"),
        (ZeroVariance, {"max_wait": "long"}, "max_wait"),
    ],
)
def test_options_are_checked(strategy: type[Strategy], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy(**options)
