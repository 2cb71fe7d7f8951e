r"""Scale: what training, curvature and the penalty cost, predicted by counting and measured on this machine.

    operations   of matrix products, a multiplication and an addition each counted as one
    roofline     seconds >= max(operations / peak, bytes / bandwidth)

Predictions are functions of a network's layer shapes alone, so that they also hold for networks that fit on no machine
here. Chapter "Scale".
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ewc_code
from ewc_code import consolidation, fisher, storage
from ewc_code.data import Examples, load
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal
from ewc_code.models import Params, mlp, nll, snapshot
from ewc_code.models import transformer as transformer_model
from ewc_code.sweep import Outcome, Run, learn_stacked, sweep
from ewc_code.tasks import permuted_mnist
from ewc_code.training import Settings, optimiser
from ewc_experiments import scale_worker

What = Literal["forward", "training", "diagonal", "kronecker"]
Kind = Literal["diagonal", "kronecker", "full"]
FLOAT = 4  # bytes of a number in float32


@dataclass(frozen=True)
class Setup:
    """Sizes of everything that the chapter measures."""

    sizes: tuple[int, ...]  #: Of the network that is profiled.
    images: int  #: That its Fisher is taken from.
    batch: int  #: Of its training steps.
    batches: tuple[int, ...]  #: Batch sizes at which EWC's share of a step is measured.
    width: int  #: Of the layer on the roofline: a square matrix.
    square: int  #: Size of the matrix product whose speed is the peak.
    numbers: int  #: In each of the three arrays whose addition is the bandwidth.
    rounds: int  #: Of every measurement.
    stacks: tuple[int, ...]  #: Numbers of models in a stack.
    stack_sizes: tuple[int, ...]  #: The network of the stacked models.
    stack_images: int  #: That each of them is trained on.


SCALE = {
    "smoke": Setup((784, 64, 64, 10), 500, 64, (4, 32, 256), 512, 512, 2**18, 3, (1, 2, 4), (784, 16, 10), 500),
    "laptop": Setup(
        (784, 400, 400, 10), 2_000, 128, (4, 16, 64, 256, 1024), 2048, 1024, 2**24, 9, (1, 2, 4, 8, 16),
        (784, 32, 32, 10), 2_000,
    ),
    "paper": Setup(
        (784, 400, 400, 10), 10_000, 128, (4, 16, 64, 256, 1024, 4096), 4096, 4096, 2**26, 15, (1, 2, 4, 8, 16, 32, 64),
        (784, 32, 32, 10), 10_000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Layers of one shape, as their cost sees them: a weight matrix (outputs, inputs), used at some positions."""

    inputs: int
    outputs: int
    positions: int = 1  #: Vectors an example that the matrix multiplies: pixels of a convolution, tokens of a text.
    bias: bool = True
    first: bool = False  #: Whether it sees the data themselves, to which no gradient has to go back.
    count: int = 1  #: Layers of this shape.

    @property
    def columns(self) -> int:
        """Inputs, with the 1 for the bias if there is one."""
        return self.inputs + self.bias


@dataclass(frozen=True)
class Network:
    """A network's shapes."""

    layers: tuple[Shape, ...]
    others: int = 0  #: Operations of a forward pass, an example, in products without parameters (attention).
    loose: int = 0  #: Parameters outside of the layers (embeddings, normalisation).

    @property
    def parameters(self) -> int:
        """P."""
        return self.loose + sum(layer.count * layer.outputs * layer.columns for layer in self.layers)


def shapes(model: nn.Module, x: Tensor) -> Network:
    """The shapes of a model's Linear and Conv2d layers, seen in a forward pass over the inputs `x`, (n, ...).

    Layers that see `x` itself, however reshaped, are first. Operations outside of layers are not seen.
    """
    found: list[Shape] = []

    def look(layer: nn.Module, received: tuple[Tensor, ...], returned: Tensor) -> None:
        weight, given = layer.get_parameter("weight"), received[0]
        positions = returned[0].numel() // len(weight)
        first = not given.requires_grad
        found.append(Shape(weight[0].numel(), len(weight), positions, getattr(layer, "bias", None) is not None, first))

    kinds = (nn.Linear, nn.Conv2d)
    hooks = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, kinds)]
    with torch.enable_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()
    inside = Network(tuple(found)).parameters
    return Network(tuple(found), loose=sum(p.numel() for p in model.parameters()) - inside)


