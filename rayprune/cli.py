"""The command line: rayprune train | sweep | compare | score | select | evaluate | report | show | methods | doctor.

Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else; tracebacks only with --debug.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rayprune import __version__
from rayprune.command_compare import compare
from rayprune.command_evaluate import evaluate
from rayprune.command_report import report
from rayprune.command_select import select
from rayprune.command_show import show
from rayprune.command_sweep import sweep

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)
# What click from 8.2 on raises for `rayprune` alone: its message is the help.
_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main() -> None:
    """Run the command line and exit with its code."""
    # `module:function` of the user's own must be found where the command is given, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; the same command goes on from the last checkpoint", 1)
    except click.ClickException as error:
        if isinstance(error, _HELP):
            error.show()
            sys.exit(error.exit_code)
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except ValueError as error:
        _or_raise(error, debug)
        _fail(_one_line(error), 2)
    except Exception as error:
        _or_raise(error, debug)
        _fail(f"{_one_line(error)} (--debug shows where)", 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rayprune")
@click.option("--debug", is_flag=True, help="Show tracebacks and Ray's own logs.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Train each epoch only on the samples worth training on."""
    context.obj = debug


def _debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--debug", "debug_here", is_flag=True, help="Show tracebacks and Ray's own logs.")(command)


@cli.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG... [key=value]...")
@_debug_option
@click.pass_obj
def train(debug: bool, words: tuple[str, ...], debug_here: bool) -> None:
    """Train what each CONFIG says, with key.sub=value laid over it; several runs are compared at the end.

    The same command again goes on from the last checkpoint.
    """
    overrides = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word]
    if not paths:
        raise ValueError("no config is named: rayprune train configs/digits_full.yaml")
    # Loaded here, so that `rayprune methods` need not wait for Ray and torch.
    from rayprune.config import load_config

    configs = [load_config(path, overrides) for path in paths]  # all of them before any training starts
    folders = [Path(config.run.storage_path) / str(config.run.name) for config in configs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two of the configs train in one folder, {folders[0]}: leave run.name out")
    runs = [
        (Path(path).stem, *_train_one(config, debug or debug_here)) for path, config in zip(paths, configs, strict=True)
    ]
    from rayprune.display import runs_table

    for number, line in enumerate(runs_table(runs)):
        console.print(line, style="bold" if number == 0 else None, highlight=False, markup=False)
    console.print()
    for name, folder, _ in runs:
        console.print(f"{name}: {folder}", highlight=False)


def _train_one(config: Any, debug: bool) -> tuple[Path, list[dict[str, Any]]]:
    from rayprune.display import RunDisplay, elapsed
    from rayprune.engine.train import train as run

    start = time.perf_counter()
    with RunDisplay(console) as display:
        result = run(config, on_scored=_scored, debug=debug, **_listeners(display))
    console.print(f"done in {elapsed(start)}\n", highlight=False)
    return result.folder, result.metrics


cli.add_command(select)
cli.add_command(evaluate)
cli.add_command(compare)
cli.add_command(sweep)
cli.add_command(report)
cli.add_command(show)


@cli.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG [key=value]...")
@_debug_option
@click.pass_obj
def score(debug: bool, words: tuple[str, ...], debug_here: bool) -> None:
    """Score the samples for a method that chooses one subset, such as tdds: the first half of `rayprune train`.

    Writes scores.parquet; `rayprune select` chooses by it, and `rayprune train` with the same CONFIG goes on from it.
    """
    from rayprune.config import load_config
    from rayprune.display import RunDisplay
    from rayprune.engine.train import score as run

    paths = [word for word in words if "=" not in word]
    if len(paths) != 1:
        raise ValueError("name one config: rayprune score configs/digits_tdds.yaml")
    config = load_config(paths[0], [word for word in words if "=" in word])
    with RunDisplay(console) as display:
        scored = run(config, debug=debug or debug_here, **_listeners(display))
    _scored(scored)
    console.print(f"scores: {scored.scores}", highlight=False)


def _listeners(display: Any) -> dict[str, Any]:
    from rayprune.engine.run_folder import read_metrics
    from rayprune.report.cells import count_of

    def started(start: Any) -> None:
        config, resources, first = start.config, start.resources, start.first_epoch
        fewest, most = config.scaling.worker_range
        workers = count_of(most, "worker") if fewest == most else f"{fewest} to {most} workers"
        workers = workers if most else "in this process"
        stops = config.train.stop_after
        length = f", {stops} of {config.train.epochs} epochs" if stops else ""
        console.print(
            f"{start.folder.name}: {config.method['name']} on {config.data.source}, {config.model.name}{length}, "
            f"{workers}, stream {resources.stream} ({resources.why})",
            highlight=False,
        )
        display.begin(config.last_epoch, first, [m for m in read_metrics(start.folder) if m["epoch"] < first])
        if first:
            done = first >= config.last_epoch
            console.print("finished before" if done else f"goes on at epoch {first + 1}", highlight=False)

    listen = display.progress if console.is_terminal else None
    return {"on_epoch": display.epoch, "on_progress": listen, "on_start": started, "on_notice": display.warn}


def _scored(scored: Any) -> None:
    facts, selection = scored.selection.facts, scored.selection
    cost = (
        "logs of another program, whose cost is not counted"
        if scored.imported
        else (f"{scored.before.samples_trained:,} samples trained to score them, part of what the run costs")
    )
    threshold = f", threshold {facts['threshold']:.4g}" if "threshold" in facts else ""
    console.print(
        f"chosen: {selection.num_kept:,} of {selection.num_samples:,} samples{threshold} ({cost})", highlight=False
    )


@cli.command()
@click.argument("name", required=False)
@_debug_option
def methods(name: str | None, debug_here: bool) -> None:
    """List the selection methods and the train steps, or tell all about one of them."""
    import inspect

    from rayprune.config_steps import STEP_OPTIONS, step_config
    from rayprune.display import methods_table, steps_table
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


@cli.command()
@_debug_option
@click.pass_obj
def doctor(debug: bool, debug_here: bool) -> None:
    """Check this machine: versions, devices, Ray, resources, what is missing."""
    from rayprune.diagnosis import diagnose

    sound = True
    for finding in diagnose(debug or debug_here):
        sound &= finding.ok
        mark = "ok     " if finding.ok else "MISSING"
        console.print(f"{mark} {finding.name:<14} {finding.text}", highlight=False)
    if not sound:
        raise RuntimeError("something is missing: see above")


def _or_raise(error: Exception, debug: bool) -> None:
    if debug:
        raise error


def _fail(line: str, code: int) -> None:
    errors.print(f"error: {line}", highlight=False, markup=False)
    sys.exit(code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
