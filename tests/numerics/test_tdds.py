"""TDDS against the reference program's numbers, hand calculations, and a transcription without NumPy.

Shapes: T epochs, N samples, C classes, J window, R rows of a batch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core import Plan, Selector
from rayprune.engine.train.static_subset import score_trajectories
from rayprune.methods import build_method
from rayprune.methods.tdds import decode_probs, encode_probs
from tests.support.paths import GOLDEN

SCORED = ("A_hand_T3_J3", "A_hand_T4_J3", "B_rand_T14_J5_d0.9", "D_ties_T14_J5", "J_saturated_T6_J4")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"tdds_{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def tdds(**options: Any) -> Any:
    return build_method({"name": "tdds", **options})


def tdds_of(arrays: dict[str, Any], **options: Any) -> Any:
    """Return the method with a golden file's hyperparameters."""
    pair = {"trajectory_len": int(arrays["T"]), "window_size": int(arrays["J"])}
    return tdds(**pair, decay=float(arrays["decay"]), **options)


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


def scored_selector(method: Any, probs_TNC: NDArray[Any], index_TN: NDArray[Any] | None = None) -> Selector:
    """Observe all epochs; row n of epoch t belongs to the id index_TN[t, n]."""
    selector = Selector(method, probs_TNC.shape[1], method.collect_epochs + 1)
    for epoch, probs_NC in enumerate(probs_TNC):
        selector.begin_epoch(epoch)
        ids = np.arange(probs_NC.shape[0]) if index_TN is None else index_TN[epoch]
        selector.observe(ids, {"probs": probs_NC}, epoch)
    return selector


def two_classes(*probabilities: float) -> NDArray[np.float32]:
    """Return the (T, 1, 2) trajectory of one sample."""
    return np.array([[[p, 1 - p]] for p in probabilities], dtype=np.float32)


def random_trajectory(seed: int, num_epochs: int, num_samples: int, num_classes: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    scale_N1 = rng.choice([0.0, 0.3, 2.0, 12.0], size=(num_samples, 1))
    return softmax(rng.normal(size=(num_epochs, num_samples, num_classes)) * scale_N1)


def learning(seed: int, num_epochs: int, num_samples: int, num_classes: int) -> Iterator[NDArray[np.float32]]:
    """Yield (N, C) probabilities of logits that walk randomly and learn their label at individual speeds."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(num_classes, size=num_samples)
    speed_N = rng.exponential(scale=0.8, size=num_samples).astype(np.float32)
    logits_NC = rng.normal(scale=0.3, size=(num_samples, num_classes)).astype(np.float32)
    for _ in range(num_epochs):
        powers = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        yield powers / powers.sum(axis=1, keepdims=True)
        logits_NC += rng.normal(scale=0.35, size=logits_NC.shape).astype(np.float32)
        logits_NC[np.arange(num_samples), label_N] += speed_N


def naive_changes(probs_TC: Sequence[Sequence[float]]) -> list[float]:
    """Return D of one sample, T−1 numbers."""
    pairs = zip(probs_TC[1:], probs_TC[:-1], strict=True)
    return [
        sum(abs(p * (math.log(p + 1e-8) - math.log(q + 1e-8))) for p, q in zip(now, before, strict=True))
        for now, before in pairs
    ]


def naive_variation(changes: Sequence[float]) -> float:
    mean = math.fsum(changes) / len(changes)
    return math.sqrt(math.fsum((change - mean) ** 2 for change in changes))


def naive_score(probs_TC: Sequence[Sequence[float]], window: int, decay: float) -> float:
    """Return one sample's score from its whole trajectory, as the paper sums it."""
    changes, num_windows = naive_changes(probs_TC), len(probs_TC) - window + 1
    weights = [decay * (1 - decay) ** (num_windows - 1 - k) for k in range(num_windows)]
    return sum(w * naive_variation(changes[k : k + window - 1]) for k, w in enumerate(weights))


@pytest.mark.parametrize("name", SCORED)
def test_scores_equal_the_references(name: str) -> None:
    arrays = golden(name)
    selector = scored_selector(tdds_of(arrays), softmax(arrays["logits"]), arrays["index"])
    np.testing.assert_allclose(selector.scores()["tdds"], arrays["score_by_index"], **TOLERANCE)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.7, 0.9])
