"""PromptSelector: which prompts get rollouts next, by the rewards of earlier ones."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError, RunFolderError
from rayprune.prompts.rewards import GroupBuffer, Ids, RewardGroups, RewardScale, check_rewards
from rayprune.prompts.strategies import build_strategy
from rayprune.prompts.strategy import PromptTable, Strategy

STATE_SCHEMA = 1
# Of the groups that the last `next` drew: how many have arrived, and how many of these have no variance.
_WINDOW = ("window", "window_groups", "window_easy", "window_hard")


class PromptSelector:
    """Choose the prompts of the next rollouts, and learn from their rewards.

    A prompt's id is its position in the dataset. `next` draws prompts, `observe` takes rewards whenever they arrive:
    late, out of order, in parts, from several threads. Rewards of prompts that were not drawn count, too, so an
    earlier profile can be given first.

    Args:
        num_prompts: N, at least 1.
        strategy: "greso", "zero_variance", "mopps", "learnability", "uniform", or a strategy from `rayprune.prompts`,
            such as `MoPPS(target=0.4)`.
        seed: non-negative integer; with the calls and their order it determines every draw.
        group_size: G, the rollouts of each draw, at least 2; a group is complete when G rewards of its prompt have
            arrived, in however many calls. None: the rewards of one prompt in one call are one group.
        success: a reward of at least this is a success; None if rewards are success rates.
        reward_range: (low, high), the rewards that stand for success rates 0 and 1 where `success` is None.
        tolerance: rewards of one group that differ by at most this are equal.

    Raises:
        ConfigError: a value that cannot work.

    >>> selector = PromptSelector(num_prompts=4, strategy="zero_variance", seed=0)
    >>> ids = selector.next(4)
    >>> sorted(ids.tolist())
    [0, 1, 2, 3]
    >>> selector.observe([0, 1, 2, 3], [[1, 1], [0, 1], [1, 0], [0, 0]])
    >>> sorted(selector.next(2).tolist())  # groups 0 and 3 had no variance
    [1, 2]
    """

    def __init__(
        self,
        num_prompts: int,
        strategy: str | Strategy = "greso",
        seed: int = 0,
        *,
        group_size: int | None = None,
        success: float | None = None,
        reward_range: tuple[float, float] = (0.0, 1.0),
        tolerance: float = 1e-6,
    ) -> None:
        whole = [("num_prompts", num_prompts, 1), ("seed", seed, 0)]
        whole += [("group_size", group_size, 2)] if group_size is not None else []
        for name, value, least in whole:
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name} {short_repr(value)} must be an integer of at least {least}")
        if num_prompts > np.iinfo(np.int32).max:
            raise ConfigError(f"num_prompts {num_prompts} is above 2^31 - 1, the most that ids can number")
        self.num_prompts, self.seed = int(num_prompts), int(seed)
        self.strategy = build_strategy(strategy)
        self.scale = RewardScale(success, reward_range, tolerance)
        self._buffer = GroupBuffer(None if group_size is None else int(group_size), self.scale)
        numbers = {**dict.fromkeys(_WINDOW, 0), "zero_variance": 0.0, **self.strategy.numbers()}
        self._table = PromptTable(self.num_prompts, self.strategy.columns(), numbers)
        self._rng = np.random.default_rng(self.seed)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.num_prompts

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())
        columns = self._table.columns  # Ray delivers arrays read-only
        columns.update({name: column.copy() for name, column in columns.items() if not column.flags.writeable})

    @property
    def group_size(self) -> int | None:
        """G, the rollouts of each draw, or None."""
        return self._buffer.group_size

    @property
    def num_pending(self) -> int:
        """The number of observed rewards whose groups are not complete."""
        with self._lock:
            return self._buffer.num_pending

    @property
    def zero_variance(self) -> float:
        """The share of groups without variance in the last full batch of groups."""
        with self._lock:
            return self._table.numbers["zero_variance"]

    def next(self, n: int) -> Ids:
        """Return the prompts of the next rollouts.

        Args:
            n: in [1, N].

        Returns:
            (n,) int64 distinct ids. "uniform", "greso" and "zero_variance" draw in passes over the prompts, at most
            once in each pass, across calls; "mopps" and "learnability" may draw a prompt again in the next call.

        Raises:
            ConfigError: n is no integer in [1, N].
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= self.num_prompts:
            raise ConfigError(f"n {short_repr(n)} must be an integer in [1, {self.num_prompts}], the number of prompts")
        with self._lock:
            ids = self.strategy.choose(self._table, int(n), self._rng)
            self._table["draws"][ids] += 1
            self._table.numbers["window"] = int(n)
            return ids

    def draws_for(self, useful: int, safety: float = 1.25, most: int | None = None) -> int:
        """Return how many prompts to draw to get about `useful` groups with variance.

        GRESO's adaptive batch size: safety · useful ÷ (1 − share of groups without variance), rounded up.

        Args:
            useful: the groups with variance that a step needs, at least 1.
            safety: at least 1.
            most: the largest result; N if None.

        Raises:
            ConfigError: an argument is below 1, or no number.
        """
        for name, value in (("useful", useful), ("safety", safety), ("most", 1 if most is None else most)):
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer) or not 1 <= value < math.inf:
                raise ConfigError(f"{name} {short_repr(value)} must be a number of at least 1")
        wanted = math.ceil(safety * useful / max(1.0 - self.zero_variance, 1e-9))
        return min(wanted, self.num_prompts, most if most is not None else self.num_prompts)

    def observe(self, ids: ArrayLike, rewards: ArrayLike) -> None:
        """Learn from rewards.

        Args:
            ids: (B,) integers in [0, N); they may repeat: one row for each rollout, or for each draw.
            rewards: (B,) or (B, G) finite numbers. A row (B, G) is a whole group, unless `group_size` is another
                number. With (B,) and no `group_size`, the rewards of one id in this call are a group.

        Raises:
            ConfigError: an unknown id, another shape, a reward that is not finite or outside `reward_range`, or a
                group of one reward where the strategy needs more. Nothing was observed.
        """
        keys, values = check_rewards(ids, rewards, self.num_prompts)
        self.scale.check(values)
        with self._lock:
            if self.strategy.needs_groups and self.group_size is None:
                self._check_whole(keys, values)
            groups = self._buffer.add(keys, values)
            for part in groups.rounds():
                self._fold(part)

    def _check_whole(self, ids: Ids, rewards: NDArray[np.float64]) -> None:
        single = rewards.ndim == 2 and rewards.shape[1] == 1
        if rewards.ndim == 1 or single:
            distinct, counts = np.unique(ids, return_counts=True)
            if counts.size and (single or counts.min() == 1):
                raise ConfigError(
                    f"id {distinct[counts.argmin()]} has one reward, and {self.strategy.to_config()['name']} compares "
                    "the rewards of a group: give group_size=, or all rollouts of a draw in one call"
                )

    def _fold(self, groups: RewardGroups) -> None:
        """Fold groups of distinct prompts; close the window of the last draw whenever it is full."""
        numbers, start = self._table.numbers, 0
        while start < len(groups):
            left = max(1, int(numbers["window"] - numbers["window_groups"])) if numbers["window"] else len(groups)
            part = groups[slice(start, start + left)]
            self._table.fold(part)
            self.strategy.fold(self._table, part)
            start += len(part)
            if not numbers["window"]:
                continue  # nothing was drawn yet: this is a profile
            numbers["window_groups"] += len(part)
            numbers["window_easy"] += int(np.count_nonzero(part.easy))
            numbers["window_hard"] += int(np.count_nonzero(part.constant & ~part.easy))
            if numbers["window_groups"] >= numbers["window"]:
                easy, hard = (numbers[name] / numbers["window_groups"] for name in ("window_easy", "window_hard"))
                numbers["zero_variance"] = easy + hard
                self.strategy.end_window(self._table, easy, hard)
                numbers.update(window_groups=0, window_easy=0, window_hard=0)

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return what is known of the prompts, name → (N,) copy.

        `reward_mean` and `success_rate` over all observed groups (NaN without any), `visits` (complete groups),
        `draws`, `streak` (consecutive groups without variance), and the strategy's own: `p` and `p_std` of "mopps" and
        "learnability", `learnability`, `keep_probability` of "greso", `wait` of "zero_variance".
        """
        with self._lock:
            return self._table.means() | self.strategy.scores(self._table)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the whole state as arrays by name, copied and free of pickle.

        After `load_state_dict`, the next calls return the same prompts.
        """
        with self._lock:
            header = self._settings() | {
                "schema": STATE_SCHEMA,
                "numbers": self._table.numbers,
                "generator": self._rng.bit_generator.state,
            }
            state: dict[str, NDArray[Any]] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
            state |= {f"column/{name}": column.copy() for name, column in self._table.columns.items()}
            return state | {f"pending/{name}": array for name, array in self._buffer.to_arrays().items()}

    def _settings(self) -> dict[str, Any]:
        settings = {"num_prompts": self.num_prompts, "strategy": self.strategy.to_config()}
        return settings | {"group_size": self.group_size, "rewards": vars(self.scale)}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a state of `state_dict`. The seed may differ: the state of the generator is restored, too.

        Raises:
            RunFolderError: the state is incomplete, of a newer schema, or of other settings; nothing was changed.
        """
        try:
            header = json.loads(bytes(np.asarray(state["header"], dtype=np.uint8)).decode())
            schema, numbers, generator = header["schema"], header["numbers"], header["generator"]
        except (KeyError, ValueError, TypeError):
            raise RunFolderError("the state has no readable header: give what state_dict() returned") from None
        if not isinstance(schema, int) or not isinstance(numbers, dict):
            raise RunFolderError("the state's header is damaged: give what state_dict() returned")
        if schema > STATE_SCHEMA:
            raise RunFolderError(f"state of schema {schema}, this version reads up to {STATE_SCHEMA}: upgrade rayprune")
        for name, own in json.loads(json.dumps(self._settings())).items():
            if header.get(name) != own:
                raise RunFolderError(
                    f"the state is of another selector: {name} {header.get(name)!r}, here {own!r}: build it with the "
                    "same arguments"
                )
        with self._lock:
            self._check_arrays(state, numbers)
            rng = np.random.default_rng()
            try:
                rng.bit_generator.state = generator
            except (KeyError, ValueError, TypeError):
                raise RunFolderError("the state's generator is damaged: give what state_dict() returned") from None
            self._rng = rng
            self._table.numbers = dict(numbers)
            for name, column in self._table.columns.items():
                column[:] = np.asarray(state[f"column/{name}"])
            self._buffer.load_arrays(np.asarray(state["pending/ids"]), np.asarray(state["pending/rewards"]))

    def _check_arrays(self, state: Mapping[str, NDArray[Any]], numbers: Mapping[str, float]) -> None:
        expected = {f"column/{name}": column for name, column in self._table.columns.items()}
        missing = [name for name in (*expected, "pending/ids", "pending/rewards") if name not in state]
        missing += [name for name in self._table.numbers if name not in numbers]
        if missing:
            raise RunFolderError(f"the state lacks {', '.join(missing)}: give a whole state_dict()")
        ids, rewards = np.asarray(state["pending/ids"]), np.asarray(state["pending/rewards"])
        if ids.ndim != 1 or ids.shape != rewards.shape or (ids.size and not 0 <= ids.min() <= ids.max() < len(self)):
            raise RunFolderError("the state's incomplete groups are damaged: give what state_dict() returned")
        for name, column in expected.items():
            stored = np.asarray(state[name])
            if stored.shape != column.shape or stored.dtype != column.dtype:
                raise RunFolderError(
                    f"the state's {name} is {stored.dtype} of shape {stored.shape}, not {column.dtype} of "
                    f"{column.shape}: give what state_dict() returned"
                )
