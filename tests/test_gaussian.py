"""Beliefs: the energy, its gradient, and that Bayes' rule task by task gives what all tasks at once give."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import nothing_changes
from torch import Tensor, nn

from ewc_code import consolidation
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal, Full, Penalties, log_normaliser, merge
from ewc_code.models import Params, flatten, nll, restore
from ewc_experiments.density import condition_linear, log_evidence_linear

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = {"weight": (2, 3), "bias": (2,), "scale": ()}


def params(seed: int, low: float = -2.0, high: float = 2.0) -> Params:
    draw = generator(seed)
    return {
        name: (low + (high - low) * torch.rand(shape, generator=draw, dtype=torch.float64)).to(device())
        for name, shape in SHAPES.items()
    }


def diagonal(seed: int) -> Diagonal:
    return Diagonal(params(seed), params(seed + 1000, 0.1, 3.0))


def full(seed: int) -> Full:
    root = torch.randn(9, 9, generator=generator(seed), dtype=torch.float64).to(device())
    return Full(params(seed), root @ root.T + 0.1 * torch.eye(9, dtype=torch.float64, device=device()))


def dense(belief: Diagonal | Full) -> tuple[Tensor, Tensor]:
    """Mean vector and precision matrix."""
    matrix = belief.precision if isinstance(belief, Full) else torch.diag(flatten(belief.precision))
    return flatten(belief.mean), matrix


@pytest.mark.parametrize("kind", [diagonal, full], ids=["diagonal", "full"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), other=st.integers(0, 999))
def test_energy_is_the_quadratic_form(kind: Callable[[int], Diagonal | Full], seed: int, other: int) -> None:
    belief, theta = kind(seed), params(other)
    mean, precision = dense(belief)
    step = flatten(theta) - mean
    assert belief.energy(theta).item() == pytest.approx((0.5 * step @ precision @ step).item(), rel=1e-10, abs=1e-12)
    assert belief.energy(theta) >= 0
    assert belief.energy(belief.mean) == 0


@pytest.mark.parametrize("kind", [diagonal, full], ids=["diagonal", "full"])
def test_gradient_is_precision_times_displacement_and_zero_at_the_mean(kind: Callable[[int], Diagonal | Full]) -> None:
    belief = kind(3)
    mean, precision = dense(belief)
    for at, expected in ((params(7), precision @ (flatten(params(7)) - mean)), (belief.mean, 0 * mean)):
        theta = {name: value.clone().requires_grad_() for name, value in at.items()}
        gradient = flatten(dict(zip(theta, torch.autograd.grad(belief.energy(theta), theta.values()), strict=True)))
        torch.testing.assert_close(gradient, expected, **TIGHT)
        for name, value in at.items():  # and by finite differences, which know nothing of autograd
            for i in range(value.numel()):
                ends = []
                for sign in (1, -1):
                    moved = {key: v.clone() for key, v in at.items()}
                    moved[name].view(-1)[i] += sign * 1e-5
                    ends.append(belief.energy(moved).item())
                auto = torch.autograd.grad(belief.energy(theta), theta[name], retain_graph=True)[0].view(-1)[i].item()
                assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(auto, rel=1e-6, abs=1e-8)


def test_energy_is_the_log_density_up_to_the_normaliser() -> None:
    for belief in (diagonal(1), full(1)):
        mean, precision = dense(belief)
        theta = params(5)
        expected = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(flatten(theta))
        assert log_normaliser(belief) - belief.energy(theta).item() == pytest.approx(expected.item(), rel=1e-9)


def test_flat_belief_has_zero_energy_and_gradient_everywhere() -> None:
    for belief in (Diagonal.isotropic(params(0)), Full.isotropic(params(0))):
        theta = {name: value.requires_grad_() for name, value in params(1).items()}
        energy = belief.energy(theta)
        assert energy == 0
        assert all((g == 0).all() for g in torch.autograd.grad(energy, theta.values()))


def test_moved_adds_to_the_precision_and_takes_the_new_mode_without_touching_the_old_belief() -> None:
    for belief, information in ((diagonal(1), params(2, 0.0, 1.0)), (full(1), full(2).precision)):
        mean, precision = (value.clone() for value in dense(belief))
        moved = belief.moved(params(4), information)
        added = information if isinstance(information, Tensor) else torch.diag(flatten(information))
        torch.testing.assert_close(dense(moved)[1], precision + added, **TIGHT)
        assert torch.equal(dense(moved)[0], flatten(params(4)))
        assert torch.equal(dense(belief)[0], mean)
        assert torch.equal(dense(belief)[1], precision)


@pytest.mark.parametrize("kind", [diagonal, full], ids=["diagonal", "full"])
def test_samples_have_the_belief_s_mean_and_covariance(kind: Callable[[int], Diagonal | Full]) -> None:
    belief, draw, count = kind(1), generator(0), 1000
    mean, precision = dense(belief)
    with nothing_changes():
        draws = torch.stack([flatten(belief.sample(draw)) for _ in range(count)])
    white = (draws - mean) @ torch.linalg.cholesky(precision)  # identity covariance when all is right
    assert white.mean(0).abs().max() < 4.5 / count**0.5
    assert (white.T @ white / count - torch.eye(9, device=device())).abs().max() < 4.5 * (2 / count) ** 0.5
    again = flatten(belief.sample(generator(0)))
    assert torch.equal(again, draws[0])


def test_covariance_inverts_the_precision() -> None:
    torch.testing.assert_close(
        full(2).covariance() @ full(2).precision, torch.eye(9, dtype=torch.float64, device=device()), **TIGHT
    )


# Several quadratics are one, up to a constant (Huszár 2018).


def right_merge(beliefs: list[Diagonal]) -> Diagonal:
    return merge(beliefs)


def wrong_last_anchor_for_all(beliefs: list[Diagonal]) -> Diagonal:
    return Diagonal(beliefs[-1].mean, merge(beliefs).precision)


def wrong_plain_average_of_the_means(beliefs: list[Diagonal]) -> Diagonal:
    mean = {name: torch.stack([b.mean[name] for b in beliefs]).mean(0) for name in beliefs[0].mean}
    return Diagonal(mean, merge(beliefs).precision)


def wrong_precisions_averaged(beliefs: list[Diagonal]) -> Diagonal:
    merged = merge(beliefs)
    return Diagonal(merged.mean, {name: value / len(beliefs) for name, value in merged.precision.items()})


def wrong_only_the_last_task(beliefs: list[Diagonal]) -> Diagonal:
    return beliefs[-1]


def assert_energies_differ_by_a_constant(merged: Diagonal, beliefs: list[Diagonal]) -> None:
    separate = Penalties(tuple(beliefs))
    gaps = [(separate.energy(params(s)) - merged.energy(params(s))).item() for s in range(2000, 2006)]
    assert max(gaps) - min(gaps) < 1e-9 * max(1.0, *map(abs, gaps)), gaps


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 999), min_size=1, max_size=5))
def test_several_quadratics_merge_into_one_up_to_a_constant(seeds: list[int]) -> None:
    beliefs = [diagonal(seed) for seed in seeds]
    assert_energies_differ_by_a_constant(right_merge(beliefs), beliefs)


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_last_anchor_for_all,
        wrong_plain_average_of_the_means,
        wrong_precisions_averaged,
        wrong_only_the_last_task,
    ],
    ids=lambda f: f.__name__,
)
def test_wrong_merges_are_caught_by_the_same_check(wrong: Callable[[list[Diagonal]], Diagonal]) -> None:
    beliefs = [diagonal(seed) for seed in range(3)]
    with pytest.raises(AssertionError):
        assert_energies_differ_by_a_constant(wrong(beliefs), beliefs)


def test_merging_with_what_is_unknown_keeps_what_is_known() -> None:
    known, unknown = diagonal(1), Diagonal.isotropic(params(2))
    for beliefs in ([known, unknown], [unknown, known]):
        torch.testing.assert_close(flatten(merge(beliefs).mean), flatten(known.mean), **TIGHT)
        assert torch.equal(flatten(merge(beliefs).precision), flatten(known.precision))
    nothing = merge([Diagonal.isotropic(params(1)), unknown])
    assert torch.equal(flatten(nothing.mean), flatten(unknown.mean))


# Bayes' rule on linear-Gaussian tasks: task by task equals all at once.

NOISE = 0.3


def regression(task: int, n: int = 12) -> tuple[Tensor, Tensor]:
    draw = generator(task)
    x = torch.randn(n + task, 4, generator=draw, dtype=torch.float64).to(device())
    return x, torch.randn(n + task, generator=draw, dtype=torch.float64).to(device())


def prior() -> Full:
    return Full.isotropic({"w": torch.full((4,), 0.2, dtype=torch.float64, device=device())}, 0.5)


def nll_and_energy(w: Tensor, x: Tensor, y: Tensor, belief: Full) -> Tensor:
    """What training minimises, times N, with Bayes' own strength 1."""
    return 0.5 / NOISE * (y - x @ w).square().sum() + belief.energy({"w": w})


