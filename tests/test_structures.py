"""Every labels x structure x layer of the Fisher against plain loops; Kronecker factors, subsets, regression."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import examples, fisher_matrix, network, nothing_changes, trainable
from test_fisher import TIGHT
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ewc_code import fisher, layers
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal
from ewc_code.models import flatten, mlp, nll, snapshot
from ewc_code.training import Settings, fit
from ewc_experiments import variants


class Normalised(nn.Module):
    """Words into vectors, attention between them, a norm of its own: little of it in Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed((x.abs() * 2).long().clamp(max=4)))
        return self.head((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


def images(*inside: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (2, 4, 4)), *inside, nn.Flatten(), nn.Linear(features, 3))


def bias_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model


CONVOLUTIONS = {
    "convolution, padded and strided": lambda: images(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), features=12),
    "convolution, dilated, no bias": lambda: images(nn.Conv2d(2, 3, 2, 1, 0, 2, bias=False), nn.Tanh(), features=12),
    "two convolutions": lambda: images(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), features=2),
}
SMOOTH = {
    "linear, no bias": lambda: nn.Sequential(nn.Linear(32, 4, bias=False), nn.GELU(), nn.Linear(4, 3)),
    "three layers": lambda: nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3)),
}
FALLBACK = {
    "convolution in groups": lambda: images(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), features=16),
    "convolution padded by reflection": lambda: images(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh(), features=48
    ),
    "convolution padded by name": lambda: images(nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh(), features=48),
    "one dimension": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 16)), nn.Conv1d(2, 3, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(21, 3)
    ),
    "embedding, attention, layer norm": Normalised,
    "bias frozen": bias_frozen,
}
ALL = CONVOLUTIONS | SMOOTH | FALLBACK


def made(name: str) -> tuple[nn.Module, Examples]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ALL[name]().double().to(device()), examples(6, 32)


def drawn(model: nn.Module, data: Examples, draws: int, seed: int) -> list[Examples]:
    """The labels that 'sampled' draws, made one example and one draw at a time."""
    uniform = torch.rand(len(data), draws, generator=generator(seed), dtype=torch.float64)
    probs = model(data.x).softmax(1).detach().cpu()
    labels = [
        [next((c for c in range(3) if p[: c + 1].sum() >= u), 2) for u in row]
        for p, row in zip(probs, uniform, strict=True)
    ]
    return [Examples(data.x, torch.tensor(column).to(data.y.device)) for column in zip(*labels, strict=True)]


def expected_matrix(model: nn.Module, data: Examples, labels: fisher.Labels) -> Tensor:
    if labels != "sampled":
        return fisher_matrix(model, data, labels)
    return sum(fisher_matrix(model, labelled, "data") for labelled in drawn(model, data, 3, 5)) / 3


def blocks(model: nn.Module) -> dict[str, list[int]]:
    """By layer, where the rows of [W b] stand in the vector of all parameters."""
    start, place = 0, {}
    for name, p in model.named_parameters():
        place[name] = torch.arange(start, start + p.numel()).reshape(len(p), -1)
        start += p.numel()
    owners = dict.fromkeys(name.rpartition(".")[0] for name in place)
    return {
        owner: torch.cat([p for name, p in place.items() if name.rpartition(".")[0] == owner], 1).flatten().tolist()
        for owner in owners
    }


@pytest.mark.parametrize("labels", fisher.LABELS)
@pytest.mark.parametrize("name", ALL)
def test_diagonal_and_full_of_every_layer(name: str, labels: fisher.Labels) -> None:
    model, data = made(name)
    wanted = expected_matrix(model, data, labels)
    rest = {"labels": labels, "draws": 3 if labels == "sampled" else 1}
    with nothing_changes(model):
        diagonal = fisher.diagonal(model, data, generator=generator(5), batch_size=4, **rest)
        full = fisher.full(model, data, generator=generator(5), batch_size=4, **rest)
    torch.testing.assert_close(flatten(diagonal), wanted.diagonal(), **TIGHT)
    torch.testing.assert_close(full, wanted, **TIGHT)
    # A graph would be kept in every belief, and its second use in a loss would fail.
    assert not full.requires_grad
    assert not any(value.requires_grad for value in diagonal.values())


def test_the_closed_form_is_taken_where_it_should_be_and_nowhere_else() -> None:
    for name in ALL:
        model, data = made(name)
        found = set(layers.closed_form(model, data.x))
        plain = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
        if name == "embedding, attention, layer norm":  # all but the attention's own matrices
            assert found == {"embed", "norm", "head"}
        elif name in FALLBACK:
            assert found == ({"0", "2"} if name == "bias frozen" else {next(reversed(list(plain & found)))}), name
        else:
            assert found == plain, name