def transformer(width: int, blocks: int, context: int, vocabulary: int) -> Network:
    """The shapes of `models.transformer`, of any size: nothing is made.

    In each block queries, keys and values, the way out, and two layers of four times the width; an example is a text of
    `context` tokens, and attention has two products of T x T scores. Chapter "Scale".
    """
    inner = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layers = tuple(Shape(i, o, context, count=blocks) for i, o in inner)
    head = Shape(width, vocabulary, context)
    loose = (vocabulary + context) * width + (2 * blocks + 1) * 2 * width
    return Network((*layers, head), others=blocks * 4 * context**2 * width, loose=loose)


def operations(network: Network, what: What, vectors: int = 1) -> int:
    r"""Operations of matrix products an example.

        forward    sum 2 T i o
        training   forward + way back + sum 2 T i o,   way back = sum 2 T i o without the first layers
        diagonal   forward + m way back + squares,     squares = 2 i o where T = 1, else 2 m T (i + 1) o
        kronecker  forward + m way back + sum 2 T (i + 1)^2 + 2 m T o^2

    `vectors` is m, what is sent back an example: one less than there are classes for the exact Fisher, 1 for one drawn
    label. A pass a class, the naive way, takes k times what training takes. Checks that are
    made once for all data are not counted. Chapter "Scale".
    """
    forward, back, squares, factors = network.others, 2 * network.others, 0, 0
    for layer in network.layers:
        once = 2 * layer.count * layer.positions * layer.inputs * layer.outputs
        forward += once
        back += 0 if layer.first else once
        whole = 2 * layer.count * layer.positions * layer.columns * layer.outputs
        squares += once if layer.positions == 1 else vectors * whole
        factors += 2 * layer.count * layer.positions * (layer.columns**2 + vectors * layer.outputs**2)
    weights = forward - network.others
    found = {"forward": forward, "training": forward + back + weights}
    curvature = forward + vectors * back
    return {**found, "diagonal": curvature + squares, "kronecker": curvature + factors}[what]


def numbers(network: Network, kind: Kind) -> int:
    r"""Numbers that a belief keeps: the mean, P, and the precision.

        diagonal P,   kronecker sum (i + 1)^2 + o^2 a term,   full P^2

    A Kronecker belief keeps nothing of the loose parameters but their mean.
    """
    size = network.parameters
    factors = sum(layer.count * (layer.columns**2 + layer.outputs**2) for layer in network.layers)
    return size + {"diagonal": size, "kronecker": factors, "full": size**2}[kind]


def pulled(network: Network) -> int:
    """Operations of a Kronecker penalty's gradient, a step: sum 2 o (i + 1) (o + i + 1), whatever the batch."""
    return sum(2 * s.count * s.outputs * s.columns * (s.outputs + s.columns) for s in network.layers)