def minimised(x: Tensor, y: Tensor, belief: Full) -> Tensor:
    """The exact minimiser of a quadratic: one Newton step from anywhere, gradient and Hessian by autograd."""
    w = torch.zeros(4, dtype=torch.float64, device=device())
    gradient = torch.func.grad(nll_and_energy)(w, x, y, belief)
    return w - torch.linalg.solve(torch.func.hessian(nll_and_energy)(w, x, y, belief), gradient)


def right_loop(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = belief.moved({"w": minimised(x, y, belief)}, x.T @ x / NOISE)
    return belief


def right_conditioning(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = condition_linear(belief, x, y, NOISE)
    return belief


def right_package(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    """The package's own EWC with the whole matrix, from a network's parameters: inputs in units of the noise."""
    model = nn.Linear(4, 1, bias=False).double().to(device())
    method, scaled = consolidation.ewc(1.0, full=True), [(x / NOISE**0.5, y / NOISE**0.5) for x, y in tasks]
    belief: Belief = Full.isotropic({"weight": prior().mean["w"][None]}, 0.5)
    for x, y in scaled:
        data = Examples(x, y[:, None])

        def energy(w: Tensor, data: Examples = data, belief: Belief = belief) -> Tensor:
            return len(data) * nll(data.x @ w.T, data.y) + belief.energy({"weight": w})

        w = torch.zeros(1, 4, dtype=torch.float64, device=device())
        curvature = torch.func.hessian(energy)(w).reshape(4, 4)
        restore(model, {"weight": w - torch.linalg.solve(curvature, torch.func.grad(energy)(w)[0])[None]})
        belief = method.consolidate(model, data, belief)
    return Full({"w": belief.mean["weight"][0]}, belief.precision)


def wrong_10_anchor_left_at_the_first_mode(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief, first = prior(), None
    for x, y in tasks:
        mode = minimised(x, y, belief)
        first = mode if first is None else first
        belief = belief.moved({"w": first}, x.T @ x / NOISE)
    return Full({"w": mode}, belief.precision)


def wrong_10_only_the_last_task_kept(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = prior().moved({"w": minimised(x, y, belief)}, x.T @ x / NOISE)
    return belief


def wrong_10_anchor_moved_to_the_current_weights(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        flat = Full.isotropic(belief.mean)  # an anchor that follows the weights exerts no pull
        belief = belief.moved({"w": minimised(x, y, flat)}, x.T @ x / NOISE)
    return belief


def wrong_7_a_half_too_many(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = belief.moved({"w": minimised(x, y, belief)}, x.T @ x / NOISE / 2)
    return belief


def wrong_7_mean_where_the_sum_was_meant(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = belief.moved({"w": minimised(x, y, belief)}, x.T @ x / NOISE / len(y))
    return belief


def wrong_11_penalty_silently_zero(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        silent = Full.isotropic(belief.mean)
        belief = belief.moved({"w": minimised(x, y, silent)}, x.T @ x / NOISE)
    return belief


def wrong_12_one_example_too_many(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = belief.moved({"w": minimised(x, y, belief)}, x.T @ x / NOISE * (len(y) + 1) / len(y))
    return belief


def wrong_strength_two(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        doubled = Full(belief.mean, 2 * belief.precision)
        belief = belief.moved({"w": minimised(x, y, doubled)}, x.T @ x / NOISE)
    return belief


def wrong_diagonal_only(tasks: list[tuple[Tensor, Tensor]]) -> Full:
    belief = prior()
    for x, y in tasks:
        belief = belief.moved({"w": minimised(x, y, belief)}, torch.diag((x.T @ x / NOISE).diagonal()))
    return belief


def assert_equals_joint(learn: Callable[[list[tuple[Tensor, Tensor]]], Full]) -> None:
    tasks = [regression(i) for i in range(3)]
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    precision = 0.5 * torch.eye(4, dtype=torch.float64, device=device()) + x.T @ x / NOISE
    mean = torch.linalg.solve(precision, 0.5 * prior().mean["w"] + x.T @ y / NOISE)
    found = learn(tasks)
    torch.testing.assert_close(found.mean["w"], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.precision, precision, rtol=1e-8, atol=1e-8)


@pytest.mark.host
@pytest.mark.parametrize("learn", [right_loop, right_conditioning, right_package], ids=lambda f: f.__name__)
def test_task_by_task_equals_all_at_once(learn: Callable[[list[tuple[Tensor, Tensor]]], Full]) -> None:
    assert_equals_joint(learn)
    # Nor does the order matter.
    tasks = [regression(i) for i in range(3)]
    torch.testing.assert_close(learn(tasks).mean["w"], learn(tasks[::-1]).mean["w"], rtol=1e-8, atol=1e-8)


@pytest.mark.host
@pytest.mark.parametrize(
    "learn",
    [
        wrong_10_anchor_left_at_the_first_mode,
        wrong_10_only_the_last_task_kept,
        wrong_10_anchor_moved_to_the_current_weights,
        wrong_7_a_half_too_many,
        wrong_7_mean_where_the_sum_was_meant,
        wrong_11_penalty_silently_zero,
        wrong_12_one_example_too_many,
        wrong_strength_two,
        wrong_diagonal_only,
    ],
    ids=lambda f: f.__name__,
)
def test_wrong_loops_are_caught_by_the_same_check(learn: Callable[[list[tuple[Tensor, Tensor]]], Full]) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equals_joint(learn)


def test_evidence_of_linear_regression_is_the_density_of_the_targets() -> None:
    x, y = regression(0)
    covariance = NOISE * torch.eye(len(y), dtype=torch.float64, device=device()) + x @ prior().covariance() @ x.T
    expected = torch.distributions.MultivariateNormal(x @ prior().mean["w"], covariance).log_prob(y).item()
    assert log_evidence_linear(prior(), x, y, NOISE) == pytest.approx(expected, rel=1e-9)


def test_evidence_adds_up_over_the_tasks() -> None:
    (x, y), (x2, y2) = regression(0), regression(1)
    both = log_evidence_linear(prior(), torch.cat([x, x2]), torch.cat([y, y2]), NOISE)
    middle = condition_linear(prior(), x, y, NOISE)
    apart = log_evidence_linear(prior(), x, y, NOISE) + log_evidence_linear(middle, x2, y2, NOISE)
    assert apart == pytest.approx(both, rel=1e-9)


# Bad input.


def test_precisions_that_cannot_be() -> None:
    good = params(0)
    with pytest.raises(ValueError, match=r"'bias' must be finite .* at least 0; got precisions -1 to -1"):
        Diagonal(good, {**params(1, 0.0, 1.0), "bias": torch.full((2,), -1.0, dtype=torch.float64, device=device())})
    with pytest.raises(ValueError, match="at least 0"):
        Diagonal.isotropic(good, -1.0)
    with pytest.raises(ValueError, match="at least 0"):
        Full.isotropic(good, -1.0)
    for spoiled in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be finite"):
            Diagonal.isotropic(good, spoiled)
        with pytest.raises(ValueError, match="must be finite"):
            Full.isotropic({**good, "scale": good["scale"] * spoiled}, 1.0)
        with pytest.raises(ValueError, match="must be finite"):
            Full(good, full(0).precision * spoiled)


def test_shapes_and_names_that_do_not_fit() -> None:
    good, belief = params(0), diagonal(1)
    with pytest.raises(ValueError, match=r"same parameters; got {'scale'}"):
        Diagonal(good, {name: good[name].abs() for name in ("weight", "bias")})
    with pytest.raises(ValueError, match=r"'bias' must have the mean's shape \(2,\); got \(1,\)"):
        Diagonal(good, {**params(1, 0.0, 1.0), "bias": torch.ones(1, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"must be \(9, 9\) for this mean; got \(4, 4\)"):
        Full(good, torch.eye(4))
    lopsided = torch.eye(9)
    lopsided[0, 1] = 0.5
    with pytest.raises(ValueError, match=r"symmetric; got entries that differ by up to 0\.5"):
        Full(good, lopsided)
    for each in (belief, full(1), Penalties((belief,))):
        with pytest.raises(ValueError, match=r"'scale' must have the belief's shape .*no such parameter"):
            each.energy({name: good[name] for name in ("weight", "bias")})
        with pytest.raises(ValueError, match=r"'weight' must have the belief's shape \(2, 3\); got \(3, 2\)"):
            each.energy({**good, "weight": good["weight"].T})
        # A parameter that the belief does not know would not be protected, and nobody would notice (pitfall 11).
        with pytest.raises(ValueError, match=r"knows nothing of \['head'\]"):
            each.energy({**good, "head": torch.ones(3)})
    with pytest.raises(ValueError, match="no such parameter"):
        belief.moved(good, {"weight": good["weight"].abs()})
    with pytest.raises(ValueError, match="at least one belief to merge; got none"):
        merge([])
    with pytest.raises(ValueError, match="no such parameter"):
        merge([belief, Diagonal.isotropic({"other": torch.ones(2)})])


def test_flat_beliefs_cannot_be_sampled_or_normalised() -> None:
    for belief in (Diagonal.isotropic(params(0)), Full.isotropic(params(0))):
        for attempt in (belief.log_det, lambda b=belief: b.sample(generator(0)), lambda b=belief: log_normaliser(b)):
            with pytest.raises(ValueError, match=r"must be positive.*Start from a proper prior"):
                attempt()
    with pytest.raises(ValueError, match="positive definite"):
        Full.isotropic(params(0)).covariance()


def test_two_negative_directions_do_not_cancel_in_the_log_determinant() -> None:
    turned = torch.eye(9, dtype=torch.float64)
    turned[0, 1] = turned[1, 0] = turned[2, 3] = turned[3, 2] = 2.0  # eigenvalues 3, -1, 3, -1, and ones: product 9
    with pytest.raises(ValueError, match="positive definite"):
        Full({name: value.cpu() for name, value in params(0).items()}, turned).log_det()


def test_regression_that_cannot_be() -> None:
    x, y = regression(0)
    for noise in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="noise_variance must be finite and above 0; got"):
            condition_linear(prior(), x, y, noise)
    flat = Full.isotropic(prior().mean)
    with pytest.raises(ValueError, match=r"all 4 weights; got 1 examples .*proper prior"):
        condition_linear(flat, torch.eye(4, dtype=torch.float64, device=device())[:1], y[:1], NOISE)
