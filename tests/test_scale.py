"""Costs: predicted operations and numbers are those counted, the clock's helpers, two processes that agree with one."""

import json
import math
from dataclasses import replace

import pytest
import torch
from oracles import examples, network
from torch import nn

from ewc_code import fisher, models, storage
from ewc_code.data import Examples
from ewc_code.environment import generator
from ewc_code.gaussian import Diagonal, Full, Kronecker
from ewc_code.models import snapshot
from ewc_experiments import scale, scale_worker


@pytest.fixture(autouse=True)
def _at_hand(data_at_hand: None) -> None:
    """Images from the sample or the full data, never from a download."""


def training(model: nn.Module):
    return lambda data: models.nll(model(data.x), data.y).backward()


def curvature(model: nn.Module, what: str, labels: str = "exact"):
    ways = {"diagonal": fisher.diagonal, "kronecker": fisher.kronecker}
    return lambda data: ways[what](model, data, labels, generator(0), batch_size=4)


@pytest.mark.parametrize("sizes", [(4, 3), (6, 5, 4, 3), (3, 8, 2)])
@pytest.mark.parametrize(("labels", "ways"), [("exact", None), ("data", 1)])
@pytest.mark.parametrize("what", ["diagonal", "kronecker"])
def test_operations_of_a_fisher_are_counted(sizes, labels, ways, what) -> None:
    model, data = network(*sizes), examples(16, sizes[0], sizes[-1])
    predicted = scale.operations(scale.shapes(model, data.x), what, ways or sizes[-1] - 1)
    assert scale.counted_per_example(curvature(model, what, labels), data) == predicted


@pytest.mark.parametrize("bias", [True, False])
def test_operations_of_convolutions_are_counted(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4, bias=bias))
    data = Examples(torch.rand(16, 2, 6, 6), torch.arange(16) % 4)
    form = scale.shapes(model, data.x)
    assert form.layers[0] == scale.Shape(18, 3, 16, bias, first=True)
    assert form.parameters == sum(p.numel() for p in model.parameters())
    assert scale.counted_per_example(training(model), data) == scale.operations(form, "training")
    for what in ("diagonal", "kronecker"):
        assert scale.counted_per_example(curvature(model, what), data) == scale.operations(form, what, 3)


def test_operations_of_a_transformer_are_counted() -> None:
    width, blocks, context, vocabulary = 8, 3, 5, 11
    model = models.transformer(vocabulary, context, width, 2, blocks)
    tokens = torch.randint(0, vocabulary, (16, context), generator=generator(0))
    data, form = Examples(tokens, tokens), scale.transformer(width, blocks, context, vocabulary)
    assert form.parameters == sum(p.numel() for p in model.parameters())
    assert scale.counted_per_example(training(model), data) == scale.operations(form, "training")
    assert scale.counted_per_example(curvature(model, "diagonal", "sampled"), data) == scale.operations(
        form, "diagonal"
    )


def test_naive_gradients_take_a_training_pass_a_class() -> None:
    model, data = network(6, 5, 3), examples(8, 6, 3)
    form = scale.shapes(model, data.x)
    counted = scale.counted_per_example(lambda part: scale.per_example(model, part, chunk=2), data)
    # a pass forward more, for the probabilities, and the squares times these
    weighted = 2 * 3 * form.parameters
    assert counted == 3 * scale.operations(form, "training") + scale.operations(form, "forward") + weighted
    for name, value in fisher.diagonal(model, data).items():
        torch.testing.assert_close(scale.per_example(model, data, chunk=3)[name], value)


def test_numbers_kept_are_those_of_storage() -> None:
    model = network(6, 5, 3)
    form, mode = scale.shapes(model, torch.zeros(1, 6, dtype=torch.float64)), snapshot(model)
    for kind, belief in (("diagonal", Diagonal), ("kronecker", Kronecker), ("full", Full)):
        assert scale.numbers(form, kind) == storage.numbers(belief.isotropic(mode, 1.0))
    away = {name: value + 1 for name, value in mode.items()}
    assert scale.pulled(form) == scale.counted(lambda: Kronecker.isotropic(mode, 1.0).pull(away))


def test_passed_counts_what_is_read_and_written() -> None:
    a, b = torch.ones(100), torch.ones(100)
    assert scale.passed(lambda: a + b) == 300
    assert scale.passed(lambda: a.add_(b)) == 300
    room = torch.empty(100)
    assert scale.passed(lambda: torch.sub(a, b, out=room)) == 300
    assert scale.passed(lambda: a.view(10, 10)) == 0
    assert scale.passed(lambda: torch.zeros(()).expand(100) + a) == 202  # zeros writes one, which is read once


def test_the_roofline() -> None:
    machine = scale.Ceilings("a", peak=100.0, bandwidth=10.0)
    assert machine.ridge == 10
    assert machine.bound(1000, 10) == 10
    assert machine.bound(10, 1000) == 100
    assert scale.Hardware(machine, 0.5, 1.0).hours(3600 * 100, 1) == 2
    assert scale.Point("a", 30, 10, 1.0).intensity == 3


