"""One subset for a whole run: from a run that scored the samples, from logs of another program, or from a file.

<run>/collect/            the run that scored, a run folder of its own, with scores.parquet
<run>/selection.parquet   what was chosen; a run that goes on trains on this file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.engine.checkpoint import load_selector_state
from rayprune.engine.importing import score_trajectories
from rayprune.engine.opening import run_folder_of
from rayprune.engine.run import Choice
from rayprune.engine.run_folder import read_metrics, write_scores
from rayprune.engine.setup import Before
from rayprune.methods.fixed import Fixed
from rayprune.sources import SampleSource
from rayprune.sources.chosen import read_chosen
from rayprune.sources.score_file import read_scores
from rayprune.sources.selection_file import ChosenFile, read_selection_file, write_selection_file

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
    before: Before = field(default_factory=Before)
    imported: bool = False

    def choice(self, config: Config, source: SampleSource) -> Choice:
        """Write the selection into the run's folder and return how the run chooses; a file that is there stays.

        Raises:
            ValueError: the file that is there is another selection.
        """
        file = run_folder_of(config) / SELECTION
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            about: dict[str, Any] = {"method": config.method, "facts": dict(self.selection.facts)}
            about["batch_mean_weights"] = self.selection.batch_mean_weights
            write_selection_file(file, self.selection, source.fingerprint, about)
        elif not _same(read_selection_file(file).selection(len(source)), self.selection):
            raise ValueError(
                f"{file} is another choice than {self.scores} leads to: delete it, or choose another run.name"
            )
        columns = {name: column for name, column in read_scores(self.scores).scores.items() if name not in _COUNTED}
        return _of_file(read_selection_file(file), file.name, len(source), config, self.before, columns)


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
        logs = Path(config.collect.trajectories)
        selector = score_trajectories(method, logs, len(source), config.train.seed, labels)
        folder, before = run_folder_of(config) / "collect", Before()
        folder.mkdir(parents=True, exist_ok=True)
        imported = True
    else:
        scoring = config.scoring()
        run = (len(source), max(scoring.train.epochs, last + 1), scoring.train.seed)
        selector = Selector(method, *run, labels, None, scoring.train.record)
        selector.load_state_dict(load_selector_state(folder, last))
        lines = read_metrics(folder)
        seconds = {key: round(sum(line["seconds"][key] for line in lines), 6) for key in lines[-1]["seconds"]}
        counts = {name: lines[-1][name] for name in vars(Before()) if name != "seconds"}
        before = Before(**counts, seconds=seconds)
        imported = False
    selection = selector.begin_epoch(last)
    selector.table.times_pruned[:] = 0  # nothing was while they were scored; the state has the choice that follows
    scores = write_scores(folder, selector, labels, source.fingerprint)
    return Scored(scores, selection, before, imported)


def chosen_subset(config: Config, source: SampleSource) -> Choice:
    """Return how a run of the method `fixed` chooses, its file copied into the run's folder.

    Raises:
        ValueError: the file can't be read, is of other data, or is another one than the run began with.
    """
    method = config.build_method()
    assert isinstance(method, Fixed)
    read = read_chosen(method.path, source)
    kept = run_folder_of(config) / SELECTION
    if kept.exists() and not _same(read_selection_file(kept).selection(len(source)), read.selection(len(source))):
        raise ValueError(f"{method.path} has changed since the run in {kept.parent} began: choose another run.name")
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_selection_file(kept, read.selection(len(source)), source.fingerprint, read.about)
    return _of_file(read, method.path, len(source), config, Before(), {}, method.batch_mean_weights)


def _of_file(
    read: ChosenFile,
    path: str,
    num_samples: int,
    config: Config,
    before: Before,
    columns: Mapping[str, NDArray[Any]],
    batch_mean: bool = False,
) -> Choice:
    facts = read.about.get("facts")
    selection = read.selection(num_samples)
    if isinstance(facts, Mapping):
        selection = selection.telling(**json.loads(json.dumps(facts)))
    method = Fixed(
        path=path,
        batch_mean_weights=batch_mean or bool(read.about.get("batch_mean_weights", False)),
        class_floor=0.0,
    )
    return Choice(method, config.train.epochs, selection, before, columns)


def _same(one: Selection, other: Selection) -> bool:
    return bool(np.array_equal(one.ids, other.ids) and np.array_equal(one.weights, other.weights))
