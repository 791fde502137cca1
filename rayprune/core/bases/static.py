"""Base classes of static methods: score all samples in a run of T epochs, then train on one subset.

`StaticMethod` is for any rule that chooses the subset; `ScoredMethod` for those that give every sample a score, and
offers them one set of options: the ends and the strata of CCS (Zheng et al., ICLR 2023, arXiv 2210.15809), balanced
classes, and the class quotas of DRoP (Vysogorets, Ahuja, Kempe, ICLR 2025, arXiv 2404.05579).

Shapes: N samples, M kept.
"""

from __future__ import annotations

import abc
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.choosing import Balance, Rule, choose, num_pruned
from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_ratio, check_share, mismatch, short_repr
from rayprune.core.vectors import MISSING_CURE, VectorColumn
from rayprune.errors import ConfigError


@dataclass(frozen=True)
class StaticMethod(Method):
    """Train on all samples for T epochs, then on one subset.

    Methods with `sweep_signals` get a forward-only pass over all samples after epoch T−1, in eval mode and without
    augmentation.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
    """

    kind = "static"
    signals = ("loss",)
    fixed = True

    prune_ratio: float | Any = 0.5  # Any: __post_init__ refuses a schedule with its own message

    # The hyperparameter that sets `collect_epochs`, for messages.
    _length_field: ClassVar[str] = "score_epochs"
    # Whether the scores need each of a sample's T visits, and not only the last one.
    every_visit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if mismatch(self.prune_ratio, float):
            given = short_repr(self.prune_ratio)
            raise ConfigError(f"prune_ratio = {given}: one subset takes no schedule: give a number in [0, 1)")
        check_ratio("prune_ratio", self.prune_ratio)
        if self.collect_epochs < 1:
            raise ConfigError(f"{self._length_field} {self.collect_epochs!r} must be at least 1")

    @property
    def cost(self) -> str:
        """The scoring run, and what comes after it."""
        parts = [f"{self.collect_epochs} epoch{'s' * (self.collect_epochs > 1)} on all samples"]
        if self.sweep_signals:
            parts.append("a forward pass")
        if vectors := [name for name, column in self.columns().items() if isinstance(column, VectorColumn)]:
            parts.append(f"{' and '.join(vectors)} on the disk")
        return ", ".join(parts)

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        """Mask visits after the scoring run, which must not change the subset.

        With `every_visit`, repeats within an epoch are masked as well.

        Raises:
            ConfigError: with `every_visit`, a sample missed an epoch, comes in a past one, or comes twice in an epoch
                with different values.
        """
        scoring = epoch < self.collect_epochs
        if not self.every_visit:
            return np.full(ids.size, scoring)
        last_B = table.last_visit[ids]
        self._check_order(last_B, ids, epoch)
        repeated_B: NDArray[np.bool_] = last_B == epoch
        if scoring and repeated_B.any():
            repeats = {name: array[repeated_B] for name, array in signals.items()}
            self._check_repeats(table, ids[repeated_B], repeats, epoch)
        return ~repeated_B & scoring

    def _check_order(self, last_visit: NDArray[np.int32], ids: Ids, epoch: int) -> None:
        """Raise ConfigError if a sample misses its visit in the epoch before, or was visited in a later epoch."""
        gap = last_visit < min(epoch, self.collect_epochs) - 1
        if gap.any():
            row = int(np.argmax(gap))
            history = f"last visited in epoch {last_visit[row]}" if last_visit[row] >= 0 else "never visited before"
            raise ConfigError(f"id {ids[row]} was {history} and now comes in epoch {epoch}: {self._visit_cure}")
        past = last_visit > epoch
        if past.any() and epoch < self.collect_epochs:
            row = int(np.argmax(past))
            raise ConfigError(
                f"id {ids[row]} comes in epoch {epoch} and came in epoch {last_visit[row]} before: sort them"
            )

    def _check_repeats(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Raise ConfigError if second visits in an epoch differ from the first, by default from the last values."""
        for name in self.signals:
            check_equal(ids, signals[name].astype(np.float32), table[name][ids], name, epoch)

    def num_kept(self, num_samples: int) -> int:
        """Return M = N − floor(r·N), at least 1."""
        return num_samples - min(num_pruned(self.prune_ratio, num_samples), num_samples - 1)

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples for T epochs, then the subset.

        Raises:
            ConfigError: the run is shorter than T epochs, or a sample was not visited in the last of them.
        """
        num = context.num_samples
        self._check_visited(table.last_visit, context)
        if context.epoch < self.collect_epochs:
            selection = Selection.full(num)
            if self.sweep_signals and context.epoch == self.collect_epochs - 1:
                return Selection(selection.codes, selection.weight_values, sweep="all")
            return selection
        self._check_swept(table, context.epoch)
        count = self.num_kept(num)
        ids, weights, facts = self.subset(table, context, count)
        selection = Selection.of_ids(ids, num, weights=weights, requested=self.prune_ratio, expected_drops=num - count)
        return selection.with_facts(**facts)

    def _check_visited(self, last_visit: NDArray[np.int32], context: EpochContext) -> None:
        """Raise ConfigError if the run is shorter than the scoring run, or its newest epoch missed samples."""
        length = self.collect_epochs
        if context.num_epochs < length:
            needed = f"{self._length_field} {length} needs at least {length} epochs, the run has {context.num_epochs}"
            raise ConfigError(f"{needed}: lower it, or train longer")
        newest = min(context.epoch, length) - 1
        missing = np.flatnonzero(last_visit < newest)
        if missing.size:
            count = f"{missing.size} of {last_visit.size} samples were not visited in epoch {newest}"
            raise ConfigError(f"{count}, ids {missing[:5].tolist()}: {self._visit_cure}")

    @property
    def _visit_cure(self) -> str:
        return (
            f"every sample must be visited in each of the first {self.collect_epochs} epochs; train.last_batch=drop "
            "leaves some out (use pad), and so do NaN logits (lower optim.lr)"
        )

    def _check_swept(self, table: ScoreTable, epoch: int) -> None:
        for name in self.sweep_signals:
            if name in table.columns and (missing := np.flatnonzero(np.isnan(table[name]))).size:
                raise ConfigError(
                    f"epoch {epoch}: {missing.size} samples (ids {missing[:5].tolist()}) have no {name}: {MISSING_CURE}"
                )

    @abc.abstractmethod
    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Return the ids of exactly `count` samples, their weights or None for 1, and facts for metrics.jsonl."""


@dataclass(frozen=True)
class ScoredMethod(StaticMethod):
    """Keep the samples that one score of each sample chooses.

    A subclass defines `score`, and sets `keep` to the end of the scores that it keeps.

    Args:
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        rule: which scores to keep: the highest (top), the lowest (bottom), those around the median (middle), or a draw
            from num_strata bins of equal width (strata); null for the method's own.
        drop_hardest: share of all samples, at most prune_ratio, never kept: the end of the scores that the method's own
            rule keeps first (CCS calls it the mislabeled share); with it, the rule applies to the rest.
        balance: `proportional` keeps the same share of every class, `even` the same number, `drop` more of the classes
            with a low recall on validation data (DRoP); `none` ignores classes.
        num_strata: S, for the rule strata.
    """

    # The rule of the method's paper, and the score's name in scores.parquet.
    keep: ClassVar[Literal["top", "bottom", "middle"]] = "top"
    score_name: ClassVar[str] = ""
    selection_fields: ClassVar[tuple[str, ...]] = (
        "prune_ratio",
        "class_floor",
        "rule",
        "drop_hardest",
        "balance",
        "num_strata",
    )

    score_epochs: int = 10
    _: KW_ONLY
    rule: Rule | None = None
    drop_hardest: float = 0.0
    balance: Balance = "none"
    num_strata: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("drop_hardest", self.drop_hardest)
        if self.drop_hardest > self.prune_ratio:
            raise ConfigError(f"drop_hardest {self.drop_hardest} is above prune_ratio {self.prune_ratio}: lower it")
        if self.num_strata < 1:
            raise ConfigError(f"num_strata {self.num_strata} must be at least 1")
        if self.drop_hardest and self.keep == "middle":
            raise ConfigError(
                "drop_hardest goes with scores that have a hard end, and this method keeps the middle: leave it out"
            )
        object.__setattr__(self, "needs_labels", self.needs_labels or self.balance != "none")

    @property
    def collect_epochs(self) -> int:
        """T."""
        return self.score_epochs

    @abc.abstractmethod
    def score(self, table: ScoreTable) -> NDArray[Any]:
        """Return the scores, (N,) floating; NaN for samples that were never visited."""

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the score under its name."""
        return {self.score_name or self.name: self.score(table)}

    def to_average(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return what several scoring runs average, name → (N,): the score, and what else `subset` reads."""
        return self.scores(table)

    def final_score(self, table: ScoreTable, context: EpochContext) -> NDArray[Any]:
        """Return the scores to choose by, (N,): the table's, or their averages over several scoring runs."""
        average = context.averaged.get(self.score_name or self.name)
        return self.score(table) if average is None else average

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Choose by the scores; among equal ones the lower ids are kept."""
        name, rule, scores = self.score_name or self.name, self.rule or self.keep, self.final_score(table, context)
        hardest_are_high = self.keep == "top"
        ids = choose(
            scores,
            count,
            rule,
            labels=context.labels,
            balance=self.balance,
            recalls=context.recalls,
            rng=context.rng_of(self.collect_epochs),
            num_strata=self.num_strata,
            drop_top=self.drop_hardest if hardest_are_high else 0.0,
            drop_bottom=0.0 if hardest_are_high else self.drop_hardest,
        ).ids
        edge = float(scores[ids].min() if rule == "top" else scores[ids].max())
        facts = {"score": name}
        return ids, None, facts | ({"threshold": edge} if rule in ("top", "bottom") else {})


def check_equal(ids: Ids, new: NDArray[Any], old: NDArray[Any], what: str, epoch: int) -> None:
    """Raise ConfigError unless the values of second visits in an epoch, (B,) or (B, C), are those of the first."""
    differ = np.flatnonzero((new != old).reshape(ids.size, -1).any(axis=1))
    if differ.size:
        cure = "a sampler that pads repeats samples, and two samples may share an id: give every sample its own"
        twice = f"id {ids[differ[0]]} was observed twice in epoch {epoch}"
        raise ConfigError(f"{twice} with different {what}: {cure}")
