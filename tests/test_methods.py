"""Importances, Kronecker beliefs, rehearsal and files against brute force; each pitfall planted and caught."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path as File

import pytest
import torch
from oracles import examples, fisher_matrix, network
from torch import Tensor, nn

from ewc_code import consolidation, fisher, gaussian, importance, metrics, storage
from ewc_code.consolidation import Method
from ewc_code.data import Examples, Images
from ewc_code.environment import device, generator
from ewc_code.fisher import Factors
from ewc_code.gaussian import Diagonal, Kronecker, log_normaliser, nearest_kronecker
from ewc_code.importance import Path, along_path, sensitivity, walk
from ewc_code.laplace import laplace
from ewc_code.models import Params, flatten, mlp, multi_head, nll, restore, snapshot, unflatten
from ewc_code.rehearsal import Buffer
from ewc_code.sweep import Run, learn_stacked
from ewc_code.tasks import SCENARIOS, Task, split
from ewc_code.training import Record, Settings, fit, learn

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
SETTINGS = Settings(epochs=2, batch_size=4, learning_rate=0.05)


def positive(size: int, seed: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64, generator=generator(seed))
    return root @ root.T / size


def terms(count: int, inputs: int = 4, outputs: int = 3) -> list[Factors]:
    return [Factors(positive(inputs, 2 * i), positive(outputs, 2 * i + 1)) for i in range(count)]


# Synaptic intelligence


def by_hand(model: nn.Module, data: Examples, belief: Diagonal, strength: float, planted: bool = False) -> Params:
    """SI's work, with a loop of its own: SGD, the gradient of the loss alone, or of all of it where it is planted."""
    theta, n = dict(model.named_parameters()), len(data)
    work = {name: torch.zeros_like(value) for name, value in theta.items()}
    draw, steps, step = generator(0), 2 * -(-n // 4), 0
    for _ in range(2):
        for index in torch.randperm(n, generator=draw).split(4):
            loss = nll(model(data.x[index]), data.y[index])
            whole = loss + strength / n * belief.energy(theta)
            g = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
            total = torch.autograd.grad(whole, list(theta.values()))
            with torch.no_grad():
                for name, bare, along in zip(theta, g, total, strict=True):
                    moved = -0.05 * (1 - step / steps) * along
                    work[name] -= (along if planted else bare) * moved
                    theta[name] += moved
            step += 1
    return work


def work_of_fit() -> tuple[Params, Diagonal, Examples]:
    model, data = network(), examples(10)
    belief = Diagonal.isotropic(snapshot(network(seed=5)), 30.0)
    work = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    fit(model, data, belief, 2.0, replace(SETTINGS, optimiser="sgd"), generator(0), work=work)
    return work, belief, data


def test_work_is_that_of_the_loss_without_the_penalty() -> None:
    found, belief, data = work_of_fit()
    torch.testing.assert_close(flatten(found), flatten(by_hand(network(), data, belief, 2.0)), **TIGHT)


def test_pitfall_16_the_gradient_of_the_regularised_loss_is_caught() -> None:
    found, belief, data = work_of_fit()
    planted = by_hand(network(), data, belief, 2.0, planted=True)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(flatten(found), flatten(planted), **TIGHT)


def test_work_goes_to_the_fall_of_the_loss_as_the_steps_shrink() -> None:
    """The path integral of the gradient is the difference of the loss; half the step leaves half the error."""

    def missed(halvings: int) -> float:
        # Smooth: along a kink of ReLU the parameters go to and fro, at work that never shows in the loss.
        model, data = nn.Sequential(network(4, 5), nn.Tanh(), network(5, 3)), examples(8)
        work = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
        before = nll(model(data.x), data.y).item()
        count, rate = 100 * 2**halvings, 4e-3 / 2**halvings
        settings = Settings(epochs=count, batch_size=8, learning_rate=rate, optimiser="sgd", decay=False)
        fit(model, data, Diagonal.isotropic(snapshot(model)), 0.0, settings, work=work)
        return flatten(work).sum().item() - (before - nll(model(data.x), data.y).item())

    errors = [missed(halvings) for halvings in range(4)]
    assert errors[0] > 1e-3
    for error, half in pairwise(errors[1:]):
        assert half == pytest.approx(error / 2, rel=0.1)


def test_si_on_a_quadratic_with_a_diagonal_hessian_is_that_hessian() -> None:
    """Gradient flow from anywhere: work_i = 1/2 h_i d_i^2, so that without damping the importance is h_i."""
    h, start = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    theta, work, rate = start.clone(), torch.zeros(2, dtype=torch.float64), 5e-4
    for _ in range(60_000):
        g = h * theta
        work += rate * g * g
        theta = theta - rate * g
    path = Path({"w": start}, {"w": work})
    torch.testing.assert_close(
        along_path(path, {"w": theta}, 0.0)["w"], h, rtol=3 * rate, atol=0
    )  # Euler errs by rate h / 2


def test_what_did_not_move_or_was_pushed_up_has_no_importance() -> None:
    path = Path({"w": torch.zeros(3)}, {"w": torch.tensor([0.0, -1.0, 2.0])})
    found = along_path(path, {"w": torch.tensor([0.0, 1.0, 1.0])}, 0.0)["w"]
    assert found.tolist() == [0.0, 0.0, 4.0]
    for wrong in (path, Path({"w": torch.zeros(3)})):
        with pytest.raises(ValueError, match="SI needs a tracked path"):
            along_path(wrong, {"w": torch.ones(3)}, -1.0 if wrong.work else 0.1)


def test_methods_that_need_a_path_say_so() -> None:
    model, data = network(), examples()
    for method in (consolidation.si(1.0), consolidation.rwalk(1.0)):
        with pytest.raises(ValueError, match=r"needs the path|need the path"):
            method.consolidate(model, data, method.prior(snapshot(model)))
    with pytest.raises(ValueError, match="tracked path"):
        walk(fisher.diagonal(model, data), Path.begin(model, False), snapshot(model))


# Memory-aware synapses


class Reused(nn.Module):
    """A layer that runs twice, for which there is no closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = network(4, 4), network(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(self.inner(x)).tanh())


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Flatten())
        return nn.Sequential(net, nn.Linear(18, 3)).double().to(device())


def absolute(model: nn.Module, data: Examples, batch: int) -> Tensor:
    """Mean over batches of |gradient of the batch's mean squared length|; MAS has batches of one."""
    total, starts = 0.0, range(0, len(data), batch)
    for start in starts:
        length = model(data.x[start : start + batch]).square().sum(1).mean()
        total = total + torch.cat([g.abs().reshape(-1) for g in torch.autograd.grad(length, list(model.parameters()))])
    return total / len(starts)


@pytest.mark.parametrize("make", [network, Reused, convolutional])
def test_mas_is_the_mean_of_absolute_gradients(make: Callable[[], nn.Module]) -> None:
    model, data = make(), examples(7)
    for size in (1000, 3):
        torch.testing.assert_close(flatten(sensitivity(model, data, size)), absolute(model, data, 1), **TIGHT)


def test_pitfall_17_the_absolute_value_of_the_mean_is_caught() -> None:
    model, data = network(), examples(7)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(flatten(sensitivity(model, data)), absolute(model, data, 7), **TIGHT)


def test_mas_of_a_frozen_layer_is_not_there() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    assert sensitivity(model, examples()).keys() == snapshot(model).keys()


def test_rwalk_by_hand() -> None:
    information = {"w": torch.tensor([4.0, 1.0, 0.0])}
    path = Path({"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 3.0, -1.0])})
    # moved = 1/2 F d^2 = 2, 2, 0, with mean 4/3; scores 1 / (10/3), 3 / (10/3), 0
    found = walk(information, path, {"w": torch.tensor([1.0, 2.0, 5.0])})["w"]
    torch.testing.assert_close(found, torch.tensor([1 + 1 / 3, 0.25 + 1, 0.0]))


# Kronecker


def rearranged(matrix: Tensor, inputs: int, outputs: int) -> Tensor:
    """Van Loan and Pitsianis' rearrangement: Kronecker products become matrices of rank one."""
    return matrix.reshape(outputs, inputs, outputs, inputs).permute(0, 2, 1, 3).reshape(outputs**2, inputs**2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nearest_kronecker_is_the_best_of_all(count: int) -> None:
    """The error is that of the singular value decomposition of the rearranged dense sum; nothing can be nearer."""
    found, dense = nearest_kronecker(terms(count)), sum(term.dense() for term in terms(count))
    values = torch.linalg.svdvals(rearranged(dense, 4, 3))
    error = (found.dense() - dense).norm().item()
    assert error == pytest.approx(values[1:].square().sum().sqrt().item(), rel=1e-8, abs=1e-10)
    for factor in (found.inputs, found.outputs):
        assert torch.equal(factor, factor.T) or (factor - factor.T).abs().max() < 1e-12
        assert torch.linalg.eigvalsh(factor).min() > -1e-12


def test_adding_the_factors_is_another_matrix() -> None:
    """The planted merge: (A1 + A2) and (G1 + G2) instead of the nearest; its error is larger, and it is seen."""
    one, two = terms(2)
    dense = one.dense() + two.dense()
    planted = Factors(one.inputs + two.inputs, one.outputs + two.outputs).dense()
    assert (planted - dense).norm() > 1.05 * (nearest_kronecker([one, two]).dense() - dense).norm()


def test_no_terms_have_no_nearest() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        nearest_kronecker([])


def dense_of(belief: Kronecker, model: nn.Sequential) -> Tensor:
    """Block diagonal, in the order of `flatten`: weight then bias, where a layer's own order is row by row of [W b]."""
    blocks = []
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        out, fan = layer.weight.shape
        rows = torch.arange(out * (fan + 1)).view(out, fan + 1)
        order = torch.cat([rows[:, :-1].reshape(-1), rows[:, -1]])
        blocks.append(sum(term.dense() for term in belief.factors[name])[order][:, order])
    return torch.block_diag(*blocks)


@pytest.fixture
def learned() -> tuple[Kronecker, nn.Sequential]:
    model, belief = network(), Kronecker.isotropic(snapshot(network()), 0.3)
    for seed in (1, 2):
        restore(model, snapshot(network(seed=seed)))
        belief = laplace(model, examples(6, seed=seed), belief)
    return belief, model


def test_kronecker_energy_is_that_of_the_dense_matrix(learned: tuple[Kronecker, nn.Sequential]) -> None:
    belief, model = learned
    theta = snapshot(network(seed=7))
    step = flatten(theta) - flatten(belief.mean)
    torch.testing.assert_close(belief.energy(theta), 0.5 * step @ dense_of(belief, model) @ step, **TIGHT)
    assert belief.energy(belief.mean) == 0
    assert [len(found) for found in belief.factors.values()] == [3, 3]


def test_kronecker_of_one_example_is_the_block_of_the_full_fisher() -> None:
    model, data = network(4, 3), examples(1)
    belief = laplace(model, data, Kronecker.isotropic(snapshot(model)))
    torch.testing.assert_close(dense_of(belief, model), fisher_matrix(model, data), **TIGHT)


@pytest.mark.host  # a mean over many draws, minutes on a stand-in
def test_samples_and_log_determinant_are_those_of_the_dense_matrix(learned: tuple[Kronecker, nn.Sequential]) -> None:
    belief, model = learned[0].merged(), learned[1]
    dense = dense_of(belief, model)
    assert belief.log_det() == pytest.approx(torch.linalg.slogdet(dense)[1].item(), rel=1e-9)
    constant = 0.5 * (belief.log_det() - len(dense) * torch.log(torch.tensor(2 * torch.pi)).item())
    assert log_normaliser(belief) == pytest.approx(constant)
    draws = [belief.sample(generator(seed)) for seed in range(4000)]
    energies = torch.stack([belief.energy(theta) for theta in draws])
    # 2 * energy is chi-squared with P degrees of freedom, whose variance is 2 P
    assert energies.mean().item() == pytest.approx(len(dense) / 2, abs=4 * (len(dense) / 2 / len(draws)) ** 0.5)
    along = torch.stack([flatten(theta) for theta in draws]) - flatten(belief.mean)
    variance = torch.linalg.inv(dense).diagonal()
    assert ((along.square().mean(0) / variance - 1).abs() < 6 * (2 / len(draws)) ** 0.5).all()
    with pytest.raises(ValueError, match=r"one term a layer; '0' has 3. Call merged"):
        learned[0].log_det()


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"7": (terms(1)[0],)}, "must belong to layers of the mean"),
        ({"": (Factors(positive(5, 0), positive(3, 1)),)}, r"sizes \(3, 4\); got \(3, 5\)"),
        ({"": (replace(terms(1)[0], scale=torch.ones(3, 4)),)}, "must be of KFAC"),
        ({"": (Factors(positive(4, 0) / 0, positive(3, 1)),)}, "must be finite"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Kronecker({"weight": torch.zeros(3, 4)}, factors)


def test_merging_keeps_one_term_and_flat_beliefs_none(learned: tuple[Kronecker, nn.Sequential]) -> None:
    assert all(len(found) == 1 for found in learned[0].merged().factors.values())
    flat = Kronecker.isotropic(snapshot(network()))
    assert flat.merged().energy(snapshot(network(seed=1))) == 0


# Online EWC


def test_decay_takes_from_the_old_and_not_from_the_new() -> None:
    model, data = network(), examples()
    prior = Diagonal.isotropic(snapshot(network(seed=1)), 2.0)
    found = consolidation.online_ewc(1.0, 0.75).consolidate(model, data, prior)
    true = {n: 0.75 * 2.0 + len(data) * f for n, f in fisher.diagonal(model, data).items()}
    torch.testing.assert_close(flatten(found.precision), flatten(true), **TIGHT)
    assert torch.equal(flatten(found.mean), flatten(snapshot(model)))
    with pytest.raises(ValueError, match=r"decay must lie in 0..1; got 1.5"):
        consolidation.online_ewc(1.0, 1.5)


# Rehearsal


def test_all_examples_kept_are_the_old_likelihood_on_average() -> None:
    """The energy is an unbiased estimate: its mean over many batches is the sum over all, within its own error."""
    model, old = network(), [examples(6, seed=1), examples(11, seed=2)]
    belief = Diagonal.isotropic(snapshot(model))
    for data in old:
        belief = Buffer.extended(belief, model, data, 4, 0, batch_size=5)
    theta = snapshot(network(seed=3))
    assert belief.share.sum() == 17 and len(belief.y) == 8
    each = torch.tensor([belief.energy(theta).item() for _ in range(3000)])
    parts = [Examples(belief.x[i : i + 4], belief.y[i : i + 4]) for i in (0, 4)]
    with torch.no_grad():
        restore(model, theta)
        true = sum(n * nll(model(part.x), part.y).item() for n, part in zip((6, 11), parts, strict=True))
    assert each.mean().item() == pytest.approx(true, abs=4 * each.std().item() / len(each) ** 0.5)


def test_a_buffer_of_nothing_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="at least 1 example"):
        consolidation.replay(0).consolidate(model, examples(), Diagonal.isotropic(snapshot(model)))


def test_answers_are_compared_among_the_old_classes_on_the_new_inputs() -> None:
    model, old, new = network(), examples(6, seed=1), examples(5, seed=2)
    seen = Examples(old.x, old.y.clamp(max=1))  # class 2 has not been seen
    belief = consolidation.lwf(temperature=3.0).consolidate(model, seen, Diagonal.isotropic(snapshot(model)))
    theta = snapshot(network(seed=4))
    with torch.no_grad():
        before = (model(new.x)[:, :2] / 3).softmax(1)
        restore(model, theta)
        after = (model(new.x)[:, :2] / 3).log_softmax(1)
    true = 6 * 9 * -(before * after).sum(1).mean()
    torch.testing.assert_close(belief.energy(theta, new.x), true, **TIGHT)
    with pytest.raises(ValueError, match="only be compared on inputs"):
        belief.energy(theta)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        consolidation.lwf(temperature=0.0).consolidate(model, seen, belief)


def test_answers_of_heads_are_asked_of_each_head() -> None:
    model = multi_head((4, 5, 2), 3)
    belief = Diagonal.isotropic(snapshot(model))
    for head in (0, 1):
        data = Examples(torch.cat([torch.randn(4, 4), torch.full((4, 1), head)], 1), torch.tensor([0, 1, 0, 1]))
        belief = consolidation.lwf().consolidate(model, data, belief)
    assert [(q.head, q.classes, q.n) for q in belief.questions] == [(0, (0, 1), 4), (1, (0, 1), 4)]
    x, theta = torch.cat([data.x[:, :-1], torch.full((4, 1), 2.0)], 1), snapshot(multi_head((4, 5, 2), 3, seed=1))
    rows = [belief.energy(unflatten(flatten(theta), theta), x)]
    for name in ("heads.weight", "heads.bias"):  # the head that has not been learned does not matter
        theta[name] = theta[name].clone()
        theta[name][4:] += 1
    torch.testing.assert_close(belief.energy(theta, x), rows[0])


# Heads and split tasks


def test_each_row_is_answered_by_the_head_it_asks() -> None:
    model, x = multi_head((4, 5, 2), 3), torch.randn(6, 4)
    which = torch.tensor([0, 2, 1, 1, 0, 2])
    out = model(torch.cat([x, which[:, None].float()], 1))
    for row, head in enumerate(which.tolist()):
        weight, bias = (p[2 * head : 2 * head + 2] for p in (model.heads.weight, model.heads.bias))
        torch.testing.assert_close(out[row], weight @ model.trunk(x[row]) + bias)
    with pytest.raises(ValueError, match="a trunk needs a hidden layer"):
        multi_head((4, 2), 3)


def test_fisher_of_a_head_that_was_not_asked_is_zero() -> None:
    model = multi_head((4, 5, 2), 2).to(device()).double()
    drawn = examples(20)
    data = Examples(torch.cat([drawn.x, torch.ones_like(drawn.x[:, :1])], 1), drawn.y % 2)
    found = fisher.diagonal(model, data)
    assert not found["heads.weight"][:2].any() and found["heads.weight"][2:].all()
    torch.testing.assert_close(flatten(found), fisher_matrix(model, data).diagonal(), **TIGHT)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_split_tasks_hold_their_two_classes(monkeypatch: pytest.MonkeyPatch, scenario: str) -> None:
    monkeypatch.setenv("EWC_DATA", "sample")
    tasks = split("MNIST", scenario, train_limit=40, held_limit=30)
    assert [task.name for task in tasks] == ["0 and 1", "2 and 3", "4 and 5", "6 and 7", "8 and 9"]
    for i, task in enumerate(tasks):
        assert (len(task.train), len(task.test)) == (40, 30)
        labels = set(task.train.y.tolist())
        assert labels == ({2 * i, 2 * i + 1} if scenario == "class" else {0, 1})
        assert task.train.x.shape[1] == 784 + (scenario == "task")
        if scenario == "task":
            assert (task.test.x[:, -1] == i).all()
    alone, whole = split("MNIST", "domain", 40, 30)[1].test, split("MNIST", "class", 40, 30)[1].test
    assert torch.equal(alone.x, whole.x) and torch.equal(alone.y, whole.y % 2)


def test_split_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"pairs must lie in 1..5"):
        split("MNIST", "task", pairs=6)


# Every method: saved, loaded, resumed, stacked


METHODS = {
    "plain": consolidation.none,
    "L2": lambda: consolidation.l2(0.1),
    "EWC": lambda: consolidation.ewc(5.0),
    "EWC, full": lambda: consolidation.ewc(5.0, full=True),
    "a penalty per task": lambda: consolidation.ewc_per_task(5.0),
    "online EWC": lambda: consolidation.online_ewc(5.0, 0.9),
    "Kronecker": lambda: consolidation.kronecker(5.0),
    "Kronecker, a term a task": lambda: consolidation.kronecker(5.0, merged=False),
    "SI": lambda: consolidation.si(2.0),
    "MAS": lambda: consolidation.mas(0.5),
    "RWalk": lambda: consolidation.rwalk(0.5),
    "LwF": lambda: consolidation.lwf(),
    "replay": lambda: consolidation.replay(3, batch_size=4),
    "joint": lambda: consolidation.joint(batch_size=4),
}


def three_tasks(heads: bool = False) -> list[Task]:
    made = []
    for seed in range(3):
        parts = [examples(n, seed=10 * seed + n) for n in (12, 6, 6)]
        if heads:
            parts = [Examples(torch.cat([p.x, torch.full_like(p.x[:, :1], seed)], 1), p.y) for p in parts]
        parts = [Examples(p.x.float(), p.y) for p in parts]
        made.append(Task(f"task {seed}", Images("made", *parts)))
    return made


def small(heads: bool = False) -> nn.Module:
    return (multi_head((4, 5, 3), 3) if heads else mlp((4, 5, 3))).to(device())


@pytest.mark.host
@pytest.mark.parametrize("heads", [False, True], ids=["one head", "heads"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_sequence_resumed_from_files_has_the_same_bits(
    make: Callable[[], Method], heads: bool, tmp_path: File
) -> None:
    tasks, method = three_tasks(heads), make()

    def learned(model: nn.Module, **more: object) -> Record:
        return learn(model, tasks, method, SETTINGS, seed=3, **more)

    straight, again = small(heads), small(heads)
    learned(straight)

    def stop(done: int, belief: gaussian.Belief) -> None:
        if done == 2:
            storage.save(belief, tmp_path / "belief")
            torch.save(again.state_dict(), tmp_path / "model")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(again, keep=stop)
    other = small(heads)
    other.load_state_dict(torch.load(tmp_path / "model"))
    learned(other, belief=storage.load(tmp_path / "belief", other), first=2)
    assert torch.equal(flatten(snapshot(other)), flatten(snapshot(straight)))

    forgetful = small(heads)  # pitfall 15: the model's state alone
    forgetful.load_state_dict(torch.load(tmp_path / "model"))
    learned(forgetful, first=2)
    same = torch.equal(flatten(snapshot(forgetful)), flatten(snapshot(straight)))
    assert same == (method.name == "plain"), "a belief that was lost must be seen"


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_numbers_kept_count_what_is_in_the_file(make: Callable[[], Method], tmp_path: File) -> None:
    kept: list[gaussian.Belief] = []
    learn(small(), three_tasks(), make(), SETTINGS, keep=lambda _, belief: kept.append(belief))
    sizes = [storage.numbers(belief) for belief in kept]
    assert (sizes[0] == 0) == (make().name == "plain")
    grows = make().name in ("EWC, a penalty per task", "replay", "joint") or "term a task" in str(make)
    assert sizes == sorted(sizes)
    assert (sizes[2] > sizes[0]) == (grows or make is METHODS["Kronecker, a term a task"])


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_stack_of_any_method_gives_the_numbers_of_one_run(make: Callable[[], Method]) -> None:
    runs = [Run(three_tasks, make(), partial(mlp, (4, 5, 3)), SETTINGS, seed) for seed in (0, 1)]
    if make().name == "EWC" and "full" in str(make):
        return
    for run, outcome in zip(runs, learn_stacked(runs), strict=True):
        alone = learn(mlp((4, 5, 3), run.seed).to(device()), three_tasks(), make(), SETTINGS, run.seed)
        assert outcome.error is None
        torch.testing.assert_close(
            torch.tensor(outcome.record.losses), torch.tensor(alone.losses), rtol=1e-3, atol=1e-4
        )


def test_a_first_fit_that_is_shared_is_tracked_for_those_who_need_it() -> None:
    """Plain training comes first in the stack and needs no path; SI, which shares its first fit, does."""
    methods = [consolidation.none(), consolidation.si(2.0)]
    runs = [Run(three_tasks, method, partial(mlp, (4, 5, 3)), SETTINGS) for method in methods]
    alone = learn(small(), three_tasks(), consolidation.si(2.0), SETTINGS)
    found = learn_stacked(runs)[1].record
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(alone.losses), rtol=1e-3, atol=1e-4)


# Files that do not fit


def test_a_belief_of_another_model_is_refused_by_the_first_name_that_differs(tmp_path: File) -> None:
    storage.save(Diagonal.isotropic(snapshot(mlp((4, 5, 3))), 1.0), tmp_path / "belief")
    with pytest.raises(ValueError, match=r"parameter '0.weight': file \(5, 4\), model \(6, 4\)"):
        storage.load(tmp_path / "belief", mlp((4, 6, 3)))
    with pytest.raises(ValueError, match=r"parameter '4.weight': file absent, model \(3, 3\)"):
        storage.load(tmp_path / "belief", mlp((4, 5, 3, 3)))


def test_files_that_are_no_beliefs_are_refused(tmp_path: File) -> None:
    path = tmp_path / "belief"
    storage.save(Diagonal.isotropic(snapshot(mlp((4, 5, 3))), 1.0), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        storage.load(path, mlp((4, 5, 3)))
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"must hold a belief .*; got None"):
        storage.load(path, mlp((4, 5, 3)))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    path, belief = tmp_path / "belief", Diagonal.isotropic(snapshot(mlp((4, 5, 3))), 1.0)
    storage.save(belief, path)
    before = path.read_bytes()

    def full(tensors: object, name: File, metadata: object) -> None:
        File(name).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="could not be written"):
        storage.save(belief, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Metrics


def test_pitfall_18_first_minus_last_is_not_best_minus_last() -> None:
    matrix = torch.tensor([[0.6, 0.1], [0.9, 0.8]])
    later = torch.tensor([[0.6, 0.1, 0.1], [0.9, 0.8, 0.1], [0.5, 0.7, 0.9]])
    assert metrics.forgetting(matrix) == pytest.approx(0.6 - 0.9)
    assert metrics.forgetting(later) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.7)) / 2)
    first_minus_last = ((0.6 - 0.5) + (0.8 - 0.7)) / 2
    assert metrics.forgetting(later) != pytest.approx(first_minus_last)
    assert -metrics.backward_transfer(later) == pytest.approx(first_minus_last)
    before = later.clone()
    metrics.forgetting(later)
    assert torch.equal(later, before)


