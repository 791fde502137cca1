"""The plain step and the step with a proxy: updates, evaluation, state, cost, and two ranks.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import copy
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.core.references import closest
from rayprune.core.step_options import STEP_OPTIONS, step_config
from rayprune.errors import ConfigError
from rayprune.nn.boundary import boundary_distance, pair_distances
from rayprune.nn.models import build_model
from rayprune.nn.signals import BOUNDARY_SIGNALS, per_sample_loss
from rayprune.nn.steps import (
    STEPS,
    L2wStep,
    PlainStep,
    PspStep,
    StepOptions,
    TrainStep,
    register_step,
    registry,
    step_class,
)
from rayprune.nn.steps.psp import Proxy, WithProxy

SHAPE, CLASSES = (3, 8, 8), 4


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8", num_classes=CLASSES, input_shape=SHAPE)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return build_model("mlp", num_classes=CLASSES, input_shape=SHAPE, hidden=(12, 8))


def batch(rows: int = 8, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, *SHAPE, generator=generator)
    weights_B = torch.tensor([0.0, 1.0, 2.0, 1.0]).repeat(rows)[:rows]
    return images, torch.randint(CLASSES, (rows,), generator=generator), weights_B


def plain(network: nn.Module, lr: float = 0.1, **recipe: Any) -> PlainStep:
    return PlainStep(network, torch.optim.SGD(network.parameters(), lr=lr), head="fc", **recipe)


def psp(network: nn.Module, lr: float = 0.1, width: float = 0.5, weight: float = 1.0, **recipe: Any) -> PspStep:
    module = PspStep.module_of(network, SHAPE, width=width, weight=weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    return PspStep(module, optimizer, width=width, weight=weight, head="fc", **recipe)


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("make", [plain, psp])
def test_a_step_has_the_interface_of_train_steps(make: Any) -> None:
    step: TrainStep = make(resnet(), signals=("entropy",))
    images, targets_B, weights_B = batch()
    assert step.parts[0] == "model"
    assert step.relative_cost() == step.relative_cost("model") == 1.0
    trained = step(images, targets_B, weights_B)
    assert set(trained) == {"loss", "correct", "entropy"}
    for part in step.parts:
        assert set(step.evaluate(images, targets_B, smoothed=False, part=part)) == {"loss", "correct"}
        signals = step.evaluate(images, targets_B, smoothed=False, part=part, signals=("boundary", "loss"))
        assert set(signals) == {"loss", "correct", "boundary"}
        assert signals["boundary"].shape == (8,)
    hint = closest("proxi", step.parts)
    assert all(part in hint for part in step.parts)
    for call in (step.relative_cost, lambda part: step.evaluate(images, targets_B, smoothed=False, part=part)):
        with pytest.raises(ValueError, match=re.escape(f"unknown part 'proxi' of the train step: {hint}")):
            call("proxi")
    stored = io.BytesIO()
    torch.save(step.state_dict(), stored)
    stored.seek(0)
    step.load_state_dict(torch.load(stored, weights_only=True))
    with pytest.raises(ValueError, match="the state is of another train step"):
        step.load_state_dict({"else": torch.zeros(1)})


@dataclass(frozen=True)
class NoisyOptions(StepOptions):
    """Options of a step of the user's own."""

    noise: float = 0.5

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ConfigError("train.step.noise must be at least 0")


class Noisy(PlainStep):
    """A step of the user's own."""

    options_class = NoisyOptions


class NoOptions(PlainStep):
    """A step that only methods name."""

    options_class = None


def test_steps_are_found_by_reference_with_their_options() -> None:
    reference = f"{__name__}:Noisy"
    assert step_class(reference) is Noisy
    assert step_config(reference) == {"name": reference, "noise": 0.5}
    assert step_config({"name": reference, "noise": 2}) == {"name": reference, "noise": 2}
    for step, message in (
        ({"name": reference, "nois": 1}, r"unknown key 'train.step.nois' of train step .*did you mean 'noise'\?"),
        ({"name": reference, "noise": "loud"}, "train.step.noise = 'loud'"),
        ({"name": reference, "noise": -1}, "train.step.noise must be at least 0"),
        (f"{__name__}:NoOptions", "is not a train step with options: subclass rayprune.nn.steps.PlainStep"),
        (f"{__name__}:resnet", "is not a train step with options"),
        (f"{__name__}:Nosy", "has no 'Nosy': did you mean 'Noisy'"),
    ):
        with pytest.raises(ValueError, match=message):
            step_config(step)
    for name, message in ((f"{__name__}:resnet", "is not a subclass of"), ("plan", r"did you mean 'plain'\?")):
        with pytest.raises(ValueError, match=message):
            step_class(name)


