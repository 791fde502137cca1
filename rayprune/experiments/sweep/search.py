"""Search and early stopping during a sweep: Optuna proposes points, and ASHA stops trials that fall behind.

In a resumed sweep, both receive the earlier results from the run folders of the trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayprune.config import Config
from rayprune.config.experiments import Axis
from rayprune.errors import ConfigError
from rayprune.experiments.sweep.space import Point, probe_points, trial_config

# sweep.objective → the figures that it optimizes, and whether larger is better.
OBJECTIVES = {
    "accuracy": {"val_accuracy": True},
    "samples": {"samples_trained": False},
    "compute": {"compute": False},
    "seconds": {"seconds": False},
    "pareto": {"val_accuracy": True, "compute": False},
}
Reports = Sequence[Mapping[str, Any]]  # of a trial, one per epoch


def import_optuna() -> Any:
    """Import Optuna.

    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep.search = 'optuna' needs Optuna: pip install 'rayprune[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class OptunaSearch(Searcher):
    """Propose points with a tree of Parzen estimators.

    Ray Tune's own OptunaSearch accepts no finished trials with two objectives, and does not number its trials.

    Args:
        axes: the space.
        objectives: name of a reported figure → whether larger is better.
        seed: of the sampler.
        new_trial: returns the Tune config of a new trial at a point; called once for each new trial.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        objectives: Mapping[str, bool],
        seed: int,
        new_trial: Callable[[Point], dict[str, Any]],
    ) -> None:
        super().__init__(metric=next(iter(objectives)), mode="max" if next(iter(objectives.values())) else "min")
        optuna = import_optuna()
        self._axes, self._objectives, self._new_trial = axes, objectives, new_trial
        self._distributions = {axis.key: _distribution(optuna, axis) for axis in axes}
        self._study = optuna.create_study(
            directions=["maximize" if large else "minimize" for large in objectives.values()],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self._trials: dict[str, Any] = {}
        self._interrupted: list[dict[str, Any]] = []

    def add_finished(self, point: Point, report: Mapping[str, Any]) -> None:
        """Add the result of a trial that ended in an earlier start."""
        values = self._values(report)
        if values is not None:
            trial = import_optuna().trial.create_trial(
                params=self._encode(point), distributions=self._distributions, values=values
            )
            self._study.add_trial(trial)

    def resume(self, point: Point, trial: dict[str, Any]) -> None:
        """Propose an interrupted trial, with its Tune config, before any new one."""
        self._study.enqueue_trial(self._encode(point))
        self._interrupted.append(trial)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the Tune config of the next trial."""
        trial = self._study.ask(fixed_distributions=self._distributions)
        self._trials[trial_id] = trial
        return self._interrupted.pop(0) if self._interrupted else self._new_trial(self._decode(trial.params))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass a trial's result to Optuna."""
        values = None if error or not result or result.get("error") else self._values(result)
        state = import_optuna().trial.TrialState.FAIL if values is None else None
        if trial_id in self._trials:
            self._study.tell(self._trials.pop(trial_id), values, state=state)

    def _values(self, report: Mapping[str, Any]) -> list[float] | None:
        values = [float(report[name]) for name in self._objectives if report.get(name) is not None]
        return values if len(values) == len(self._objectives) else None

    def _encode(self, point: Point) -> dict[str, Any]:
        return {a.key: a.values.index(point[a.key]) if a.is_discrete else point[a.key] for a in self._axes}

    def _decode(self, params: Mapping[str, Any]) -> Point:
        return {a.key: a.values[params[a.key]] if a.is_discrete else params[a.key] for a in self._axes}


def _distribution(optuna: Any, axis: Axis) -> Any:
    kinds = optuna.distributions
    if axis.is_discrete:  # by index, as values may be mappings
        return kinds.CategoricalDistribution(tuple(range(len(axis.values))))
    if axis.form == "quniform" and all(isinstance(bound, int) for bound in (axis.low, axis.high, axis.step)):
        return kinds.IntDistribution(axis.low, axis.high, step=axis.step)
    step = axis.step if axis.form == "quniform" else None
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.form == "loguniform", step=step)


def asha_scheduler(base: Config, ended: Mapping[str, Reports]) -> TrialScheduler:
    """Return the ASHA scheduler of a sweep.

    Args:
        base: the sweep's config.
        ended: name → reports of each trial that ended in an earlier start.
    """
    section = base.sweep
    epochs = max(trial_config(base, point).last_epoch for point in probe_points(section))
    grace = max(1, epochs // 5) if section.grace_epochs == "auto" else min(section.grace_epochs, epochs)
    metric, large = next(iter(OBJECTIVES[section.objective].items()))
    asha: Any = ASHAScheduler(
        time_attr="epoch",
        metric=metric,
        mode="max" if large else "min",
        max_t=epochs,
        grace_period=grace,
        reduction_factor=section.reduction_factor,
    )
    for name, reports in ended.items():
        trial = SimpleNamespace(trial_id=name)
        asha.on_trial_add(None, trial)
        for report in reports:
            asha.on_trial_result(None, trial, report)
        asha.on_trial_remove(None, trial)
    return asha  # type: ignore[no-any-return]
