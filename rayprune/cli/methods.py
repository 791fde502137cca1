"""The command `rayprune methods`: the selection methods and the train steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import click

from rayprune.cli.console import console, debug_option, say


@click.command()
@click.argument("name", required=False)
@debug_option
def methods(name: str | None) -> None:
    """List the selection methods and the train steps, or describe one of them."""
    from rayprune.core.step_options import STEP_OPTIONS, step_config
    from rayprune.methods import METHODS
    from rayprune.methods.registry import method_class, method_fields

    if name is None:
        rows = [(key, cls.kind, "yes" if cls.unbiased else "no", cls.keeps) for key, cls in sorted(METHODS.items())]
        _print_table(("method", "kind", "unbiased", "keeps"), rows)
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
        if method.unbiased and method.kind != "baseline":
            facts["steps"] = (
                "weights make gradients N/kept times as large; with AdamW, only the ratios of weights count"
            )
        _describe(method, facts, method_fields(method))


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

    table = Table(*head, box=SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
