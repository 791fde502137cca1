"""A tiny causal language model and sequences for it, without weights or tokenizers from elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 40


def tiny_llama(seed: int = 0) -> Any:
    """Return a random model in eval mode, with logits that differ a lot from token to token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of 36 characters."""
    characters = [*"abcdefghijklmnopqrstuvwxyz 123456789"]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sequences(num: int = 7, seed: int = 0, prompts: bool = True) -> list[dict[str, list[int]]]:
    """Return sequences of 4 to 12 tokens; with prompts, the first 1 to 3 labels are -100."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(num):
        ids = rng.integers(3, VOCABULARY, rng.integers(4, 13)).tolist()
        skipped = int(rng.integers(1, 4)) if prompts else 0
        items.append({"input_ids": ids, "labels": [-100] * skipped + ids[skipped:]})
    return items


def loss_of(model: Any, ids: list[int], first: int) -> float:
    """Return the mean loss of tokens first, first + 1, … of one sequence, each predicted from those before it."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return float(np.mean([-float(log_probs[at - 1, ids[at]]) for at in range(first, len(ids))]))
