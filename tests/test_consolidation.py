"""The methods as choices of belief, and the penalty that each of them puts into training."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles import examples, fisher_matrix, network, nothing_changes
from torch import nn

from ewc_code import consolidation
from ewc_code.consolidation import Method
from ewc_code.data import Examples
from ewc_code.environment import device
from ewc_code.gaussian import Belief, Diagonal, Full, Penalties, merge
from ewc_code.models import flatten, snapshot

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
ALL = {
    "none": consolidation.none,
    "l2": lambda: consolidation.l2(0.5),
    "ewc": lambda: consolidation.ewc(2.0),
    "ewc, full": lambda: consolidation.ewc(2.0, full=True),
    "ewc, sampled": lambda: consolidation.ewc(2.0, labels="sampled", seed=3),
    "ewc, data labels": lambda: consolidation.ewc(2.0, labels="data"),
    "ewc per task": lambda: consolidation.ewc_per_task(2.0),
}


def consolidated(method: Method, tasks: int = 3) -> tuple[Belief, list[nn.Sequential], list[Examples]]:
    """The belief after some tasks, each with a mode of its own that the model was set to."""
    models = [network(seed=seed) for seed in range(tasks)]
    data = [examples(5 + i, seed=i) for i in range(tasks)]
    belief = method.prior(snapshot(models[0]))
    for model, part in zip(models, data, strict=True):
        belief = method.consolidate(model, part, belief)
    return belief, models, data


def mode(model: nn.Module) -> torch.Tensor:
    return flatten(snapshot(model))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_before_the_first_task_nothing_is_known(make: Callable[[], Method]) -> None:
    model = network()
    assert make().prior(snapshot(model)).energy(snapshot(network(seed=9))) == 0


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_no_trace_is_left_on_the_model(make: Callable[[], Method]) -> None:
    model, method = network(), make()
    prior = method.prior(snapshot(model))
    with nothing_changes(model):
        method.consolidate(model, examples(), prior)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_the_same_bits_again(make: Callable[[], Method]) -> None:
    theta = snapshot(network(seed=9))
    assert torch.equal(consolidated(make())[0].energy(theta), consolidated(make())[0].energy(theta))


def test_plain_training_keeps_nothing() -> None:
    belief, models, _ = consolidated(consolidation.none())
    assert belief.energy(snapshot(models[-1])) == 0
    assert consolidation.none().strength == 0


def assert_adds_n_fishers_at_the_newest_mode(make: Callable[[], Method]) -> None:
    belief, models, data = consolidated(make())
    assert isinstance(belief, Diagonal)
    expected = sum(len(part) * fisher_matrix(m, part).diagonal() for m, part in zip(models, data, strict=True))
    torch.testing.assert_close(flatten(belief.precision), expected, **TIGHT)
    assert torch.equal(flatten(belief.mean), mode(models[-1]))


def wrong_9_named_ewc_and_is_plain_training() -> Method:
    return replace(consolidation.none(), name="EWC", strength=2.0)


def wrong_9_named_ewc_and_is_l2() -> Method:
    return replace(consolidation.l2(2.0), name="EWC")


def test_ewc_adds_n_fishers_at_the_newest_mode() -> None:
    assert_adds_n_fishers_at_the_newest_mode(lambda: consolidation.ewc(2.0))


@pytest.mark.parametrize("make", [wrong_9_named_ewc_and_is_plain_training, wrong_9_named_ewc_and_is_l2])
def test_what_is_only_named_ewc_is_caught(make: Callable[[], Method]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_adds_n_fishers_at_the_newest_mode(make)


def test_full_ewc_adds_whole_matrices() -> None:
    belief, models, data = consolidated(consolidation.ewc(2.0, full=True))
    assert isinstance(belief, Full)
    expected = sum(len(part) * fisher_matrix(m, part) for m, part in zip(models, data, strict=True))
    torch.testing.assert_close(belief.precision, expected, **TIGHT)


def test_data_labels_give_the_empirical_fisher() -> None:
    belief, models, data = consolidated(consolidation.ewc(2.0, labels="data"), tasks=1)
    expected = len(data[0]) * fisher_matrix(models[0], data[0], "data").diagonal()
    torch.testing.assert_close(flatten(belief.precision), expected, **TIGHT)


def test_l2_has_the_same_precision_for_all_parameters() -> None:
    belief, models, data = consolidated(consolidation.l2(0.5))
    assert isinstance(belief, Diagonal)
    assert (flatten(belief.precision) == sum(map(len, data))).all()
    assert torch.equal(flatten(belief.mean), mode(models[-1]))


def test_l2_penalty_of_the_second_task_is_half_the_strength_times_the_squared_distance() -> None:
    method = consolidation.l2(0.5)
    belief, models, data = consolidated(method, tasks=1)
    theta = snapshot(network(seed=9))
    penalty = method.strength / len(data[0]) * belief.energy(theta)
    assert penalty.item() == pytest.approx(0.25 * (flatten(theta) - mode(models[0])).square().sum().item())


# Every task keeps its own anchor (pitfall 10): planted, the anchors overwritten or moved.


def right_per_task(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    method = consolidation.ewc_per_task(1.0)
    belief = method.prior(snapshot(models[0]))
    for model, part in zip(models, data, strict=True):
        belief = method.consolidate(model, part, belief)
    return belief


def parts(models: list[nn.Sequential], data: list[Examples]) -> tuple[Diagonal, ...]:
    belief = right_per_task(models, data)
    assert isinstance(belief, Penalties)
    return belief.parts


def wrong_10_last_anchor_for_every_task(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    found = parts(models, data)
    return Penalties(tuple(Diagonal(found[-1].mean, part.precision) for part in found))


def wrong_10_only_the_last_task(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    return parts(models, data)[-1]


def wrong_10_anchor_at_the_current_weights(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    class Following:
        def energy(self, theta: dict[str, torch.Tensor], x: torch.Tensor | None = None) -> torch.Tensor:
            anchor = {name: value.detach().clone() for name, value in theta.items()}
            return Penalties(tuple(Diagonal(anchor, part.precision) for part in parts(models, data))).energy(theta)

    return Following()


def wrong_11_silently_zero(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    class Forgiving:
        def energy(self, theta: dict[str, torch.Tensor], x: torch.Tensor | None = None) -> torch.Tensor:
            try:
                return self.belief.energy(theta)  # type: ignore[attr-defined]
            except AttributeError:
                return sum(value.sum() * 0 for value in theta.values())

    return Forgiving()


def wrong_7_no_half(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    found = parts(models, data)
    return Penalties(found + found)


def wrong_7_mean_fisher_where_n_times_it_was_meant(models: list[nn.Sequential], data: list[Examples]) -> Belief:
    scaled = zip(parts(models, data)[1:], data, strict=True)
    return Penalties(
        tuple(Diagonal(p.mean, {k: v / len(d) for k, v in p.precision.items()}) for p, d in scaled),
    )


def assert_pulls_to_every_anchor(make: Callable[[list[nn.Sequential], list[Examples]], Belief]) -> None:
    """Energy and gradient are those of sum_k N_k/2 (theta - theta*_k)^T diag(F_k) (theta - theta*_k)."""
    models = [network(seed=seed) for seed in range(3)]
    data = [examples(5 + i, seed=i) for i in range(3)]
    theta = {name: value.requires_grad_() for name, value in snapshot(network(seed=9)).items()}
    energy = make(models, data).energy(theta)
    found = flatten(dict(zip(theta, torch.autograd.grad(energy, list(theta.values())), strict=True)))
    steps = [flatten(theta).detach() - mode(model) for model in models]
    weights = [len(d) * fisher_matrix(m, d).diagonal() for m, d in zip(models, data, strict=True)]
    expected = sum(0.5 * (w * s.square()).sum() for w, s in zip(weights, steps, strict=True))
    torch.testing.assert_close(energy.detach(), expected, **TIGHT)
    torch.testing.assert_close(found, sum(w * s for w, s in zip(weights, steps, strict=True)), **TIGHT)


def test_a_penalty_per_task_pulls_to_every_anchor() -> None:
    assert_pulls_to_every_anchor(right_per_task)


@pytest.mark.parametrize(
    "make",
    [
        wrong_10_last_anchor_for_every_task,
        wrong_10_only_the_last_task,
        wrong_10_anchor_at_the_current_weights,
        wrong_11_silently_zero,
        wrong_7_no_half,
        wrong_7_mean_fisher_where_n_times_it_was_meant,
    ],
    ids=lambda f: f.__name__,
)
def test_lost_anchors_are_caught_by_the_same_check(
    make: Callable[[list[nn.Sequential], list[Examples]], Belief],
) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_pulls_to_every_anchor(make)


def test_one_penalty_and_one_per_task_agree_after_the_first_task_and_differ_after_the_second() -> None:
    theta = snapshot(network(seed=9))
    for tasks, same in ((1, True), (2, False)):
        merged = consolidated(consolidation.ewc(1.0), tasks)[0]
        apart = consolidated(consolidation.ewc_per_task(1.0), tasks)[0]
        assert math.isclose(merged.energy(theta).item(), apart.energy(theta).item(), rel_tol=1e-9) == same


def test_penalties_per_task_merge_into_one_gaussian_with_ewc_s_precision() -> None:
    apart = consolidated(consolidation.ewc_per_task(1.0))[0]
    merged = consolidated(consolidation.ewc(1.0))[0]
    assert isinstance(apart, Penalties)
    assert isinstance(merged, Diagonal)
    torch.testing.assert_close(flatten(merge(apart.parts).precision), flatten(merged.precision), **TIGHT)


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("make", [consolidation.l2, consolidation.ewc, consolidation.ewc_per_task])
def test_strength_must_be_a_number_that_is_not_negative(make: Callable[[float], Method], strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength must be finite and at least 0; got {strength}"):
        make(strength)


def test_models_in_training_mode_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().to(device())
    for method in (consolidation.ewc(1.0), consolidation.ewc_per_task(1.0), consolidation.ewc(1.0, full=True)):
        with pytest.raises(ValueError, match=r"Call model.eval\(\) first"):
            method.consolidate(model, examples(), method.prior(snapshot(model)))
