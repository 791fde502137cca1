"""The step that learns how much each sample counts at each exit, L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310).

A batch is two halves; each is trained on once, and is once what the weight network learns from: the training half's
losses, weighed as it says, would lead a step of SGD to other parameters; there the other half's samples, each at the
exit that it would leave by, have a loss, whose gradient goes back through that step to the weights.

Deliberate differences from the reference: the gradient comes from one forward-mode derivative on the graph of the real
forward pass instead of a copy of the network and a double backward pass (equal to rounding, 3.67 in place of 5.09 plain
steps); label smoothing is the training loss's; padding counts nowhere; a half of padding alone makes no step; every
sample's weights are recorded. `clip_norm` clips the real step, not the imagined one.

Shapes: B rows of this worker's share, H of a half, C classes, K exits, W workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.config_steps import L2wOptions
from rayprune.nn.exit_weights import (
    allocate_exits,
    centred,
    exit_distribution,
    exit_rows,
    exit_weight_names,
    meta_loss,
    weights_of,
)
from rayprune.nn.meta_gradient import Named, Randomness, after_sgd, gradient_at, gradients_of, slopes_along
from rayprune.nn.ranks import Ranks
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.halves import Half, Pair, confidences, halves_of, joined
from rayprune.nn.weight_net import WeightNet, observed

# In plain steps of one forward and two backward units: pseudo gradient 2, meta pass 3, derivative 3 (or about 6.3).
_META_COST = {"jvp": 8 / 3, "second_order": 11.3 / 3}


@dataclass(frozen=True)
class _Seen:
    """What the real forward pass gave: (H, K) losses with their graph, and what the weight network sees of them."""

    losses_HK: Tensor
    observed_HI: Tensor
    randomness: Randomness


class L2wStep(ExitStep):
    """Take two optimisation steps, one on each half of a batch, with learned weights.

    Args:
        model: (B, …) inputs to a list of K logits (B, C); DDP-wrapped or not.
        optimizer: torch.optim.SGD over the model's parameters, at its peak learning rate; the weight network's rate
            keeps the proportion that it has to it now.
        num_exits: K, at least 2.
        seed: of the weight network.
        signals: names that the step returns besides loss, correct and its own.
        accumulate: 1.
        **rest: the fields of L2wOptions, and the recipe as PlainStep takes it.

    Attributes:
        weight_net, meta_optimizer: the weight network and its Adam.
        observer: called after every half with what went on in it; for tests.

    Raises:
        ValueError: an option outside its range, another optimiser, micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_exits: int,
        seed: int = 0,
        signals: tuple[str, ...] = (),
        accumulate: int = 1,
        **rest: Any,
    ) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise ValueError("train.step l2w imagines a step of SGD, the optimiser is another: set optim.name=sgd")
        if accumulate != 1:
            raise ValueError(f"train.step l2w takes no micro-batches: set train.accumulate=1 instead of {accumulate}")
        names = [field.name for field in dataclasses.fields(L2wOptions)]
        options = self.options = L2wOptions(**{name: rest.pop(name) for name in names if name in rest})
        own = self._own = exit_weight_names(num_exits)
        super().__init__(
            model,
            optimizer,
            num_exits=num_exits,
            score=options.score,
            confident=options.confident,
            signals=tuple(name for name in signals if name not in own),
            **rest,
        )
        parameter = next(self._module.parameters())
        self.weight_net = WeightNet(
            num_exits, inputs=options.input, hidden=options.hidden, layers=options.layers, seed=seed
        ).to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        self.meta_optimizer = torch.optim.Adam(
            self.weight_net.parameters(), lr=options.meta_lr, weight_decay=options.meta_weight_decay
        )
        self.meta_cost = _META_COST[options.gradient]
        self.observer: Callable[[dict[str, Any]], None] | None = None
        self._peak = float(optimizer.param_groups[0]["lr"])
        self._shares_K = exit_distribution(options.p, num_exits)
        self._batches = 0
        self._ranks = Ranks(model)
        self._global = options.scope == "global"

    def __call__(
        self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor, meta: Pair | None = None, learns: bool | None = None
    ) -> dict[str, Tensor]:
        """Update the model twice, on the first ⌈B/2⌉ rows and on the rest, and before each the weight network.

        Args:
            inputs: (B, …).
            targets_B: (B,) int64.
            weights_B: (B,) the pruner's factors, which multiply the learned weights; 0 for padding, which counts
                nowhere (the loss's divisor aside, which is constant as in the plain step).
            meta: inputs and targets of the unpruned stream, to be learned from in place of this batch's other half;
                as many on every rank.
            learns: whether the weight network learns from this batch; None: from every `meta_interval`-th.

        Returns:
            signal name → (B, …) float32, detached, on the device: those of the exits, and `weight_exit_1` to K.
        """
        self._mode(training=True)
        (group,) = self.meta_optimizer.param_groups
        group["lr"] = self.options.meta_lr * self.optimizer.param_groups[0]["lr"] / self._peak
        halves = halves_of(inputs, targets_B, weights_B)
        others = halves if meta is None else halves_of(*meta, torch.ones_like(meta[1], dtype=weights_B.dtype))
        if learns is None:
            learns = self._batches % self.options.meta_interval == 0
        self._batches += 1
        # Whether a half is all padding is asked of all ranks: they go through the same collective operations.
        real = [half.real_H.sum() for half in (*halves, *others)]
        counts = self._ranks.sum(torch.stack(real)).tolist()
        found: list[dict[str, Tensor] | None] = [None, None]
        for place, (half, other) in enumerate(zip(halves, reversed(others), strict=True)):
            if counts[place] or not any(counts):
                found[place] = self._half_step(half, other if learns and counts[place] and counts[3 - place] else None)
        return joined(found, [half.targets_H.shape[0] for half in halves])

    def state_dict(self) -> dict[str, Any]:
        """Return the weight network, its optimiser and the number of batches so far."""
        return {
            "weight_net": dict(self.weight_net.state_dict()),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "batches": self._batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: the state is of another train step.
        """
        if set(state) != {"weight_net", "meta_optimizer", "batches"}:
            names = ", ".join(sorted(state)[:3]) or "nothing"
            raise ValueError(f"the state of another train step (it holds {names}): not taken")
        self.weight_net.load_state_dict(state["weight_net"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self._batches = int(state["batches"])

    def _half_step(self, half: Half, other: Half | None) -> dict[str, Tensor]:
        """Learn from the other half where there is one, and train on this; return its signals."""
        randomness = Randomness(half.inputs.device)
        with self._mixed(half.inputs):
            logits_KHC = self._logits(self.model(half.inputs))
        losses_HK = self._losses(logits_KHC, half.targets_H, self._label_smoothing).T
        seen = _Seen(losses_HK, self._observed(losses_HK, logits_KHC), randomness)
        traced = self._learn(half, other, seen) if other is not None else {}
        with torch.no_grad():
            weights_HK = self._weights(self.weight_net(seen.observed_HI), half.real_H)
        loss = (losses_HK * weights_HK * half.factors_H[:, None]).sum() / len(half.targets_H)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()
        if self.observer is not None:
            told = {"losses": losses_HK, "weights": weights_HK, "loss": loss, "logits": logits_KHC}
            self.observer({**traced, **{name: value.detach() for name, value in told.items()}})
        signals = super()._compute(self._signals, logits_KHC.detach(), half.targets_H, losses_HK.detach().T)
        return {**signals, **self._named(weights_HK)}

    def _learn(self, half: Half, other: Half, seen: _Seen) -> dict[str, Any]:
        """Take one step of the weight network; return what an observer is told of it."""
        raw_HK = self.weight_net(seen.observed_HI)
        weights_HK = self._weights(raw_HK.detach(), half.real_H).requires_grad_()
        # The mean over ranks, where they share the imagined step; each rank's own otherwise.
        share = len(half.targets_H) * (self._ranks.number if self._global else 1)
        pseudo_loss = (seen.losses_HK * weights_HK * half.factors_H[:, None]).sum() / share
        twice = self.options.gradient == "second_order"
        ours = gradients_of(pseudo_loss, self._module, twice=twice)
        pulled = {name: gradient.detach() for name, gradient in ours.items()}
        moved, reach = after_sgd(self.optimizer, self._module, self._shared(pulled))
        told: dict[str, Any] = {}
        vectors = self._shared(gradient_at(self._module, moved, lambda forward: self._meta(other, forward, told)))
        direction = {name: -reach[name] * vector for name, vector in vectors.items()}
        if twice:
            product = torch.stack([(ours[name] * direction[name]).sum() for name in direction]).sum()
            (slopes_HK,) = torch.autograd.grad(product, weights_HK, retain_graph=True)
        else:
            slopes_HK = self._slopes(half, seen, direction) * half.factors_H[:, None] / share
        upstream_HK = self._upstream(slopes_HK, weights_HK.detach(), half.real_H)
        self._step_weight_net(raw_HK, upstream_HK, counts=bool(half.real_H.any() and other.real_H.any()))
        if self.observer is not None:
            told |= {"pseudo_weights": weights_HK.detach(), "pseudo_loss": pseudo_loss.detach(), "pseudo_params": moved}
            told["meta_grad"] = {name: p.grad for name, p in self.weight_net.named_parameters()}
        return told

    def _meta(self, other: Half, forward: Callable[..., Any], told: dict[str, Any]) -> Tensor:
        """Return the loss of the other half's rows, each at the exit that it would leave by."""
        with self._mixed(other.inputs):
            logits_KHC = self._logits(forward(other.inputs))
        losses_HK = self._losses(logits_KHC, other.targets_H, self._label_smoothing).T
        sure_HK = confidences(logits_KHC)
        if self._global:
            exits = allocate_exits(self._ranks.gather(sure_HK), self._ranks.gather(other.real_H), self._shares_K)
            exits_H = exits.chunk(self._ranks.number)[self._ranks.rank]
        else:
            exits = exits_H = allocate_exits(sure_HK, other.real_H, self._shares_K)
        value = meta_loss(losses_HK, exits_H, exit_rows(exits, self.num_exits))
        told |= {"meta_confidences": sure_HK, "exits": exits_H, "meta_loss": value.detach()}
        return value

    def _slopes(self, half: Half, seen: _Seen, direction: Named) -> Tensor:
        def losses_at(forward: Callable[..., Any]) -> Tensor:
            with self._mixed(half.inputs):
                logits_KHC = self._logits(forward(half.inputs))
            return self._losses(logits_KHC, half.targets_H, self._label_smoothing)

        with seen.randomness.again():
            return slopes_along(self._module, direction, losses_at).T

    def _upstream(self, slopes_HK: Tensor, weights_HK: Tensor, real_H: Tensor) -> Tensor:
        """Return the gradient with respect to the weight network's output, from that to the weights."""
        if self.options.nonnegative:
            slopes_HK = torch.where(weights_HK > 0.0, slopes_HK, torch.zeros_like(slopes_HK))
        return self.options.epsilon * self._centred(slopes_HK, real_H)

    def _step_weight_net(self, raw_HK: Tensor, upstream_HK: Tensor, *, counts: bool) -> None:
        """Add up (global) or average (local) over the ranks that had both halves, and step."""
        named = dict(self.weight_net.named_parameters())
        found = torch.autograd.grad(raw_HK, list(named.values()), grad_outputs=upstream_HK)
        # A sum over ranks of what a rank without rows gives, 0, but never its NaN.
        parts = {
            name: g if counts or self._global else torch.zeros_like(g) for name, g in zip(named, found, strict=True)
        }
        parts["ranks"] = torch.full((), float(counts), dtype=raw_HK.dtype, device=raw_HK.device)
        parts = self._ranks.sum_each(parts)
        ranks = parts.pop("ranks")
        if not self._global and self._ranks.number > 1 and not ranks:
            return
        for name, parameter in named.items():
            parameter.grad = parts[name] if self._global else parts[name] / ranks
        self.meta_optimizer.step()

    def _weights(self, raw_HK: Tensor, real_H: Tensor, *, alone: bool = False) -> Tensor:
        centred_HK = self._centred(raw_HK, real_H, alone=alone)
        return weights_of(centred_HK, self.options.epsilon, nonnegative=self.options.nonnegative)

    def _centred(self, values_HK: Tensor, real_H: Tensor, *, alone: bool = False) -> Tensor:
        if alone or not self._global:
            return centred(values_HK, self.options.normalise, real_H)
        return centred(values_HK, self.options.normalise, real_H, self._ranks.sum)

    def _shared(self, gradients: Named) -> Named:
        return self._ranks.sum_each(gradients) if self._global else gradients

    def _observed(self, losses_HK: Tensor, logits_KHC: Tensor) -> Tensor:
        seen_HI = observed(self.options.input, losses_HK, confidences(logits_KHC).to(losses_HK.dtype))
        return seen_HI.to(next(self.weight_net.parameters()).dtype)

    def _compute(
        self, names: tuple[str, ...], logits: Tensor, targets_B: Tensor, losses_B: Tensor, part: str = "model"
    ) -> dict[str, Tensor]:
        """Return the signals of a pass without an update, and the weights that its rows alone would get."""
        asked = tuple(name for name in names if name not in self._own)
        signals = super()._compute(asked, logits, targets_B, losses_B, part)
        if asked == names:
            return signals
        raw_BK = self.weight_net(self._observed(losses_B.T, logits))
        all_B = torch.ones_like(targets_B, dtype=torch.bool)
        return {**signals, **self._named(self._weights(raw_BK, all_B, alone=True))}

    def _named(self, weights_BK: Tensor) -> dict[str, Tensor]:
        return {name: weights_BK[:, place].detach().float() for place, name in enumerate(self._own)}
