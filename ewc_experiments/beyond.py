r"""The experiments of the chapter "Beyond the diagonal": settings, and functions of them.

directions   how much an old task's loss rises along a direction, against what each belief says
importances  what SI, MAS and RWalk find on a trained network, against the Fisher
merging      how far one Kronecker product is from the sum over the tasks
sequences    permuted tasks with each method: against the strength on validation data, and at the best on test data
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_code import consolidation, fisher, importance, metrics, storage
from ewc_code.consolidation import Method
from ewc_code.data import Examples, load
from ewc_code.environment import device, generator
from ewc_code.fisher import Factors
from ewc_code.gaussian import Belief, Diagonal, Full, Kronecker, nearest_kronecker
from ewc_code.importance import Path
from ewc_code.models import Params, flatten, mlp, nll, restore, snapshot, unflatten
from ewc_code.sweep import Run, sweep
from ewc_code.tasks import permuted_mnist
from ewc_code.training import Record, Settings, accuracy, fit, learn
from ewc_experiments.workers import Pool, one_thread, workers


@dataclass(frozen=True)
class Directions:
    """A network small enough for the whole Fisher, on images pooled to 7 × 7."""

    sizes: tuple[int, ...] = (49, 16, 12, 10)  #: Of the network.
    train_limit: int = 2000  #: Images of each of the two tasks.
    examples: int = 600  #: Images that the Fisher and the losses are taken from.
    settings: Settings = Settings(epochs=12, batch_size=50, learning_rate=1e-2)  #: Of the training.
    damping: float = 1e-3  #: Of SI.
    #: What the whole Fisher says that a step costs, nats, on average over the directions of a kind: sets their length.
    rise: float = 0.01
    random: int = 40  #: Random directions.
    strength: float = 10.0  #: Of the penalty, where the second task is learned under one.


DIRECTIONS = {
    "smoke": Directions((49, 8, 10), 1000, 500, Settings(epochs=8, batch_size=50, learning_rate=1e-2), strength=10.0),
    "laptop": Directions(),
    "paper": Directions((49, 24, 16, 10), 10_000, 4000),
}


@dataclass
class Rises:
    """How an old task's loss rises, nats, and what each belief says of it."""

    accuracy: float  #: On the old task's held-out images, before anything moved.
    parameters: int
    true: dict[str, list[float]]  #: By direction, a number a step: the mean of a step and its opposite.
    predicted: dict[str, dict[str, list[float]]]  #: By belief, then direction.
    #: By the belief under which the second task was learned: its accuracy, the true rise of the old loss, what that
    #: belief said, and what the whole Fisher said.
    learned: dict[str, tuple[float, float, float, float]]


def pooled(part: Examples) -> Examples:
    """28 × 28 images averaged over squares of 4 × 4 pixels: 7 × 7, float64, on the CPU."""
    return Examples(F.avg_pool2d(part.x.view(-1, 1, 28, 28), 4).flatten(1).cpu().double(), part.y.cpu())


