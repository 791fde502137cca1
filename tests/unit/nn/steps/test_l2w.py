"""The L2W-DEN step beyond the golden traces: its gradient, padding, pruning, state, ranks, and refused settings."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.train.driver import train
from rayprune.nn.models import build_model
from rayprune.nn.steps import ExitStep, L2wStep
from rayprune.nn.steps.l2w import allocate_exits, exit_counts, exit_distribution, meta_loss
from tests.support.l2w_trace import L2wTrace
from tests.support.multi_exit_models import tower
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import assert_same_run, run_config, scores_of, user

SHAPE, CLASSES = (5,), 4
NEGATIVE = {"input": "both", "epsilon": 3.0, "hidden": 8, "meta_lr": 0.05}


class Dropped(nn.Module):
    """Drop features before the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Any:
        return self.network(torch.dropout(inputs, 0.3, self.training))


def network(double: bool = True, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return tower(num_classes=CLASSES, input_shape=SHAPE, double=double, norm=norm)


def batch(rows: int = 9, seed: int = 1, double: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    inputs = torch.randn(rows, *SHAPE, generator=generator, dtype=dtype)
    return inputs, torch.randint(CLASSES, (rows,), generator=generator), torch.ones(rows)


def l2w(model: nn.Module, sgd: dict[str, Any] | None = None, **options: Any) -> L2wStep:
    settings = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3, **(sgd or {})}
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    return L2wStep(model, optimizer, num_exits=3, seed=5, **{"hidden": 8, "meta_lr": 0.05, **options})


def state(step: L2wStep) -> list[Tensor]:
    nets = [*step.model.state_dict().values(), *step.weight_net.state_dict().values()]
    return [tensor.clone() for tensor in nets]


class Convolutions(nn.Module):
    """Three exits on images, with the layers common in such networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.pools = nn.ModuleList([nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)])
        self.heads = nn.ModuleList([nn.Linear(64, CLASSES), nn.Linear(4, CLASSES), nn.Linear(8, CLASSES)])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of three exits."""
        early = self.first(images)
        late = self.second(early)
        pooled = [self.pools[0](early), self.pools[1](late)]
        both = torch.cat([pooled[0].mean((2, 3)), pooled[1].mean((2, 3))], dim=1)
        features = [pooled[0].flatten(1), pooled[1].mean((2, 3)), both]
        return [head(each) for head, each in zip(self.heads, features, strict=True)]


def train_on_images(model: nn.Module, **options: Any) -> list[Tensor]:
    """Take two L2W steps on images; return the parameters and buffers of the network and the weight network."""
    step = l2w(model.double().to(memory_format=torch.channels_last), **options)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(7, 3, 8, 8, generator=generator, dtype=torch.float64)
        step(images, torch.randint(CLASSES, (7,), generator=generator), torch.ones(7))
    return state(step)


@pytest.mark.parametrize("kind", ["convolutions", "gradient equilibrium"])
def test_the_gradient_of_a_convolutional_network_in_channels_last(kind: str) -> None:
    ends = []
    for gradient in ("jvp", "second_order"):
        torch.manual_seed(0)
        model: nn.Module = Convolutions()
        if kind == "gradient equilibrium":
            small = {"num_blocks": 3, "channels": 4, "growth_rate": 2, "gradient_equilibrium": True}
            model = build_model("msdnet", num_classes=CLASSES, input_shape=(3, 8, 8), **small)
        ends.append(train_on_images(model, gradient=gradient, normalise="mat"))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "nesterov": ({"nesterov": True}, {"normalise": "mat"}),
    "no momentum": ({"momentum": 0.0}, {"normalise": "row"}),
    "negative": ({}, NEGATIVE),
    "nonnegative": ({}, {**NEGATIVE, "nonnegative": True}),
    "clipped, smoothed": ({}, {"clip_norm": 0.1, "label_smoothing": 0.1, "layers": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_mode_gradient_equals_the_double_backward_one(variant: str) -> None:
    sgd, options = VARIANTS[variant]
    ends, gradients = [], []
    for gradient in ("jvp", "second_order"):
        torch.manual_seed(3)
        step = l2w(Dropped(network()), sgd, gradient=gradient, **options)
        trace = L2wTrace(step)
        for seed in range(2):
            inputs, targets, weights = batch(seed=seed)
            weights[:] = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 3.0, 1.0, 0.0])
            step(inputs, targets, weights)
        ends.append(state(step))
        gradients.append([half["meta_grad"] for half in trace.halves])
    for ours, theirs in zip(gradients[0], gradients[1], strict=True):
        assert any(gradient.abs().max() > 1e-6 for gradient in ours.values())
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_gradient_is_the_slope_of_the_meta_loss_after_real_steps(nesterov: bool) -> None:
    """Compare it with differences of the meta loss after real SGD steps with perturbed weights, momentum included."""
    step = l2w(network(norm=False), {"nesterov": nesterov}, normalise="mat")
    step(*batch())
    before = copy.deepcopy(step)
    inputs, targets, _ = batch(seed=2)
    trace = L2wTrace(step)
    step(inputs, targets, torch.ones(9))
    half, nudge = trace.halves[0], 1e-6

    def after(shift: float) -> float:
        twin = copy.deepcopy(before)
        with torch.no_grad():
            twin.weight_net.output.bias[1] += shift
            losses = twin._losses(twin._logits(twin.model(inputs[:5])), targets[:5], 0.0).T
            raw = twin.weight_net(losses)
            weights = 1 + twin.options.epsilon * (raw - raw.mean())
        twin.optimizer.zero_grad()
        losses = twin._losses(twin._logits(twin.model(inputs[:5])), targets[:5], 0.0).T
        ((losses * weights).sum() / 5).backward()
        twin.optimizer.step()
        with torch.no_grad():
            moved = twin._losses(twin._logits(twin.model(inputs[5:])), targets[5:], 0.0).T
        return float(meta_loss(moved, half["exits"], exit_counts(half["exits"], 3)))

    slope = (after(nudge) - after(-nudge)) / (2 * nudge)
    assert float(half["meta_grad"]["output.bias"][1]) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("interval", [1, 100])
def test_running_statistics_are_updated_once_per_half(interval: int) -> None:
    step = l2w(network(), meta_interval=interval, epsilon=0.0)
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    exits = ExitStep(plain, optimizer, num_exits=3)
    inputs, targets, weights = batch()
    step(inputs, targets, weights)
    for rows in (slice(0, 5), slice(5, 9)):
        exits(inputs[rows], targets[rows], weights[rows])
    for ours, theirs in zip(step.model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert int(step.model.norms[0].num_batches_tracked) == 2


def test_padding_counts_nowhere() -> None:
    """Without batch statistics, the contents of rows at weight 0 change nothing."""
    inputs, targets, _ = batch(8)
    ends = []
    for fill in (0.0, 7.0):
        step = l2w(network(norm=False), normalise="row")
        weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
        trace = L2wTrace(step)
        signals = step(torch.where(weights[:, None] > 0, inputs, fill), targets, weights)
        ends.append(state(step))
        assert [half["exits"].tolist().count(-1) for half in trace.halves] == [2, 1]
        real = torch.stack([signals[f"weight_exit_{k}"] for k in (1, 2, 3)], 1)[weights > 0]
        torch.testing.assert_close(real[:3].mean(0), torch.ones(3))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_a_half_of_padding_alone_makes_no_step() -> None:
    inputs, targets, _ = batch(8)
    step = l2w(network())
    trace = L2wTrace(step)
    before = [parameter.clone() for parameter in step.weight_net.parameters()]
    signals = step(inputs, targets, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert len(trace.halves) == 1
    assert "meta_loss" not in trace.halves[0]
    assert all(torch.equal(a, b) for a, b in zip(before, step.weight_net.parameters(), strict=True))
    assert all(value.shape[0] == 8 for value in signals.values())
    one = l2w(network(norm=False))(*(tensor[:1] for tensor in batch()))
    assert one["loss"].shape == (1,)


def test_an_exit_without_meta_rows_is_left_out() -> None:
    step = l2w(network(norm=False), p=1)
    trace = L2wTrace(step)
    step(*batch(6))
    assert exit_counts(trace.halves[0]["exits"], 3).tolist() == [2, 0, 1]
    assert torch.isfinite(trace.halves[0]["meta_loss"])


def test_the_pruners_factor_multiplies_the_normalized_weights() -> None:
    inputs, targets, _ = batch(8)
    factors = torch.tensor([1.0, 2.0, 1.0, 4.0, 1.0, 1.0, 2.0, 1.0])
    step = l2w(network(norm=False), normalise="row", meta_interval=100)
    trace = L2wTrace(step)
    step._batches = 1
    signals = step(inputs, targets, factors)
    torch.testing.assert_close(signals["weight_exit_1"][:4].mean(), torch.ones(()))
    half = trace.halves[0]
    torch.testing.assert_close(half["loss"], (half["losses"] * half["weights"] * factors[:4, None]).sum() / 4)


def test_rows_of_the_unpruned_stream_replace_the_other_half() -> None:
    inputs, targets, weights = batch(8)
    ends = []
    for meta in (None, (inputs, targets), batch(12, seed=4)[:2]):
        step = l2w(network())
        step(inputs, targets, weights, meta=meta)
        ends.append(state(step))
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], ends[2], strict=True))