def test_kept_samples_equal_the_references(name: str, prune_ratio: float) -> None:
    arrays = golden(name)
    selector = scored_selector(tdds_of(arrays, prune_ratio=prune_ratio), softmax(arrays["logits"]), arrays["index"])
    selection = selector.begin_epoch(int(arrays["T"]))
    reference = arrays["score_by_index"].astype(np.float64)
    num = reference.size
    num_kept = num - int(prune_ratio * num)
    ordered = np.sort(reference)[::-1]
    must = np.flatnonzero(reference > ordered[min(num_kept, num - 1)] + 1e-5)
    may = np.flatnonzero(reference >= ordered[num_kept - 1] - 1e-5)
    assert selection.num_kept == num_kept
    assert np.isin(must, selection.ids).all()
    assert np.isin(selection.ids, may).all()
    ours = selector.scores()["tdds"]
    assert selection.ids.tolist() == sorted(sorted(range(num), key=lambda i: (-ours[i], i))[:num_kept])
    assert selection.facts["threshold"] == ours[selection.ids].min()


def test_ties_go_to_the_lower_id() -> None:
    arrays = golden("D_ties_T14_J5")  # samples i and i + 20 are equal; 5 and 25 are constant
    selector = scored_selector(tdds_of(arrays, prune_ratio=0.525), softmax(arrays["logits"]), arrays["index"])
    scores = selector.scores()["tdds"]
    assert scores[:20].tobytes() == scores[20:].tobytes()
    assert scores[[5, 25]].tolist() == [0.0, 0.0]
    assert (np.delete(scores, [5, 25]) > 0).all()
    kept = set(selector.begin_epoch(14).ids.tolist())
    split = [i for i in range(20) if (i in kept) != (i + 20 in kept)]
    assert len(kept) == 19
    assert len(split) == 1
    assert split[0] in kept


@pytest.mark.parametrize(
    ("name", "message"),
    [("F_J2", "window_size 2 makes every score 0"), ("G_JgtT", "window_size 6 is longer than trajectory_len 4")],
)
def test_windows_that_the_reference_cannot_score_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tdds_of(golden(name))


def test_a_sample_twice_in_an_epoch_is_refused() -> None:
    arrays = golden("H_dup_missing_T14_J5")
    probs_TNC, index_TN = softmax(arrays["logits"]), arrays["index"]
    rows = np.flatnonzero(index_TN[6] == 0)
    assert rows.size == 2
    selector = scored_selector(tdds_of(arrays), probs_TNC[:6], index_TN)
    before = selector.scores()["tdds"].tobytes()
    with pytest.raises(ValueError, match=r"duplicate ids \[0\]"):
        selector.observe(index_TN[6], {"probs": probs_TNC[6]}, 6)
    assert selector.scores()["tdds"].tobytes() == before
    head, tail = np.split(np.arange(64), [rows[1]])
    selector.observe(index_TN[6][head], {"probs": probs_TNC[6][head]}, 6)
    with pytest.raises(ValueError, match="id 0 was observed twice in epoch 6 with different probabilities"):
        selector.observe(index_TN[6][tail], {"probs": probs_TNC[6][tail]}, 6)


