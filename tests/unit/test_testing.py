"""`rayprune.testing`: every broken method is caught, with a line that names the failure and the cure."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune import (
    DynaMS,
    EpochContext,
    InfoBatch,
    LeastConfidence,
    Method,
    RandomEpoch,
    Schedule,
    ScoreTable,
    Selection,
)
from rayprune.core.bases.in_batch import BatchContext, InBatchMethod, Picked, num_picked
from rayprune.core.table import Ids, Signals
from rayprune.errors import ConfigError
from rayprune.testing import CHECKS, check_method
from tests.support.paths import ROOT

KEEP_HARDEST = "examples/keep_hardest.py:KeepHardest"


def half(context: EpochContext, ids: Any, **options: Any) -> Selection:
    """Keep the given ids; request what that drops."""
    drops = context.num_samples - len(ids)
    ratio = drops / context.num_samples
    return Selection.of_ids(ids, context.num_samples, requested=ratio, expected_drops=drops, **options)


@dataclass(frozen=True)
class Good(Method):
    """Keep the upper half of the losses; the other classes break it."""

    paper = "none"
    signals = ("loss",)
    prune_ratio: float | Schedule = 0.5

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        num = context.num_samples
        if not table.visited.all():
            return Selection.full(num)
        return half(context, np.argsort(table["loss"], kind="stable")[num // 2 :])


class CountsRows(Good):
    """Starts at one over the number of the table's rows, which are all samples or those of a shard."""

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        table["loss"][ids] = signals["loss"] + np.float32(1 / len(table))


class NoPaper(Good):
    """Lacks a paper."""

    paper = ""


class NoDataclass(Good):
    """Has a hyperparameter that no config can set."""

    share: float = 0.5


@dataclass(frozen=True)
class Unhashable(Good):
    """Has a list as a hyperparameter that stays a list."""

    shares: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Locked(Good):
    """Holds a lock."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lock", threading.Lock())


class Undeclared(Good):
    """Reads a signal that it does not declare."""

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        table["loss"][ids] = signals["loss"] * (1 - signals["correct"])


class Optional(Good):
    """Reads a signal that it does not declare, if it is there."""

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        table["loss"][ids] = signals.get("el2n", signals["loss"])


class NoColumn(Good):
    """Writes a column that it does not declare."""

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        table["mean"][ids] = signals["loss"]


class OtherRows(Good):
    """Decays the scores of all samples with each batch."""

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        table["loss"][:] *= 0.9
        table["loss"][ids] = signals["loss"]


class BatchMean(Good):
    """Stores losses relative to the batch."""

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        table["loss"][ids] = signals["loss"] - signals["loss"].mean()


class ReturnsIds(Good):
    """Returns ids."""

    def select(self, table: ScoreTable, context: EpochContext) -> Any:
        return np.arange(context.num_samples)


class ZeroWeights(Good):
    """Keeps samples that do not count."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        ids = np.arange(context.num_samples)
        return Selection.of_ids(ids, context.num_samples, weights=ids % 2)


