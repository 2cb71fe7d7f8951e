"""The experiments beyond the diagonal: merging against dense matrices, work by hand, runs that repeat."""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import as_then

import ewc_plots as plots
from ewc_code import consolidation, importance, storage
from ewc_code.data import Examples, load
from ewc_code.fisher import Factors
from ewc_code.gaussian import nearest_kronecker
from ewc_code.models import flatten, mlp, snapshot
from ewc_code.tasks import permuted_mnist
from ewc_code.training import Settings, learn
from ewc_experiments import beyond

QUICK = Settings(epochs=1, batch_size=50)
SMALL = beyond.Sequences(
    (784, 8, 10), 150, 100, QUICK, 60, (2, 3), (0, 1), (100,), ladders=dict.fromkeys(beyond.LADDERS, (0.01, 1.0))
)
TRAINED = (beyond.Training("Adam", QUICK), beyond.Training("SGD", replace(QUICK, optimiser="sgd", learning_rate=0.05)))
RECORDED = Path(__file__).parents[1] / "book" / "recorded"


pytestmark = pytest.mark.usefixtures("data_at_hand")


@pytest.fixture(scope="module")
def done(data_at_hand: None) -> beyond.Sequenced:
    return beyond.sequences(SMALL)


def terms(count: int = 3, sizes: tuple[int, int] = (5, 4)) -> list[Factors]:
    draw = torch.Generator().manual_seed(2)
    roots = [[torch.randn(n, n, generator=draw, dtype=torch.float64) for n in sizes] for _ in range(count)]
    return [Factors(a @ a.T, g @ g.T) for a, g in roots]


@pytest.mark.parametrize("rule", beyond.RULES)
def test_distances_are_those_of_dense_matrices(rule: str) -> None:
    seen = terms(2)
    merged, whole = beyond.RULES[rule](seen), sum(term.dense() for term in seen)
    expected = ((whole - merged.dense()).norm() / whole.norm()).item()
    assert beyond.distance(seen, merged) == pytest.approx(expected, abs=1e-10)
    assert beyond.distance(seen, nearest_kronecker(seen)) <= expected + 1e-12


def test_sums_weighted_by_traces_leave_the_least_trace_of_wrong_pairs() -> None:
    one, two = terms(2)
    merged = beyond.sum_by_traces([one, two])
    least = merged.dense().trace()
    for pi in (0.1, 0.5, 1.0, 2.0, 10.0):
        other = Factors(one.inputs + two.inputs / pi, one.outputs + pi * two.outputs)
        assert least <= other.dense().trace() + 1e-9


def test_equal_tasks_count_as_a_square_when_factors_are_added() -> None:
    (term,) = terms(1)
    merged = term
    for number in (2, 3, 4):
        merged = beyond.sum_by_traces([merged, term])
        assert torch.allclose(merged.dense(), number**2 * term.dense())
        assert beyond.distance([term] * number, merged) == pytest.approx(number - 1)
        assert torch.allclose(nearest_kronecker([term] * number).dense(), number * term.dense())


def test_parameters_of_one_layer_are_marked() -> None:
    mask = beyond.same_layer(snapshot(mlp((2, 1, 1), 0)))  # 2 + 1 and 1 + 1 parameters
    expected = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2))
    assert torch.equal(mask, expected)


def test_pooling_averages_squares_of_pixels() -> None:
    x = torch.zeros(1, 784)
    x.view(28, 28)[:4, 4:8] = torch.arange(16.0).view(4, 4)
    found = beyond.pooled(Examples(x, torch.zeros(1, dtype=torch.long)))
    assert found.x.dtype == torch.float64
    assert found.x[0, 1] == 7.5
    assert found.x.sum() == 7.5


def test_batches_let_examples_cancel_and_single_examples_do_not() -> None:
    model, data = mlp((784, 6, 10), 0), load("MNIST").train[:40]
    exact = importance.sensitivity(model, data)
    one_by_one, whole = (beyond.batch_sensitivity(model, data, size) for size in (1, 40))
    for name, value in exact.items():
        assert torch.allclose(value, one_by_one[name], rtol=1e-4, atol=1e-6)
        assert (whole[name] <= value + 1e-5).all()
    assert flatten(whole).sum() < 0.99 * flatten(exact).sum()


def test_directions_are_as_long_as_the_whole_fisher_says() -> None:
    setup = beyond.Directions((49, 6, 10), 200, 100, Settings(epochs=3, batch_size=50), random=3)
    found = beyond.directions(setup)
    assert found.parameters == 49 * 6 + 6 + 6 * 10 + 10
    for values in found.predicted["full"].values():
        assert sum(values) / len(values) == pytest.approx(setup.rise, rel=1e-6)
    top = {name: says["worst"][0] for name, says in found.predicted.items()}
    assert top["layers"] <= top["full"] * (1 + 1e-9)
    assert len(found.true["random"]) == 3
    assert set(found.learned) == {"flat", "diagonal", "Kronecker", "full"}
    assert found.learned["flat"][2] == 0
    assert found == beyond.directions(setup)
    figure = plots.rises({name: {way: sum(v) for way, v in says.items()} for name, says in found.predicted.items()})
    assert len(figure.axes[0].get_yticklabels()) == len(found.true)


