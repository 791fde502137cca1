"""The step that picks inside batches: what it trains on, statistics, padding, state, and one to three ranks.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rayprune.core.bases.in_batch import BatchContext, InBatchMethod, Picked, StepContext, num_picked
from rayprune.core.table import Signals
from rayprune.methods import build_method
from rayprune.nn.models import build_model
from rayprune.nn.steps import BatchPlace, InBatchStep, PlainStep, RowCounts

SHAPE, CLASSES, NUM = (3, 4, 4), 3, 100
RATE = 0.1


@dataclass(frozen=True)
class Highest(InBatchMethod):
    """Pick the highest losses, with weights 2, 3, … from the lowest row on."""

    keep: float = 0.5
    weighted: bool = False

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        rows = np.sort(np.argsort(-signals["loss"], kind="stable")[: num_picked(self.keep, context.num_rows)])
        return rows, np.arange(2.0, 2.0 + rows.size) if self.weighted else None


@dataclass(frozen=True)
class Given(InBatchMethod):
    """Pick the rows of the given ids."""

    ids: tuple[int, ...] = ()

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        return np.flatnonzero(np.isin(context.ids, self.ids)), None


@dataclass(frozen=True)
class TrainMode(Highest):
    """Score in train mode."""

    candidates_in_eval_mode = False


@dataclass(frozen=True)
class Counting(Highest):
    """Count the visits of each sample; every second step is plain."""

    def picks(self, context: StepContext) -> bool:
        return context.step % 2 == 0

    def state_columns(self, num_samples: int) -> Mapping[str, float]:
        return {"visits": 0.5, "last": -1.0}

    def update(self, signals: Signals, context: BatchContext) -> Mapping[str, NDArray[Any]]:
        return {"visits": context.columns["visits"] + 1, "last": signals["loss"]}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return build_model("mlp", num_classes=CLASSES, input_shape=SHAPE, hidden=(12, 8)).double()


def normed() -> nn.Module:
    """Return a network with batch normalization of features, which refuses to train on one row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()


def step_of(network: nn.Module, method: InBatchMethod, **options: Any) -> InBatchStep:
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
    return InBatchStep(network, optimizer, method=method, **{"num_epochs": 4, "num_samples": NUM, **options})


