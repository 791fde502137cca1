"""Strict YAML, overrides, and merging configs."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from rayprune.config.yaml import merge, parse_overrides, read_yaml
from rayprune.errors import ConfigError


def test_numbers_are_read_in_all_common_notations() -> None:
    assert parse_overrides(["optim.lr=5e-4", "a=.5", "b=1e3", "c=3", "d=[1, 2.5]", "e=null"]) == {
        "optim": {"lr": 0.0005},
        "a": 0.5,
        "b": 1000.0,
        "c": 3,
        "d": [1, 2.5],
        "e": None,
    }


@pytest.mark.parametrize("word", ["train.epochs", "=3", "train..epochs=3", "a=[1", "a=2024-13-45"])
def test_an_invalid_override_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"^override "):
        parse_overrides([word])


def test_a_duplicate_key_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' appears twice"):
        read_yaml("a: 1\na: 2")


def test_another_method_drops_the_old_ones_keys() -> None:
    base = {
        "method": {"name": "infobatch", "anneal_start": 0.5},
        "data": {"source": "parquet", "path": "x", "limit": 9},
    }
    switched = merge(base, {"method": {"name": "random"}, "data": {"source": "digits"}})
    assert switched == {"method": {"name": "random"}, "data": {"source": "digits", "limit": 9}}
    assert merge(base, {"method": {"prune_ratio": 0.3}})["method"] == {**base["method"], "prune_ratio": 0.3}


def laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]" for below, name in pairwise("abcdefghij")]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (laughs(), "aliases"),
        ("a: &a [*a]", "aliases"),
        ("[" * 50_000, "nests more than"),
        ("\n".join(f"{' ' * level}a:" for level in range(500)), "nests more than"),
        ("a: [" + "1," * 50_000 + "]", "more than 10,000 values"),
        ("a: " + "x" * 10_000_000, "characters"),
    ],
    ids=["billion laughs", "endless alias", "deep lists", "deep mappings", "many values", "long text"],
)
def test_a_document_that_would_fill_the_memory_is_refused(text: str, problem: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=problem) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 5  # half a second on an idle CPU


def test_the_key_of_an_override_has_a_limited_number_of_parts() -> None:
    with pytest.raises(ConfigError, match="has a key of 100000 parts"):
        parse_overrides([".".join(["a"] * 100_000) + "=1"])
