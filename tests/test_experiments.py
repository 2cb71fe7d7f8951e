"""The experiments: the same numbers again, strengths chosen on validation data, results that JSON can hold."""

import json
import os
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from oracles import examples, network, score
from torch import Tensor

from ewc_code import consolidation, fisher, sweep
from ewc_code.data import Examples
from ewc_code.gaussian import Diagonal
from ewc_code.models import flatten, snapshot
from ewc_code.tasks import Part, Task, permuted_mnist
from ewc_code.training import Record, Settings
from ewc_experiments import comparison as experiments
from ewc_experiments import variants
from ewc_experiments.comparison import Comparison, as_json, choose, compare

TINY = replace(
    experiments.PERMUTED["smoke"], train_limit=300, seeds=(0, 1), settings=Settings(epochs=2, batch_size=50), tasks=2
)


@pytest.fixture(autouse=True)
def _sample_unless_full_data_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("EWC_DATA"):
        monkeypatch.setenv("EWC_DATA", "sample")


class Sealed(Task):
    """A task whose test examples must not be looked at."""

    def examples(self, part: Part, which: int | Tensor | None = None) -> Examples:
        assert part != "test", "the test examples were looked at"
        return super().examples(part, which)


def pair() -> tuple[Task, ...]:
    return permuted_mnist(2, 300, 300)


def sealed() -> list[Task]:
    return [Sealed(task.name, task.images, task.transform) for task in pair()]


@pytest.fixture(scope="module")
def found() -> experiments.Compared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWC_DATA", os.environ.get("EWC_DATA") or "sample")
        return compare(TINY, pair)


def test_same_numbers_again(found: experiments.Compared) -> None:
    assert compare(TINY, pair) == found


def test_every_method_has_a_record_a_seed(found: experiments.Compared) -> None:
    assert set(found.records) == {"plain", "L2", "EWC"}
    for name, records in found.records.items():
        assert len(records) == len(TINY.seeds)
        assert records[0] != records[1]
        assert all(record.matrix.shape == (2, 2) for record in records)
        assert found.final(name, 1) == [record.accuracy[-1][1] for record in records]
        assert found.averages(name) == pytest.approx([sum(record.accuracy[-1]) / 2 for record in records])


def test_methods_of_a_seed_share_the_first_fit(found: experiments.Compared) -> None:
    for i in range(len(TINY.seeds)):
        first = {tuple(records[i].accuracy[0]) for records in found.records.values()}
        assert len(first) == 1


def test_strengths_are_chosen_without_the_test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 13, and the same check with the test examples used for choosing."""
    choose("EWC", consolidation.ewc, TINY.ewc, TINY, sealed)
    peeking = lambda runs: sweep.sweep([replace(run, evaluate_on="test") for run in runs])  # noqa: E731
    monkeypatch.setattr(experiments, "sweep", peeking)
    with pytest.raises(AssertionError, match="were looked at"):
        choose("EWC", consolidation.ewc, TINY.ewc, TINY, sealed)


def test_a_comparison_with_a_diverging_run_says_so() -> None:
    setup = replace(TINY, settings=replace(TINY.settings, optimiser="sgd", learning_rate=1e30))
    with pytest.raises(FloatingPointError, match=r"every reported run must stay finite; got: .*permutation 1"):
        experiments.plain(setup, pair)


def test_chosen_strength_is_the_best_on_validation(found: experiments.Compared) -> None:
    for chosen in found.chosen.values():
        average = torch.tensor(chosen.validation).mean(1)
        assert chosen.best == chosen.strengths[int(average.argmax())]
        assert chosen.at_edge == (chosen.best in (min(chosen.strengths), max(chosen.strengths)))


def test_seeds_that_choose_are_not_reported() -> None:
    with pytest.raises(ValueError, match=r"seeds that choose must not be reported; both hold {1}"):
        Comparison(seeds=(0, 1), choosing=(1, 2))
    for table in (experiments.MNIST_THEN_FASHION, experiments.PERMUTED):
        assert set(table) == {"smoke", "laptop", "paper"}


def test_results_survive_json(found: experiments.Compared) -> None:
    back = json.loads(as_json(found))
    assert {
        name: [Record(**record) for record in records] for name, records in back["records"].items()
    } == found.records
    chosen = {name: experiments.Chosen(**chosen) for name, chosen in back["chosen"].items()}
    assert chosen == found.chosen
    assert back["setup"] == json.loads(json.dumps(asdict(TINY)))
    assert Settings(**back["setup"]["settings"]) == TINY.settings


def test_argmax_belief_is_the_slip_it_says_it_is() -> None:
    model, data = network(), examples(9)
    prior = Diagonal.isotropic(snapshot(model))
    four = partial(experiments._first, variants.argmax, 4)
    slip = experiments._with_estimate("slip", four, 1.0).consolidate(model, data, prior)
    squares = [score(model, x, int(model(x[None]).argmax())).square() for x in data.x[:4]]
    torch.testing.assert_close(flatten(slip.precision), 9 * torch.stack(squares).mean(0))
    four = partial(experiments._first, fisher.diagonal, 4)
    few = experiments._with_estimate("few", four, 1.0).consolidate(model, data, prior)
    whole = consolidation.ewc(1.0).consolidate(model, data[:4], prior)
    torch.testing.assert_close(flatten(few.precision), 9 / 4 * flatten(whole.precision))