def batch(rows: int = 12, seed: int = 1, padding: int = 0) -> tuple[Tensor, Tensor, Tensor, NDArray[np.int64]]:
    """Return inputs, targets, weights (0 for the last rows) and ids; batches of 12 share none for seeds 0 to 7."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, *SHAPE, generator=generator, dtype=torch.float64)
    weights_B = torch.ones(rows)
    weights_B[rows - padding :] = 0.0
    ids = np.roll(np.random.default_rng(0).permutation(NUM), -12 * seed)[:rows]
    return inputs, torch.randint(CLASSES, (rows,), generator=generator), weights_B, ids


def take(train: InBatchStep, parts: Any, rows: slice = slice(None), **place: Any) -> dict[str, Tensor]:
    """Take a step on some rows of a batch."""
    inputs, targets_B, weights_B, ids = (part[rows] for part in parts)
    real = weights_B.numpy() > 0
    where = {"epoch": 0, "step": 0, "num_steps": 10, **place}
    return train(inputs, targets_B, weights_B, BatchPlace(**where, ids=torch.from_numpy(ids), real=real))


def losses_of(network: nn.Module, parts: Any) -> Tensor:
    return functional.cross_entropy(network(parts[0]), parts[1], reduction="none")


def same_parameters(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


def reference_step(network: nn.Module, parts: Any, picked: list[int], weights: list[float], divisor: float) -> None:
    """Take one step of plain SGD on the picked rows."""
    network.train()
    losses = losses_of(network, [part[picked] for part in parts])
    ((losses * torch.tensor(weights)).sum() / divisor).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= RATE * parameter.grad


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_on_the_picked_rows_alone(accumulate: int) -> None:
    network, reference, parts = mlp(), mlp(), batch()
    parts[2][:] = torch.arange(1.0, 13.0)
    expected = losses_of(reference, parts).detach()
    picked = sorted(expected.argsort(descending=True)[:6].tolist())
    by_id = np.argsort(np.argsort(parts[3][picked])) + 2.0  # the method sees the rows in the order of their ids
    step = step_of(network, Highest(weighted=True), accumulate=accumulate)
    signals = take(step, parts)
    assert set(signals) == {"loss", "correct", "picked"}
    torch.testing.assert_close(signals["loss"], expected.float())
    assert signals["picked"].nonzero().flatten().tolist() == picked
    reference_step(reference, parts, picked, (by_id * parts[2][picked].numpy()).tolist(), 6)
    same_parameters(network, reference)
    assert step.row_counts(12, 12) == RowCounts(6, 0, 12)


@pytest.mark.parametrize("padding", [0, 5])
def test_picking_every_row_is_the_plain_step(padding: int) -> None:
    network, plain, parts = mlp(), mlp(), batch(padding=padding)
    reference = PlainStep(plain, torch.optim.SGD(plain.parameters(), lr=RATE, momentum=0.9))
    step = step_of(network, Highest(keep=1.0))
    for _ in range(3):
        picked, expected = take(step, parts), reference(*parts[:3])
        torch.testing.assert_close(picked["loss"][: 12 - padding], expected["loss"][: 12 - padding])
    same_parameters(network, plain)


@pytest.mark.parametrize("method", [Highest(), TrainMode()])
def test_padding_is_neither_scored_nor_trained_on(method: InBatchMethod) -> None:
    parts, seen = batch(padding=5), list[Tensor]()
    parts[0][7:] = torch.nan
    network = normed()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    step = step_of(network, method)
    signals = take(step, parts)
    assert [len(inputs) for inputs in seen] == [7, 4]
    assert not any(inputs.isnan().any() for inputs in seen)
    assert signals["picked"][7:].sum() == signals["loss"][7:].sum() == 0
    assert step.row_counts(7, 12) == RowCounts(4, 0, 7)


@pytest.mark.parametrize("method", [Highest(), TrainMode()])
def test_running_statistics_move_once_by_the_picked_rows(method: InBatchMethod) -> None:
    network, parts = normed(), batch()
    network.train()(batch(seed=9)[0])
    twin = copy.deepcopy(network)
    before = copy.deepcopy(network[2].state_dict())
    twin.train(not method.candidates_in_eval_mode)
    expected = losses_of(twin, parts).detach()
    signals = take(step_of(network, method), parts)
    torch.testing.assert_close(signals["loss"], expected.float())
    picked = expected.argsort(descending=True)[:6].sort().values
    twin[2].load_state_dict(before)
    twin.train()(parts[0][picked])
    assert network[2].num_batches_tracked == before["num_batches_tracked"] + 1
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(network[2], name), getattr(twin[2], name))
        assert not torch.allclose(getattr(network[2], name), before[name])


def test_a_plain_step_of_the_method_is_the_plain_step() -> None:
    network, plain, parts = mlp(), mlp(), batch(padding=2)
    reference = PlainStep(plain, torch.optim.SGD(plain.parameters(), lr=RATE, momentum=0.9))
    step = step_of(network, Counting())
    signals, expected = take(step, parts, step=1), reference(*parts[:3])
    same_parameters(network, plain)
    torch.testing.assert_close(signals["loss"], expected["loss"])
    assert signals["picked"].tolist() == [1.0] * 10 + [0.0] * 2
    assert step.row_counts(10, 12) == RowCounts(10, 2)


@pytest.mark.parametrize("network", [mlp, normed])
def test_a_row_that_diverged_is_not_trained_on(network: Any) -> None:
    parts = batch()
    parts[0][3] = torch.inf
    own = network()
    step = step_of(own, Highest())
    picked = take(step, parts)["picked"]
    assert picked.sum() == 6 == 12 - 1 - 5
    assert not picked[3]
    assert all(parameter.isfinite().all() for parameter in own.parameters())


def test_a_batch_of_diverged_rows_changes_nothing() -> None:
    parts, network = batch(), mlp()
    parts[0][:] = torch.nan
    before = copy.deepcopy(network.state_dict())
    step = step_of(network, Counting())
    signals = take(step, parts)
    assert signals["loss"].isnan().all()
    assert not signals["picked"].any()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert step.row_counts(12, 12) == RowCounts(0, 0, 12)
    assert step.state_dict()["columns"]["visits"].max() == 0.5


def test_one_picked_row_goes_along_with_another_where_the_network_normalizes() -> None:
    parts, network = batch(), normed()
    step = step_of(network, Given(ids=(int(parts[3][4]),)))
    parts[0][0] = torch.nan  # not a row to go along
    picked = take(step, parts)["picked"]
    assert picked.nonzero().flatten().tolist() == [4]
    assert step.row_counts(12, 12) == RowCounts(1, 1, 12)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    alone = step_of(mlp(), Given(ids=(int(parts[3][4]),)))
    take(alone, parts)
    assert alone.row_counts(12, 12) == RowCounts(1, 0, 12)
    single = step_of(normed(), TrainMode())
    take(single, parts, slice(5, 6))
    assert single.row_counts(1, 1) == RowCounts(1, 1, 1)


def test_the_method_gets_the_rows_of_its_columns() -> None:
    parts = batch()
    irreducible = np.zeros(NUM, dtype=np.float32)
    favorites = parts[3][[2, 7, 11]]
    irreducible[favorites] = -100.0
    method = build_method({"name": "rho", "keep": 0.25})
    assert isinstance(method, InBatchMethod)
    picked = take(step_of(mlp(), method, columns={"irreducible": irreducible}), parts)["picked"]
    assert picked.nonzero().flatten().tolist() == [2, 7, 11]
    with pytest.raises(ValueError, match=r"column 'irreducible' of shape \(5,\) does not fit 100 samples"):
        step_of(mlp(), method, columns={"irreducible": np.zeros(5, dtype=np.float32)})


def test_the_control_gets_the_signals_of_other_rows() -> None:
    parts = batch(60)
    picked = take(step_of(mlp(), Highest()), parts)
    control = take(step_of(mlp(), Highest(), permuted=True), parts)
    assert picked["picked"].sum() == control["picked"].sum() == 30
    chosen = control["picked"] > 0
    assert (control["loss"][chosen].mean() - control["loss"].mean()).abs() < 0.3
    assert picked["loss"][picked["picked"] > 0].mean() > control["loss"][chosen].mean()


def test_the_state_follows_every_visit_and_is_restored() -> None:
    step, restored = (step_of(mlp(), Counting()) for _ in range(2))
    for number, seed in enumerate((1, 2, 1)):
        take(step, batch(seed=seed), step=number)
    stored = io.BytesIO()
    torch.save(step.state_dict(), stored)
    stored.seek(0)
    restored.load_state_dict(torch.load(stored, weights_only=True))
    visits = np.full(NUM, 0.5)
    for seed in (1, 2, 1):
        visits[batch(seed=seed)[3]] += 1
    assert restored.state_dict()["columns"]["visits"].tolist() == visits.tolist()
    restored.model.load_state_dict(step.model.state_dict())
    restored.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for each in (step, restored):
        take(each, batch(seed=4), step=3)
        take(each, batch(seed=1), step=4)
    same_parameters(step.model, restored.model, rtol=0.0, atol=0.0)
    for name, column in step.state_dict()["columns"].items():
        assert torch.equal(column, restored.state_dict()["columns"][name])
    with pytest.raises(ValueError, match="the state is of another train step"):
        step.load_state_dict({})
    with pytest.raises(ValueError, match="the state is of another train step"):
        step_of(mlp(), Highest()).load_state_dict(step.state_dict())


@pytest.mark.parametrize("name", ["selective_backprop", "rho", "ordered_sgd", "divbs", "es"])
def test_every_method_of_rayprune_takes_its_steps(name: str) -> None:
    method = build_method(name)
    assert isinstance(method, InBatchMethod)
    network = mlp()
    columns = {column: np.zeros(NUM, dtype=np.float32) for column in method.file_columns()}
    step = step_of(network, method, columns=columns, head="fc", signals=("entropy", "picked"))
    counts = {"selective_backprop": [50, NUM] * 2, "rho": [10] * 4, "ordered_sgd": [25] * 4, "divbs": [10] * 4}
    for number, count in enumerate(counts.get(name, [25] * 4)):
        before = copy.deepcopy(network.state_dict())
        place = {"epoch": 2, "step": number, "facts": {"share": 0.25}}
        signals = take(step, batch(NUM, seed=number), **place)
        assert set(signals) == {"loss", "correct", "entropy", "picked"}
        assert signals["picked"].sum() == step.row_counts(NUM, NUM).trained == count
        assert all(not torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert all(value.isfinite().all() for value in network.state_dict().values())


def test_an_evaluation_picks_nothing() -> None:
    step = step_of(mlp(), Highest(), signals=("picked",))
    inputs, targets_B, _, _ = batch()
    signals = step.evaluate(inputs, targets_B, smoothed=True, signals=("loss", "picked"))
    assert signals["picked"].tolist() == [0.0] * 12


def test_images_keep_their_memory_layout() -> None:
    seen = list[bool]()
    torch.manual_seed(0)
    network = build_model("resnet8", num_classes=CLASSES, input_shape=(3, 8, 8)).to(memory_format=torch.channels_last)
    network.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    inputs = torch.randn(12, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for padding in (0, 4):
        _, targets_B, weights_B, ids = batch(padding=padding)
        take(step_of(network, Highest()), (inputs, targets_B, weights_B, ids))
    assert seen == [True] * 4


def test_the_place_is_required() -> None:
    inputs, targets_B, weights_B, _ = batch()
    with pytest.raises(TypeError, match="pass place=BatchPlace"):
        step_of(mlp(), Highest())(inputs, targets_B, weights_B)


# Several ranks

METHODS: dict[str, dict[str, Any]] = {
    "selective_backprop": {"start": 0.0, "end": 1.0, "interrupt": 3},
    "divbs": {"keep": 0.3},
    "es": {"keep": 0.3, "start": 0.0},
    "rho": {"keep": 0.25},
}
STEPS = 4


def columns_of(method: InBatchMethod) -> dict[str, NDArray[np.float32]]:
    """Return irreducible losses with which RHO-LOSS picks the first three rows of every batch, thus rank 0's."""
    irreducible = np.zeros(NUM, dtype=np.float32)
    for seed in range(STEPS):
        irreducible[batch(seed=seed)[3][:3]] = -100.0
    return dict.fromkeys(method.file_columns(), irreducible)


