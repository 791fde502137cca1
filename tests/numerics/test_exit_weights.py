"""L2W-DEN's arithmetic against numbers computed by hand and the reference's golden arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayprune.nn.steps.l2w import (
    WeightNet,
    allocate_exits,
    center,
    exit_distribution,
    leaving_counts,
    meta_loss,
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
def test_weights_are_the_hand_computed_ones_with_and_without_padding(
    normalise: str, epsilon: float, expected: list[list[float]]
) -> None:
    weights = weights_of(center(RAW, normalise, REAL), epsilon)
    torch.testing.assert_close(weights, torch.tensor(expected))
    padded = torch.cat([RAW[:1], torch.full((1, 5), float("nan")), RAW[1:]])
    masked = weights_of(center(padded, normalise, torch.tensor([True, False, True])), epsilon)
    torch.testing.assert_close(masked[[0, 2]], torch.tensor(expected))
    low, high = weight_range(epsilon, normalise, 5)
    assert low - 1e-6 <= weights.min() <= weights.max() <= high + 1e-6
    clamped = weights_of(center(10 * RAW, normalise, REAL), epsilon, nonnegative=True)
    assert clamped.min() == 0.0


@pytest.mark.parametrize("normalise", ["row", "col", "mat"])
def test_the_gradient_of_centering_is_the_same_projection(normalise: str) -> None:
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    upstream, real = torch.randn(4, 3, dtype=torch.float64), torch.tensor([True, True, False, True])
    (center(values, normalise, real) * upstream).sum().backward()
    torch.testing.assert_close(values.grad, center(upstream, normalise, real))


def test_the_weight_network_computes_the_references_weights() -> None:
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
            weights = weights_of(center(raw, normalise, torch.ones(6, dtype=torch.bool)), epsilon)
            np.testing.assert_allclose(weights, golden[f"w_{normalise}_{epsilon}"], rtol=1e-6, atol=1e-6)


def test_the_weight_network_reads_losses_or_confidences_or_both() -> None:
    losses, confidences = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    assert WeightNet(3).inputs_of(losses, confidences).tolist() == losses.tolist()
    assert WeightNet(3, inputs="conf").inputs_of(losses, confidences).tolist() == confidences.tolist()
    both = WeightNet(3, inputs="both").inputs_of(losses, confidences)
    assert both.tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert not both.requires_grad


def test_the_weight_networks_initial_weights_depend_on_its_seed_alone() -> None:
    before = torch.get_rng_state()
    one, other, third = WeightNet(3, seed=1), WeightNet(3, seed=1), WeightNet(3, inputs="both", layers=2, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.output.weight, other.output.weight)
    assert [tuple(layer.weight.shape) for layer in third.hidden] == [(500, 6), (500, 500)]


def test_exit_fractions_and_counts_are_the_references() -> None:
    fractions = np.load(GOLDEN / "l2w_target_probs_K5.npz")["probs"]
    for p in range(1, 40):
        np.testing.assert_allclose(exit_distribution(p, 5), fractions[p - 1], rtol=1e-6)
    golden = np.load(GOLDEN / "l2w_allocation_counts.npz")
    for (num_exits, p, rows), counts in zip(golden["keys"].tolist(), golden["counts"].tolist(), strict=True):
        assert leaving_counts(rows, exit_distribution(p, num_exits)) == [each for each in counts if each >= 0]


def test_rows_leave_by_confidence_and_padding_never() -> None:
    generator = np.random.default_rng(0)
    for rows, num_exits, p in [(20, 3, 15), (7, 5, 39), (3, 4, 20), (2, 5, 1)]:
        confidences, real = generator.random((rows, num_exits)), generator.random(rows) < 0.8
        fractions = exit_distribution(p, num_exits)
        exits = allocate_exits(torch.from_numpy(confidences), torch.from_numpy(real), fractions).tolist()
        counts = leaving_counts(int(real.sum()), fractions)
        expected, remaining = [-1] * rows, [row for row in range(rows) if real[row]]
        for exit in range(num_exits):
            leaving = sorted(remaining, key=lambda row, exit=exit: -confidences[row, exit])[: counts[exit]]
            for row in leaving:
                expected[row] = exit
            remaining = [row for row in remaining if row not in leaving]
        assert exits == expected


def test_an_exit_without_rows_adds_nothing_to_the_meta_loss() -> None:
    losses = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0], [float("nan")] * 3])
    exits = torch.tensor([0, 2, -1])
    assert float(meta_loss(losses, exits, torch.tensor([1, 0, 1]))) == 1.0 + 200.0
