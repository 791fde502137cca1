"""The strategies: which prompts are worth their rollouts.

A group of rollouts whose rewards are all equal has no advantage and no gradient in GRPO ("zero variance"). All
strategies but `uniform` predict such groups from earlier rewards and draw fewer of them.

Shapes: N prompts, n drawn prompts, K groups. z is the number of consecutive groups of a prompt without variance.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rayprune.core.references import closest
from rayprune.core.validation import check_share, short_repr
from rayprune.errors import ConfigError
from rayprune.prompts.rewards import Ids, RewardGroups
from rayprune.prompts.strategy import PassStrategy, PromptTable, Strategy


@dataclass(frozen=True)
class Uniform(PassStrategy):
    """Draw every prompt once in each pass, in random order; rewards only enter the scores. The baseline."""

    name: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class GRESO(PassStrategy):
    """Skip a prompt with probability 1 − p^z in each pass.

    Zheng et al., "Act Only When It Pays: Efficient Reinforcement Learning for LLM Reasoning via Selective Rollouts",
    2025, arXiv 2506.02177. p is `p_easy` if the last group was solved and `p_hard` otherwise. After each batch, p_easy
    falls by `step` if the share of solved groups without variance is at least `target_easy`, and rises by `step`
    otherwise; p_hard and `target_hard` likewise.

    The defaults are those of the authors' training scripts and code (github.com/Infini-AI-Lab/GRESO). The adaptive
    batch size is `PromptSelector.draws_for`.

    Deliberate deviations: a batch is as many complete groups as the last `next` drew, whenever they arrive, where the
    authors' code takes all draws of a training step, from the second pass on; p stays in [step, 1] (there: [0.05,
    0.95]), so every prompt comes back; a call that two whole passes do not fill draws skipped prompts.

    Args:
        p_easy: the first exploration probability of easy prompts, in (0, 1].
        p_hard: that of hard prompts.
        target_easy: the target share of groups without variance that are solved, in [0, 1]; a third of 25%.
        target_hard: the target share of the others without variance; two thirds of 25%.
        step: Δp, in (0, 1].
    """

    name: ClassVar[str] = "greso"
    needs_groups: ClassVar[bool] = True

    p_easy: float = 0.5
    p_hard: float = 0.5
    target_easy: float = 0.25 / 3
    target_hard: float = 0.5 / 3
    step: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("p_easy", "p_hard", "target_easy", "target_hard", "step"):
            check_share(name, getattr(self, name))
        for name in ("p_easy", "p_hard", "step"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} 0 would never bring a prompt back: give a number in (0, 1]")

    def numbers(self) -> dict[str, float]:
        """Return the numbers of a pass and both exploration probabilities."""
        return super().numbers() | {"p_easy": self.p_easy, "p_hard": self.p_hard}

    def admits(self, table: PromptTable, ids: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Draw from the keep probabilities."""
        return rng.random(ids.size) < self._keep(table, ids)

    def _keep(self, table: PromptTable, ids: NDArray[np.int32] | slice) -> NDArray[np.float64]:
        p = np.where(table["easy"][ids], table.numbers["p_easy"], table.numbers["p_hard"])
        keep: NDArray[np.float64] = p ** table["streak"][ids]
        return keep

    def end_window(self, table: PromptTable, easy: float, hard: float) -> None:
        """Move both probabilities by one step toward the targets."""
        for name, share, target in (("p_easy", easy, self.target_easy), ("p_hard", hard, self.target_hard)):
            moved = table.numbers[name] + (-self.step if share >= target else self.step)
            table.numbers[name] = min(max(moved, self.step), 1.0)

    def scores(self, table: PromptTable) -> dict[str, NDArray[Any]]:
        """Return `keep_probability`, p^z."""
        return {"keep_probability": self._keep(table, slice(None))}