def test_importances_stand_where_the_fisher_stands() -> None:
    """precision = N importance at the model's parameters, for each of the methods that only exchange it."""
    model, data = network(), examples()
    flat, path = Diagonal.isotropic(snapshot(model)), Path.begin(network(seed=8), tracked=True)
    work = {name: torch.rand_like(value) for name, value in snapshot(model).items()}
    path, end = replace(path, work=work), snapshot(model)
    information = fisher.diagonal(model, data)
    for method, expected in (
        (consolidation.si(1.0, damping=0.2), along_path(path, end, 0.2)),
        (consolidation.mas(1.0), sensitivity(model, data)),
        (consolidation.rwalk(1.0), importance.walk(information, path, end)),
        (consolidation.ewc(1.0), information),
    ):
        belief = method.consolidate(model, data, flat, path)
        torch.testing.assert_close(flatten(belief.precision), len(data) * flatten(expected), **TIGHT)


# Data larger than memory


BELIEFS = {"diagonal": Diagonal, "full": gaussian.Full, "Kronecker": Kronecker}


@pytest.mark.parametrize("kind", BELIEFS.values(), ids=BELIEFS)
def test_a_loader_gives_what_all_examples_give(kind: type) -> None:
    model, data = network(), examples(11)
    prior = kind.isotropic(snapshot(model), 0.5)
    whole = laplace(model, data, prior)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), batch_size=4)
    found, theta = laplace(model, loader, prior), snapshot(network(seed=3))
    torch.testing.assert_close(found.energy(theta), whole.energy(theta), **TIGHT)
    assert torch.equal(flatten(found.mean), flatten(whole.mean))


def test_one_batch_is_alive_at_a_time() -> None:
    model, alive = network(), []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(5):
            data = examples(6, seed=seed)
            alive.append(weakref.ref(data.x))
            pair = (data.x, data.y)
            del data
            yield pair
            del pair
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1

    laplace(model, batches(), Diagonal.isotropic(snapshot(model)))
    assert len(alive) == 5


def test_loaders_that_give_nothing_and_parts_of_loaders_are_refused() -> None:
    model = network()
    flat = Diagonal.isotropic(snapshot(model))
    with pytest.raises(ValueError, match="at least one batch; got none"):
        laplace(model, [], flat)
    with pytest.raises(ValueError, match="needs all data at hand, as Examples; got list"):
        laplace(model, [(examples().x, examples().y)], flat, examples=3)