def directions(setup: Directions) -> Rises:
    """Train on pooled digits, then step away: at random, in the worst direction, and as a permuted task pulls."""
    mnist = load("MNIST")
    first = pooled(mnist.train[: setup.train_limit])
    order = torch.randperm(first.x.shape[1], generator=generator(1))
    second = Examples(first.x[:, order], first.y)
    model = mlp(setup.sizes, seed=0).double()
    path = Path.begin(model, tracked=True)
    fit(model, first, _flat(model), 0.0, setup.settings, generator(0), work=path.work)
    mode, some = snapshot(model), first[: setup.examples]
    found = beliefs(model, some, path, setup.damping)
    whole = found["full"]
    assert isinstance(whole, Full)

    along = {"random": [_noise(flatten(mode), seed) for seed in range(setup.random)]}
    along["worst"] = [torch.linalg.eigh(whole.precision).eigenvectors[:, -1]]
    pull = torch.autograd.grad(nll(model(second.x), second.y), list(model.parameters()))
    along["pull of the next task"] = [torch.cat([g.reshape(-1) for g in pull])]

    learned: dict[str, tuple[float, float, float, float]] = {}
    for name in ("flat", "diagonal", "Kronecker", "full"):
        belief = found.get(name, _flat(model))
        restore(model, mode)
        strength = setup.strength * len(second) if name in found else 0.0
        fit(model, second, belief, strength, setup.settings, generator(1))
        there, learned_well = snapshot(model), accuracy(model, second)
        along[f"way under {name}"] = [flatten(there) - flatten(mode)]
        rise = _loss(model, there, some) - _loss(model, mode, some)
        learned[name] = (learned_well, rise, belief.energy(there).item(), whole.energy(there).item())
        restore(model, mode)
    before, centre = _loss(model, mode, some), flatten(mode)
    true: dict[str, list[float]] = {name: [] for name in along}
    predicted: dict[str, dict[str, list[float]]] = {name: {way: [] for way in along} for name in found}
    for name, ways in along.items():
        unit = [way / way.norm() for way in ways]
        says = [whole.energy(unflatten(centre + way, mode)).item() for way in unit]
        length = (setup.rise * len(unit) / sum(says)) ** 0.5
        for way in unit:
            sides = [unflatten(centre + sign * length * way, mode) for sign in (1, -1)]
            true[name].append(sum(_loss(model, side, some) for side in sides) / 2 - before)
            for belief_name, belief in found.items():
                predicted[belief_name][name].append(belief.energy(sides[0]).item())
    restore(model, mode)
    return Rises(accuracy(model, pooled(mnist.test)), len(centre), true, predicted, learned)


def beliefs(model: nn.Module, data: Examples, path: Path, damping: float) -> dict[str, Belief]:
    """What each method believes per example, at the model's parameters, with the mean Fisher as precision.

    SI, MAS and RWalk, which have units of their own, are scaled to the Fisher's trace: the strength would do that.
    """
    mode, whole = snapshot(model), fisher.full(model, data)
    information = fisher.diagonal(model, data)
    others = {
        "SI": importance.along_path(path, mode, damping),
        "MAS": importance.sensitivity(model, data),
        "RWalk": importance.walk(information, path, mode),
    }
    size = fisher.trace(information)
    scaled = {n: {k: v * (size / fisher.trace(found)) for k, v in found.items()} for n, found in others.items()}
    return {
        "full": Full(mode, whole),
        "layers": Full(mode, whole * same_layer(mode)),
        "Kronecker": Kronecker.isotropic(mode).moved(mode, fisher.kronecker(model, data)),
        "diagonal": Diagonal(mode, information),
        **{name: Diagonal(mode, found) for name, found in scaled.items()},
    }


def same_layer(params: Params) -> Float[Tensor, "p p"]:
    """1 where two parameters belong to one layer, else 0; in the order of `models.flatten`."""
    names = [name.rpartition(".")[0] for name, value in params.items() for _ in range(value.numel())]
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    like = flatten(params)
    number = torch.tensor([index[name] for name in names], device=like.device)
    return (number[:, None] == number).to(like.dtype)


def _flat(model: nn.Module) -> Diagonal:
    return Diagonal.isotropic(snapshot(model))


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=generator(1000 + seed), dtype=like.dtype)


def _loss(model: nn.Module, params: Params, data: Examples) -> float:
    restore(model, params)
    with torch.no_grad():
        return nll(model(data.x), data.y).item()


