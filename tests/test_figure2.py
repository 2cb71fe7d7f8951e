"""The experiments of the paper's Figure 2: what is searched, what is reported, and that recorded runs are of these."""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import as_then

from ewc_code import sweep
from ewc_code.data import Examples, Images
from ewc_code.environment import SCALES
from ewc_code.metrics import overlap
from ewc_code.models import mlp, snapshot
from ewc_code.tasks import Task, permuted_mnist
from ewc_experiments import comparison as experiments
from ewc_experiments import figure2

RECORDED = Path(__file__).parents[1] / "book" / "recorded"
PANELS = {"2A": figure2.FIGURE_2A, "2B": figure2.FIGURE_2B, "2C": figure2.FIGURE_2C}


@pytest.fixture(autouse=True)
def _sample_unless_full_data_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("EWC_DATA"):
        monkeypatch.setenv("EWC_DATA", "sample")


def tiny(setup: figure2.Search) -> figure2.Search:
    common = replace(setup.common, train_limit=200, tasks=2, seeds=(0, 1))
    return replace(
        setup, common=common, search_tasks=2, held_limit=100, widths=(8, 16), rates=(4e-3,), fisher_images=50
    )


@pytest.fixture(scope="module")
def panel() -> figure2.Panel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWC_DATA", os.environ.get("EWC_DATA") or "sample")
        return figure2.figure_2b(tiny(figure2.FIGURE_2B["smoke"]))


def test_every_panel_has_every_scale() -> None:
    assert all(set(table) == set(SCALES) for table in PANELS.values())


def test_the_best_of_the_grid_is_reported_on_its_own_seeds(panel: figure2.Panel) -> None:
    assert set(panel.records) == {"plain", "dropout", "EWC", "joint"}
    for name, cells in panel.grids.items():
        assert [cell.width for cell in cells] == [8, 16]
        assert panel.chosen[name].best == max(cell.best for cell in cells)
        for cell in cells:
            assert cell.best == pytest.approx(max(sum(row) / 2 for row in cell.chosen.validation))
        assert len(panel.records[name]) == 2
        assert panel.records[name][0] != panel.records[name][1]
    assert panel.chosen["joint"] == panel.chosen["EWC"]
    assert [cell.epochs for cell in panel.epochs] == [2, 4]


def test_averages_are_over_the_tasks_seen(panel: figure2.Panel) -> None:
    rows = [record.accuracy for record in panel.records["EWC"]]
    assert panel.averages("EWC", 0) == [row[0][0] for row in rows]
    assert panel.averages("EWC") == [pytest.approx(sum(row[1]) / 2) for row in rows]
    assert panel.averages("joint") == [record.accuracy[0][0] for record in panel.records["joint"]]


def test_reported_seeds_have_permutations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[sweep.Run] = []
    monkeypatch.setattr(experiments, "sweep", lambda runs, **_: seen.extend(runs) or sweep.sweep(runs))
    setup = tiny(figure2.FIGURE_2A["smoke"])
    figure2.figure_2a(replace(setup, widths=(8,)))
    reported = [run for run in seen if run.evaluate_on == "test"]
    searched = [run for run in seen if run.evaluate_on == "validation"]
    assert {run.seed for run in reported} == {0, 1}
    assert {run.seed for run in searched} == set(setup.common.choosing)
    assert {run.tasks.keywords["seed"] for run in reported} == {0, 1}
    assert {run.method.name for run in reported} == {"plain", "L2", "EWC"}


def test_a_learning_rate_that_diverges_is_a_result() -> None:
    setup = tiny(figure2.FIGURE_2A["smoke"])
    sgd = replace(setup.common.settings, optimiser="sgd", momentum=0.9)
    panel = figure2.figure_2a(
        replace(setup, widths=(8,), rates=(1e30, 1e-2), common=replace(setup.common, settings=sgd))
    )
    assert panel.grids["plain"][0].best == 0
    assert panel.chosen["plain"].rate == 1e-2


