"""The command `rayprune methods`: what methods and train steps there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.box import SIMPLE
from rich.table import Table

from rayprune.cli.console import console, debug_option


@click.command()
@click.argument("name", required=False)
@debug_option
def methods(name: str | None, debug_here: bool) -> None:
    """List the selection methods and the train steps, or tell all about one of them."""
    import inspect

    from rayprune.core.step_options import STEP_OPTIONS, step_config
    from rayprune.methods import METHODS
    from rayprune.methods.registry import method_class, method_fields

    if name is None:
        console.print(methods_table(METHODS))
        console.print(steps_table(STEP_OPTIONS))
        return
    if name in STEP_OPTIONS:
        step = STEP_OPTIONS[name]
        told = {"cost": f"{step.cost} plain steps a sample", "gain": step.gain, "paper": step.paper}
        for key, value in told.items():
            if value:
                console.print(f"{key:<8} {value}", highlight=False)
        options = {key: value for key, value in step_config(name).items() if key != "name"}
        console.print("defaults " + ", ".join(f"{key}={value}" for key, value in options.items()), highlight=False)
        console.print(f"\n{inspect.getdoc(step)}", highlight=False)
        return
    cls = method_class(name)
    console.print(f"{name}: {cls.kind}, {'unbiased' if cls.unbiased else 'biased'}", highlight=False)
    console.print(f"paper    {cls.paper}", highlight=False)
    console.print(f"signals  {', '.join(cls.signals) or 'its own'}", highlight=False)
    if swept := cls().sweep_signals:
        console.print(f"sweeps   {', '.join(swept)}, of samples that a forward pass alone looks at", highlight=False)
    console.print(
        "defaults " + ", ".join(f"{key}={value}" for key, value in method_fields(cls).items()), highlight=False
    )
    console.print(f"\n{inspect.getdoc(cls)}", highlight=False)


def methods_table(methods: Mapping[str, Any]) -> Table:
    """Return the registered methods: name, kind, signals, paper."""
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("method", "kind", "unbiased", "signals", "paper"):
        table.add_column(column)
    for name, cls in sorted(methods.items()):
        table.add_row(name, cls.kind, "yes" if cls.unbiased else "no", ", ".join(cls.signals) or "its own", cls.paper)
    return table


def steps_table(steps: Mapping[str, Any]) -> Table:
    """Return the train steps: name, what a sample costs, what was published for it, paper."""
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("train.step", "cost, in plain steps", "published gain", "paper"):
        table.add_column(column)
    for name, options in steps.items():
        table.add_row(name, options.cost, options.gain, options.paper)
    return table