def test_predicted_share_is_the_chapters_formula() -> None:
    form = scale.Network((scale.Shape(50, 50, bias=False),))  # 6 operations a weight and example
    machine = scale.Ceilings("a", peak=60.0, bandwidth=10.0)
    rho = machine.ridge
    assert scale.predicted_share(form, 1, machine) == 0.5  # the products wait for their weights
    for batch in (12, 80, 512):
        assert math.isclose(scale.predicted_share(form, batch, machine), 10 * rho / (3 * batch + 14 * rho))


def test_all_take_their_turn() -> None:
    order: list[str] = []
    times = scale.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert scale.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 1.0, 1.0]}, "a", "b") == 4


def test_steps_with_the_penalty_agree_by_hand_and_by_autograd() -> None:
    models_made: list[nn.Module] = []

    def make() -> nn.Module:
        models_made.append(network(6, 5, 3))
        return models_made[-1]

    steps = scale.training_steps(make, examples(40, 6, 3), 10)
    for _ in range(5):
        for step in steps.values():
            step()
    plain, penalised, by_hand = map(snapshot, models_made)
    for name, value in penalised.items():
        torch.testing.assert_close(by_hand[name], value)
    assert any(not plain[name].allclose(penalised[name]) for name in plain)


def test_a_profile_knows_products_and_optimiser() -> None:
    steps = scale.training_steps(lambda: network(50, 40, 3), examples(40, 50, 3), 20)
    found = scale.profiled(steps["plain"], 2)
    assert list(found) == ["matrix products", "optimiser", "other tensor work", "between"]
    assert all(value > 0 for value in found.values())


def test_every_measurement_runs() -> None:
    setup = replace(scale.SCALE["smoke"], rounds=2, width=32, square=32, numbers=64)
    machine, points = scale.roofline(setup)
    assert machine.peak > 0
    assert {p.name.split(",")[0] for p in points} >= {"forward", "closed form", "penalty's gradient"}
    data = scale.data_for(setup)
    assert len(data) >= 2 * max(setup.batches)
    for make, own, batch in scale.small_networks(setup, data).values():
        assert scale.overhead(make, own, batch, rounds=2, steps=1).plain > 0
    assert set(scale.fishers(setup, data)) >= {"forward and backward", "exact diagonal"}


def test_two_processes_agree_with_one() -> None:
    setup = scale_worker.Work(steps=6, uneven=True)
    found, one = scale.spread(setup), scale.alone(setup)
    assert found.examples == [400, 200]
    for belief in found.beliefs:
        assert max(scale.farthest(belief, one).values()) < 1e-10
    assert scale.farthest(*found.beliefs) == {"mean": 0, "precision": 0}


def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="all 2 processes must finish"):
        scale.spread(scale_worker.Work(sizes=(20, 0, 5)))


def test_settings_of_the_worker_survive_the_command_line() -> None:
    setup = scale_worker.Work(steps=3)
    assert scale_worker.Work(**json.loads(setup.as_json()) | {"sizes": setup.sizes}) == setup


def test_a_stack_costs_less_than_its_models_and_an_executor_changes_nothing() -> None:
    setup = replace(scale.SCALE["smoke"], stacks=(1, 2), stack_images=120)
    assert [s.models for s in scale.stacks(setup, rounds=1)] == [1, 2]
    runs = scale.stack_runs(setup, 2)
    found = scale.over_processes(runs, processes=1, stack=2)
    again = scale.learn_stacked(runs)
    assert [o.error for o in found] == [None, None]
    for a, b in zip(found, again, strict=True):
        assert a.record.losses[0] == pytest.approx(b.record.losses[0], rel=1e-5)


def test_costs_grow_as_they_should() -> None:
    rows = [scale.costs(width, examples=100) for width in scale.WIDTHS]
    assert 1e5 < rows[0].parameters < 3e5
    assert rows[-1].parameters > 1e11
    for row in rows:
        assert row.memory["diagonal"] == 8 * row.parameters
        assert row.memory["full"] == pytest.approx(4 * (row.parameters + row.parameters**2), rel=1e-12)
        blocks = max(1, row.width // 128) * 12 * row.width**2
        assert 1 < row.parameters / blocks < 3.2
        assert row.operations["training"] > 6 * 100 * 1024 * blocks


def test_tables_say_their_units() -> None:
    assert scale.in_units(2.5e9, scale.BYTES) == "2.5 GB"
    assert scale.in_units(0.5, scale.HOURS) == "30 min"
    assert scale.in_units(36.0, scale.HOURS) == "1.5 days"
    assert scale.in_units(1e-9, scale.HOURS) == "0.0036 ms"
    rows = [scale.costs(64, 10), scale.costs(1024, 10)]
    here = scale.Hardware(scale.Ceilings("here", 1e11, 1e10), 1.0, 1e9)
    assert scale.memory_table(rows).count("\n") == 3
    assert scale.time_table(rows, here).count("\n") == 3
    assert "EB" not in scale.memory_table(rows[:1])