class WithHead(nn.Module):
    """The network of `normed`, with a last layer `fc`."""

    def __init__(self) -> None:
        super().__init__()
        layers = normed()
        self.layers, self.fc = layers[:-1], layers[-1]

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layers(inputs))
        return logits


def one_rank(rank: int, world_size: int, folder: str) -> None:
    """Take steps with every method on this rank's rows, and store what it did."""
    torch.set_num_threads(1)
    if world_size > 1:
        store = f"file://{folder}/store-{world_size}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = {name: steps_on(rank, world_size, name, mlp()) for name in METHODS}
    results["normed"] = steps_on(rank, world_size, "rho", WithHead())
    results["losses"] = losses_with_own_statistics(rank, world_size)
    torch.save(results, f"{folder}/{world_size}-{rank}.pt")
    if world_size > 1:
        torch.distributed.destroy_process_group()


def losses_with_own_statistics(rank: int, world_size: int) -> list[float]:
    """Return the scored losses of this rank's rows, with running statistics that are its own."""
    network = WithHead()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer += rank
    wrapped = nn.parallel.DistributedDataParallel(network, init_sync=False) if world_size > 1 else network
    method = build_method({"name": "rho", **METHODS["rho"]})
    assert isinstance(method, InBatchMethod)
    size = 12 // world_size
    step = step_of(wrapped, method, columns=columns_of(method), head="fc")
    return take(step, batch(), slice(rank * size, (rank + 1) * size))["loss"].tolist()


