"""Prompt selection as a sampler of a data loader, with the interface of SkyRL's custom samplers.

SkyRL builds `sampler_class_path` as `Class(tokenized, **sampler_kwargs)`, iterates it, and stores its `state_dict`
with the data loader. A torch DataLoader takes it, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError, RunFolderError
from rayprune.prompts.rewards import Ids
from rayprune.prompts.selector import PromptSelector


class PromptSampler:
    """Yields positions of a dataset, chosen by a PromptSelector.

    One pass of the sampler may be a whole run: with `num_samples` = steps · batch size, its length is constant and a
    data loader never starts it again.

    Args:
        data: anything with a length.
        num_samples: the length of a pass, at least 1; by default the length of the data.
        draw: positions to draw at a time, usually the batch size. A loader that fetches ahead draws that much earlier.
        actor: the name of an actor of `serve_prompts`; reward workers report to it. Empty: a selector of its own,
            which learns through `observe`.
        selector: options of that selector: `strategy`, `seed`, `group_size` and so on.

    Raises:
        ConfigError: a number is out of range, an option of the selector cannot work, or both `actor` and options.
        ClusterError: no actor has this name.
    """

    def __init__(
        self, data: Sized, num_samples: int | None = None, *, draw: int = 64, actor: str = "", **selector: Any
    ) -> None:
        self.num_samples = len(data) if num_samples is None else num_samples
        for name, value in (("num_samples", self.num_samples), ("draw", draw)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} {short_repr(value)} must be an integer of at least 1")
        if actor and selector:
            raise ConfigError(f"actor {actor!r} has its own selector: leave out {', '.join(sorted(selector))}")
        self._actor = actor
        self.selector = _connect(actor) if actor else PromptSelector(len(data), **selector)
        if len(self.selector) != len(data):
            raise ConfigError(f"actor {actor!r} selects among {len(self.selector)} prompts, the data has {len(data)}")
        self._draw = min(draw, len(data))
        self._position = 0
        self._drawn: Ids = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        while self._position < self.num_samples:
            if not self._drawn.size:
                self._drawn = self.selector.next(self._draw)
            prompt, self._drawn = int(self._drawn[0]), self._drawn[1:]
            self._position += 1
            yield prompt
        self._position = 0

    def observe(self, ids: ArrayLike, rewards: ArrayLike) -> None:
        """Report rewards to the selector; see `PromptSelector.observe`."""
        self.selector.observe(ids, rewards)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the positions drawn ahead and, unless an actor has it, the selector's state."""
        state: dict[str, Any] = {"position": self._position, "drawn": self._drawn.copy()}
        return state | ({} if self._actor else {"selector": self.selector.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`. An actor's state is its own: `PromptClient.load_state_dict`.

        Raises:
            RunFolderError: the state is incomplete, or of another selector; nothing was changed.
        """
        missing = [name for name in ("position", "drawn", *(() if self._actor else ("selector",))) if name not in state]
        if missing:
            raise RunFolderError(f"the sampler's state lacks {', '.join(missing)}: give what state_dict() returned")
        if not self._actor:
            self.selector.load_state_dict(state["selector"])
        self._position = int(state["position"])
        self._drawn = np.array(state["drawn"], dtype=np.int64)


def _connect(actor: str) -> Any:
    from rayprune.prompts.actor import connect_prompts

    return connect_prompts(actor)
