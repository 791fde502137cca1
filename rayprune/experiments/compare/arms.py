"""The arms of a comparison: what each one trains, given the config and the costs of earlier arms.

Arms that match the cost of a method are derived from that method's runs. Shortened training has the same length for all
seeds, from the median over the pairs of runs, so that a single run on a busy machine does not change it, and is never
shorter than the method's budget. Random subsets match the samples trained in the run with the same seed.

The weights of an unbiased method make its steps larger. The arms that match its cost have weights of 1. Unless each arm
tunes its learning rate (`tuning.py`), they get one that is larger by the method's mean weight: a method must not win by
its step size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rayprune.config import Config, make_config
from rayprune.config.experiments import BASELINES, compared_method
from rayprune.config.schema import TrainSection
from rayprune.config.yaml import merge
from rayprune.core.bases.in_batch import InBatchMethod
from rayprune.core.redaction import redacted_tree
from rayprune.core.schedule import epoch_at
from rayprune.errors import ConfigError
from rayprune.experiments.compare.statistics import RunOutcome
from rayprune.experiments.compare.verdicts import SHORTENED
from rayprune.methods import Method, build_method
from rayprune.methods.registry import method_fields

FULL, METHOD = "full", "method"
_SCORING_SHARE = 0.1  # of the epochs, for the scoring run of `least_confidence`
_LEAST_EPOCHS = 10  # for such a run to be a small part of the budget


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables and folders.
        baseline: name of the baseline, or "method".
        of: config of the arm's method, or of the method that it is compared with; empty for full.
        method_arm: name of that method's arm.
    """

    name: str
    baseline: str
    of: Mapping[str, Any]
    method_arm: str

    @property
    def derived(self) -> bool:
        """Whether it depends on the costs of full training and its method."""
        return self.baseline not in {FULL, METHOD, "shuffled", "ratio_0"}


@dataclass(frozen=True)
class ArmSettings:
    """What an arm trains with one seed.

    Attributes:
        method: config of the method.
        epochs: number of epochs.
        matched: what was matched, in words; "" if nothing was.
        same_as_full: whether it is full training, whose run is then used.
        tag: end of the run's name, different for each matched length, ratio or learning rate.
        lr_factor: on the config's learning rate.
        collect: replaces the config's section `collect`, which is for the methods that are compared.
    """

    method: Mapping[str, Any]
    epochs: int
    matched: str = ""
    same_as_full: bool = False
    tag: str = ""
    lr_factor: float = 1.0
    collect: Mapping[str, Any] | None = None

    def at_rate(self, factor: float) -> ArmSettings:
        """Return the settings with a factor on the learning rate; full training's own run stays as it is."""
        if self.same_as_full or factor == 1.0:
            return self
        return replace(self, tag=f"{self.tag}-lr{factor:g}", lr_factor=factor)


def arms_of(config: Config) -> tuple[list[Arm], list[str]]:
    """Return the arms that a config compares, and a line for each arm that is left out because it has no meaning.

    Raises:
        ConfigError: there is nothing to compare, or runs end early.
    """
    if config.train.stop_after is not None:
        raise ConfigError("train.stop_after ends runs early, and a comparison needs whole ones: leave it out")
    methods = config.compare.method_configs or (compared_method(config.method, "method"),)
    arms, notes = [Arm(FULL, FULL, {}, "")], []
    names = _arm_names(methods)
    arms += [Arm(name, METHOD, method, name) for name, method in zip(names, methods, strict=True)]
    for name, method in zip(names, methods, strict=True):
        for baseline in config.compare.baselines:
            if baseline == FULL:
                continue
            own = baseline if len(methods) == 1 else f"{baseline}.{name}"
            if reason := _pointless(baseline, build_method(method), config.train):
                notes.append(f"{own} is left out: {reason}")
            else:
                arms.append(Arm(own, baseline, method, name))
    return arms, notes