def test_overlaps_are_those_of_the_layers() -> None:
    setup = replace(figure2.FIGURE_2C["smoke"], sizes=(784, 8, 8, 10), train_limit=200, fisher_images=50, seeds=(0,))
    found = figure2.figure_2c(setup)
    for table in (found.apart, found.at_end):
        assert set(table) == {8, 26}
        assert all(len(row) == 3 and min(row) >= 0 and max(row) <= 1 + 1e-9 for rows in table.values() for row in rows)
    left, right = ({n: torch.rand_like(v) for n, v in snapshot(mlp((3, 2, 2), 0)).items()} for _ in range(2))
    first = overlap({n: left[n] for n in ("0.weight", "0.bias")}, {n: right[n] for n in ("0.weight", "0.bias")})
    assert figure2.by_layer(left, right)[0] == pytest.approx(first)


def test_ewc_runs_again_with_its_products_rounded_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[sweep.Run] = []
    monkeypatch.setattr(experiments, "sweep", lambda runs, **_: seen.extend(runs) or sweep.sweep(runs))
    setup = replace(tiny(figure2.FIGURE_2B["smoke"]), widths=(8,), epochs=())
    for products, other in ((None, "medium"), ("medium", None)):
        seen.clear()
        settings = replace(setup.common.settings, products=products)
        found = figure2.figure_2b(replace(setup, common=replace(setup.common, settings=settings)))
        assert len(found.otherwise) == len(setup.common.seeds)
        assert {run.settings.products for run in seen[:-2]} == {products}
        again = seen[-2:]
        assert {run.settings.products for run in again} == {other}
        assert {run.seed for run in again} == set(setup.common.seeds)
        assert {(run.method.name, run.evaluate_on) for run in again} == {("EWC", "test")}


def test_results_are_json(panel: figure2.Panel) -> None:
    stored = json.loads(experiments.as_json(panel))
    assert len(stored["otherwise"]) == len(panel.setup.common.seeds)
    assert stored["setup"] == json.loads(json.dumps(asdict(panel.setup)))


@pytest.mark.parametrize("path", sorted(RECORDED.glob("figure2-*.json")), ids=lambda path: path.stem)
def test_recorded_settings_are_still_those_of_the_code(path: Path) -> None:
    recorded = json.loads(path.read_text())
    for name, table in PANELS.items():
        now = json.loads(json.dumps(asdict(table[recorded["scale"]])))
        then = recorded["panels"][name]["setup"]
        assert then == as_then(now, then), f"panel {name} was recorded with other settings: make record"
    assert recorded["commit"]
    assert recorded["versions"]["torch"]


def test_tasks_are_made_by_name() -> None:
    """So that a run can be sent to another machine."""
    made = figure2.FIGURE_2B["smoke"].tasks(2)
    assert isinstance(made, partial)
    assert made.func is permuted_mnist
    assert all(isinstance(task, Task) for task in made(seed=1))


@pytest.mark.parametrize("side", [1, 8, 26, 28])
def test_central_permutation_moves_the_square_and_nothing_else(side: int) -> None:
    own = Examples(torch.arange(6 * 784.0).view(6, 784), torch.zeros(6, dtype=torch.int64))
    pictures = Images("pictures", own, own, own)  # every pixel of every image has a value of its own
    task = figure2.centrally_permuted(pictures, side, seed=3)
    low = (28 - side) // 2
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[low : low + side, low : low + side] = True
    inside = inside.reshape(-1)
    before, after = pictures.train.x, task.train.x
    assert torch.equal(before[:, ~inside], after[:, ~inside])
    assert torch.equal(before[:, inside].sort(1).values, after[:, inside].sort(1).values)
    assert side == 1 or not torch.equal(before, after)
    with pytest.raises(ValueError, match=r"side must lie in 1..28"):
        figure2.centrally_permuted(pictures, 29)
