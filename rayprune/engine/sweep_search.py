"""Optuna as a search of Ray Tune: it proposes points by the results so far, those of an interrupted sweep included.

Not ray.tune's own OptunaSearch: it can't be told finished trials of two objectives, and does not number its trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from rayprune.config_sweep import Axis
from rayprune.config_trials import Point


def import_optuna() -> Any:
    """Return the module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("sweep.search = 'optuna' needs Optuna: pip install 'rayprune[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class OptunaPoints(Searcher):
    """Propose points by a tree of Parzen estimators.

    Args:
        axes: the space.
        objectives: name of a reported figure → whether it is to be large.
        seed: of the sampler.
        spec: makes what a trial is given of the point; called once for each new trial.
    """

    def __init__(
        self, axes: Sequence[Axis], objectives: Mapping[str, bool], seed: int, spec: Callable[[Point], dict[str, Any]]
    ) -> None:
        super().__init__(metric=next(iter(objectives)), mode="max" if next(iter(objectives.values())) else "min")
        optuna = import_optuna()
        self._axes, self._objectives, self._spec = axes, objectives, spec
        self._distributions = {axis.key: _distribution(optuna, axis) for axis in axes}
        self._study = optuna.create_study(
            directions=["maximize" if large else "minimize" for large in objectives.values()],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self._trials: dict[str, Any] = {}
        self._waiting: list[tuple[Point, Callable[[], dict[str, Any]]]] = []

    def tell_finished(self, point: Point, result: Mapping[str, Any]) -> None:
        """Let the search know a trial of before."""
        optuna = import_optuna()
        values = self._values(result)
        if values is not None:
            trial = optuna.trial.create_trial(
                params=self._encoded(point), distributions=self._distributions, values=values
            )
            self._study.add_trial(trial)

    def go_on_with(self, trials: Sequence[tuple[Point, Callable[[], dict[str, Any]]]]) -> None:
        """Propose interrupted trials first: their points, and what makes what each is given."""
        self._waiting = list(trials)
        for point, _ in trials:
            self._study.enqueue_trial(self._encoded(point))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return what the next trial is given."""
        trial = self._study.ask(fixed_distributions=self._distributions)
        self._trials[trial_id] = trial
        if self._waiting:
            return self._waiting.pop(0)[1]()
        return self._spec(self._decoded(trial.params))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended."""
        values = None if error or not result or result.get("error") else self._values(result)
        state = import_optuna().trial.TrialState.FAIL if values is None else None
        if trial_id in self._trials:
            self._study.tell(self._trials.pop(trial_id), values, state=state)

    def _values(self, result: Mapping[str, Any]) -> list[float] | None:
        values = [result.get(name) for name in self._objectives]
        return (
            None if any(value is None for value in values) else [float(value) for value in values if value is not None]
        )

    def _encoded(self, point: Point) -> dict[str, Any]:
        return {a.key: a.values.index(point[a.key]) if a.listed else point[a.key] for a in self._axes}

    def _decoded(self, params: Mapping[str, Any]) -> Point:
        return {a.key: a.values[params[a.key]] if a.listed else params[a.key] for a in self._axes}

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: a sweep that goes on tells what has finished."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, likewise."""


def _distribution(optuna: Any, axis: Axis) -> Any:
    kinds = optuna.distributions
    if axis.listed:  # by position: values may be mappings
        return kinds.CategoricalDistribution(tuple(range(len(axis.values))))
    if axis.form == "quniform" and all(isinstance(bound, int) for bound in (axis.low, axis.high, axis.step)):
        return kinds.IntDistribution(axis.low, axis.high, step=axis.step)
    step = axis.step if axis.form == "quniform" else None
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.form == "loguniform", step=step)
