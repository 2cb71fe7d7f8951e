"""Laplace's method against closed forms, brute-force integrals and the plain formula."""

import math
from collections.abc import Callable

import pytest
import torch
from oracles import examples, fisher_matrix, network, nll, nothing_changes
from torch import Tensor, nn

from ewc_code import fisher
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal, Full, log_normaliser
from ewc_code.laplace import laplace, log_evidence, predictive
from ewc_code.models import flatten, snapshot
from ewc_experiments.density import (
    Approximation,
    approximate,
    condition_linear,
    find_mode,
    log_evidence_linear,
    next_term,
    on_grid,
)
from ewc_experiments.plane import TwoParameters

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The belief after a task.


@pytest.mark.parametrize("labels", ["exact", "data"])
def test_precision_grows_by_n_times_the_mean_fisher(labels: fisher.Labels) -> None:
    model, data = network(), examples()
    expected = len(data) * fisher_matrix(model, data, labels)
    thin = laplace(model, data, Diagonal.isotropic(snapshot(network(seed=1)), 0.5), labels)
    torch.testing.assert_close(flatten(thin.precision), 0.5 + expected.diagonal(), **TIGHT)
    thick = laplace(model, data, Full.isotropic(snapshot(network(seed=1)), 0.5), labels)
    identity = torch.eye(len(expected), dtype=torch.float64, device=device())
    torch.testing.assert_close(thick.precision, 0.5 * identity + expected, **TIGHT)
    for belief in (thin, thick):
        assert torch.equal(flatten(belief.mean), flatten(snapshot(model)))


def test_sampled_labels_take_the_generator() -> None:
    model, data = network(), examples()
    flat = Diagonal.isotropic(snapshot(model))
    first, again = (laplace(model, data, flat, "sampled", generator(4)) for _ in range(2))
    assert torch.equal(flatten(first.precision), flatten(again.precision))


def test_the_anchor_does_not_follow_the_model() -> None:
    model, data = network(), examples()
    for prior in (Diagonal.isotropic(snapshot(model)), Full.isotropic(snapshot(model))):
        belief = laplace(model, data, prior)
        before = flatten(belief.mean).clone()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        assert torch.equal(flatten(belief.mean), before)
        assert belief.energy(snapshot(model)) > 0  # pitfall 11: an anchor at the current weights costs nothing
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1)


def test_no_trace_is_left() -> None:
    model, data = network(), examples()
    with nothing_changes(model):
        belief = laplace(model, data, Diagonal.isotropic(snapshot(model), 1.0))
        laplace(model, data, Full.isotropic(snapshot(model), 1.0))
        log_evidence(model, data, Diagonal.isotropic(snapshot(model), 1.0))
        predictive(model, belief, data.x, 3, generator(0))


def test_models_in_training_mode_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().to(device())
    for prior in (Diagonal.isotropic(snapshot(model), 1.0), Full.isotropic(snapshot(model), 1.0)):
        with pytest.raises(ValueError, match=r"Dropout.*Call model.eval\(\) first"):
            laplace(model, examples(), prior)
        with pytest.raises(ValueError, match=r"Dropout.*Call model.eval\(\) first"):
            log_evidence(model, examples(), prior)


# The method itself, where the truth is known.


