"""L2W-DEN's arithmetic against hand-worked numbers and the reference's golden arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayprune.nn.steps.l2w import (
    WeightNet,
    allocate_exits,
    centred,
    exit_distribution,
    exit_quotas,
    meta_loss,
    observed,
    weight_range,
    weights_of,
)
from tests.support.paths import GOLDEN

RAW = torch.tensor([[1.0, -1.0, -1.0, -1.0, -1.0], [0.5, 0.0, 0.0, 0.0, -0.5]])
REAL = torch.tensor([True, True])


@pytest.mark.parametrize(
    ("normalise", "epsilon", "expected"),
    [
        ("col", 0.8, [[2.28, 0.68, 0.68, 0.68, 0.68], [1.4, 1, 1, 1, 0.6]]),
        ("mat", 0.3, [[1.39, 0.79, 0.79, 0.79, 0.79], [1.24, 1.09, 1.09, 1.09, 0.94]]),
        ("row", 0.3, [[1.075, 0.85, 0.85, 0.85, 0.925], [0.925, 1.15, 1.15, 1.15, 1.075]]),
    ],
)
def test_weights_by_hand_and_padding_changes_none(normalise: str, epsilon: float, expected: list[list[float]]) -> None:
    found = weights_of(centred(RAW, normalise, REAL), epsilon)
    torch.testing.assert_close(found, torch.tensor(expected))
    padded = torch.cat([RAW[:1], torch.full((1, 5), float("nan")), RAW[1:]])
    masked = weights_of(centred(padded, normalise, torch.tensor([True, False, True])), epsilon)
    torch.testing.assert_close(masked[[0, 2]], torch.tensor(expected))
    low, high = weight_range(epsilon, normalise, 5)
    assert low - 1e-6 <= found.min() <= found.max() <= high + 1e-6
    clamped = weights_of(centred(10 * RAW, normalise, REAL), epsilon, nonnegative=True)
    assert clamped.min() == 0.0


@pytest.mark.parametrize("normalise", ["row", "col", "mat"])
def test_its_gradient_goes_through_the_same_projection(normalise: str) -> None:
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    upstream, real = torch.randn(4, 3, dtype=torch.float64), torch.tensor([True, True, False, True])
    (centred(values, normalise, real) * upstream).sum().backward()
    torch.testing.assert_close(values.grad, centred(upstream, normalise, real))


def test_the_weight_network_is_the_references() -> None:
    golden = np.load(GOLDEN / "l2w_weight_net.npz")
    net = WeightNet(5)
    assert sum(parameter.numel() for parameter in net.parameters()) == 5505
    names = {"hidden.0": "first_hidden_layer.fc", "output": "output_layer"}
    state = {
        f"{ours}.{kind}": torch.from_numpy(golden[f"sd/{theirs}.{kind}"])
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    net.load_state_dict(state)
    raw = net(torch.from_numpy(golden["x"])).detach()
    np.testing.assert_allclose(raw, golden["tanh_out"], rtol=1e-6, atol=1e-7)
    for normalise in ("row", "col", "mat"):
        for epsilon in (0.3, 0.8):
            found = weights_of(centred(raw, normalise, torch.ones(6, dtype=torch.bool)), epsilon)
            np.testing.assert_allclose(found, golden[f"w_{normalise}_{epsilon}"], rtol=1e-6, atol=1e-6)


def test_what_the_weight_network_sees_and_where_it_begins() -> None:
    losses, sure = torch.zeros(2, 3), torch.ones(2, 3)
    assert observed("both", losses, sure).tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert observed("conf", losses, sure).tolist() == sure.tolist()
    before = torch.get_rng_state()
    one, other, third = WeightNet(3, seed=1), WeightNet(3, seed=1), WeightNet(3, inputs="both", layers=2, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.output.weight, other.output.weight)
    assert [tuple(layer.weight.shape) for layer in third.hidden] == [(500, 6), (500, 500)]


def test_exit_shares_and_quotas_are_the_references() -> None:
    shares = np.load(GOLDEN / "l2w_target_probs_K5.npz")["probs"]
    for p in range(1, 40):
        np.testing.assert_allclose(exit_distribution(p, 5), shares[p - 1], rtol=1e-6)
    golden = np.load(GOLDEN / "l2w_allocation_counts.npz")
    for (num_exits, p, rows), counts in zip(golden["keys"].tolist(), golden["counts"].tolist(), strict=True):
        assert exit_quotas(rows, exit_distribution(p, num_exits)) == [each for each in counts if each >= 0]


def test_rows_leave_by_confidence_and_padding_never() -> None:
    drawn = np.random.default_rng(0)
    for rows, num_exits, p in [(20, 3, 15), (7, 5, 39), (3, 4, 20), (2, 5, 1)]:
        sure, real = drawn.random((rows, num_exits)), drawn.random(rows) < 0.8
        found = allocate_exits(torch.from_numpy(sure), torch.from_numpy(real), exit_distribution(p, num_exits)).tolist()
        quotas = exit_quotas(int(real.sum()), exit_distribution(p, num_exits))
        expected, here = [-1] * rows, [row for row in range(rows) if real[row]]
        for place in range(num_exits):
            leaving = sorted(here, key=lambda row, place=place: -sure[row, place])[: quotas[place]]
            for row in leaving:
                expected[row] = place
            here = [row for row in here if row not in leaving]
        assert found == expected


def test_an_exit_without_rows_adds_nothing_to_the_meta_loss() -> None:
    losses = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0], [float("nan")] * 3])
    exits = torch.tensor([0, 2, -1])
    assert float(meta_loss(losses, exits, torch.tensor([1, 0, 1]))) == 1.0 + 200.0
