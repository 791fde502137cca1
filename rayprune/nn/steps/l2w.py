"""The step that learns how much each sample counts at each exit, L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310).

A batch is two halves; each is trained on once, and is once what the weight network learns from: the training half's
losses, weighed as it says, would lead a step of SGD to other parameters; there the other half's samples, each at the
exit that it would leave by, have a loss, whose gradient goes back through that step to the weights.

Deliberate differences from the reference: the gradient comes from one forward-mode derivative on the graph of the real
forward pass instead of a copy of the network and a double backward pass (equal to rounding, 3.67 in place of 5.09 plain
steps); label smoothing is the training loss's; padding counts nowhere; a half of padding alone makes no step; every
sample's weights are recorded. `clip_norm` clips the real step, not the imagined one.

Shapes: B rows of this worker's share, H of a half, C classes, K exits, W workers.

The two halves of a batch that a step trains on in turn.

Shapes: B rows of a batch, H of a half, C classes, K exits.

The weight network of L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310): a sample's losses in, a number an exit out.

Shapes: B batch, I inputs, K exits.

The arithmetic of learning to weigh samples by exit, L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310).

A small network gives every sample a number in (-1, 1) for each exit. Centred and scaled, they are the weights of the
samples' losses; what the network learns from is the loss of those samples at each exit that would leave there.

Shapes: B rows of a half batch, K exits, C classes. Padding rows are left out by `real_B`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rayprune.core.step_options import L2wOptions
from rayprune.errors import ConfigError
from rayprune.nn.collectives import Ranks
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.meta_gradient import Named, Randomness, after_sgd, gradient_at, gradients_of, slopes_along

Normalise = Literal["row", "col", "mat"]
# Sums a tensor over the ranks that share a batch.
Reduce = Callable[[Tensor], Tensor]


def centred(values_BK: Tensor, normalise: Normalise, real_B: Tensor, reduce: Reduce = lambda each: each) -> Tensor:
    """Subtract the mean over the real rows ("row": every exit's mean is 0), the exits ("col") or both ("mat").

    It is a symmetric projection: the gradient goes through the same function.

    Args:
        values_BK: (B, K); what padding rows hold does not matter.
        normalise: over what the mean is.
        real_B: (B,) bool, False for padding, whose rows come out as 0.
        reduce: sums over ranks where the mean is over all their rows.

    >>> centred(torch.tensor([[1.0, 0.0], [3.0, 8.0]]), "row", torch.tensor([True, True]))
    tensor([[-1., -4.],
            [ 1.,  4.]])
    """
    kept_BK = torch.where(real_B[:, None], values_BK, torch.zeros_like(values_BK))
    if normalise == "col":
        return kept_BK - kept_BK.mean(dim=1, keepdim=True)
    sums = reduce(torch.cat([kept_BK.sum(dim=0), real_B.sum().to(kept_BK.dtype)[None]]))
    means_K = sums[:-1] / sums[-1].clamp(min=1.0)
    if normalise == "mat":
        means_K = means_K.mean().expand_as(means_K)
    return torch.where(real_B[:, None], kept_BK - means_K, torch.zeros_like(kept_BK))


def weights_of(centred_BK: Tensor, epsilon: float, *, nonnegative: bool = False) -> Tensor:
    """Return the weights 1 + ε·centred, (B, K); those below 0 become 0 where `nonnegative`."""
    weights_BK = 1.0 + epsilon * centred_BK
    return weights_BK.clamp(min=0.0) if nonnegative else weights_BK


def weight_range(epsilon: float, normalise: Normalise, num_exits: int) -> tuple[float, float]:
    """Return the open interval that weights lie in.

    >>> [round(each, 2) for each in weight_range(0.8, "col", 5)]
    [-0.28, 2.28]
    """
    reach = 2.0 * epsilon * ((num_exits - 1) / num_exits if normalise == "col" else 1.0)
    return 1.0 - reach, 1.0 + reach


def exit_distribution(p: int, num_exits: int) -> Tensor:
    """Return the share of samples that leaves at each exit, (K,) float32: P_k ∝ q^k with q = p / 20.

    Args:
        p: 1..39; 20 is uniform, less leave early, more late.
        num_exits: K.

    >>> [round(share, 5) for share in exit_distribution(15, 5).tolist()]
    [0.32778, 0.24584, 0.18438, 0.13828, 0.10371]
    """
    # By logarithms in float32: at quotas that are whole numbers, how the share is rounded decides.
    logs_K = torch.log(torch.tensor([p / 20.0], dtype=torch.float32)) * torch.arange(1.0, num_exits + 1)
    shares_K = torch.exp(logs_K)
    return shares_K / shares_K.sum()


def exit_quotas(num_rows: int, shares_K: Tensor) -> list[int]:
    """Return how many of n rows leave at each exit, K numbers: floor(n · P_k) in float32; the last takes the rest.

    >>> exit_quotas(512, exit_distribution(15, 5))
    [167, 125, 94, 70, 56]
    """
    first = [int(count) for count in torch.floor(shares_K[:-1].float().cpu() * num_rows).tolist()]
    return [*first, num_rows - sum(first)]


def allocate_exits(confidences_BK: Tensor, real_B: Tensor, shares_K: Tensor) -> Tensor:
    """Give each row the exit that it leaves by: exit after exit, the most confident of those still there.

    Args:
        confidences_BK: (B, K) largest probability of every row at every exit; of equal ones the earlier row goes first.
        real_B: (B,) bool.
        shares_K: as of `exit_distribution`.

    Returns:
        (B,) int64 in 0..K-1; -1 for padding.

    >>> sure = torch.tensor([[0.9, 0.1], [0.2, 0.1], [0.5, 0.1]])
    >>> allocate_exits(sure, torch.tensor([True, True, True]), torch.tensor([0.4, 0.6]))
    tensor([0, 1, 1])
    """
    exits_B = torch.full_like(real_B, -1, dtype=torch.int64)
    left_B = real_B.clone()
    *first, _ = exit_quotas(int(real_B.sum()), shares_K)
    for place, quota in enumerate(first):
        sure_B = torch.where(left_B, confidences_BK[:, place], torch.full_like(confidences_BK[:, place], -1.0))
        chosen = torch.argsort(sure_B, descending=True, stable=True)[:quota]
        exits_B[chosen], left_B[chosen] = place, False
    return torch.where(left_B, torch.full_like(exits_B, len(first)), exits_B)


def exit_rows(exits_B: Tensor, num_exits: int) -> Tensor:
    """Return how many rows leave at each exit, (K,) int64."""
    return torch.stack([(exits_B == place).sum() for place in range(num_exits)])


def meta_loss(losses_BK: Tensor, exits_B: Tensor, rows_K: Tensor) -> Tensor:
    """Return Σ_k mean of the losses at exit k over the rows that leave there; an exit without rows adds nothing.

    Args:
        losses_BK: (B, K), differentiable.
        exits_B: (B,) as of `allocate_exits`.
        rows_K: (K,) how many rows leave at each exit; more than are here where other ranks hold the rest.
    """
    terms_K = [
        torch.where(exits_B == place, losses_BK[:, place], torch.zeros_like(losses_BK[:, place])).sum()
        / rows_K[place].clamp(min=1)
        for place in range(losses_BK.shape[1])
    ]
    return torch.stack(terms_K).sum()


def exit_weight_names(num_exits: int) -> tuple[str, ...]:
    """Return the names of the step's own signals.

    >>> exit_weight_names(2)
    ('weight_exit_1', 'weight_exit_2')
    """
    return tuple(f"weight_exit_{place + 1}" for place in range(num_exits))


Input = Literal["loss", "conf", "both"]


class WeightNet(nn.Module):
    """An MLP with ReLU and a tanh at its end.

    Args:
        num_exits: K.
        inputs: what it sees: the K losses, the K confidences, or both, losses first.
        hidden: width of its hidden layers.
        layers: their number.
        seed: of its initial weights; the global generator is left as it is.
    """

    def __init__(
        self, num_exits: int, *, inputs: Input = "loss", hidden: int = 500, layers: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        width = 2 * num_exits if inputs == "both" else num_exits
        # Drawn on the CPU: the same weights on every rank and device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [width, *[hidden] * layers]
            self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
            self.output = nn.Linear(sizes[-1], num_exits)

    def forward(self, observed_BI: Tensor) -> Tensor:
        """Give (B, K) in (-1, 1)."""
        state = observed_BI
        for layer in self.hidden:
            state = torch.relu(layer(state))
        return torch.tanh(self.output(state))


def observed(inputs: Input, losses_BK: Tensor, confidences_BK: Tensor) -> Tensor:
    """Return what the weight network sees of each row, detached."""
    seen: dict[str, Any] = {"loss": [losses_BK], "conf": [confidences_BK], "both": [losses_BK, confidences_BK]}
    return torch.cat(seen[inputs], dim=1).detach()


# Inputs and targets.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Half:
    """Rows to train on: inputs (H, …), targets (H,), the pruner's factors (H,), 0 for padding."""

    inputs: Tensor
    targets_H: Tensor
    factors_H: Tensor

    @property
    def real_H(self) -> Tensor:
        """False for padding, (H,) bool."""
        return self.factors_H > 0


def halves_of(inputs: Tensor, targets_B: Tensor, factors_B: Tensor) -> tuple[Half, Half]:
    """Return the first ⌈B/2⌉ rows and the rest."""
    middle = -(-len(targets_B) // 2)
    first, second = slice(0, middle), slice(middle, len(targets_B))
    return Half(inputs[first], targets_B[first], factors_B[first]), Half(
        inputs[second], targets_B[second], factors_B[second]
    )


def confidences(logits_KHC: Tensor) -> Tensor:
    """Return the largest probability of every row at every exit, (H, K), detached."""
    logits = logits_KHC.detach()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.softmax(dim=2).amax(dim=2).T


def joined(found: Iterable[dict[str, Tensor] | None], sizes: list[int]) -> dict[str, Tensor]:
    """Put the halves' signals together; of a half of padding that was left out, zeros, which nobody counts."""
    parts = list(found)
    like = next(part for part in parts if part is not None)
    return {
        name: torch.cat(
            [
                value.new_zeros((size, *value.shape[1:])) if part is None else part[name]
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for name, value in like.items()
    }


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
        ConfigError: an option outside its range, another optimiser, micro-batches.
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
            raise ConfigError("train.step l2w imagines a step of SGD, the optimiser is another: set optim.name=sgd")
        if accumulate != 1:
            raise ConfigError(f"train.step l2w takes no micro-batches: set train.accumulate=1 instead of {accumulate}")
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
            ConfigError: the state is of another train step.
        """
        if set(state) != {"weight_net", "meta_optimizer", "batches"}:
            names = ", ".join(sorted(state)[:3]) or "nothing"
            raise ConfigError(f"the state of another train step (it holds {names}): not taken")
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
