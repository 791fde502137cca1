"""Scores of sequences equal those of each sequence alone, for padded and padding-free batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import rayprune
from rayprune.cli.main import cli
from rayprune.errors import ConfigError, DataError
from rayprune.huggingface import keep_by_score, save_scores, sequence_scores
from rayprune.sources.tables.selections import read_selection_file
from tests.support.language import loss_of, sequences, tiny_llama


def left_padded(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(item["input_ids"]) for item in items)
    pads = [width - len(item["input_ids"]) for item in items]
    return {
        "input_ids": torch.tensor([[0] * pad + item["input_ids"] for pad, item in zip(pads, items, strict=True)]),
        "labels": torch.tensor([[-100] * pad + item["labels"] for pad, item in zip(pads, items, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
        "position_ids": torch.tensor([[0] * pad + list(range(width - pad)) for pad in pads]),
    }


COLLATORS: dict[str, Any] = {
    "padded": DataCollatorForLanguageModeling(pad_token_id=0),
    "padded to 8": DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8),
    "padded on the left": left_padded,
    "padding-free": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
    "padding-free to 8": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8),
    "padding-free of transformers": DataCollatorWithFlattening(),
}
every_collator = pytest.mark.parametrize("collator", COLLATORS.values(), ids=list(COLLATORS))


def first_label(item: dict[str, list[int]]) -> int:
    return max(1, next(at for at, label in enumerate(item["labels"]) if label != -100))


@every_collator
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_losses_are_those_of_each_sequence_alone(collator: Any, batch_size: int) -> None:
    model, reference, items = tiny_llama(0), tiny_llama(1), sequences()
    scores = sequence_scores(model, items, collator, batch_size=batch_size, reference=reference)
    losses = np.array([loss_of(model, item["input_ids"], first_label(item)) for item in items])
    references = np.array([loss_of(reference, item["input_ids"], first_label(item)) for item in items])
    assert list(scores) == ["num_tokens", "loss", "perplexity", "reference_loss", "reducible"]
    assert all(array.shape == (7,) and array.dtype == np.float32 for array in scores.values())
    assert scores["num_tokens"].tolist() == [len(item["input_ids"]) - first_label(item) for item in items]
    np.testing.assert_allclose(scores["loss"], losses, rtol=2e-5)
    np.testing.assert_allclose(scores["perplexity"], np.exp(losses), rtol=1e-4)
    np.testing.assert_allclose(scores["reference_loss"], references, rtol=2e-5)
    np.testing.assert_allclose(scores["reducible"], losses - references, atol=1e-4)


@every_collator
@pytest.mark.parametrize("prompts", [True, False])
def test_ifd_without_a_start_token(collator: Any, prompts: bool) -> None:
    """Both losses are of the tokens from the answer's second on."""
    model, items = tiny_llama(0), sequences(prompts=prompts)
    scores = sequence_scores(model, items, collator, batch_size=3, ifd=True)
    for item, ifd, of_losses in zip(items, scores["ifd"], scores["ifd_of_losses"], strict=True):
        start, ids = first_label(item), item["input_ids"]
        after, alone = loss_of(model, ids, start + 1), loss_of(model, ids[start:], 1)
        assert ifd == pytest.approx(np.exp(after) / np.exp(alone), rel=1e-4)
        assert of_losses == pytest.approx(after / alone, rel=1e-4)


@every_collator
def test_ifd_with_a_start_token(collator: Any) -> None:
    """Both losses are of the whole answer."""
    model, items = tiny_llama(0), sequences()
    scores = sequence_scores(model, items, collator, batch_size=4, ifd=True, start_token=1)
    for item, ifd, loss in zip(items, scores["ifd"], scores["loss"], strict=True):
        start, ids = first_label(item), item["input_ids"]
        after, alone = loss_of(model, ids, start), loss_of(model, [1, *ids[start:]], 1)
        assert loss == pytest.approx(after, rel=1e-4)
        assert ifd == pytest.approx(np.exp(after - alone), rel=1e-4)


