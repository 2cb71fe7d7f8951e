"""Training: the objective and its gradient, the guard, what is left untouched, and which examples are looked at."""

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from oracles import examples, network, nll, nothing_changes, types_unchecked
from torch import Tensor, nn

from ewc_code import consolidation
from ewc_code.data import Examples, Images
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal, Full, Penalties
from ewc_code.models import flatten, mlp, snapshot
from ewc_code.tasks import Task, mnist_then_fashion
from ewc_code.training import Record, Settings, accuracy, fit, learn

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
STEP = Settings(epochs=1, batch_size=1000, learning_rate=0.1, optimiser="sgd", decay=False)


@pytest.fixture(autouse=True)
def _sample_unless_full_data_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("EWC_DATA"):
        monkeypatch.setenv("EWC_DATA", "sample")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# The objective L + strength/N energy: seen through one step of plain gradient descent on all examples at once.


def belief_somewhere() -> Diagonal:
    like = snapshot(network(seed=4))
    draw = generator(5)
    precision = {k: torch.rand(v.shape, generator=draw, dtype=torch.float64).to(v) * 30 for k, v in like.items()}
    return Diagonal(like, precision)


def gradient_taken(belief: Belief, strength: float) -> Tensor:
    model, data = network(), examples(9)
    before = flatten(snapshot(model))
    fit(model, data, belief, strength, STEP)
    return (before - flatten(snapshot(model))) / STEP.learning_rate


def assert_penalty_is_right(make: Callable[[Diagonal], Belief], strength: float = 3.0) -> None:
    """The penalty's gradient is strength * precision (theta - theta*) / N, away from the mode."""
    model, data, belief = network(), examples(9), belief_somewhere()
    theta = flatten(snapshot(model))
    plain = torch.cat([g.reshape(-1) for g in torch.autograd.grad(nll(model, data), list(model.parameters()))])
    expected = strength * flatten(belief.precision) * (theta - flatten(belief.mean)) / len(data)
    assert expected.norm() > 1  # the check would see a missing penalty
    torch.testing.assert_close(gradient_taken(make(belief), strength) - plain, expected, **TIGHT)


def right_diagonal(belief: Diagonal) -> Belief:
    return belief


def right_full(belief: Diagonal) -> Belief:
    return Full(belief.mean, torch.diag(flatten(belief.precision)))


def right_per_task(belief: Diagonal) -> Belief:
    halves = Diagonal(belief.mean, {name: value / 2 for name, value in belief.precision.items()})
    return Penalties((Diagonal.isotropic(belief.mean), halves, halves))


def scaled(factor: float) -> Callable[[Diagonal], Belief]:
    return lambda belief: Diagonal(belief.mean, {name: factor * v for name, v in belief.precision.items()})


def wrong_11_silently_zero(belief: Diagonal) -> Belief:
    return Diagonal.isotropic(belief.mean)


