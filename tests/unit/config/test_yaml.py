"""Strict YAML, overrides, and merging configs."""

from __future__ import annotations

import pytest

from rayprune.config.yaml import merge, parse_overrides, read_yaml


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
