"""Many tasks: closed forms against minimising, counts against the theorem, and what the experiment may look at."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from ewc_code import consolidation
from ewc_code.environment import SCALES, generator
from ewc_code.gaussian import Full
from ewc_code.models import mlp
from ewc_code.tasks import Part, Task, permuted_mnist
from ewc_code.training import Settings, learn
from ewc_experiments import many
from ewc_experiments.density import condition_linear
from ewc_experiments.many import MANY, ONE, OWN, Linear, counts, growth, linear_tasks, permuted, quadratic

TINY = replace(
    MANY["smoke"], tasks=3, lengths=(2, 3), sizes=(784, 8, 10), train_limit=200, held_limits=(100, 100),
    settings=Settings(epochs=1, batch_size=50), fisher_images=50, strengths=(1.0, 10.0),
    fast_strengths=(3.0, 30.0), stiff=100.0, seeds=(0, 1),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("data_at_hand")


@pytest.fixture(scope="module")
def found(data_at_hand: None) -> many.Sequences:
    return permuted(TINY)


def random_tasks(count: int = 5, size: int = 3) -> tuple[Tensor, Tensor]:
    draw = generator(0)
    roots = torch.randn(count, size, size, generator=draw, dtype=torch.float64)
    precisions = roots @ roots.mT + torch.eye(size, dtype=torch.float64)
    optima = torch.randn(count, size, generator=draw, dtype=torch.float64)
    return precisions, torch.einsum("kpq,kq->kp", precisions, optima)


def by_beliefs(precisions: Tensor, pulls: Tensor, own: bool, diagonal: bool, decay: float, strength: float) -> Tensor:
    """The same sequence from the package's beliefs: each mode is where the gradient of loss and energies vanishes."""
    size, parts, modes = pulls.shape[1], [], []
    for precision, pull in zip(precisions, pulls, strict=True):

        def objective(
            w: Tensor, a: Tensor = precision, b: Tensor = pull, kept: tuple[Full, ...] = tuple(parts)
        ) -> Tensor:
            return 0.5 * w @ a @ w - b @ w + strength * sum(part.energy({"w": w}) for part in kept)

        zero = torch.zeros(size, dtype=torch.float64)
        gradient = torch.func.grad(objective)(zero)
        mode = -torch.linalg.solve(torch.func.hessian(objective)(zero), gradient)
        faded = [Full(part.mean if own else {"w": mode}, decay * part.precision) for part in parts]
        parts = [*faded, Full({"w": mode}, precision.diagonal().diag() if diagonal else precision)]
        modes.append(mode)
    return torch.stack(modes)