def test_a_sample_missing_in_an_epoch_is_refused() -> None:
    arrays = golden("H_dup_missing_T14_J5")
    probs_TNC, index_TN = softmax(arrays["logits"]), arrays["index"]
    selector = Selector(tdds_of(arrays), 64, 15)
    for epoch in range(7):
        ids, rows = np.unique(index_TN[epoch], return_index=True)
        selector.observe(ids, {"probs": probs_TNC[epoch][rows]}, epoch)
    with pytest.raises(ValueError, match=r"1 of 64 samples were not visited in epoch 6, ids \[63\]: every sample"):
        selector.begin_epoch(7)
    with pytest.raises(ValueError, match="id 63 was last visited in epoch 5 and now comes in epoch 7: every sample"):
        selector.observe(index_TN[7], {"probs": probs_TNC[7]}, 7)
    others = index_TN[7] != 63
    selector.observe(index_TN[7][others], {"probs": probs_TNC[7][others]}, 7)
    with pytest.raises(ValueError, match=r"not visited in epoch 7, ids \[63\]"):
        selector.begin_epoch(8)
    with pytest.raises(ValueError, match="id 63 was last visited in epoch 5 and now comes in epoch 14"):
        selector.observe([63], {"probs": probs_TNC[7][:1]}, 14)


def test_float16_probabilities_are_refused_but_float16_logits_are_not() -> None:
    arrays = golden("I_fp16_T14_J5")
    assert np.isnan(arrays["score_by_index"]).any()
    half_TNC = softmax(arrays["logits"]).astype(np.float16)
    with pytest.raises(ValueError, match=r"probs are float16.*float32"):
        scored_selector(tdds_of(arrays), half_TNC, arrays["index"])
    scores = scored_selector(tdds_of(arrays), softmax(arrays["logits"]), arrays["index"]).scores()["tdds"]
    assert np.isfinite(scores).all()
    assert (scores > 0).all()


def test_samples_with_nan_logits_are_reported_and_never_kept() -> None:
    arrays = golden("K_nan_T14_J5")
    assert arrays["mask"][-1] == 7  # the reference's most important sample
    probs_TNC, index_TN = softmax(arrays["logits"]), arrays["index"]
    selector = scored_selector(tdds_of(arrays), probs_TNC[:13], index_TN)
    assert selector.nonfinite_ids == [7]
    with pytest.raises(ValueError, match=r"1 of 64 samples were not visited in epoch 12, ids \[7\].*NaN logits"):
        selector.begin_epoch(13)
    others = index_TN[13] != 7
    selector.observe(index_TN[13][others], {"probs": probs_TNC[13][others]}, 13)
    scores = selector.scores()["tdds"]
    assert np.flatnonzero(np.isnan(scores)).tolist() == [7]
    np.testing.assert_allclose(np.delete(scores, 7), np.delete(arrays["score_by_index"], 7), **TOLERANCE)
    with pytest.raises(ValueError, match=r"ids \[7\]"):
        selector.begin_epoch(14)


@pytest.mark.parametrize(
    ("probabilities", "window", "expected"),
    [
        ((0.5, 0.8, 0.5), 3, 0.0852046),
        ((0.25, 0.5, 0.75), 3, 0.0457699),
        ((0.5, 0.8, 0.5, 0.8), 3, 0.0937251),
        ((0.5, 0.8, 0.5, 0.8), 4, 0.0983858),
        ((0.3, 0.3, 0.3, 0.3), 3, 0.0),
        ((0.2, 0.8, 0.2, 0.8, 0.2), 4, 0.0),
    ],
)
def test_scores_by_hand(probabilities: tuple[float, ...], window: int, expected: float) -> None:
    method = tdds(trajectory_len=len(probabilities), window_size=window)
    score = scored_selector(method, two_classes(*probabilities)).scores()["tdds"][0]
    assert score == 0.0 if expected == 0.0 else score == pytest.approx(expected, abs=5e-7)


def test_changes_by_hand() -> None:
    selector = scored_selector(tdds(trajectory_len=4, window_size=3), two_classes(0.5, 0.8, 0.5))
    np.testing.assert_allclose(selector.table["changes"], [[0.5592610, 0.6931472]], atol=1e-6)
    assert np.isnan(selector.scores()["tdds"]).all()