class NanWeights(Good):
    """Divides by zero."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        ids = np.arange(context.num_samples)
        return Selection.of_ids(ids, context.num_samples, weights=np.full(ids.size, np.nan))


class Coin(Good):
    """Draws from a generator without a seed."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        ids = np.random.default_rng().permutation(context.num_samples)
        return half(context, ids[context.num_samples // 2 :])


class GlobalCoin(Good):
    """Draws from NumPy's global generator, which it seeds."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        np.random.seed(context.epoch)  # noqa: NPY002
        return half(context, np.random.permutation(context.num_samples)[context.num_samples // 2 :])  # noqa: NPY002


class WritesInSelect(Good):
    """Ages the scores when it selects."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        table["loss"][:] *= 0.5
        return super().select(table, context)


class Counts(Good):
    """Keeps a counter in the class."""

    calls: ClassVar[dict[str, int]] = {}

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        self.calls["select"] = self.calls.get("select", 0) + 1
        return half(context, np.roll(np.arange(context.num_samples), self.calls["select"])[context.num_samples // 2 :])


@dataclass(frozen=True)
class Remembers(Good):
    """Keeps last epoch's losses in the instance, outside the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seen", {})

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        for id, loss in zip(ids.tolist(), signals["loss"].tolist(), strict=True):
            self.seen[id, epoch] = loss
        super().fold(table, ids, signals, epoch)

    seen: ClassVar[dict[tuple[int, int], float]]

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        if context.epoch == 0:
            return Selection.full(context.num_samples)
        sums = [sum(self.seen.get((id, e), 0.0) for e in range(context.epoch)) for id in range(context.num_samples)]
        return half(context, np.argsort(sums, kind="stable")[: context.num_samples // 2])


class KeepsTwo(Good):
    """Keeps two samples of any number."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        return half(context, [0, 1])


class ReadsLabels(Good):
    """Needs labels without saying so."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        assert context.labels is not None
        return super().select(table, context)


class IgnoresFloor(Good):
    """Removes what the floor adds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "class_floor", 0.0)


class Silent(Good):
    """Prunes without saying how much."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        return replace(super().select(table, context), requested=0.0, expected_drops=0.0)


class DropsMore(Good):
    """Drops half and says a tenth."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        chosen = super().select(table, context)
        return replace(chosen, requested=0.1, expected_drops=0.1 * context.num_samples) if chosen.realised else chosen


class ExpectsMore(Good):
    """Drops half and says that it expects to drop nine tenths."""

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        chosen = super().select(table, context)
        return replace(chosen, requested=0.9, expected_drops=0.9 * context.num_samples) if chosen.realised else chosen


class Never(Good):
    """Has a ratio that it ignores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_schedule("prune_ratio")

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        return Selection.full(context.num_samples)


class Restless(Good):
    """Collects scores, then chooses again in each epoch."""

    @property
    def collect_epochs(self) -> int:
        return 2

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        return super().select(table, context) if context.epoch >= 2 else Selection.full(context.num_samples)


class Columns(Good):
    """Returns a score with two numbers per sample."""

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        return {"pair": np.zeros((len(table), 2))}

    def columns(self) -> Mapping[str, Any]:
        return {"loss": np.float32, "pair": (np.float32, (2,))}


class Unweighted(RandomEpoch):
    """Draws without the weights that would make it unbiased."""

    unbiased = True


class Constant(Good):
    """Is declared unbiased and draws nothing."""

    unbiased = True


@dataclass(frozen=True)
class GoodInBatch(InBatchMethod):
    """Train on the lower half of every batch; the other classes break it."""

    paper = "none"
    keep: float = 0.5

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        return np.arange(num_picked(self.keep, context.num_rows)), None


class PicksTwice(GoodInBatch):
    """Picks a row twice."""

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        return np.zeros(num_picked(self.keep, context.num_rows), dtype=int), None


class PicksMore(GoodInBatch):
    """Picks all rows of small batches."""

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        return np.arange(max(min(2, context.num_rows), context.num_rows // 2)), None


class PicksWhenUnequal(GoodInBatch):
    """Picks the rows above the mean, as many as there are."""

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        return np.flatnonzero(signals["loss"] > signals["loss"].mean()), None


class PicksByCoin(GoodInBatch):
    """Draws from a generator without a seed."""

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        rows, _ = super().pick(signals, context)
        return np.random.default_rng().permutation(context.num_rows)[: rows.size], None


class PicksAndWrites(GoodInBatch):
    """Sorts the signals in place."""

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        signals["loss"].sort()
        return super().pick(signals, context)


class UpdatesOthers(GoodInBatch):
    """Updates a column that it does not declare."""

    def update(self, signals: Signals, context: BatchContext) -> Mapping[str, NDArray[Any]]:
        return {"last": signals["loss"]}


class UpdatesOne(GoodInBatch):
    """Updates a column by a single number."""

    def state_columns(self, num_samples: int) -> Mapping[str, float]:
        return {"last": 0.0}

    def update(self, signals: Signals, context: BatchContext) -> Mapping[str, NDArray[Any]]:
        return {"last": signals["loss"].mean()}


BROKEN: dict[type[Method], str] = {
    PicksTwice: r"picked a row twice.*: pick\(\) returns distinct rows",
    PicksMore: "of 2 rows with random signals, it picks 2, and keep 0.5 means 1",
    PicksWhenUnequal: r"picked rows .* of shape \(0,\) instead of one or more integers",
    PicksByCoin: "it picks others when asked again",
    PicksAndWrites: "raised ValueError .*read-only.*and changes nothing that it gets",
    UpdatesOthers: r"update\(\) returns \['last'\], not \[\]",
    UpdatesOne: r"update\(\) returns 'last' of shape \(\), or with NaN",
    NoPaper: "paper is empty: set the class attributes",
    NoDataclass: r"share is not a field of a dataclass: put @dataclass\(frozen=True\)",
    Unhashable: "check 'hyperparameters' raised TypeError .*unhashable.*: put @dataclass",
    Locked: "check 'pickle' raised TypeError .*: define the class at the top level",
    Undeclared: "reads the signal 'correct', which it does not declare: list signals in `signals`",
    Optional: "reads the signal 'el2n', which it does not declare",
    NoColumn: r"reads the column 'mean', which it does not declare: .*columns\(\)",
    OtherRows: r"fold\(\) changes 'column/loss' of samples that it did not get",
    CountsRows: r"column 'loss' differs where the table is spread over shards: .*table\.num_samples",
    BatchMean: "batches in another order change .*: fold",
    ReturnsIds: r"select\(\) returns ndarray, not a Selection: return Selection.of_ids",
    ZeroWeights: "epoch 0 keeps samples with weight 0: return Selection.of_ids",
    NanWeights: "raised ConfigError .weights must be finite.*: return Selection.of_ids",
    Coin: "select other samples .*: draw from context.rng",
    GlobalCoin: "uses NumPy's global generator: draw from context.rng",
    WritesInSelect: r"select\(\) changes the table in epoch 1: ",
    Counts: "select other samples .*: draw from context.rng",
    Remembers: "resumed in epoch 2, it selects other samples: keep all state in the table's columns",
    KeepsTwo: "check 'few_samples' raised ConfigError .*: it must work with any N ≥ 1",
    ReadsLabels: "check 'labels' raised AssertionError .*: set needs_labels = True",
    IgnoresFloor: "class_floor 0.3 does not hold in epoch 1",
    Silent: "epoch 1 drops 500 of 1000 samples and requests the ratio 0: give Selection requested=",
    DropsMore: "epoch 1 drops 500 of 1000 samples and requests the ratio 0.1",
    ExpectsMore: "epoch 1 drops 500 of 1000 samples and expected to drop 900",
    Never: "has a prune_ratio and prunes in none of 16 epochs",
    Restless: "it changes its subset: a method with collect_epochs",
    Columns: r"score 'pair' has shape \(41, 2\): scores\(\) returns one number per sample",
    Unweighted: r"declared unbiased, and its weights sum to 0.500·N over 300 draws: give each",
    Constant: "declared unbiased, and the seed does not change what it selects",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_method_is_caught(broken: type[Method]) -> None:
    with pytest.raises(AssertionError, match=f"^{broken.__name__}: .*{BROKEN[broken]}") as caught:
        check_method(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "good",
    [
        Good,
        GoodInBatch,
        Good(class_floor=0.2),
        InfoBatch(prune_ratio=0.3),
        RandomEpoch(prune_ratio=0.01),
        RandomEpoch(prune_ratio=0.0),
        LeastConfidence(class_floor=1.0),
        "random",
        {"name": "tdds", "prune_ratio": 0.0},
    ],
)
def test_a_good_method_passes(good: Any) -> None:
    check_method(good)


def test_the_example_passes_by_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_method(KEEP_HARDEST)


def test_a_method_that_prunes_late_is_checked_in_a_longer_run() -> None:
    late = DynaMS(block_epochs=20)
    with pytest.raises(AssertionError, match=r"budget.* is checked with num_epochs="):
        check_method(late)
    check_method(late, num_epochs=50)


@dataclass(frozen=True)
class Required(Good):
    """Has a hyperparameter without a default."""

    share: float = field(kw_only=True)


def test_a_class_that_needs_hyperparameters_is_checked_as_an_instance() -> None:
    with pytest.raises(ConfigError, match=r"'share': give check_method an instance"):
        check_method(Required)
    check_method(Required(share=0.5))


@pytest.mark.parametrize("other", [dict, "infobach", 3])
def test_only_a_method_is_checked(other: Any) -> None:
    with pytest.raises(ConfigError, match=r"not a subclass of rayprune\.Method|unknown method|must be a name"):
        check_method(other)


def test_every_check_has_a_method_that_fails_it() -> None:
    failing: set[str] = set()
    for broken in BROKEN:
        with pytest.raises(AssertionError) as caught:
            check_method(broken)
        failing.add(_name_of_the_check(caught))
    assert failing == set(CHECKS)


def _name_of_the_check(caught: pytest.ExceptionInfo[AssertionError]) -> str:
    frame = next(entry for entry in caught.traceback if entry.name == "run_check")
    return str(frame.frame.f_locals["name"])


def test_it_is_an_attribute_of_the_package_and_loads_nothing_heavy() -> None:
    code = """
import sys, rayprune
assert "rayprune.testing" not in sys.modules
rayprune.testing.check_method(rayprune.InfoBatch)
print([name for name in ("torch", "ray", "pytest", "hypothesis", "pydantic", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
