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
    setup = scale_worker.Work(sizes=(784, 400, 400, 10), steps=3)
    runs = [scale.spread(setup) for _ in range(3)]
    one = scale.alone(setup)
    size = sum(value.numel() for value in one.mean.values())
    gap = max(max(scale.farthest(belief, one).values()) for run in runs for belief in run.beliefs)
    seconds = statistics.median(run.allreduce for run in runs)
    row("all-reduce between two processes, gloo", f"{size:,} numbers in float64", 1e3 * seconds, "ms")
    row("two processes from one, largest difference", "weights and precision after two tasks", gap, "relative")
    assert gap < 1e-10
