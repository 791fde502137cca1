"""Per-example losses from the outputs of a Hugging Face model.

The model averages its loss over a batch. Selection needs the loss of every example, so it is computed again from the
logits, or from the token log-probabilities that TRL's fused heads return.

Shapes: b examples of a batch, T tokens, V vocabulary, C classes. A padding-free batch has all examples in one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rayprune.errors import ConfigError

_IGNORED = -100  # Hugging Face's label of positions that do not count
_CURE = "override example_losses(outputs, inputs), which returns ExampleLosses"


@dataclass(frozen=True)
class ExampleLosses:
    """The losses of a batch's examples.

    Attributes:
        sums: (b,) the sum of the losses of an example's positions, differentiable; its loss if it has one target.
        counts: (b,) how many positions were summed.
        logits: (b, C) and
        targets: (b,), if each example has one class; None otherwise.
    """

    sums: Tensor
    counts: Tensor
    logits: Tensor | None = None
    targets: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """(b,) the mean loss of each example, detached; 0 for an example without positions."""
        return self.sums.detach() / self.counts.clamp(min=1)


def example_losses(
    outputs: Any,
    inputs: Mapping[str, Any],
    num_examples: int,
    *,
    shifts_labels: bool,
    label_smoothing: float = 0.0,
    problem_type: str | None = None,
) -> ExampleLosses:
    """Compute the loss of every example, as the model's own loss defines it.

    Args:
        outputs: the model's, with `logits`, or with `log_probs` and `label_mask` (TRL).
        inputs: the batch, with `labels` or `shift_labels`.
        num_examples: b.
        shifts_labels: the logits at position t predict the label at t + 1, as in causal language models.
        label_smoothing: share of the target mass spread over all classes.
        problem_type: the model config's; decides what floating-point labels mean.

    Raises:
        ConfigError: the outputs have neither, or the shapes do not fit a known task.
    """
    log_probs = get_output(outputs, "log_probs")
    if log_probs is not None:
        return _of_tokens(-log_probs, get_output(outputs, "label_mask"), inputs, num_examples)
    logits, shifted = get_output(outputs, "logits"), inputs.get("shift_labels")
    labels = inputs.get("labels") if shifted is None else shifted
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ConfigError(
            "the model's outputs have no logits, or the batch no labels, from which the loss of each example could be "
            f"computed (fused losses, such as Liger's, return none): switch the fused loss off, or {_CURE}"
        )
    if logits.ndim == 3 and labels.shape == logits.shape[:2] and not labels.is_floating_point():
        if shifts_labels and shifted is None:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.to(logits.device).flatten(),
            ignore_index=_IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return _of_tokens(losses.view(labels.shape), labels.to(logits.device) != _IGNORED, inputs, num_examples)
    if labels.shape[:1] == logits.shape[:1] == (num_examples,) and logits.ndim <= 2:
        return _of_examples(logits.float(), labels.to(logits.device), label_smoothing, problem_type)
    raise ConfigError(
        f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} of {num_examples} examples fit neither classes "
        f"nor tokens: {_CURE}"
    )


def _of_examples(logits: Tensor, labels: Tensor, label_smoothing: float, problem_type: str | None) -> ExampleLosses:
    ones = torch.ones(len(labels), device=logits.device)
    if labels.is_floating_point():
        of_labels = functional.binary_cross_entropy_with_logits
        loss = of_labels if problem_type == "multi_label_classification" else functional.mse_loss
        losses = loss(logits.reshape(len(labels), -1), labels.float().reshape(len(labels), -1), reduction="none")
        return ExampleLosses(losses.mean(1), ones)
    losses = functional.cross_entropy(
        logits, labels.reshape(-1), ignore_index=_IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    return ExampleLosses(losses, ones, logits, labels.reshape(-1))


def _of_tokens(losses: Tensor, mask: Tensor, inputs: Mapping[str, Any], num_examples: int) -> ExampleLosses:
    """Sum token losses, (b, T) or all in one row, by example."""
    losses = losses.float().where(mask, torch.zeros((), device=losses.device))
    if losses.shape[0] == num_examples:
        return ExampleLosses(losses.sum(1), mask.sum(1))
    _check_single_row(losses, num_examples)
    # The last tokens may be padding, which the mask excludes.
    example = _example_of_token(inputs, losses.shape[1]).to(losses.device).clamp(max=num_examples - 1)
    zeros = torch.zeros(num_examples, device=losses.device)
    return ExampleLosses(zeros.index_add(0, example, losses[0]), zeros.index_add(0, example, mask[0].to(zeros.dtype)))


def examples_of_tokens(inputs: Mapping[str, Any], num_examples: int) -> Tensor:
    """Return the index of the example that each token belongs to, of the shape of `input_ids`; -1 for padding.

    Args:
        inputs: a batch of b rows, or a padding-free one of a single row.
        num_examples: b.

    Raises:
        ConfigError: the rows are neither.
    """
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if tokens.shape[0] == num_examples:
        example = torch.arange(num_examples, device=tokens.device)[:, None].expand(tokens.shape)
        is_real = mask if isinstance(mask, Tensor) and mask.shape == tokens.shape else torch.ones_like(tokens)
        return example.where(is_real != 0, -1)
    _check_single_row(tokens, num_examples)
    row = _example_of_token(inputs, tokens.shape[1]).to(tokens.device)
    return row.where(row < num_examples, -1)[None]


def _check_single_row(tokens: Tensor, num_examples: int) -> None:
    if tokens.shape[0] != 1:
        raise ConfigError(
            f"the batch has {tokens.shape[0]} rows for {num_examples} examples: a collator must keep one row an "
            "example, or join all in one row with position_ids (padding-free)"
        )


def _example_of_token(inputs: Mapping[str, Any], num_tokens: int) -> Tensor:
    """Return the index of the example that each token of a padding-free row belongs to, (T,)."""
    positions, bounds = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
    if isinstance(positions, Tensor):
        return (positions[0, :num_tokens] == 0).cumsum(0) - 1
    if isinstance(bounds, Tensor):
        tokens = torch.arange(num_tokens, device=bounds.device)
        return torch.bucketize(tokens, bounds[1:].to(tokens.dtype), right=True)
    raise ConfigError(
        "a batch in one row needs position_ids or cu_seq_lens_q to tell its examples apart: use a padding-free "
        "collator that returns them, such as DataCollatorWithFlattening"
    )


def get_output(outputs: Any, name: str) -> Any:
    """Return one of a model's outputs by name, or None."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
