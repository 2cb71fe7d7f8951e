"""Models and data as found outside of this book: a right Fisher, or a refusal, at every size of the batches."""

import copy

import pytest
import torch
from oracles import examples, fisher_matrix
from torch import Tensor, nn

from ewc_code import consolidation, fisher, importance, layers, storage
from ewc_code.data import Examples
from ewc_code.environment import device, generator, products
from ewc_code.gaussian import Diagonal, Full, Kronecker
from ewc_code.laplace import laplace, log_evidence, predictive
from ewc_code.models import flatten, mlp, outputs, restore, snapshot
from ewc_code.rehearsal import Answers
from ewc_code.sweep import Run, sweep
from ewc_code.training import Settings, accuracy, fit

CLASSES = 3


class Recurrent(nn.Module):
    """Each input is a step of a sequence."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(1, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[:, :, None])[0][:, -1])


class Table(nn.Module):
    """A column of categories, which are embedded, beside columns of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.embed((x[:, 0].abs() * 3).long().clamp(max=8)), x[:, 1:]], 1))


class Keyword(nn.Module):
    """A layer that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(input=x)))


class Attention(nn.Module):
    """With layers of their own for queries, keys and values, as BERT has them."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(width, out) for out in (width, width, width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([x, x.roll(1, 1), x.square()], 1)  # (n, 3, d)
        return self.head(((self.q(z) @ self.k(z).mT / 2).softmax(-1) @ self.v(z)).mean(1))


class Doubled(torch.autograd.Function):
    """A function with a backward of its own, which vmap cannot map."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(Doubled.apply(x * self.scale)))


def again(act: nn.Module) -> nn.Sequential:
    """One activation, used twice."""
    return nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 3), act, nn.Linear(3, CLASSES))


MODELS = {
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "categories": Table,
    "keyword": Keyword,
    "attention": Attention,
    "own function": Own,
    "PReLU": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, CLASSES)),
    "activation used twice": lambda: again(nn.ReLU()),
    "norm of rows": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES)),
    "groups": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, CLASSES)
    ),
}  # fmt: skip


def made(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().double().to(device()).eval()


FUSED = {"GRU", "LSTM"}  # on any device but the CPU torch calls kernels that the stand-in has not
EVERYWHERE = [pytest.param(name, marks=[pytest.mark.host] if name in FUSED else []) for name in MODELS]


@pytest.mark.parametrize("name", EVERYWHERE)
def test_diagonal_at_every_size_of_the_batches(name: str) -> None:
    """As many examples as classes among them: there an axis can be taken for another."""
    model, data = made(name), examples(7, 4, CLASSES)
    right = fisher_matrix(model, data).diagonal()
    for batch_size in (1, CLASSES, 7):
        torch.testing.assert_close(flatten(fisher.diagonal(model, data, batch_size=batch_size)), right)


@pytest.mark.parametrize(
    "name", sorted(MODELS.keys() - {"GRU", "RNN", "LSTM", "own function"})
)  # vmap, which full needs
def test_full_at_every_size_of_the_batches(name: str) -> None:
    model, data = made(name), examples(7, 4, CLASSES)
    right = fisher_matrix(model, data)
    for batch_size in (1, CLASSES, 7):
        torch.testing.assert_close(fisher.full(model, data, batch_size=batch_size), right)


@pytest.mark.parametrize("seed", range(60))
def test_an_activation_used_twice_is_in_its_place_for_every_draw(seed: int) -> None:
    model, data = made("activation used twice", seed), examples(9, 4, CLASSES)
    torch.testing.assert_close(flatten(fisher.diagonal(model, data)), fisher_matrix(model, data).diagonal())


def test_closed_forms_are_found_where_they_hold() -> None:
    data = examples(7, 4, CLASSES)
    assert set(layers.closed_form(made("attention"), data.x)) == {"q", "k", "v", "head"}
    assert set(layers.closed_form(made("activation used twice"), data.x)) == {"0", "2", "4"}
    assert set(fisher.kronecker(made("attention"), data)) == {"q", "k", "v", "head"}


class Chunks(nn.Module):
    """Goes through its examples piece by piece, so that a layer runs once for two examples and more often for many."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.split(4)])


class Adaptive(nn.Module):
    """A layer runs again where an example asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, hard = torch.tanh(self.middle(torch.tanh(self.first(x)))), x[:, :1] > 0.5
        return self.head(torch.where(hard, torch.tanh(self.middle(h)), h) if hard.any() else h)


def test_a_layer_that_does_not_run_once_an_example_is_refused_when_it_shows() -> None:
    data = examples(16, 4, CLASSES)
    chunks = Chunks().double().to(device())
    with pytest.raises(ValueError, match=r"'net.0' must run once .* did not on a batch of 16. Give batch_size=1"):
        fisher.diagonal(chunks, data)
    right = fisher_matrix(chunks, data).diagonal()
    for batch_size in (1, 4):
        torch.testing.assert_close(flatten(fisher.diagonal(chunks, data, batch_size=batch_size)), right)
    adaptive = Adaptive().double().to(device())
    sorted_ = data[data.x[:, 0].argsort()]
    assert not (sorted_.x[:2, 0] > 0.5).any() and (sorted_.x[:, 0] > 0.5).any()
    with pytest.raises(ValueError, match="'middle' must run once"):
        fisher.diagonal(adaptive, sorted_)


class Dropped(nn.Module):
    """Leaves a block out for one example in ten while it trains, in no module that torch knows as random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        kept = torch.empty(len(h), 1, device=h.device, dtype=h.dtype).bernoulli_(0.9) if self.training else 1.0
        return self.head(torch.relu(h + kept * self.block(h)))


class Tied(nn.Module):
    """A weight that is used twice, whose squares a bias outweighs by far where inputs are small."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(nn.functional.linear(x, self.out.weight)))


def test_a_large_bias_hides_no_wrong_weight() -> None:
    model, data = Tied().double().to(device()), examples(8, 4, 4)
    small = Examples(0.01 * data.x, data.y)
    assert not layers.closed_form(model, small.x)
    torch.testing.assert_close(flatten(fisher.diagonal(model, small)), fisher_matrix(model, small).diagonal())


def test_masked_classes_are_no_randomness_and_noise_is_refused() -> None:
    class Masked(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.scale, self.head, self.noise = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), noise

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x * self.scale)
            if self.noise:
                return self.head(h + self.noise * torch.randn_like(h))
            return self.head(h).masked_fill(torch.arange(4, device=x.device) > 2, -torch.inf)

    data = examples(9, 4, 3)
    found = fisher.diagonal(Masked(0.0).double().to(device()), data, "data")
    assert all(torch.isfinite(value).all() for value in found.values())
    with torch.random.fork_rng(), pytest.raises((ValueError, RuntimeError), match=r"random operation|Call model\.eval"):
        fisher.diagonal(Masked(1e-3).double().to(device()).eval(), data)


def test_blocks_that_are_left_out_now_and_then_are_refused() -> None:
    model, data = Dropped().double().to(device()), examples(20, 4, CLASSES)
    silent = 0
    with torch.random.fork_rng():
        for seed in range(30):
            torch.manual_seed(seed)
            try:
                fisher.diagonal(model.train(), data)
                silent += 1
            except ValueError as refused:
                assert "Call model.eval() first" in str(refused)
    assert silent <= 4  # a chance of 0.9^32 each that no call left the block out
    fisher.diagonal(model.eval(), data)


class Backbone(nn.Module):
    """A frozen part in half precision, as large models are kept, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 6).bfloat16().requires_grad_(False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x.bfloat16())).float())


def test_draws_are_as_fine_as_what_is_trained() -> None:
    """A sure network's rare labels: uniform numbers with eight bits never draw them, or far too often."""
    model, draw = Backbone().to(device()), generator(0)
    with torch.no_grad():
        model.head.weight.mul_(0.1)
        model.head.bias.copy_(torch.tensor([0.0, 8.0, 0.0]))
    data = Examples(torch.randn(500, 5, generator=draw).to(device()), torch.zeros(500, dtype=torch.long).to(device()))
    exact = fisher.trace(fisher.diagonal(model, data))
    drawn = fisher.trace(fisher.diagonal(model, data, "sampled", draw, draws=200))
    # About 500 x 200 x 6.7e-4 = 67 rare labels: a relative standard error of an eighth.
    assert abs(drawn / exact - 1) < 4 / 67**0.5


def test_curvature_is_not_rounded_where_training_is() -> None:
    model = mlp((64, 64, 10)).to(device())
    data = Examples(torch.rand(40, 64, generator=generator(0)).to(device()), torch.arange(40).to(device()) % 10)
    plain = [fisher.diagonal(model, data), fisher.kronecker(model, data)]
    with products("medium"):
        rounded = [fisher.diagonal(model, data), fisher.kronecker(model, data)]
        assert torch.get_float32_matmul_precision() == "medium"
    torch.testing.assert_close(rounded[0], plain[0], rtol=0, atol=0)
    for name, factors in plain[1].items():
        torch.testing.assert_close(rounded[1][name].inputs, factors.inputs, rtol=0, atol=0)


def test_full_beliefs_keep_the_order_of_their_matrix(tmp_path) -> None:
    class Two(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(4, 4) if name == "a" else nn.Linear(4, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    one, other = Two("ab").double().to(device()), Two("ba").double().to(device())
    restore(other, snapshot(one))
    data = examples(9, 4, CLASSES)
    belief = laplace(one, data, Full.isotropic(snapshot(one), 1.0))
    theta = {
        name: value + 0.1 * torch.arange(value.numel(), device=device()).view_as(value)
        for name, value in snapshot(one).items()
    }
    storage.save(belief, tmp_path / "belief")
    found = storage.load(tmp_path / "belief", other)
    torch.testing.assert_close(found.energy(theta), belief.energy(theta))
    with pytest.raises(ValueError, match="in this order"):
        laplace(other, data, belief)


def test_accuracy_and_predictions_of_sequences_and_none_of_regressions() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)).to(device())
    tokens = torch.randint(0, 6, (40, 6), generator=generator(0)).to(device())
    data = Examples(tokens, tokens.roll(1, 1))
    assert accuracy(model, data) == pytest.approx((model(tokens).argmax(-1) == data.y).float().mean().item())
    sure = Diagonal.isotropic(snapshot(model), 1e6)
    sums = predictive(model, sure, tokens, 3, generator(0)).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    line, targets = nn.Linear(4, 1), torch.zeros(5, 1)
    with pytest.raises(ValueError, match="labels that are classes"):
        accuracy(line.to(device()), Examples(torch.ones(5, 4).to(device()), targets.to(device())))


def test_all_methods_count_the_labels_of_sequences() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)).to(device())
    tokens = torch.randint(0, 6, (20, 8), generator=generator(0)).to(device())
    data, before = Examples(tokens, tokens), snapshot(model)
    theta = {name: value + 0.1 for name, value in before.items()}
    belief = consolidation.l2(1.0).consolidate(model, data, Diagonal.isotropic(before))
    size = sum(value.numel() for value in before.values())
    assert belief.energy(theta).item() / data.count == pytest.approx(0.5 * 0.01 * size, rel=1e-4)

    old = model(tokens).detach() / 2
    answers = Answers.extended(None, model, data, 2.0)
    restore(model, theta)
    new = model(tokens).detach() / 2
    cross = -(old.softmax(-1) * new.log_softmax(-1)).sum(-1).mean()
    assert answers.energy(theta, tokens).item() == pytest.approx(data.count * 4 * cross.item(), rel=1e-5)


def test_evidence_of_a_linear_regression_is_exact() -> None:
    draw = generator(0)
    x = torch.randn(20, 2, generator=draw, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [2.0]], dtype=torch.float64) + torch.randn(20, 1, generator=draw, dtype=torch.float64)
    line = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        line.weight.copy_(torch.linalg.solve(x.T @ x + torch.eye(2).double(), x.T @ y).T)
    prior = Full.isotropic({"weight": torch.zeros(1, 2).double()}, 1.0)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(20).double(), torch.eye(20).double() + x @ x.T)
    assert log_evidence(line, Examples(x, y), prior) == pytest.approx(marginal.log_prob(y[:, 0]).item())


def test_probabilities_and_a_single_logit_are_refused_as_logits() -> None:
    data = examples(9, 4, 2)
    last = nn.Linear(4, 2).double().to(device())
    with pytest.raises(ValueError, match="Leave out softmax"):
        fisher.diagonal(nn.Sequential(last, nn.Softmax(1)), data)
    single = nn.Linear(4, 1).double().to(device())
    with pytest.raises(ValueError, match="two for yes and no"):
        outputs(single, Examples(data.x, torch.zeros_like(data.y)))


@pytest.mark.parametrize("kind", [Diagonal, Full, Kronecker])
def test_beliefs_about_live_parameters_are_refused(kind) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).to(device())
    with pytest.raises(ValueError, match=r"training moves '0.weight'. Use models.snapshot"):
        kind.isotropic(dict(model.named_parameters()), 1.0)


def test_an_energy_under_inference_mode_leaves_training_alone() -> None:
    model = nn.Linear(3, 2).to(device())
    belief, theta = Diagonal.isotropic(snapshot(model), 1.0), dict(model.named_parameters())
    with torch.inference_mode():
        belief.energy(theta)
    belief.energy(theta).backward()
    assert model.weight.grad is not None


def test_inputs_that_hang_on_a_graph_leave_none_in_the_belief() -> None:
    trunk, data = nn.Linear(4, 4).double().to(device()), examples(9, 4, CLASSES)
    inputs = Examples(trunk(data.x), data.y)
    model = made("norm of rows")
    for prior in (Diagonal, Full):
        precision = laplace(model, inputs, prior.isotropic(snapshot(model))).precision
        parts = precision.values() if isinstance(precision, dict) else [precision]
        assert not any(value.requires_grad for value in parts)
    assert not any(value.requires_grad for value in importance.sensitivity(model, inputs).values())


def test_complex_parameters_are_refused() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, CLASSES, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex64) @ self.w).abs()

    data = examples(5, 4, CLASSES)
    with pytest.raises(ValueError, match="float32 or float64"):
        fisher.diagonal(Waves().to(device()), Examples(data.x.float(), data.y))


@pytest.mark.host
def test_settings_that_a_text_cannot_tell_apart_are_refused() -> None:
    from functools import partial

    run = Run(partial(torch.zeros, torch.zeros(3)), consolidation.none(), torch.nn.Linear, Settings())
    with pytest.raises(ValueError, match="numbers, texts or tuples of them; got Tensor"):
        sweep([run])


def test_a_fit_that_fails_puts_the_model_back() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double().to(device())
    before = copy.deepcopy(model.state_dict())
    data = examples(9, 4, CLASSES)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fit(model, data, Diagonal.isotropic(snapshot(model)), settings=Settings(1, 4))  # the last batch holds one
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        ((torch.ones(4, 3), torch.zeros(4)), "Tensor"),
        ([(torch.ones(4, 3), torch.zeros(4), torch.zeros(4))], r"\['Tensor', 'Tensor', 'Tensor'\]"),
        ([{"x": torch.ones(4, 3), "y": torch.zeros(4)}], "dict"),
        ([({"ids": torch.ones(4, 3)}, torch.zeros(4))], r"\['dict', 'Tensor'\]"),
    ],
)
def test_batches_that_are_no_pairs_are_refused(batches, got) -> None:
    model = mlp((3, 2)).to(device())
    with pytest.raises(ValueError, match=f"pairs of tensors, .* got {got}"):
        laplace(model, iter(batches), Diagonal.isotropic(snapshot(model)))  # past the type checker


def test_names_of_the_task_survive_tracking() -> None:
    model, data = mlp((4, CLASSES)).double().to(device()), examples(9, 4, CLASSES)
    work = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    with pytest.raises(FloatingPointError, match="of the third task the loss was"):
        fit(
            model,
            data,
            Diagonal.isotropic(snapshot(model)),
            0.0,
            Settings(50, 3, 1e300),
            name="the third task",
            work=work,
        )
