"""Scores of sequences by forward passes of a causal language model, without training.

The losses are those of `PrunedTrainer`: computed from the logits, per example, for padded and padding-free batches.

The instruction-following difficulty (IFD) is of Li et al., "From Quantity to Quality: Boosting LLM Performance with
Self-Guided Data Selection for Instruction Tuning", NAACL 2024, arXiv 2308.12032: how hard the answer is to predict
after the instruction, relative to how hard it is alone. Values near or above 1 say that the instruction does not help;
the paper drops those above 1, and keeps the highest of the others. Its formula divides the mean losses; later programs,
such as that of Superfiltering (Li et al., ACL 2024, arXiv 2402.00530), divide the perplexities. Both are returned.

Deliberate deviation: without a start token the first token of an answer that stands alone cannot be predicted, and
counts in neither of the two losses; programs count it in that after the instruction only.

`reducible` is the score of RHO-LOSS (Mindermann et al., ICML 2022, arXiv 2206.07137) of a fixed model: its loss minus
that of a reference model, which should have been trained on other data.

Shapes: N sequences, b of a batch, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rayprune.core.choosing import Rule, choose, num_kept
from rayprune.core.selection import Selection
from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError, DataError
from rayprune.methods.fixed import Fixed
from rayprune.sources.tables.scores import write_scores
from rayprune.sources.tables.selections import write_selection_file
from rayprune.trainers.example_losses import example_losses, examples_of_tokens
from rayprune.trainers.loader import check_map_style

_IGNORED = -100
Scores = dict[str, NDArray[np.float32]]


def sequence_scores(
    model: nn.Module,
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    reference: nn.Module | None = None,
    ifd: bool = False,
    start_token: int | None = None,
) -> Scores:
    """Score every sequence of a dataset by forward passes; the models stay as they are, and on their devices.

    `loss` costs one forward pass of the model over the data, `reference` one more of the reference model, and `ifd` one
    more of the model over the answers alone.

    Args:
        model: a causal language model of transformers, whose logits at position t predict token t + 1.
        dataset: a map-style Dataset of N items that the collate function takes.
        collate_fn: as for the Trainer; its batches have `input_ids` and `labels`, -100 for tokens that do not count,
            such as those of the prompt. Either a row per sequence, or all in one row (padding-free).
        batch_size: sequences of a forward pass, at least 1.
        reference: another such model, for `reference_loss` and `reducible`.
        ifd: also score how much the prompt helps to predict the answer, the tokens whose label is not -100.
        start_token: the id of the token that begins a text, such as `tokenizer.bos_token_id`; it is put before an
            answer that stands alone. None: the first token of an answer does not count for IFD.

    Returns:
        Name → (N,) float32, in the order of the dataset. A sequence without a token to predict has NaN, and 0 in
        `num_tokens`.

        - `num_tokens`: the tokens that count.
        - `loss`: their mean cross entropy in nats; `perplexity`: exp(loss).
        - `reference_loss`, and `reducible`: loss − reference_loss.
        - `ifd`: perplexity of the answer after the prompt / perplexity of the answer alone; `ifd_of_losses`: the same
          ratio of the losses.

    Raises:
        ConfigError: a dataset that can't be read by id, a batch size below 1, batches without `input_ids` or `labels`,
            or a model without logits.
        DataError: no sequences, or a collate function that adds or drops some.

    Example::

        scores = rayprune.huggingface.sequence_scores(model, dataset, collator, batch_size=16, ifd=True)
        method = rayprune.huggingface.keep_by_score(scores["ifd"], "chosen.parquet", keep=0.3)
    """
    check_map_style(dataset)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(
            f"batch_size {short_repr(batch_size)} must be an integer of at least 1: sequences of a forward pass"
        )
    if not len(dataset):
        raise DataError("the dataset has no sequences to score: give at least one")
    models = [model] if reference is None else [model, reference]
    parts: list[dict[str, Tensor]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for each in models:
            stack.enter_context(_in_eval_mode(each))
        for batch, num in _batches(dataset, collate_fn, batch_size):
            counts, sums = _losses(model, batch, num)
            part = {"num_tokens": counts.nan_to_num(0.0), "loss": sums / counts}
            if reference is not None:
                reference_counts, reference_sums = _losses(reference, batch, num)
                part["reference_loss"] = reference_sums / reference_counts
            if ifd:
                part |= _answer_losses(model, batch, num, start_token)
            parts.append(part)
    found = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scores = {"num_tokens": found["num_tokens"], "loss": found["loss"], "perplexity": np.exp(found["loss"])}
        if reference is not None:
            scores["reference_loss"] = found["reference_loss"]
            scores["reducible"] = found["loss"] - found["reference_loss"]
        if ifd:
            after, alone = found["after_prompt"], found["alone"]
            scores |= {"ifd": np.exp(after - alone), "ifd_of_losses": after / alone}
        return {name: array.astype(np.float32) for name, array in scores.items()}


def save_scores(path: str | Path, scores: Mapping[str, NDArray[Any]]) -> Path:
    """Write scores to a Parquet file that `rayprune select` reads.

    Args:
        path: of the file.
        scores: name → (N,) numbers, in the order of the dataset, such as `sequence_scores` returns, and any columns of
            your own.

    Raises:
        ConfigError: no scores, a column that is not (N,) numbers, or a folder that does not exist.

    Example::

        rayprune.huggingface.save_scores("scores.parquet", scores | {"quality": quality})
        # rayprune select scores.parquet --by quality --keep 0.3
    """
    if Path(path).suffix != ".parquet":
        raise ConfigError(f"{path} must end with .parquet, the format of the scores")
    arrays = {name: np.asarray(array) for name, array in scores.items()}
    if not arrays:
        raise ConfigError("there are no scores to save: give a mapping of names to (N,) numbers")
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in "biuf":
            raise ConfigError(f"score {name!r} must be (N,) numbers, got {array.dtype} of shape {array.shape}")
    return write_scores(Path(path), next(iter(arrays.values())).size, arrays)


def keep_by_score(
    scores: Any, path: str | Path, *, keep: float, rule: Rule = "top", num_strata: int = 50, seed: int = 0
) -> Fixed:
    """Choose sequences by a score of each, write the choice to a file, and return the method that trains on it.

    The choice is that of `rayprune select` with the same options.

    Args:
        scores: (N,) numbers, of `sequence_scores` or from outside, in the order of the dataset. Samples whose score is
            NaN are left out.
        path: of the file, .parquet or .txt; an existing one is replaced.
        keep: a share in (0, 1] of the N samples, or their number, an integer; so 1.0 keeps all, and 1 keeps one.
        rule: keep the highest scores (`top`), the lowest (`bottom`), those around the median (`middle`), or a draw
            over the whole range (`strata`).
        num_strata: bins of equal width, for `strata`.
        seed: of the draw, for `strata`.

    Returns:
        Fixed(path), for `PrunedTrainer(method=…)`.

    Raises:
        ConfigError: scores that are not (N,) numbers, an argument out of range, more samples to keep than have a score,
            or a path that can't be written.
    """
    array, keep = np.asarray(scores), keep.item() if isinstance(keep, np.generic) else keep
    if array.ndim != 1 or not array.size or array.dtype.kind not in "biuf":
        raise ConfigError(f"scores must be (N,) numbers, got {array.dtype} of shape {array.shape}")
    known = np.flatnonzero(~np.isnan(array)) if array.dtype.kind == "f" else np.arange(array.size)
    count = num_kept(keep, array.size)
    if count > known.size:
        raise ConfigError(f"keep {keep} means {count} samples, but only {known.size} have a score: keep fewer")
    within = choose(array[known], count, rule, rng=np.random.default_rng([seed, 0]), num_strata=num_strata)
    requested, drops = 1.0 - count / array.size, array.size - count
    selection = Selection.of_ids(known[within.ids], array.size, requested=requested, expected_drops=drops)
    about: dict[str, Any] = {"keep": keep, "rule": rule}
    if rule == "strata":
        about |= {"num_strata": num_strata, "seed": seed}
    return Fixed(path=str(write_selection_file(path, selection, about=about)))


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode; afterwards each of its modules has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(
    dataset: Any, collate_fn: Callable[[list[Any]], Any], batch_size: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield batches and their numbers of sequences, b."""
    left = len(dataset)
    for batch in DataLoader(dataset, batch_size, collate_fn=collate_fn):
        if not isinstance(batch, Mapping) or not all(
            isinstance(batch.get(name), Tensor) for name in ("input_ids", "labels")
        ):
            raise ConfigError(
                f"the collate function returns {short_repr(list(batch) if isinstance(batch, Mapping) else batch)}, and "
                "scores need a mapping with the tensors input_ids and labels: use the Trainer's collator for causal "
                "language models"
            )
        num = min(batch_size, left)
        left -= num
        yield dict(batch), num


