"""One subset for a whole run: from a run that scored the samples, from logs of another program, or from a file.

<run>/collect/            the run that scored, a run folder of its own, with scores.parquet
<run>/selection.parquet   what was chosen; a run that goes on trains on this file

Scores from trajectories that another program logged, without training here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rayprune.config import Config
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.engine.storage.checkpoint import load_selector_state
from rayprune.engine.storage.costs import PriorCost, forward_flops_of
from rayprune.engine.storage.resume import SCORING, run_folder_of
from rayprune.engine.storage.run_folder import read_metrics, write_scores
from rayprune.engine.train.build import SelectionSetup, recorded_signals
from rayprune.engine.train.preflight import forward_flops, input_spec
from rayprune.errors import ConfigError
from rayprune.methods import Method, build_method
from rayprune.methods.fixed import Fixed
from rayprune.sources import SampleSource
from rayprune.sources.score_files import read_scores
from rayprune.sources.selection_files import read_chosen, read_selection_file, write_selection_file
from rayprune.sources.trajectories import read_trajectories

_LOGGED = ("probs", "loss")


def score_trajectories(
    method: Method | str | Mapping[str, Any],
    folder: str | Path,
    num_samples: int,
    seed: int = 0,
    labels: ArrayLike | None = None,
) -> Selector:
    """Feed a folder of logits to a method that scores whole trajectories, such as TDDS.

    Args:
        method: the method, its name or its config; its `collect_epochs` T are read.
        folder: as `rayprune.sources.trajectories` describes it.
        num_samples: N of the data set.
        seed: for what the method draws.
        labels: (N,) classes, where the method or its class floor needs them.

    Returns:
        The Selector in epoch T: `scores()` are the scores, `begin_epoch(T)` is the subset.

    Raises:
        ValueError: the method collects no epochs or needs other signals than logits and losses give, or the folder does
            not hold T whole epochs of N samples.
    """
    built = build_method(method)
    length = built.collect_epochs
    if not length or not set(built.signals) <= set(_LOGGED):
        cure = "choose one that scores probabilities over epochs, such as tdds"
        raise ConfigError(f"method {built.name!r} cannot be scored from logged logits: {cure}")
    selector = Selector(built, num_samples, length + 1, seed, labels=labels)
    pieces = read_trajectories(folder, length, num_samples)
    for epoch, ids, probs_BC, losses in pieces:
        selector.begin_epoch(epoch)
        if losses is None and "loss" in built.signals:
            raise ConfigError(f"method {built.name!r} needs losses: the folder {str(folder)!r} has no _Loss.npy")
        selector.observe(ids, {"probs": probs_BC} | ({} if losses is None else {"loss": losses}), epoch)
    selector.begin_epoch(length)
    return selector


SELECTION = "selection.parquet"
_COUNTED = {"id", "label", "last_visit", "times_pruned"}


@dataclass(frozen=True)
class Scored:
    """What scoring left.

    Attributes:
        scores: the file of scores.
        selection: what the method chooses by them.
        before: what it cost; nothing where logs of another program were read.
        imported: whether they were.
    """

    scores: Path
    selection: Selection
    before: PriorCost = field(default_factory=PriorCost)
    imported: bool = False

    def choice(self, config: Config) -> SelectionSetup:
        """Return how the run that trains on the subset chooses."""
        columns = {name: column for name, column in read_scores(self.scores).scores.items() if name not in _COUNTED}
        method = Fixed(path=SELECTION, batch_mean_weights=self.selection.batch_mean_weights)
        return SelectionSetup(method, config.train.epochs, self.selection, self.before, columns)


def score_samples(config: Config, source: SampleSource, folder: Path | None) -> Scored:
    """Return the scores and the selection of a finished scoring run, or of the logs that `collect.trajectories` names.

    Args:
        config: the whole run's.
        source: the training source.
        folder: of the scoring run; None reads the logs.

    Raises:
        ValueError: logs or scores that can't be used; one line with the cure.
    """
    method, labels = config.build_method(), np.asarray(source.labels)
    last = method.collect_epochs
    if folder is None:
        assert config.collect.trajectories is not None
        if config.train.record:
            raise ConfigError(
                f"train.record {list(config.train.record)} needs a scoring run, and collect.trajectories takes its "
                "place: leave one out"
            )
        logs = Path(config.collect.trajectories)
        selector = score_trajectories(method, logs, len(source), config.train.seed, labels)
        folder, before = run_folder_of(config) / SCORING, PriorCost()
        folder.mkdir(parents=True, exist_ok=True)
        imported = True
    else:
        scoring = config.scoring()
        run = (len(source), max(scoring.train.epochs, last + 1), scoring.train.seed)
        record = recorded_signals(scoring, input_spec(scoring, source))
        scored = Selector(scoring.build_method(), *run, labels, record=record)
        scored.load_state_dict(load_selector_state(folder, last))
        selector = Selector(method, *run, labels, record=record)
        selector.table.load_arrays(scored.table.to_arrays())
        lines = read_metrics(folder)
        seconds = {key: round(sum(line["seconds"][key] for line in lines), 6) for key in lines[-1]["seconds"]}
        counts = {name: lines[-1].get(name, 0) for name in vars(PriorCost()) if name != "seconds"}
        # Counted in samples of the network that follows, where another one scored them.
        if config.collect.model:
            ratio = forward_flops_of(folder) / forward_flops(config, input_spec(config, source))
            counts["compute"] = round(counts["compute"] * ratio, 1)
        before = PriorCost(**counts, seconds=seconds)
        imported = False
    selection = selector.begin_epoch(last)
    selector.table.times_pruned[:] = 0  # nothing was while they were scored
    scores = write_scores(folder, selector, labels, source.fingerprint)
    return Scored(scores, selection, before, imported)


def chosen_subset(config: Config, source: SampleSource) -> SelectionSetup:
    """Return how a run of the method `fixed` chooses.

    Raises:
        ValueError: the file can't be read, or is of other data.
    """
    method = config.build_method()
    assert isinstance(method, Fixed)
    read = read_chosen(method.path, source)
    selection, facts = read.selection(len(source)), read.about.get("facts")
    return SelectionSetup(
        method, config.train.epochs, selection.with_facts(**facts) if isinstance(facts, dict) else selection
    )


def check_subset(config: Config, choice: SelectionSetup) -> None:
    """Refuse to go on with another subset than the run began with.

    Raises:
        ValueError: the run's folder holds another one.
    """
    file, chosen = run_folder_of(config) / SELECTION, choice.chosen
    if chosen is None or not file.exists():
        return
    began = read_selection_file(file).selection(chosen.num_samples)
    if not (np.array_equal(began.ids, chosen.ids) and np.array_equal(began.weights, chosen.weights)):
        raise ConfigError(
            f"the subset has changed since the run in {file.parent} began (its {file.name} holds {began.num_kept} "
            "samples): choose another run.name"
        )


def keep_subset(folder: Path, config: Config, choice: SelectionSetup, source: SampleSource) -> None:
    """Write the subset that a run trains on into its folder, where it is not there yet."""
    if choice.chosen is not None and not (folder / SELECTION).exists():
        about = {"method": config.method, "facts": dict(choice.chosen.facts)}
        write_selection_file(folder / SELECTION, choice.chosen, source.fingerprint, about)