def test_a_gaussian_is_found_exactly_in_one_step() -> None:
    root = torch.randn(3, 3, generator=generator(0), dtype=torch.float64)
    precision, mean = root @ root.T + torch.eye(3), at(1.0, -2.0, 3.0)
    found = approximate(lambda t: 0.5 * (t - mean) @ precision @ (t - mean) + 7, at(0.0, 0.0, 0.0), steps=2)
    torch.testing.assert_close(found.mode, mean, **TIGHT)
    torch.testing.assert_close(found.precision, precision, **TIGHT)
    exact = 1.5 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision).item() - 7
    assert found.log_integral == pytest.approx(exact, rel=1e-12)
    points = torch.randn(5, 3, generator=generator(1), dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.testing.assert_close(found.log_density(points), normal.log_prob(points), **TIGHT)


@pytest.mark.parametrize("a", [1.5, 4.0, 40.0])
@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_gamma(a: float, rate: float) -> None:
    """exp(-E) = t^(a-1) e^(-rate t): mode (a-1)/rate, curvature rate^2/(a-1); the integral becomes Stirling's."""
    found = approximate(lambda t: (rate * t - (a - 1) * t.log()).sum(), at(1.0))
    assert found.mode.item() == pytest.approx((a - 1) / rate, rel=1e-5)
    assert found.precision.item() == pytest.approx(rate**2 / (a - 1), rel=1e-4)
    stirling = 0.5 * math.log(2 * math.pi * (a - 1)) + (a - 1) * math.log(a - 1) - (a - 1) - a * math.log(rate)
    assert found.log_integral == pytest.approx(stirling, abs=1e-6)
    # Stirling's series says what is left out: between 0 and 1/(12 (a-1)).
    assert 0 < math.lgamma(a) - a * math.log(rate) - found.log_integral < 1 / (12 * (a - 1))


@pytest.mark.parametrize(("a", "b"), [(2.0, 3.0), (8.0, 3.0), (60.0, 30.0)])
def test_beta(a: float, b: float) -> None:
    found = approximate(lambda t: -((a - 1) * t.log() + (b - 1) * (-t).log1p()).sum(), at(0.5))
    mode = (a - 1) / (a + b - 2)
    curvature = (a - 1) / mode**2 + (b - 1) / (1 - mode) ** 2
    assert found.mode.item() == pytest.approx(mode, rel=1e-5)
    assert found.precision.item() == pytest.approx(curvature, rel=1e-4)
    height = (a - 1) * math.log(mode) + (b - 1) * math.log(1 - mode)
    assert found.log_integral == pytest.approx(height + 0.5 * math.log(2 * math.pi / curvature), abs=1e-6)


def test_error_falls_as_one_over_n_and_the_next_term_removes_most_of_it() -> None:
    errors, left = [], []
    for n in (10.0, 100.0):
        a = n + 1

        def energy(t: Tensor, a: float = a) -> Tensor:
            return (t - (a - 1) * t.log()).sum()

        found = approximate(energy, at(1.0))
        errors.append(math.lgamma(a) - found.log_integral)
        left.append(errors[-1] - next_term(energy, found))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.02)
    assert all(abs(rest) < 0.01 * error for rest, error in zip(left, errors, strict=True))


def test_next_term_in_two_dimensions_against_the_grid() -> None:
    def energy(t: Tensor) -> Tensor:
        return 20 * (t.exp() - t).sum() + 15 * (t[0] - t[1]).cosh() + 5 * (t[0] * 2 + t[1]).sin() ** 2

    found = approximate(energy, at(0.1, 0.2))
    truth = on_grid(energy, found, points=121).log_integral
    assert abs(truth - found.log_integral - next_term(energy, found)) < 0.2 * abs(truth - found.log_integral)


@pytest.mark.parametrize("start", [-3.0, 0.01, 5.0])
def test_mode_is_found_from_far_away_and_through_negative_curvature(start: float) -> None:
    found = approximate(lambda t: ((t - 1) ** 2 + 1).log().sum() * 3, at(start))  # bends down beyond 1 of the mode
    assert found.mode.item() == pytest.approx(1.0, abs=1e-4)
    assert found.precision.item() == pytest.approx(6.0, rel=1e-4)