def test_a_folder_of_logits_gives_the_same_scores(tmp_path: Path) -> None:
    arrays = golden("B_rand_T14_J5_d0.9")
    for epoch in range(14):
        np.save(tmp_path / f"{epoch}_Output.npy", arrays["logits"][epoch])
        np.save(tmp_path / f"{epoch}_Index.npy", arrays["index"][epoch])
    method = tdds_of(arrays, prune_ratio=0.7)
    assert not np.array_equal(arrays["index"][0], np.arange(64))
    imported = score_trajectories(method, tmp_path, 64)
    observed = scored_selector(method, softmax(arrays["logits"]), arrays["index"])
    np.testing.assert_allclose(imported.scores()["tdds"], arrays["score_by_index"], **TOLERANCE)
    assert imported.scores()["tdds"].tobytes() == observed.scores()["tdds"].tobytes()
    assert imported.begin_epoch(14).ids.tolist() == observed.begin_epoch(14).ids.tolist()


@settings(max_examples=60, deadline=None)
@given(
    pair=st.integers(3, 9).flatmap(lambda length: st.tuples(st.just(length), st.integers(3, length))),
    decay=st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
    num_samples=st.integers(1, 8),
    num_classes=st.integers(2, 6),
    seed=st.integers(0, 10_000),
)
def test_scores_equal_the_transcription(
    pair: tuple[int, int], decay: float, num_samples: int, num_classes: int, seed: int
) -> None:
    length, window = pair
    probs_TNC = random_trajectory(seed, length, num_samples, num_classes)
    method = tdds(trajectory_len=length, window_size=window, decay=decay)
    ours = scored_selector(method, probs_TNC).scores()["tdds"]
    expected = [naive_score(probs_TNC[:, i].tolist(), window, decay) for i in range(num_samples)]
    np.testing.assert_allclose(ours, expected, **TOLERANCE)


def test_wrong_formulas_give_other_scores() -> None:
    window, decay = 4, 0.4
    trajectory = two_classes(0.5, 0.8, 0.6, 0.9, 0.3, 0.35, 0.7)
    probs_TC = trajectory[:, 0].tolist()
    ours = scored_selector(tdds(trajectory_len=7, window_size=window, decay=decay), trajectory).scores()["tdds"][0]
    changes = naive_changes(probs_TC)
    divergences = [
        abs(sum(p * math.log(p / q) for p, q in zip(now, before, strict=True)))
        for now, before in zip(probs_TC[1:], probs_TC[:-1], strict=True)
    ]

    def summed(values: list[float], span: int) -> float:
        variations = [naive_variation(values[k : k + span]) for k in range(len(values) - span + 1)]
        return sum(decay * (1 - decay) ** age * r for age, r in enumerate(reversed(variations)))

    right = summed(changes, window - 1)
    assert right == pytest.approx(naive_score(probs_TC, window, decay))
    wrong = {
        "Kullback-Leibler divergence": summed(divergences, window - 1),
        "standard deviation, divided": right / math.sqrt(window - 1),
        "J changes a window": summed(changes, window),
        "bias-corrected average": right / (1 - (1 - decay) ** (len(probs_TC) - window + 1)),
        "oldest window weighs most": summed(changes[::-1], window - 1),
        "first window alone": naive_variation(changes[: window - 1]),
    }
    assert ours == pytest.approx(right, rel=1e-5)
    assert {name for name, value in wrong.items() if abs(value - right) < 1e-3} == set()