def _arm_names(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each method's arm: that of the method, numbered if it is not unique."""
    short = [re.sub(r"\W+", "_", str(method["name"]).rpartition(":")[2]) for method in methods]
    return [
        f"{name}_{short[: place + 1].count(name)}" if short.count(name) > 1 or name in BASELINES else name
        for place, name in enumerate(short)
    ]


def _pointless(baseline: str, method: Method, train: TrainSection) -> str:
    """Return why a baseline has no meaning for a method; "" if it has one."""
    if baseline == method.name or (baseline == "shuffled" and method.kind in {"baseline", "control"}):
        return f"it is the same as {method.name}"
    if baseline == "shuffled" and method.name == "fixed":
        return "a selection file has no scores to permute"
    if baseline == "least_confidence" and train.epochs < _LEAST_EPOCHS:
        return f"its scoring run would be a large part of {train.epochs} epochs"
    if baseline == "least_confidence" and train.last_batch == "drop":
        return "train.last_batch=drop leaves samples without a score"
    if baseline == "random_annealed" and full_from(method) is None:
        return f"{method.name} does not end with epochs on all samples"
    if baseline == "ratio_0" and unpruned(method.to_config()) is None:
        return f"{method.name} has no ratio that could be 0"
    return ""


def full_from(method: Method) -> float | None:
    """Return the share of the run after which a method trains on all samples; None if it never does.

    >>> full_from(build_method({"name": "infobatch", "anneal_start": 0.9}))
    0.9
    """
    share = getattr(method, "anneal_start", None)
    return float(share) if share is not None and 0.0 < share < 1.0 else None


def unpruned(method: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a method's config with a prune ratio of 0; None if it has no such setting.

    >>> unpruned({"name": "infobatch", "prune_ratio": 0.5})["prune_ratio"]
    0.0
    """
    inner = method.get("of")
    if isinstance(inner, Mapping):
        without = unpruned(inner)
        return None if without is None else {**method, "of": without}
    built = build_method(method)
    fields = method_fields(type(built))
    if isinstance(built, InBatchMethod):
        whole = {"keep": 1.0, "prune_ratio": 0.0}
        return {**method, **{name: whole[name] for name in whole if name in fields}} if "keep" in fields else None
    if "prune_ratio" not in fields:
        return None
    # Reset the settings that replace the ratio to their defaults.
    others = {"target_saving", "max_prune_ratio", "quantiles", "keep", "budget"} & set(fields)
    return {**method, **{name: fields[name] for name in others}, "prune_ratio": 0.0}


def arm_settings(
    arm: Arm,
    config: Config,
    pairs: Sequence[tuple[RunOutcome, RunOutcome]] = (),
    place: int = 0,
    *,
    num_samples: int = 0,
) -> ArmSettings:
    """Return what an arm trains with one seed.

    Args:
        arm: the arm.
        config: the comparison's config.
        pairs: for a derived arm, the outcomes of full training and of its method, a pair per seed.
        place: position of the seed in `pairs`.
        num_samples: N, for a derived arm.
    """
    epochs = config.train.epochs
    if arm.baseline == "full_steps":
        share = median(method.samples_trained / full.samples_trained for full, method in pairs)
        return _shortened(share, epochs, "samples trained")
    if arm.baseline == "full_time":
        alone = [(full, method) for full, method in pairs if full.alone and method.alone]
        return _shortened(median(method.seconds / full.seconds for full, method in alone or pairs), epochs, "seconds")
    if arm.derived:
        full, method = pairs[place]
        kept = method.samples_trained / full.samples_trained
        return _subset(arm, config, kept, num_samples)
    if arm.baseline == "ratio_0":
        without = unpruned(arm.of)
        assert without is not None, "an arm without a ratio was left out"
        return ArmSettings(without, epochs)
    methods = {FULL: {"name": FULL}, METHOD: arm.of, "shuffled": {"name": "shuffled", "of": dict(arm.of)}}
    return ArmSettings(methods[arm.baseline], epochs)


def _shortened(share: float, epochs: int, noun: str) -> ArmSettings:
    length = min(epochs, max(1, math.ceil(share * epochs - 1e-9)))
    matched = f"the method's {noun}: {share:.1%} of full training's, "
    if length == epochs:
        return ArmSettings({"name": FULL}, epochs, f"{matched}so all {epochs} epochs", True)
    return ArmSettings({"name": FULL}, length, f"{matched}{length} epochs", tag=f"-{length}epochs")


def _subset(arm: Arm, config: Config, kept: float, num_samples: int) -> ArmSettings:
    """Return the settings of an arm that drops samples so that it has the share `kept` of full training's visits."""
    epochs, matched = config.train.epochs, "the method's samples trained: "
    if round(num_samples * (1.0 - kept)) <= 0:
        return ArmSettings({"name": FULL}, epochs, f"{matched}it saves none, so nothing is dropped", True)
    surplus = (1.0 - kept) * epochs  # visits to leave out, in epochs of all samples
    method: dict[str, Any] = {"name": arm.baseline}
    collect: dict[str, Any] | None = None
    when = ""
    if arm.baseline == "random_annealed":
        until = full_from(build_method(arm.of))
        assert until is not None, "an arm without a final phase was left out"
        pruned_epochs = max(1, epoch_at(until, epochs))
        drops, ratio = _exact_ratio(surplus / pruned_epochs, num_samples)
        annealed = {"schedule": "annealed", "of_ratio": ratio, "until": until}
        method = {"name": "random_epoch", "prune_ratio": annealed, "replacement": False}
        when = f" before epoch {pruned_epochs + 1}"
    elif arm.baseline == "least_confidence":
        scoring = math.ceil(_SCORING_SHARE * epochs)
        scoring = scoring if scoring < kept * epochs else 1
        drops, ratio = _exact_ratio((surplus + scoring / config.compare.amortise) / epochs, num_samples)
        method |= {"prune_ratio": ratio, "score_epochs": scoring}
        collect, when = {}, f" after {scoring} scoring {'epoch' if scoring == 1 else 'epochs'}"
    else:
        drops, ratio = _exact_ratio(surplus / epochs, num_samples)
        method |= {"prune_ratio": ratio} | ({"replacement": False} if arm.baseline == "random_epoch" else {})
    words = f"{matched}{drops / num_samples:.1%} dropped{when}"
    return ArmSettings(method, epochs, words, tag=f"-{drops}dropped", collect=collect)


def _exact_ratio(dropped: float, num_samples: int) -> tuple[int, float]:
    """Return the number of samples to drop, fewer than all, and a prune ratio that drops exactly so many."""
    drops = min(round(num_samples * dropped), num_samples - 1)
    # Half a sample more than the drops, so that floor(ratio · N) equals them despite the rounding of the division.
    return drops, (drops + 0.5) / num_samples


def equal_steps(arm: Arm, settings: ArmSettings, methods: Sequence[RunOutcome], place: int) -> ArmSettings:
    """Return a derived arm's settings with the learning rate that gives steps of its method's mean size.

    Args:
        arm: the arm.
        settings: what it trains.
        methods: the outcomes of its method, one per seed. A length is the same for all seeds, and so is its rate.
        place: position of the seed.
    """
    own = methods if arm.baseline in SHORTENED else [methods[place]]
    scale = median(method.mean_step_scale for method in own)
    # Rounded, so that more seeds rarely change it, which would make other runs.
    factor = round(20.0 * scale) / 20.0 if scale > 0.5 else float(f"{scale:.2g}")
    return settings.at_rate(factor or 1.0)


def run_config(config: Config, settings: ArmSettings, name: str, seed: int, storage: str) -> Config:
    """Return the config of one run, which is validated only after its last epoch.

    Args:
        config: the comparison's config.
        settings: what the arm trains.
        name: of the run folder.
        seed: of the initial weights, the order and the draws.
        storage: the folder of all runs.
    """
    tree = config.model_dump(mode="json", exclude={"compare"})
    tree["method"] = dict(settings.method)
    if settings.collect is not None:
        tree["collect"] = dict(settings.collect)
    changes = {
        "train": {"seed": seed, "epochs": settings.epochs, "validate_every": settings.epochs},
        "optim": {"lr": float(f"{config.optim.lr * settings.lr_factor:.6g}")},
        "run": {"storage_path": storage, "name": name, "resume": "auto"},
    }
    return make_config(merge(tree, changes))


def digest_of(config: Config) -> str:
    """Return a hash of 8 hexadecimal digits of the settings that determine the runs of a comparison.

    Seeds, baselines and the margin are left out: if they change, the comparison continues from its finished runs.
    """
    tree = config.model_dump(mode="json", exclude={"compare"})
    changes = {"method": {"name": FULL}, "train": {"seed": 0, "validate_every": 1}}
    methods = config.compare.method_configs or (config.method,)
    content = make_config(merge(tree, changes)).digest() + json.dumps(redacted_tree(methods), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
