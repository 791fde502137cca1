"""The step that learns how much each sample counts at each exit, L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310).

A weight network gives every sample a number in (-1, 1) for each exit; centered and scaled, they are the weights of the
sample's losses. A batch is two halves, and the network trains on one after the other. Before each, the weight network
learns from the other half: an imagined step of SGD on the weighted losses gives new parameters, at which the other half
has a meta loss, each sample at the exit where it would leave. Its gradient goes back through that step to the weights.

Deliberate differences from the reference: the gradient comes from one forward-mode derivative on the graph of the real
forward pass instead of a copy of the network and a double backward pass (equal up to rounding, 3.67 instead of 5.09
plain steps); label smoothing is the training loss's; padding counts nowhere; a half of padding alone makes no step;
every sample's weights are recorded. `clip_norm` clips the real step, not the imagined one.

Shapes: B rows of this worker's part of the batch, H of a half, C classes, K exits, I inputs of the weight network.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rayprune.core.step_options import L2wOptions
from rayprune.errors import ConfigError
from rayprune.nn.collectives import Ranks
from rayprune.nn.signals import max_probability
from rayprune.nn.steps.exits import ExitStep
from rayprune.nn.steps.meta_gradient import (
    Forward,
    Named,
    Randomness,
    after_sgd,
    gradient_at,
    gradients_of,
    slopes_along,
)
from rayprune.nn.steps.registry import register_step

Normalise = Literal["row", "col", "mat"]

# In plain steps of one forward and two backward units: pseudo gradient 2, meta pass 3, derivative 3 (or about 6.3).
_META_COST = {"jvp": 8 / 3, "second_order": 11.3 / 3}


@register_step("l2w")
class L2wStep(ExitStep):
    """Take two optimization steps, one on each half of a batch, with learned weights.

    Args:
        model: (B, …) inputs to a list of K logits (B, C); DDP-wrapped or not.
        optimizer: torch.optim.SGD over the model's parameters, at its peak learning rate; the weight network's rate
            stays proportional to it.
        num_exits: K, at least 2.
        seed: of the weight network.
        signals: names that the step returns besides loss, correct and its own.
        accumulate: must be 1.
        **rest: the fields of L2wOptions, and arguments of PlainStep.

    Attributes:
        weight_net, meta_optimizer: the weight network and its Adam.

    Raises:
        ConfigError: an option outside its range, another optimizer, micro-batches.
    """

    options_class = L2wOptions
    run_facts = ("seed",)
    compilable = False

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
            raise ConfigError(
                f"train.step l2w imagines SGD's step, not {type(optimizer).__name__}'s: set optim.name=sgd"
            )
        if accumulate != 1:
            raise ConfigError(f"train.step l2w takes no micro-batches: set train.accumulate=1 instead of {accumulate}")
        names = [field.name for field in dataclasses.fields(L2wOptions)]
        options = self.options = L2wOptions(**{name: rest.pop(name) for name in names if name in rest})
        self._weight_names = exit_weight_names(num_exits)
        super().__init__(
            model,
            optimizer,
            num_exits=num_exits,
            score=options.score,
            confident=options.confident,
            signals=tuple(name for name in signals if name not in self._weight_names),
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
        self._peak = float(optimizer.param_groups[0]["lr"])
        self._fractions_K = exit_distribution(options.p, num_exits)
        self._batches = 0
        self._ranks = Ranks(model)
        # The ranks that share the imagined step, the normalization and the exits; in scope local, this one alone.
        self._scope = Ranks(model if options.scope == "global" else self._module)

    def __call__(
        self,
        inputs: Tensor,
        targets_B: Tensor,
        weights_B: Tensor,
        meta: tuple[Tensor, Tensor] | None = None,
        learns: bool | None = None,
        is_full: bool = False,
    ) -> dict[str, Tensor]:
        """Update the model twice, on the first ⌈B/2⌉ rows and on the rest, and before each the weight network.

        Args:
            inputs: (B, …).
            targets_B: (B,) int64.
            weights_B: (B,) the pruner's factors, which multiply the learned weights; 0 for padding, which counts
                nowhere (except in the loss's divisor, which is constant as in the plain step).
            meta: inputs and targets of the unpruned stream, to learn from instead of this batch's other half; equally
                many on every rank.
            learns: whether the weight network learns from this batch; None: from every `meta_interval`-th.
            is_full: whether no rank has padding in this batch; otherwise the host waits for the device to count it.

        Returns:
            Signal name → (B, …) float32, detached, on the device: those of the exits, and `weight_exit_1` to K.
        """
        self._set_mode(training=True)
        (group,) = self.meta_optimizer.param_groups
        group["lr"] = self.options.meta_lr * self.optimizer.param_groups[0]["lr"] / self._peak
        halves = _halves(inputs, targets_B, weights_B, is_full=is_full)
        others = halves
        if meta is not None:
            others = _halves(*meta, torch.ones_like(meta[1], dtype=weights_B.dtype), is_full=is_full)
        if learns is None:
            learns = self._batches % self.options.meta_interval == 0
        self._batches += 1
        # A half is left out if it is padding on all ranks, so that all run the same collective operations.
        if is_full:
            counts = [len(half.targets_H) for half in (*halves, *others)]
        else:
            real = [half.real_H.sum() for half in (*halves, *others)]
            counts = self._ranks.sum(torch.stack(real)).tolist()
        signals: list[dict[str, Tensor] | None] = [None, None]
        for index, (half, other) in enumerate(zip(halves, reversed(others), strict=True)):
            if counts[index] or not any(counts):
                learnable = learns and counts[index] and counts[3 - index]
                signals[index] = self._half_step(half, other if learnable else None)
        return _concatenate(signals, [len(half.targets_H) for half in halves])

    def state_dict(self) -> dict[str, Any]:
        """Return the weight network, its optimizer and the number of batches so far."""
        return {
            "weight_net": dict(self.weight_net.state_dict()),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "batches": self._batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state, {"weight_net", "meta_optimizer", "batches"})
        self.weight_net.load_state_dict(state["weight_net"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self._batches = int(state["batches"])

    def _half_step(self, half: Half, other: Half | None) -> dict[str, Tensor]:
        """Learn from the other half if there is one, and train on this one; return its signals."""
        randomness = Randomness(half.inputs.device)
        logits_KHC, losses_HK = self._outputs(half, self.model)
        inputs_HI = self.weight_net.inputs_of(losses_HK, max_probability(logits_KHC.detach()).T)
        if other is not None:
            self._learn(half, other, losses_HK, inputs_HI, randomness)
        with torch.no_grad():
            weights_HK = self._weights(self.weight_net(inputs_HI), half.real_H)
        loss = (losses_HK * weights_HK * half.factors_H[:, None]).sum() / len(half.targets_H)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._update()
        losses_HK, logits_KHC = losses_HK.detach(), logits_KHC.detach()
        self._trace(losses=losses_HK, weights=weights_HK, loss=loss.detach(), logits=logits_KHC)
        signals = super()._compute_signals(self._signals, logits_KHC, half.targets_H, losses_HK.T)
        return {**signals, **self._named(weights_HK)}

    def _learn(self, half: Half, other: Half, losses_HK: Tensor, inputs_HI: Tensor, randomness: Randomness) -> None:
        """Take one step of the weight network."""
        raw_HK = self.weight_net(inputs_HI)
        weights_HK = self._weights(raw_HK.detach(), half.real_H).requires_grad_()
        rows = len(half.targets_H) * self._scope.number
        pseudo_loss = (losses_HK * weights_HK * half.factors_H[:, None]).sum() / rows
        twice = self.options.gradient == "second_order"
        gradients = gradients_of(pseudo_loss, self._module, twice=twice)
        parameters, reach = after_sgd(self.optimizer, self._module, self._scope.sum_each(gradients))
        meta_gradients = gradient_at(self._module, parameters, lambda forward: self._meta_loss(other, forward))
        direction = {name: -reach[name] * each for name, each in self._scope.sum_each(meta_gradients).items()}
        if twice:
            product = torch.stack([(gradients[name] * direction[name]).sum() for name in direction]).sum()
            (slopes_HK,) = torch.autograd.grad(product, weights_HK, retain_graph=True)
        else:
            slopes_HK = self._slopes(half, direction, randomness) * half.factors_H[:, None] / rows
        if self.options.nonnegative:
            slopes_HK = torch.where(weights_HK > 0.0, slopes_HK, torch.zeros_like(slopes_HK))
        # The centering is a symmetric projection: the gradient goes through the same function.
        upstream_HK = self.options.epsilon * self._center(slopes_HK, half.real_H)
        self._step_weight_net(raw_HK, upstream_HK, has_rows=half.has_rows() and other.has_rows())
        self._trace(pseudo_weights=weights_HK.detach(), pseudo_loss=pseudo_loss.detach(), pseudo_params=parameters)

    def _meta_loss(self, other: Half, forward: Forward) -> Tensor:
        """Return the loss of the other half's rows, each at the exit where it would leave."""
        logits_KHC, losses_HK = self._outputs(other, forward)
        confidences_HK = max_probability(logits_KHC.detach()).T
        gathered = self._scope.gather(confidences_HK), self._scope.gather(other.real_H)
        exits = allocate_exits(*gathered, self._fractions_K, is_full=other.is_full)
        exits_H = exits.chunk(self._scope.number)[self._scope.rank]
        loss = meta_loss(losses_HK, exits_H, exit_counts(exits, self.num_exits))
        self._trace(meta_confidences=confidences_HK, exits=exits_H, meta_loss=loss.detach())
        return loss

    def _slopes(self, half: Half, direction: Named, randomness: Randomness) -> Tensor:
        """Return the derivative of the half's losses along a direction of the parameters, (H, K)."""
        with randomness.replayed():
            return slopes_along(self._module, direction, lambda forward: self._outputs(half, forward)[1].T).T

    def _step_weight_net(self, raw_HK: Tensor, upstream_HK: Tensor, *, has_rows: bool) -> None:
        """Step on the gradients' sum over the ranks (global), or on their mean over the ranks with rows (local)."""
        named = dict(self.weight_net.named_parameters())
        gradients = torch.autograd.grad(raw_HK, list(named.values()), grad_outputs=upstream_HK)
        is_global = self.options.scope == "global"
        # A local rank without rows contributes 0, even if its gradient is NaN.
        parts = {
            name: gradient if has_rows or is_global else torch.zeros_like(gradient)
            for name, gradient in zip(named, gradients, strict=True)
        }
        parts["ranks"] = torch.full((), float(has_rows), dtype=raw_HK.dtype, device=raw_HK.device)
        parts = self._ranks.sum_each(parts)
        num_ranks = parts.pop("ranks")
        if not is_global and not has_rows and not num_ranks:
            return
        for name, parameter in named.items():
            parameter.grad = parts[name] if is_global else parts[name] / num_ranks
        self.meta_optimizer.step()

    def _outputs(self, half: Half, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return the logits (K, H, C) and losses (H, K) of a forward pass."""
        with self._mixed(half.inputs):
            logits_KHC = self._logits(forward(half.inputs))
        return logits_KHC, self._losses(logits_KHC, half.targets_H, self._label_smoothing).T

    def _weights(self, raw_HK: Tensor, real_H: Tensor, *, alone: bool = False) -> Tensor:
        centered_HK = self._center(raw_HK, real_H, alone=alone)
        return weights_of(centered_HK, self.options.epsilon, nonnegative=self.options.nonnegative)

    def _center(self, values_HK: Tensor, real_H: Tensor, *, alone: bool = False) -> Tensor:
        return center(values_HK, self.options.normalise, real_H, None if alone else self._scope)

    def _compute_signals(
        self,
        names: tuple[str, ...],
        logits: Tensor,
        targets_B: Tensor,
        losses_B: Tensor,
        part: str = "model",
        embeddings_BD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the signals of a pass without an update, and the weights that its rows alone would get."""
        others = tuple(name for name in names if name not in self._weight_names)
        signals = super()._compute_signals(others, logits, targets_B, losses_B, part)
        if others == names:
            return signals
        raw_BK = self.weight_net(self.weight_net.inputs_of(losses_B.T, max_probability(logits).T))
        all_B = torch.ones_like(targets_B, dtype=torch.bool)
        return {**signals, **self._named(self._weights(raw_BK, all_B, alone=True))}

    def _named(self, weights_BK: Tensor) -> dict[str, Tensor]:
        return {name: weights_BK[:, exit].detach().float() for exit, name in enumerate(self._weight_names)}

    def _trace(self, **values: Any) -> None:
        """Do nothing; tests replace this to read the intermediate values of every half."""


class WeightNet(nn.Module):
    """An MLP with ReLU, and tanh at its end.

    Args:
        num_exits: K.
        inputs: the K losses, the K confidences, or both, losses first.
        hidden: width of its hidden layers.
        layers: their number.
        seed: of its initial weights; the global generator does not change.
    """

    def __init__(
        self,
        num_exits: int,
        *,
        inputs: Literal["loss", "conf", "both"] = "loss",
        hidden: int = 500,
        layers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        sizes = [2 * num_exits if inputs == "both" else num_exits, *[hidden] * layers]
        # Drawn on the CPU: the same weights on every rank and device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
            self.output = nn.Linear(sizes[-1], num_exits)

    def inputs_of(self, losses_BK: Tensor, confidences_BK: Tensor) -> Tensor:
        """Return its inputs (B, I) for samples with these losses and confidences, detached."""
        columns = {"loss": [losses_BK], "conf": [confidences_BK], "both": [losses_BK, confidences_BK]}[self.inputs]
        return torch.cat([column.detach().to(self.output.weight.dtype) for column in columns], dim=1)

    def forward(self, inputs_BI: Tensor) -> Tensor:
        """Return (B, K) in (-1, 1)."""
        state = inputs_BI
        for layer in self.hidden:
            state = torch.relu(layer(state))
        return torch.tanh(self.output(state))


@dataclass(frozen=True)
class Half:
    """Rows to train on: inputs (H, …), targets (H,), and the pruner's factors (H,), 0 for padding.

    `is_full` tells the host that none is padding, on any rank.
    """

    inputs: Tensor
    targets_H: Tensor
    factors_H: Tensor
    is_full: bool

    @property
    def real_H(self) -> Tensor:
        """False for padding, (H,) bool."""
        return self.factors_H > 0

    def has_rows(self) -> bool:
        """Return whether a row is not padding; waits for the device unless `is_full`."""
        return len(self.targets_H) > 0 if self.is_full else bool(self.real_H.any())


def _halves(*tensors_B: Tensor, is_full: bool) -> list[Half]:
    """Split inputs, targets and factors into the first ⌈B/2⌉ rows and the rest."""
    rows = len(tensors_B[0])
    sizes = [rows - rows // 2, rows // 2]
    parts = zip(*(tensor.split(sizes) for tensor in tensors_B), strict=True)
    return [Half(inputs, targets_H, factors_H, is_full) for inputs, targets_H, factors_H in parts]


def _concatenate(halves: list[dict[str, Tensor] | None], sizes: list[int]) -> dict[str, Tensor]:
    """Concatenate the halves' signals; a half of padding, which was left out, has zeros that nothing counts."""
    like = next(signals for signals in halves if signals is not None)
    return {
        name: torch.cat(
            [
                value.new_zeros((size, *value.shape[1:])) if signals is None else signals[name]
                for signals, size in zip(halves, sizes, strict=True)
            ]
        )
        for name, value in like.items()
    }


def center(values_BK: Tensor, normalise: Normalise, real_B: Tensor, ranks: Ranks | None = None) -> Tensor:
    """Subtract the mean over the real rows ("row": every exit's mean is 0), the exits ("col") or both ("mat").

    Args:
        values_BK: (B, K); padding rows may hold anything.
        normalise: the axes of the mean.
        real_B: (B,) bool, False for padding, whose rows come out as 0.
        ranks: those over whose rows the mean is; None for this rank's alone.

    >>> center(torch.tensor([[1.0, 0.0], [3.0, 8.0]]), "row", torch.tensor([True, True]))
    tensor([[-1., -4.],
            [ 1.,  4.]])
    """
    real_BK = torch.where(real_B[:, None], values_BK, torch.zeros_like(values_BK))
    if normalise == "col":
        return real_BK - real_BK.mean(dim=1, keepdim=True)
    sums = torch.cat([real_BK.sum(dim=0), real_B.sum().to(real_BK.dtype)[None]])
    sums = sums if ranks is None else ranks.sum(sums)
    means_K = sums[:-1] / sums[-1].clamp(min=1.0)
    if normalise == "mat":
        means_K = means_K.mean().expand_as(means_K)
    return torch.where(real_B[:, None], real_BK - means_K, torch.zeros_like(real_BK))


def weights_of(centered_BK: Tensor, epsilon: float, *, nonnegative: bool = False) -> Tensor:
    """Return the weights 1 + ε·centered, (B, K); with `nonnegative`, 0 instead of those below."""
    weights_BK = 1.0 + epsilon * centered_BK
    return weights_BK.clamp(min=0.0) if nonnegative else weights_BK


def weight_range(epsilon: float, normalise: Normalise, num_exits: int) -> tuple[float, float]:
    """Return the open interval that contains all weights.

    >>> [round(each, 2) for each in weight_range(0.8, "col", 5)]
    [-0.28, 2.28]
    """
    reach = 2.0 * epsilon * ((num_exits - 1) / num_exits if normalise == "col" else 1.0)
    return 1.0 - reach, 1.0 + reach


def exit_distribution(p: int, num_exits: int) -> Tensor:
    """Return the fraction of samples that leave at each exit, (K,) float32: P_k ∝ q^k with q = p / 20.

    Args:
        p: 1..39; 20 is uniform, a smaller p lets more samples leave early.
        num_exits: K.

    >>> [round(fraction, 5) for fraction in exit_distribution(15, 5).tolist()]
    [0.32778, 0.24584, 0.18438, 0.13828, 0.10371]
    """
    # By logarithms in float32, like the reference: the rounding decides where a count is just a whole number.
    logs_K = torch.log(torch.tensor([p / 20.0], dtype=torch.float32)) * torch.arange(1.0, num_exits + 1)
    powers_K = torch.exp(logs_K)
    return powers_K / powers_K.sum()


def leaving_counts(num_rows: int, fractions_K: Tensor) -> list[int]:
    """Return how many of n rows leave at each exit, K numbers: floor(n · P_k) in float32, and the rest at the last.

    >>> leaving_counts(512, exit_distribution(15, 5))
    [167, 125, 94, 70, 56]
    """
    first = [int(count) for count in torch.floor(fractions_K[:-1].float().cpu() * num_rows).tolist()]
    return [*first, num_rows - sum(first)]


def allocate_exits(confidences_BK: Tensor, real_B: Tensor, fractions_K: Tensor, *, is_full: bool = False) -> Tensor:
    """Return the exit where each row leaves: at one exit after the other, the most confident remaining rows.

    Args:
        confidences_BK: (B, K) largest probability of every row at every exit; the earlier row wins a tie.
        real_B: (B,) bool.
        fractions_K: as of `exit_distribution`.
        is_full: whether no row is padding; otherwise the host waits for the device to count the rows.

    Returns:
        (B,) int64 in 0..K-1; -1 for padding.

    >>> confidences = torch.tensor([[0.9, 0.1], [0.2, 0.1], [0.5, 0.1]])
    >>> allocate_exits(confidences, torch.tensor([True, True, True]), torch.tensor([0.4, 0.6]))
    tensor([0, 1, 1])
    """
    exits_B = torch.full_like(real_B, -1, dtype=torch.int64)
    remaining_B = real_B.clone()
    *first, _ = leaving_counts(len(real_B) if is_full else int(real_B.sum()), fractions_K)
    for exit, count in enumerate(first):
        ranking_B = torch.where(remaining_B, confidences_BK[:, exit], torch.full_like(confidences_BK[:, exit], -1.0))
        leaving = torch.argsort(ranking_B, descending=True, stable=True)[:count]
        exits_B[leaving], remaining_B[leaving] = exit, False
    return torch.where(remaining_B, torch.full_like(exits_B, len(first)), exits_B)


def exit_counts(exits_B: Tensor, num_exits: int) -> Tensor:
    """Return how many rows leave at each exit, (K,) int64."""
    return torch.stack([(exits_B == exit).sum() for exit in range(num_exits)])


def meta_loss(losses_BK: Tensor, exits_B: Tensor, counts_K: Tensor) -> Tensor:
    """Return Σ_k of the mean loss at exit k of the rows that leave there; an exit without rows adds nothing.

    Args:
        losses_BK: (B, K), differentiable.
        exits_B: (B,) as of `allocate_exits`.
        counts_K: (K,) how many rows leave at each exit, those of other ranks included.
    """
    means = [
        torch.where(exits_B == exit, losses_BK[:, exit], torch.zeros_like(losses_BK[:, exit])).sum()
        / counts_K[exit].clamp(min=1)
        for exit in range(losses_BK.shape[1])
    ]
    return torch.stack(means).sum()


def exit_weight_names(num_exits: int) -> tuple[str, ...]:
    """Return the names of the step's own signals.

    >>> exit_weight_names(2)
    ('weight_exit_1', 'weight_exit_2')
    """
    return tuple(f"weight_exit_{exit}" for exit in range(1, num_exits + 1))
