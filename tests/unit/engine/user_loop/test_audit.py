"""`shard.audit()`: findings from the visits of a loop of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy

import rayprune
from rayprune.cli.main import cli
from rayprune.core.audit.visits import TrainingVisits
from rayprune.engine.user_loop.shard import Shard
from rayprune.errors import ConfigError, DataError, UsageError
from rayprune.report.audit import read_audit_section
from rayprune.report.collect import collect
from rayprune.report.page import render
from rayprune.sources.tables.audits import AuditTable, read_audit
from tests.unit.engine.user_loop.loops import BATCH, METHOD

N, C, EPOCHS = 400, 3, 8
WRONG = np.arange(0, N, 10)


def table() -> dict[str, Any]:
    """Three clusters of points; every tenth label is wrong, and row 399 is a copy of row 398."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, C, N)
    x = (rng.normal(size=(N, 6)) + 2.5 * np.eye(C, 6)[true]).astype(np.float32)
    labels = true.astype(np.int64)
    labels[WRONG] = (true[WRONG] + 1) % C
    x[399], labels[399] = x[398], labels[398]
    return {"x": x, "label": labels}


DATA = table()


def shard_of(data: Any = DATA, **changes: Any) -> Shard:
    given = {"source": data, "method": METHOD, "num_epochs": EPOCHS, "batch_size": BATCH, "audit": True}
    return rayprune.local_loader(**{**given, **changes})


class Loop:
    """A linear classifier, with the probabilities of every visit."""

    def __init__(self, shard: Shard) -> None:
        torch.manual_seed(0)
        self.shard, self.model = shard, torch.nn.Linear(6, C)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.visits: dict[int, list[tuple[int, np.ndarray, float]]] = {}

    def run(self, stop: tuple[int, int] | None = None) -> dict[str, Any]:
        for epoch in self.shard:
            for batch in epoch:
                logits = self.model(batch["x"])
                losses = cross_entropy(logits, batch["label"], reduction="none")
                loss = epoch.weigh(batch, losses, logits=logits)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                real = batch["weight"] > 0
                probs = logits.detach().softmax(1)
                for sample, row, value in zip(batch["id"][real].tolist(), probs[real], losses[real], strict=True):
                    self.visits.setdefault(sample, []).append((epoch.index, row.numpy(), float(value)))
                if (epoch.index, epoch.step) == stop:
                    return {"data": self.shard.state_dict(), "model": self.model.state_dict()}
        return {}


@pytest.fixture(scope="module")
def whole() -> tuple[Loop, AuditTable]:
    loop = Loop(shard_of())
    loop.run()
    return loop, loop.shard.audit()


def test_wrong_labels_rank_first_and_copies_are_found(whole: tuple[Loop, AuditTable]) -> None:
    found = whole[1]
    assert np.isin(np.argsort(-found.p_wrong)[: WRONG.size], WRONG).mean() > 0.8
    assert np.flatnonzero(found.duplicate_of >= 0).tolist() == [399]
    assert found.duplicate_of[399] == 398
    suspects = np.flatnonzero(found.group == "wrong_label")
    assert suspects.size
    assert "in training" in found.evidence[suspects[0]]