class _Everywhere:
    """In the place of the counter's tracker of modules, which cannot follow gradients taken by hand."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def counted(work: Callable[[], object]) -> int:
    """Operations of the matrix products that a call makes, counted by torch while it runs."""
    added = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    counter = FlopCounterMode(display=False, custom_mapping=added)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    with counter, sdpa_kernel(SDPBackend.MATH):  # attention as products that can be counted
        work()
    return counter.get_total_flops()


class _Passing(TorchDispatchMode):
    """Adds up the numbers that every operation reads and writes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = {name: value for name, value in (kwargs or {}).items() if name != "out"}  # that is written only
            tensors = [t for t in tree_leaves((args, read, out)) if isinstance(t, Tensor)]
            self.total += sum(min(t.numel(), t.untyped_storage().nbytes() // t.element_size()) for t in tensors)
        return out


def passed(work: Callable[[], object]) -> int:
    """Numbers that a call reads and writes, operation by operation, as if there were no caches."""
    with _Passing() as passing:
        work()
    return passing.total


def counted_per_example(work: Callable[[Examples], object], data: Examples) -> float:
    """Operations an example: what twice as many examples add, which leaves out what is done once for all."""
    half = len(data) // 2
    return (counted(lambda: work(data[: 2 * half])) - counted(lambda: work(data[:half]))) / half


def convolutional(seed: int = 0) -> nn.Module:
    """Two convolutions and a linear layer for images of 784 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(32 * 5 * 5, 10),
        )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    start = time.perf_counter()
    work()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round; all take their turn in a round, so that a neighbour's load falls on all.

    Each round begins with another work, so that none always follows the same one and what that left in the caches.
    """
    for work in works.values():
        seconds(work)  # the first call pays for memory and for code that is loaded when it is first used
    names, times = list(works), {name: list[float]() for name in works}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(works[name]))
    return times


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median over the rounds of one work's time over another's."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most."""

    name: str
    peak: float  #: Operations a second in float32 matrix products.
    bandwidth: float  #: Bytes a second between memory and processor.

    @property
    def ridge(self) -> float:
        """Operations a byte from which on the peak and no longer the bandwidth is the limit."""
        return self.peak / self.bandwidth

    def bound(self, operations: float, moved: float) -> float:
        """Least seconds for so many operations on so many bytes: max(operations / peak, bytes / bandwidth)."""
        return max(operations / self.peak, moved / self.bandwidth)


@dataclass(frozen=True)
class Point:
    """One piece of work on the roofline."""

    name: str
    operations: float
    moved: float  #: Bytes that have to be read or written once, at least.
    seconds: float  #: Median over the rounds.

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.moved


def roofline(setup: Setup, name: str = "this machine") -> tuple[Ceilings, list[Point]]:
    """The machine's ceilings, the best of all rounds, and works on one square layer, measured in the same rounds."""
    where, draw, w, b = device(), generator(0), setup.width, 16
    make = lambda *shape: torch.randn(*shape, generator=draw).to(where)  # noqa: E731
    square, product = make(setup.square, setup.square), torch.empty(setup.square, setup.square, device=where)
    left, right, total = (torch.ones(setup.numbers, device=where) for _ in range(3))
    weight, inputs, g, h = make(w, w), {n: make(n, w) for n in (1, 16, 256)}, make(256, w), make(256, w)
    each, whole, theta = torch.empty(b, w, w, device=where), torch.zeros(w, w, device=where), make(w, w)
    pull = torch.zeros(w, w, device=where)
    works: dict[str, tuple[float, float, Callable[[], object]]] = {
        "peak": (2 * setup.square**3, 1, lambda: torch.mm(square, square, out=product)),
        "bandwidth": (1, 3 * FLOAT * setup.numbers, lambda: torch.add(left, right, out=total)),
        **{
            f"forward, B = {n}": (2 * n * w**2, FLOAT * (w**2 + 2 * n * w), partial(torch.mm, x, weight))
            for n, x in inputs.items()
        },
        f"per-example gradients, B = {b}": (
            2 * b * w**2, FLOAT * (b * w**2 + 2 * b * w),
            lambda: torch.bmm(g[:b, :, None], h[:b, None], out=each),
        ),
        "closed form, B = 256": (
            2 * 256 * w**2 + 2 * 256 * w, FLOAT * (w**2 + 2 * 256 * w),
            lambda: torch.mm(g.square().T, h.square(), out=whole),
        ),
        "penalty's gradient": (
            3 * w**2, FLOAT * 5 * w**2,
            lambda: torch.addcmul(pull, torch.sub(theta, weight, out=whole), each[0], out=pull),
        ),
    }  # fmt: skip
    times = interleaved({name: work for name, (_, _, work) in works.items()}, setup.rounds)
    peak = works["peak"][0] / min(times.pop("peak"))
    bandwidth = works["bandwidth"][1] / min(times.pop("bandwidth"))
    points = [Point(name, *works[name][:2], statistics.median(found)) for name, found in times.items()]
    return Ceilings(name, peak, bandwidth), points


Step = Callable[[], None]


def stepper(model: nn.Module, data: Examples, belief: Diagonal | None, batch: int, by_hand: bool = False) -> Step:
    """One training step at a time over the data in turn, as `training.fit` makes them; without a belief, no penalty.

    With `by_hand` the penalty's gradient, precision (theta - mean) strength / N, is added without autograd.
    """
    descent, theta = optimiser(list(model.parameters()), Settings(batch_size=batch)), Params(model.named_parameters())
    place = 0

    def step() -> None:
        nonlocal place
        place = place + batch if place + 2 * batch <= len(data) else 0
        part = data[place : place + batch]
        loss = nll(model(part.x), part.y)
        descent.zero_grad(set_to_none=True)
        loss.backward()
        if belief is not None and not by_hand:
            (1 / len(data) * belief.energy(theta)).backward()
        elif belief is not None:
            for name, p in theta.items():
                move = p.detach() - belief.mean[name]
                p.grad.addcmul_(belief.precision[name], move, value=1 / len(data))  # type: ignore[union-attr]
        descent.step()

    return step


def training_steps(make: Callable[[], nn.Module], data: Examples, batch: int) -> dict[str, Step]:
    """A plain step, and with EWC's penalty by autograd and by hand, each on a network of its own."""
    plain, penalised, by_hand = (make().to(device()) for _ in range(3))
    belief = Diagonal.isotropic(snapshot(plain), 1.0)
    return {
        "plain": stepper(plain, data, None, batch),
        "EWC": stepper(penalised, data, belief, batch),
        "by hand": stepper(by_hand, data, belief, batch, by_hand=True),
    }


@dataclass(frozen=True)
class Overhead:
    """EWC's share of a training step, at one batch size."""

    batch: int
    plain: float  #: Seconds of a plain step, median.
    ratio: float  #: Time of a step with the penalty over that of a plain one, median over rounds.
    low: float  #: Lower and upper quartile of the ratio.
    high: float
    by_hand: float  #: As `ratio`, with the penalty's gradient in closed form.


def overhead(make: Callable[[], nn.Module], data: Examples, batch: int, rounds: int, steps: int = 4) -> Overhead:
    """What the penalty adds to a step; each round makes a few steps of each kind in turn."""
    kinds = training_steps(make, data, batch)
    works = {name: lambda step=step: [step() for _ in range(steps)] for name, step in kinds.items()}
    times = interleaved(works, rounds)
    each = sorted(a / b for a, b in zip(times["EWC"], times["plain"], strict=True))
    quarter, plain = len(each) // 4, statistics.median(times["plain"]) / steps
    by_hand = ratio(times, "by hand", "plain")
    return Overhead(batch, plain, statistics.median(each), each[quarter], each[-1 - quarter], by_hand)


def predicted_share(network: Network, batch: int, ceilings: "Ceilings") -> float:
    r"""What the roofline says that a diagonal penalty adds to a step with Adam, as a share of it.

        5 w P / bandwidth  over  max(batch operations / peak, 3 w P / bandwidth) + 7 w P / bandwidth,   w = 4 bytes

    The step's three products wait for their weights where the batch is small. The penalty reads three numbers a
    parameter (theta, mean, precision) and reads and writes the gradient; Adam reads four and writes three. Chapter
    "Scale".
    """
    size = FLOAT * network.parameters / ceilings.bandwidth
    products = max(batch * operations(network, "training") / ceilings.peak, 3 * size)
    return 5 * size / (products + 7 * size)


def small_networks(setup: Setup, data: Examples) -> dict[str, tuple[Callable[[], nn.Module], Examples, int]]:
    """Of each kind of network that the book trains: how it is made, data for it, and examples a step."""
    texts = torch.randint(0, 64, (256, 48), generator=generator(0)).to(device())
    return {
        "fully connected": (partial(mlp, setup.sizes), data, setup.batch),
        "convolutional": (convolutional, data, setup.batch),
        "transformer": (partial(transformer_model, 64), Examples(texts, texts), 32),
    }


GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "convolution", "convolution_backward", "mkldnn_convolution",
                        "cudnn_convolution"),
    "optimiser": ("_fused_adam_",),
}  # fmt: skip


