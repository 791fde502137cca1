"""The command `rayprune methods`: the selection methods and the train steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import click

from rayprune.cli.console import console, debug_option, plain_text, say

if TYPE_CHECKING:
    from rayprune.methods import Method


KINDS = {
    "baseline": "to compare with",
    "dynamic": "choose again every epoch",
    "in_batch": "choose inside every batch, which only the chosen rows pass backward",
    "static": "choose one subset after a scoring run; a new network trains on it",
    "control": "to compare with",
}
_EPOCHS, _SAMPLES = 20, 1_000


@click.command()
@click.argument("name", required=False)
@debug_option
def methods(name: str | None) -> None:
    """List the selection methods by kind, with what their scoring costs, and the train steps; or describe one."""
    from rayprune.core.step_options import STEP_OPTIONS, step_config
    from rayprune.methods import METHODS
    from rayprune.methods.registry import method_class, method_fields

    if name is None:
        for kind, explained in KINDS.items():
            of_kind = [(key, cls()) for key, cls in sorted(METHODS.items()) if cls.kind == kind]
            rows = [
                (f"{key}*" if method.unbiased else key, method.keeps, method.cost or "–") for key, method in of_kind
            ]
            say(f"{kind}: {explained}")
            _print_table(("method", "keeps", "scoring costs"), rows)
        say("* unbiased: the mean of the weighted gradients is that of all samples\n")
        steps = [(key, step.cost, step.gain, step.paper) for key, step in STEP_OPTIONS.items()]
        _print_table(("train.step", "cost, in plain steps", "published gain", "paper"), steps)
    elif name in STEP_OPTIONS:
        step = STEP_OPTIONS[name]
        facts = {"cost per sample, in plain steps": step.cost, "gain": step.gain, "paper": step.paper}
        _describe(step, facts, {key: value for key, value in step_config(name).items() if key != "name"})
    else:
        method = method_class(name)
        say(f"{name}: {method.kind}, {'unbiased' if method.unbiased else 'biased'}")
        facts = {"keeps": method.keeps, "paper": method.paper, "signals": ", ".join(method.signals) or "its own"}
        if swept := method().sweep_signals:
            facts["sweeps"] = f"{', '.join(swept)}, in forward-only passes"
        facts |= {"costs": method().cost or "nothing: training gives the scores", "saves": _saves(method())}
        if method.unbiased and method.kind != "baseline":
            facts["steps"] = (
                "weights make gradients N/kept times as large; with AdamW, only the ratios of weights count"
            )
        _describe(method, facts, method_fields(method))


def _saves(method: Method) -> str:
    """Return the share of the visits that a method drops by itself, measured in a short run on random signals."""
    import numpy as np

    from rayprune.core.bases.in_batch import InBatchMethod
    from rayprune.testing import SyntheticRun

    if isinstance(method, InBatchMethod):
        keep = getattr(method, "keep", None)
        return "" if keep is None else f"{1.0 - keep:.0%} of the backward passes, where it picks"
    if method.name == "fixed":
        return ""
    run = SyntheticRun(method, _EPOCHS, _SAMPLES)
    dropped = [selection.realised for selection in run.run()][method.collect_epochs :]
    of = "of every epoch after the scoring" if method.collect_epochs else f"of the visits of {_EPOCHS} epochs"
    return f"{np.mean(dropped):.0%} {of}, on random signals"


def _describe(cls: type, facts: Mapping[str, str], defaults: Mapping[str, object]) -> None:
    options = ", ".join(f"{key}={value}" for key, value in defaults.items())
    for key, value in {**facts, "defaults": options}.items():
        if value:
            say(f"{key:<8} {value}")
    say(f"\n{inspect.getdoc(cls)}")


def _print_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table whose cells wrap to the width of the terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for name in head:
        table.add_column(plain_text(name))
    for row in rows:
        table.add_row(*map(plain_text, row))
    console.print(table)