def test_a_registered_step_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STEPS", dict(STEPS))
    monkeypatch.setitem(STEP_OPTIONS, "noisy", PlainStep)  # so that what the registration adds ends with the test
    del STEP_OPTIONS["noisy"]
    assert register_step("noisy")(Noisy) is Noisy
    assert step_class("noisy") is Noisy
    assert step_config("noisy") == {"name": "noisy", "noise": 0.5}
    assert register_step("silent")(NoOptions) is NoOptions
    assert step_class("silent") is NoOptions
    with pytest.raises(ValueError, match=r"unknown train\.step 'silent'"):
        step_config("silent")
    with pytest.raises(ValueError, match="'plain' is registered twice, by PlainStep and Noisy: rename one"):
        register_step("plain")(Noisy)


def test_steps_are_found_by_name() -> None:
    assert {"plain", "psp", "exits", "l2w", "embed", "in_batch"} == STEPS.keys()
    assert (step_class("plain"), step_class("psp"), step_class("l2w")) == (PlainStep, PspStep, L2wStep)
    assert {name for name, step in STEPS.items() if step.options_class is not None} == STEP_OPTIONS.keys()
    assert {name: step.options_class for name, step in STEPS.items() if name in STEP_OPTIONS} == STEP_OPTIONS
    assert {name for name, step in STEPS.items() if step.multi_exit} == {"exits", "l2w"}
    assert {name for name, step in STEPS.items() if step.compilable} == {"plain", "exits"}
    network = mlp()
    assert STEPS["plain"].module_of(network, SHAPE) is network


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_an_evaluation_is_in_eval_mode_and_changes_nothing(smoothing: float) -> None:
    network = resnet()
    step = plain(network, label_smoothing=smoothing)
    images, targets_B, _ = batch()
    network(images)  # statistics that a batch would not have
    before = copy.deepcopy(network.state_dict())
    for smoothed in (False, True):
        network.train()
        signals = step.evaluate(images, targets_B, smoothed=smoothed)
        logits = network.eval()(images)
        expected = per_sample_loss(logits, targets_B, label_smoothing=smoothing if smoothed else 0.0)
        assert torch.equal(signals["loss"], expected)
        assert torch.equal(signals["correct"], (logits.argmax(1) == targets_B).float())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_step_sets_the_mode_even_after_others_change_it() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[2].eval()  # the first step ends it, like model.train() in a plain loop
    step = PlainStep(network, torch.optim.SGD(network.parameters(), lr=0.1))
    batch = torch.rand(6, 4), torch.arange(6) % 4
    step(*batch, torch.ones(6))
    assert network[2].training
    network.eval()  # someone evaluates the network between steps
    step(*batch, torch.ones(6))
    assert network[2].training
    step.evaluate(*batch, smoothed=False)
    assert not network[2].training
    step(*batch, torch.ones(6))
    assert network[2].training


def test_boundaries_belong_to_the_weights_that_gave_the_logits() -> None:
    network = resnet()
    step = plain(network, signals=("boundary",))
    images, targets_B, weights_B = batch()
    for _ in range(3):
        twin = copy.deepcopy(network).train()
        distances = pair_distances(twin.fc.weight)
        boundary = step(images, targets_B, weights_B)["boundary"]
        torch.testing.assert_close(boundary, boundary_distance(twin(images), distances), rtol=1e-5, atol=1e-6)
        assert not torch.equal(pair_distances(network.fc.weight), distances)
    with pytest.raises(ValueError, match=r"give a train step head=last_linear"):
        PlainStep(network, step.optimizer).evaluate(images, targets_B, smoothed=False, signals=BOUNDARY_SIGNALS)


def test_the_losses_of_network_and_proxy_add_up_in_one_step() -> None:
    images, targets_B, weights_B = batch()
    network = resnet()
    step = psp(network, weight=0.5, label_smoothing=0.1, signals=("entropy",))
    reference = resnet()
    proxy = Proxy(reference, 0.5, SHAPE)
    signals = step(images, targets_B, weights_B)
    logits = reference.train()(images)
    total = torch.zeros(())
    for factor, outputs in ((1.0, logits), (0.5, proxy(images))):
        losses_B = functional.cross_entropy(outputs, targets_B, reduction="none", label_smoothing=0.1)
        total = total + factor * (losses_B * weights_B).sum() / len(targets_B)
    total.backward()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.detach(), theirs.detach() - 0.1 * theirs.grad, rtol=1e-5, atol=1e-6)
    # The signals are the whole network's, and each network has its own statistics of this batch.
    torch.testing.assert_close(signals["entropy"], torch.special.entr(logits.softmax(1)).sum(1), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), reference.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step.buffers(), proxy.buffers(), strict=True))
    assert len(list(step.buffers())) == len(list(proxy.buffers())) > 0


@pytest.mark.parametrize("make", [plain, psp])
def test_micro_batches_add_up_and_gradients_are_clipped(make: Any) -> None:
    images, targets_B, weights_B = batch()
    whole, parts = mlp().double(), mlp().double()
    make(whole, lr=0.0)(images.double(), targets_B, weights_B.double())
    make(parts, lr=0.0, accumulate=4)(images.double(), targets_B, weights_B.double())
    for one, other in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    norm = torch.stack([gradient.norm() for gradient in gradients(whole)]).norm().item()
    make(parts, lr=0.0, clip_norm=norm / 2)(images.double(), targets_B, weights_B.double())
    for one, other in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(one / 2, other, rtol=1e-5, atol=1e-9)