def test_a_prompt_of_the_start_token_alone_does_not_help() -> None:
    items = [{"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    scores = sequence_scores(tiny_llama(), items, COLLATORS["padded"], batch_size=1, ifd=True, start_token=1)
    assert scores["ifd"] == pytest.approx(1.0)


def test_sequences_without_tokens_to_predict_have_no_scores() -> None:
    items = [*sequences(2), {"input_ids": [4, 5, 6], "labels": [-100] * 3}, {"input_ids": [4], "labels": [4]}]
    for name in ("padded", "padding-free"):
        scores = sequence_scores(tiny_llama(), items, COLLATORS[name], batch_size=4, ifd=True)
        for score in ("loss", "perplexity", "ifd", "ifd_of_losses"):
            assert np.isnan(scores[score]).tolist() == [False, False, True, True], score
        assert scores["num_tokens"].tolist()[2:] == [0, 0]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    scores = sequence_scores(model, Dataset.from_list(sequences()), COLLATORS["padded"], batch_size=2)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (
        scores["loss"].tolist()
        == sequence_scores(tiny_llama(), sequences(), COLLATORS["padded"], batch_size=2)["loss"].tolist()
    )
    with pytest.raises(ConfigError):
        sequence_scores(model, sequences(), lambda items: items, batch_size=2)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("items", "collator", "batch_size", "message"),
    [
        ([], COLLATORS["padded"], 2, "no sequences"),
        (sequences(), COLLATORS["padded"], 0, "batch_size 0"),
        (sequences(), lambda items: {"input_ids": torch.zeros(2, 3)}, 2, "input_ids and labels"),
        (iter([]), COLLATORS["padded"], 2, "can't be read by id"),
    ],
)
def test_what_cannot_be_scored_is_refused(items: Any, collator: Any, batch_size: int, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        sequence_scores(tiny_llama(), items, collator, batch_size=batch_size)


def test_scores_in_a_file_are_read_by_select(tmp_path: Path) -> None:
    quality = np.array([0.3, 0.9, np.nan, 0.5, 0.1], dtype=np.float32)
    path = save_scores(tmp_path / "scores.parquet", {"quality": quality, "length": np.arange(5)})
    for rule in ("top", "bottom", "middle", "strata"):
        command = ["select", str(path), "--by", "quality", "--keep", "0.5", "--rule", rule, "--drop-missing", "--force"]
        result = CliRunner().invoke(cli, [*command, "--seed", "3"])
        assert result.exit_code == 0, result.output
        method = keep_by_score(quality, tmp_path / "own.parquet", keep=0.5, rule=rule, seed=3)  # type: ignore[arg-type]
        assert method == rayprune.Fixed(path=str(tmp_path / "own.parquet"))
        chosen = read_selection_file(tmp_path / "chosen.parquet", 5).ids.tolist()
        assert read_selection_file(method.path, 5).ids.tolist() == chosen
        assert len(chosen) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 2}, [1, 3]),
        ({"keep": 0.2}, [1]),
        ({"keep": 2, "rule": "bottom"}, [0, 4]),
        ({"keep": 2, "rule": "middle"}, [0, 3]),
        ({"keep": 4, "rule": "strata"}, [0, 1, 3, 4]),
    ],
)
def test_what_is_kept_by_a_score(tmp_path: Path, options: dict[str, Any], expected: list[int]) -> None:
    method = keep_by_score([0.3, 0.9, np.nan, 0.5, 0.1], tmp_path / "chosen.txt", **options)
    assert read_selection_file(method.path, 5).ids.tolist() == expected


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for scores in (np.zeros((2, 2)), np.array(["a"])):
        with pytest.raises(ConfigError, match=r"\(N,\) numbers"):
            keep_by_score(scores, tmp_path / "chosen.parquet", keep=1)
        with pytest.raises(ConfigError, match=r"\(N,\) numbers"):
            save_scores(tmp_path / "scores.parquet", {"a": scores})
    with pytest.raises(ConfigError, match="no scores"):
        save_scores(tmp_path / "scores.parquet", {})
    with pytest.raises(ConfigError, match=r"keep 1\.0 means 2 samples, but only 1"):
        keep_by_score([np.nan, 0.5], tmp_path / "chosen.parquet", keep=1.0)