@contextmanager
def _unheard() -> Iterator[None]:
    """Without the lines that torch's profiler writes past Python, to the process's own standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def profiled(work: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds a call by kind of work: matrix products, the optimiser, all else on tensors, and what lies between.

    What lies between is the interpreter, autograd's bookkeeping and the start of each operation (on a GPU, only where
    it has nothing to do meanwhile). The median over rounds, each profiled alone; the profiler's own cost falls there.
    """
    seconds(work)
    gpu = device().type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    each: list[dict[str, float]] = []
    for _ in range(rounds):
        with _unheard(), profile(activities=activities) as seen:
            wall = seconds(work)
        found = dict.fromkeys([*GROUPS, "other tensor work"], 0.0)
        for event in seen.key_averages():
            own = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
            if not event.key.startswith("aten::"):
                continue
            name = event.key.removeprefix("aten::")
            found[next((group for group, names in GROUPS.items() if name in names), "other tensor work")] += own
        each.append(found | {"between": max(0.0, wall - sum(found.values()))})
    return {name: statistics.median(found[name] for found in each) for name in each[0]}


@dataclass(frozen=True)
class Stacked:
    """Time of training models of one shape, so many at once."""

    models: int
    seconds: float  #: A model: of the stack, over the number of its models; the best of the rounds.


