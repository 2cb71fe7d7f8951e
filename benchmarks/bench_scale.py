"""What the chapter "Scale" measures, at length and in one run; writes results/scale.json (`make bench`).

The file of a run on another machine, a GPU say, may be kept as `book/recorded/scale-NAME.json`: the chapter then draws
its roof beside the one of the machine that builds the book.
"""

import datetime
import json
import os
import statistics
from pathlib import Path

import pytest
import torch

from ewc_checks import provenance
from ewc_code import environment
from ewc_code.models import mlp
from ewc_code.sweep import Outcome, sweep
from ewc_experiments import scale, scale_worker

RESULTS = Path(os.environ.get("EWC_BENCH_RESULTS", Path(__file__).parent / "results")) / "scale.json"
SETUP = scale.SCALE["paper" if environment.device().type == "cuda" else "laptop"]
ROUNDS = 15
rows: list[dict] = []
ceilings: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write what was measured, whole or not at all."""
    yield
    text = json.dumps(
        {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": provenance.commit(),
            "device": str(environment.device()),
            "hardware": provenance.hardware(),
            "threads": torch.get_num_threads(),
            "versions": provenance.versions(),
            "rounds": ROUNDS,
            "ceilings": ceilings,
            "rows": rows,
        },
        indent=1,
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(RESULTS)


def row(measured: str, of: str, value: float, unit: str) -> None:
    rows.append({"measured": measured, "of": of, "value": value, "unit": unit})


def test_roofline() -> None:
    here, points = scale.roofline(SETUP)
    ceilings.update(peak=here.peak, bandwidth=here.bandwidth)
    row("peak", "products in float32", here.peak / 1e9, "billion operations/s")
    row("bandwidth", "adding two arrays", here.bandwidth / 1e9, "GB/s")
    for p in points:
        row("rate", p.name, p.operations / p.seconds / 1e9, "billion operations/s")


def test_fishers() -> None:
    times = scale.interleaved(scale.fishers(SETUP, scale.data_for(SETUP)), ROUNDS)
    for name in list(times)[1:]:
        row(
            "Fisher",
            f"{name}, {'-'.join(map(str, SETUP.sizes))}",
            scale.ratio(times, name, next(iter(times))),
            "passes",
        )


def test_cost_of_a_step() -> None:
    data = scale.data_for(SETUP)
    for name, (make, own, batch) in scale.small_networks(SETUP, data).items():
        found = scale.overhead(make, own, batch, 2 * ROUNDS)
        row("plain step", f"{name}, batch {batch}", 1e3 * found.plain, "ms")
        row("EWC adds to a step, autograd", f"{name}, batch {batch}", 100 * (found.ratio - 1), "%")
        row("EWC adds to a step, by hand", f"{name}, batch {batch}", 100 * (found.by_hand - 1), "%")


def test_stacks() -> None:
    found = scale.stacks(SETUP, 5)
    for s in found:
        row("one model's share of a stack", f"{s.models} of {'-'.join(map(str, SETUP.stack_sizes))}", s.seconds, "s")


def test_two_processes() -> None:
    small = scale.spread(scale_worker.Work())
    numbers = sum(value.numel() for value in small.beliefs[0].mean.values())
    row("all-reduce between two processes, gloo", f"{numbers:,} numbers in float64", 1e3 * small.allreduce, "ms")
    setup = scale_worker.Work(sizes=(784, 400, 400, 10), steps=3)
    runs = [scale.spread(setup) for _ in range(3)]
    one = scale.alone(setup)
    size = sum(value.numel() for value in one.mean.values())
    gap = max(max(scale.farthest(belief, one).values()) for run in runs for belief in run.beliefs)
    seconds = statistics.median(run.allreduce for run in runs)
    row("all-reduce between two processes, gloo", f"{size:,} numbers in float64", 1e3 * seconds, "ms")
    row("two processes from one, largest difference", "weights and precision after two tasks", gap, "relative")
    assert gap < 1e-10


def test_profile() -> None:
    data = scale.data_for(SETUP)
    steps, works = scale.training_steps(lambda: mlp(SETUP.sizes), data, SETUP.batch), scale.fishers(SETUP, data)
    looked_at = {
        f"training step, {SETUP.batch} images": steps["plain"],
        "the same with EWC": steps["EWC"],
        "exact diagonal": works["exact diagonal"],
    }
    for name, work in looked_at.items():
        found = scale.profiled(work, ROUNDS)
        for kind, seconds in found.items():
            row(f"share of the time, {kind}", name, 100 * seconds / sum(found.values()), "%")


def test_a_sweep_through_an_executor() -> None:
    todo = scale.stack_runs(SETUP, 4)
    here = scale.seconds(lambda: sweep(todo, stack=2))
    found: list[Outcome] = []
    elsewhere = scale.seconds(lambda: found.extend(scale.over_processes(todo, processes=2, stack=2)))
    row("sweep, one process", f"{len(todo)} runs in stacks of 2", here, "s")
    row("sweep, two processes, with their start", f"{len(todo)} runs in stacks of 2", elsewhere, "s")
    assert all(outcome.record for outcome in found)


def test_the_cost_table_where_it_can_be_tried() -> None:
    first = scale.costs(scale.WIDTHS[0], 1)
    tried = scale.first_row(first, texts=8)
    name = f"transformer of {first.parameters:,} parameters, {tried.texts} texts of 1,024"
    row("diagonal Fisher from drawn labels", name, tried.seconds, "s")
    row("its operations, counted over predicted", name, tried.counted / tried.predicted, "")
    assert tried.counted == tried.predicted
