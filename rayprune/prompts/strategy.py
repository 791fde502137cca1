"""What a strategy of prompt selection is: it reads a table of rewards and chooses the next prompts.

Shapes: N prompts, n drawn prompts, K groups.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rayprune.core.validation import check_fields
from rayprune.prompts.rewards import Ids, RewardGroups

# Kept for every strategy. `streak` counts consecutive groups without variance; `easy`: the last of them was solved.
_COLUMNS: dict[str, tuple[DTypeLike, float]] = {
    "draws": (np.int32, 0),
    "groups": (np.int32, 0),
    "rewards": (np.int32, 0),
    "reward_sum": (np.float64, 0),
    "success_sum": (np.float64, 0),
    "streak": (np.int16, 0),
    "easy": (np.bool_, 0),
}
_MAX_STREAK = np.iinfo(np.int16).max


class PromptTable:
    """What is known of the prompts.

    Args:
        num_prompts: N.
        columns: name → (dtype, initial value) of the strategy's columns.
        numbers: name → value of the strategy's other state.

    Attributes:
        columns: name → (N,) array.
        numbers: name → number.
    """

    def __init__(
        self, num_prompts: int, columns: Mapping[str, tuple[DTypeLike, float]], numbers: Mapping[str, float]
    ) -> None:
        self.num_prompts = num_prompts
        self.columns: dict[str, NDArray[Any]] = {
            name: np.full(num_prompts, value, dtype) for name, (dtype, value) in {**_COLUMNS, **columns}.items()
        }
        self.numbers: dict[str, float] = dict(numbers)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def fold(self, groups: RewardGroups) -> None:
        """Add groups of distinct prompts to the columns that every strategy has."""
        ids = groups.ids
        self["groups"][ids] += 1
        self["rewards"][ids] += groups.sizes.astype(np.int32)
        self["reward_sum"][ids] += groups.sums
        self["success_sum"][ids] += groups.successes
        streak = np.minimum(self["streak"][ids], _MAX_STREAK - 1) + 1
        self["streak"][ids] = np.where(groups.constant, streak, 0)
        self["easy"][ids] = groups.easy

    def means(self) -> dict[str, NDArray[Any]]:
        """Return what `PromptSelector.scores` has for every strategy."""
        count = np.where(self["rewards"] > 0, self["rewards"], np.nan)
        return {
            "reward_mean": self["reward_sum"] / count,
            "success_rate": self["success_sum"] / count,
            "visits": self["groups"].copy(),
            "draws": self["draws"].copy(),
            "streak": self["streak"].copy(),
        }


@dataclass(frozen=True)
class Strategy(ABC):
    """The base of a strategy: a frozen dataclass of hyperparameters; all state is in the table.

    Attributes:
        name: the strategy's name.
        needs_groups: whether a group must have at least two rewards.
    """

    name: ClassVar[str] = ""
    needs_groups: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    def columns(self) -> dict[str, tuple[DTypeLike, float]]:
        """Return name → (dtype, initial value) of this strategy's columns."""
        return {}

    def numbers(self) -> dict[str, float]:
        """Return name → initial value of this strategy's other state."""
        return {}

    @abstractmethod
    def choose(self, table: PromptTable, n: int, rng: np.random.Generator) -> Ids:
        """Return (n,) distinct ids; n is at most N."""

    def fold(self, table: PromptTable, groups: RewardGroups) -> None:  # noqa: B027
        """Update this strategy's columns with groups of distinct prompts, after the table's own columns."""

    def end_window(self, table: PromptTable, easy: float, hard: float) -> None:  # noqa: B027
        """Adjust to the shares of groups without variance among as many groups as the last `next` drew.

        Args:
            table: the table.
            easy: the share of groups without variance that were solved.
            hard: the share of the others without variance.
        """

    def scores(self, table: PromptTable) -> dict[str, NDArray[Any]]:
        """Return name → (N,) new arrays for `PromptSelector.scores`, beside `PromptTable.means`."""
        return {}

    def to_config(self) -> dict[str, Any]:
        """Return the name and the hyperparameters in plain types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.name or type(self).__name__} | fields


@dataclass(frozen=True)
class PassStrategy(Strategy):
    """Draws in passes: a random order of the prompts, from which each one is drawn at most once.

    A prompt that `admits` refuses is left out until the next pass. When two whole passes have not filled a call, the
    rest of it is drawn from the refused ones.
    """

    def columns(self) -> dict[str, tuple[DTypeLike, float]]:
        """Return the column of the pass's order."""
        return {"order": (np.int32, 0)}

    def numbers(self) -> dict[str, float]:
        """Return the position in the order, its length, and the number of the pass."""
        return {"position": 0, "length": 0, "pass": -1}

    def admits(self, table: PromptTable, ids: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return (K,) bool, which prompts to draw in this pass."""
        return np.ones(ids.size, dtype=bool)

    def members(self, table: PromptTable) -> NDArray[np.int32]:
        """Return the prompts of a new pass."""
        return np.arange(table.num_prompts, dtype=np.int32)

    def choose(self, table: PromptTable, n: int, rng: np.random.Generator) -> Ids:
        """Return the next (n,) prompts of the pass, or of this and the next ones."""
        numbers, order = table.numbers, table["order"]
        parts: list[NDArray[np.int32]] = []
        refused: list[NDArray[np.int32]] = []
        later: list[NDArray[np.int32]] = []
        # Only a new pass within this call can come to a prompt that the call has already chosen.
        chosen: NDArray[np.int32] | None = None
        missing, passes = n, 0
        while missing:
            position, length = int(numbers["position"]), int(numbers["length"])
            if position == length:
                if passes == 2:
                    break
                passes += 1
                members = self.members(table)
                order[: members.size] = members
                numbers["position"], numbers["length"] = 0, members.size
                numbers["pass"] += 1
                chosen, later = np.concatenate(parts) if parts else None, []
                continue
            ids = _shuffle(order[position:length], min(length - position, max(2 * missing, 1024)), rng)
            keep = self.admits(table, ids, rng)
            again = np.zeros(ids.size, dtype=bool) if chosen is None else np.isin(ids, chosen)
            taken = np.flatnonzero(keep & ~again)[:missing]
            used = int(taken[-1]) + 1 if taken.size == missing else ids.size
            numbers["position"] = position + used
            refused.append(ids[:used][~keep[:used]])
            later.append(ids[:used][again[:used] & keep[:used]])
            parts.append(ids[taken])
            missing -= taken.size
        found = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        if missing:
            found = np.concatenate([found, self._fill(table, missing, found, refused, rng)])
        elif later:  # for the next calls
            waiting, position = np.concatenate(later), int(numbers["position"])
            order[position - waiting.size : position] = waiting
            numbers["position"] = position - waiting.size
        return found.astype(np.int64)

    def _fill(
        self,
        table: PromptTable,
        missing: int,
        found: NDArray[np.int32],
        refused: list[NDArray[np.int32]],
        rng: np.random.Generator,
    ) -> NDArray[np.int32]:
        rest = np.setdiff1d(np.concatenate([*refused, found[:0]]), found)
        if rest.size < missing:
            rest = np.setdiff1d(np.arange(table.num_prompts, dtype=np.int32), found)
        return rng.choice(rest, missing, replace=False)


def _shuffle(order: NDArray[np.int32], count: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Move a random `count` of the entries to the front, in place and in random order; return a copy of them.

    These are the first steps of a Fisher-Yates shuffle, so a pass over many prompts needs no permutation of all.
    """
    picks = rng.choice(order.size, count, replace=False)
    moved = order[picks]
    displaced = np.ones(count, dtype=bool)
    displaced[picks[picks < count]] = False
    order[picks[picks >= count]] = order[:count][displaced]
    order[:count] = moved
    return moved