def stack_runs(setup: Setup, count: int) -> list[Run]:
    """Runs that differ in their seed only, on one task."""
    tasks = partial(permuted_mnist, 1, setup.stack_images, 500, seed=0)
    network = partial(mlp, setup.stack_sizes)
    return [Run(tasks, consolidation.none(), network, Settings(1, 32), seed) for seed in range(count)]


def stacks(setup: Setup, rounds: int = 3) -> list[Stacked]:
    """Seconds a model of one epoch, by the number of models in the stack."""
    works = {str(m): partial(learn_stacked, stack_runs(setup, m)) for m in setup.stacks}
    times = interleaved(works, rounds)
    return [Stacked(m, min(times[str(m)]) / m) for m in setup.stacks]


def over_processes(runs: Sequence[Run], processes: int = 2, stack: int = 2) -> list[Outcome]:
    """A sweep on so many processes of this machine, through an executor; on a cluster only the executor differs."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as executor:
        return sweep(runs, executor, stack=stack)


@dataclass(frozen=True)
class Spread:
    """What the processes of one distributed run found."""

    beliefs: list[Diagonal]  #: Of each rank: its mean are the weights after the second task.
    examples: list[int]  #: Whose curvature each rank computed.
    allreduce: float  #: Seconds of one all-reduce of P numbers, median, on rank 0.
    seconds: float  #: Of the whole, with the start of the processes.


def spread(setup: scale_worker.Work, processes: int = 2) -> Spread:
    """Run `scale_worker` by torchrun on so many processes of this machine, each with one thread and its share."""
    root = str(Path(ewc_code.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    local = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    settings |= {"GLOO_SOCKET_IFNAME": local} if local else {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [*torchrun, "-m", "ewc_experiments.scale_worker", folder, setup.as_json()]
        for _ in range(2):  # a process that was aborted, not one that met an error, is begun once more
            done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode == 0 or "SIGABRT" not in done.stderr:
                break
        if done.returncode:
            raise RuntimeError(f"all {processes} processes must finish; one did not:\n{done.stderr[-3000:]}")
        model, about = scale_worker.network(setup), json.loads((Path(folder) / "about.json").read_text())
        files = [Path(folder) / f"rank{rank}.safetensors" for rank in range(processes)]
        beliefs = [belief for path in files if isinstance(belief := storage.load(path, model), Diagonal)]
    return Spread(beliefs, about["examples"], about["allreduce"], time.monotonic() - started)


def farthest(left: Diagonal, right: Diagonal) -> dict[str, float]:
    """Largest difference between two beliefs' means, and between their precisions, over the largest value there is."""
    found = {}
    for side in ("mean", "precision"):
        a, b = ({n: v.cpu() for n, v in getattr(belief, side).items()} for belief in (left, right))
        largest = max(value.abs().max().item() for value in b.values())
        found[side] = max((a[name] - b[name]).abs().max().item() for name in b) / largest
    return found