@dataclass(frozen=True)
class Training:
    """One way to train on one task."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Importances:
    """One task, learned in several ways, with the work along each."""

    sizes: tuple[int, ...] = (784, 50, 50, 10)  #: Of the network.
    train_limit: int = 2000  #: Images.
    examples: int = 1000  #: Images that Fisher and MAS are taken from.
    ways: tuple[Training, ...] = (
        Training("Adam", Settings(epochs=4)),
        Training("SGD", Settings(epochs=4, learning_rate=0.1, optimiser="sgd")),
        Training("Adam, whole batches", Settings(epochs=40, batch_size=2000)),
    )
    damping: float = 1e-3  #: Of SI, squared units of the parameters.
    seeds: tuple[int, ...] = (0, 1, 2)


IMPORTANCES = {
    "smoke": Importances(
        (784, 20, 10), 1000, 300,
        (
            Training("Adam", Settings(epochs=4, batch_size=50)),
            Training("SGD", Settings(epochs=4, batch_size=50, learning_rate=0.1, optimiser="sgd")),
            Training("Adam, whole batches", Settings(epochs=30, batch_size=1000)),
        ),
        seeds=(0, 1),
    ),
    "laptop": Importances(),
    "paper": Importances(
        (784, 200, 200, 10), 20_000, 4000,
        (
            Training("Adam", Settings(epochs=5, learning_rate=1e-3)),
            Training("SGD", Settings(epochs=5, learning_rate=0.1, optimiser="sgd")),
            Training("Adam, whole batches", Settings(epochs=60, batch_size=20_000)),
        ),
        seeds=(0, 1, 2, 3, 4),
    ),
}  # fmt: skip


@dataclass
class Alike:
    """How an importance compares with the Fisher, seen as vectors over all parameters; a number a seed."""

    rank: list[float] = field(default_factory=list)  #: Spearman's correlation with the Fisher: of the order alone.
    cosine: list[float] = field(default_factory=list)  #: With the Fisher.
    cosine_root: list[float] = field(default_factory=list)  #: With the Fisher's square root.
    power: list[float] = field(default_factory=list)  #: Slope of log importance over log Fisher: 1 Fisher, 1/2 root.


@dataclass
class Found:
    """Importances after one task."""

    alike: dict[str, dict[str, Alike]]  #: By training, then importance.
    #: By training: sum of the work over the fall of the loss, with the gradient of the batch that made the step, and
    #: with that of another batch; a number a seed.
    shares: dict[str, dict[str, list[float]]]
    #: Log10 of the Fisher and of each importance, first seed, of up to 2,000 parameters of which both are above zero.
    points: dict[str, tuple[list[float], list[float]]]


def importances(setup: Importances) -> Found:
    """Train, add up the work along the way, and compare what each method finds with the Fisher."""
    train = load("MNIST", device()).train[: setup.train_limit]
    found = Found({way.name: {} for way in setup.ways}, {way.name: {} for way in setup.ways}, {})
    for way in setup.ways:
        for seed in setup.seeds:
            model = mlp(setup.sizes, seed).to(train.x.device)
            path, watch = Path.begin(model, tracked=True), _Watch(model, train, way.settings.batch_size, seed)
            start = _loss(model, path.start, train)
            fit(model, train, _flat(model), 0.0, way.settings, generator(seed), watch, work=path.work)
            mode, some = snapshot(model), train[: setup.examples]
            fall = start - _loss(model, mode, train)
            for name, work in (("same batch", path.work or {}), ("another batch", watch.work)):
                share = flatten(work).cpu().double().sum().item() / fall
                found.shares[way.name].setdefault(name, []).append(share)
            information = fisher.diagonal(model, some)
            each = {"SI": importance.along_path(path, mode, setup.damping)}
            each["SI, another batch"] = importance.along_path(replace(path, work=watch.work), mode, setup.damping)
            each["MAS"] = importance.sensitivity(model, some)
            each["MAS, batches"] = batch_sensitivity(model, some, 100)
            each["RWalk"] = importance.walk(information, path, mode)
            for name, value in each.items():
                pair = _compare(found.alike[way.name].setdefault(name, Alike()), value, information)
                if seed == setup.seeds[0]:
                    found.points[f"{name}, {way.name}"] = pair
    return found


def batch_sensitivity(model: nn.Module, data: Examples, batch_size: int) -> Params:
    """What MAS becomes when the absolute value is taken of a batch's mean gradient: examples cancel each other."""
    total = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    parts = data.x.split(batch_size)
    for x in parts:
        own = dict(model.named_parameters())
        gradients = torch.autograd.grad(model(x).square().sum(1).mean(), [own[name] for name in total])
        for name, g in zip(total, gradients, strict=True):
            total[name] += g.abs() / len(parts)
    return total


