"""One subset for a whole run: from a scoring run, from logits that another program logged, or from a file.

<run>/collect/            the scoring run, a run folder of its own, with scores.parquet
<run>/selection.parquet   the subset; a resumed run trains on this file
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.config import Config
from rayprune.core.bases.static import ScoredMethod
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.engine.storage.checkpoint import checkpoint_path, restore_selector
from rayprune.engine.storage.costs import PriorCost, forward_flops_of
from rayprune.engine.storage.resume import SCORING, run_folder_of
from rayprune.engine.storage.run_folder import read_metrics, write_scores
from rayprune.engine.train.build import SelectionSetup, recorded_signals
from rayprune.engine.train.preflight import forward_flops, input_spec
from rayprune.errors import ConfigError, RunFolderError
from rayprune.methods import Method, build_method
from rayprune.methods.fixed import Fixed
from rayprune.sources import SampleSource
from rayprune.sources.tables.scores import read_scores
from rayprune.sources.tables.selections import read_selection_file, read_selection_for, write_selection_file
from rayprune.sources.tables.trajectories import read_trajectories

SELECTION = "selection.parquet"
_NOT_SCORES = {"id", "label", "last_visit", "times_pruned"}


@dataclass(frozen=True)
class Scored:
    """The result of scoring.

    Attributes:
        scores: the file of scores.
        selection: the subset that the method selects by them.
        prior_cost: the cost of scoring; nothing for imported logits.
        imported: whether logits of another program were read.
    """

    scores: Path
    selection: Selection
    prior_cost: PriorCost = field(default_factory=PriorCost)
    imported: bool = False

    def setup(self, config: Config) -> SelectionSetup:
        """Return the setup of the run that trains on the subset."""
        columns = {name: column for name, column in read_scores(self.scores).scores.items() if name not in _NOT_SCORES}
        method = Fixed(path=SELECTION, batch_mean_weights=self.selection.batch_mean_weights)
        return SelectionSetup(method, config.train.epochs, self.selection, self.prior_cost, columns)


def score_samples(config: Config, source: SampleSource, folders: Sequence[Path]) -> Scored:
    """Score the samples and select the subset, after scoring runs or from the logits in `collect.trajectories`.

    Args:
        config: the whole run's config.
        source: the training source.
        folders: of the finished scoring runs; none to read logits.

    Raises:
        ConfigError: the method cannot be scored this way.
        DataError: the logits cannot be used.
    """
    labels = np.asarray(source.labels)
    folder = run_folder_of(config) / SCORING
    if not folders:
        selector, prior_cost = _imported_scores(config, labels), PriorCost()
        folder.mkdir(parents=True, exist_ok=True)
    else:
        selectors = [_collected_scores(config, source, number, path) for number, path in enumerate(folders)]
        selector = selectors[0]
        if len(selectors) > 1:
            method = selector.method
            assert isinstance(method, ScoredMethod)  # Config refuses several runs of other methods
            scores = [method.to_average(each.table) for each in selectors]
            selector.averaged = {name: np.mean([each[name] for each in scores], axis=0) for name in scores[0]}
            recalls = [each.recalls for each in selectors if each.recalls is not None]
            selector.recalls = np.mean(recalls, axis=0) if recalls else None
        prior_cost = PriorCost.sum([_collected_cost(config, source, path) for path in folders])
    selection = selector.begin_epoch(config.build_method().collect_epochs)
    selector.table.times_pruned[:] = 0  # scoring prunes nothing
    written = write_scores(folder, selector, labels, source.fingerprint)
    return Scored(written, selection, prior_cost, imported=config.collect.trajectories is not None)


def _imported_scores(config: Config, labels: NDArray[Any]) -> Selector:
    assert config.collect.trajectories is not None
    if config.train.record:
        raise ConfigError(
            f"train.record {list(config.train.record)} needs a scoring run, and collect.trajectories replaces it: "
            "leave one out"
        )
    logits = Path(config.collect.trajectories)
    return score_trajectories(config.build_method(), logits, len(labels), config.train.seed, labels)


def _collected_scores(config: Config, source: SampleSource, number: int, folder: Path) -> Selector:
    """Return the method's Selector with the table of a scoring run."""
    scoring, method, labels = config.scoring(number), config.build_method(), np.asarray(source.labels)
    run = (len(source), max(scoring.train.epochs, method.collect_epochs + 1), scoring.train.seed)
    record = recorded_signals(scoring, input_spec(scoring, source))
    collected = Selector(scoring.build_method(), *run, labels, record=record)
    restore_selector(collected, checkpoint_path(folder, method.collect_epochs))
    selector = Selector(method, *run, labels, record=record, recalls=_recalls(folder))
    selector.table.load_arrays(collected.table.to_arrays())
    return selector


