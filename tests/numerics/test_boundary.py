"""Distances to decision boundaries against a worked example, their invariances and naive loops.

Shapes: B batch, C classes, D features.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rayprune.nn.boundary import PairDistances, boundary_distance, class_boundaries, last_linear, pair_distances
from rayprune.nn.models import build_model
from rayprune.nn.signals import BOUNDARY_SIGNALS, compute_signals, signal_floats

WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
BIAS = torch.tensor([0.0, 0.0, 6.0])
POINT = torch.tensor([[2.0, 0.5]])
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def naive_distance(logits: list[float], weight: list[list[float]], anchor: int, other: int) -> float:
    """Transcribe (z_a − z_c)/‖w_a − w_c‖ in Python floats."""
    if weight[anchor] == weight[other]:
        return math.inf
    return (logits[anchor] - logits[other]) / math.dist(weight[anchor], weight[other])


def make_outputs(batch: int, classes: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, weight and labels; every second label is the predicted class."""
    generator = torch.Generator().manual_seed(seed)
    weight_CD = torch.randn(classes, features, generator=generator)
    logits_BC = torch.randn(batch, features, generator=generator) @ weight_CD.T
    labels_B = torch.randint(classes, (batch,), generator=generator)
    labels_B[::2] = logits_BC[::2].argmax(dim=1)
    return logits_BC, weight_CD, labels_B


def test_the_nearest_boundary_is_not_always_the_second_largest_logits() -> None:
    distances_CC = pair_distances(WEIGHT)
    logits_BC = POINT @ WEIGHT.T + BIAS
    assert logits_BC.tolist() == [[2.0, 0.5, 0.0]]
    to_classes = class_boundaries(logits_BC, distances_CC)[0].tolist()
    assert to_classes == pytest.approx([0.5, 1.06066, 0.5], abs=1e-6)
    assert boundary_distance(logits_BC, distances_CC).item() == 0.5
    label = torch.tensor([1])
    assert boundary_distance(logits_BC, distances_CC, label).item() == pytest.approx(-1.06066, abs=1e-6)
    assert boundary_distance(logits_BC, distances_CC, label, signed=False).item() == pytest.approx(0.158114, abs=1e-6)
    probs = logits_BC.softmax(dim=1)[0]
    assert (probs[0] - probs[1]).item() == pytest.approx(0.571873, abs=1e-6)
    # A step of length m(x) towards the boundary ends on it.
    end = POINT - 0.5 * (WEIGHT[0] - WEIGHT[2]) / 4.0
    assert end.tolist() == [[1.5, 0.5]]
    tied = (end @ WEIGHT.T + BIAS)[0]
    assert tied[0] == tied[2]


