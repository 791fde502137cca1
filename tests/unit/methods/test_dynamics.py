"""Methods that score by the training visits: small examples, visits out of order, and resuming within an epoch."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune import DUAL
from rayprune.core import Selector
from rayprune.methods import METHODS, build_method
from rayprune.testing import check_method

CONFIGS: dict[str, dict[str, Any]] = {
    "forgetting": {"score_epochs": 7},
    "el2n": {"score_epochs": 7, "first_epoch": 2, "last_epoch": 6},
    "aum": {"score_epochs": 7},
    "ccs": {"score_epochs": 7, "drop_hardest": 0.2, "num_strata": 5},
    "dyn_unc": {"score_epochs": 7, "window_size": 3},
    "dual": {"score_epochs": 7, "window_size": 3, "beta_sampling": True},
    "s2l": {"score_epochs": 7, "clusters": 3},
}
every_method = pytest.mark.parametrize("name", CONFIGS)


def selector_of(name: str, num_samples: int = 6, num_epochs: int = 10, **options: Any) -> Selector:
    return Selector(build_method({"name": name, **options}), num_samples, num_epochs)


def observe(selector: Selector, ids: Any, values: Any, epoch: int) -> None:
    selector.observe(ids, {selector.method.signals[0]: np.asarray(values)}, epoch)


def scored(name: str, values_TN: Any, **options: Any) -> Selector:
    """Return a Selector after T epochs."""
    values_TN = np.asarray(values_TN, dtype=np.float32)
    selector = selector_of(name, values_TN.shape[1], len(values_TN) + 3, score_epochs=len(values_TN), **options)
    for epoch, values_N in enumerate(values_TN):
        selector.begin_epoch(epoch)
        observe(selector, np.arange(values_N.size), values_N, epoch)
    return selector


def scores_of(selector: Selector) -> NDArray[Any]:
    (scores,) = selector.scores().values()
    return scores


def signals(name: str, epoch: int, num_samples: int) -> NDArray[np.float32]:
    values = np.random.default_rng([5, epoch]).random(num_samples).astype(np.float32)
    return (values < 0.5).astype(np.float32) if name == "forgetting" else values


# Small examples


def test_forgetting_counts_visits_that_are_wrong_after_a_correct_one() -> None:
    correct_NT = [[0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    paper = scored("forgetting", np.transpose(correct_NT), prune_ratio=0.4)
    assert scores_of(paper).tolist() == [2, 0, 6, 0, 1]
    assert paper.begin_epoch(6).ids.tolist() == [0, 2, 4]
    assert paper.begin_epoch(6).facts["threshold"] == 1.0
    zero = scored("forgetting", np.transpose(correct_NT), prune_ratio=0.4, never_learned="zero")
    assert scores_of(zero).tolist() == [2, 0, 0, 0, 1]
    # Among equal scores the lower ids are kept.
    assert zero.begin_epoch(6).ids.tolist() == [0, 1, 4]


def test_shares_of_correct_positions_are_correct_from_a_half_on() -> None:
    assert scores_of(scored("forgetting", [[0.5, 0.49, 0.9], [0.49, 0.5, 0.6]])).tolist() == [1, 0, 0]


def test_el2n_is_a_mean_over_a_window_of_epochs() -> None:
    values_TN = [[9, 0], [1, 4], [2, 4], [7, 9]]
    assert scores_of(scored("el2n", values_TN)).tolist() == [4.75, 4.25]
    assert scores_of(scored("el2n", values_TN, first_epoch=1, last_epoch=3)).tolist() == [1.5, 4.0]
    assert scores_of(scored("el2n", values_TN, first_epoch=3)).tolist() == [7.0, 9.0]
    assert scored("el2n", values_TN, last_epoch=1).begin_epoch(4).ids.tolist() == [0]
    assert scored("el2n", values_TN, first_epoch=1, last_epoch=3).begin_epoch(4).ids.tolist() == [1]
    # The defaults are the first ten epochs, as in the program of CCS.
    assert build_method("el2n").mean_epochs == range(10)


def test_aum_keeps_the_lowest_mean_margins() -> None:
    margins_TN = [[0.5, -0.5, 0.1, 0.9], [0.25, -0.25, 0.3, 0.9]]
    selector = scored("aum", margins_TN)
    assert scores_of(selector) == pytest.approx([0.375, -0.375, 0.2, 0.9])
    assert selector.begin_epoch(2).ids.tolist() == [1, 2]
    assert scored("aum", margins_TN, drop_hardest=0.25).begin_epoch(2).ids.tolist() == [0, 2]
    assert scored("aum", margins_TN, rule="top").begin_epoch(2).ids.tolist() == [0, 3]


def test_aum_of_logits_uses_another_signal() -> None:
    method = build_method({"name": "aum", "margin_of": "logits"})
    assert method.signals == ("logit_margin",)
    assert build_method("aum").signals == ("margin",)
    assert list(method.columns()) == ["logit_margin", "mean_logit_margin"]
    check_method(method)
    check_method(build_method({"name": "ccs", "margin_of": "logits"}))


def test_ccs_draws_from_every_stratum_but_the_hardest_samples() -> None:
    margins = np.concatenate([np.linspace(-1, -0.9, 10), np.linspace(0, 0.09, 80), [0.5, 0.97, 0.98, 0.99, 1.0]])
    options: dict[str, Any] = {"drop_hardest": 10 / 95, "num_strata": 10, "prune_ratio": 80 / 95}
    ids = scored("ccs", margins[None], **options).begin_epoch(1).ids
    assert ids.size == 15
    assert set(range(90, 95)) < set(ids.tolist()), "sparse strata are kept whole"
    assert ids.min() >= 10, "the ten lowest are dropped"
    assert scored("aum", margins[None], prune_ratio=80 / 95).begin_epoch(1).ids.tolist() == list(range(15))


def test_windows_by_hand() -> None:
    values_TN = np.transpose([[0.2, 0.4, 0.6, 0.9], [0.3, 0.3, 0.3, 0.3]])
    # The windows of the first sample have the standard deviations 0.2 and 0.251661, and the means 0.4 and 0.633333.
    assert scores_of(scored("dyn_unc", values_TN, window_size=3)) == pytest.approx([0.225831, 0.0], abs=1e-6)
    dual = scored("dual", values_TN, window_size=3)
    assert scores_of(dual) == pytest.approx([0.106138, 0.0], abs=1e-6)
    assert scores_of(dual)[1] == 0.0, "constant probabilities are exactly 0"
    assert dual.begin_epoch(4).ids.tolist() == [0]


def test_no_window_is_complete_before_its_last_epoch() -> None:
    selector = selector_of("dyn_unc", num_samples=2, score_epochs=4, window_size=3)
    for epoch, values in enumerate(([0.2, 0.3], [0.4, 0.3], [0.6, 0.3])):
        assert np.isnan(scores_of(selector)).all()
        observe(selector, [0, 1], values, epoch)
    assert scores_of(selector) == pytest.approx([0.2, 0.0])


def test_weightless_samples_are_drawn_last() -> None:
    values_TN = np.random.default_rng(0).random((4, 8)).astype(np.float32)
    values_TN[:, [1, 2, 5]] = [1.0, 0.0, 0.5]  # scores of 0
    for ratio, zeros in ((0.5, []), (0.25, [1])):
        config = {"score_epochs": 4, "window_size": 3, "beta_sampling": True, "prune_ratio": ratio}
        for seed in range(20):
            selector = Selector(build_method({"name": "dual", **config}), 8, 6, seed)
            for epoch, values_N in enumerate(values_TN):
                observe(selector, np.arange(8), values_N, epoch)
            assert np.intersect1d(selector.begin_epoch(4).ids, [1, 2, 5]).tolist() == zeros


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_beta_sampling_of_equal_and_saturated_samples_keeps_the_lower_ids(value: float, num_samples: int) -> None:
    values_TN = np.full((3, num_samples), value)
    ids = scored("dual", values_TN, window_size=2, beta_sampling=True, prune_ratio=0.4).begin_epoch(3).ids
    assert ids.tolist() == list(range(num_samples - int(0.4 * num_samples)))


def test_beta_sampling_draws_by_the_averages_of_several_runs() -> None:
    rng, options = np.random.default_rng(0), {"window_size": 3, "beta_sampling": True, "prune_ratio": 0.7}
    one, other = (scored("dual", rng.random((5, 60)), **options) for _ in range(2))
    method = one.method
    assert isinstance(method, DUAL)
    averages = method.to_average(other.table)
    assert list(averages) == ["dual", "mean_prob"]
    both = Selector(method, 60, 8, averaged=averages)
    both.table.load_arrays(one.table.to_arrays())
    drawn = [selector.begin_epoch(5) for selector in (one, other, both)]
    assert drawn[0].ids.tolist() != drawn[1].ids.tolist() == drawn[2].ids.tolist()
    assert drawn[0].facts["beta_a"] != drawn[1].facts["beta_a"] == drawn[2].facts["beta_a"]
    assert list(both.scores()) == ["dual"]


def test_beta_sampling_goes_with_balanced_classes() -> None:
    method = build_method({"name": "dual", **CONFIGS["dual"], "balance": "even"})
    selector = Selector(method, 60, 10, labels=np.arange(60) // 45)
    for epoch in range(7):
        observe(selector, np.arange(60), signals("dual", epoch, 60), epoch)
    assert np.bincount(np.arange(60)[selector.begin_epoch(7).ids] // 45).tolist() == [15, 15]
    assert selector.begin_epoch(7).ids.tolist() == selector.begin_epoch(9).ids.tolist()


# Visits


@every_method
def test_the_method_passes_with_other_options(name: str) -> None:
    check_method(build_method({"name": name, **CONFIGS[name]}))


@every_method
def test_a_repeat_counts_once_and_a_different_one_is_refused(name: str) -> None:
    once, twice = (selector_of(name, **CONFIGS[name]) for _ in range(2))
    for epoch in range(7):
        values = signals(name, epoch, 6)
        observe(once, np.arange(6), values, epoch)
        observe(twice, [3, 5], values[[3, 5]], epoch)
        observe(twice, [5, 3, 1], values[[5, 3, 1]], epoch)
        observe(twice, [0, 2, 4, 5], values[[0, 2, 4, 5]], epoch)
    before = {column: array.tobytes() for column, array in twice.table.to_arrays().items()}
    assert before == {column: array.tobytes() for column, array in once.table.to_arrays().items()}
    other = 1 - signals(name, 6, 6)
    signal = once.method.signals[0]
    message = f"id 5 was observed twice in epoch 6 with different {signal}: a sampler that pads repeats samples"
    with pytest.raises(ValueError, match=message) as caught:
        observe(twice, [3, 5], [signals(name, 6, 6)[3], other[5]], 6)
    assert "\n" not in str(caught.value)
    assert before == {column: array.tobytes() for column, array in twice.table.to_arrays().items()}


@every_method
def test_missed_and_past_epochs_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="id 2 was never visited before and now comes in epoch 1: every sample must"):
        observe(selector_of(name, **CONFIGS[name]), [2], [0.5], 1)
    selector = selector_of(name, **CONFIGS[name])
    observe(selector, np.arange(6), signals(name, 0, 6), 0)
    with pytest.raises(ValueError, match=r"id 2 was last visited in epoch 0 and now comes in epoch 2.*last_batch=drop"):
        observe(selector, [2], [0.5], 2)
    observe(selector, [0, 2, 4, 5], signals(name, 1, 4), 1)
    with pytest.raises(ValueError, match="id 2 comes in epoch 0 and came in epoch 1 before"):
        observe(selector, [2], signals(name, 0, 6)[[2]], 0)
    with pytest.raises(ValueError, match=r"2 of 6 samples were not visited in epoch 1, ids \[1, 3\]: every sample"):
        selector.begin_epoch(2)


@every_method
def test_samples_with_nan_signals_are_reported_and_never_ranked(name: str) -> None:
    selector = selector_of(name, **CONFIGS[name])
    for epoch in range(7):
        values = signals(name, epoch, 6)
        values[3] = np.nan if epoch == 6 else values[3]
        observe(selector, np.arange(6), values, epoch)
    assert selector.nonfinite_ids == [3]
    with pytest.raises(ValueError, match=r"1 of 6 samples were not visited in epoch 6, ids \[3\].*NaN logits"):
        selector.begin_epoch(7)


@every_method
def test_visits_after_the_scoring_run_change_nothing(name: str) -> None:
    selector = selector_of(name, **CONFIGS[name])
    for epoch in range(7):
        observe(selector, np.arange(6), signals(name, epoch, 6), epoch)
    ids, scores = selector.begin_epoch(7).ids, scores_of(selector)
    observe(selector, ids, signals(name, 7, ids.size), 7)
    observe(selector, ids, signals(name, 8, ids.size), 8)
    # Samples that were pruned in between may be observed again.
    observe(selector, np.arange(6), signals(name, 9, 6), 9)
    assert scores_of(selector).tobytes() == scores.tobytes()
    assert selector.begin_epoch(9).ids.tolist() == ids.tolist()


@every_method
@pytest.mark.parametrize("stop", range(7))
def test_a_state_stored_within_any_epoch_continues_bit_for_bit(name: str, stop: int) -> None:
    whole, before = (selector_of(name, 30, **CONFIGS[name]) for _ in range(2))
    for epoch in range(7):
        whole.begin_epoch(epoch)
        observe(whole, np.arange(30), signals(name, epoch, 30), epoch)
    for epoch in range(stop):
        before.begin_epoch(epoch)
        observe(before, np.arange(30), signals(name, epoch, 30), epoch)
    before.begin_epoch(stop)
    observe(before, np.arange(13), signals(name, stop, 30)[:13], stop)
    file = io.BytesIO()
    np.savez(file, **before.state_dict())  # type: ignore[arg-type]
    file.seek(0)
    after = selector_of(name, 30, **CONFIGS[name])
    with np.load(file, allow_pickle=False) as state:
        after.load_state_dict(dict(state))
    for epoch in range(stop, 7):
        after.begin_epoch(epoch)
        # What the state holds of the epoch is observed again with the rest.
        observe(after, np.arange(30), signals(name, epoch, 30), epoch)
    for column, array in whole.table.to_arrays().items():
        assert after.table.to_arrays()[column].tobytes() == array.tobytes(), column
    assert after.begin_epoch(7).ids.tolist() == whole.begin_epoch(7).ids.tolist()


@every_method
def test_order_and_batches_do_not_matter(name: str) -> None:
    whole, parts = (selector_of(name, 40_000, **CONFIGS[name]) for _ in range(2))
    rng = np.random.default_rng(0)
    for epoch in range(7):
        values = signals(name, epoch, 40_000)
        observe(whole, np.arange(40_000), values, epoch)
        for batch in np.array_split(rng.permutation(40_000), rng.integers(1, 40)):
            observe(parts, batch, values[batch], epoch)
    for column, array in whole.table.to_arrays().items():
        assert parts.table.to_arrays()[column].tobytes() == array.tobytes(), column
    assert parts.begin_epoch(7).ids.tolist() == whole.begin_epoch(7).ids.tolist()


@pytest.mark.parametrize(
    ("name", "options", "num_bytes"),
    [
        ("forgetting", {}, 9),
        ("el2n", {}, 12),
        ("aum", {}, 12),
        ("ccs", {}, 12),
        ("dyn_unc", {"window_size": 10}, 48),
        ("dual", {"window_size": 10}, 56),
    ],
)
@pytest.mark.parametrize("length", [10, 200])
def test_memory_does_not_grow_with_the_scoring_run(
    name: str, options: dict[str, Any], num_bytes: int, length: int
) -> None:
    selector = selector_of(name, 3, length, score_epochs=length, **options)
    assert sum(column.nbytes for column in selector.table.columns.values()) == 3 * num_bytes


def test_signals_beyond_float32_sums_have_finite_means() -> None:
    huge = np.finfo(np.float32).max
    selector = scored("aum", np.transpose([[huge, huge, -huge], [-huge, -huge, -huge], [1.0, 1.0, 1.0]]))
    assert scores_of(selector)[1:].tolist() == [-huge, 1.0]
    assert scores_of(selector)[0] == pytest.approx(huge / 3, rel=1e-6)
    assert selector.begin_epoch(3).ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "forgetting", "score_epochs": 1}, "score_epochs 1 has no forgetting events: it must be at least 2"),
        ({"name": "forgetting", "never_learned": "zeros"}, "never_learned"),
        ({"name": "el2n", "first_epoch": 10}, "first_epoch 10 and last_epoch 10 are no window of the epochs 0 to 10"),
        ({"name": "el2n", "first_epoch": -1}, "first_epoch -1 and last_epoch 10 are no window"),
        ({"name": "el2n", "last_epoch": 11}, "first_epoch 0 and last_epoch 11 are no window"),
        ({"name": "el2n", "first_epoch": 3, "last_epoch": 3}, "raise score_epochs for later ones"),
        ({"name": "aum", "margin_of": "losses"}, "margin_of"),
        ({"name": "dyn_unc", "window_size": 1}, "window_size 1 has no standard deviation: it must be at least 2"),
        ({"name": "dyn_unc", "score_epochs": 9}, "window_size 10 is longer than score_epochs 9: lower it, or raise"),
        ({"name": "dual", "beta_sampling": True, "rule": "strata"}, "leave rule and drop_hardest out"),
        ({"name": "dual", "beta_sampling": True, "drop_hardest": 0.1}, "leave rule and drop_hardest out"),
        ({"name": "dual", "beta_power": 0.0}, "beta_power 0.0 must be above 0"),
        ({"name": "ccs", "num_strata": 0}, "num_strata 0 must be at least 1"),
        ({"name": "ccs", "drop_hardest": 0.6}, "drop_hardest 0.6 is above prune_ratio 0.5: lower it"),
    ],
)
def test_invalid_hyperparameters_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_method(config)
    assert "\n" not in str(caught.value)


def test_another_subset_can_reuse_the_scoring_run() -> None:
    # The table must not depend on hyperparameters that a scoring run leaves at their defaults.
    for name, config in CONFIGS.items():
        method = build_method({"name": name, **config})
        defaults = {field: getattr(METHODS[name](), field) for field in method.selection_fields}
        scoring = build_method({**method.to_config(), **defaults})
        assert scoring.columns() == method.columns()
        assert scoring.signals == method.signals
