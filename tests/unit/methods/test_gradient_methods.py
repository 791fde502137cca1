"""CRAIG, GradMatch and GLISTER: examples by hand, naive transcriptions, optimality, and corner cases."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rayprune.methods.glister
from rayprune import Selection, Selector
from rayprune.core.algorithms.pursuit import pursue
from rayprune.core.bases.gradients import GradientMethod, Gradients
from rayprune.core.choosing import quotas
from rayprune.methods import METHODS, build_method
from rayprune.methods.craig import CRAIG, cluster_sizes, facility_location
from rayprune.methods.glister import GLISTER, taylor_greedy
from rayprune.methods.gradmatch import GradMatch, match_sum
from rayprune.testing import check_method
from tests.unit.core.algorithms.test_pursuit import naive_pursuit
from tests.unit.core.bases.test_gradients import outer_products, random_gradients

NAMES = ["craig", "gradmatch", "glister"]
every_name = pytest.mark.parametrize("name", NAMES)


def swept(
    method: GradientMethod, errors: Any, inputs: Any = None, labels: Any = None, seed: int = 0
) -> tuple[Selector, Selection]:
    """Return a Selector whose forward-only pass has seen the gradients, and the subset."""
    errors = np.asarray(errors, np.float32)
    num = len(errors)
    labels = np.zeros(num, dtype=np.int64) if labels is None else np.asarray(labels)
    length = method.score_epochs
    selector = Selector(method, num, length + 2, seed, labels=labels)
    signals = {"logit_gradient": errors} | ({} if inputs is None else {"embedding": np.asarray(inputs, np.float32)})
    for epoch in range(length):
        selection = selector.begin_epoch(epoch)
        selector.observe(np.arange(num), {"loss": np.ones(num)}, epoch)
    assert selection.sweep == "all"
    selector.observe(np.arange(num), signals, length - 1, sweep=True)
    return selector, selector.begin_epoch(length)


def weights_of(selector: Selector) -> NDArray[np.float64]:
    return selector.table["weight"].astype(np.float64)


def by_class(num: int, num_classes: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return gradients of samples with labels, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    return rng.dirichlet(np.ones(num_classes), size=num) - np.eye(num_classes)[labels], labels


# CRAIG


def test_craig_chooses_by_euclidean_distance_and_weighs_by_cluster_sizes() -> None:
    errors = np.array([0.0, 1.0, 2.0, 3.0, 20.0])[:, None]
    selector, selection = swept(CRAIG(prune_ratio=0.6, score_epochs=1), errors)
    assert selection.ids.tolist() == [2, 4]
    assert selection.ids.tolist() != [3, 4]  # the choice by squared distances
    assert weights_of(selector).tolist() == [0, 0, 4, 0, 1]
    assert selector.scores()["craig_weight"].tolist() == [0, 0, 4, 0, 1]
    assert selection.weights.tolist() == pytest.approx([1.6, 0.4])
    assert selection.mean_weight == pytest.approx(1.0)
    assert selection.facts["weight_sum"] == 5.0


def naive_facility_location(distances: NDArray[Any], count: int) -> list[int]:
    similarity = distances.max() - distances
    chosen: list[int] = []
    for _ in range(count):
        values = [
            -1.0 if j in chosen else sum(max(similarity[i, k] for k in [*chosen, j]) for i in range(len(distances)))
            for j in range(len(distances))
        ]
        chosen.append(int(np.argmax(np.round(values, 9))))
    return chosen


@pytest.mark.parametrize("num_inputs", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_craig_agrees_with_a_naive_greedy_choice(seed: int, num_inputs: int | None) -> None:
    gradients = random_gradients(25, 4, num_inputs, seed)
    explicit = outer_products(gradients)
    distances = np.sqrt(((explicit[:, None] - explicit) ** 2).sum(axis=2))
    count = 4 + 5 * seed
    chosen = naive_facility_location(distances, count)
    assert facility_location(gradients.distances(), count).tolist() == chosen
    sizes = [0] * 25
    for i in range(25):
        sizes[i if i in chosen else min(chosen, key=lambda j: distances[i, j])] += 1
    method = CRAIG(prune_ratio=1 - count / 25, score_epochs=1, gradient="last_layer" if num_inputs else "logits")
    selector, selection = swept(method, gradients.errors, gradients.inputs)
    assert selection.ids.tolist() == sorted(chosen)
    assert weights_of(selector).tolist() == sizes
    assert selection.weights == pytest.approx(np.array(sizes)[selection.ids] * count / 25)


def test_craig_is_within_1_minus_1_over_e_of_the_optimum() -> None:
    for seed in range(5):
        distances = random_gradients(11, 3, None, seed).distances().astype(float)
        similarity = distances.max() - distances
        best = max(similarity[:, list(subset)].max(axis=1).sum() for subset in itertools.combinations(range(11), 3))
        greedy = similarity[:, facility_location(distances.astype(np.float32), 3)].max(axis=1).sum()
        assert best >= greedy >= (1 - 1 / math.e) * best


def test_craig_keeps_ids_apart_where_gradients_are_equal() -> None:
    errors = np.array([[5.0], [1.0], [1.0], [1.0], [9.0]])
    selector, selection = swept(CRAIG(prune_ratio=0.2, score_epochs=1), errors)
    assert selection.ids.tolist() == [0, 1, 2, 4]
    assert weights_of(selector).tolist() == [1, 2, 1, 0, 1]


def test_craig_in_parts_solves_each_of_them() -> None:
    gradients = random_gradients(103, 3, None)
    method = CRAIG(prune_ratio=0.7, score_epochs=1, partition_size=30)
    parts: list[tuple[NDArray[Any], int]] = []

    class Recorded(CRAIG):
        def _parts(self, context: Any, rng: Any) -> Any:
            for ids, count, label in super()._parts(context, rng):
                parts.append((ids, count))
                yield ids, count, label

    selector, selection = swept(
        Recorded(**{k: v for k, v in method.to_config().items() if k != "name"}), gradients.errors
    )
    assert [ids.size for ids, _ in parts] == [26, 26, 26, 25]
    assert np.sort(np.concatenate([ids for ids, _ in parts])).tolist() == list(range(103))
    assert sum(count for _, count in parts) == selection.num_kept == 103 - 72
    for ids, count in parts:
        distances = gradients.take(ids).distances()
        expected = cluster_sizes(distances, facility_location(distances, count))
        assert weights_of(selector)[ids].tolist() == expected.tolist()
    assert weights_of(selector).sum() == 103


def test_craig_in_parts_represents_almost_as_well_as_the_whole() -> None:
    rng = np.random.default_rng(0)
    errors = rng.normal(size=(8, 6))[rng.integers(0, 8, 600)] + 0.3 * rng.normal(size=(600, 6))

    def cost(**options: Any) -> float:
        _, selection = swept(CRAIG(prune_ratio=0.9, score_epochs=1, **options), errors)
        distances = np.sqrt(((errors[:, None] - errors[selection.ids]) ** 2).sum(axis=2))
        return float(distances.min(axis=1).sum())

    whole, parts, random = cost(), cost(partition_size=150), []
    for seed in range(5):
        kept = np.random.default_rng(seed).choice(600, 60, replace=False)
        random.append(np.sqrt(((errors[:, None] - errors[kept]) ** 2).sum(axis=2)).min(axis=1).sum())
    assert whole < parts < 1.1 * whole
    assert parts < min(random)


# GradMatch

FOUR = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])


def test_gradmatch_matches_the_sum_of_all_gradients() -> None:
    selector, selection = swept(GradMatch(prune_ratio=0.5, score_epochs=1, ridge=0.0), FOUR)
    assert selection.ids.tolist() == [1, 3]
    assert weights_of(selector) == pytest.approx([0, 1.5, 0, 5 / 3], rel=1e-6)
    assert weights_of(selector) @ FOUR == pytest.approx(FOUR.sum(axis=0), rel=1e-6)
    assert selection.facts["weight_sum"] == pytest.approx(19 / 6, rel=1e-6)  # not N
    assert selection.weights == pytest.approx(np.array([1.5, 5 / 3]) * 2 / (19 / 6), rel=1e-6)
    assert selection.mean_weight == pytest.approx(1.0)


def test_gradmatch_penalizes_weights_from_the_first_sample_on() -> None:
    selector, selection = swept(GradMatch(prune_ratio=0.75, score_epochs=1), FOUR)
    assert weights_of(selector) == pytest.approx([0, 0, 0, 15 / 9.5])
    assert selection.weights.tolist() == [1.0]


@pytest.mark.parametrize("ridge", [0.5, 0.01, 20.0])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num", "num_inputs"), [(60, None), (40, 4), (12, 9)])
def test_gradmatch_agrees_with_a_naive_pursuit(num: int, num_inputs: int | None, seed: int, ridge: float) -> None:
    gradients = random_gradients(num, 5, num_inputs, seed)
    explicit = outer_products(gradients)
    count = num // 2
    expected = naive_pursuit(explicit, explicit.sum(axis=0), count, ridge)
    features = gradients.features()
    weights = pursue(features, features.sum(axis=0), count, ridge)
    assert weights == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert np.flatnonzero(weights).tolist() == np.flatnonzero(expected).tolist()
    if np.count_nonzero(expected) == count:
        method = GradMatch(
            prune_ratio=0.5, score_epochs=1, ridge=ridge, gradient="last_layer" if num_inputs else "logits"
        )
        selector, selection = swept(method, gradients.errors, gradients.inputs)
        assert weights_of(selector) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert selection.weights == pytest.approx(expected[expected > 0] / expected[expected > 0].mean(), rel=1e-5)


def test_an_exhausted_pursuit_starts_again_and_still_matches_the_sum() -> None:
    features = random_gradients(200, 4, None).features()
    first = pursue(features, features.sum(axis=0), 100, ridge=0.0)
    assert 0 < np.count_nonzero(first) <= 4
    weights = match_sum(features, 100, ridge=0.0)
    assert np.count_nonzero(weights) == 100
    # The last round may end before its residual is 0.
    target = features.sum(axis=0)
    assert np.linalg.norm(weights @ features - target) < 0.03 * np.linalg.norm(target)
    share = np.count_nonzero(first) / 100
    assert weights[first > 0] == pytest.approx(first[first > 0] * share)


def test_samples_that_no_round_takes_follow_at_the_mean_weight() -> None:
    errors = np.array([[0.0, 0.0], [-1.0, 0.0], [3.0, 0.0], [0.0, 0.0], [-0.1, 0.0]])
    selector, selection = swept(GradMatch(prune_ratio=0.2, score_epochs=1), errors)
    assert selection.ids.tolist() == [0, 2, 3, 4]  # id 1 points away from the sum most
    assert weights_of(selector)[[0, 2, 3, 4]] == pytest.approx([5.7 / 9.5] * 4)
    assert selection.weights.tolist() == [1.0] * 4


def test_samples_whose_gradients_cancel_have_weight_one() -> None:
    selector, selection = swept(GradMatch(prune_ratio=0.5, score_epochs=1), [[1.0], [-1.0], [2.0], [-2.0]])
    assert weights_of(selector).tolist() == [1, 1, 0, 0]
    assert selection.weights.tolist() == [1, 1]


def test_own_class_compares_the_gradients_of_the_own_output() -> None:
    gradients = random_gradients(60, 3, 4)
    labels = np.arange(60) % 3
    method = GradMatch(prune_ratio=0.6, score_epochs=1, gradient="last_layer", own_class=True)
    selector, _ = swept(method, gradients.errors, gradients.inputs, labels)
    for label, count in enumerate(quotas(np.array([20, 20, 20]), 24, "proportional").tolist()):
        ids = np.flatnonzero(labels == label)
        assert gradients.inputs is not None
        own = np.concatenate([gradients.inputs[ids], np.ones((20, 1))], axis=1) * gradients.errors[ids, label][:, None]
        assert weights_of(selector)[ids] == pytest.approx(match_sum(own.astype(float), count, 0.5), rel=1e-4, abs=1e-6)


# GLISTER


def test_glister_moves_the_validation_logits_after_each_sample() -> None:
    candidates = Gradients(np.array([[-0.5, 0.5], [0.2, -0.2], [-0.9, 0.9]]))
    validation = Gradients(np.array([[-0.5, 0.5]]))
    assert candidates.products(validation.total()) == pytest.approx([0.5, -0.2, 0.9])
    assert taylor_greedy(candidates, validation, 3, step_size=1.0).tolist() == [2, 0, 1]
    moved = 0.0 - 1.0 * candidates.errors[2]
    gradient = np.exp(moved) / np.exp(moved).sum() - [1.0, 0.0]
    assert gradient == pytest.approx([-0.141851, 0.141851], abs=1e-6)
    assert candidates.errors @ gradient == pytest.approx([0.141851, -0.056740, 0.255332], abs=1e-6)


def naive_taylor(
    candidates: Gradients, validation: Gradients, count: int, step_size: float, block: int
) -> list[list[int]]:
    """Return the blocks of chosen samples, by explicit gradients and a loop over the validation samples."""
    vectors = outer_products(candidates)
    num_classes = candidates.errors.shape[1]
    layer = np.zeros((num_classes, vectors.shape[1] // num_classes))
    blocks: list[list[int]] = []
    while (num := sum(map(len, blocks))) < count:
        gradient = np.zeros_like(layer)
        for row, error in enumerate(validation.errors.astype(float)):
            label = int(np.argmin(error))
            inputs = np.ones(1) if validation.inputs is None else np.append(validation.inputs[row], 1.0)
            logits = np.log(error + np.eye(num_classes)[label]) + layer @ inputs
            probs = np.exp(logits) / np.exp(logits).sum()
            gradient += np.outer(probs - np.eye(num_classes)[label], inputs) / len(validation)
        gains = vectors @ gradient.ravel()
        free = [i for i in range(len(vectors)) if not any(i in chosen for chosen in blocks)]
        blocks.append(sorted(sorted(free, key=lambda i: -gains[i])[: min(block, count - num)]))
        for i in blocks[-1]:
            layer -= step_size * vectors[i].reshape(layer.shape)
    return blocks


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("num_inputs", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_glister_agrees_with_a_naive_greedy_choice(seed: int, num_inputs: int | None, block: int) -> None:
    everything = random_gradients(40, 4, num_inputs, seed)
    candidates, validation = everything.take(slice(0, 30)), everything.take(slice(30, None))
    for step_size in (0.05, 1.0):
        chosen = taylor_greedy(candidates, validation, 18, step_size, block)
        expected = naive_taylor(candidates, validation, 18, step_size, block)
        assert chosen.tolist() == list(itertools.chain(*expected))
    at_once = taylor_greedy(candidates, validation, 18, 1.0, 18).tolist()
    assert sorted(at_once) != sorted(taylor_greedy(candidates, validation, 18, 1.0).tolist())


def choose_and_hold_out(
    method: GLISTER, errors: NDArray[Any], labels: Any, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> tuple[Selection, list[int]]:
    """Return the subset and the ids of the validation samples, in any order."""
    held: list[int] = []
    ids = {row.tobytes(): number for number, row in enumerate(errors.astype(np.float32))}
    assert len(ids) == len(errors)

    def recorded(candidates: Gradients, validation: Gradients, *options: Any) -> Any:
        held.extend(ids[row.tobytes()] for row in validation.errors)
        assert not set(held) & {ids[row.tobytes()] for row in candidates.errors}
        return taylor_greedy(candidates, validation, *options)

    monkeypatch.setattr(rayprune.methods.glister, "taylor_greedy", recorded)
    return swept(method, errors, labels=labels, seed=seed)[1], held


def test_glister_never_keeps_a_validation_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, labels = by_class(200, 4)
    method = GLISTER(prune_ratio=0.5, score_epochs=1, validation_share=0.2)
    selection, held = choose_and_hold_out(method, errors, labels, monkeypatch)
    assert selection.num_kept == 100
    assert not set(held) & set(selection.ids.tolist())
    assert np.bincount(labels[held]).tolist() == [round(0.2 * size) for size in np.bincount(labels)]
    _, others = choose_and_hold_out(method, errors, labels, monkeypatch, seed=1)
    assert set(held) != set(others)
    # The share would leave too few samples.
    method = GLISTER(prune_ratio=0.05, score_epochs=1, validation_share=0.2)
    selection, held = choose_and_hold_out(method, errors, labels, monkeypatch)
    assert sorted([*held, *selection.ids.tolist()]) == list(range(200))


def test_glister_keeps_blocks_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, _ = by_class(60, 3)
    method = GLISTER(prune_ratio=0.5, score_epochs=1, balance="none", updates=1, step_size=5.0)
    selection, held = choose_and_hold_out(method, errors, None, monkeypatch)
    gains = errors @ errors[held].mean(axis=0)
    gains[held] = -np.inf
    assert selection.ids.tolist() == np.sort(np.argsort(-gains)[:30]).tolist()
    assert selection.weights.tolist() == [1.0] * 30
    for updates, block in ((7, 5), (30, 1), (1000, 1)):
        method = GLISTER(prune_ratio=0.5, score_epochs=1, balance="none", updates=updates, step_size=5.0)
        selection, held = choose_and_hold_out(method, errors, None, monkeypatch)
        others = np.setdiff1d(np.arange(60), held)
        gradients = Gradients(errors.astype(np.float32))
        blocks = naive_taylor(gradients.take(others), gradients.take(np.sort(held)), 30, 5.0, block)
        assert selection.ids.tolist() == np.sort(others[list(itertools.chain(*blocks))]).tolist()


def test_glister_takes_saturated_predictions() -> None:
    errors = np.zeros((10, 3), np.float32)
    errors[3] = [1.0, -1.0, 0.0]
    _, selection = swept(GLISTER(prune_ratio=0.5, score_epochs=1), errors)
    assert selection.num_kept == 5


def test_glister_needs_one_class_per_sample() -> None:
    with pytest.raises(
        ValueError, match="glister needs one class per sample, and these gradients of the logits do not"
    ):
        swept(GLISTER(prune_ratio=0.5, score_epochs=1), np.full((10, 3), -0.4))


# All three


@every_name
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "last_layer"},
        {"gradient": "last_layer", "balance": "none", "storage": "float16"},
        {"balance": "none"},
        {"balance": "even"},
        {"partition_size": 4, "prune_ratio": 0.8},
        {"score_epochs": 1, "prune_ratio": 0.0},
    ],
    ids=str,
)
def test_the_method_passes_the_checks(name: str, options: dict[str, Any]) -> None:
    check_method({"name": name, **options})
    check_method({"name": "shuffled", "of": {"name": name, **options}})


@every_name
@pytest.mark.parametrize("balance", ["proportional", "even", "none"])
def test_counts_are_exact_and_weights_have_mean_one(name: str, balance: str) -> None:
    errors, labels = by_class(331, 5)
    labels = np.where(labels == 3, 6, labels)  # classes 3 and 5 are absent, 6 has no logit of its own
    for ratio in (0.0, 0.05, 0.37, 0.9, 0.999):
        method = build_method({"name": name, "prune_ratio": ratio, "score_epochs": 1, "balance": balance})
        assert isinstance(method, GradientMethod)
        _, selection = swept(method, errors, labels=labels)
        count = 331 - math.floor(ratio * 331)
        assert selection.num_kept == count
        assert selection.mean_weight == pytest.approx(1.0, rel=1e-5)
        if balance != "none":
            present, sizes = np.unique(labels, return_counts=True)
            kept = np.array([np.count_nonzero(labels[selection.ids] == label) for label in present])
            assert kept.tolist() == quotas(sizes, count, balance).tolist()  # type: ignore[arg-type]


@every_name
def test_classes_keep_their_share_of_the_weight(name: str) -> None:
    errors, labels = by_class(400, 4)
    drop = (labels == 0) & (np.arange(400) % 2 > 0)
    errors, labels = errors[~drop], labels[~drop]
    _, selection = swept(METHODS[name](prune_ratio=0.7, score_epochs=1, balance="even"), errors, labels=labels)  # type: ignore[call-arg,arg-type]
    kept = np.bincount(labels[selection.ids])
    assert kept.max() - kept.min() <= 1
    if name == "craig":  # as many of the small class, each of which represents fewer
        of_class = np.bincount(labels[selection.ids], weights=selection.weights)
        assert of_class / of_class.sum() == pytest.approx(np.bincount(labels) / labels.size, abs=0.01)


@every_name
@pytest.mark.parametrize("gradient", ["logits", "last_layer"])
@pytest.mark.parametrize("row", [[0.3, -0.5, 0.2], [0.0, 0.0, 0.0]], ids=["equal", "zero"])
def test_of_equal_gradients_the_lower_ids_are_kept(name: str, gradient: str, row: list[float]) -> None:
    method = build_method({"name": name, "prune_ratio": 0.6, "score_epochs": 1, "gradient": gradient})
    assert isinstance(method, GradientMethod)
    inputs = np.ones((50, 7)) if gradient == "last_layer" else None
    selector, selection = swept(method, np.tile(row, (50, 1)), inputs)
    weights = weights_of(selector)
    if name == "glister":  # the lowest of those that are not held out
        others = np.setdiff1d(np.arange(selection.ids.max()), selection.ids)
        assert others.size <= 5
    else:
        assert selection.ids.tolist() == list(range(20))
    if name == "craig":
        assert weights[:20].tolist() == [31.0] + [1.0] * 19
    else:
        assert weights[selection.ids] == pytest.approx(weights[selection.ids[0]])
    assert selection.mean_weight == pytest.approx(1.0)


@every_name
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_few_samples_work(name: str, ratio: float) -> None:
    for num in (1, 2, 3):
        errors, labels = by_class(num, 2)
        for balance in ("proportional", "even", "none"):
            options = {"name": name, "prune_ratio": ratio, "score_epochs": 1, "balance": balance}
            method = build_method(options)
            assert isinstance(method, GradientMethod)
            _, selection = swept(method, errors, labels=labels)
            assert selection.num_kept == max(1, num - math.floor(ratio * num))
            assert (selection.weights > 0).all()


@every_name
def test_huge_inputs_are_chosen_from(name: str) -> None:
    errors, labels = by_class(40, 3)
    inputs = np.random.default_rng(0).normal(size=(40, 6)) * 1e18
    method = build_method({"name": name, "score_epochs": 1, "gradient": "last_layer"})
    assert isinstance(method, GradientMethod)
    _, selection = swept(method, errors, inputs, labels)
    assert selection.num_kept == 20
    assert np.isfinite(selection.weights).all()


@every_name
def test_the_seed_draws_the_parts(name: str) -> None:
    errors, labels = by_class(300, 2)
    method = build_method({"name": name, "score_epochs": 1, "partition_size": 40})
    assert isinstance(method, GradientMethod)
    kept = [swept(method, errors, labels=labels, seed=seed)[1].ids.tolist() for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


@every_name
def test_half_precision_keeps_nearly_the_same(name: str) -> None:
    errors, labels = by_class(300, 4)
    ids = []
    for storage in ("float32", "float16"):
        method = build_method({"name": name, "score_epochs": 1, "prune_ratio": 0.7, "storage": storage})
        assert isinstance(method, GradientMethod)
        ids.append(set(swept(method, errors, labels=labels)[1].ids.tolist()))
    assert len(ids[0] & ids[1]) >= 0.75 * 90


@every_name
def test_mistakes_are_one_line_with_the_cure(name: str) -> None:
    errors, labels = by_class(20, 2)
    cls: Any = METHODS[name]
    for options, message in (
        ({"partition_size": 1}, "partition_size 1 must be at least 2, or null"),
        ({"score_epochs": 0}, "score_epochs 0 must be at least 1"),
        ({"gradient": "logit"}, "gradient = 'logit': did you mean 'logits'"),
        ({"balance": "drop"}, "balance = 'drop': "),
        ({"prune_ratio": 1.0}, r"outside \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            cls(**options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"{name} balances classes and needs labels"):
        Selector(cls(), 20, 20)
    Selector(cls(balance="none"), 20, 20)
    # No forward-only pass, or one that missed samples.
    selector = Selector(cls(score_epochs=1), 20, 3, labels=labels)
    selector.begin_epoch(0)
    selector.observe(np.arange(20), {"loss": np.ones(20)}, 0)
    with pytest.raises(ValueError, match=r"epoch 1: 20 samples have no logit_gradient: in a loop of your own"):
        selector.begin_epoch(1)
    selector.observe(np.arange(19), {"logit_gradient": errors[:19]}, 0, sweep=True)
    with pytest.raises(ValueError, match=r"1 of 20 samples have no logit_gradient, ids \[19\]"):
        selector.begin_epoch(1)
    selector.observe([19], {"logit_gradient": errors[19:]}, 0, sweep=True)
    assert selector.begin_epoch(1).num_kept == 10
    # Scores of a run with another ratio.
    other = Selector(cls(score_epochs=1, prune_ratio=0.3), 20, 3, labels=labels)
    other.table.load_arrays(selector.table.to_arrays())
    with pytest.raises(
        ValueError, match=r"the scoring run chose 10 samples, and prune_ratio 0\.3 keeps 14: score again"
    ):
        other.begin_epoch(1)


def test_mistakes_of_one_method_are_one_line_with_the_cure() -> None:
    for cls, options, message in (
        (GradMatch, {"ridge": -0.1}, "ridge -0.1 is below 0: use 0 for none"),
        (GradMatch, {"own_class": True, "balance": "none"}, "own_class compares samples of one class: use balance="),
        (GLISTER, {"validation_share": 0.0}, r"validation_share 0.0 is outside \(0, 1\)"),
        (GLISTER, {"step_size": 0.0}, "step_size 0.0 must be above 0"),
        (GLISTER, {"updates": 0}, "updates 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(**options)  # type: ignore[arg-type]
    errors, labels = by_class(20, 2)
    with pytest.raises(ValueError, match="label 5 is outside the model's 2 classes"):
        swept(GradMatch(score_epochs=1, own_class=True), errors, labels=np.where(labels == 1, 5, 0))


def test_a_part_of_the_network_is_swept_for_the_last_layer() -> None:
    assert CRAIG().sweep_signals == ("logit_gradient",)
    assert CRAIG(gradient="last_layer").sweep_signals == ("logit_gradient", "embedding")
    assert CRAIG().needs_labels
    assert not CRAIG(balance="none").needs_labels
