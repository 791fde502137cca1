"""The `compare:` section of a config: which methods and baselines, over which seeds, and what counts as equal."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from rayprune.config_sections import Auto, Section, absolute_method
from rayprune.core.fields import shown
from rayprune.core.objects import closest
from rayprune.methods import build_method

# What a method has to beat, and two arms that tell where its gains and its costs come from.
BASELINES = {
    "full": "everything, in all epochs",
    "full_time": "everything, in as many epochs as fit into the method's seconds",
    "full_steps": "everything, in as many epochs as have the method's samples trained",
    "random": "one fixed random subset with the method's samples trained",
    "random_epoch": "a fresh random subset every epoch with the method's samples trained",
    "shuffled": "the method with its scores permuted across samples",
    "ratio_0": "the method with nothing to prune: what its machinery costs",
}
_OF_ALL_ARMS = ("train", "optim", "data", "model", "scaling", "epochs", "batch_size")


class CompareSection(Section):
    """What `rayprune compare` runs and decides by."""

    methods: tuple[dict[str, Any] | str, ...] = Field((), description="methods to judge; default: the config's own")
    seeds: int | tuple[int, ...] = Field((0, 1, 2), description="seeds that all arms share, or how many from 0 on")
    baselines: tuple[str, ...] = Field(tuple(BASELINES), description="arms beside the methods; full always runs")
    margin: float = Field(0.2, ge=0, le=100, description="loss of accuracy, in points, that counts as none")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    parallel: Auto | int = Field("auto", description="runs at a time; auto: as many as the machine has room for")
    timed_seeds: int = Field(1, ge=1, description="seeds whose runs go alone, for their seconds, where others do not")

    amortise: int = Field(1, ge=1, description="trainings that share the cost of a static method's scoring run")

    @field_validator("methods")
    @classmethod
    def _judgeable(cls, value: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
        methods = tuple(judgeable(method, f"compare.methods[{number}]") for number, method in enumerate(value))
        for number, method in enumerate(methods):
            if method in methods[:number]:
                raise ValueError(f"compare.methods[{number}] is the same as another one: leave it out")
        return methods

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: int | tuple[int, ...]) -> tuple[int, ...]:
        seeds = tuple(range(value)) if isinstance(value, int) else value
        if not seeds:
            raise ValueError(f"compare.seeds = {shown(value)}: name at least one seed, better three")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"compare.seeds = {shown(list(seeds))}: seeds are at least 0 and below 2^63")
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(f"compare.seeds names {twice[0]} twice: a run counts once, name another seed")
        return seeds

    @field_validator("parallel")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"compare.parallel = {value}: must be at least 1, or auto")
        return value

    @field_validator("baselines")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in BASELINES:
                raise ValueError(f"compare.baselines: unknown baseline {name!r}: {closest(name, BASELINES)}")
            if value.count(name) > 1:
                raise ValueError(f"compare.baselines names {name!r} twice: keep one")
        return tuple(name for name in BASELINES if name == "full" or name in value)

    @property
    def asked(self) -> tuple[dict[str, Any], ...]:
        """The whole configs of `methods`."""
        return tuple(method for method in self.methods if isinstance(method, dict))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds, a count of them resolved."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def judgeable(method: Any, key: str) -> dict[str, Any]:
    """Return a method's whole config.

    Args:
        method: its name, or a mapping of name and hyperparameters.
        key: what messages call it.

    Raises:
        ValueError: it is no method, is `full` itself, or brings keys that all arms share.
    """
    if isinstance(method, dict):
        shared = [name for name in method if name.split(".")[0] in _OF_ALL_ARMS]
        if shared:
            raise ValueError(
                f"{key} has {shared[0]!r}: all arms share the config's own, so that only what they select differs; "
                "leave it out (full_steps and full_time are the shorter arms)"
            )
        if isinstance(method.get("name"), str):
            method = absolute_method(method)
    built = build_method(method, key).to_config()
    if built["name"] == "full":
        raise ValueError(f"{key} is full, which everything is compared with: name a method that prunes, as infobatch")
    return built
