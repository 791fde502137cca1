"""Per-example losses against what the models' own losses and transformers' LabelSmoother compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer_pt_utils import LabelSmoother

from rayprune.errors import ConfigError
from rayprune.trainers.example_losses import ExampleLosses, example_losses

LENGTHS = (5, 2, 7)
VOCABULARY = 11


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens() -> tuple[Tensor, Tensor]:
    """Return logits (3, 7, V) and labels (3, 7), padded by -100."""
    labels = torch.full((3, 7), -100)
    for row, length in enumerate(LENGTHS):
        labels[row, :length] = torch.arange(length) + row
    return draw(3, 7, VOCABULARY), labels


def sums_by_loop(logits: Tensor, labels: Tensor) -> tuple[list[float], list[int]]:
    """Sum the token losses one by one."""
    sums, counts = [], []
    for row in range(len(labels)):
        kept = labels[row] != -100
        sums.append(cross_entropy(logits[row][kept], labels[row][kept], reduction="sum").item())
        counts.append(int(kept.sum()))
    return sums, counts


def close(losses: ExampleLosses, sums: list[float], counts: list[int]) -> None:
    assert losses.sums.tolist() == pytest.approx(sums, rel=1e-5)
    assert losses.counts.tolist() == counts


def test_classes_have_the_models_own_loss_and_give_logits_and_targets() -> None:
    logits, labels = draw(4, 3).requires_grad_(), torch.tensor([0, 2, 1, 2])
    losses = example_losses({"logits": logits}, {"labels": labels}, 4, shifts_labels=False)
    close(losses, cross_entropy(logits, labels, reduction="none").tolist(), [1] * 4)
    assert losses.targets is not None
    assert losses.targets.tolist() == labels.tolist()
    assert losses.logits is logits
    assert not losses.means.requires_grad
    losses.sums.sum().backward()
    assert logits.grad is not None
    column = example_losses(SimpleNamespace(logits=logits), {"labels": labels[:, None]}, 4, shifts_labels=True)
    assert torch.equal(column.sums, losses.sums)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0, 3.0])),
        ("regression", 2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [3.0, 1.0]])),
        ("multi_label_classification", 4, torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]])),
        ("single_label_classification", 4, torch.tensor([3, 0, 1])),
        ("single_label_classification", 4, torch.tensor([3, -100, 1])),
    ],
)
def test_the_mean_is_the_loss_of_the_real_model(problem_type: str, num_labels: int, labels: Tensor) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=num_labels,
        problem_type=problem_type,
    )
    model = BertForSequenceClassification(config).eval()
    outputs = model(input_ids=torch.arange(9).reshape(3, 3), labels=labels)
    losses = example_losses(outputs, {"labels": labels}, 3, shifts_labels=False, problem_type=problem_type)
    rows = int((labels != -100).sum()) if labels.ndim == 1 and labels.dtype == torch.int64 else 3
    assert (losses.sums.sum() / rows).item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_tokens_are_summed_by_example() -> None:
    logits, labels = tokens()
    close(example_losses({"logits": logits}, {"labels": labels}, 3, shifts_labels=False), *sums_by_loop(logits, labels))


def test_a_causal_model_predicts_the_next_label() -> None:
    logits, labels = tokens()
    losses = example_losses({"logits": logits}, {"labels": labels}, 3, shifts_labels=True)
    close(losses, *sums_by_loop(logits[:, :-1], labels[:, 1:]))
    assert losses.counts.tolist() == [4, 1, 6]


def test_labels_that_are_shifted_already_are_not_shifted_again() -> None:
    logits, labels = tokens()
    inputs = {"labels": torch.zeros_like(labels), "shift_labels": labels}
    losses = example_losses({"logits": logits}, inputs, 3, shifts_labels=True)
    close(losses, *sums_by_loop(logits, labels))


@pytest.mark.parametrize("shifts", [False, True])
def test_smoothed_tokens_have_the_loss_of_transformers(shifts: bool) -> None:
    logits, labels = tokens()
    losses = example_losses({"logits": logits}, {"labels": labels}, 3, shifts_labels=shifts, label_smoothing=0.2)
    own = LabelSmoother(epsilon=0.2)({"logits": logits.clone()}, labels, shift_labels=shifts)
    assert (losses.sums.sum() / losses.counts.sum()).item() == pytest.approx(own.item(), rel=1e-5)


def test_smoothed_classes_have_the_loss_of_transformers() -> None:
    logits, labels = draw(4, 3), torch.tensor([0, 2, 1, 2])
    losses = example_losses({"logits": logits}, {"labels": labels}, 4, shifts_labels=False, label_smoothing=0.3)
    own = LabelSmoother(epsilon=0.3)({"logits": logits}, labels)
    assert losses.sums.mean().item() == pytest.approx(own.item(), rel=1e-5)


def in_one_row(extra: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the examples of `tokens` behind one another, with `extra` tokens of padding; logits (1, T, V)."""
    logits, labels = tokens()
    kept = torch.cat([torch.arange(7) < length for length in LENGTHS])
    row = logits.reshape(-1, VOCABULARY)[kept], labels.reshape(-1)[kept]
    pad = draw(extra, VOCABULARY), torch.full((extra,), -100)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    # A collator continues the positions of the last example, or starts again.
    padded = torch.cat([positions, torch.arange(extra)])
    bounds = torch.tensor([0, 5, 7, 14], dtype=torch.int32)
    inputs = {"position_ids": padded[None], "cu_seq_lens_q": bounds}
    return torch.cat([row[0], pad[0]])[None], torch.cat([row[1], pad[1]])[None], inputs


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("bounds", ["position_ids", "cu_seq_lens_q"])
def test_a_padding_free_row_is_summed_by_example(bounds: str, extra: int) -> None:
    logits, labels, inputs = in_one_row(extra)
    inputs = {bounds: inputs[bounds], "labels": labels}
    losses = example_losses({"logits": logits}, inputs, 3, shifts_labels=False)
    close(losses, *sums_by_loop(*tokens()))


