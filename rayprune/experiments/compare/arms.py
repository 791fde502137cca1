"""The arms of a comparison: what each of them trains, from the config and from what the arms before it cost.

Arms that spend what a method spends are derived from that method's runs. A shortened training has one length for all
seeds, by the median over their pairs: one run that met a busy machine must not make it longer or shorter. Random
subsets match the samples of the same seed's run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rayprune.config import Config, make_config
from rayprune.config.experiments import compared_method
from rayprune.config.yaml import merge
from rayprune.errors import ConfigError
from rayprune.methods import Method, build_method
from rayprune.methods.registry import method_fields

FULL, METHOD = "full", "method"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables and folders.
        baseline: which of the baselines it is, or "method".
        of: the config of the method that it is, or that it is measured against; empty for full.
        method_arm: the name of that method's arm.
    """

    name: str
    baseline: str
    of: Mapping[str, Any]
    method_arm: str

    @property
    def derived(self) -> bool:
        """Whether it needs to know what full training and its method have cost."""
        return self.baseline not in {FULL, METHOD, "shuffled", "ratio_0"}


@dataclass(frozen=True)
class Spent:
    """What a finished run has spent.

    Attributes:
        epochs: E.
        num_samples: N.
        samples_trained: with those of a run that scored.
        seconds: of training and all that selection needs, without validation.
    """

    epochs: int
    num_samples: int
    samples_trained: int
    seconds: float


@dataclass(frozen=True)
class ArmSettings:
    """What an arm trains with one seed.

    Attributes:
        method: its config.
        epochs: how many.
        matched: what was matched, in words; "" where nothing was.
        same_as_full: it is full training: its run need not be repeated.
        tag: what tells its run's folder from one of the same arm that was matched to something else.
    """

    method: Mapping[str, Any]
    epochs: int
    matched: str = ""
    same_as_full: bool = False
    tag: str = ""


def arms_of(config: Config) -> tuple[list[Arm], list[str]]:
    """Return the arms that a config compares, and a line on each that it asked for and that makes no sense.

    Raises:
        ConfigError: nothing is to be compared, or the config is not one of whole runs.
    """
    if config.train.stop_after is not None:
        raise ConfigError("train.stop_after ends runs early, and compared are whole ones: leave it out")
    methods = config.compare.method_configs or (compared_method(config.method, "method"),)
    arms, notes = [Arm(FULL, FULL, {}, "")], []
    names = _names(methods)
    for name, method in zip(names, methods, strict=True):
        arms.append(Arm(name, METHOD, method, name))
    for name, method in zip(names, methods, strict=True):
        for baseline in config.compare.baselines:
            if baseline == FULL:
                continue
            own = baseline if len(methods) == 1 else f"{baseline}.{name}"
            if reason := _pointless(baseline, build_method(method)):
                notes.append(f"{own} is left out: {reason}")
            else:
                arms.append(Arm(own, baseline, method, name))
    return arms, notes


def _names(methods: tuple[dict[str, Any], ...]) -> list[str]:
    """Return a folder name for each method: its own, numbered where it comes more than once."""
    short = [re.sub(r"\W+", "_", str(method["name"]).rpartition(":")[2]) for method in methods]
    counts = {name: short.count(name) for name in short}
    return [f"{n}_{short[: i + 1].count(n)}" if counts[n] > 1 or n in RESERVED else n for i, n in enumerate(short)]


# A method may be called like a baseline: its arm must not be.
RESERVED = ("full", "random", "random_epoch", "shuffled")


def _pointless(baseline: str, method: Method) -> str:
    """Say why a baseline tells nothing of a method; "" where it does."""
    if baseline == method.name or (baseline == "shuffled" and method.kind in {"baseline", "control"}):
        return f"it is what {method.name} does by itself"
    if baseline == "shuffled" and method.name == "fixed":
        return "a file of chosen samples has no scores to permute"
    if baseline == "ratio_0" and unpruned(method.to_config()) is None:
        return f"{method.name} has no ratio that could be 0"
    return ""