def _recalls(folder: Path) -> NDArray[np.float64] | None:
    """Return the scoring run's last accuracy on each class of the validation data, their mean where a class has none.

    None without validation data.
    """
    validated = [line["val_class_accuracy"] for line in read_metrics(folder) if line.get("val_class_accuracy")]
    if not validated:
        return None
    recalls = np.array([np.nan if recall is None else recall for recall in validated[-1]], dtype=np.float64)
    return np.where(np.isnan(recalls), np.nanmean(recalls), recalls)


def _collected_cost(config: Config, source: SampleSource, folder: Path) -> PriorCost:
    lines = read_metrics(folder)
    seconds = {key: round(sum(line["seconds"][key] for line in lines), 6) for key in lines[-1]["seconds"]}
    counts = {name: lines[-1].get(name, 0) for name in vars(PriorCost()) if name != "seconds"}
    if config.collect.model:  # count in samples of the network that follows, not of the one that scored
        ratio = forward_flops_of(folder) / forward_flops(config, input_spec(config, source))
        counts["compute"] = round(counts["compute"] * ratio, 1)
    return PriorCost(**counts, seconds=seconds)


def score_trajectories(
    method: Method | str | Mapping[str, Any],
    folder: str | Path,
    num_samples: int,
    seed: int = 0,
    labels: ArrayLike | None = None,
) -> Selector:
    """Score samples by logits that another program logged, with a method such as TDDS.

    Args:
        method: the method, its name or its config; it scores the first T = `collect_epochs` epochs.
        folder: the logits, as `rayprune.sources.tables.trajectories` describes them.
        num_samples: N.
        seed: the seed of the method's random draws.
        labels: (N,) classes, if the method or its class floor needs them.

    Returns:
        The Selector in epoch T: `scores()` returns the scores, `begin_epoch(T)` the subset.

    Raises:
        ConfigError: the method scores no epochs, or needs other signals than probabilities and losses.
        DataError: the folder does not hold T whole epochs of N samples.
    """
    built = build_method(method)
    num_epochs = built.collect_epochs
    if not num_epochs or not set(built.signals) <= {"probs", "loss"}:
        raise ConfigError(
            f"method {built.name!r} cannot score logged logits: choose one that scores probabilities over epochs, such "
            "as tdds"
        )
    selector = Selector(built, num_samples, num_epochs + 1, seed, labels=labels)
    for epoch, ids, probs_BC, losses in read_trajectories(folder, num_epochs, num_samples):
        selector.begin_epoch(epoch)
        if losses is None and "loss" in built.signals:
            raise ConfigError(
                f"method {built.name!r} needs losses: the folder {str(folder)!r} has no _Loss.npy: log the "
                "losses too, or use another method"
            )
        selector.observe(ids, {"probs": probs_BC} | ({} if losses is None else {"loss": losses}), epoch)
    selector.begin_epoch(num_epochs)
    return selector


def chosen_subset(config: Config, source: SampleSource) -> SelectionSetup:
    """Return the setup of a run of the method `fixed`.

    Raises:
        ConfigError: the method has no path, or the file another suffix than a selection's.
        RunFolderError: the file cannot be read, or is of other data.
    """
    method = config.build_method()
    assert isinstance(method, Fixed)
    file = read_selection_for(method.path, source)
    selection, facts = file.selection(len(source)), file.about.get("facts")
    if isinstance(facts, dict):
        selection = selection.with_facts(**facts)
    return SelectionSetup(method, config.train.epochs, selection)


def check_subset(config: Config, setup: SelectionSetup) -> None:
    """Refuse to resume a run with another subset.

    Raises:
        RunFolderError: the run's folder holds another subset.
    """
    file, chosen = run_folder_of(config) / SELECTION, setup.chosen
    if chosen is None or not file.exists():
        return
    stored = read_selection_file(file).selection(chosen.num_samples)
    if not (np.array_equal(stored.ids, chosen.ids) and np.array_equal(stored.weights, chosen.weights)):
        raise RunFolderError(
            f"the subset has changed since the run in {file.parent} began (its {file.name} holds {stored.num_kept} "
            "samples): choose another run.name"
        )


def keep_subset(folder: Path, config: Config, setup: SelectionSetup, source: SampleSource) -> None:
    """Write a run's subset into its folder, unless it is there."""
    if setup.chosen is not None and not (folder / SELECTION).exists():
        about = {"method": config.method, "facts": dict(setup.chosen.facts)}
        write_selection_file(folder / SELECTION, setup.chosen, source.fingerprint, about)