def test_a_shifted_padding_free_row_counts_a_label_for_the_example_before_it() -> None:
    """The first token of an example has the label -100, as collators set it."""
    logits, labels, inputs = in_one_row()
    labels = labels.clone()
    labels[0, [0, 5, 7]] = -100
    losses = example_losses({"logits": logits}, {**inputs, "labels": labels}, 3, shifts_labels=True)
    rows, rows_labels = tokens()
    rows_labels[:, 0] = -100
    close(losses, *sums_by_loop(rows[:, :-1], rows_labels[:, 1:]))


def test_log_probabilities_of_a_fused_head_are_losses() -> None:
    log_probs = -torch.rand(2, 4)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    outputs = SimpleNamespace(log_probs=log_probs, label_mask=mask, logits=None)
    losses = example_losses(outputs, {}, 2, shifts_labels=True)
    close(losses, [-log_probs[0, :2].sum().item(), -log_probs[1, 0].item()], [2, 1])


def test_one_example_of_many_tokens_needs_no_bounds() -> None:
    logits, labels = tokens()
    losses = example_losses({"logits": logits[:1]}, {"labels": labels[:1]}, 1, shifts_labels=False)
    close(losses, *sums_by_loop(logits[:1], labels[:1]))


def test_an_example_without_labels_has_the_loss_zero() -> None:
    logits, labels = tokens()
    labels[1] = -100
    losses = example_losses({"logits": logits}, {"labels": labels}, 3, shifts_labels=True)
    assert losses.counts[1] == 0
    assert losses.means[1] == 0
    assert torch.isfinite(losses.means).all()


def test_losses_are_float32_in_a_bfloat16_model() -> None:
    logits, labels = tokens()
    losses = example_losses({"logits": logits.bfloat16()}, {"labels": labels}, 3, shifts_labels=False)
    assert losses.sums.dtype == torch.float32
    exact = example_losses({"logits": logits.bfloat16().float()}, {"labels": labels}, 3, shifts_labels=False)
    assert torch.equal(losses.sums, exact.sums)


LOGITS = draw(2, 3)


@pytest.mark.parametrize(
    ("outputs", "inputs", "words"),
    [
        ({"loss": 1.0}, {"labels": torch.zeros(2)}, "no logits, or the batch no labels"),
        ({"logits": LOGITS}, {}, r"switch the fused loss off, or override example_losses\(outputs, inputs\)"),
        (
            {"logits": LOGITS},
            {"labels": torch.zeros(3)},
            r"logits \(2, 3\) and labels \(3,\) of 2 examples fit neither",
        ),
        ({"logits": draw(2, 3, 4, 5)}, {"labels": torch.zeros(2, 3, 4)}, "fit neither classes nor tokens"),
        ({"logits": draw(3, 4, 5)}, {"labels": torch.zeros(3, 4).long()}, "the batch has 3 rows for 2 examples"),
        ({"logits": draw(1, 4, 5)}, {"labels": torch.zeros(1, 4).long()}, "needs position_ids or cu_seq_lens_q"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(outputs: Any, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        example_losses(outputs, inputs, 2, shifts_labels=False)
