"""Prompt selection: the cost of a call with a million prompts, and the rollouts that it saves in a toy GRPO loop.

`prompts` draws 512 of a million prompts and observes eight rewards of each. `prompts.grpo` runs
examples/grpo_prompts.py: uniform sampling and every strategy from the same seeds, which set the task, the first
weights, the rollouts and the draws. All arms fill each batch with the same number of groups with variance and have
the same settings; the learning rate is the one of LRS with which uniform sampling needs the fewest rollouts, on
TUNING_SEEDS. All rollouts count, also those of discarded groups. An interval is Student's t for the mean of log ratios.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.harness import Figure, ratios, repeat
from rayprune.prompts import STRATEGIES, PromptSelector

NUM_PROMPTS, DRAWN, GROUP_SIZE, CALLS = 1_000_000, 512, 8, 200
LRS, TUNING_SEEDS, SEEDS = (3e-3, 1e-2, 3e-2, 1e-1), range(100, 105), range(20)


def figures() -> Iterator[Figure]:
    """Yield the milliseconds of `next`, `observe` and `state_dict`, and the bytes of a state."""
    for name in STRATEGIES:
        selector = PromptSelector(NUM_PROMPTS, name)
        drawing, observing = time_calls(selector)
        yield Figure(f"{name}: next({DRAWN}) of {NUM_PROMPTS:,} prompts, ms", drawing, "≤ 5")
        yield Figure(f"{name}: observe, {DRAWN} groups of {GROUP_SIZE}, ms", observing, "≤ 5")
        yield Figure(f"{name}: state_dict, ms", [1e3 * value for value in repeat(selector.state_dict, 9)])
        num_bytes = sum(array.nbytes for array in selector.state_dict().values())
        yield Figure(f"{name}: state, bytes per prompt", [num_bytes / NUM_PROMPTS])


def time_calls(selector: PromptSelector) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each `next` and `observe`; a third of the prompts is never solved, a third always."""
    rng, drawing, observing = np.random.default_rng(0), [], []
    for _ in range(CALLS):
        start = time.perf_counter()
        ids = selector.next(DRAWN)
        drawing.append(1e3 * (time.perf_counter() - start))
        rewards = rng.random((DRAWN, GROUP_SIZE)) < (ids % 3)[:, None] / 2
        start = time.perf_counter()
        selector.observe(ids, rewards)
        observing.append(1e3 * (time.perf_counter() - start))
    return drawing, observing


def grpo() -> Iterator[Figure]:
    """Yield the rollouts to the target reward with each strategy, and their ratio to uniform sampling."""
    torch.set_num_threads(1)
    example = load_example()
    tuned = {lr: [example.train("uniform", seed, lr) for seed in TUNING_SEEDS] for lr in LRS}
    for lr, runs in tuned.items():
        yield Figure(f"uniform, lr {lr:g}, tuning seeds: rollouts", [run["rollouts"] for run in runs])
    lr = min(tuned, key=lambda lr: float(np.mean([run["rollouts"] for run in tuned[lr]])))
    results = {name: [example.train(name, seed, lr) for seed in SEEDS] for name in STRATEGIES}
    uniform = [run["rollouts"] for run in results["uniform"]]
    for name, runs in results.items():
        rollouts = [run["rollouts"] for run in runs]
        reached = sum(run["reward"] >= example.TARGET for run in runs)
        yield Figure(f"{name}, lr {lr:g}: rollouts to reward {example.TARGET} ({reached} runs reached it)", rollouts)
        yield Figure(f"{name}: share of groups without variance", [run["wasted"] for run in runs])
        steps, short = [run["steps"] for run in runs], sum(run["short"] for run in runs)
        yield Figure(f"{name}: optimizer steps (batches not full: {short} of {sum(steps)})", steps)
        yield Figure(
            f"{name}: distinct prompts in a batch of {example.BATCH} groups", [run["distinct"] for run in runs]
        )
        if name != "uniform":
            for quantity, values, baseline in (
                ("rollouts", rollouts, uniform),
                ("steps", steps, [run["steps"] for run in results["uniform"]]),
            ):
                ratio = ratios(values, baseline)
                mean, low, high = mean_ratio(ratio)
                yield Figure(f"{name} ÷ uniform, {quantity}: {mean:.2f}, 95% interval {low:.2f} … {high:.2f}", ratio)


def mean_ratio(values: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and its 95% interval."""
    logs = np.log(values)
    half = float(stats.t.ppf(0.975, logs.size - 1)) * float(logs.std(ddof=1)) / float(np.sqrt(logs.size))
    mean = float(logs.mean())
    return tuple(float(np.exp(mean + shift)) for shift in (0.0, -half, half))  # type: ignore[return-value]


def load_example() -> Any:
    """Return the module examples/grpo_prompts.py."""
    path = Path(__file__).parents[1] / "examples" / "grpo_prompts.py"
    spec = importlib.util.spec_from_file_location("grpo_prompts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