def steps_on(rank: int, world_size: int, name: str, network: nn.Module) -> dict[str, Any]:
    """Train on this rank's rows of batches of 12, of which the last has 5 rows of padding."""
    method = build_method({"name": name, **METHODS[name]})
    assert isinstance(method, InBatchMethod)
    wrapped = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
    step = step_of(wrapped, method, columns=columns_of(method), head="fc", accumulate=2, clip_norm=1.0)
    size, picked, counts = 12 // world_size, list[list[float]](), list[tuple[int, int, int]]()
    for number in range(STEPS):
        parts = batch(seed=number, padding=5 if number == STEPS - 1 else 0)
        rows = slice(rank * size, (rank + 1) * size)
        picked.append(take(step, parts, rows, step=number)["picked"].tolist())
        done = step.row_counts(int((parts[2][rows] > 0).sum()), size)
        counts.append((done.trained, done.padded, done.forwarded))
    return {"picked": picked, "counts": counts, "network": network.state_dict(), "step": step.state_dict()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size → what each of its ranks did, by method."""
    folder = tmp_path_factory.mktemp("ranks")
    one_rank(0, 1, str(folder))
    for world_size in (2, 3):
        torch.multiprocessing.spawn(one_rank, (world_size, str(folder)), nprocs=world_size)
    files = {size: [folder / f"{size}-{rank}.pt" for rank in range(size)] for size in (1, 2, 3)}
    return {size: [torch.load(file, weights_only=True) for file in files[size]] for size in files}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_trains_on_the_same_rows_and_gets_the_same_network(
    name: str, world_size: int, ranks: dict[int, list[dict[str, Any]]]
) -> None:
    alone, parts = ranks[1][0][name], [rank[name] for rank in ranks[world_size]]
    assert all(sum(rows) > 0 for rows in alone["picked"])
    assert any(sum(rows) < 7 for rows in alone["picked"])
    assert np.concatenate([part["picked"] for part in parts], axis=1).tolist() == alone["picked"]
    for part in parts:
        for key, value in part["network"].items():
            torch.testing.assert_close(value, alone["network"][key], rtol=1e-9, atol=1e-12)
        assert part["step"].keys() == alone["step"].keys()
        for key, column in part["step"].get("columns", {}).items():
            torch.testing.assert_close(column, alone["step"]["columns"][key], rtol=1e-6, atol=0.0)
    trained, _, forwarded = np.sum([part["counts"] for part in parts], axis=0).T
    expected, _, candidates = np.array(alone["counts"]).T
    assert trained.tolist() == expected.tolist()
    assert forwarded.tolist() == candidates.tolist()


def test_a_rank_without_picked_rows_goes_along_with_a_row_of_weight_zero(
    ranks: dict[int, list[dict[str, Any]]],
) -> None:
    assert ranks[3][2]["rho"]["counts"] == [(0, 1, 4)] * (STEPS - 1) + [(0, 1, 0)]


def test_ranks_without_rows_go_along_with_batch_normalization(ranks: dict[int, list[dict[str, Any]]]) -> None:
    first, second = (rank["normed"] for rank in ranks[2])
    assert [counts[:2] for counts in second["counts"]] == [(0, 2)] * STEPS
    for key, value in first["network"].items():
        assert value.isfinite().all()
        if "running" not in key:  # those of rank 0 are validated and saved
            torch.testing.assert_close(value, second["network"][key], rtol=1e-9, atol=1e-12)


def test_candidates_are_scored_with_the_running_statistics_of_rank_0(ranks: dict[int, list[dict[str, Any]]]) -> None:
    alone = ranks[1][0]["losses"]
    for size in (2, 3):
        assert [loss for rank in ranks[size] for loss in rank["losses"]] == pytest.approx(alone, rel=1e-6)