def test_a_restored_step_continues_bit_for_bit() -> None:
    one = l2w(network(), meta_interval=2)
    for seed in range(3):
        one(*batch(seed=seed))
    stored = io.BytesIO()
    torch.save((one.model.state_dict(), one.optimizer.state_dict(), one.state_dict()), stored)
    stored.seek(0)
    model, optimizer, own = torch.load(stored, weights_only=True)
    other = l2w(network(), meta_interval=2)
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    other.load_state_dict(own)
    for seed in range(3, 6):
        one(*batch(seed=seed))
        other(*batch(seed=seed))
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))
    with pytest.raises(ValueError, match="the state is of another train step"):
        other.load_state_dict({})


def test_mixed_precision_trains() -> None:
    step = l2w(network(double=False), autocast=torch.bfloat16)
    wide = l2w(network(double=False))
    signals, expected = step(*batch(double=False)), wide(*batch(double=False))
    assert signals["loss"].dtype == torch.float32
    for name in ("loss", "weight_exit_1"):
        torch.testing.assert_close(signals[name], expected[name], rtol=0.1, atol=0.1)


def test_a_step_with_learning_costs_11_thirds_of_a_plain_one() -> None:
    step = l2w(network())
    assert step.train_cost + step.meta_cost == pytest.approx(11 / 3)