def wrong_10_anchor_follows_the_weights(belief: Diagonal) -> Belief:
    class Following:
        def energy(self, theta: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
            return Diagonal({k: v.detach().clone() for k, v in theta.items()}, belief.precision).energy(theta)

    return Following()


def wrong_sign(belief: Diagonal) -> Belief:
    class Pushing:
        def energy(self, theta: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
            return -belief.energy(theta)

    return Pushing()


@pytest.mark.parametrize("make", [right_diagonal, right_full, right_per_task], ids=lambda f: f.__name__)
def test_gradient_of_the_penalty(make: Callable[[Diagonal], Belief]) -> None:
    assert_penalty_is_right(make)


@pytest.mark.parametrize(
    "make",
    [
        wrong_11_silently_zero,
        wrong_10_anchor_follows_the_weights,
        wrong_sign,
        pytest.param(scaled(2.0), id="wrong_7_no_half"),
        pytest.param(scaled(9.0), id="wrong_7_sum_where_the_mean_was_meant"),
        pytest.param(scaled(9 / 10), id="wrong_12_one_example_too_many"),
    ],
)
def test_wrong_penalties_are_caught_by_the_same_check(make: Callable[[Diagonal], Belief]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_penalty_is_right(make)


def test_gradient_of_the_penalty_is_zero_at_the_mode() -> None:
    at_mode = Diagonal(snapshot(network()), belief_somewhere().precision)
    torch.testing.assert_close(gradient_taken(at_mode, 100.0), gradient_taken(at_mode, 0.0), **TIGHT)


@pytest.mark.host
def test_gradient_of_the_whole_objective_by_finite_differences() -> None:
    belief, data, strength, h = belief_somewhere(), examples(9), 3.0, 1e-6
    center, found = flatten(snapshot(network())), gradient_taken(belief, strength)
    for i in range(0, len(center), 5):
        ends = []
        for sign in (1, -1):
            model = network()
            moved = center.clone()
            moved[i] += sign * h
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            ends.append((nll(model, data) + strength / len(data) * belief.energy(snapshot(model))).item())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(found[i].item(), rel=1e-6, abs=1e-7)


def test_last_short_batch_counts_by_its_examples() -> None:
    model, data = network(), examples(9)
    frozen = Settings(epochs=1, batch_size=4, learning_rate=1e-300, optimiser="sgd", decay=False)
    flat = Diagonal.isotropic(snapshot(model))
    assert fit(model, data, flat, 0.0, frozen)[0] == pytest.approx(nll(model, data).item(), rel=1e-6)


def test_reported_loss_includes_the_penalty() -> None:
    model, data, belief = network(), examples(9), belief_somewhere()
    expected = nll(model, data) + 3.0 / 9 * belief.energy(snapshot(model))
    assert fit(model, data, belief, 3.0, STEP)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_learning_rate_falls_linearly_to_zero() -> None:
    data, rate = examples(9), 0.1
    model = network()
    flat = Diagonal.isotropic(snapshot(model))
    fit(model, data, flat, 0.0, Settings(epochs=3, batch_size=9, learning_rate=rate, optimiser="sgd"))
    by_hand = network()
    for share in (1, 2 / 3, 1 / 3):
        gradient = torch.autograd.grad(nll(by_hand, data), list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradient, strict=True):
                p -= rate * share * g
    torch.testing.assert_close(flatten(snapshot(model)), flatten(snapshot(by_hand)), **TIGHT)


def test_a_strong_penalty_holds_the_parameters_and_none_lets_them_go() -> None:
    data, anchor = examples(30), snapshot(network())
    moved = []
    for precision in (0.0, 1.0, 1e6):
        model = network()
        fit(model, data, Diagonal.isotropic(anchor, precision), 1.0, Settings(epochs=30, learning_rate=0.01))
        moved.append((flatten(snapshot(model)) - flatten(anchor)).norm().item())
    assert moved[0] > moved[1] > 20 * moved[2]


# What is left untouched, and the same numbers again.


def test_fit_changes_parameters_and_nothing_else() -> None:
    model = network()
    with nothing_changes(model, parameters=False):
        fit(model, examples(), Diagonal.isotropic(snapshot(model)), 0.0)
    frozen = network()
    frozen[0].requires_grad_(False)
    before = state(frozen)
    fit(frozen, examples(), Diagonal.isotropic(snapshot(frozen)), 0.0)
    assert torch.equal(frozen[0].weight, before["0.weight"])
    assert not torch.equal(frozen[2].weight, before["2.weight"])


def test_fit_leaves_the_belief_as_it_was() -> None:
    belief = belief_somewhere()
    mean, precision = flatten(belief.mean).clone(), flatten(belief.precision).clone()
    fit(network(), examples(), belief)
    assert torch.equal(flatten(belief.mean), mean)
    assert torch.equal(flatten(belief.precision), precision)


def with_layers_that_have_modes() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    return model.double().to(device())


def test_accuracy_leaves_every_mode_flag_and_buffer() -> None:
    model = with_layers_that_have_modes()
    model[1].eval()  # a frozen normalisation inside of a model in training mode
    with nothing_changes(model):
        accuracy(model, examples())


def test_checking_the_data_does_not_touch_running_statistics_or_draw() -> None:
    model, data = with_layers_that_have_modes(), examples()
    with nothing_changes(model), pytest.raises(ValueError, match="labels"):
        fit(model, Examples(data.x, data.y + 9), Diagonal.isotropic(snapshot(model)))


def test_learn_takes_curvature_in_evaluation_mode_and_puts_the_flags_back() -> None:
    model = with_layers_that_have_modes()
    model[1].eval()
    with torch.random.fork_rng():
        learn(model, blobs(2, dtype=torch.float64), consolidation.ewc(1.0), Settings(epochs=1))
    assert [m.training for m in model] == [True, False, True, True]


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_same_seed_gives_the_same_bits(optimiser: str) -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], Record]:
        model = mlp((4, 8, 3)).to(device())
        settings = Settings(epochs=2, batch_size=16, optimiser=optimiser)  # type: ignore[arg-type]
        record = learn(model, blobs(3), consolidation.ewc(1.0), settings, seed, curve_points=3)
        return state(model), record

    (first, record), (second, again), (other, _) = run(7), run(7), run(8)
    assert same(first, second)
    assert record == again
    assert not same(first, other)


# The guard.


def explosive(**settings: object) -> Settings:
    return Settings(optimiser="sgd", learning_rate=1e30, decay=False, **settings)  # type: ignore[arg-type]


def test_diverging_training_stops_and_puts_the_model_back() -> None:
    model = mlp((4, 8, 3)).to(device())
    before, data = state(model), Examples(examples(64).x.float(), examples(64).y)
    with (
        nothing_changes(model),
        pytest.raises(FloatingPointError, match=r"must stay finite; at step \d+ of clothes .*put back.*smaller"),
    ):
        fit(model, data, Diagonal.isotropic(snapshot(model)), 0.0, explosive(epochs=5, batch_size=8), name="clothes")
    assert same(state(model), before)


def test_buffers_are_put_back_too() -> None:
    model = with_layers_that_have_modes().float()
    before, data = state(model), Examples(examples(64).x.float(), examples(64).y)
    with torch.random.fork_rng(), pytest.raises(FloatingPointError):
        fit(model, data, Diagonal.isotropic(snapshot(model)), 0.0, explosive(epochs=5, batch_size=8))
    assert same(state(model), before)


def test_parameters_spoiled_by_the_very_last_step_are_seen() -> None:
    model = mlp((4, 8, 3)).to(device())
    before, data = state(model), Examples(1000 * examples(64).x.float(), examples(64).y)
    with pytest.raises(FloatingPointError, match="loss and parameters must stay finite; at step 1 "):
        fit(
            model,
            data,
            Diagonal.isotropic(snapshot(model)),
            0.0,
            Settings(epochs=1, batch_size=64, learning_rate=3e38, optimiser="sgd"),
        )
    assert same(state(model), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_penalty_that_is_not_finite_is_seen(value: float) -> None:
    class Broken:
        def energy(self, theta: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
            return sum(p.sum() for p in theta.values()) * value

    model = network()
    before = state(model)
    with pytest.raises(FloatingPointError, match="must stay finite"):
        fit(model, examples(), Broken())
    assert same(state(model), before)


# Bad input.


@pytest.mark.parametrize("strength", [-1.0, -1e-12, math.nan, math.inf])
def test_strength_must_be_a_number_that_is_not_negative(strength: float) -> None:
    model = network()
    with nothing_changes(model), pytest.raises(ValueError, match="strength must be finite and at least 0; got"):
        fit(model, examples(), Diagonal.isotropic(snapshot(model)), strength)


def test_data_that_does_not_fit_the_model() -> None:
    model, data = network(), examples()
    flat = Diagonal.isotropic(snapshot(model))
    spoiled = data.x.clone()
    spoiled[3, 1] = math.nan
    for bad, match in (
        (Examples(data.x, data.y + 3), r"labels must lie in 0\.\.2"),
        (examples(features=5), r"must accept inputs of shape \(2, 5\)"),
        (Examples(data.x.float(), data.y), "dtype"),
        (Examples(spoiled, data.y), "inputs of boots must be finite; got NaN or infinity.*drop"),
    ):
        with nothing_changes(model), pytest.raises(ValueError, match=match):
            fit(model, bad, flat, name="boots")


def test_belief_of_another_model() -> None:
    model = network()
    other = Diagonal.isotropic(snapshot(network(4, 6, 3)), 1.0)
    with nothing_changes(model), pytest.raises(ValueError, match="must have the belief's shape"):
        fit(model, examples(), other)
    model[0].requires_grad_(False)
    known = Diagonal.isotropic(snapshot(model), 1.0)
    model.requires_grad_(True)
    with nothing_changes(model), pytest.raises(ValueError, match="knows nothing of"):
        fit(model, examples(), known)


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}, {"learning_rate": math.inf}],
)
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be .* got Settings\("):
        Settings(**settings)  # type: ignore[arg-type]


def test_unknown_optimiser() -> None:
    with types_unchecked(), pytest.raises(ValueError, match=r"optimiser must be 'adam' or 'sgd' .*got 'newton'"):
        Settings(optimiser="newton")  # type: ignore[arg-type]


def test_empty_examples() -> None:
    with pytest.raises(ValueError, match="at least one example; got none"):
        examples()[:0]


# Sequences of tasks.


def blobs(count: int, n: int = 60, dtype: torch.dtype = torch.float32) -> tuple[Task, ...]:
    """Three clusters in four dimensions, turned over for each task; validation and test are unlike each other."""
    draw = generator(0)
    centers = 2 * torch.randn(3, 4, generator=draw)

    def part(size: int, spread: float, task: int) -> Examples:
        y = torch.arange(size) % 3
        x = centers.roll(task, 1)[(y + task) % 3] + spread * torch.randn(size, 4, generator=draw)
        return Examples(x.to(dtype).to(device()), y.to(device()))

    return tuple(
        Task(f"task {i}", Images("blobs", part(n, 0.5, i), part(31, 3.0, i), part(37, 0.5, i))) for i in range(count)
    )


class Sealed(Task):
    """A task whose test examples must not be looked at."""

    @property
    def test(self) -> Examples:
        raise AssertionError("the test examples were looked at")


def test_choosing_on_validation_never_looks_at_the_test_examples() -> None:
    """Pitfall 13: reporting on the examples that chose the settings; the same check catches it."""
    tasks = tuple(Sealed(task.name, task.images) for task in blobs(2))

    def run(evaluate_on: str) -> Record:
        model = mlp((4, 8, 3)).to(device())
        return learn(model, tasks, consolidation.ewc(1.0), Settings(), curve_points=2, evaluate_on=evaluate_on)  # type: ignore[arg-type]

    run("validation")
    with pytest.raises(AssertionError, match="were looked at"):
        run("test")


@pytest.mark.parametrize("evaluate_on", ["test", "validation"])
def test_matrix_holds_accuracy_on_the_part_that_was_asked_for(evaluate_on: str) -> None:
    model, tasks = mlp((4, 8, 3)).to(device()), blobs(2)
    record = learn(model, tasks, consolidation.none(), Settings(epochs=10), evaluate_on=evaluate_on)  # type: ignore[arg-type]
    parts = {part: [accuracy(model, getattr(task, part)) for task in tasks] for part in ("test", "validation")}
    assert parts["test"] != parts["validation"]
    assert record.accuracy[-1] == parts[evaluate_on]
    assert record.matrix.shape == (2, 2)
    assert record.names == ["task 0", "task 1"]


def test_evaluating_on_anything_else_is_refused() -> None:
    with types_unchecked(), pytest.raises(ValueError, match="'test' or 'validation'; got 'train'"):
        learn(mlp((4, 8, 3)).to(device()), blobs(1), consolidation.none(), evaluate_on="train")  # type: ignore[arg-type]


def test_no_tasks() -> None:
    with pytest.raises(ValueError, match="at least one task to learn; got none"):
        learn(mlp((4, 8, 3)).to(device()), (), consolidation.none())


def test_curves_cover_all_tasks_from_the_first_step_to_the_last() -> None:
    model, tasks = mlp((4, 8, 3)).to(device()), blobs(2)
    settings = Settings(epochs=2, batch_size=10)  # 6 steps an epoch, 12 a task
    record = learn(model, tasks, consolidation.none(), settings, curve_points=4)
    assert record.steps[0] == 0
    assert record.steps[-1] == 24
    assert record.steps == sorted(record.steps)
    assert {12} <= set(record.steps)
    assert all(len(point) == 2 and 0 <= min(point) <= max(point) <= 1 for point in record.curves)
    assert record.curves[-1] == record.accuracy[-1]
    assert [len(losses) for losses in record.losses] == [2, 2]


def test_observer_sees_every_step_once() -> None:
    seen: list[tuple[int, int]] = []
    model = network()
    settings = Settings(epochs=2, batch_size=3)
    flat = Diagonal.isotropic(snapshot(model))
    fit(model, examples(7), flat, 0.0, settings, observe=lambda i, n: seen.append((i, n)))
    assert seen == [(i, 6) for i in range(7)]


def test_accuracy_counts_right_answers_whatever_the_batch() -> None:
    model, data = network(), examples(23)
    right = sum(int(model(x[None]).argmax() == y) for x, y in zip(data.x, data.y, strict=True))
    for size in (1, 4, 23, 100):
        assert accuracy(model, data, size) == right / 23


def test_ewc_keeps_more_of_the_first_tasks_than_plain_training_on_images() -> None:
    tasks, settings = mnist_then_fashion(2000), Settings(epochs=4, batch_size=64)
    first = {}
    for method in (consolidation.none(), consolidation.ewc(100.0)):
        model = mlp((784, 64, 10)).to(device())
        record = learn(model, tasks, method, settings)
        assert record.accuracy[0][0] > 0.75
        assert record.accuracy[1][1] > 0.6
        first[method.name] = record.accuracy[1][0]
    assert first["EWC"] > first["plain"] + 0.1


def test_products_are_rounded_while_training_and_never_after() -> None:
    found, before = set(), torch.get_float32_matmul_precision()
    look = lambda _step, _steps: found.add(torch.get_float32_matmul_precision())  # noqa: E731
    data, model = examples(n=8), network(4, 3)
    flat = Diagonal.isotropic(snapshot(model))
    fit(model, data, flat, 0.0, Settings(1, 4, products="high"), generator(0), look)
    assert found == {"high"} and torch.get_float32_matmul_precision() == before
    with pytest.raises(FloatingPointError):
        fit(model, data, flat, 0.0, Settings(9, 4, 1e38, products="high"), generator(0))
    assert torch.get_float32_matmul_precision() == before
    fit(model, data, flat, 0.0, Settings(1, 4), generator(0), look)
    assert found == {"high", before}, "without the setting it is as torch is set"
    with (
        types_unchecked(),
        pytest.raises(ValueError, match="products 'highest', 'high', 'medium' or None; got 'adam' and 'low'"),
    ):
        Settings(products="low")  # type: ignore[arg-type]


def test_precision_that_a_reader_set_for_one_backend_is_left_alone() -> None:
    """torch refuses to say its precision of all backends then; nothing may ask for it unless `products` is given."""
    code = (
        "import torch\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from ewc_code import consolidation, data, models, training\n"
        "from ewc_code.tasks import Task\n"
        "own = data.Examples(torch.rand(8, 4), torch.arange(8) % 3)\n"
        "tasks = [Task(name, data.Images(name, own, own, own)) for name in 'ab']\n"
        "training.learn(models.mlp((4, 3)), tasks, consolidation.ewc(1.0), training.Settings(1, 4))\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )
    environment = os.environ | {"EWC_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