def test_several_pairs_in_one_run_equal_separate_runs() -> None:
    probs_TNC = random_trajectory(1, 9, 50, 7)
    pairs = [(7, 4), (9, 4), (5, 4), (9, 3), (3, 3), (6, 6), (8, 6)]
    together = scored_selector(tdds(trajectory_len=7, window_size=4, also=pairs[1:]), probs_TNC)
    scores = together.scores()
    assert list(scores) == ["tdds", *(f"tdds_T{length}_J{window}" for length, window in pairs[1:])]
    for (length, window), name in zip(pairs, scores, strict=True):
        alone = scored_selector(tdds(trajectory_len=length, window_size=window), probs_TNC[:length])
        assert alone.scores()["tdds"].tobytes() == scores[name].tobytes()
    chosen = scored_selector(tdds(trajectory_len=7, window_size=4), probs_TNC[:7]).begin_epoch(7)
    assert together.begin_epoch(9).ids.tolist() == chosen.ids.tolist()


def test_scores_appear_when_their_trajectory_is_complete() -> None:
    selector = scored_selector(
        tdds(trajectory_len=6, window_size=4, also=[(4, 3), (5, 4)]), random_trajectory(2, 4, 5, 3)
    )
    finite = {name: bool(np.isfinite(column).all()) for name, column in selector.scores().items()}
    assert finite == {"tdds": False, "tdds_T4_J3": True, "tdds_T5_J4": False}
    assert all(finite[name] or np.isnan(column).all() for name, column in selector.scores().items())


@pytest.mark.parametrize("length", [10, 90])
@pytest.mark.parametrize(("storage", "size"), [("float32", 4), ("float16", 2)])
@pytest.mark.parametrize(("num_classes", "window"), [(100, 10), (1000, 10), (10, 5)])
def test_memory_does_not_grow_with_the_trajectory(
    length: int, storage: str, size: int, num_classes: int, window: int
) -> None:
    method = tdds(trajectory_len=length, window_size=window, storage=storage)
    probs_TNC = random_trajectory(0, 2, 3, num_classes)
    selector = Selector(method, 3, length + 1)
    for epoch in range(2):
        selector.observe([0, 1, 2], {"probs": probs_TNC[epoch]}, epoch)
    num_bytes = sum(column.nbytes for column in selector.table.columns.values())
    assert num_bytes == 3 * (size * num_classes + 4 * (window - 1) + 4)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_state_stored_mid_epoch_continues_identically(storage: str) -> None:
    options = {"trajectory_len": 8, "window_size": 4, "also": [[6, 4], [7, 3]], "storage": storage}
    probs_TNC = random_trajectory(4, 8, 30, 5)
    whole, before = scored_selector(tdds(**options), probs_TNC), scored_selector(tdds(**options), probs_TNC[:6])
    # The state holds half of epoch 6, which is observed again with the other half.
    before.begin_epoch(6)
    before.observe(np.arange(15), {"probs": probs_TNC[6][:15]}, 6)
    file = io.BytesIO()
    np.savez(file, **before.state_dict())  # type: ignore[arg-type]
    file.seek(0)
    after = Selector(tdds(**options), 30, 9)
    with np.load(file, allow_pickle=False) as state:
        after.load_state_dict(dict(state))
    after.observe(np.arange(30), {"probs": probs_TNC[6]}, 6)
    after.begin_epoch(7)
    after.observe(np.arange(30), {"probs": probs_TNC[7]}, 7)
    for name, column in whole.scores().items():
        assert after.scores()[name].tobytes() == column.tobytes()
    assert after.begin_epoch(8).ids.tolist() == whole.begin_epoch(8).ids.tolist()


def test_order_and_batches_do_not_matter() -> None:
    num, probs_TNC = 3_000, random_trajectory(5, 6, 3_000, 40)
    method = tdds(trajectory_len=6, window_size=3)
    whole, parts = scored_selector(method, probs_TNC), Selector(method, num, 7)
    rng = np.random.default_rng(0)
    for epoch in range(6):
        for batch in np.array_split(rng.permutation(num), rng.integers(1, 40)):
            # Another memory layout, like that of a transposed array.
            parts.observe(batch, {"probs": np.asfortranarray(probs_TNC[epoch][batch])}, epoch)
    assert parts.scores()["tdds"].tobytes() == whole.scores()["tdds"].tobytes()