def test_an_evaluation_returns_weights_on_request() -> None:
    step = l2w(network(), signals=("confidence", "weight_exit_1", "weight_exit_2", "weight_exit_3"))
    inputs, targets, _ = batch()
    names = ("weight_exit_1", "weight_exit_2", "weight_exit_3")
    signals = step.evaluate(inputs, targets, smoothed=True, signals=names)
    torch.testing.assert_close(torch.stack([signals[name] for name in names]).mean(0), torch.ones(9))
    assert "weight_exit_1" not in step.evaluate(inputs, targets, smoothed=False)


def test_another_optimizer_and_micro_batches_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"set optim\.name=sgd"):
        L2wStep(model, torch.optim.AdamW(model.parameters()), num_exits=3)
    with pytest.raises(ValueError, match=r"set train\.accumulate=1 instead of 2"):
        l2w(model, accumulate=2)


def test_rows_leave_as_the_paper_allocates() -> None:
    step = l2w(network())
    trace = L2wTrace(step)
    step(*batch())
    confidences = trace.halves[0]["meta_confidences"]
    expected = allocate_exits(confidences, torch.ones(len(confidences), dtype=torch.bool), exit_distribution(15, 3))
    assert trace.halves[0]["exits"].tolist() == expected.tolist()


def l2w_config(
    tmp_path: Path, name: str, *, method: Any = None, model: Any = None, run: Any = None, **train: Any
) -> Any:
    step = {"name": "l2w", "hidden": 16, "meta_lr": 1e-2, "meta_interval": 2}
    return run_config(
        tmp_path,
        name,
        model=model or {"name": f"{MULTI_EXIT_MODELS}:tower"},
        method=method or {"name": "infobatch"},
        run=run or {},
        train={"step": step, "epochs": 3, "record": ["el2n"], **train},
    )


def test_a_run_records_weights_and_continues_as_if_uninterrupted(tmp_path: Path) -> None:
    notices: list[str] = []
    whole = train(l2w_config(tmp_path, "whole"), on_notice=notices.append)
    assert any("allows weights from -0.07 to 2.07" in line for line in notices)
    table = scores_of(whole.folder)
    means = table[[f"weight_exit_{k}_mean" for k in (1, 2, 3)]].to_numpy()
    assert abs(means.mean(axis=1) - 1.0).max() < 1e-5
    assert means.std() > 1e-4
    assert whole.metrics[-1]["compute"] > 2 * whole.metrics[-1]["samples_trained"]
    train(l2w_config(tmp_path, "parts", stop_after=1))
    parts = train(l2w_config(tmp_path, "parts"))
    assert_same_run(whole, parts)


