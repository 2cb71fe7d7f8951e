"""Split tasks in three scenarios: strengths from validation data, what is measured at a switch and of the output."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from oracles import as_then
from torch.nn import functional as F

from ewc_code import metrics
from ewc_code.data import Examples
from ewc_code.models import MultiHead, snapshot
from ewc_code.tasks import SCENARIOS, split
from ewc_code.training import Settings
from ewc_experiments import scenarios
from ewc_experiments.scenarios import SPLIT, Split
from ewc_experiments.workers import one_thread

TINY = replace(
    SPLIT["smoke"], hidden=(8, 8), train_limit=40, held_limit=20, seeds=(0, 1), examples=20, kept=4,
    settings=Settings(epochs=2, batch_size=20, learning_rate=1e-2), ewc=(1.0, 1e3), sets=("MNIST",),
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("data_at_hand")


@pytest.fixture(scope="module")
def table(data_at_hand: None) -> scenarios.Table:
    return scenarios.compare(TINY)


def test_every_scale_has_settings_and_at_least_three_seeds() -> None:
    assert set(SPLIT) == {"smoke", "laptop", "paper"}
    assert len(SPLIT["laptop"].seeds) >= 5 and len(SPLIT["paper"].seeds) >= 5
    assert SPLIT["paper"].hidden == (400, 400)
    with pytest.raises(ValueError, match=r"seeds that choose must not be reported; both hold {1}"):
        Split(seeds=(0, 1), choosing=(1, 2))


def test_every_method_in_every_scenario(table: scenarios.Table) -> None:
    assert set(table) == {"MNIST"} and tuple(table["MNIST"]) == SCENARIOS
    for entries in table["MNIST"].values():
        assert list(entries) == ["plain", *scenarios.families(TINY), "joint"]
        assert all(len(entry.records) == 2 for entry in entries.values())
        assert all(0 <= entry.summary().mean <= 1 for entry in entries.values())
        chosen = entries["EWC"].chosen
        average = torch.tensor(chosen.validation).mean(1)
        assert entries["EWC"].strength == chosen.best == chosen.strengths[int(average.argmax())]
        assert entries["L2"].strength == TINY.l2[0] and entries["plain"].chosen is None


def test_runs_are_those_of_learn(table: scenarios.Table) -> None:
    """A stack gives what one run alone gives, but for rounding."""
    from ewc_code.training import learn

    entry = table["MNIST"]["domain"]["EWC"]
    family, strength = scenarios.methods(TINY, {"EWC": entry.strength})["EWC"]
    model = scenarios.network("domain", TINY.hidden, 1)
    alone = learn(model, split("MNIST", "domain", 40, 20), family(strength, 1), TINY.settings, 1)
    assert metrics.average_accuracy(alone.matrix) == pytest.approx(entry.summary().mean, abs=0.2)
    torch.testing.assert_close(alone.matrix, entry.records[1].matrix, atol=0.051, rtol=0)


def test_the_buffer_differs_from_seed_to_seed() -> None:
    task = split("MNIST", "class", 40, 20)[0]
    model = scenarios.network("class", TINY.hidden, 0)
    kept = []
    for seed in (0, 1):
        method = scenarios.replayed(TINY, 1.0, seed)
        kept.append(method.consolidate(model, task.train, method.prior(snapshot(model))).x)
    assert len(kept[0]) == TINY.kept and not torch.equal(*kept)


def test_networks_share_the_trunk() -> None:
    task, domain, classes = (scenarios.network(s, TINY.hidden, 3) for s in SCENARIOS)
    assert isinstance(task, MultiHead)
    trunk = [list(m.parameters())[:4] for m in (task, domain, classes)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*trunk, strict=True))
    assert domain(torch.zeros(1, 784)).shape == (1, 2) and classes(torch.zeros(1, 784)).shape == (1, 10)


def test_what_is_watched_is_what_the_network_says() -> None:
    made = scenarios.methods(TINY, {"EWC": 1e3})
    found = scenarios.watch(TINY, "class", {"plain": made["plain"]}, 3)["plain"]
    assert len(found) == 2
    for run in found:
        per_task = 2 * 2  # epochs times batches
        assert run.steps == list(range(2 * per_task + 1))
        assert all(a <= w + 1e-6 for a, w in zip(run.accuracy, run.within, strict=True))
        assert all(a <= 1 - lost + 1e-6 for a, lost in zip(run.accuracy, run.lost, strict=True))


def test_what_is_put_back_is_undone() -> None:
    found = scenarios.put_back(TINY, *scenarios.methods(TINY, {})["plain"])
    watched = scenarios.watch(TINY, "class", {"plain": scenarios.methods(TINY, {})["plain"]}, 2)["plain"]
    assert found["nothing"] == pytest.approx([run.lost[-1] for run in watched])
    assert len(found["biases"]) == len(found["last layer"]) == len(TINY.seeds)
    assert sum(found["last layer"]) <= sum(found["biases"]) <= sum(found["nothing"])


def test_diagnosis_of_a_network_made_by_hand() -> None:
    """A last layer that prefers the newest task for everything: within right, among all wrong, one shift mends it."""
    sequence = split("MNIST", "class", 40, 20)
    model = scenarios.network("class", TINY.hidden, 0)
    found = scenarios._diagnosed(model, sequence)
    whole = scenarios._whole([task.test for task in sequence])
    with torch.no_grad():
        right = (model(whole.x).argmax(1) == whole.y).float().mean().item()
    assert found.accuracy == pytest.approx(right)
    with torch.no_grad():
        model[-1].bias[8:] += 1e3
    pushed = scenarios._diagnosed(model, sequence)
    assert pushed.newest == 1
    assert pushed.within == pytest.approx(found.within)
    assert pushed.own_wins == pytest.approx(0.2)
    assert pushed.shifted >= pushed.accuracy - 0.05
    assert pushed.refitted == pytest.approx(found.refitted)


def test_fitted_shifts_and_layers_are_optima() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, y = torch.randn(200, 10, generator=draw), torch.randint(0, 10, (200,), generator=draw)
    lead = torch.tensor([0.0, 0.0, 3.0, 0.0, -2.0])
    shifts = scenarios.fit_shifts(logits + lead.repeat_interleave(2), y)
    again = scenarios.fit_shifts(logits, y)
    torch.testing.assert_close(shifts - shifts.mean(), again - lead - (again - lead).mean(), atol=2e-2, rtol=0)
    x = torch.randn(200, 3, generator=draw)
    weight = scenarios.fit_layer(x, y, 10).requires_grad_()
    loss = F.cross_entropy(scenarios._with_one(x) @ weight.T, y) + 1e-4 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-3


def test_first_step_of_every_gaussian_is_that_of_plain_training() -> None:
    found = scenarios.one_step(TINY, scenarios.methods(TINY, {"EWC": 1e6, "MAS": 1.0}))
    assert all(torch.equal(found["EWC"][n], found["plain"][n]) for n in found["plain"])
    assert all(torch.equal(found["MAS"][n], found["plain"][n]) for n in found["plain"])
    assert any(not torch.equal(found["start"][n], found["plain"][n]) for n in found["plain"])


def test_costs_count_what_is_kept() -> None:
    found = scenarios.costs(TINY, {"EWC": 1.0, "LwF": 1.0, "replay": 1.0})
    size = sum(p.numel() for p in scenarios.network("class", TINY.hidden, 0).parameters())
    assert found["plain"].numbers == 0 and found["EWC"].numbers == 2 * size and found["LwF"].numbers == size
    assert 5 * TINY.kept * 785 <= found["replay"].numbers < found["joint"].numbers
    assert all(cost.seconds > 0 for cost in found.values())


def test_one_thread_is_for_small_networks_and_put_back() -> None:
    before = torch.get_num_threads()
    with one_thread(TINY.small):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with one_thread(SPLIT["paper"].small):
        assert torch.get_num_threads() == before


def test_table_as_markdown(table: scenarios.Table) -> None:
    lines = scenarios.as_markdown(table["MNIST"], {"EWC": ("1", "2", "3")}).splitlines()
    assert len(lines) == 2 + len(table["MNIST"]["task"])
    assert len({line.count("|") for line in lines}) == 1
    assert any("1 / 2 / 3" in line and line.startswith("| EWC ") for line in lines)


def test_examples_are_put_together() -> None:
    part = Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    assert len(scenarios._whole([part, part])) == 4


def test_some_methods_in_some_scenarios_are_kept_and_read_again(tmp_path: Path) -> None:
    only = {"task": ("EWC", "plain"), "class": ("EWC", "replay", "joint")}
    lines: list[str] = []
    table = scenarios.compare(TINY, lines.append, only, tmp_path)["MNIST"]
    assert {scenario: set(entries) for scenario, entries in table.items()} == {
        "task": {"plain", "EWC"},
        "class": {"EWC", "replay", "joint"},
    }
    kept = len(list(tmp_path.glob("*.json")))
    assert kept == 2 + 2 + (2 + 3) * len(TINY.seeds)  # strengths of EWC tried in either scenario, then the reported
    again = scenarios.restored(json.loads(json.dumps(scenarios.stored(table))))
    assert all(again[s][m].summary() == table[s][m].summary() for s in table for m in table[s])
    assert again["class"]["EWC"].chosen == table["class"]["EWC"].chosen
    rows = scenarios.as_markdown(again, {}).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| plain", "| EWC", "| replay", "| joint"]
    assert rows[2].split(" | ")[1] == "–"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "book/recorded").glob("scenarios-*.json")), ids=lambda path: path.stem
)
def test_recorded_runs_have_the_settings_of_the_code(path: Path) -> None:
    recorded = json.loads(path.read_text())
    now = json.loads(json.dumps(asdict(replace(SPLIT[recorded["scale"]], sets=("MNIST",)))))
    assert recorded["setup"] == as_then(now, recorded["setup"]), (
        "recorded with other settings: make record WHAT=scenarios"
    )
    assert recorded["commit"] and recorded["versions"]["torch"]
    assert set(recorded["table"]) == set(scenarios.RECORDED)
    for entries in scenarios.restored(recorded["table"]).values():
        assert all(len(entry.records) == len(recorded["setup"]["seeds"]) for entry in entries.values())
