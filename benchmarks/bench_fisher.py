"""Speed, error and memory of every system in `systems.py`, in one run; writes results/fisher.json (`make bench`).

Every round times the limit (one forward and backward pass over the same images) and then the system, so that a
neighbour's load falls on both; the ratio is the median over the rounds. Times per round stand in pytest-benchmark's own
output. A peer that is not installed is skipped, and absent from the results. The file of a run on another machine, a
GPU say, may be kept as `book/recorded/fisher-NAME.json`: the chapter "Fisher in the wild" then shows its ratios too.
"""

import copy
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import systems
import torch

from ewc_checks import provenance
from ewc_code import environment, fisher
from ewc_code.models import Params, flatten, mlp

RESULTS = Path(os.environ.get("EWC_BENCH_RESULTS", Path(__file__).parent / "results")) / "fisher.json"
ROUNDS = 5
GROWTH = {
    "examples": [(784, 400, 400, 10, n) for n in (1_000, 2_000, 4_000, 8_000, 16_000)],
    "width": [(784, w, w, 10, 2_000) for w in (100, 200, 400, 800, 1600)],
    "classes": [(784, 400, 400, k, 2_000) for k in (2, 5, 10, 20, 40)],
}
rows: list[dict] = []
growth: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write what was measured, whole or not at all."""
    yield
    versions = provenance.versions() | {
        name: importlib.metadata.version(distribution)
        for name, distribution in PEERS.items()
        if importlib.util.find_spec(name)
    }
    text = json.dumps(
        {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": provenance.commit(),
            "device": str(environment.device()),
            "hardware": provenance.hardware(),
            "threads": torch.get_num_threads(),
            "versions": versions,
            "rounds": ROUNDS,
            "rows": rows,
            "growth": growth,
        },
        indent=1,
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(RESULTS)


PEERS = {
    "backpack": "backpack-for-pytorch",
    "curvlinops": "curvlinops-for-pytorch",
    "nngeometry": "nngeometry",
    "laplace": "laplace-torch",
    "opacus": "opacus",
}


def seconds(work) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    start = time.perf_counter()
    work()
    if environment.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compared(benchmark, limit, work, rounds: int) -> tuple[float, float]:
    """Median seconds of the work, and median ratio limit / work over rounds that hold both."""
    limits: list[float] = []
    works: list[float] = []
    benchmark.pedantic(
        lambda: works.append(seconds(work)),
        setup=lambda: limits.append(seconds(limit)),
        rounds=rounds,
        warmup_rounds=1,
    )
    pairs = list(zip(limits, works, strict=True))[1:]
    return statistics.median(works[1:]), statistics.median(a / b for a, b in pairs)


@pytest.mark.parametrize("network", systems.NETWORKS)
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_system(benchmark, name: str, network: str) -> None:
    system = systems.SYSTEMS[name]
    if system.peer in PEERS:
        pytest.importorskip(system.peer, reason=f"{PEERS[system.peer]} is not installed: make peers")
    model, data = systems.case(network, system.images)
    bound = round(one_batch(model, data[: systems.BATCH]), 1)
    reference, other = copy.deepcopy(model), copy.deepcopy(model)
    work = system.make(model, data)
    median, ratio = compared(benchmark, systems.plain(other, data), work, ROUNDS if system.images > 1000 else 3)
    rows.append(
        {
            "network": network,
            "name": name,
            "kind": system.kind,
            "images": len(data),
            "examples_per_second": len(data) / median,
            "ratio": ratio,
            "relative_error": error(reference, data, system.kind, work()),
            "peak_megabytes": peak(name, network),
            "one_batch_megabytes": bound,
        }
    )
    if system.peer == "ewc_code" and system.kind != "kronecker":
        assert rows[-1]["peak_megabytes"] is None or rows[-1]["peak_megabytes"] <= bound


def one_batch(model, batch) -> float:
    """Megabytes of one batch's activations and their gradients, and of two copies of the parameters."""
    held = {batch.x.data_ptr(): batch.x}
    handles = [
        module.register_forward_hook(lambda *given: held.update({given[2].data_ptr(): given[2]}))
        for module in model.modules()
    ]
    model(batch.x)
    for handle in handles:
        handle.remove()
    return 2 * sum(t.nbytes for t in (*held.values(), *model.parameters())) / 2**20


def error(model, data, kind: str, found: Params | Callable[[Params], Params] | None) -> float | str | None:
    """Distance from the float64 result, |found - true| / |true|; of sampled labels, from the exact they estimate.

    Of Kronecker factors, over products with ten random directions: a matrix's Frobenius norm is that mean's root.
    """
    if found is None:
        return None
    if not isinstance(found, dict):
        true = systems.ours_kfac(model.double(), systems.Examples(data.x.double(), data.y))()
        squares = torch.zeros(2, dtype=torch.float64)
        for seed in range(10):
            rng = environment.generator(seed)
            named = {name: p for name, p in model.named_parameters() if p.ndim > 1}
            step = {n: torch.randn(p.shape, generator=rng).to(p.device).double() for n, p in named.items()}
            exact = flatten(true(step))
            ours = found({name: v.float() for name, v in step.items()})
            distance = flatten({name: ours[name] for name in step}).double() - exact
            squares += torch.stack([distance.square().sum(), exact.square().sum()]).cpu()
        return number((squares[0] / squares[1]).sqrt())
    labels = "data" if kind == "data" else "exact"
    true = flatten(fisher.diagonal(model.double(), systems.Examples(data.x.double(), data.y), labels))
    distance = (flatten(found).double() - true).norm() / true.norm()
    return number(distance)


def number(distance: torch.Tensor) -> float | str:
    """JSON has no NaN."""
    return distance.item() if torch.isfinite(distance) else "not finite"


def peak(name: str, network: str) -> float | None:
    """In a process of its own, so that nothing else's memory is counted; None where the system does not tell."""
    command = [sys.executable, str(Path(__file__).with_name("systems.py")), name, network]
    # Tensors that were freed go back to the system at once: what is counted is what is held, not what malloc keeps.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    return round(float(done.stdout.split()[-1]), 1) if done.returncode == 0 else None


@pytest.mark.parametrize("what", GROWTH)
def test_growth(benchmark, what: str) -> None:
    """How the time of the exact diagonal grows with examples, width and classes."""
    for i, (*sizes, n) in enumerate(GROWTH[what]):
        model = mlp(tuple(sizes)).to(environment.device())
        _, data = systems.case("784-400-400-10", n)
        data = systems.Examples(data.x, data.y % sizes[-1])
        if i < len(GROWTH[what]) - 1:
            pairs = [
                (seconds(systems.plain(model, data)), seconds(lambda d=data, m=model: fisher.diagonal(m, d)))
                for _ in range(4)
            ][1:]
            median, ratio = statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)
        else:  # pytest-benchmark wants one measurement a test: the largest
            work = lambda d=data, m=model: fisher.diagonal(m, d)  # noqa: E731
            median, ratio = compared(benchmark, systems.plain(model, data), work, 3)
        growth.append({"varied": what, "sizes": sizes, "images": n, "seconds": median, "ratio": ratio})
