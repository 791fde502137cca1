"""What a step of SGD would lead to, and how a later loss depends on each weight in it: one forward-mode derivative.

With θ̂(w) = θ - lr·c·∇_θ Σ w_bk·l_bk - …, the chain rule gives ∂L_meta/∂w_bk = -lr·c·⟨v, ∇_θ l_bk⟩ with v = ∇_θ̂ L_meta,
and all those products together are one Jacobian-vector product of the losses at θ: no second derivative is needed.

Shapes: B batch, K exits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

Named = dict[str, Tensor]


@cache
def _make_first_dual() -> None:
    """Make the first dual tensor of a process: torch then compiles formulas of its own by what it calls deprecated."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=category)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def gradients_of(loss: Tensor, module: nn.Module, *, twice: bool = False) -> Named:
    """Return a loss's gradient at the parameters it depends on, and keep its graph; `twice`: to be derived again."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, create_graph=twice, allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@torch.no_grad()
def after_sgd(
    optimizer: torch.optim.Optimizer, module: nn.Module, gradients: Mapping[str, Tensor]
) -> tuple[Named, dict[str, float]]:
    """Return where a step of SGD with these gradients would lead, the real optimiser's momentum included.

    Args:
        optimizer: torch.optim.SGD without dampening; left as it is.
        module: whose parameters it holds.
        gradients: name → gradient; parameters without one do not move.

    Returns:
        name → parameter after the step; name → how far a unit of gradient moves it: lr, and (1 + momentum) times that
        for Nesterov's.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(module.named_parameters())
    moved: Named = {}
    reach: dict[str, float] = {}
    for name, gradient in gradients.items():
        parameter = parameters[name]
        group = groups[id(parameter)]
        momentum, rate = group["momentum"], float(group["lr"])
        slope = gradient + group["weight_decay"] * parameter
        buffer = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
        after = slope if buffer is None else momentum * buffer + slope
        if group["nesterov"]:
            after, rate = slope + momentum * after, rate * (1.0 + momentum)
        moved[name] = parameter - group["lr"] * after
        reach[name] = rate
    return moved, reach


def spare_buffers(module: nn.Module) -> Named:
    """Return copies of a module's buffers, for a forward that must not change them."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def gradient_at(module: nn.Module, parameters: Named, loss: Callable[[Callable[..., object]], Tensor]) -> Named:
    """Return a loss's gradient at other parameters than the module's, whose buffers are left alone.

    Args:
        module: in train mode.
        parameters: name → tensor, taking the place of the module's own.
        loss: is given the forward pass at those parameters.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    placed = {**leaves, **spare_buffers(module)}
    value = loss(lambda *inputs: functional_call(module, placed, inputs))
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


@torch.no_grad()
def slopes_along(module: nn.Module, direction: Named, losses: Callable[[Callable[..., object]], Tensor]) -> Tensor:
    """Return ⟨direction, ∇_θ l⟩ of every loss at the module's own parameters; its buffers are left alone.

    Args:
        module: in train mode.
        direction: name → tensor; parameters left out count as 0.
        losses: is given the forward pass, returns the losses.
    """
    parameters = dict(module.named_parameters())
    _make_first_dual()
    with forward_ad.dual_level():
        placed = {
            name: forward_ad.make_dual(parameters[name].detach(), tangent.to(parameters[name].dtype))
            for name, tangent in direction.items()
        }
        placed |= spare_buffers(module)
        found = forward_ad.unpack_dual(losses(lambda *inputs: functional_call(module, placed, inputs)))
        # Copied: a tangent does not outlive its level.
        return torch.zeros_like(found.primal) if found.tangent is None else found.tangent.clone()


class Randomness:
    """The state of the generators that a forward pass draws from, so that another one draws the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw as before within, and go on afterwards as if nothing had been drawn."""
        with torch.random.fork_rng(devices=[] if self._cuda is None else [self._device]):
            torch.set_rng_state(self._host)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