def _losses(model: nn.Module, batch: Mapping[str, Any], num: int) -> tuple[Tensor, Tensor]:
    """Return the number of tokens that count, (b,) float64 with NaN for 0, and the sums of their losses, (b,)."""
    given = {name: value.to(_device(model)) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return _of_outputs(_forward(model, given), given, num)


def _of_outputs(outputs: Any, batch: Mapping[str, Any], num: int) -> tuple[Tensor, Tensor]:
    losses = example_losses(outputs, batch, num, shifts_labels=True)
    counts = losses.counts.cpu().double()  # not every device has float64
    return counts.where(counts > 0, torch.nan), losses.sums.cpu().double()


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    # With a cache, transformers does not look for the bounds of sequences in position_ids. Without labels, the model
    # computes no loss of its own.
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _answer_losses(model: nn.Module, batch: Mapping[str, Any], num: int, start_token: int | None) -> dict[str, Tensor]:
    """Return the mean losses of the answers after their prompts and alone, (b,) each, over the same tokens."""
    device = _device(model)
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    example = examples_of_tokens(given, num)
    labels = given["labels"].clone()
    labels[_first_tokens(example)] = _IGNORED  # nothing predicts them
    answers = [given["input_ids"][(labels != _IGNORED) & (example == row)] for row in range(num)]
    if start_token is None:
        labels[_first_tokens(example.where(labels != _IGNORED, -1))] = _IGNORED
    counts, sums = _of_outputs(_forward(model, given), {**given, "labels": labels}, num)
    if start_token is not None:
        answers = [torch.cat([answer.new_tensor([start_token]), answer]) for answer in answers]
    width = max(2, *(len(answer) for answer in answers))
    alone = {name: torch.full((num, width), fill, device=device) for name, fill in (("input_ids", 0), ("labels", -100))}
    alone["attention_mask"] = torch.zeros((num, width), dtype=torch.long, device=device)
    for row, answer in enumerate(answers):
        alone["input_ids"][row, : len(answer)] = answer
        alone["labels"][row, 1 : len(answer)] = answer[1:]
        alone["attention_mask"][row, : max(1, len(answer))] = 1
    alone_counts, alone_sums = _losses(model, alone, num)
    return {"after_prompt": sums / counts, "alone": alone_sums / alone_counts}


def _first_tokens(example: Tensor) -> Tensor:
    """Return a mask of the first token of every example in (b, T) or (1, T); -1 marks tokens of none."""
    flat = example.flatten()
    found = torch.zeros_like(flat, dtype=torch.bool)
    for row in range(int(flat.max()) + 1):
        where = (flat == row).nonzero()
        if len(where):
            found[where[0]] = True
    return found.view(example.shape)