def test_the_statistics_are_means_over_the_visits_of_the_second_half(whole: tuple[Loop, AuditTable]) -> None:
    loop, found = whole
    for sample, visits in loop.visits.items():
        late = [visit for visit in visits if visit[0] >= EPOCHS // 2]
        counted = late or visits
        label = DATA["label"][sample]
        assert found.statistics["probability"][sample] == pytest.approx(
            np.mean([probs[label] for _, probs, _ in counted]), rel=1e-4
        )
        assert found.statistics["loss"][sample] == pytest.approx(np.mean([loss for *_, loss in counted]), rel=1e-4)
        assert found.statistics["correct"][sample] == pytest.approx(
            np.mean([probs.argmax() == label for _, probs, _ in visits]), rel=1e-5
        )
    assert len(loop.visits) == N


def test_a_sample_that_is_pruned_late_keeps_its_early_visits() -> None:
    visits = TrainingVisits(2, 4)

    def signals(value: float, rows: int) -> dict[str, np.ndarray]:
        column = np.full(rows, value, dtype=np.float32)
        probs = np.tile(np.float32([value, 1 - value]), (rows, 1))
        return {"probs": probs, "loss": column, "logit_margin": column, "correct": column, "prob_label": column}

    both = np.array([0, 1])
    for epoch, value in enumerate([0.25, 0.75]):
        visits.observe(both, signals(value, 2), epoch)
    visits.observe(both[:1], signals(1.0, 1), 2)
    visits.observe(both[:1], signals(9.0, 1), 2)  # the same epoch again does not count
    visits.observe(both[:1], signals(np.nan, 1), 3)
    found = visits.evidence(np.zeros(2, dtype=np.int64))
    np.testing.assert_allclose(found.probs, [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(found.losses, [[1.0, 0.5]])
    np.testing.assert_allclose(found.correct, [2 / 3, 0.5])


def test_recording_changes_no_selection_and_survives_a_resume(whole: tuple[Loop, AuditTable], tmp_path: Path) -> None:
    plain = Loop(shard_of(audit=False))
    plain.run()
    assert {sample: [visit[0] for visit in visits] for sample, visits in plain.visits.items()} == {
        sample: [visit[0] for visit in visits] for sample, visits in whole[0].visits.items()
    }
    for stop in ((1, 3), (5, 4)):
        torch.save(Loop(shard_of()).run(stop), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = Loop(shard_of())
        again.model.load_state_dict(state["model"])
        again.shard.load_state_dict(state["data"])
        again.run()
        found = again.shard.audit()
        np.testing.assert_array_equal(found.p_wrong, whole[1].p_wrong)
        for name, values in whole[1].statistics.items():
            np.testing.assert_array_equal(found.statistics[name], values)
    shard_of(audit=False).load_state_dict(state["data"])
    without = Loop(shard_of(audit=False)).run((1, 3))
    with pytest.raises(ConfigError, match="audit None → True"):
        shard_of().load_state_dict(without["data"])


def test_the_run_folder_has_the_audit_and_the_commands_read_it(tmp_path: Path) -> None:
    loop = Loop(shard_of(run=tmp_path / "run"))
    loop.run()
    found = loop.shard.audit()
    stored = read_audit(tmp_path / "run")
    np.testing.assert_array_equal(stored.table.p_wrong, found.p_wrong)
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["predictions"] == "training_visits"
    section = read_audit_section(tmp_path / "run")
    assert section is not None
    assert "memorized" in " ".join(section.verdict)
    assert "Data audit" in render(collect([tmp_path / "run"]))
    done = CliRunner().invoke(cli, ["select", str(tmp_path / "run"), "--drop-suspects"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def uniform(shard: Shard) -> None:
    """Run a loop whose network knows nothing."""
    for epoch in shard:
        for batch in epoch.iter_torch_batches(collate_fn=lambda columns: columns):
            logits, labels = torch.randn(len(batch["id"]), C), torch.from_numpy(batch["label"])
            epoch.weigh(batch, cross_entropy(logits, labels, reduction="none"), logits=logits, targets=labels)


def test_texts_are_compared() -> None:
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(300)]
    texts = [" ".join(rng.choice(words, size=20)) for _ in range(60)]
    texts[30] = texts[3].upper()
    data = {"text": texts, "x": np.zeros((60, 6), dtype=np.float32), "label": np.arange(60) % C}
    shard = shard_of(data, num_epochs=1, method=rayprune.Full())
    uniform(shard)
    found = shard.audit()
    assert np.flatnonzero(found.duplicate_of >= 0).tolist() == [30]
    assert "similarity" not in shard.audit(duplicates=False).statistics


def test_images_are_compared() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    images[20] = images[2, :, ::-1]
    shard = shard_of({"image": images, "label": np.arange(40) % C}, num_epochs=1, method=rayprune.Full())
    uniform(shard)
    found = shard.audit()
    assert np.flatnonzero(found.duplicate_of >= 0).tolist() == [20]
    assert found.evidence[20].startswith("similarity")


def one_batch(shard: Shard, **outputs: Any) -> None:
    epoch = next(shard.epochs())
    batch = next(iter(epoch))
    epoch.weigh(batch, torch.rand(BATCH), **outputs)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({}, r"audit=True needs the logits of each batch: call weigh\(batch, losses, logits=logits\)"),
        ({"logits": torch.zeros(BATCH, 1)}, "one of several classes per sample"),
        ({"logits": torch.zeros(BATCH, C, 4), "targets": torch.zeros(BATCH, 4).long()}, "one of several classes"),
        ({"logits": torch.zeros(BATCH, C), "targets": torch.zeros(BATCH, C)}, "leave audit out"),
    ],
)
def test_outputs_that_say_nothing_of_a_class_are_refused(outputs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        one_batch(shard_of(), **outputs)


def test_mistakes_are_one_line_with_the_cure() -> None:
    with pytest.raises(UsageError, match="give local_loader, or prune, audit=True"):
        shard_of(audit=False).audit()
    with pytest.raises(ConfigError, match="no training visit was recorded: call weigh"):
        shard_of().audit()
    with pytest.raises(ConfigError, match=r"audit got rule 'margins'.*margin"):
        shard_of().audit(rule="margins")
    with pytest.raises(ConfigError, match="at=1"):
        shard_of().audit(at=1)
    with pytest.raises(ConfigError, match=r"audit=True needs the labels of the data .*label_column="):
        shard_of({"x": DATA["x"], "target": DATA["label"]})
    with pytest.raises(ConfigError, match="audit=True needs the labels: give weigh"):
        one_batch(
            shard_of({"x": DATA["x"], "target": DATA["label"]}, label_column="target"), logits=torch.zeros(BATCH, C)
        )
    other = shard_of({**DATA, "mine": (DATA["label"] + 1) % C}, num_epochs=1, method=rayprune.Full())
    for epoch in other:
        for batch in epoch:
            logits = 3.0 * torch.nn.functional.one_hot(batch["mine"], C).float()
            epoch.weigh(
                batch, cross_entropy(logits, batch["mine"], reduction="none"), logits=logits, targets=batch["mine"]
            )
    with pytest.raises(ConfigError, match=r"other targets than the data's labels for 400 samples.*label_column="):
        other.audit()
    shard = shard_of({**DATA, "what": [{"a": 1}] * N}, num_epochs=1, method=rayprune.Full())
    uniform(shard)
    with pytest.raises(DataError, match=r"^the samples can't be compared \([^\n]*audit\(duplicates=False\)$"):
        shard.audit()


def test_missing_numbers_of_a_table() -> None:
    x = DATA["x"].copy()
    x[[7, 398, 399], 2] = np.nan
    shard = shard_of({**DATA, "x": x}, num_epochs=1, method=rayprune.Full())
    uniform(shard)
    assert np.flatnonzero(shard.audit().duplicate_of >= 0).tolist() == [399]