def test_epochs_after_the_trajectory_change_nothing() -> None:
    probs_TNC = random_trajectory(6, 6, 20, 5)
    selector = Selector(tdds(trajectory_len=4, window_size=3), 20, 8)
    for epoch in range(4):
        selector.observe(np.arange(20), {"probs": probs_TNC[epoch]}, epoch)
    scores, selection = selector.scores()["tdds"], selector.begin_epoch(4)
    for epoch in (4, 5):
        selector.observe(selection.ids, {"probs": probs_TNC[epoch][selection.ids]}, epoch)
    assert selector.scores()["tdds"].tobytes() == scores.tobytes()
    assert selector.table.last_visit[selection.ids].tolist() == [5] * 10
    assert selector.begin_epoch(6).ids.tolist() == selection.ids.tolist()
    # Samples that were pruned in between may be observed again.
    selector.observe(np.arange(20), {"probs": probs_TNC[5]}, 6)
    assert selector.scores()["tdds"].tobytes() == scores.tobytes()


@pytest.mark.parametrize(("num_samples", "num_classes"), [(20_000, 100), (4_000, 1_000)])
@pytest.mark.parametrize("window", [5, 10])
def test_float16_storage_keeps_the_same_samples(num_samples: int, num_classes: int, window: int) -> None:
    options = {"trajectory_len": 10, "window_size": window, "prune_ratio": 0.5}
    single, half = (Selector(tdds(**options, storage=storage), num_samples, 11) for storage in ("float32", "float16"))
    for epoch, probs_NC in enumerate(learning(7, 10, num_samples, num_classes)):
        for selector in (single, half):
            selector.observe(np.arange(num_samples), {"probs": probs_NC}, epoch)
    ids, half_ids = single.begin_epoch(10).ids, half.begin_epoch(10).ids
    assert single.scores()["tdds"].tobytes() != half.scores()["tdds"].tobytes()
    assert np.intersect1d(ids, half_ids).size / ids.size >= 0.999


def test_float16_storage_is_precise_below_epsilon() -> None:
    probs = np.geomspace(2e-9, 1.0, 1_000).astype(np.float32)
    again = decode_probs(encode_probs(probs, "float16"))
    assert (np.abs(again / probs - 1) <= 2.0**-11).all()
    assert (np.abs(probs.astype(np.float16).astype(np.float32) / probs - 1) > 0.5).any()


def test_batch_weights_are_means_of_normalized_scores() -> None:
    probs_TNC = random_trajectory(8, 5, 24, 6)
    method = tdds(trajectory_len=5, window_size=3, batch_mean_weights=True)
    selector = scored_selector(method, probs_TNC)
    selection, scores = selector.begin_epoch(5), selector.scores()["tdds"].astype(np.float64)
    expected = ((scores - scores.min()) / (scores.max() - scores.min()))[selection.ids]
    assert expected.min() > 0.0, "the scale is that of all samples, not of the kept ones"
    np.testing.assert_allclose(selection.weights, expected, rtol=1e-6)
    assert selection.num_kept == 12
    plan = Plan.of_selection(selection, batch_size=4, seed=0, epoch=5)
    _, weights, _ = plan.rank_rows(0, 1, 0, 3)
    by_id = dict(zip(selection.ids.tolist(), expected.tolist(), strict=True))
    means = [np.mean([by_id[i] for i in plan.order[step * 4 : step * 4 + 4].tolist()]) for step in range(3)]
    np.testing.assert_allclose(weights.reshape(3, 4), np.repeat(means, 4).reshape(3, 4), rtol=1e-6)
    constant = scored_selector(method, np.repeat(probs_TNC[:1], 5, axis=0)).begin_epoch(5)
    assert constant.weights.tolist() == [1.0] * 12
    assert constant.ids.tolist() == list(range(12))
