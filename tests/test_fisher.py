"""Every estimate against plain loops in float64; every slip of public code planted, and seen to fail the same check."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import examples, fisher_matrix, network, nll, nothing_changes, score, trainable, types_unchecked
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_code import fisher
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.models import flatten, snapshot, unflatten
from ewc_experiments.variants import relu_logits_mlp

TIGHT = {"rtol": 1e-9, "atol": 1e-13}


def repeated(data: Examples, times: int) -> Examples:
    return Examples(data.x.repeat(times, *[1] * (data.x.ndim - 1)), data.y.repeat(times))


# Models that must not take the closed form for Linear layers, or take it in an unusual way.


class Wrapped(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


class Tied(nn.Module):
    """One layer used twice, and one weight shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).tanh()).tanh())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()))


class Borrowed(nn.Module):
    """A weight that is also used outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh() + F.linear(x, self.layer.weight))


class Patches(nn.Module):
    """A layer that sees each example as two rows: the sum of scores fits the closed form, the squares do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.reshape(-1, 2)).tanh()
        return self.head(rows.reshape(len(x), 2, 5).mean(1))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x.reshape(-1, 2, 2)).tanh().mean(1))


class Scaled(nn.Module):
    """A parameter that sits in no layer, and has no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


def with_running_statistics() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
    model[1].running_mean.uniform_(-1, 1, generator=generator(3))
    return model


def first_layer_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def with_hook() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda _module, _received, returned: 2 * returned)
    return model


MODELS = {
    "multi-layer": network,
    "softmax regression": lambda: network(4, 3),
    "a bare layer": lambda: nn.Linear(4, 3),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    "in-place ReLU": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(3, 3)
    ),
    "nested": lambda: Wrapped(network()),
    "tied weights": Tied,
    "a layer used twice": Twice,
    "a weight used outside of its layer": Borrowed,
    "rows that are not examples": Patches,
    "sequence": Sequence,
    "a parameter of its own": Scaled,
    "batch norm and dropout in eval mode": with_running_statistics,
    "first layer frozen": first_layer_frozen,
    "layer with a hook": with_hook,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]().double().to(device())


@pytest.mark.parametrize("labels", ["exact", "data"])
def test_every_kind_of_model_against_the_loops(model: nn.Module, labels: fisher.Labels) -> None:
    data = examples()
    expected = fisher_matrix(model, data, labels)
    torch.testing.assert_close(flatten(fisher.diagonal(model, data, labels)), expected.diagonal(), **TIGHT)
    torch.testing.assert_close(fisher.full(model, data, labels), expected, **TIGHT)


def test_work_in_place_that_the_first_two_examples_do_not_show() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double().to(device())
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    mixed = examples()
    data = Examples(torch.cat([mixed.x[:2].abs(), mixed.x[2:]]), mixed.y)  # every unit is active on the first two
    torch.testing.assert_close(flatten(fisher.diagonal(model, data)), fisher_matrix(model, data).diagonal(), **TIGHT)


def test_names_and_shapes_are_those_of_the_parameters(model: nn.Module) -> None:
    found, params = fisher.diagonal(model, examples()), snapshot(model)
    assert list(found) == list(params)
    assert all(found[name].shape == params[name].shape for name in params)


def test_no_trace_is_left(model: nn.Module) -> None:
    data = examples()
    with nothing_changes(model):
        for labels in fisher.LABELS:
            fisher.diagonal(model, data, labels, generator(0))
            fisher.full(model, data, labels, generator(0))
        fisher.scores(model, data.x, data.y)
        fisher.logit_jacobian(model, data)


@pytest.mark.host
def test_no_trace_is_left_by_the_hessian() -> None:
    model = network()
    with nothing_changes(model):
        fisher.hessian(model, examples())


def test_each_module_keeps_its_own_mode_flag() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().to(device())
    model[1].eval()
    with nothing_changes(model):
        fisher.diagonal(model, examples())


def test_gradients_need_not_be_enabled() -> None:
    model, data = network(), examples()
    expected = flatten(fisher.diagonal(model, data))
    with torch.no_grad():
        assert torch.equal(flatten(fisher.diagonal(model, data)), expected)
        torch.testing.assert_close(fisher.full(model, data).diagonal(), expected, **TIGHT)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4).filter(lambda s: s[-1] >= 2),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_network_and_any_batch_size_against_the_loops(n: int, sizes: list[int], batch_size: int, seed: int) -> None:
    model, data = network(*sizes, seed=seed), examples(n, sizes[0], sizes[-1], seed)
    expected = fisher_matrix(model, data)
    torch.testing.assert_close(
        flatten(fisher.diagonal(model, data, batch_size=batch_size)), expected.diagonal(), **TIGHT
    )
    torch.testing.assert_close(fisher.full(model, data, batch_size=batch_size), expected, **TIGHT)


# The pitfalls: what public code computes instead. Each takes (model, data) and returns the diagonal as one vector.


def right_closed_form(model: nn.Module, data: Examples) -> Tensor:
    return flatten(fisher.diagonal(model, data))


def right_short_last_batch(model: nn.Module, data: Examples) -> Tensor:
    return flatten(fisher.diagonal(model, data, batch_size=4))


def right_per_example_gradients(model: nn.Module, data: Examples) -> Tensor:
    vectors = fisher._vectors(model(data.x).detach(), data.y, "exact", data.x)
    return flatten({n: f.mean(0) for n, f in fisher._squares(model, snapshot(model), data.x, vectors).items()})


def right_full_matrix(model: nn.Module, data: Examples) -> Tensor:
    return fisher.full(model, data).diagonal()


def right_summed_over_labels_by_hand(model: nn.Module, data: Examples) -> Tensor:
    probs = model(data.x).softmax(1).detach()
    return sum(
        probs[i, c] * score(model, x, c).square() for i, x in enumerate(data.x) for c in range(probs.shape[1])
    ) / len(data)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trainable(model), retain_graph=True)])


def wrong_1_argmax(model: nn.Module, data: Examples) -> Tensor:
    likely = Examples(data.x, model(data.x).argmax(1))
    return flatten(fisher.diagonal(model, likely, "data"))


def wrong_2_square_of_the_mean_gradient(model: nn.Module, data: Examples) -> Tensor:
    return gradient(model, F.cross_entropy(model(data.x), data.y)).square()


def wrong_3_labels_of_the_data(model: nn.Module, data: Examples) -> Tensor:
    return flatten(fisher.diagonal(model, data, "data"))


def wrong_4_indexed_where_gather_was_meant(model: nn.Module, data: Examples) -> Tensor:
    drawn = torch.multinomial(model(data.x).softmax(1).cpu(), 1, generator=generator(0))[:, 0].to(data.y.device)
    picked = model(data.x).log_softmax(1)[:, drawn]  # (n, n), not (n,)
    return sum(gradient(model, row.mean()).square() for row in picked) / len(picked)


def wrong_5_weighted_by_the_true_label_only(model: nn.Module, data: Examples) -> Tensor:
    probs = model(data.x).softmax(1).detach()
    return sum(
        probs[i, y] * score(model, x, int(y)).square() for i, (x, y) in enumerate(zip(data.x, data.y, strict=True))
    ) / len(data)


def wrong_6_dropout_active(model: nn.Module, data: Examples) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = nn.Sequential(model[0], model[1], nn.Dropout(0.5), model[2])
        return fisher_matrix(noisy, data).diagonal()


def wrong_6_batch_norm_active(model: nn.Module, data: Examples) -> Tensor:
    """The statistics of the batch that is looked at in the place of the ones that were kept."""
    normed = nn.Sequential(model[0], nn.BatchNorm1d(5, eps=1e-30).to(data.x), model[1], model[2])
    logits = normed(data.x)
    probs, found = logits.softmax(1).detach(), 0
    for i in range(len(data)):
        for c in range(probs.shape[1]):
            s = torch.autograd.grad(logits.log_softmax(1)[i, c], trainable(model), retain_graph=True)
            found = found + probs[i, c] * torch.cat([g.reshape(-1) for g in s]).square() / len(data)
    return found


def wrong_7_summed_not_averaged(model: nn.Module, data: Examples) -> Tensor:
    return len(data) * right_closed_form(model, data)


def wrong_7_a_half_too_many(model: nn.Module, data: Examples) -> Tensor:
    return right_closed_form(model, data) / 2


def wrong_8_relu_on_the_logits(model: nn.Module, data: Examples) -> Tensor:
    return right_closed_form(nn.Sequential(*model, nn.ReLU()), data)


def wrong_12_one_example_too_many(model: nn.Module, data: Examples) -> Tensor:
    return right_closed_form(model, data) * len(data) / (len(data) - 1)


def wrong_12_last_example_left_out(model: nn.Module, data: Examples) -> Tensor:
    return right_closed_form(model, data[:-1]) * (len(data) - 1) / len(data)


def wrong_sign_in_the_residual(model: nn.Module, data: Examples) -> Tensor:
    jacobian = fisher.logit_jacobian(model, data)
    p = model(data.x).softmax(1).detach()
    middle = torch.diag_embed(p) + p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndp->p", jacobian, middle, jacobian) / len(data)


RIGHT = [value for name, value in list(globals().items()) if name.startswith("right_")]
WRONG = [value for name, value in list(globals().items()) if name.startswith("wrong_")]


def assert_is_the_exact_fisher(estimate: object, model: nn.Module, data: Examples) -> None:
    torch.testing.assert_close(estimate(model, data), fisher_matrix(model, data).diagonal(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("estimate", RIGHT, ids=lambda f: f.__name__)
def test_right_estimates_are_exact(estimate: object) -> None:
    assert_is_the_exact_fisher(estimate, network(), examples(10))


@pytest.mark.parametrize("estimate", WRONG, ids=lambda f: f.__name__)
def test_planted_slips_are_caught_by_the_same_check(estimate: object) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_is_the_exact_fisher(estimate, network(), examples(10))


def test_argmax_is_biased_low_where_the_model_is_unsure() -> None:
    model, data = network(), examples(50)
    assert wrong_1_argmax(model, data).sum() < 0.8 * right_closed_form(model, data).sum()


def test_empirical_fisher_vanishes_as_the_fit_gets_perfect_faster_than_the_exact() -> None:
    model, data = network(4, 3), examples(50)
    easy = Examples(data.x, model(data.x).argmax(1))
    ratios = []
    for _ in range(3):
        ratios.append((wrong_3_labels_of_the_data(model, easy).sum() / right_closed_form(model, easy).sum()).item())
        with torch.no_grad():
            model[0].weight.mul_(4)
            model[0].bias.mul_(4)
    assert ratios[0] > ratios[1] > ratios[2]


def test_square_of_the_mean_gradient_shrinks_with_the_batch_but_times_b_is_unbiased_for_sampled_labels() -> None:
    model, batch, repeats = network(), 8, 4000
    data = examples(batch)
    jacobian = fisher.logit_jacobian(model, data)
    probs = model(data.x).softmax(1).detach()
    drawn = torch.multinomial(probs.cpu(), repeats, replacement=True, generator=generator(0)).to(probs.device)
    residual = F.one_hot(drawn, 3).double() - probs[:, None]  # (batch, repeats, classes)
    squares = torch.einsum("brc,bcp->rp", residual, jacobian).div(batch).square().sum(1)  # one trace a repeat
    exact = right_closed_form(model, data).sum()
    error = squares.std() / repeats**0.5
    assert abs(batch * squares.mean() - exact) < 4 * batch * error
    assert squares.mean() < exact / 4  # without the factor: far off, by more than 100 standard errors
    assert exact - squares.mean() > 100 * error


def test_dead_class_has_zero_fisher() -> None:
    model, data = relu_logits_mlp((4, 5, 3)).double().to(device()), examples(20)
    with torch.no_grad():
        model[2].bias[1] = -100.0
    found = fisher.diagonal(model, data)
    assert found["2.weight"][1].abs().max() == 0
    assert found["2.bias"][1] == 0
    repaired = fisher.diagonal(nn.Sequential(*model[:-1]), data)
    assert repaired["2.bias"][1] > 0


def test_exact_fisher_is_jacobian_times_softmax_covariance_times_jacobian() -> None:
    model, data = network(), examples()
    total = 0
    for x in data.x:
        logits = model(x[None])[0]
        jacobian = torch.stack([gradient(model, z) for z in logits])
        p = logits.softmax(0).detach()
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    torch.testing.assert_close(fisher.full(model, data), total / len(data), **TIGHT)


def test_full_matrix_is_symmetric_and_positive_semidefinite() -> None:
    for labels in fisher.LABELS:
        found = fisher.full(network(), examples(), labels, generator(0))
        assert torch.equal(found, found.T)
        assert torch.linalg.eigvalsh(found).min() > -1e-12


def test_scores_have_mean_zero_under_the_model() -> None:
    model, data = network(), examples(3)
    probs = model(data.x).softmax(1).detach()
    mean = sum(
        probs[:, c, None] * torch.cat([v.flatten(1) for v in fisher.scores(model, data.x, data.y * 0 + c).values()], 1)
        for c in range(3)
    )
    assert mean.abs().max() < 1e-14


@pytest.mark.host
def test_equals_the_hessian_for_softmax_regression_and_not_for_a_hidden_layer() -> None:
    data = examples(12)
    linear, deep = network(4, 3), network(4, 5, 3)
    torch.testing.assert_close(fisher.full(linear, data), fisher.hessian(linear, data), **TIGHT)
    assert (fisher.full(deep, data) - fisher.hessian(deep, data)).abs().max() > 1e-3


@pytest.mark.host
def test_hessian_against_finite_differences_of_the_gradient() -> None:
    model, data, step = network(), examples(), 1e-5
    params = snapshot(model)
    center = flatten(params)
    columns = []
    for i in range(len(center)):
        ends = []
        for sign in (1, -1):
            moved = center.clone()
            moved[i] += sign * step
            fresh = network()
            fresh.load_state_dict(unflatten(moved, params))
            ends.append(gradient(fresh, nll(fresh, data)))
        columns.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(fisher.hessian(model, data), torch.stack(columns), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_is_the_second_order_term_of_the_divergence(seed: int) -> None:
    model, data = network(), examples(20)
    params = snapshot(model)
    direction = torch.randn(flatten(params).shape, generator=generator(seed), dtype=torch.float64).to(device())
    step = 1e-3 * direction / direction.norm()
    moved = network()
    moved.load_state_dict(unflatten(flatten(params) + step, params))
    log_p, log_q = model(data.x).log_softmax(1), moved(data.x).log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    quadratic = (0.5 * step @ fisher.full(model, data) @ step).item()
    assert divergence == pytest.approx(quadratic, rel=0.05)
    assert divergence != pytest.approx(2 * quadratic, rel=0.05)  # the half is needed


def test_sampled_labels_converge_at_one_over_the_root_of_their_number() -> None:
    model, data = network(), examples(5)
    exact = right_closed_form(model, data)
    counts, errors = (10, 500), []
    for count in counts:
        runs = [flatten(fisher.diagonal(model, repeated(data, count), "sampled", generator(s))) for s in range(20)]
        errors.append(torch.stack([(run - exact).norm().square() for run in runs]).mean().sqrt().item())
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    # 20 runs give each root mean square to about 1/sqrt(40) = 16 %; over a factor of 50 that is 0.057 in the slope.
    assert slope == pytest.approx(-0.5, abs=3 * 0.057)


def test_sampled_estimates_are_unbiased() -> None:
    model, data = network(), examples(5)
    runs = torch.stack(
        [flatten(fisher.diagonal(model, repeated(data, 50), "sampled", generator(s))) for s in range(40)]
    )
    error = runs.sum(1).std() / len(runs) ** 0.5
    assert abs(runs.sum(1).mean() - right_closed_form(model, data).sum()) < 4 * error


@pytest.mark.parametrize("labels", fisher.LABELS)
@pytest.mark.parametrize("method", [fisher.diagonal, fisher.full], ids=lambda f: f.__name__)
def test_batch_size_does_not_change_the_estimate(method: object, labels: fisher.Labels) -> None:
    model, data = network(), examples(23)
    found = [method(model, data, labels, generator(5), size) for size in (1, 4, 22, 23, 100)]
    for other in found[1:]:
        for a, b in zip(*(([f] if isinstance(f, Tensor) else f.values()) for f in (found[0], other)), strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("labels", ["exact", "data"])
def test_copies_of_the_data_leave_the_mean_unchanged(labels: fisher.Labels) -> None:
    model, data = network(), examples()
    torch.testing.assert_close(
        flatten(fisher.diagonal(model, repeated(data, 3), labels)),
        flatten(fisher.diagonal(model, data, labels)),
        **TIGHT,
    )


def test_one_datum_makes_the_kronecker_factorisation_exact() -> None:
    model, data = network(), examples(1)
    hidden = model[1](model[0](data.x)).detach()[0]
    p = model(data.x).softmax(1).detach()[0]
    block = fisher.full(model, data)[-18:-3, -18:-3]  # the last layer's weight, (3, 5), before its bias
    expected = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(hidden, hidden))
    torch.testing.assert_close(block, expected, **TIGHT)


@pytest.mark.parametrize("labels", fisher.LABELS)
def test_fixed_seed_gives_the_same_bits(labels: fisher.Labels) -> None:
    data = examples(30)
    first, second = (flatten(fisher.diagonal(network(), data, labels, generator(1))) for _ in range(2))
    assert torch.equal(first, second)


def test_trace_sums_the_diagonal() -> None:
    model, data = network(), examples()
    assert fisher.trace(fisher.diagonal(model, data)) == pytest.approx(fisher_matrix(model, data).trace().item())


# Bad input: what was expected, what came, what to do.


@pytest.mark.parametrize("method", [fisher.diagonal, fisher.full], ids=lambda f: f.__name__)
class TestBadInput:
    def refused(self, method: object, model: nn.Module, data: Examples, match: str, *rest: object) -> None:
        model = model.to(device()).double()
        with nothing_changes(model), pytest.raises(ValueError, match=match):
            method(model, data, *rest)

    @pytest.mark.parametrize(
        "layer",
        [nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.BatchNorm1d(5), nn.RReLU()],
        ids=lambda layer: type(layer).__name__,
    )
    def test_training_mode(self, method: object, layer: nn.Module) -> None:
        model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).train()
        self.refused(method, model, examples(), rf"'1' \({type(layer).__name__}\) .* Call model.eval\(\) first")
        if not isinstance(layer, nn.RReLU):  # which vmap does not know
            method(model.eval(), examples())

    def test_training_mode_inside_of_another_module(self, method: object) -> None:
        model = nn.Sequential(nn.Linear(4, 5), Wrapped(nn.Dropout(0.5)), nn.Linear(5, 3)).eval()
        model[1].inside.train()
        self.refused(method, model, examples(), "'1.inside'")

    def test_dropout_that_no_module_shows(self, method: object) -> None:
        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 50), nn.Linear(50, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(F.dropout(self.first(x), 0.5, self.training))

        self.refused(method, Hidden().train(), examples(), r"changed by .* between calls.*eval")
        method(Hidden().double().to(device()).eval(), examples())

    def test_normalisation_over_the_batch_that_no_module_shows(self, method: object) -> None:
        class Centred(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x - x.mean(0))

        self.refused(method, Centred(4, 3), examples(), "treats each example alone")

    def test_batch_norm_without_running_statistics(self, method: object) -> None:
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).eval()
        self.refused(method, model, examples(), "no running statistics")

    def test_parameter_without_gradient(self, method: object) -> None:
        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x)

        self.refused(method, Idle(), examples(), r"'idle.weight' has no gradient.*requires_grad_\(False\)")

    def test_no_trainable_parameter(self, method: object) -> None:
        self.refused(method, network().requires_grad_(False), examples(), "at least one parameter|has none")

    def test_labels_out_of_range(self, method: object) -> None:
        data = examples()
        for label in (-1, 3):
            wrong = Examples(data.x, torch.full_like(data.y, label))
            self.refused(method, network(), wrong, rf"0\.\.2 for this model; got {label}\.\.{label}.*Renumber")

    def test_inputs_that_do_not_fit(self, method: object) -> None:
        self.refused(method, network(), examples(features=6), r"shape \(2, 6\).*Check the input size")
        data = examples()
        self.refused(method, network(), Examples(data.x.float(), data.y), "torch.float32.*dtype")

    def test_outputs_that_are_not_logits(self, method: object) -> None:
        self.refused(method, nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1))), examples(), r"\(2, 3, 1\)")

        class Pair(nn.Linear):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, super().forward(x)

        self.refused(method, Pair(4, 3), examples(), "got tuple")

    def test_unknown_labels(self, method: object) -> None:
        with types_unchecked():
            self.refused(method, network(), examples(), "one of 'exact', 'sampled', 'data'; got 'true'", "true")

    def test_sampled_without_a_generator(self, method: object) -> None:
        self.refused(method, network(), examples(), "torch.Generator.*got None.*generator", "sampled")

    def test_batch_size_below_one(self, method: object) -> None:
        self.refused(method, network(), examples(), "batch_size must be at least 1; got 0", "exact", None, 0)


def test_too_many_parameters_for_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "LARGEST_FULL", 10)
    for method in (fisher.full, fisher.hessian):
        with pytest.raises(ValueError, match=r"at most 10 parameters; the model has 43. Use fisher.diagonal"):
            method(network(), examples())