def test_importances_are_compared_by_training_and_seed() -> None:
    setup = beyond.Importances((784, 6, 10), 200, 100, TRAINED, seeds=(0, 1))
    found = beyond.importances(setup)
    for way in ("Adam", "SGD"):
        assert {len(alike.rank) for alike in found.alike[way].values()} == {2}
        assert all(-1 <= r <= 1 for alike in found.alike[way].values() for r in alike.rank + alike.cosine)
        assert all(same > another for same, another in zip(*found.shares[way].values(), strict=True))
    assert len(plots.against_fisher({"MAS": found.points["MAS, Adam"], "SI": found.points["SI, SGD"]}).axes) == 2
    json.dumps(asdict(found))


def test_the_work_with_another_batch_is_by_hand() -> None:
    model, data = mlp((784, 10), 0), load("MNIST").train[:50]
    watch = beyond._Watch(model, data, 50, 0)
    watch(0, 1)
    before, gradients = watch.before, watch.gradients
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    watch(1, 1)
    for name, work in watch.work.items():
        assert torch.allclose(work, -gradients[name] * (dict(model.named_parameters())[name] - before[name]))


def test_sequences_choose_on_validation_data_and_report_each_count(done: beyond.Sequenced) -> None:
    for name, by_count in done.validation.items():
        for count, values in by_count.items():
            tried = done.strengths[name]
            assert done.chosen[name][count] == tried[values.index(max(values))]
            assert done.at_edge(name, count)
            assert [len(record.names) for record in done.records[name][count]] == [count, count]
    assert set(done.records) == {*done.validation, "plain", beyond.APART}
    assert list(done.records[beyond.APART]) == [2]


def test_a_longer_sequence_begins_as_a_shorter_one_does(done: beyond.Sequenced) -> None:
    method = beyond.methods(SMALL)["EWC"](done.chosen["EWC"][2])
    make = partial(permuted_mnist, 2, SMALL.train_limit, SMALL.held_limit, seed=1)
    model = mlp(SMALL.sizes, 1)
    alone = learn(model, make(), method, SMALL.settings, 1)
    expected = sum(alone.accuracy[-1]) / 2
    assert done.averages("EWC", 2)[1] == pytest.approx(expected, abs=0.02)  # stacked sums round differently


def test_two_methods_kept_run_by_run(done: beyond.Sequenced, tmp_path: Path) -> None:
    setup = replace(SMALL, ladders={name: SMALL.ladders[name] for name in ("EWC", "Kronecker")})
    found = beyond.sequences(setup, folder=str(tmp_path))
    assert set(found.records) == {"plain", "EWC", "Kronecker", beyond.APART}
    assert len(list(tmp_path.glob("*.json"))) >= 4 + 3 * 2
    lines = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert beyond.sequences(setup, folder=str(tmp_path)) == found
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == lines
    again = beyond.restored(json.loads(json.dumps(beyond.stored(found))))
    assert again.averages("Kronecker", 2) == found.averages("Kronecker", 2)
    assert (again.chosen, again.validation) == (found.chosen, found.validation)
    assert found.averages("plain", 3) == pytest.approx(done.averages("plain", 3), abs=0.02)  # stacked: other rounding


@pytest.mark.parametrize("path", sorted(RECORDED.glob("fifty-*.json")), ids=lambda path: path.stem)
def test_recorded_sequences_have_the_settings_of_the_code(path: Path) -> None:
    recorded = json.loads(path.read_text())
    assert recorded["setup"] == as_then(json.loads(json.dumps(asdict(beyond.FIFTY))), recorded["setup"])
    assert recorded["commit"] and recorded["versions"]["torch"]
    found = beyond.restored(recorded["found"])
    for name in ("EWC", "Kronecker", "plain"):
        assert {count: len(found.averages(name, count)) for count in found.records[name]} == {10: 5, 20: 5, 50: 5}


def test_figures_of_the_sequences_have_a_panel_a_count(done: beyond.Sequenced) -> None:
    from ewc_code.metrics import interval

    averages = {n: {name: interval(done.averages(name, n)) for name in done.validation} for n in SMALL.counts}
    assert len(plots.strengths_tried(done).axes) == len(plots.method_averages(averages).axes) == 2


def test_merging_follows_the_tasks() -> None:
    found = beyond.merging(SMALL, 1.0)
    assert found.sizes == {"0": (8, 785), "2": (10, 9)}
    for layer in found.sizes:
        near, one_by_one = (found.distances[rule][layer] for rule in ("nearest", "nearest, one at a time"))
        assert near == pytest.approx(one_by_one, abs=1e-9)  # two tasks: the same
        assert near[0] < found.distances["sums weighted by traces"][layer][0]
    assert len(plots.merge_errors(found).axes) == 2


def test_costs_count_what_is_kept() -> None:
    found = beyond.costs(SMALL, repeats=1)
    size = sum(p.numel() for p in mlp(SMALL.sizes, 0).parameters())
    squares = 8**2 + 785**2 + 10**2 + 9**2
    assert found["plain"].numbers == (0, 0)
    assert found["SI"].numbers == (2 * size, 2 * size)
    assert found["Kronecker"].numbers == (size + squares, size + squares)
    assert found[beyond.APART].numbers == (size + squares, size + 2 * squares)
    assert all(math.isfinite(cost.step) and cost.step > 0 for cost in found.values())
    flat = consolidation.none().prior(snapshot(mlp(SMALL.sizes, 0)))
    assert storage.numbers(flat) == 0


@pytest.mark.parametrize("settings", [beyond.DIRECTIONS, beyond.IMPORTANCES, beyond.SEQUENCES])
def test_every_scale_has_settings(settings: dict) -> None:
    assert list(settings) == ["smoke", "laptop", "paper"]


def test_reported_seeds_do_not_choose() -> None:
    assert all(not set(setup.seeds) & set(setup.choosing) for setup in beyond.SEQUENCES.values())
