"""PromptSampler in a torch DataLoader and, where they can be imported, in SkyRL's loader of custom samplers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.errors import ConfigError, RunFolderError
from rayprune.prompts.sampler import PromptSampler

DATA = [{"input_ids": [number]} for number in range(12)]
PATH = "rayprune.prompts.sampler.PromptSampler"


def test_one_pass_has_the_asked_length() -> None:
    sampler = PromptSampler(DATA, num_samples=30, draw=5, strategy="uniform", seed=1)
    ids = list(sampler)
    assert len(sampler) == len(ids) == 30
    assert all(type(prompt) is int for prompt in ids)
    assert np.bincount(ids).tolist() == pytest.approx([2.5] * 12, abs=1)
    assert len(list(sampler)) == 30  # the next pass goes on
    assert len(PromptSampler(DATA)) == 12


@pytest.mark.parametrize("stop", [0, 1, 7, 29])
def test_a_state_continues_inside_a_draw(stop: int) -> None:
    options: dict[str, Any] = {"num_samples": 30, "draw": 4, "strategy": "mopps"}
    first, second = PromptSampler(DATA, **options), PromptSampler(DATA, seed=9, **options)
    iterator = iter(first)
    for _ in range(stop):
        prompt = next(iterator)
        first.observe([prompt, prompt], [0, 1])
    second.load_state_dict(first.state_dict())
    assert list(second) == list(iterator)


def test_it_learns_from_rewards() -> None:
    sampler = PromptSampler(DATA, num_samples=12, draw=4, strategy="zero_variance")
    assert sorted(sampler) == list(range(12))
    sampler.observe(np.arange(12), np.tile([1.0, 1.0], (12, 1)) - np.array([0.0, 1.0]) * (np.arange(12) < 4)[:, None])
    assert sorted(list(iter(sampler))[:4]) == [0, 1, 2, 3]


def test_a_torch_loader_takes_it() -> None:
    loader = torch.utils.data.DataLoader(
        torch.arange(12),
        batch_size=4,
        sampler=PromptSampler(DATA, 20, draw=4),  # type: ignore[arg-type]
    )
    assert len(loader) == 5
    assert [batch.numel() for batch in loader] == [4] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples 0"),
        ({"draw": 0}, "draw 0"),
        ({"strategy": "greeso"}, "did you mean 'greso'"),
        ({"actor": "math", "seed": 1}, "leave out seed"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSampler(DATA, **options)


def test_an_incomplete_state_is_refused() -> None:
    with pytest.raises(RunFolderError, match="lacks selector"):
        PromptSampler(DATA).load_state_dict({"position": 0, "drawn": []})


def skyrl_samplers() -> Any:
    """Return SkyRL's module of samplers; its package needs more than is installed here, the module only torch."""
    found = importlib.util.find_spec("skyrl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("skyrl is not installed")
    path = Path(found.submodule_search_locations[0]) / "train" / "dataset" / "samplers.py"
    spec = importlib.util.spec_from_file_location("skyrl_samplers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_skyrl_loads_it_and_treats_it_like_its_own() -> None:
    samplers = skyrl_samplers()
    sampler_kwargs = {"num_samples": 24, "draw": 4, "strategy": "greso", "seed": 3}
    sampler = samplers.import_sampler_class(PATH)(DATA, **sampler_kwargs)
    assert isinstance(sampler, PromptSampler)
    own = samplers.StatefulSequentialSampler(DATA)
    assert {name for name in vars(type(own)) if not name.startswith("_")} <= set(dir(sampler))
    for each in (own, sampler):
        iterator = iter(each)
        head = [next(iterator) for _ in range(5)]
        state = each.state_dict()
        rest = list(iterator)
        restored = type(each)(DATA, **(sampler_kwargs if each is sampler else {}))
        restored.load_state_dict(state)
        assert list(restored) == rest
        assert len(head) + len(rest) == len(each)


def test_a_stateful_loader_resumes() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def build() -> Any:
        sampler = PromptSampler(DATA, 24, draw=4, strategy="mopps", seed=3)
        return torchdata.StatefulDataLoader(torch.arange(12), batch_size=4, sampler=sampler)

    first, second = build(), build()
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    state = first.state_dict()
    rest = [batch.tolist() for batch in iterator]
    second.load_state_dict(state)
    assert [batch.tolist() for batch in second] == rest
    assert len(rest) == 4