def unpruned(method: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a method's config with nothing to prune; None where it has no such setting.

    >>> unpruned({"name": "infobatch", "prune_ratio": 0.5})["prune_ratio"]
    0.0
    """
    inner = method.get("of")
    if isinstance(inner, Mapping):
        without = unpruned(inner)
        return None if without is None else {**method, "of": without}
    fields = method_fields(type(build_method(method)))
    if "prune_ratio" not in fields:
        return None
    # Whatever asks for a share in the ratio's place goes back to its default.
    others = {"target_saving", "max_prune_ratio", "quantiles", "keep", "budget"} & set(fields)
    return {**method, **{name: fields[name] for name in others}, "prune_ratio": 0.0}


def terms_of(
    arm: Arm,
    config: Config,
    pairs: Sequence[tuple[Spent, Spent]] = (),
    place: int = 0,
    timed: Sequence[int] | None = None,
) -> ArmSettings:
    """Return what an arm trains with one seed.

    Args:
        arm: the arm.
        config: whose epochs the arms share.
        pairs: for a derived arm, what full training and its method have cost, one pair a seed.
        place: of the seed among them.
        timed: the places of pairs whose seconds count; None for all.
    """
    epochs = config.train.epochs
    if not arm.derived:
        method: Mapping[str, Any] | None = {FULL: {"name": FULL}, METHOD: arm.of}.get(arm.baseline)
        if arm.baseline == "shuffled":
            method = {"name": "shuffled", "of": dict(arm.of)}
        method = unpruned(arm.of) if method is None else method
        assert method is not None
        return ArmSettings(method, epochs)
    if arm.baseline == "full_steps":
        share = median(spent.samples_trained / full.samples_trained for full, spent in pairs)
        return _shortened(share, epochs, "samples trained")
    if arm.baseline == "full_time":
        alone = pairs if timed is None else [pairs[number] for number in timed]
        return _shortened(median(spent.seconds / full.seconds for full, spent in alone), epochs, "seconds")
    return _random(arm.baseline, epochs, *pairs[place])


def _shortened(share: float, epochs: int, what: str) -> ArmSettings:
    length = min(epochs, max(1, round(share * epochs)))
    if length == epochs:
        matched = f"the method's {what}: {share:.1%} of full training's, so all {epochs} epochs"
        return ArmSettings({"name": FULL}, epochs, matched, True)
    matched = f"the method's {what}: {share:.1%} of full training's, {length} epochs"
    return ArmSettings({"name": FULL}, length, matched, tag=f"-{length}epochs")


def _random(name: str, epochs: int, full: Spent, spent: Spent) -> ArmSettings:
    num = full.num_samples
    drops = round(num * (1.0 - spent.samples_trained / full.samples_trained))
    if drops <= 0:
        return ArmSettings(
            {"name": FULL}, epochs, "the method's samples trained: it saves none, so nothing is dropped", True
        )
    # Half a sample more than the drops: floor(ratio · N) is then the drops, whatever the division rounds to.
    ratio = (min(drops, num - 1) + 0.5) / num
    matched = f"the method's samples trained: {drops / num:.1%} dropped"
    return ArmSettings({"name": name, "prune_ratio": ratio}, epochs, matched, tag=f"-{min(drops, num - 1)}dropped")


def run_config(config: Config, terms: ArmSettings, name: str, seed: int, storage: str) -> Config:
    """Return the config of one run: an arm with a seed, validated once, at its end.

    Args:
        config: the comparison's.
        terms: what the arm trains.
        name: of the run's folder.
        seed: of initial weights, order and draws.
        storage: the folder of all runs.
    """
    tree = config.model_dump(mode="json", exclude={"compare"})
    tree["method"] = dict(terms.method)
    changes = {"train": {"seed": seed, "epochs": terms.epochs, "validate_every": terms.epochs}}
    made = make_config(merge(tree, changes))
    return made.model_copy(
        update={"run": made.run.model_copy(update={"storage_path": storage, "name": name, "resume": "auto"})}
    )


def digest_of(config: Config) -> str:
    """Return 8 hexadecimal digits over what decides the runs of a comparison.

    Seeds, baselines and the verdicts' margin are left out: more of them go on from the runs that are there.
    """
    tree = config.model_dump(mode="json", exclude={"compare"})
    changes = {"method": {"name": FULL}, "train": {"seed": 0, "validate_every": 1}}
    methods = config.compare.method_configs or (config.method,)
    content = make_config(merge(tree, changes)).digest() + json.dumps(methods, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
