"""Clean subset: the schedule, the estimate of the noise rate, the classes, and a training on wrong labels.

Shapes: N samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.core import Selection, Selector
from rayprune.engine.storage.run_folder import read_selection
from rayprune.engine.train.driver import RunResult, train
from rayprune.errors import ConfigError
from rayprune.methods import build_method
from rayprune.methods.clean_subset import estimated_rate
from rayprune.sources import open_data
from rayprune.sources.tables.audits import AuditTable, write_audit
from tests.support.runs import results, run_config, same_weights


def selector_of(num: int, num_epochs: int = 30, labels: Any = None, **options: Any) -> Selector:
    return Selector(build_method({"name": "clean_subset", **options}), num, num_epochs, labels=labels)


def selections(losses_EN: np.ndarray, labels: Any = None, **options: Any) -> list[Selection]:
    """Run epochs in which every sample has the loss of its row, whether it is trained or only scored."""
    selector = selector_of(losses_EN.shape[1], len(losses_EN), labels, **options)
    found = []
    for epoch, losses in enumerate(losses_EN):
        selection = selector.begin_epoch(epoch)
        for ids in (selection.ids, selection.forward_only_ids):
            if ids.size:
                selector.observe(ids, {"loss": losses[ids]}, epoch)
        found.append(selection)
    return found


def dropped(selection: Selection) -> list[int]:
    return np.flatnonzero(selection.codes == 0).tolist()


def test_the_small_example() -> None:
    losses = np.tile(np.array([0.1, 3.0, 0.2, 2.0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3], dtype=np.float32), (4, 1))
    found = selections(losses, noise_rate=0.2, ramp_epochs=2)
    assert [dropped(selection) for selection in found] == [[], [1], [1, 3], [1, 3]]
    assert [selection.forward_only_ids.tolist() for selection in found] == [[], [1], [1, 3], []]
    assert [selection.requested for selection in found] == [0.0, 0.1, 0.2, 0.2]
    assert found[2].facts["noise_rate"] == 0.2


@pytest.mark.parametrize(("rate", "ramp"), [(0.0, 10), (0.2, 10), (0.45, 3), (0.99, 1), (0.29, 7)])
def test_the_rule_is_that_of_a_loop(rate: float, ramp: int) -> None:
    rng = np.random.default_rng(0)
    for num in (1, 2, 10, 57):
        losses = np.round(rng.exponential(size=(15, num)), 1).astype(np.float32)  # with ties
        found = selections(losses, noise_rate=rate, ramp_epochs=ramp, ema=0.25)
        mean = losses[0].astype(np.float64)
        for t in range(1, 15):
            remember = 1 - min(t / ramp * rate, rate)
            drops = min(int((1 - remember) * num + 1e-6), num - 1)
            order = sorted(range(num), key=lambda i: (np.float32(mean[i]), i))
            assert dropped(found[t]) == sorted(order[num - drops :])
            mean = (0.75 * np.float32(mean).astype(np.float64)) + 0.25 * losses[t]


def test_a_dropped_sample_comes_back_when_its_loss_falls() -> None:
    losses = np.full((6, 10), 0.5, dtype=np.float32)
    losses[0, 4] = losses[3:, 7] = 4.0
    losses[1:, 4] = 0.0
    found = selections(losses, noise_rate=0.1, ramp_epochs=1, ema=1.0)
    assert [dropped(selection) for selection in found] == [[], [4], [9], [9], [7], [7]]


def noisy_losses(num: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return losses of which a share is as of wrong labels, and which."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(num) < share
    return -np.log(np.where(wrong, rng.beta(1, 8, num), rng.beta(8, 1, num))).astype(np.float32), wrong


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4])
def test_the_noise_rate_is_estimated_at_the_end_of_the_warm_up_and_stays(share: float) -> None:
    losses, wrong = noisy_losses(20_000, share)
    assert estimated_rate(losses) == pytest.approx(wrong.mean(), abs=0.01)
    later = np.random.default_rng(1).exponential(size=losses.size).astype(np.float32)
    found = selections(np.stack([losses] * 3 + [later] * 3), warmup_epochs=3, ramp_epochs=4)
    assert [dropped(selection) for selection in found[:3]] == [[], [], []]
    rates = [selection.facts["noise_rate"] for selection in found[3:]]
    assert rates == [round(estimated_rate(losses), 4)] * 3
    assert found[4].requested == pytest.approx(rates[0], abs=1e-4)
    if share:
        assert wrong[dropped(found[3])].mean() > 0.98


def test_the_estimate_knows_only_finished_visits() -> None:
    assert estimated_rate(np.full(5, np.nan)) == 0.0
    assert estimated_rate(np.array([np.nan, 1.0])) == 0.0
    losses, wrong = noisy_losses(3000, 0.3)
    missing = np.concatenate([losses, np.full(500, np.nan, dtype=np.float32)])
    assert estimated_rate(missing) == estimated_rate(losses) == pytest.approx(wrong.mean(), abs=0.02)


def test_each_class_drops_its_own_share() -> None:
    labels = np.repeat([0, 1, 3], [6000, 4000, 10])
    clean, (noisy, wrong) = noisy_losses(6000, 0.0)[0], noisy_losses(4000, 0.3)
    losses = np.concatenate([clean, noisy, np.full(10, 9.0, dtype=np.float32)])
    found = selections(np.tile(losses, (3, 1)), labels, per_class=True, warmup_epochs=1, ramp_epochs=1)[-1]
    of = np.bincount(labels[dropped(found)], minlength=4)
    assert of.tolist() == [0, pytest.approx(4000 * wrong.mean(), abs=60), 0, 0]
    assert found.facts["noise_rate"] == pytest.approx(wrong.sum() / 10_010, abs=0.01)
    given = selections(np.tile(losses, (3, 1)), labels, per_class=True, noise_rate=0.25, ramp_epochs=1)[-1]
    assert np.bincount(labels[dropped(given)], minlength=4).tolist() == [1500, 1000, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_rate": 1.0}, "noise_rate 1.0 is outside"),
        ({"noise_rate": -0.1}, "noise_rate -0.1 is outside"),
        ({"ramp_epochs": 0}, "ramp_epochs 0 must be at least 1"),
        ({"warmup_epochs": 0}, "warmup_epochs 0 must be at least 1"),
        ({"ema": 0.0}, "ema 0.0 is outside"),
    ],
)
def test_wrong_hyperparameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method({"name": "clean_subset", **options})


# Trainings on digits, some of whose labels are wrong


def run_on(folder: Path, run: str, wrong_share: float, seed: int, **method: Any) -> tuple[RunResult, np.ndarray]:
    """Train on digits with wrong labels, and return the run and which are wrong."""
    source, rng = open_data("digits").train, np.random.default_rng(seed)
    wrong = rng.random(len(source)) < wrong_share
    labels = np.where(wrong, (source.labels + rng.integers(1, 10, len(source))) % 10, source.labels)
    table = AuditTable(source.labels, wrong, suggested_label=labels)
    audit = write_audit(folder / f"{run}.parquet", table, source.fingerprint)
    config = run_config(
        folder,
        run,
        data={"limit": None, "relabel": str(audit), "augment": {}},
        train={"epochs": 40, "batch_size": 64, "seed": seed, "validate_every": 40},
        optim={"lr": 0.05},
    )
    return train(config.model_copy(update={"method": build_method(method).to_config()})), wrong


@pytest.mark.parametrize("options", [{"noise_rate": 0.4}, {}], ids=["given", "estimated"])
def test_most_wrong_labels_are_dropped_and_accuracy_rises(tmp_path: Path, options: dict[str, Any]) -> None:
    gains = []
    for seed in range(3):
        full, _ = run_on(tmp_path, f"full{seed}", 0.4, seed, name="full")
        clean, wrong = run_on(tmp_path, f"clean{seed}", 0.4, seed, name="clean_subset", **options)
        gains.append(clean.metrics[-1]["val_accuracy"] - full.metrics[-1]["val_accuracy"])
        selection = read_selection(clean.folder, 39)
        assert selection.facts["noise_rate"] == pytest.approx(wrong.mean(), abs=0.1)
        drops = selection.codes == 0
        assert drops[wrong].mean() > 0.8
        assert wrong[drops].mean() > 0.8
        assert clean.metrics[-1]["samples_forwarded"] > 0
    assert np.mean(gains) > 2 * np.std(gains, ddof=1)
    assert np.mean(gains) > 0.02


def test_without_noise_it_is_full_training(tmp_path: Path) -> None:
    full, _ = run_on(tmp_path, "full", 0.0, 0, name="full")
    clean, _ = run_on(tmp_path, "clean", 0.0, 0, name="clean_subset", noise_rate=0.0)
    assert results(full.metrics) == results(clean.metrics)
    assert same_weights(full.folder, clean.folder)
