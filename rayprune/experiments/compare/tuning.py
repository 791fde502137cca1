"""Choose an arm's learning rate before the runs that are judged.

Every arm tries the same factors on the config's learning rate with the same number of seeds. The accuracies are those
on a tenth of the training samples, which the tuning runs do not train on. The judged runs have other seeds, and the
validation samples that judge them are not used here. While the largest or the smallest factor is the best one, the next
one beyond it is tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count, islice

from rayprune.config import Config, make_config
from rayprune.config.yaml import merge
from rayprune.errors import ConfigError
from rayprune.experiments.compare.arms import ArmSettings, run_config

HOLD_OUT = 0.1  # of the training samples
_LEAST_HELD_OUT = 100  # samples, for tune: auto
_MAX_EXTENSIONS = 3
_FIRST_SEED = 1_000_003  # far from those that a comparison counts from 0


def why_not_tuned(config: Config, num_samples: int) -> str:
    """Return why the arms of a comparison do not tune their learning rates; "" if they do.

    Raises:
        ConfigError: `compare.tune` is on, but there is nothing to tune on.
    """
    section, held_out = config.compare, round(HOLD_OUT * num_samples)
    methods = section.method_configs or (config.method,)
    reason = ""
    if section.tune is False:
        return "compare.tune is off"
    if config.data.hold_out is not None:
        reason = "the samples of data.hold_out judge the arms"
    elif config.data.relabel is not None:
        reason = "the audit of data.relabel is of all training samples, so none can be held out"
    elif config.collect.trajectories is not None or any(method["name"] == "fixed" for method in methods):
        reason = "a selection file or trajectories are of all training samples, so none can be held out"
    elif section.tune == "auto" and held_out < _LEAST_HELD_OUT:
        reason = f"a tenth of the training samples is only {held_out}"
    if reason and section.tune is True:
        raise ConfigError(f"compare.tune = True: {reason}; leave one of them out")
    return reason


def tuning_seeds(config: Config) -> list[int]:
    """Return the seeds of the tuning runs, which are none of the judged runs'."""
    judged = set(config.compare.all_seeds)
    return list(islice((seed for seed in count(_FIRST_SEED) if seed not in judged), config.compare.tune_seeds))


def tuning_config(config: Config, settings: ArmSettings, name: str, seed: int, storage: str) -> Config:
    """Return the config of a tuning run: a run of the arm that is validated on held-out training samples."""
    tree = run_config(config, settings, name, seed, storage).model_dump(mode="json")
    return make_config(merge(tree, {"data": {"hold_out": HOLD_OUT}}))


def best_factor(accuracies: Mapping[float, float]) -> float:
    """Return the factor with the highest accuracy; of equally good ones, the closest to 1.

    >>> best_factor({0.7: 91.0, 1.0: 92.0, 1.4: 92.0})
    1.0
    """
    return max(accuracies, key=lambda factor: (accuracies[factor], -abs(math.log(factor))))


def next_factor(accuracies: Mapping[float, float], first: Sequence[float]) -> float | None:
    """Return the factor to try beyond the best one if that is at an end; None if the search is over.

    Args:
        accuracies: of the factors tried so far.
        first: the factors that the search began with.

    >>> next_factor({0.7: 90.0, 1.0: 91.0, 1.4: 92.0}, (0.7, 1.0, 1.4))
    1.96
    """
    tried, best = sorted(accuracies), best_factor(accuracies)
    if len(tried) >= len(first) + _MAX_EXTENSIONS or best not in {tried[0], tried[-1]}:
        return None
    neighbor = tried[-2] if best == tried[-1] else tried[1]
    factor = float(f"{best * best / neighbor:.3g}")
    return None if factor in accuracies else factor