def test_the_proxy_is_evaluated_with_its_own_statistics_and_head() -> None:
    network = resnet()
    step = psp(network)
    images, targets_B, _ = batch()
    for seed in range(3):
        step(*batch(seed=seed))
    signals = step.evaluate(images, targets_B, smoothed=False, signals=("boundary", "probs"), part="proxy")
    proxy = step.model.proxy
    network.eval()
    with torch.no_grad():
        logits = proxy(images)
    assert torch.equal(signals["probs"], logits.softmax(1))
    boundary = boundary_distance(logits, pair_distances(network.fc.weight[:, : proxy.head_features]))
    assert torch.equal(signals["boundary"], boundary)
    assert not torch.allclose(boundary, boundary_distance(logits, pair_distances(network.fc.weight)))
    whole = step.evaluate(images, targets_B, smoothed=False, signals=("probs",))
    assert torch.equal(whole["probs"], network(images).softmax(1).detach())
    assert not torch.allclose(whole["probs"], signals["probs"])


def test_a_restored_step_continues_identically() -> None:
    network, other = resnet(), resnet()
    step, restored = psp(network), psp(other)
    step(*batch())
    images, targets_B, _ = batch()
    before = restored.evaluate(images, targets_B, smoothed=False, part="proxy")
    other.load_state_dict(network.state_dict())
    restored.load_state_dict(copy.deepcopy(step.state_dict()))
    after = restored.evaluate(images, targets_B, smoothed=False, part="proxy")
    assert torch.equal(after["loss"], step.evaluate(images, targets_B, smoothed=False, part="proxy")["loss"])
    assert not torch.equal(after["loss"], before["loss"])
    for _ in range(2):
        step(*batch()), restored(*batch())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step.buffers(), restored.buffers(), strict=True))
    # The network's own checkpoint is that of a network trained without a proxy.
    assert network.state_dict().keys() == resnet().state_dict().keys()


def test_costs_count_the_proxy() -> None:
    step = psp(resnet())
    assert isinstance(step.model, WithProxy)
    assert step.relative_cost("proxy") == step.model.mac_ratio
    assert 0.2 < step.relative_cost("proxy") < 0.3
    assert step.train_cost == 1.0 + step.relative_cost("proxy")
    assert plain(resnet()).train_cost == 1.0
    assert psp(resnet(), width=1.0).relative_cost("proxy") == 1.0


def test_mixed_precision_trains_network_and_proxy() -> None:
    network = resnet()
    step = psp(network, autocast=torch.bfloat16, signals=("boundary",))
    images, targets_B, weights_B = batch()
    losses = [step(images, targets_B, weights_B)["loss"] for _ in range(12)]
    assert losses[0].dtype == torch.float32
    assert (losses[-1] * weights_B).sum() < 0.7 * (losses[0] * weights_B).sum()
    signals = step.evaluate(images, targets_B, smoothed=True, signals=("boundary",), part="proxy")
    assert signals["boundary"].isfinite().all()


@pytest.mark.parametrize("make", [plain, psp])
@pytest.mark.parametrize("compiled", [False, True])
def test_boundaries_under_autocast_do_not_tie(make: Any, compiled: bool) -> None:
    network = build_model("mlp", num_classes=CLASSES, input_shape=SHAPE, hidden=(64,))
    images, targets_B, _ = batch(512)
    step = make(network, autocast=torch.bfloat16)
    part = step.parts[-1]
    exact = make(network).evaluate(images, targets_B, smoothed=True, signals=("boundary",), part=part)["boundary"]
    if compiled:
        network.compile(backend="eager")
        step.evaluate(images, targets_B, smoothed=True, part=part)
    mixed = step.evaluate(images, targets_B, smoothed=True, signals=("boundary",), part=part)["boundary"]
    assert mixed.unique().numel() > 500
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.01)
    assert not torch.equal(mixed, exact), "the layers before the last one still run in bf16"
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images).dtype == torch.bfloat16, "the hook has been removed"


@pytest.mark.parametrize(("options", "message"), [({"weight": 0.0}, "must be above 0"), ({"width": 0.0}, "must be in")])
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        psp(mlp(), **options)


def one_rank(rank: int, folder: str) -> None:
    """Take two steps on this rank's half of a batch, in two micro-batches, and save gradients and parameters."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = mlp()
    module = PspStep.module_of(network, SHAPE, width=0.5, weight=0.7)
    wrapped = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    step = PspStep(wrapped, optimizer, width=0.5, weight=0.7, accumulate=2)
    rows = slice(4 * rank, 4 * rank + 4)
    for seed in range(2):
        step(*(tensor[rows] for tensor in batch(seed=seed)))
    torch.save((gradients(network), list(network.parameters())), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_take_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    network = mlp()
    step = psp(network, weight=0.7)
    for seed in range(2):
        step(*batch(seed=seed))
    for rank in range(2):
        rank_gradients, parameters = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, theirs in zip(rank_gradients, gradients(network), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(parameters, network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