@pytest.mark.parametrize("labels", fisher.LABELS)
@pytest.mark.parametrize("name", CONVOLUTIONS | SMOOTH)
def test_kronecker_factors_are_the_means_they_are_said_to_be(name: str, labels: fisher.Labels) -> None:
    """A and G from loops over examples, classes and positions, with autograd's own gradients at the outputs."""
    model, data = made(name)
    rest = {"labels": labels, "draws": 3 if labels == "sampled" else 1}
    with nothing_changes(model):
        found = fisher.kronecker(model, data, generator=generator(5), batch_size=4, **rest)
    sets = drawn(model, data, 3, 5) if labels == "sampled" else [data]
    for layer_name, factors in found.items():
        layer = model.get_submodule(layer_name)
        a, g = torch.zeros_like(factors.inputs), torch.zeros_like(factors.outputs)
        for x, *ys in zip(data.x, *(s.y for s in sets), strict=True):
            seen = {}
            hook = layer.register_forward_hook(lambda _m, i, o, s=seen: s.update(h=i[0].detach(), a=o))
            log_probs = model(x[None]).log_softmax(1)[0]
            hook.remove()
            if isinstance(layer, nn.Conv2d):
                h = nn.functional.unfold(seen["h"], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
            else:
                h = seen["h"]
            h = torch.cat([h, torch.ones_like(h[:, :1])], 1) if layer.bias is not None else h
            a += sum(torch.outer(t, t) for t in h) / len(data)
            weights = {c: p.item() for c, p in enumerate(log_probs.exp())} if labels == "exact" else {}
            for y in ys if labels != "exact" else ():
                weights[int(y)] = weights.get(int(y), 0.0) + 1 / len(ys)
            for c, weight in weights.items():
                (back,) = torch.autograd.grad(log_probs[c], seen["a"], retain_graph=True)
                back = back[0].reshape(len(layer.weight), -1).T  # (t, o)
                g += weight * sum(torch.outer(t, t) for t in back) / (len(data) * len(back))
        torch.testing.assert_close(factors.inputs, a, **TIGHT)
        torch.testing.assert_close(factors.outputs, g, **TIGHT)


@pytest.mark.parametrize("labels", fisher.LABELS)
@pytest.mark.parametrize("name", CONVOLUTIONS | SMOOTH)
def test_corrected_factors_have_the_right_diagonal_in_their_own_basis(name: str, labels: fisher.Labels) -> None:
    model, data = made(name)
    # Of the same draws, whose whole matrix is compared with the loops above.
    rest = {"labels": labels, "batch_size": 4}
    matrix = fisher.full(model, data, generator=generator(3), **rest)
    plain = fisher.kronecker(model, data, generator=generator(3), **rest)
    corrected = fisher.kronecker(model, data, generator=generator(3), corrected=True, **rest)
    for layer, at in blocks(model).items():
        block, dense = matrix[at][:, at], corrected[layer].dense()
        basis = [torch.linalg.eigh(f).eigenvectors for f in (corrected[layer].outputs, corrected[layer].inputs)]
        turned = torch.kron(*basis).T @ block @ torch.kron(*basis)
        torch.testing.assert_close(corrected[layer].scale.reshape(-1), turned.diagonal(), **TIGHT)
        torch.testing.assert_close(dense.trace(), block.trace(), **TIGHT)
        assert (dense - block).norm() <= (plain[layer].dense() - block).norm() * (1 + 1e-9)


def test_one_datum_makes_the_factors_exact() -> None:
    model, data = network(), examples(1)
    matrix = fisher_matrix(model, data)
    for corrected in (False, True):
        for layer, factors in fisher.kronecker(model, data, corrected=corrected).items():
            at = blocks(model)[layer]
            torch.testing.assert_close(factors.dense(), matrix[at][:, at], **TIGHT)


def test_factors_are_refused_where_a_parameter_has_none() -> None:
    for name in ("embedding, attention, layer norm", "bias frozen", "convolution in groups"):
        model, data = made(name)
        with pytest.raises(ValueError, match=r"Kronecker factors need whole Linear or Conv2d layers.*Use fisher.diag"):
            fisher.kronecker(model, data)


# Regression: a Gaussian likelihood of variance 1 around the outputs.


def regression(n: int = 6, k: int = 2) -> tuple[nn.Module, Examples]:
    data = examples(n)
    return network(4, 5, k), Examples(
        data.x, torch.randn(n, k, generator=generator(9), dtype=torch.float64).to(device())
    )


def regression_matrix(model: nn.Module, data: Examples, labels: fisher.Labels) -> Tensor:
    total = 0
    noise = torch.randn(len(data), 3, data.y.shape[1], generator=generator(5), dtype=torch.float64).to(device())
    for x, y, drawn_residuals in zip(data.x, data.y, noise, strict=True):
        out = model(x[None])[0]
        rows = [torch.autograd.grad(o, trainable(model), retain_graph=True) for o in out]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])  # (k, P)
        residuals = {
            "exact": torch.eye(len(out), dtype=out.dtype, device=out.device),
            "data": (y - out)[None],
            "sampled": drawn_residuals / math.sqrt(3),
        }[labels].detach()
        for r in residuals:
            total = total + torch.outer(r @ jacobian, r @ jacobian)
    return total / len(data)