def test_scaling_and_shifting_the_last_layer_change_no_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    weight_CD, bias_C = torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)
    features_BD, labels_B = torch.randn(40, 5, generator=generator), torch.arange(40) % 7
    shifted = (weight_CD + torch.randn(5, generator=generator), bias_C + 3.0)
    for weight, bias in ((5 * weight_CD, 5 * bias_C), shifted):
        for anchor_B in (None, labels_B):
            old = boundary_distance(features_BD @ weight_CD.T + bias_C, pair_distances(weight_CD), anchor_B)
            new = boundary_distance(features_BD @ weight.T + bias, pair_distances(weight), anchor_B)
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("classes", "features"), [(2, 3), (5, 2), (11, 8), (40, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_distance_equals_a_naive_loop(classes: int, features: int, dtype: torch.dtype) -> None:
    logits_BC, weight_CD, labels_B = make_outputs(60, classes, features)
    if classes > 2:
        weight_CD[-1] = weight_CD[0]
    logits_BC = logits_BC.to(dtype)
    distances_CC = pair_distances(weight_CD)
    distances = {
        "boundary": boundary_distance(logits_BC, distances_CC),
        "boundary_label": boundary_distance(logits_BC, distances_CC, labels_B),
        "boundary_label_unsigned": boundary_distance(logits_BC, distances_CC, labels_B, signed=False),
        "boundary_classes": class_boundaries(logits_BC, distances_CC),
    }
    weight = weight_CD.double().tolist()
    for row, (logits, label) in enumerate(zip(logits_BC.float().tolist(), labels_B.tolist(), strict=True)):
        top = logits.index(max(logits))
        others = [naive_distance(logits, weight, top, c) for c in range(classes) if c != top]
        of_label = [naive_distance(logits, weight, label, c) for c in range(classes) if c != label]
        to_all = [*others[:top], min(others), *others[top:]]
        expected = {
            "boundary": min(others),
            "boundary_label": min(of_label),
            "boundary_label_unsigned": min(map(abs, of_label)),
            "boundary_classes": to_all,
        }
        for name, values in distances.items():
            assert values.dtype == torch.float32
            assert values[row].tolist() == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    signals = compute_signals(list(distances), logits_BC, labels_B, torch.zeros(60), distances_CC=distances_CC)
    for name, values in distances.items():
        assert torch.equal(signals[name], values.clamp(max=LARGEST)), name


def test_a_correct_label_has_the_distance_of_the_predicted_class() -> None:
    logits_BC, weight_CD, _ = make_outputs(50, 6, 4)
    distances_CC = pair_distances(weight_CD)
    predicted_B = logits_BC.argmax(dim=1)
    for signed in (True, False):
        of_label = boundary_distance(logits_BC, distances_CC, predicted_B, signed=signed)
        assert torch.equal(of_label, boundary_distance(logits_BC, distances_CC, signed=signed))


def test_equal_rows_have_no_boundary_whatever_the_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    for features in (1, 7, 64, 513):
        weight_CD = torch.randn(30, features, generator=generator) * 10.0 + 50.0
        weight_CD[1::2] = weight_CD[::2]
        distances_CC = pair_distances(weight_CD)
        same = torch.arange(30)[:, None] // 2 == torch.arange(30) // 2
        assert torch.equal(distances_CC == 0.0, same)
    # Rows of norm 1,600: with a Gram matrix in float32, these two are anywhere from 0 to 1 apart.
    weight_CD = torch.full((2, 1024), 50.0)
    weight_CD[1, 0] += 2.0**-6
    assert pair_distances(weight_CD)[0, 1].item() == pytest.approx(2.0**-6, rel=1e-4)
    weight_CD[1, 0] = 50.0 + 2.0**-10
    assert pair_distances(weight_CD)[0, 1].item() == 0.0


def test_without_a_boundary_the_distance_is_infinite_and_the_signal_the_largest_float32() -> None:
    for weight_CD in (torch.ones(1, 4), torch.ones(3, 4), torch.zeros(3, 4)):
        classes = len(weight_CD)
        logits_BC, labels_B = torch.arange(2.0 * classes).reshape(2, classes), torch.zeros(2, dtype=torch.int64)
        distances_CC = pair_distances(weight_CD)
        assert boundary_distance(logits_BC, distances_CC).tolist() == [math.inf] * 2
        assert class_boundaries(logits_BC, distances_CC).tolist() == [[math.inf] * classes] * 2
        signals = compute_signals(BOUNDARY_SIGNALS, logits_BC, labels_B, torch.zeros(2), distances_CC=distances_CC)
        for values in signals.values():
            assert torch.equal(values, torch.full_like(values, LARGEST))


def test_nan_logits_and_weights_give_nan() -> None:
    distances_CC = pair_distances(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    nan = math.nan
    logits_BC = torch.tensor([[nan] * 4, [nan, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, nan], [3.0, 1.0, 0.0, 0.0]])
    labels_B = torch.tensor([0, 1, 1, 0])
    signals = compute_signals(BOUNDARY_SIGNALS, logits_BC, labels_B, torch.zeros(4), distances_CC=distances_CC)
    for name, values in signals.items():
        assert values.isnan().reshape(4, -1).all(dim=1).tolist() == [True, True, True, False], name
        assert values[3].isfinite().all()
    one = boundary_distance(torch.tensor([[nan]]), pair_distances(torch.ones(1, 2)))
    assert one.isnan().all()
    # A diverged row of the layer makes the distances of all samples with a boundary to its class NaN.
    broken = pair_distances(torch.tensor([[1.0, 0.0], [0.0, nan], [0.0, 1.0]]))
    assert boundary_distance(torch.tensor([[3.0, 1.0, 0.0]]), broken).isnan().all()


def test_boundary_signals_without_distances_are_refused_with_the_cure() -> None:
    logits_BC, labels_B = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for name in BOUNDARY_SIGNALS:
        with pytest.raises(ValueError, match=r"need the last layer's weight: .*distances_CC=pair_distances"):
            compute_signals([name], logits_BC, labels_B, torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(4, 4\) do not fit 3 logits"):
        compute_signals(["boundary"], logits_BC, labels_B, torch.zeros(2), distances_CC=torch.ones(4, 4))
    assert [signal_floats(name, 5) for name in BOUNDARY_SIGNALS] == [1, 5, 1, 1]
    assert signal_floats("boundary", 10**7) == 1  # without the memory of so many classes


def test_cached_distances_are_recomputed_only_when_the_weight_changes() -> None:
    layer = nn.Linear(4, 3)
    cache = PairDistances()
    first = cache(layer.weight)
    assert cache(layer.weight) is first
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    second = cache(layer.weight)
    assert torch.equal(second, pair_distances(layer.weight))
    assert not torch.equal(second, first)
    layer.load_state_dict(nn.Linear(4, 3).state_dict())
    assert torch.equal(cache(layer.weight), pair_distances(layer.weight))
    assert not torch.equal(cache(layer.weight), second)
    one, other = nn.Linear(4, 3).weight, nn.Linear(4, 3).weight
    for weight in (one, other, one):  # both weights have the same version
        assert torch.equal(cache(weight), pair_distances(weight))
    sliced = PairDistances(2)
    assert torch.equal(sliced(other), pair_distances(other[:, :2]))


class Ending(nn.Module):
    """A body, a classifier, and an operation on its output."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout())
        self.fc = nn.Linear(6, 3)
        self.aside = nn.Linear(6, 3)
        self.ending = ending

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        logits = self.fc(hidden)
        self.aside(hidden)
        if self.ending == "in place":
            return logits.mul_(2.0)
        if self.ending == "softmax":
            return logits.log_softmax(dim=1)
        if self.ending == "no linear":
            return hidden[:, :3]
        return logits.view(-1, 3) if self.ending == "view" else logits


def test_the_last_linear_layer_is_found_by_its_output() -> None:
    assert last_linear(build_model("resnet8", num_classes=3, input_shape=(3, 8, 8)), torch.zeros(2, 3, 8, 8)) == "fc"
    assert last_linear(build_model("mlp", num_classes=3, input_shape=(5,)), torch.zeros(2, 5)) == "fc"
    assert last_linear(nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Identity()), torch.zeros(2, 4)) == "0"
    assert last_linear(nn.Linear(4, 3), torch.zeros(2, 4)) == ""
    for ending in ("plain", "view"):
        model = Ending(ending)
        model.body[1].eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        # Neither the last one registered nor the last one called.
        assert last_linear(model, torch.zeros(2, 4)) == "fc"
        assert (model.training, model.body[1].training, model.body[2].training) == (True, False, True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("ending", ["in place", "softmax", "no linear"])
def test_a_model_that_changes_the_layers_output_is_refused(ending: str) -> None:
    with pytest.raises(ValueError, match=r"are not the output of an nn.Linear .*'aside', is changed") as refused:
        last_linear(Ending(ending), torch.zeros(2, 4))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="it calls none"):
        last_linear(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.zeros(2, 3, 4, 4))
