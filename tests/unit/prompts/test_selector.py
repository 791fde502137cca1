"""PromptSelector: rewards in any order and in any parts, exact continuation, threads, and what it refuses."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.errors import ConfigError, RunFolderError
from rayprune.prompts import STRATEGIES, PromptSelector

NAMES = sorted(STRATEGIES)
GROUP = 3
names = st.sampled_from(NAMES)
rows = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=GROUP, max_size=GROUP)),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
)


def assert_equal_states(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype, name
        assert np.array_equal(array, second[name]), name


def drawn(name: str, **options: Any) -> PromptSelector:
    """Return a selector that has drawn all ten prompts, so that one window holds all groups."""
    selector = PromptSelector(10, name, seed=3, **options)
    selector.next(10)
    return selector


@given(names, rows, st.randoms(use_true_random=False))
def test_order_and_parts_of_arrival_do_not_matter(
    name: str, groups: list[tuple[int, list[float]]], random: Any
) -> None:
    whole = drawn(name, group_size=GROUP)
    whole.observe([prompt for prompt, _ in groups], [rewards for _, rewards in groups])
    single = [(prompt, reward) for prompt, rewards in groups for reward in rewards]
    random.shuffle(single)
    parts = drawn(name, group_size=GROUP)
    while single:
        count = random.randint(1, len(single))
        now, single = single[:count], single[count:]
        parts.observe([prompt for prompt, _ in now], [reward for _, reward in now])
    assert_equal_states(whole.state_dict(), parts.state_dict())
    assert np.array_equal(whole.next(4), parts.next(4))


@given(names, rows, st.randoms(use_true_random=False))
def test_whole_groups_come_in_any_order(name: str, groups: list[tuple[int, list[float]]], random: Any) -> None:
    first, second = drawn(name), drawn(name)
    first.observe([prompt for prompt, _ in groups], [rewards for _, rewards in groups])
    random.shuffle(groups)
    for prompt, rewards in groups:
        second.observe([prompt] * GROUP, rewards)
    assert_equal_states(first.state_dict(), second.state_dict())


@given(names, st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), min_size=1, max_size=12), st.integers(0, 11))
def test_a_loaded_state_continues_exactly(name: str, calls: list[tuple[int, int]], stop: int) -> None:
    rng = np.random.default_rng(1)
    selector = PromptSelector(12, name, seed=5, group_size=2)
    other = PromptSelector(12, name, seed=6, group_size=2)
    for number, (count, num_rewards) in enumerate(calls):
        if number == stop:
            other.load_state_dict(selector.state_dict())
        ids, rewards = rng.integers(0, 12, num_rewards), rng.integers(0, 2, num_rewards)
        for each in (selector, other) if number >= stop else (selector,):
            each.observe(ids, rewards)
        first = selector.next(count)
        if number >= stop:
            assert np.array_equal(first, other.next(count))
    if len(calls) > stop:
        assert_equal_states(selector.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_a_copy_without_pickle(name: str, tmp_path: Any) -> None:
    selector = drawn(name, group_size=2)
    selector.observe([1, 1, 2], [0.0, 1.0, 1.0])
    state = selector.state_dict()
    before = {key: array.copy() for key, array in state.items()}
    np.savez(tmp_path / "state.npz", **state)
    selector.observe([2, 3, 3], [0.0, 1.0, 1.0])
    selector.next(7)
    assert_equal_states(state, before)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as stored:
        selector.load_state_dict(stored)
    assert_equal_states(selector.state_dict(), before)
    copied = pickle.loads(pickle.dumps(selector))
    assert np.array_equal(copied.next(5), selector.next(5))


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_distinct_and_of_the_asked_number(name: str) -> None:
    selector, rng = PromptSelector(50, name, seed=0), np.random.default_rng(0)
    assert len(selector) == 50
    total = 0
    for _ in range(60):
        count = int(rng.integers(1, 51))
        ids = selector.next(count)
        assert ids.dtype == np.int64
        assert ids.shape == (count,)
        assert np.unique(ids).size == count
        assert ids.min() >= 0
        assert ids.max() < 50
        total += count
        selector.observe(ids, np.where(ids[:, None] % 5 == 0, [0, 1], [1, 1]))  # 40 of 50 without variance
    assert selector.scores()["draws"].sum() == total
    assert selector.scores()["draws"].min() > 0


@pytest.mark.parametrize("name", ["uniform", "greso", "zero_variance"])
@pytest.mark.parametrize("count", [1, 4, 7, 10])
def test_a_pass_draws_every_prompt_once(name: str, count: int) -> None:
    selector = PromptSelector(10, name, seed=2)
    ids = np.concatenate([selector.next(count) for _ in range(10)])
    counts = np.bincount(ids, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert not np.array_equal(ids[:10], ids[10:20]) or count == 10 or ids.size < 20


def test_every_order_of_a_pass_is_as_likely() -> None:
    selector = PromptSelector(3, "uniform", seed=0)
    orders = [tuple(selector.next(3).tolist()) for _ in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 150


def test_another_seed_draws_other_prompts() -> None:
    draws = [PromptSelector(1000, "mopps", seed).next(20).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("name", NAMES)
def test_no_observation_of_a_thread_is_lost(name: str) -> None:
    selector = PromptSelector(64, name, group_size=4)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            rng = np.random.default_rng(number)
            for _ in range(40):
                selector.next(8)
                ids = rng.integers(0, 64, 16)
                selector.observe(ids, rng.integers(0, 2, 16))
                selector.scores()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    scores = selector.scores()
    assert scores["draws"].sum() == 6 * 40 * 8
    assert 4 * scores["visits"].sum() + selector.num_pending == 6 * 40 * 16


def test_the_scores_of_an_example() -> None:
    selector = PromptSelector(4, "uniform", reward_range=(-1.0, 1.0))
    selector.observe([2, 0, 2], [1.0, -1.0, 0.0])
    selector.observe([2], [[1.0, 1.0]])
    scores = selector.scores()
    assert scores["reward_mean"][[0, 2]].tolist() == [-1.0, 0.75]
    assert scores["success_rate"][[0, 2]].tolist() == [0.0, 0.875]
    assert np.isnan(scores["reward_mean"][[1, 3]]).all()
    assert scores["visits"].tolist() == [1, 0, 2, 0]
    assert scores["streak"].tolist() == [0, 0, 1, 0]


def test_general_rewards_with_a_threshold() -> None:
    selector = PromptSelector(2, "mopps", success=3.0)
    selector.observe([0], [[2.9, 3.0, 50.0, -7.0]])
    assert selector.scores()["success_rate"][0] == 0.5
    assert selector.scores()["reward_mean"][0] == pytest.approx(12.225)


def test_draws_for_follows_the_share_without_variance() -> None:
    selector = PromptSelector(100, "uniform")
    assert selector.draws_for(8) == 10
    ids = selector.next(4)
    selector.observe(ids[:3], [[1, 1], [0, 0], [0, 1]])
    assert selector.zero_variance == 0.0  # the batch is not complete
    selector.observe(ids[3:], [[1, 1]])
    assert selector.zero_variance == 0.75
    assert selector.draws_for(8) == 40
    assert selector.draws_for(8, most=20) == 20
    assert selector.draws_for(80) == 100
    with pytest.raises(ConfigError, match="at least 1"):
        selector.draws_for(0)


@pytest.mark.parametrize(
    ("ids", "rewards", "message"),
    [
        ([0, 10], [0.0, 1.0], r"unknown id 10: ids are positions in \[0, 10\)"),
        ([-1], [0.0], "unknown id -1"),
        ([0.0], [0.0], "ids must be integers"),
        ([[0]], [0.0], "ids must be integers"),
        ([0, 1], [0.0], "do not fit 2 ids"),
        ([0], [[[0.0]]], "do not fit 1 ids"),
        ([0], np.zeros((1, 0)), "do not fit 1 ids"),
        ([0, 1], [0.0, np.nan], "the reward of id 1 is NaN or infinite"),
        ([0, 1], [[0.0, 1.0], [np.inf, 0.0]], "the reward of id 1 is NaN or infinite"),
        ([0], ["a"], "rewards must be numbers"),
        ([0], [1.5], r"reward 1.5 is outside \[0, 1\]: give reward_range"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_rewards_change_nothing(name: str, ids: Any, rewards: Any, message: str) -> None:
    selector = drawn(name, group_size=2)
    before = selector.state_dict()
    with pytest.raises(ConfigError, match=message) as raised:
        selector.observe(ids, rewards)
    assert "\n" not in str(raised.value)
    assert_equal_states(selector.state_dict(), before)


@pytest.mark.parametrize("name", ["greso", "zero_variance"])
def test_a_group_of_one_reward_is_refused(name: str) -> None:
    selector = drawn(name)
    for ids, rewards in (([0, 0, 1], [1.0, 1.0, 1.0]), ([0], [[1.0]])):
        with pytest.raises(ConfigError, match=r"has one reward, and .* give group_size="):
            selector.observe(ids, rewards)
    assert selector.scores()["visits"].sum() == 0


def test_no_rewards_are_nothing() -> None:
    selector = drawn("greso")
    before = selector.state_dict()
    selector.observe([], [])
    assert_equal_states(selector.state_dict(), before)


@pytest.mark.parametrize("n", [0, 11, 1.0, True, "3"])
def test_n_is_checked(n: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be an integer in \[1, 10\]"):
        PromptSelector(10).next(n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts 0 must be an integer of at least 1"),
        ({"num_prompts": 2**31}, "the most that ids can number"),
        ({"seed": -1}, "seed -1"),
        ({"group_size": 1}, "group_size 1"),
        ({"strategy": "mops"}, "did you mean 'mopps'"),
        ({"strategy": 3}, "strategy must be a name"),
        ({"reward_range": (1.0, 0.0)}, "low < high"),
        ({"success": float("nan")}, "success nan"),
        ({"tolerance": -1.0}, "tolerance -1.0"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSelector(**{"num_prompts": 10, **options})


def test_states_of_others_are_refused() -> None:
    selector = PromptSelector(10, "mopps")
    state = selector.state_dict()
    for other in (PromptSelector(11, "mopps"), PromptSelector(10, "greso"), PromptSelector(10, "mopps", group_size=2)):
        before = other.state_dict()
        with pytest.raises(RunFolderError, match="the state is of another selector"):
            other.load_state_dict(state)
        assert_equal_states(other.state_dict(), before)
    with pytest.raises(RunFolderError, match="no readable header"):
        selector.load_state_dict({})
    with pytest.raises(RunFolderError, match="lacks column/alpha"):
        selector.load_state_dict({name: array for name, array in state.items() if name != "column/alpha"})
    with pytest.raises(RunFolderError, match=r"column/alpha is float32 of shape \(3,\)"):
        selector.load_state_dict(state | {"column/alpha": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    "options", [{"reward_range": (0,)}, {"reward_range": "ab"}, {"tolerance": "a"}, {"success": "x"}, {"success": True}]
)
def test_settings_of_rewards_that_are_no_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PromptSelector(4, **options)


def test_rewards_may_be_tensors_of_a_reward_model() -> None:
    torch = pytest.importorskip("torch")
    plain, tensors = PromptSelector(4), PromptSelector(4)
    plain.observe([0, 1], [[1, 0], [0.5, 0.25]])
    rewards = torch.tensor([[1, 0], [0.5, 0.25]], dtype=torch.bfloat16, requires_grad=True)
    tensors.observe(torch.tensor([0, 1]), rewards)
    for name, array in plain.scores().items():
        np.testing.assert_array_equal(tensors.scores()[name], array)


def test_ragged_rewards_and_damaged_groups_are_refused() -> None:
    selector = PromptSelector(4, group_size=2)
    with pytest.raises(ConfigError, match="rows of several lengths"):
        selector.observe([0, 1], [[1, 0], [1]])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="most 0"):
        selector.draws_for(4, 1.25, 0)
    selector.observe([3], [1.0])
    state = selector.state_dict()
    with pytest.raises(RunFolderError, match="incomplete groups are damaged"):
        PromptSelector(4, group_size=2).load_state_dict({**state, "pending/ids": np.array([9])})
