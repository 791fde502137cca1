"""The in-batch methods: what each of them picks of a batch, against the formulas on small numbers and naive loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayprune import DivBS, EvolvedSampling, OrderedSGD, RHOLoss, SelectiveBackprop, Selector
from rayprune.core.bases.in_batch import BatchContext, StepContext
from rayprune.methods import build_method
from rayprune.methods.divbs import span_mean
from rayprune.methods.selective_backprop import rank_weights


def step(**place: Any) -> StepContext:
    return StepContext(
        **{"epoch": 6, "num_epochs": 10, "step": 0, "num_steps": 20, "num_samples": 99, "seed": 1, **place}
    )


def batch(num_rows: int, columns: dict[str, Any] | None = None, **place: Any) -> BatchContext:
    arrays = {name: np.asarray(column, dtype=np.float32) for name, column in (columns or {}).items()}
    return step(**place).with_rows(np.arange(num_rows), np.zeros(num_rows, dtype=np.int64), arrays)


def losses(*values: float) -> dict[str, Any]:
    return {"loss": np.array(values, dtype=np.float32)}


# Selective-Backprop


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.5, [0.0625, 0.1875, 0.3125, 0.4375]), (1 / 3, [0.0119, 0.1071, 0.2976, 0.5833])]
)
def test_selective_backprop_draws_by_rank(keep: float, expected: list[float]) -> None:
    weights = rank_weights(np.array([0.1, 0.2, 0.3, 5.0]), keep)
    assert weights / weights.sum() == pytest.approx(expected, abs=5e-5)
    order = np.array([2, 0, 3, 1])
    assert rank_weights(np.array([0.1, 0.2, 0.3, 5.0])[order], keep).tolist() == weights[order].tolist()


def test_selective_backprop_picks_the_first_row_with_these_probabilities() -> None:
    method, num = SelectiveBackprop(keep=0.25), 4_000
    weights = rank_weights(np.array([0.1, 3.0, 2.0, 1.0]), 0.25)
    counts = np.zeros(4)
    for seed in range(num):
        rows, row_weights = method.pick(losses(0.1, 3.0, 2.0, 1.0), batch(4, seed=seed))
        assert row_weights is None
        counts[rows] += 1
    shares = weights / weights.sum()
    assert counts.sum() == num
    assert np.abs(counts / num - shares).max() < 4.5 * np.sqrt(0.25 / num)


def test_selective_backprop_keeps_everything_at_keep_one() -> None:
    assert sorted(SelectiveBackprop(keep=1.0).pick(losses(*range(5)), batch(5))[0]) == [0, 1, 2, 3, 4]


def test_selective_backprop_runs_in_its_window_and_leaves_every_second_batch_whole() -> None:
    method = SelectiveBackprop()
    picks = {epoch: [method.picks(step(epoch=epoch, step=number)) for number in range(4)] for epoch in range(10)}
    thinned = [True, False, True, False]
    assert [picks[epoch] for epoch in range(10)] == [[False] * 4] * 5 + [thinned] * 4 + [[False] * 4]
    assert [replace(method, interrupt=3).picks(step(step=number)) for number in range(6)] == [True, True, False] * 2
    assert all(replace(method, interrupt=0).picks(step(step=number)) for number in range(4))


# RHO-LOSS


def test_rho_picks_by_the_reducible_loss() -> None:
    irreducible = {"irreducible": [2.2, 0.1, 0.3, 0.5]}
    for keep, expected in ((0.25, [3]), (0.5, [2, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        rows, weights = RHOLoss(keep=keep).pick(losses(2.3, 0.4, 1.5, 3.0), batch(4, irreducible))
        assert rows.tolist() == expected, "id 0, second by its loss, is last"
        assert weights is None
    assert RHOLoss().pick(losses(*[1.0] * 320), batch(320, {"irreducible": [1.0] * 320}))[0].tolist() == list(range(32))


def test_rho_names_its_file() -> None:
    method = build_method({"name": "rho", "irreducible": "scores.csv", "column": "loss"})
    assert isinstance(method, RHOLoss)
    assert method.file_columns() == {"irreducible": ("scores.csv", "loss")}
    assert method.keep == 0.1


# Ordered SGD


def test_ordered_sgd_takes_the_highest_losses() -> None:
    rows, weights = OrderedSGD().pick(losses(0.1, 2.0, 1.0, 3.0), batch(4, facts={"share": 0.5}))
    assert rows.tolist() == [1, 3]
    assert weights is None
    assert losses(0.1, 2.0, 1.0, 3.0)["loss"][rows].mean() == 2.5


@pytest.mark.parametrize(
    ("accuracy", "count"), [(0.0, 64), (0.79, 64), (0.8, 32), (0.9, 16), (0.95, 8), (0.99, 8), (0.995, 4), (1.0, 4)]
)
def test_ordered_sgd_takes_fewer_as_the_accuracy_rises(accuracy: float, count: int) -> None:
    method = OrderedSGD()
    share = method.share(accuracy)
    assert method.pick(losses(*range(64)), batch(64, facts={"share": share}))[0].size == count
    assert method.picks(step(facts={"share": share})) == (count < 64)


def test_ordered_sgd_knows_the_accuracy_of_the_last_visits() -> None:
    selector = Selector(OrderedSGD(), 10, 5)
    assert selector.begin_epoch(0).facts["share"] == 1.0
    for epoch, num_correct in ((0, 7), (1, 8), (2, 9)):
        correct = (np.arange(10) < num_correct).astype(np.float32)
        selector.observe(np.arange(10), {"loss": np.ones(10), "correct": correct}, epoch)
        selection = selector.begin_epoch(epoch + 1)
        assert selection.num_kept == 10
        assert selection.facts["last_accuracy"] == pytest.approx(num_correct / 10)
        assert selection.facts["share"] == {7: 1.0, 8: 0.5, 9: 0.25}[num_correct]


# DivBS

GRADIENTS = np.array([[2.0, 0.0], [0.0, 1.0], [1.8, 0.1], [0.0, -0.2]])


def naive_span(gradients: np.ndarray, count: int) -> list[int]:
    """Take the gradient with the largest product with the residual, by Gram–Schmidt on whole vectors."""
    residual, basis, rows = gradients.mean(axis=0), list[np.ndarray](), list[int]()
    while len(rows) < count:
        products = [0.0 if row in rows else abs(gradient @ residual) for row, gradient in enumerate(gradients)]
        if max(products) < 1e-9:
            break
        row = int(np.argmax(products))
        unit = gradients[row].copy()
        for other in basis:
            unit -= (unit @ other) * other
        unit /= np.linalg.norm(unit)
        residual = residual - (unit @ residual) * unit
        basis.append(unit)
        rows.append(row)
    return rows


def test_divbs_spans_the_mean_gradient() -> None:
    ones, rng = np.ones((4, 1)), np.random.default_rng(0)
    mean = GRADIENTS.mean(axis=0)
    assert np.abs(GRADIENTS @ mean) == pytest.approx([1.9, 0.225, 1.7325, 0.045])
    assert span_mean(GRADIENTS, ones, 2, rng, deterministic=True).tolist() == [0, 1]
    # Two dimensions: the residual is then 0, and the others are drawn.
    assert span_mean(GRADIENTS, ones, 4, rng, deterministic=True).tolist() == [0, 1]
    signals = {"logit_gradient": GRADIENTS.astype(np.float32)}
    method = DivBS(keep=0.75, gradient="logits", deterministic=True)
    third = {method.pick(signals, batch(4, seed=seed))[0].tolist()[2] for seed in range(40)}
    assert third == {2, 3}


@pytest.mark.parametrize("num_features", [0, 1, 5])
def test_divbs_equals_gram_schmidt_on_whole_gradients(num_features: int) -> None:
    rng = np.random.default_rng(num_features)
    for _ in range(20):
        errors, features = rng.normal(size=(12, 3)), rng.normal(size=(12, num_features))
        errors -= errors.mean(axis=1, keepdims=True)  # as p − onehot, of rank C − 1
        inputs = np.hstack([features, np.ones((12, 1))])
        gradients = np.einsum("bc,bd->bcd", errors, inputs).reshape(12, -1)
        expected = naive_span(gradients, 7)
        assert span_mean(errors, inputs, 7, rng, deterministic=True).tolist() == expected
        assert len(expected) == min(7, 2 * (num_features + 1))


def test_divbs_draws_the_first_row_in_proportion_to_its_product() -> None:
    num, counts = 4_000, np.zeros(4)
    method = DivBS(keep=0.25, gradient="logits")
    for seed in range(num):
        counts[method.pick({"logit_gradient": GRADIENTS.astype(np.float32)}, batch(4, seed=seed))[0]] += 1
    expected = np.array([1.9, 0.225, 1.7325, 0.045])
    assert np.abs(counts / num - expected / expected.sum()).max() < 4.5 * np.sqrt(0.25 / num)


def test_divbs_asks_for_the_gradients_that_it_uses() -> None:
    assert DivBS().batch_signals == ("logit_gradient", "embedding")
    assert DivBS(gradient="logits").batch_signals == ("logit_gradient",)
    features = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    signals = {"logit_gradient": GRADIENTS.astype(np.float32), "embedding": features}
    whole = DivBS(keep=0.5, deterministic=True).pick(signals, batch(4))[0]
    inputs = np.hstack([features, np.ones((4, 1))])
    gradients = np.einsum("bc,bd->bcd", GRADIENTS, inputs).reshape(4, -1)
    assert whole.tolist() == naive_span(gradients, 2)


def test_divbs_fills_a_batch_of_equal_gradients() -> None:
    signals = {"logit_gradient": np.full((9, 2), 0.5, dtype=np.float32)}
    rows = DivBS(keep=0.5, gradient="logits").pick(signals, batch(9))[0]
    assert len(set(rows.tolist())) == 5


# Evolved sampling


def test_es_follows_both_averages() -> None:
    method = EvolvedSampling()
    averages = np.full(4, 1 / 4, dtype=np.float32)
    assert method.state_columns(4) == {"average": 0.25}
    visits = (
        ([1, 2, 4, 0.5], [0.85, 1.65, 3.25, 0.45], [0.325, 0.425, 0.625, 0.275]),
        ([0.5, 2, 1, 0.5], [0.465, 1.685, 0.925, 0.455], [0.3425, 0.5825, 0.6625, 0.2975]),
    )
    for values, weights, after in visits:
        assert method.weights(averages, np.array(values)) == pytest.approx(weights)
        updated = method.update(losses(*values), batch(4, {"average": averages}))
        averages = updated["average"].astype(np.float32)
        assert averages == pytest.approx(after)


def test_es_draws_in_proportion_to_its_weights() -> None:
    num, counts, averages = 4_000, np.zeros(4), {"average": [0.25] * 4}
    for seed in range(num):
        counts[EvolvedSampling().pick(losses(1, 2, 4, 0.5), batch(4, averages, seed=seed))[0]] += 1
    assert np.abs(counts / num - [0.137097, 0.266129, 0.524194, 0.072581]).max() < 4.5 * np.sqrt(0.25 / num)


def test_es_trains_on_whole_batches_at_both_ends() -> None:
    picks = [EvolvedSampling().picks(step(epoch=epoch, step=number)) for epoch in (0, 9) for number in range(20)]
    assert picks == [False] * 10 + [True] * 20 + [False] * 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "selective_backprop", "keep": 0.0}, r"keep 0.0 is outside \(0, 1\]"),
        ({"name": "selective_backprop", "start": 0.9, "end": 0.5}, "start 0.9 must be below end 0.5"),
        ({"name": "selective_backprop", "interrupt": 1}, "interrupt 1 must be 0 or at least 2"),
        ({"name": "rho", "keep": 2}, r"keep 2 is outside \(0, 1\]"),
        ({"name": "ordered_sgd", "accuracies": [0.9, 0.8], "shares": [1, 0.5, 0.1]}, "must ascend"),
        ({"name": "ordered_sgd", "shares": [1, 0.5]}, "one more than the 4 accuracies"),
        ({"name": "ordered_sgd", "accuracies": [0.5], "shares": [1, 0]}, r"must be in \(0, 1\]"),
        ({"name": "divbs", "gradient": "input"}, "gradient"),
        ({"name": "es", "beta1": 1.5}, "beta1"),
        ({"name": "es", "beta2": -0.1}, "beta2"),
        ({"name": "rho", "class_floor": 0.1}, "RHOLoss chooses inside batches"),
        ({"name": "shuffled", "of": "rho", "class_floor": 0.1}, "rho chooses inside batches"),
    ],
)
def test_wrong_hyperparameters_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(config)