@dataclass(frozen=True)
class ZeroVariance(PassStrategy):
    """Leave a prompt out of the next 2^(z−1) passes after its z-th consecutive group without variance.

    Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", 2025, arXiv 2503.14476, generates
    such groups and then replaces them (dynamic sampling). This strategy leaves them out before the rollouts, and
    re-admits them later, as the policy changes. The growing wait is rayprune's own. A pass has only the admitted
    prompts, so passes get shorter and re-admission comes sooner when many are left out.

    Args:
        max_wait: the most passes that a prompt is left out for, at least 1.
    """

    name: ClassVar[str] = "zero_variance"
    needs_groups: ClassVar[bool] = True

    max_wait: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_wait < 1:
            raise ConfigError(f"max_wait {self.max_wait} must be at least 1")

    def columns(self) -> dict[str, tuple[DTypeLike, float]]:
        """Return the pass's order and the pass from which each prompt is admitted."""
        return super().columns() | {"admitted": (np.int32, 0)}

    def members(self, table: PromptTable) -> NDArray[np.int32]:
        """Return the admitted prompts; without any, skip to the pass in which one is."""
        numbers = table.numbers
        numbers["pass"] = max(numbers["pass"], int(table["admitted"].min()) - 1)
        return np.flatnonzero(table["admitted"] <= numbers["pass"] + 1).astype(np.int32)

    def admits(self, table: PromptTable, ids: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Refuse prompts of which a late group has shown no variance since the pass began."""
        admitted: NDArray[np.bool_] = table["admitted"][ids] <= table.numbers["pass"]
        return admitted

    def fold(self, table: PromptTable, groups: RewardGroups) -> None:
        """Set the pass from which the prompts are admitted."""
        streak = table["streak"][groups.ids].astype(np.int64)
        wait = np.where(streak > 0, np.minimum(2 ** np.minimum(np.maximum(streak - 1, 0), 30), self.max_wait), -1)
        table["admitted"][groups.ids] = int(table.numbers["pass"]) + wait + 1

    def scores(self, table: PromptTable) -> dict[str, NDArray[Any]]:
        """Return `wait`, the number of coming passes that leave a prompt out."""
        return {"wait": np.maximum(table["admitted"] - int(table.numbers["pass"]) - 1, 0)}


@dataclass(frozen=True)
class BetaStrategy(Strategy):
    """A Beta posterior of each prompt's success rate, with forgetting; the base of `MoPPS` and `Learnability`.

    With the prior (α0, β0) and s successes in a group of k, α ← λα + (1 − λ)α0 + s and β ← λβ + (1 − λ)β0 + k − s.

    Args:
        discount: λ in [0, 1]; 1 never forgets. A call's rewards of one prompt, or `group_size` of them, are one group.
        prior: (α0, β0), both above 0.
        candidates: the random candidates of a draw of n prompts are `candidates`·n, at least 1.
    """

    discount: float = 0.5
    prior: tuple[float, float] = (1.0, 1.0)
    candidates: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("discount", self.discount)
        if min(self.prior) <= 0:
            raise ConfigError(f"prior {self.prior} must be two numbers above 0")
        if self.candidates < 1:
            raise ConfigError(f"candidates {self.candidates} must be at least 1")

    def columns(self) -> dict[str, tuple[DTypeLike, float]]:
        """Return the posterior's columns."""
        return {"alpha": (np.float32, self.prior[0]), "beta": (np.float32, self.prior[1])}

    def fold(self, table: PromptTable, groups: RewardGroups) -> None:
        """Update the posteriors."""
        for name, prior, counts in (
            ("alpha", self.prior[0], groups.successes),
            ("beta", self.prior[1], groups.sizes - groups.successes),
        ):
            column = table[name]
            column[groups.ids] = self.discount * column[groups.ids] + (1 - self.discount) * prior + counts

    def choose(self, table: PromptTable, n: int, rng: np.random.Generator) -> Ids:
        """Return the (n,) best of the candidates, in random order."""
        ids = rng.choice(table.num_prompts, min(table.num_prompts, self.candidates * n), replace=False)
        return rng.permutation(self.pick(table, ids, n, rng))

    @abstractmethod
    def pick(self, table: PromptTable, ids: Ids, n: int, rng: np.random.Generator) -> Ids:
        """Return (n,) of the candidates, which are in random order."""

    def scores(self, table: PromptTable) -> dict[str, NDArray[Any]]:
        """Return `p`, the posterior's mean, and `p_std`, its standard deviation."""
        alpha, beta = table["alpha"].astype(np.float64), table["beta"].astype(np.float64)
        total = alpha + beta
        return {"p": alpha / total, "p_std": np.sqrt(alpha * beta / (total + 1)) / total}


@dataclass(frozen=True)
class MoPPS(BetaStrategy):
    """Draw a success rate from each candidate's posterior (Thompson sampling); take those nearest to the target.

    Qu et al., "Can Prompt Difficulty be Online Predicted for Accelerating RL Finetuning of Reasoning Models?", 2025,
    arXiv 2507.04632. The defaults of λ and of the candidates are those of the authors' recipe for Countdown in verl.

    Deliberate deviation: the candidates are drawn anew for each call, not in the order of a data loader.

    Args:
        target: γ* in [0, 1], the success rate that is worth most.
        discount, prior, candidates: see `BetaStrategy`.
    """

    name: ClassVar[str] = "mopps"

    target: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("target", self.target)

    def pick(self, table: PromptTable, ids: Ids, n: int, rng: np.random.Generator) -> Ids:
        """Return the candidates whose drawn success rates are nearest to the target."""
        drawn = rng.beta(table["alpha"][ids], table["beta"][ids])
        return _smallest(ids, np.abs(drawn - self.target), n)


@dataclass(frozen=True)
class Learnability(BetaStrategy):
    """Take the candidates of the highest learnability p(1 − p), and some at random.

    Foster et al., "Learning to Reason at the Frontier of Learnability", 2025, arXiv 2502.12272.

    Deliberate deviations: p is the mean of the posterior of `BetaStrategy` and costs no rollouts of its own (there:
    fresh rollouts of many candidates); prompts without rewards have p = α0 ÷ (α0 + β0); ties are broken at random.

    Args:
        explore: the share of a draw that is random, in [0, 1]. It re-admits prompts whose p has changed.
        discount, prior, candidates: see `BetaStrategy`.
    """

    name: ClassVar[str] = "learnability"

    explore: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("explore", self.explore)

    def pick(self, table: PromptTable, ids: Ids, n: int, rng: np.random.Generator) -> Ids:
        """Return the first candidates, which are random, and the most learnable of the others."""
        num_random = int(self.explore * n + rng.random())
        # The candidates are in random order, so the first ones are random, too.
        alpha, beta = table["alpha"][ids[num_random:]], table["beta"][ids[num_random:]]
        score = alpha * beta / (alpha + beta) ** 2
        return np.concatenate([ids[:num_random], _smallest(ids[num_random:], -score, n - num_random)])

    def scores(self, table: PromptTable) -> dict[str, NDArray[Any]]:
        """Return `p`, `p_std` and `learnability`."""
        found = super().scores(table)
        return found | {"learnability": found["p"] * (1 - found["p"])}


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Uniform, MoPPS, GRESO, Learnability, ZeroVariance)
}


def build_strategy(strategy: str | Strategy) -> Strategy:
    """Return a strategy from its name, or the strategy itself.

    Raises:
        ConfigError: an unknown name, or no strategy.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str):
        raise ConfigError(f"strategy must be a name or a strategy such as MoPPS(), got {short_repr(strategy)}")
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}: {closest(strategy, STRATEGIES)}")
    return STRATEGIES[strategy]()


def _smallest(ids: Ids, values: NDArray[np.floating[Any]], n: int) -> Ids:
    """Return the (n,) ids of the smallest values."""
    if n == 0 or n == ids.size:
        return ids[:n]
    return ids[np.argpartition(values, n - 1)[:n]]
