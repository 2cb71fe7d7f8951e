"""The small networks, and parameters as a dictionary and as one vector."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import examples, network, nothing_changes
from torch import Tensor, nn

from ewc_code.data import Examples
from ewc_code.environment import device
from ewc_code.models import (
    evaluating,
    flatten,
    mlp,
    outputs,
    restore,
    snapshot,
    unflatten,
)
from ewc_experiments.plane import TwoParameters
from ewc_experiments.variants import relu_logits_mlp


def test_network_is_affine_maps_with_relu_between_them_and_none_on_the_logits() -> None:
    model = mlp((4, 5, 3))
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    hidden = (x @ model[0].weight.T + model[0].bias).clamp_min(0)
    torch.testing.assert_close(model(x), hidden @ model[2].weight.T + model[2].bias)
    assert model(x).min() < 0
    slip = relu_logits_mlp((4, 5, 3))
    assert torch.equal(slip(x), model(x).clamp_min(0))


def test_same_seed_same_weights_and_torch_s_generator_is_left_alone() -> None:
    with nothing_changes():
        first, again, other = mlp((4, 5, 3), 1), mlp((4, 5, 3), 1), mlp((4, 5, 3), 2)
        relu_logits_mlp((4, 5, 3))
        TwoParameters()
    assert torch.equal(flatten(snapshot(first)), flatten(snapshot(again)))
    assert not torch.equal(flatten(snapshot(first)), flatten(snapshot(other)))


def test_weights_are_uniform_up_to_one_over_the_root_of_the_inputs() -> None:
    model = mlp((100, 400, 10))
    for layer in (model[0], model[2]):
        bound = layer.in_features**-0.5
        for p in (layer.weight, layer.bias):
            assert p.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert layer.weight.abs().max() > 0.95 * bound


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (0, 3), (4, -1, 3)])
def test_sizes_that_cannot_be(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least input and output, each at least 1; got"):
        mlp(sizes)


def test_two_parameters_are_logistic_regression() -> None:
    model = TwoParameters((1.5, -0.5)).double()
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.tensor([1.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(model(x).softmax(1)[:, 1], (x @ w).sigmoid())
    assert flatten(snapshot(TwoParameters())).tolist() == [0.0, 0.0]


def test_snapshot_is_a_copy_of_what_is_trained() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    held = snapshot(model)
    assert list(held) == ["0.weight", "2.weight", "2.bias"]
    assert not any(value.requires_grad for value in held.values())
    with torch.no_grad():
        model[2].bias.add_(1)
    assert not torch.equal(held["2.bias"], model[2].bias)
    with pytest.raises(ValueError, match="at least one parameter with requires_grad=True; it has none"):
        snapshot(model.requires_grad_(False))


def test_restore_puts_back_every_bit() -> None:
    model = network()
    held = snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    with nothing_changes(model, parameters=False):
        restore(model, held)
    assert torch.equal(flatten(snapshot(model)), flatten(held))


def test_restore_refuses_what_does_not_fit_and_changes_nothing() -> None:
    model = network()
    other = snapshot(network(seed=1))
    for bad, match in (
        ({**other, "2.bias": torch.ones(4)}, r"'2.bias' must fit the model; got shape \(4,\), model: \(3,\)"),
        ({**other, "head": torch.ones(4)}, r"'head' must fit the model.*no such parameter"),
    ):
        with nothing_changes(model), pytest.raises(ValueError, match=match):
            restore(model, bad)


shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(shapes=shapes)
def test_flatten_and_unflatten_are_inverse(shapes: list[tuple[int, ...]]) -> None:
    params = {f"p{i}": torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)}
    vector = flatten(params)
    back = unflatten(vector, params)
    assert list(back) == list(params)
    assert all(torch.equal(back[name], params[name]) for name in params)
    assert torch.equal(flatten(back), vector)
    with pytest.raises(ValueError, match=rf"must hold {len(vector)} numbers to fill .*; got {len(vector) + 1}"):
        unflatten(torch.zeros(len(vector) + 1), params)


def test_evaluating_gives_each_module_its_own_flag_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()))
    model[1][0].eval()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


def test_outputs_counts_the_outputs_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)).double().to(device())
    with nothing_changes(model):
        assert outputs(model, examples()) == 3
        assert outputs(model, examples(1)) == 3  # batch norm in training mode would refuse a single example


def test_outputs_refuses_labels_and_shapes_that_do_not_fit() -> None:
    model, data = network(), examples()
    for bad, match in (
        (Examples(data.x, data.y * 0 + 3), r"0\.\.2 for this model; got 3\.\.3.*Renumber the labels"),
        (Examples(data.x, data.y * 0 - 1), r"got -1\.\.-1"),
        (examples(features=5), r"shape \(2, 5\), torch.float64.*Check the input size"),
    ):
        with pytest.raises(ValueError, match=match):
            outputs(model, bad)


def test_outputs_refuses_what_are_not_logits() -> None:
    class Summed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    with pytest.raises(ValueError, match=r"must return logits of shape \(n, classes\).*got \(\)"):
        outputs(Summed(4, 3).double().to(device()), examples())