def test_a_run_that_ends_inside_an_epoch_continues_as_if_uninterrupted(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    run = {"max_failures": 0, "checkpoint_steps": 4}
    model = {"name": f"{MULTI_EXIT_MODELS}:fails_once", "marker": str(marker), "passes": 62}
    config = l2w_config(tmp_path, "parts", model=model, run=run)
    with pytest.raises(Exception, match="on purpose"):
        train(config)
    epoch, step = newest_position(tmp_path / "parts")
    assert epoch > 0
    assert step > 0
    parts = train(config)
    assert_same_run(train(l2w_config(tmp_path, "whole", model=model, run=run)), parts)


def test_trained_and_forward_only_samples_get_weights(tmp_path: Path) -> None:
    config = l2w_config(tmp_path, "pruned", method={"name": user("LowerHalf"), "weight": 2.0, "looks": 40})
    result = train(config)
    assert result.metrics[-1]["samples_forwarded"] == 40
    means = scores_of(result.folder)[[f"weight_exit_{k}_mean" for k in (1, 2, 3)]].to_numpy()
    assert abs(means.mean(axis=1) - 1.0).max() < 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one tensor": ({"train": {"step": "l2w"}}, "train.step l2w is for a network with several exits"),
    "p": ({"train": {"step": {"name": "l2w", "p": 40}}}, r"train.step.p = 40: must be in 1..39"),
    "adamw": (
        {"train": {"step": "l2w"}, "optim": {"name": "adamw"}, "model": {"name": f"{MULTI_EXIT_MODELS}:tower"}},
        "set optim.name=sgd",
    ),
    "micro-batches": (
        {"train": {"step": "l2w", "accumulate": 2}, "model": {"name": f"{MULTI_EXIT_MODELS}:tower"}},
        "set train.accumulate=1",
    ),
    "a batch of one": (
        {"train": {"step": "l2w", "batch_size": 1}, "model": {"name": f"{MULTI_EXIT_MODELS}:tower"}},
        r"train.batch_size 1 cannot give each of 1 worker\(s\) two halves",
    ),
    "halves of one row": (
        {"train": {"step": "l2w", "batch_size": 3}, "model": {"name": f"{MULTI_EXIT_MODELS}:tower"}},
        "use at least train.batch_size=4",
    ),
    "different classes": (
        {"train": {"step": "l2w"}, "model": {"name": f"{MULTI_EXIT_MODELS}:of_different_classes"}},
        "all must return logits",
    ),
    "an option": ({"train": {"step": {"name": "l2w", "metalr": 1.0}}}, "did you mean 'meta_lr'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_train_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    sections, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as caught:
        train(run_config(tmp_path, **sections))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def one_rank(rank: int, folder: str) -> None:
    """Take three steps on this rank's half of each batch in either scope, and save parameters, weights and exits."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for scope in ("local", "global"):
        for normalise in ("mat", "col"):
            module = network(norm=False)
            wrapped = nn.parallel.DistributedDataParallel(module)
            step = l2w(wrapped, scope=scope, normalise=normalise)
            trace = L2wTrace(step)
            for seed in range(3):
                tensors = shared_batch(seed)
                step(*(tensor[8 * rank : 8 * rank + 8] for tensor in tensors))
            halves = [{key: half[key] for key in ("weights", "exits") if key in half} for half in trace.halves]
            nets = (list(module.parameters()), list(step.weight_net.parameters()))
            torch.save((*nets, halves), f"{folder}/{scope}{normalise}{rank}.pt")
    torch.distributed.destroy_process_group()


def shared_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return 16 rows; in the last batch, the second half of the second rank's rows is padding."""
    inputs, targets, weights = batch(16, seed=seed)
    if seed == 2:
        weights[12:] = 0.0
    return inputs, targets, weights


def in_global_order(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Order the rows so that the halves of one process are those of two ranks."""
    order = torch.tensor([*range(4), *range(8, 12), *range(4, 8), *range(12, 16)])
    return tuple(tensor[order] for tensor in tensors)


def by_rank(seeds: int, normalise: str) -> tuple[nn.Module, L2wStep]:
    """Reproduce two ranks in scope local in one process: average both ranks' gradients and step once."""
    steps = [l2w(network(norm=False), normalise=normalise) for _ in range(2)]
    for seed in range(seeds):
        batches = [tuple(tensor[8 * rank : 8 * rank + 8] for tensor in shared_batch(seed)) for rank in range(2)]
        for index in range(2):
            _local_half(steps, batches, index)
    return steps[0].model, steps[0]


def _local_half(steps: list[L2wStep], batches: list[tuple[Tensor, ...]], index: int) -> None:
    train_rows = slice(4 * index, 4 * index + 4)
    meta_rows = slice(4 - 4 * index, 8 - 4 * index)
    meta_gradients, losses = [], []
    for step, (inputs, targets, factors) in zip(steps, batches, strict=True):
        real, meta_real = factors[train_rows] > 0, factors[meta_rows] > 0
        losses.append(step._losses(step._logits(step.model(inputs[train_rows])), targets[train_rows], 0.0).T)
        if not (real.any() and meta_real.any()):
            continue
        raw = step.weight_net(losses[-1].detach())
        # Halves are all real or all padding, so the mean leaves no row out.
        raw_mean = raw.mean() if step.options.normalise == "mat" else raw.mean(dim=1, keepdim=True)
        weights = 1 + step.options.epsilon * (raw - raw_mean)
        named = dict(step.model.named_parameters())
        pseudo = torch.autograd.grad((losses[-1] * weights).sum() / 4, list(named.values()), create_graph=True)
        moved = {}
        for (name, parameter), gradient in zip(named.items(), pseudo, strict=True):
            buffer = step.optimizer.state[parameter].get("momentum_buffer", 0.0)
            moved[name] = parameter.detach() - 0.2 * (0.9 * buffer + gradient + 1e-3 * parameter.detach())
        logits = step._logits(torch.func.functional_call(step.model, moved, (inputs[meta_rows],)))
        confidences = logits.detach().softmax(2).amax(2).T
        exits = allocate_exits(confidences, meta_real, exit_distribution(15, 3))
        value = meta_loss(step._losses(logits, targets[meta_rows], 0.0).T, exits, exit_counts(exits, 3))
        meta_gradients.append(torch.autograd.grad(value, list(step.weight_net.parameters()), retain_graph=True))
    for step in steps:
        for position, parameter in enumerate(step.weight_net.parameters()):
            parameter.grad = torch.stack([each[position] for each in meta_gradients]).mean(0)
        step.meta_optimizer.step()
    gradients = []
    for step, loss, (_, _, factors) in zip(steps, losses, batches, strict=True):
        real = factors[train_rows] > 0
        with torch.no_grad():
            weights = step._weights(step.weight_net(loss.detach()), real)
        total = (loss * weights * factors[train_rows][:, None]).sum() / 4
        gradients.append(torch.autograd.grad(total, list(step.model.parameters())))
    for step in steps:
        for position, parameter in enumerate(step.model.parameters()):
            parameter.grad = torch.stack([each[position] for each in gradients]).mean(0)
        step.optimizer.step()


def test_two_ranks_share_one_batch_or_learn_from_their_own(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for normalise in ("mat", "col"):
        together = l2w(network(norm=False), scope="global", normalise=normalise)
        trace = L2wTrace(together)
        for seed in range(3):
            together(*in_global_order(shared_batch(seed)))
        apart, lone = by_rank(3, normalise)
        for rank in range(2):
            for scope, model, step in (("global", together.model, together), ("local", apart, lone)):
                parameters, net, halves = torch.load(tmp_path / f"{scope}{normalise}{rank}.pt", weights_only=True)
                for ours, theirs in zip(net, step.weight_net.parameters(), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
                for ours, theirs in zip(parameters, model.parameters(), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
                if scope == "global":
                    rows = slice(4 * rank, 4 * rank + 4)
                    for half, whole in zip(halves, trace.halves, strict=True):
                        torch.testing.assert_close(half["weights"], whole["weights"][rows])
                        assert half["exits"].tolist() == whole["exits"][rows].tolist()
    assert torch.isfinite(torch.cat([parameter.flatten() for parameter in apart.parameters()])).all()
