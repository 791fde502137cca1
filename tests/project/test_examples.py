"""The examples of training loops without Ray learn, prune, and report both."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rayprune
from rayprune.config import load_config
from rayprune.experiments.audit.runner import audit
from tests.support.language import tiny_llama, tokenizer
from tests.support.paths import ROOT

NUMBER = re.compile(r"\d+(?:\.\d+)?")
FOLDER = ROOT / "examples"
NAMES = ("finetune_text", "language_model", "tabular_regression", "text_classification")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_learned(name: str, results: dict[str, Any], run: str) -> bool:
    """Return whether a run is clearly better than chance."""
    if name in ("finetune_text", "language_model"):
        return bool(results[run]["loss"] < results["baseline"] - 0.4)
    if name == "tabular_regression":
        return bool(results[run]["r2"] > 0.3)
    return bool(results[run]["accuracy"] > 0.7)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns_and_prunes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example(name)
    results = example.main()
    columns, held_out = example.load()
    num_samples = len(next(iter(columns.values())))
    assert results["full"]["trained"] == num_samples * example.EPOCHS
    assert 0.1 < results["saved"] < 0.5
    assert results["pruned"]["trained"] == round((1 - results["saved"]) * results["full"]["trained"])
    assert all(math.isfinite(value) for run in ("full", "pruned") for value in results[run].values())
    assert has_learned(name, results, "full")
    assert has_learned(name, results, "pruned")
    printed = capsys.readouterr().out
    assert str(results["pruned"]["trained"]) in printed
    assert f"{results['saved']:.0%} fewer" in printed
    assert len(next(iter(held_out.values()))) == example.HELD_OUT


def test_the_recipe_of_a_real_model_runs_on_a_tiny_one(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{number} and 1 is ", "completion": str(number + 1)}) for number in range(40)]
    lines.append(json.dumps({"prompt": "long ", "completion": "a" * 100}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = [f"--model={tmp_path / 'model'}", f"--dataset={tmp_path / 'data'}", f"--out={tmp_path / 'out'}"]
    here: dict[str, Any] = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    here["model_init_kwargs"] = {"attn_implementation": "sdpa"}
    trainer = load_example("finetune_1b").main([*words, "--max-length=60", "--epochs=4"], **here)
    assert trainer.run.selector.num_samples == 40
    assert trainer.args.padding_free
    assert not trainer.args.packing
    assert trainer.state.global_step < 4 * 3, "pruned"
    assert (trainer.selector.scores()["loss"] > 0).all()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_network_with_early_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load_example("early_exit").main(str(tmp_path))
    assert results["leaving_early"] > 0.9
    assert results["last_exit"] > 0.95
    assert results["share_of_macs"] < 0.6
    assert 0.1 < results["saved"] < 0.5
    assert "take the first exit" in capsys.readouterr().out


def test_the_digits_with_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config of docs/auditing.md, with a smaller network, finds the errors that the example makes."""
    monkeypatch.chdir(tmp_path)
    example = load_example("noisy_digits")
    example.write("noisy.npz")
    short = ["model.name=mlp", "train.epochs=10", "audit.folds=3", "run.name=noisy", "scaling.threads=1"]
    audit(load_config("digits_audit", ["data.path=noisy.npz", *short]))
    example.check("noisy.npz", "runs/noisy")
    printed = capsys.readouterr().out
    numbers = {line.partition(":")[0]: [float(each) for each in NUMBER.findall(line)] for line in printed.splitlines()}
    true, estimated = numbers["wrong labels"]
    assert estimated == pytest.approx(true, abs=4)
    assert numbers["AUC of p_wrong"][0] > 0.95
    assert numbers["suspects"][1] > 80
    assert numbers["copies found"] == [30, 30]


def test_the_prompts_of_a_grpo_loop(capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("grpo_prompts")
    results = example.main(("uniform", "zero_variance"))
    for result in results.values():
        assert result["reward"] >= example.TARGET
        full = result["steps"] - result["short"]
        assert 0 < full <= result["steps"] < example.MAX_STEPS
        assert result["rollouts"] * (1 - result["wasted"]) >= full * example.BATCH * example.GROUP
        assert result["rollouts"] < result["steps"] * (example.MAX_DRAWS + example.AT_ONCE) * example.GROUP
        assert 0.3 < result["wasted"] < 1.0
        assert 1 < result["distinct"] <= example.BATCH
    printed = capsys.readouterr().out
    assert f"zero_variance: {results['zero_variance']['rollouts']:,} rollouts" in printed


def test_a_batch_that_cannot_be_filled_ends() -> None:
    """A policy that solves all prompts gives no group variance."""
    example = load_example("grpo_prompts")
    rules, digits, _, lengths = example.make_task(0)[0]
    selector = rayprune.PromptSelector(example.PROMPTS, "uniform", 0)

    def policy(rules: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        return 100.0 * torch.nn.functional.one_hot(digits, example.DIGITS)

    groups, drawn = example.fill_batch(policy, selector, (rules, digits, digits, lengths))
    assert groups == []
    assert example.MAX_DRAWS <= drawn < example.MAX_DRAWS + example.AT_ONCE


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_row_is_trained_on(name: str) -> None:
    """A few rows may be equal: lines in both libraries, and words with the same checksum."""
    columns, held_out = load_example(name).load()
    data = next(key for key in columns if key != "label")
    training = {row.tobytes() for row in columns[data]}
    shared = sum(row.tobytes() in training for row in held_out[data])
    assert shared <= 0.01 * len(held_out[data])