@pytest.mark.parametrize("labels", fisher.LABELS)
def test_regression_against_the_loops(labels: fisher.Labels) -> None:
    model, data = regression()
    wanted = regression_matrix(model, data, labels)
    rest = {"labels": labels, "draws": 3 if labels == "sampled" else 1}
    torch.testing.assert_close(
        flatten(fisher.diagonal(model, data, generator=generator(5), **rest)), wanted.diagonal(), **TIGHT
    )
    torch.testing.assert_close(fisher.full(model, data, generator=generator(5), **rest), wanted, **TIGHT)
    corrected = fisher.kronecker(model, data, generator=generator(5), corrected=True, **rest)
    plain = fisher.kronecker(model, data, generator=generator(5), **rest)
    for layer, at in blocks(model).items():
        block = wanted[at][:, at]
        basis = [torch.linalg.eigh(f).eigenvectors for f in (corrected[layer].outputs, corrected[layer].inputs)]
        turned = torch.kron(*basis).T @ block @ torch.kron(*basis)
        torch.testing.assert_close(corrected[layer].scale.reshape(-1), turned.diagonal(), **TIGHT)
        off = [(found[layer].dense() - block).norm() for found in (corrected, plain)]
        assert off[0] <= off[1] * (1 + 1e-9) + 1e-12 * block.norm()  # the last layer's product is exact


def test_regression_is_the_second_order_term_of_the_divergence() -> None:
    model, data = regression(40, 3)
    matrix, theta = fisher.full(model, data), snapshot(model)
    step = {
        name: 1e-4 * torch.randn(v.shape, generator=generator(1), dtype=v.dtype).to(v.device)
        for name, v in theta.items()
    }
    moved = functional_call(model, {name: theta[name] + step[name] for name in theta}, (data.x,))
    divergence = 0.5 * (moved - model(data.x)).square().sum(1).mean()  # of two Gaussians of variance 1
    flat = flatten(step)
    torch.testing.assert_close(divergence.detach(), 0.5 * flat @ matrix @ flat, rtol=0.05, atol=0.0)


@pytest.mark.host
def test_regression_hessian_is_the_fisher_for_a_linear_model() -> None:
    _, data = regression()
    model = network(4, 2)
    torch.testing.assert_close(fisher.hessian(model, data), fisher.full(model, data), **TIGHT)


def test_regression_is_fitted_and_targets_of_another_shape_are_refused() -> None:
    model, data = regression(64)
    before = nll(model(data.x), data.y).item()
    fit(model, data, Diagonal.isotropic(snapshot(model)), 0.0, Settings(epochs=20, batch_size=16), generator(0))
    assert nll(model(data.x), data.y).item() < before
    with pytest.raises(ValueError, match=r"targets must be \(n, 2\) for this model; got \(64, 1\)"):
        fisher.diagonal(model, Examples(data.x, data.y[:, :1]))


# The closed-form root of a softmax's covariance.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=8))
def test_root_of_the_covariance(logits: list[float]) -> None:
    probs = torch.tensor([logits], dtype=torch.float64).softmax(1)
    root = fisher.covariance_root(probs)
    assert root.shape == (1, len(logits), len(logits) - 1)
    wanted = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    torch.testing.assert_close(root @ root.mT, wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("probs", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1e-38, 1.0, 1e-42]])
def test_root_stays_finite_at_the_edges(probs: list[float]) -> None:
    p = torch.tensor([probs])
    root = fisher.covariance_root(p)
    assert root.isfinite().all()
    torch.testing.assert_close(root @ root.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])


# A subset, with its standard error.


