"""The parameters after a step of SGD, and how a later loss depends on each weight in it: one forward-mode derivative.

With θ̂(w) = θ - lr·c·∇_θ Σ w_bk·l_bk - …, the chain rule gives ∂L_meta/∂w_bk = -lr·c·⟨v, ∇_θ l_bk⟩ with v = ∇_θ̂ L_meta.
All these products together are one Jacobian-vector product of the losses at θ; no second derivative is needed.

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
# A forward pass at other parameters than the module's.
Forward = Callable[[Tensor], object]


def gradients_of(loss: Tensor, module: nn.Module, *, twice: bool = False) -> Named:
    """Return a loss's gradients at the parameters it depends on, differentiable if `twice`; its graph is kept."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, create_graph=twice, allow_unused=True
    )
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


@torch.no_grad()
def after_sgd(
    optimizer: torch.optim.Optimizer, module: nn.Module, gradients: Mapping[str, Tensor]
) -> tuple[Named, dict[str, float]]:
    """Return the parameters after a step of SGD with these gradients, the optimizer's momentum included.

    Args:
        optimizer: torch.optim.SGD without dampening; it does not change.
        module: whose parameters it holds.
        gradients: name → gradient; parameters without one do not move.

    Returns:
        Name → parameter after the step; name → the distance that a unit of gradient moves it: lr, or (1 + momentum)
        times that for Nesterov momentum.
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
        update = slope if buffer is None else momentum * buffer + slope
        if group["nesterov"]:
            update, rate = slope + momentum * update, rate * (1.0 + momentum)
        moved[name] = parameter - group["lr"] * update
        reach[name] = rate
    return moved, reach


def gradient_at(module: nn.Module, parameters: Named, loss: Callable[[Forward], Tensor]) -> Named:
    """Return a loss's gradients at other parameters than the module's, whose buffers do not change.

    Args:
        module: in train mode.
        parameters: name → tensor, in place of the module's own.
        loss: takes the forward pass at those parameters.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
    gradients = torch.autograd.grad(loss(_forward(module, leaves)), list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


@torch.no_grad()
def slopes_along(module: nn.Module, direction: Named, losses: Callable[[Forward], Tensor]) -> Tensor:
    """Return ⟨direction, ∇_θ l⟩ of every loss at the module's own parameters; its buffers do not change.

    Args:
        module: in train mode.
        direction: name → tensor; parameters without one count as 0.
        losses: takes the forward pass and returns the losses.
    """
    parameters = dict(module.named_parameters())
    _make_first_dual()
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(parameters[name].detach(), tangent.to(parameters[name].dtype))
            for name, tangent in direction.items()
        }
        primal, tangent = forward_ad.unpack_dual(losses(_forward(module, duals)))
        # Cloned because a tangent does not outlive its level.
        return torch.zeros_like(primal) if tangent is None else tangent.clone()


def _forward(module: nn.Module, parameters: Named) -> Forward:
    """Return the forward pass at these parameters, with copies of the module's buffers."""
    tensors = {**parameters, **{name: buffer.clone() for name, buffer in module.named_buffers()}}
    return lambda inputs: functional_call(module, tensors, (inputs,))


@cache
def _make_first_dual() -> None:
    """Create the process's first dual tensor, for which torch calls a function that it deprecates itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=category)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


class Randomness:
    """The state of the generators before a forward pass, so that another one can make the same random draws."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Make the same draws in this context, and continue afterwards as if nothing had been drawn in it."""
        with torch.random.fork_rng(devices=[] if self._cuda is None else [self._device]):
            torch.set_rng_state(self._host)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield
