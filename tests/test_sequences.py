"""Models of sequences, and what else a reader's own network may hold, against plain loops in float64."""

import copy
import resource
import subprocess
import sys
from functools import partial

import pytest
import torch
from oracles import examples as classes
from oracles import fisher_matrix, network, nothing_changes, trainable
from test_fisher import TIGHT
from torch import Tensor, nn

from ewc_code import consolidation, fisher, layers, storage
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal, Full, Kronecker
from ewc_code.laplace import laplace
from ewc_code.models import Transformer, flatten, nll, restore, snapshot, transformer
from ewc_code.training import Settings, fit
from ewc_experiments.language import write

VOCABULARY, LENGTH = 5, 4


def written(n: int = 6, seed: int = 0) -> Examples:
    """Random tokens, each position's label the next one."""
    tokens = torch.randint(0, VOCABULARY, (n, LENGTH + 1), generator=generator(seed)).to(device())
    return Examples(tokens[:, :-1], tokens[:, 1:].contiguous())


def language(seed: int = 0, **kinds: int) -> Transformer:
    """A tiny transformer in float64, its weights spread enough for attention to matter."""
    model = transformer(VOCABULARY, LENGTH, **{"width": 4, "heads": 2, "depth": 2} | kinds, seed=seed).to(device())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
    return model.double()


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, trainable(model), retain_graph=True)]).detach()


def matrix(model: nn.Module, data: Examples) -> Tensor:
    """1/(n t) sum_x sum_t sum_c p(c) s_t s_t^T, one example, one position and one class at a time."""
    total = 0
    for x in data.x:
        log_probs = model(x[None])[0].log_softmax(-1)  # (t, v)
        for row in log_probs:
            for log_prob in row:
                s = gradient(model, log_prob)
                total = total + log_prob.exp().item() * torch.outer(s, s)
    return total / data.y.numel()


def data_matrix(model: nn.Module, data: Examples) -> Tensor:
    """1/(n t) sum_x s s^T, s the score of all labels of a sequence: the empirical Fisher, cross terms and all."""
    total = 0
    for x, y in zip(data.x, data.y, strict=True):
        s = gradient(model, model(x[None])[0].log_softmax(-1).gather(1, y[:, None]).sum())
        total = total + torch.outer(s, s)
    return total / data.y.numel()


def test_loss_is_the_mean_over_all_positions() -> None:
    model, data = language(), written()
    rows = model(data.x).log_softmax(-1).flatten(0, 1)
    expected = -torch.stack([row[y] for row, y in zip(rows, data.y.flatten(), strict=True)]).mean()
    torch.testing.assert_close(nll(model(data.x), data.y), expected, **TIGHT)
    assert data.count == 24


def test_no_position_sees_a_later_one() -> None:
    model, data = language(), written()
    changed = data.x.clone()
    changed[:, 2:] = (changed[:, 2:] + 1) % VOCABULARY
    torch.testing.assert_close(model(changed)[:, :2], model(data.x)[:, :2], **TIGHT)
    assert (model(changed)[:, 2:] - model(data.x)[:, 2:]).abs().max() > 1e-3


def test_attention_is_the_formula_of_its_docstring() -> None:
    attention = language().blocks[0].attention
    h = torch.randn(1, LENGTH, 4, generator=generator(1), dtype=torch.float64).to(device())
    q, k, v = attention.ask(h)[0].split(4, dim=1)
    out = torch.zeros(LENGTH, 4, dtype=h.dtype, device=h.device)
    for head in range(2):
        own = slice(2 * head, 2 * head + 2)
        for t in range(LENGTH):
            weights = torch.stack([q[t, own] @ k[s, own] / 2**0.5 for s in range(t + 1)]).softmax(0)
            out[t, own] = sum(w * v[s, own] for s, w in enumerate(weights))
    torch.testing.assert_close(attention(h)[0], attention.out(out), **TIGHT)


def test_diagonal_and_full_with_the_datas_labels() -> None:
    model, data = language(), written()
    wanted = data_matrix(model, data)
    with nothing_changes(model):
        diagonal = fisher.diagonal(model, data, "data", batch_size=4)
        full = fisher.full(model, data, "data", batch_size=4)
    torch.testing.assert_close(flatten(diagonal), wanted.diagonal(), **TIGHT)
    torch.testing.assert_close(full, wanted, **TIGHT)


@pytest.mark.host  # a mean over many draws, minutes on a stand-in
def test_sampled_labels_have_the_exact_fisher_as_their_mean() -> None:
    model, data = language(depth=1), written(2)
    wanted = matrix(model, data).diagonal()
    found = torch.stack([flatten(fisher.diagonal(model, data, "sampled", generator(s), draws=20)) for s in range(50)])
    error = found.std(0) / len(found) ** 0.5
    moved = error > 1e-12 * wanted.max()
    score = ((found.mean(0) - wanted) / error)[moved]
    # A mean of hundreds of correlated standard normal squares: 1, with room for the correlation.
    assert score.abs().max() < 6
    assert score.square().mean() < 2
    one = torch.stack([flatten(fisher.diagonal(model, data, "sampled", generator(s))) for s in range(50)])
    assert 10 < (one.var(0).sum() / found.var(0).sum()) < 40  # 20 draws have a twentieth of the variance


def test_every_layer_of_the_transformer_has_a_closed_form() -> None:
    model, data = language(), written()
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert set(layers.closed_form(model, data.x)) == owners


def test_tied_weights_fall_back_and_are_right() -> None:
    model, data = language(depth=1), written()
    model.head.weight = model.token.weight
    assert not {"token", "head"} & set(layers.closed_form(model, data.x))
    torch.testing.assert_close(
        flatten(fisher.diagonal(model, data, "data")), data_matrix(model, data).diagonal(), **TIGHT
    )


def test_frozen_parts_take_no_part() -> None:
    model, data = language(depth=1), written()
    for parameter in (*model.token.parameters(), *model.blocks.parameters()):
        parameter.requires_grad_(False)
    found = fisher.diagonal(model, data, "data")
    assert set(found) == {"place.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    torch.testing.assert_close(flatten(found), data_matrix(model, data).diagonal(), **TIGHT)


def test_a_layer_of_torchs_own_transformer() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, torch.float64)
            return self.head(self.layer(self.embed(x), src_mask=mask))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Own().double().to(device())
    data = written()
    with pytest.raises(ValueError, match=r"curvature needs a deterministic model.*Call model.eval\(\) first"):
        fisher.diagonal(model, data, "data")
    model.eval()
    torch.testing.assert_close(
        flatten(fisher.diagonal(model, data, "data")), data_matrix(model, data).diagonal(), **TIGHT
    )


def test_batch_norm_is_taken_as_it_answers_in_evaluation_mode() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double().to(device())
    data = classes(20)
    model(data.x)  # moves the running statistics
    model.eval()
    torch.testing.assert_close(flatten(fisher.diagonal(model, data)), fisher_matrix(model, data).diagonal(), **TIGHT)


def test_factors_of_sequences_are_means_over_positions() -> None:
    model, data = language(depth=1), written()
    for part in (model.token, model.place, model.norm, model.blocks[0].before, model.blocks[0].between):
        part.requires_grad_(False)
    found = fisher.kronecker(model, data, "data", batch_size=4)
    h = model.norm(model.blocks[0](model.token(data.x) + model.place.weight))
    h = torch.cat([h, torch.ones_like(h[..., :1])], -1).flatten(0, 1)
    residual = (nn.functional.one_hot(data.y, VOCABULARY) - model(data.x).softmax(-1)).flatten(0, 1)
    torch.testing.assert_close(found["head"].inputs, (h.T @ h / len(h)).detach(), **TIGHT)
    torch.testing.assert_close(found["head"].outputs, (residual.T @ residual / len(h)).detach(), **TIGHT)


def test_exact_labels_of_sequences_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"labels='exact' needs one label an example; got sequences of 4\. Use labels='sam"
    ):
        laplace(language(), written(), Diagonal.isotropic(snapshot(language())))


def test_outputs_that_are_no_sequences_are_refused() -> None:
    model = nn.Sequential(language(), nn.Flatten())
    with pytest.raises(ValueError, match=r"logits of shape \(n, t, classes\), here \(2, 4, classes\); got \(2, 20\)"):
        fisher.diagonal(model, written(), "data")


def test_standard_error_of_sequences() -> None:
    model, data = language(depth=1), written(9)
    found = fisher.estimate(model, data, 5, generator(3), "data", batch_size=2)
    chosen = torch.randperm(9, generator=generator(3))[:5].to(data.x.device)
    each = torch.stack([data_matrix(model, data[i : i + 1]).diagonal() for i in chosen])
    error = (each.var(0) / 5 * (1 - 5 / 9)).sqrt()
    torch.testing.assert_close(flatten(found.mean), each.mean(0), **TIGHT)
    torch.testing.assert_close(flatten(found.standard_error), error, rtol=1e-6, atol=1e-8 * each.abs().max().item())


def test_belief_counts_positions_and_batches_add_up() -> None:
    model, data = language(depth=1), written(7)
    prior = Diagonal.isotropic(snapshot(model), 2.0)
    whole = laplace(model, data, prior, "data")
    expected = {name: 2 + 7 * LENGTH * value for name, value in fisher.diagonal(model, data, "data").items()}
    torch.testing.assert_close(flatten(whole.precision), flatten(expected), **TIGHT)
    batches = [(data.x[i : i + 3], data.y[i : i + 3]) for i in (0, 3, 6)]
    torch.testing.assert_close(flatten(laplace(model, batches, prior, "data").precision), flatten(expected), **TIGHT)


def test_corrected_factors_of_several_batches_are_refused() -> None:
    model, data = network(), classes(8)
    corrected = partial(fisher.kronecker, corrected=True)
    with pytest.raises(ValueError, match="got corrected ones, each in a basis of its own"):
        fisher.over_batches(corrected, model, [(data.x[:4], data.y[:4]), (data.x[4:], data.y[4:])])


def test_fit_weighs_the_penalty_by_the_number_of_labels() -> None:
    """One full-batch step of plain gradient descent, written out."""
    model, data = language(depth=1), written()
    before = snapshot(model)
    prior = Diagonal({n: v + 0.1 for n, v in before.items()}, {n: torch.ones_like(v) for n, v in before.items()})
    loss = nll(model(data.x), data.y) + 3.0 / data.y.numel() * prior.energy(dict(model.named_parameters()))
    expected = flatten(before) - 0.1 * gradient(model, loss)
    fit(model, data, prior, 3.0, Settings(1, len(data), 0.1, decay=False, optimiser="sgd"))
    torch.testing.assert_close(flatten(snapshot(model)), expected, **TIGHT)


def test_replayed_sequences_stand_for_all_positions() -> None:
    model, data = language(depth=1), written(6)
    belief = consolidation.joint(batch_size=4000).consolidate(model, data, Diagonal.isotropic(snapshot(model)))
    draws = torch.stack([belief.energy(snapshot(model)) for _ in range(30)])
    expected = 6 * LENGTH * nll(model(data.x), data.y)
    assert abs(draws.mean() - expected) < 5 * draws.std() / 30**0.5


def test_a_language_model_learns_and_writes() -> None:
    tokens = torch.arange(80).remainder(VOCABULARY).unfold(0, LENGTH + 1, 1).to(device())
    data, model = Examples(tokens[:, :-1], tokens[:, 1:].contiguous()), transformer(VOCABULARY, LENGTH, 8, 2, 1)
    model.to(device())
    fit(model, data, Diagonal.isotropic(snapshot(model)), 0.0, Settings(epochs=60, batch_size=19, learning_rate=1e-2))
    found = write(model, data.x[:1, :1], 9, generator(0))
    assert found[0].tolist() == [i % VOCABULARY for i in range(10)]


def test_drawn_weights_do_not_touch_the_global_generator_and_come_again() -> None:
    with nothing_changes():
        one, two = transformer(VOCABULARY, seed=3), transformer(VOCABULARY, seed=3)
    assert torch.equal(flatten(snapshot(one)), flatten(snapshot(two)))
    assert not torch.equal(flatten(snapshot(one)), flatten(snapshot(transformer(VOCABULARY, seed=4))))
    with pytest.raises(ValueError, match="the width a multiple of the heads; got 5, 48, 6, 4, 2"):
        transformer(VOCABULARY, width=6)


def test_beliefs_of_a_transformer_are_saved_and_loaded(tmp_path) -> None:
    model, data = language(depth=1), written()
    belief = laplace(model, data, Diagonal.isotropic(snapshot(model)), "data")
    storage.save(belief, tmp_path / "belief")
    found = storage.load(tmp_path / "belief", model)
    assert torch.equal(flatten(found.precision), flatten(belief.precision))
    with pytest.raises(ValueError, match=r"place\.weight"):
        storage.load(tmp_path / "belief", transformer(VOCABULARY, LENGTH + 1, 4, 2, 1).double().to(device()))


# Precision and memory


@pytest.mark.host
@pytest.mark.parametrize("kind", [Diagonal, Kronecker, Full])
def test_curvature_and_energy_leave_autocast(kind: type) -> None:
    model, data = network().float(), classes()
    data = Examples(data.x.float(), data.y)
    prior = kind.isotropic(snapshot(model))
    plain = laplace(model, data, prior)
    with torch.autocast(device().type, torch.bfloat16):
        assert model(data.x).dtype == torch.bfloat16
        cast = laplace(model, data, prior)
    theta = {name: value + 0.1 for name, value in snapshot(model).items()}
    assert torch.equal(plain.energy(theta), cast.energy(theta))
    with torch.autocast(device().type, torch.bfloat16):
        assert torch.equal(plain.energy(theta), cast.energy(theta))
        assert cast.energy(theta).dtype == torch.float32
    torch.testing.assert_close(cast.energy(theta), plain.energy(theta), rtol=0, atol=0)


def test_parameters_in_half_precision_are_refused() -> None:
    data = classes()
    model = network().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 or float64.*'0.weight' is torch.bfloat16.*copy.deepcopy"):
        fisher.diagonal(model, Examples(data.x.to(torch.bfloat16), data.y))


def test_batches_that_do_not_fit_are_halved_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), classes(12)
    wanted, sizes = fisher.diagonal(model, data, "sampled", generator(0)), []
    plain = fisher._vectors

    def small(out: Tensor, y: Tensor, *rest: object) -> object:
        sizes.append(len(y))
        if len(y) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(out, y, *rest)

    monkeypatch.setattr(fisher, "_vectors", small)
    with nothing_changes(model), pytest.warns(UserWarning, match="did not fit into memory; 6 are tried"):
        found = fisher.diagonal(model, data, "sampled", generator(0), batch_size=12)
    assert sizes[:3] == [12, 6, 3]
    torch.testing.assert_close(flatten(found), flatten(wanted), **TIGHT)
    monkeypatch.setattr(fisher, "_vectors", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("none left")))
    with pytest.warns(UserWarning), pytest.raises(torch.cuda.OutOfMemoryError, match="none left"):
        fisher.diagonal(model, data, batch_size=2)


def test_memory_in_training_names_the_batch_and_keeps_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network(), classes(20)
    before, calls = copy.deepcopy(model.state_dict()), []

    def full(out: Tensor, y: Tensor) -> Tensor:
        calls.append(len(y))
        if len(calls) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return nll(out, y)

    monkeypatch.setattr("ewc_code.training.nll", full)
    with pytest.raises(MemoryError, match=r"step 3 of digits.*a batch \(5, 4\).*smaller batch_size"):
        fit(model, data, Diagonal.isotropic(snapshot(model)), settings=Settings(2, 5), name="digits")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def peak(batches: int) -> int:
    """Kilobytes at most used by a process that finds the curvature of so many batches of 16 MB each."""
    program = f"""
import resource, torch
from ewc_code.gaussian import Diagonal
from ewc_code.laplace import laplace
from ewc_code.models import mlp, snapshot
model = mlp((2000, 5, 10))
def loader():
    for i in range({batches}):
        draw = torch.Generator().manual_seed(i)
        yield torch.rand(2000, 2000, generator=draw), torch.randint(0, 10, (2000,), generator=draw)
laplace(model, loader(), Diagonal.isotropic(snapshot(model)), "data")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout) // (1024 if sys.platform == "darwin" else 1)


def test_curvature_over_batches_holds_one_at_a_time() -> None:
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # what the child reports in is known here
    one, twelve = peak(1), peak(12)
    assert twelve - one < 16_000  # eleven batches more, and never another one beside that which is looked at


def test_restoring_a_belief_needs_the_same_model() -> None:
    with pytest.raises(ValueError, match=r"place\.weight"):
        restore(transformer(VOCABULARY, 3, 4, 2, 1), snapshot(transformer(VOCABULARY, 4, 4, 2, 1)))