def test_standard_error_is_that_of_the_examples_own_values() -> None:
    for model, data in ((network(), examples(9)), made("two convolutions"), made("embedding, attention, layer norm")):
        found = fisher.estimate(model, data, 5, generator(3), batch_size=2)
        chosen = torch.randperm(len(data), generator=generator(3))[:5].to(data.x.device)
        each = torch.stack([fisher_matrix(model, data[i : i + 1]).diagonal() for i in chosen])
        error = (each.var(0) / 5 * (1 - 5 / len(data))).sqrt()
        torch.testing.assert_close(flatten(found.mean), each.mean(0), **TIGHT)
        # The variance is a difference of means of squares: rounding leaves the root of an eps of the squares.
        torch.testing.assert_close(flatten(found.standard_error), error, rtol=1e-6, atol=1e-8 * each.abs().max().item())


def test_squared_standard_error_is_unbiased() -> None:
    model, data = network(4, 3), examples(400)
    whole = flatten(fisher.diagonal(model, data))
    excess = []
    for seed in range(200):
        found = fisher.estimate(model, data, 60, generator(seed))
        excess.append((flatten(found.mean) - whole).square().sum() - flatten(found.standard_error).square().sum())
    excess = torch.stack(excess)
    assert abs(excess.mean()) < 4 * excess.std() / 200**0.5


def test_all_examples_leave_no_error_and_too_many_are_refused() -> None:
    model, data = network(), examples(9)
    found = fisher.estimate(model, data, 9, generator(0))
    assert max(error.abs().max().item() for error in found.standard_error.values()) == 0
    torch.testing.assert_close(flatten(found.mean), flatten(fisher.diagonal(model, data)), **TIGHT)
    for wrong in (1, 10):
        with pytest.raises(ValueError, match=rf"examples must lie in 2..9, the size of the data; got {wrong}"):
            fisher.estimate(model, data, wrong, generator(0))


# torch.func, precision, memory, randomness.


def test_scores_work_under_transforms_for_a_stack_of_models() -> None:
    models, data = [network(seed=s) for s in range(3)], examples()
    stacked, _ = stack_module_state(models)
    stacked = {name: value.detach() for name, value in stacked.items()}

    def mean_square(theta: dict[str, Tensor]) -> Tensor:
        return flatten({n: s.square().mean(0) for n, s in fisher.scores(models[0], data.x, data.y, theta).items()})

    found = vmap(mean_square)(stacked)
    for model, row in zip(models, found, strict=True):
        torch.testing.assert_close(row, flatten(fisher.diagonal(model, data, "data")), **TIGHT)


def test_single_precision_agrees_with_double() -> None:
    for name in CONVOLUTIONS | SMOOTH:
        model, data = made(name)
        wanted = flatten(fisher.diagonal(model, data))
        found = flatten(fisher.diagonal(model.float(), Examples(data.x.float(), data.y)))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6 * wanted.max().item())


def test_draws_do_not_depend_on_the_batches_and_converge_with_their_number() -> None:
    model, data = network(), examples(30)
    many = [flatten(fisher.diagonal(model, data, "sampled", generator(0), b, draws=7)) for b in (1, 4, 30)]
    torch.testing.assert_close(many[0], many[1], **TIGHT)
    torch.testing.assert_close(many[0], many[2], **TIGHT)
    exact = flatten(fisher.diagonal(model, data))
    error = {
        d: torch.stack(
            [flatten(fisher.diagonal(model, data, "sampled", generator(s), draws=d)) - exact for s in range(40)]
        )
        for d in (1, 16)
    }
    ratio = error[1].square().mean().sqrt() / error[16].square().mean().sqrt()
    assert 3 < ratio < 5.4  # sqrt(16), the roots of mean squares of 40 repeats each known to about a tenth


def test_pieces_that_fit_in_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("two convolutions", "embedding, attention, layer norm"):
        model, data = made(name)
        whole = flatten(fisher.diagonal(model, data))
        monkeypatch.setattr(fisher, "LARGEST_EACH", 1)
        torch.testing.assert_close(flatten(fisher.diagonal(model, data)), whole, **TIGHT)


def test_draws_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1; got 0"):
        fisher.diagonal(network(), examples(), "sampled", generator(0), draws=0)


# The variants, each against the formula of its docstring.