class _Watch:
    """Called after every step: adds up the work with the gradient of another batch than the one that made the step."""

    def __init__(self, model: nn.Module, data: Examples, batch_size: int, seed: int) -> None:
        self.model, self.data, self.size = model, data, min(batch_size, len(data))
        self.draw, self.work = generator(5000 + seed), Path.begin(model, tracked=True).work or {}
        self.before, self.gradients = snapshot(model), dict.fromkeys(self.work, torch.zeros(()))

    def __call__(self, step: int, steps: int) -> None:
        now = snapshot(self.model)
        for name, g in self.gradients.items():  # zero at the first call, which is before the first step
            self.work[name] -= g.to(now[name]) * (now[name] - self.before[name])
        index = torch.randint(len(self.data), (self.size,), generator=self.draw).to(self.data.x.device)
        loss = nll(self.model(self.data.x[index]), self.data.y[index])
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        self.before, self.gradients = now, dict(zip(now, found, strict=True))


def _compare(into: Alike, value: Params, information: Params) -> tuple[list[float], list[float]]:
    left, right = flatten(value).cpu().double(), flatten(information).cpu().double()
    into.rank.append(float(spearmanr(left, right)[0]))
    into.cosine.append(metrics.cosine(value, information))
    into.cosine_root.append(metrics.cosine(value, {n: v.sqrt() for n, v in information.items()}))
    both = ((left > 0) & (right > 1e-9 * right.max())).nonzero()[:, 0]
    x, y = right[both].log10(), left[both].log10()
    into.power.append((((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item())
    some = torch.randperm(len(both), generator=generator(0))[:2000]
    return x[some].tolist(), y[some].tolist()


#: Strengths to choose from, by method; each has units of its own.
LADDERS: dict[str, tuple[float, ...]] = {
    "EWC": (3.0, 10.0, 30.0, 100.0),
    "Kronecker": (0.3, 1.0, 3.0, 10.0),
    "SI": (0.03, 0.1, 0.3, 1.0),
    "MAS": (0.01, 0.03, 0.1, 0.3),
    "RWalk": (0.1, 0.3, 1.0, 3.0),
}
APART = "Kronecker, a term a task"


@dataclass(frozen=True)
class Sequences:
    """Permuted tasks, learned with every method."""

    sizes: tuple[int, ...] = (784, 50, 50, 10)  #: Of the network.
    train_limit: int = 1200  #: Images a task.
    held_limit: int = 500  #: Validation and test images a task.
    settings: Settings = Settings(epochs=3, batch_size=120)  #: Of the training on each task.
    examples: int = 500  #: Images that Fisher and MAS are taken from.
    counts: tuple[int, ...] = (10, 20)  #: Numbers of tasks.
    seeds: tuple[int, ...] = (0, 1, 2, 3)  #: Of the reported runs, with permutations of their own.
    choosing: tuple[int, ...] = (100,)  #: Of the runs that choose the strengths.
    damping: float = 1e-3  #: Of SI.
    ladders: Mapping[str, tuple[float, ...]] = field(default_factory=LADDERS.copy)  #: Strengths to choose from.

    @property
    def small(self) -> bool:
        """Whether the networks are too small for two threads to share a step."""
        return max(self.sizes[1:-1]) <= 100


SEQUENCES = {
    "smoke": Sequences(
        (784, 20, 10), 500, 300, Settings(epochs=2, batch_size=50), 200, (3, 5), (0, 1, 2),
        ladders={name: (values[1], values[3]) for name, values in LADDERS.items()},
    ),
    "laptop": Sequences(),
    "paper": Sequences((784, 100, 100, 10), 60_000, 10_000, Settings(epochs=5), 4000, (10, 20, 50), tuple(range(5))),
}  # fmt: skip
#: Fifty tasks as two cores learn them in half an hour: fewer images a task than at paper scale, and two methods.
FIFTY = replace(
    SEQUENCES["paper"], train_limit=10_000, held_limit=2_000, examples=1000,
    ladders={"EWC": (0.3, 1.0, *LADDERS["EWC"]), "Kronecker": LADDERS["Kronecker"]},
)  # fmt: skip


@dataclass
class Sequenced:
    """Average accuracies over all tasks."""

    strengths: dict[str, list[float]]  #: Those tried, by method.
    validation: dict[str, dict[int, list[float]]]  #: By method and number of tasks, a number a strength.
    chosen: dict[str, dict[int, float]]  #: The best strength, by method and number of tasks.
    records: dict[str, dict[int, list[Record]]]  #: At that strength, on test data, one a seed; also "plain".

    def averages(self, method: str, count: int) -> list[float]:
        """Test accuracy averaged over all tasks after the last one, a number a seed."""
        return [sum(record.accuracy[-1]) / count for record in self.records[method][count]]

    def at_edge(self, method: str, count: int) -> bool:
        """Whether the chosen strength is the smallest or largest that was tried."""
        return self.chosen[method][count] in (self.strengths[method][0], self.strengths[method][-1])


def methods(setup: Sequences) -> dict[str, Callable[[float], Method]]:
    """By name, from a strength to the method; those whose strength is chosen."""
    some = setup.examples
    return {
        "EWC": partial(consolidation.ewc, examples=some),
        "Kronecker": partial(consolidation.kronecker, examples=some),
        "SI": partial(consolidation.si, damping=setup.damping),
        "MAS": partial(consolidation.mas, examples=some),
        "RWalk": partial(consolidation.rwalk, examples=some),
    }


def sequences(
    setup: Sequences, progress: Callable[[str], None] = lambda _: None, folder: str | None = None
) -> Sequenced:
    """Choose every strength on validation data and seeds of their own, then learn on fresh seeds and look at the test.

    The longest sequence is learned once for each strength while choosing; how well it did after each number of tasks
    chooses for that number. A term a task, whose cost grows with the tasks, is learned at the strength of the merged
    one, for the smallest number of tasks and two seeds.

    Args:
        folder: As for `sweep.sweep`; with it, each run is kept as soon as it is finished.
    """
    makers = {name: make for name, make in methods(setup).items() if name in setup.ladders}
    done = Sequenced({name: list(setup.ladders[name]) for name in makers}, {}, {}, {})
    with workers(setup.small) as pool:
        waiting = {}
        for name in _longest_first(makers):
            lots = [(makers[name](strength), seed) for strength in setup.ladders[name] for seed in setup.choosing]
            waiting[name] = _learned(pool, setup, lots, max(setup.counts), "validation", folder)
        for name in makers:
            tried, records = done.strengths[name], waiting[name]()
            done.validation[name], done.chosen[name] = {}, {}
            for count in setup.counts:
                reached = [0.0 if r is None else sum(r.accuracy[count - 1][:count]) / count for r in records]
                means = torch.tensor(reached).view(len(tried), -1).mean(1)  # a run that diverged had none right
                done.validation[name][count] = means.tolist()
                done.chosen[name][count] = tried[int(means.argmax())]
            progress(f"{name}: strengths {', '.join(f'{v:g}' for v in done.chosen[name].values())} chosen")
        done.records |= _reported(pool, setup, {"plain": lambda _: consolidation.none(), **makers}, done.chosen, folder)
    progress(f"{len(done.records)} methods: done")
    return done


def stored(found: Sequenced) -> dict[str, Any]:
    """What a recording keeps, for JSON: all but the accuracies before the last task."""
    last = {
        name: {count: [Record(r.names, r.accuracy[-1:]) for r in records] for count, records in by_count.items()}
        for name, by_count in found.records.items()
    }
    return asdict(replace(found, records=last))


def restored(kept: Mapping[str, Any]) -> Sequenced:
    """The inverse of `stored`; in JSON numbers of tasks have become text."""
    by_count = lambda table: {name: {int(n): value for n, value in row.items()} for name, row in table.items()}  # noqa: E731
    records = {
        name: {count: [Record(**record) for record in each] for count, each in row.items()}
        for name, row in by_count(kept["records"]).items()
    }
    return Sequenced(kept["strengths"], by_count(kept["validation"]), by_count(kept["chosen"]), records)


def _reported(
    pool: Pool,
    setup: Sequences,
    makers: Mapping[str, Callable[[float], Method]],
    chosen: Mapping[str, Mapping[int, float]],
    folder: str | None,
) -> dict[str, dict[int, list[Record]]]:
    """Records by method and number of tasks, one a seed, on test data."""
    fewest = min(setup.counts)
    apart = consolidation.kronecker(chosen["Kronecker"][fewest], examples=setup.examples, merged=False)
    lots = [(apart, seed) for seed in setup.seeds[:2]]
    asked: dict[tuple[str, tuple[int, ...]], Callable[[], list[Record | None]]] = {}
    asked[APART, (fewest,)] = _learned(pool, setup, lots, fewest, "test", folder)
    for name in _longest_first(makers):
        best = chosen.get(name, dict.fromkeys(setup.counts, 0.0))
        for strength in dict.fromkeys(best.values()):
            # A longer sequence begins as a shorter one of the same seed does.
            counts = tuple(count for count in setup.counts if best[count] == strength)
            lots = [(makers[name](strength), seed) for seed in setup.seeds]
            asked[name, counts] = _learned(pool, setup, lots, max(counts), "test", folder)
    found: dict[str, dict[int, list[Record]]] = {name: {} for name in (*makers, APART)}
    for (name, counts), result in asked.items():
        ended = result()
        records = [record for record in ended if record]
        if len(records) < len(ended):
            raise FloatingPointError(f"every reported run must stay finite; one of {name} did not.")
        found[name] |= {count: [_first(count, record) for record in records] for count in counts}
    return found


def _longest_first(names: Iterable[str]) -> list[str]:
    """Where several are learned at the same time, the one that takes longest should not be the last to begin."""
    return sorted(names, key=lambda name: name != "Kronecker")


def _first(count: int, record: Record) -> Record:
    """What was known after the first so many tasks."""
    return Record(record.names[:count], [row[:count] for row in record.accuracy[:count]])


def _learned(
    pool: Pool,
    setup: Sequences,
    lots: Sequence[tuple[Method, int]],
    count: int,
    on: Literal["test", "validation"],
    folder: str | None,
) -> Callable[[], list[Record | None]]:
    """A record for each method and seed, after so many tasks: one piece of work, or one each where they are kept."""
    runs = []
    for method, seed in lots:
        tasks = partial(permuted_mnist, count, setup.train_limit, setup.held_limit, seed=seed)
        runs.append(Run(tasks, method, partial(mlp, setup.sizes), setup.settings, seed, evaluate_on=on))
    waiting = [pool(_swept, part, setup.small, folder) for part in ([[run] for run in runs] if folder else [runs])]
    return lambda: [record for result in waiting for record in result()]


def _swept(runs: Sequence[Run], small: bool, folder: str | None) -> list[Record | None]:
    with one_thread(small):
        return [outcome.record for outcome in sweep(runs, folder=folder)]


@dataclass(frozen=True)
class Cost:
    """What a method costs, in this build."""

    step: float  #: Seconds of a training step under its belief.
    update: float  #: Seconds to make the next belief.
    numbers: tuple[int, int]  #: Numbers kept after one task, and after two.


def costs(setup: Sequences, repeats: int = 3) -> dict[str, Cost]:
    """Time each method on two permuted tasks, medians over the repeats; strengths do not change the work."""
    makers = {"plain": lambda _: consolidation.none(), "L2": consolidation.l2, **methods(setup)}
    makers[APART] = partial(consolidation.kronecker, examples=setup.examples, merged=False)
    tasks, found = permuted_mnist(2, setup.train_limit, setup.held_limit), {}
    trains = [task.train for task in tasks]
    steps = setup.settings.epochs * math.ceil(len(trains[0]) / setup.settings.batch_size)
    for name, make in makers.items():
        method = make(1e-3)
        spent: tuple[list[float], list[float]] = [], []
        for _ in range(repeats):
            model = mlp(setup.sizes, 0).to(device())
            belief, kept = method.prior(snapshot(model)), []
            for train in trains:
                path, begun = method.path(model), time.perf_counter()
                fit(model, train, belief, method.strength, setup.settings, generator(0), work=path.work)
                between = time.perf_counter()
                belief = method.consolidate(model, train, belief, path)
                _wait()
                kept.append(storage.numbers(belief))
            spent[0].append((between - begun) / steps)
            spent[1].append(time.perf_counter() - between)
        found[name] = Cost(statistics.median(spent[0]), statistics.median(spent[1]), (kept[0], kept[1]))
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Merged:
    """Distances of one Kronecker product from the sum of the tasks' products, as shares of the sum's Frobenius norm."""

    sizes: dict[str, tuple[int, int]]  #: Rows of the two factors, by layer.
    distances: dict[str, dict[str, list[float]]]  #: By rule, then layer; after two tasks, three, and so on.
    cosines: dict[str, dict[str, float]]  #: Mean over pairs of tasks, by side of the product, then layer.


def merging(setup: Sequences, strength: float, seed: int = 0) -> Merged:
    """Learn a sequence under Kronecker factors, and merge the tasks' products by each rule, as the tasks come."""
    count = min(setup.counts)
    tasks = permuted_mnist(count, setup.train_limit, setup.held_limit, seed=seed)
    model, kept = mlp(setup.sizes, seed).to(device()), list[dict[str, Factors]]()
    method = consolidation.kronecker(strength, examples=setup.examples)

    def keep(number: int, _: Belief) -> None:
        kept.append(fisher.kronecker(model, tasks[number - 1].train[: setup.examples]))

    learn(model, tasks, method, setup.settings, seed, keep=keep)
    done = Merged({}, {rule: {} for rule in RULES}, {"inputs": {}, "outputs": {}})
    for layer, first in kept[0].items():
        done.sizes[layer] = (len(first.outputs), len(first.inputs))
        for side, cosines in done.cosines.items():
            flat = torch.stack([getattr(found[layer], side).flatten() for found in kept]).cpu().double()
            flat = flat / flat.norm(dim=1, keepdim=True)
            cosines[layer] = ((flat @ flat.T).sum().item() - count) / (count * (count - 1))
        running = dict.fromkeys(RULES, first)
        for number in range(2, count + 1):
            seen = [found[layer] for found in kept[:number]]
            for rule, merge in RULES.items():
                running[rule] = merge(seen) if rule == "nearest" else merge((running[rule], seen[-1]))
                done.distances[rule].setdefault(layer, []).append(distance(seen, running[rule]))
    return done


def sum_of_factors(terms: Sequence[Factors]) -> Factors:
    """The sum of the left factors with the sum of the right ones: counts every pair of two terms as well."""
    return Factors(sum_(terms, "inputs"), sum_(terms, "outputs"))


def sum_by_traces(terms: Sequence[Factors]) -> Factors:
    r"""Two terms by their factors' sums, weighted so that the pairs that should not be there have the least trace.

    (G_1 + pi G_2) (x) (A_1 + A_2 / pi),   pi^2 = tr G_1 tr A_2 / (tr G_2 tr A_1)
    """
    one, two = terms
    traces = [[part.trace() for part in (term.outputs, term.inputs)] for term in terms]
    pi = (traces[0][0] * traces[1][1] / (traces[1][0] * traces[0][1])).sqrt()
    return Factors(one.inputs + two.inputs / pi, one.outputs + pi * two.outputs)


def sum_(terms: Sequence[Factors], side: str) -> Tensor:
    """Of one factor over the terms."""
    return torch.stack([getattr(term, side) for term in terms]).sum(0)


def distance(terms: Sequence[Factors], merged: Factors) -> float:
    """Frobenius norm of the sum of the terms minus `merged`, as a share of the sum's; no product is written out."""
    everything = [*terms, merged]
    signs = torch.tensor([1.0] * len(terms) + [-1.0], dtype=torch.float64)
    inner = torch.ones(len(everything), len(everything), dtype=torch.float64)
    for side in ("inputs", "outputs"):
        flat = torch.stack([getattr(term, side).flatten() for term in everything]).cpu().double()
        inner = inner * (flat @ flat.T)
    whole = inner[:-1, :-1].sum()
    return math.sqrt(max((signs @ inner @ signs / whole).item(), 0.0))


RULES: dict[str, Callable[[Sequence[Factors]], Factors]] = {
    "nearest": nearest_kronecker,
    "nearest, one at a time": nearest_kronecker,
    "sums weighted by traces": sum_by_traces,
    "sums of factors": sum_of_factors,
}