@dataclass(frozen=True)
class Hardware:
    """A machine in the cost table."""

    ceilings: Ceilings
    utilisation: float  #: Share of both ceilings that is assumed to be reached.
    memory: float  #: Bytes.

    def hours(self, operations: float, moved: float) -> float:
        """Hours for so many operations on so many bytes."""
        return self.ceilings.bound(operations, moved) / self.utilisation / 3600


@dataclass(frozen=True)
class Cost:
    """What the beliefs about one network cost, and what their curvature does."""

    network: Network
    width: int
    parameters: int
    memory: dict[str, float]  #: Bytes kept, by kind of belief.
    operations: dict[str, float]  #: Of all examples, by what is computed.
    moved: dict[str, float]  #: Bytes that this moves, at least.


WIDTHS = (64, 256, 512, 1024, 2048, 4096, 8192, 10240)


def costs(width: int, examples: int, context: int = 1024, vocabulary: int = 256) -> Cost:
    r"""One row of the table: a decoder of this width with a block for each 128 of it, P ~ 12 width^2 blocks.

    Curvature has one drawn label a position, and `examples` texts. Moved are the weights once an example and way, what
    goes into and comes out of every matrix, three times (forward, way back, squares or gradients), and by the diagonal
    the gradient of each text, a number a parameter that is written, read and squared into the sum; by the factors their
    sums, read and written for each text. Attention's scores are assumed never to reach memory.
    """
    network = transformer(width, max(1, width // 128), context, vocabulary)
    size = network.parameters
    whats: tuple[What, ...] = ("training", "diagonal", "kronecker")
    done = {str(what): float(examples * operations(network, what)) for what in whats}
    ways = FLOAT * size * examples
    through = FLOAT * examples * sum(s.count * s.positions * (s.inputs + s.outputs) for s in network.layers)
    moved = {name: times * ways + 3 * through for name, times in (("training", 3), ("diagonal", 6), ("kronecker", 2))}
    moved["kronecker"] += 2 * FLOAT * examples * (numbers(network, "kronecker") - size)
    kinds: tuple[Kind, ...] = ("diagonal", "kronecker", "full")
    kept = {str(kind): float(FLOAT * numbers(network, kind)) for kind in kinds}
    return Cost(network, width, size, kept, done, {name: float(value) for name, value in moved.items()})


@dataclass(frozen=True)
class Tried:
    """The table's smallest network, as it is."""

    texts: int
    seconds: float  #: Its diagonal Fisher from drawn labels; the best of three.
    counted: int  #: Operations of forward and backward of one text.
    predicted: int  #: The same by `operations`.


def first_row(row: Cost, texts: int, context: int = 1024, vocabulary: int = 256) -> Tried:
    """Make the network of a row that fits here, and look at what the table says of it."""
    model = transformer_model(vocabulary, context, row.width, heads=1, depth=max(1, row.width // 128)).to(device())
    tokens = torch.randint(0, vocabulary, (texts, context), generator=generator(0)).to(device())
    data = Examples(tokens, tokens)
    counts = counted(lambda: nll(model(tokens[:1]), tokens[:1]).backward())
    best = min(
        seconds(lambda: fisher.diagonal(model, data, "sampled", generator(0), batch_size=texts)) for _ in range(3)
    )
    return Tried(texts, best, counts, operations(row.network, "training"))


# Quoted, not measured: NVIDIA's data sheet, SXM, TF32 tensor cores without sparsity (half of the number with), HBM3.
H100 = Hardware(Ceilings("NVIDIA H100 SXM (data sheet)", 494.5e12, 3.35e12), utilisation=0.4, memory=80e9)


BYTES = {"ZB": 1e21, "EB": 1e18, "PB": 1e15, "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
HOURS = {"years": 24 * 365.25, "days": 24.0, "h": 1.0, "min": 1 / 60, "s": 1 / 3600, "ms": 1 / 3.6e6}


def in_units(value: float, units: Mapping[str, float]) -> str:
    """A positive value in the largest of the units that it has at least one of, else in the smallest."""
    name = next((name for name, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[name]:,.3g} {name}"


def memory_table(rows: Sequence[Cost]) -> str:
    """What the beliefs keep, as a Markdown table."""
    kinds = ("diagonal", "kronecker", "full")
    lines = ["| parameters | diagonal | Kronecker | full |", "|---|---|---|---|"]
    for row in rows:
        kept = " | ".join(in_units(row.memory[kind], BYTES) for kind in kinds)
        lines.append(f"| {row.parameters:.1e} | {kept} |")
    return "\n".join(lines)


def time_table(rows: Sequence[Cost], here: Hardware, device: Hardware = H100) -> str:
    """Operations of the curvature, and the time that they take here and on a larger device, as a Markdown table."""
    kinds = ("diagonal", "kronecker")
    lines = [
        "| parameters | diagonal, operations | here | H100 | Kronecker, operations | here | H100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        taken = {
            kind: [in_units(m.hours(row.operations[kind], row.moved[kind]), HOURS) for m in (here, device)]
            for kind in kinds
        }
        cells = " | ".join(f"{row.operations[kind]:.1e} | {' | '.join(taken[kind])}" for kind in kinds)
        lines.append(f"| {row.parameters:.1e} | {cells} |")
    return "\n".join(lines)


def data_for(setup: Setup) -> Examples:
    """Images of MNIST on the device, enough for the largest batch."""
    return load("MNIST").train[: max(setup.images, 2 * max(setup.batches))]


def fishers(setup: Setup, data: Examples) -> dict[str, Callable[[], Any]]:
    """Works to be timed: a plain pass, Fishers in closed form, and ten backward passes as a reader would write them."""
    model = mlp(setup.sizes).to(device())
    part = data[: setup.images]
    batches = [part[i : i + 500] for i in range(0, len(part), 500)]

    def plain() -> None:
        for batch in batches:
            model.zero_grad()
            nll(model(batch.x), batch.y).backward()

    def backwards() -> None:
        for batch in batches:
            log_probs = model(batch.x).log_softmax(1)
            for c in range(log_probs.shape[1]):
                model.zero_grad()
                log_probs[:, c].mean().backward(retain_graph=True)

    return {
        "forward and backward": plain,
        "one backward a class": backwards,
        "exact diagonal": partial(fisher.diagonal, model, part, batch_size=500),
        "one drawn label": partial(fisher.diagonal, model, part, "sampled", generator(0), 500),
        "KFAC, exact": partial(fisher.kronecker, model, part, batch_size=500),
    }


def per_example(model: nn.Module, data: Examples, chunk: int = 64) -> dict[str, Tensor]:
    """The exact diagonal from gradients of single examples, class by class: the plain way, for comparison."""
    total = {name: torch.zeros_like(p) for name, p in snapshot(model).items()}
    for start in range(0, len(data), chunk):
        batch = data[start : start + chunk]
        with torch.no_grad():
            probs = model(batch.x).softmax(1)
        for c in range(probs.shape[1]):
            found = fisher.scores(model, batch.x, torch.full_like(batch.y, c))
            for name, s in found.items():
                total[name] += torch.einsum("b,b...->...", probs[:, c], s.square()) / len(data)
    return total


def alone(setup: scale_worker.Work) -> Diagonal:
    """The same work as `spread`'s, on one process."""
    return scale_worker.work(setup)[0]