def test_square_of_the_batch_gradient_has_the_expectation_that_is_derived() -> None:
    model, data = network(), examples(8)
    matrix = torch.stack([flatten(fisher.scores(model, data.x[i : i + 1], data.y[i : i + 1])) for i in range(8)])
    everything = torch.cartesian_prod(*[torch.arange(8)] * 2)  # all batches of two, drawn with replacement
    expected = torch.stack([matrix[pair].mean(0).square() for pair in everything]).mean(0)
    torch.testing.assert_close(expected, matrix.square().mean(0) / 2 + matrix.mean(0).square() / 2, **TIGHT)
    pairs = torch.arange(8).reshape(4, 2)
    found = flatten(variants.squared_batch_gradient(model, data, 2))
    torch.testing.assert_close(found, torch.stack([matrix[p].mean(0).square() for p in pairs]).mean(0), **TIGHT)


def test_each_variant_is_what_it_says_and_not_the_exact() -> None:
    model, data = network(), examples(12)
    exact = flatten(fisher.diagonal(model, data))
    probs = model(data.x).softmax(1).detach()

    def one(i: int, c: int) -> Tensor:
        return fisher_matrix(model, Examples(data.x[i : i + 1], torch.full_like(data.y[:1], c)), "data").diagonal()

    wanted = {
        variants.argmax(model, data)["0.weight"].sum(): sum(one(i, int(probs[i].argmax())) for i in range(12)),
        variants.weighted_by_probability(model, data)["0.weight"].sum(): sum(
            probs[i, data.y[i]] * one(i, int(data.y[i])) for i in range(12)
        ),
    }
    for found, total in wanted.items():
        torch.testing.assert_close(found, total[:20].sum() / 12, **TIGHT)
        assert not torch.allclose(found, exact[:20].sum(), rtol=0.05)
    mixed = variants.indexed_not_gathered(model, data, 12)
    counts = torch.bincount(data.y, minlength=3).double() / 12
    loops = 0
    for i in range(12):
        log_prob = model(data.x[i : i + 1]).log_softmax(1)[0] @ counts
        loops = (
            loops + torch.cat([g.reshape(-1) for g in torch.autograd.grad(log_prob, trainable(model))]).square() / 12
        )
    torch.testing.assert_close(flatten(mixed), loops, **TIGHT)
    drawn_labels = variants.drawn(model, data, generator(0)).y
    assert drawn_labels.shape == data.y.shape
    with pytest.raises(ValueError, match="batch_size must be at most the number of examples, 12; got 13"):
        variants.squared_batch_gradient(model, data, 13)


def test_dropout_left_on_is_the_mean_over_thinned_networks() -> None:
    model, data, rho = mlp((4, 5, 3)).double().to(device()), examples(6), 0.4
    torch.testing.assert_close(
        flatten(variants.dropout_left_on(model, data, 0.0, generator(0), 2)), flatten(fisher.diagonal(model, data))
    )
    masks, wanted = generator(1), 0
    for _ in range(3):
        kept = (torch.rand(5, generator=masks) > rho).double().to(device()) / (1 - rho)
        thin = copy.deepcopy(model)
        with torch.no_grad():
            thin[2].weight *= kept  # what the mask does to the input it does to the weight's columns
        squares = fisher_matrix(thin, data).diagonal().clone()
        squares[25:40] *= kept.square().repeat(3)  # and the derivative by the weight itself carries it
        wanted = wanted + squares / 3
    found = flatten(variants.dropout_left_on(model, data, rho, generator(1), 3))
    torch.testing.assert_close(found, wanted, **TIGHT)
    assert not torch.allclose(found, flatten(fisher.diagonal(model, data)), rtol=0.05)


@pytest.mark.parametrize("labels", ["exact", "sampled", "data"])
def test_memory_that_is_used_again_mixes_nothing(labels: fisher.Labels) -> None:
    """Layers as wide as the inputs and the outputs, several batches, the last one shorter."""
    model, data = mlp((4, 4, 4, 4)).double().to(device()), examples(11, classes=4)
    kept = data.x.clone()
    whole = flatten(fisher.diagonal(model, data, labels, generator(0), batch_size=11))
    for size in (1, 3, 4):
        found = flatten(fisher.diagonal(model, data, labels, generator(0), batch_size=size))
        torch.testing.assert_close(found, whole, **TIGHT)
    if labels != "sampled":
        torch.testing.assert_close(whole, fisher_matrix(model, data, labels).diagonal(), **TIGHT)
        each = torch.stack([flatten(fisher.diagonal(model, data[i : i + 1], labels)) for i in range(11)])
        with torch.no_grad():
            first, second = fisher._moments(model, data, labels, torch.empty(11, 0, device=device()), 4, second=True)
        torch.testing.assert_close(flatten(first), each.mean(0), **TIGHT)
        torch.testing.assert_close(flatten(second), each.square().mean(0), **TIGHT)
    assert torch.equal(data.x, kept)