@pytest.mark.parametrize("own", [False, True], ids=["newest", "own"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["whole", "diagonal"])
@pytest.mark.parametrize(("decay", "strength"), [(1.0, 1.0), (0.8, 0.8), (0.5, 3.0)])
def test_quadratic_sequences_are_those_of_beliefs(own: bool, diagonal: bool, decay: float, strength: float) -> None:
    precisions, pulls = random_tasks()
    modes = quadratic(precisions, pulls, "own" if own else "newest", diagonal, decay, strength)
    assert torch.allclose(modes, by_beliefs(precisions, pulls, own, diagonal, decay, strength), atol=1e-10)


def test_one_penalty_is_joint_training_and_own_anchors_are_not() -> None:
    precisions, pulls = random_tasks()
    joint = torch.linalg.solve(precisions.cumsum(0), pulls.cumsum(0))
    assert torch.allclose(quadratic(precisions, pulls), joint, atol=1e-12)
    own = quadratic(precisions, pulls, "own")
    assert torch.allclose(own[:2], joint[:2], atol=1e-12)
    assert not torch.allclose(own[2], joint[2], atol=1e-3)


def test_decay_is_joint_training_on_discounted_tasks() -> None:
    precisions, pulls = random_tasks()
    weights = 0.7 ** torch.arange(4, -1, -1, dtype=torch.float64)
    joint = torch.linalg.solve(torch.einsum("k,kpq->pq", weights, precisions), torch.einsum("k,kp->p", weights, pulls))
    assert torch.allclose(quadratic(precisions, pulls, decay=0.7, strength=0.7)[-1], joint, atol=1e-12)


@pytest.mark.parametrize("tasks", [2, 3, 7, 20])
def test_a_penalty_per_task_counts_as_the_theorem_says(tasks: int) -> None:
    predicted = [tasks / (j * (j + 1)) for j in range(1, tasks)] + [1.0]
    assert counts(tasks, anchors="own").tolist() == pytest.approx(predicted)
    assert counts(tasks).tolist() == pytest.approx([1.0] * tasks)


@pytest.mark.parametrize(("direction", "kappa"), [((1.0, 1.0), 1.6), ((1.0, -1.0), 0.4)])
def test_the_diagonal_counts_each_direction_by_its_own_curvature(direction: tuple[float, float], kappa: float) -> None:
    correlated = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    along = torch.tensor(direction, dtype=torch.float64)
    weights = counts(6, correlated, along, diagonal=True, strength=2.0)
    ratios = (weights[1:] / weights[:-1]).tolist()
    assert ratios == pytest.approx([(j - 2 + kappa / 2.0) / (j - 1) for j in range(2, 7)])


def test_regressions_show_two_digits_each_and_make_the_conjugate_update() -> None:
    setup = Linear(tasks=4, examples=60)
    tasks = linear_tasks(setup)
    pairs = [tuple(y.unique().tolist()) for _, y in tasks]
    assert all(len(pair) == 2 for pair in pairs)
    assert len(set(pairs)) == 4
    assert all(x.shape == (60, 50) and x.dtype == torch.float64 and (x[:, -1] == 1).all() for x, _ in tasks)
    prior = Full.isotropic({"w": torch.zeros(50, dtype=torch.float64)}, setup.prior)
    belief = prior
    for x, y in tasks:
        belief = condition_linear(belief, x, y, setup.noise_variance)
    precisions = torch.stack([x.T @ x for x, _ in tasks]) / setup.noise_variance
    pulls = torch.stack([x.T @ y for x, y in tasks]) / setup.noise_variance
    modes = quadratic(precisions, pulls, prior=prior.precision)
    assert torch.allclose(modes[-1], belief.mean["w"], atol=1e-8)


def test_every_scale_has_settings_that_choose_on_seeds_of_their_own() -> None:
    assert set(MANY) == set(SCALES)
    with pytest.raises(ValueError, match="must not be reported"):
        replace(MANY["laptop"], choosing=(0,))
    with pytest.raises(ValueError, match="the last one included"):
        replace(MANY["laptop"], lengths=(10,))


def test_a_fast_decay_has_larger_strengths_to_choose_from() -> None:
    tries = many.ladders(MANY["laptop"])
    assert tries[ONE] == tries["γ = 0.9"] == MANY["laptop"].strengths
    assert tries[OWN] == (0.3, 1.0, *MANY["laptop"].strengths)
    assert tries["γ = 0.5"] == MANY["laptop"].fast_strengths


def test_strengths_are_those_with_the_best_validation_and_all_methods_get_the_stiff_one(found: many.Sequences) -> None:
    names = [ONE, OWN, "γ = 0.5"]
    assert list(found.tried) == names
    for name in names:
        for length in TINY.lengths:
            tried = {s: found.validated(name, s, length) for s in many.ladders(TINY)[name]}
            assert found.chosen[name][length] == max(tried, key=lambda s, tried=tried: tried[s])
        assert set(found.reported[name]) == {*found.chosen[name].values(), TINY.stiff}
        assert all(len(records) == len(TINY.seeds) for records in found.reported[name].values())
    assert list(found.reported["plain"]) == [0.0]
    assert {length: len(values) for length, values in found.joint.items()} == {2: 2, 3: 2}
    record = found.of(ONE)[0]
    assert many.seen(record, 2) == pytest.approx(sum(record.accuracy[1][:2]) / 2)
    assert found.averages(ONE, 3)[0] == pytest.approx(sum(record.accuracy[2]) / 3)
    assert json.loads(json.dumps(asdict(found)))["chosen"]


def test_reported_runs_are_those_of_the_loop_one_at_a_time(found: many.Sequences) -> None:
    strength = found.chosen[OWN][3]
    method = consolidation.ewc_per_task(strength, examples=TINY.fisher_images)
    tasks = permuted_mnist(3, TINY.train_limit, TINY.held_limits[1], seed=1)
    record = learn(mlp(TINY.sizes, 1), tasks, method, TINY.settings, seed=1)
    assert torch.allclose(record.matrix, found.of(OWN)[1].matrix, atol=0.011)  # one of a hundred images, by rounding


def test_test_images_are_not_looked_at_before_all_strengths_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, chosen = [], []

    class Watched(Task):
        def examples(self, part: Part, which: int | Tensor | None = None):
            if part == "test":
                looked.append(bool(chosen))
            return super().examples(part, which)

    def made(*arguments: int | None, seed: int = 0) -> list[Task]:
        return [Watched(task.name, task.images, task.transform) for task in permuted_mnist(*arguments, seed=seed)]

    monkeypatch.setattr(many, "permuted_mnist", made)
    made.__qualname__ = "made"  # a run's functions need a name
    permuted(TINY, lambda line: chosen.append("chosen" in line))
    assert looked
    assert all(looked)


def test_growth_adds_a_fisher_a_task_and_decay_bounds_it() -> None:
    grown = growth(TINY, {ONE: 1.0, "γ = 0.5": 1.0}, seed=0)
    assert all(len(values) == TINY.tasks and values[0] == 1.0 for values in grown.trace.values())
    shares = torch.tensor(grown.trace[ONE]).diff()
    assert (shares > 0).all()
    faded = torch.tensor([0.0, *grown.trace["γ = 0.5"]])
    assert ((faded[1:] - 0.5 * faded[:-1]) > 0).all()
    assert grown.size[ONE][0] == pytest.approx(1)
    assert grown.direction[ONE][0] == pytest.approx(1)
    assert all(0 < value < 1 for value in grown.unsure[ONE])