def test_a_large_constant_in_the_energy_does_not_hide_the_mode() -> None:
    found = approximate(lambda t: t.exp().sum() - t.sum() + 1e8, at(2.0))
    assert found.mode.item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("energy", "start", "match"),
    [
        (lambda t: t.sum(), 0.0, "minimum with positive curvature must exist.*Newton steps.*change variables"),
        (lambda t: -(t**2).sum(), 0.0, "minimum with positive curvature"),
        (lambda t: (t**4).sum() * 0, 1.0, "minimum with positive curvature"),
        (lambda t: (t + 0.5 * t.log()).sum(), 1.0, "positive curvature|must be finite"),  # Gamma with a < 1
        (lambda t: t.log().sum(), -1.0, r"must be finite with finite derivatives at \[-1.0\]; got nan"),
    ],
    ids=["slope", "maximum", "plateau", "boundary", "outside of the support"],
)
def test_where_the_method_does_not_apply_it_says_so(
    energy: Callable[[Tensor], Tensor], start: float, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        approximate(energy, at(start))


# Brute force.


def test_grid_integrates_what_is_known() -> None:
    found = approximate(lambda t: (t - 4 * t.log()).sum(), at(1.0))

    def energy(t: Tensor) -> Tensor:
        return torch.where(t > 0, t - 4 * t.clamp_min(1e-300).log(), torch.inf).sum()

    grid = on_grid(energy, found, reach=15.0, points=4001)
    assert grid.log_integral == pytest.approx(math.log(24), abs=1e-3)  # Gamma(5) = 4!
    assert grid.total_variation(grid.log_density) == 0
    assert grid.divergence(grid.log_density) == 0
    gap = grid.total_variation(found.log_density(grid.theta))
    assert 0.01 < gap < 0.2
    assert grid.divergence(found.log_density(grid.theta)) > 2 * gap**2  # Pinsker


def two_parameter_problem() -> tuple[TwoParameters, Examples]:
    draw = generator(2)
    x = torch.randn(40, 2, generator=draw, dtype=torch.float64)
    y = (x @ at(1.0, -0.7) + 0.8 * torch.randn(40, generator=draw, dtype=torch.float64) > 0).long()
    return TwoParameters().double().to(device()), Examples(x.to(device()), y.to(device()))


@pytest.mark.host
def test_log_evidence_against_a_brute_force_integral() -> None:
    model, data = two_parameter_problem()
    prior = Full.isotropic(snapshot(model), 0.5)
    mode = find_mode(model, data, prior)
    found = log_evidence(model, data, prior)

    line = torch.linspace(-6, 9, 301, dtype=torch.float64, device=device())
    total = torch.zeros((), dtype=torch.float64, device=device())
    for w1 in line:  # the sum over the plane, a line at a time
        w = torch.stack([w1.expand(301), line - 3], 1)
        sign = 2.0 * data.y - 1
        log_likelihood = -torch.nn.functional.softplus(-sign[:, None] * (data.x @ w.T)).sum(0)
        log_prior = math.log(0.5 / (2 * math.pi)) - 0.25 * w.square().sum(1)
        total += (log_likelihood + log_prior).exp().sum() * (line[1] - line[0]) ** 2
    truth = total.log().item()
    assert found == pytest.approx(truth, abs=0.1)  # Laplace's own error, of order 1/N

    # For softmax regression the Fisher is the Hessian, so that `find_mode` gives the same number by another way...
    assert mode.log_integral + log_normaliser(prior) == pytest.approx(found, abs=1e-6)
    # ...and with the next term it comes much closer to the truth.

    def energy(w: Tensor) -> Tensor:
        sign = 2.0 * data.y - 1
        return torch.nn.functional.softplus(-sign * (data.x @ w)).sum() + 0.25 * w.square().sum()

    better = found + next_term(energy, mode)
    assert abs(better - truth) < 0.3 * abs(found - truth)
    # A wrong sign or a missing half is far outside.
    half_log_det = 0.5 * torch.logdet(mode.precision).item()
    for wrong in (found + 2 * half_log_det, found + half_log_det, found - math.log(2 * math.pi)):
        assert wrong != pytest.approx(truth, abs=0.1)


def test_log_evidence_is_the_formula_printed_in_its_docstring() -> None:
    model, data = network(), examples()
    for prior in (
        Diagonal.isotropic(snapshot(network(seed=1)), 0.7),
        Full.isotropic(snapshot(network(seed=1)), 0.7),
    ):
        after = fisher_matrix(model, data) * len(data)
        after = after.diagonal().diag() if isinstance(prior, Diagonal) else after
        size = len(after)
        after = after + 0.7 * torch.eye(size, dtype=torch.float64, device=device())
        energy = 0.35 * (flatten(snapshot(model)) - flatten(prior.mean)).square().sum()
        expected = -len(data) * nll(model, data) - energy + 0.5 * size * math.log(0.7) - 0.5 * torch.logdet(after)
        assert log_evidence(model, data, prior) == pytest.approx(expected.item(), rel=1e-9)


def test_log_evidence_of_a_gaussian_model_is_exact() -> None:
    draw = generator(0)
    x, y = torch.randn(9, 3, generator=draw, dtype=torch.float64), torch.randn(9, generator=draw, dtype=torch.float64)
    prior = Full.isotropic({"w": at(0.1, 0.2, 0.3)}, 2.0)
    constant = 4.5 * math.log(2 * math.pi * 0.25)

    def energy(w: Tensor) -> Tensor:
        return (y - x @ w).square().sum() / 0.5 + constant + prior.energy({"w": w}) - log_normaliser(prior)

    found = approximate(energy, at(0.0, 0.0, 0.0))
    torch.testing.assert_close(found.mode, condition_linear(prior, x, y, 0.25).mean["w"], **TIGHT)
    assert found.log_integral == pytest.approx(log_evidence_linear(prior, x, y, 0.25), rel=1e-10)


def test_log_evidence_needs_a_proper_prior() -> None:
    model, data = network(), examples()
    for flat in (Diagonal.isotropic(snapshot(model)), Full.isotropic(snapshot(model))):
        with pytest.raises(ValueError, match=r"must be positive.*proper prior"):
            log_evidence(model, data, flat)


@pytest.mark.host
def test_find_mode_ends_where_the_gradient_vanishes() -> None:
    model, data = network(4, 3), examples(30)
    prior = Diagonal.isotropic(snapshot(network(4, 3, seed=5)), 1.0)
    found = find_mode(model, data, prior)
    theta = dict(model.named_parameters())
    objective = len(data) * nll(model, data) + prior.energy(theta)
    for gradient in torch.autograd.grad(objective, list(theta.values())):
        assert gradient.abs().max() < 1e-4
    expected = len(data) * fisher_matrix(model, data)
    identity = torch.eye(len(expected), dtype=torch.float64, device=device())
    torch.testing.assert_close(found.precision, expected + identity, rtol=1e-6, atol=1e-6)


@pytest.mark.host  # a mean over many draws, minutes on a stand-in
def test_predictive_averages_over_the_belief() -> None:
    model, data = two_parameter_problem()
    sharp = Diagonal.isotropic(snapshot(model), 1e12)
    torch.testing.assert_close(
        predictive(model, sharp, data.x, 5, generator(0)), model(data.x).softmax(1).detach(), rtol=0, atol=1e-4
    )
    wide = Diagonal.isotropic({"linear.weight": torch.tensor([[2.0, 0.0]], dtype=torch.float64).to(device())}, 0.25)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device())
    found = predictive(model, wide, x, 5_000, generator(0))
    line = torch.linspace(-16, 20, 20001, dtype=torch.float64)
    weight = torch.distributions.Normal(2.0, 2.0).log_prob(line).exp() * (line[1] - line[0])
    assert found.sum().item() == pytest.approx(1)
    assert found[0, 1].item() == pytest.approx((weight * line.sigmoid()).sum().item(), abs=4 * 0.5 / 5_000**0.5)
    assert torch.equal(found, predictive(model, wide, x, 5_000, generator(0)))
    with pytest.raises(ValueError, match="draws must be at least 1; got 0"):
        predictive(model, wide, x, 0, generator(0))


def test_approximation_keeps_shapes() -> None:
    found = approximate(lambda t: t.square().sum(), at(1.0, 2.0))
    assert isinstance(found, Approximation)
    assert found.mode.shape == (2,)
    assert found.precision.shape == (2, 2)
    assert found.log_density(torch.zeros(4, 2, dtype=torch.float64)).shape == (4,)
