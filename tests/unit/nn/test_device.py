"""Copies of states: values, strides and shared tensors are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rayprune.nn.device import host_copy


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


def test_a_copy_keeps_values_strides_and_shared_tensors() -> None:
    weight = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    state = {"encoder": weight, "decoder": weight.detach(), "inner": [(weight[0], 3)], "empty": torch.zeros(0)}
    copy = host_copy(state)
    before = weight.clone()
    weight.zero_()
    assert torch.equal(copy["encoder"], before)
    assert copy["encoder"].stride() == before.stride() == (24, 1, 8, 2)
    assert copy["decoder"] is copy["encoder"]
    assert torch.equal(copy["inner"][0][0], before[0])
    assert copy["inner"][0][1] == 3


def test_sparse_tensors_lazy_views_and_named_tuples_are_copied() -> None:
    sparse, base = torch.eye(3).to_sparse(), torch.tensor([1 + 2j])
    state = {"sparse": sparse, "base": base, "view": base.conj(), "pair": Pair(torch.ones(2) * 2, 3)}
    copy = host_copy(state)
    assert torch.equal(copy["sparse"].to_dense(), torch.eye(3))
    assert copy["view"].tolist() == [1 - 2j]
    assert isinstance(copy["pair"], Pair)
    assert copy["pair"].first.tolist() == [2, 2]
