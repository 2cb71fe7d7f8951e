r"""The experiments of the book: each a frozen dataclass of settings, and a pure function from settings to results.

Every experiment has settings for the three scales (`SCALED[scale]`). Strengths are chosen by validation accuracy, on
seeds of their own, before any test example is looked at (`choose`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ewc_code import consolidation, fisher, variants
from ewc_code.consolidation import Method
from ewc_code.data import Examples, load
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal
from ewc_code.models import Params, mlp, relu_logits_mlp, restore, snapshot
from ewc_code.tasks import Task, limited, mnist_then_fashion, rotated
from ewc_code.training import Record, Settings, accuracy, fit, learn

Network = Callable[[tuple[int, ...], int], nn.Module]

SMOKE = Settings(epochs=3, batch_size=50)
LADDER = (1.0, 100.0, 300.0, 1000.0, 3000.0)
L2_LADDER = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Comparison:
    """Plain training, L2 and EWC on one sequence of tasks."""

    sizes: tuple[int, ...] = (784, 200, 200, 10)  #: Of the network.
    train_limit: int | None = 8_000  #: Training examples a task, at most; None for all.
    settings: Settings = Settings()  #: Of the training on each task.
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  #: Of the reported runs: initial weights, order of examples.
    choosing: tuple[int, ...] = (100, 101)  #: Seeds of the runs that choose the strengths; none of `seeds`.
    ewc: tuple[float, ...] = LADDER  #: Strengths to choose from.
    l2: tuple[float, ...] = L2_LADDER  #: Strengths to choose from.
    tasks: int = 2  #: Number of tasks, for permuted MNIST.
    curve_points: int = 8  #: Looks at the test accuracy within a task.

    def __post_init__(self) -> None:
        if both := set(self.seeds) & set(self.choosing):
            raise ValueError(f"seeds that choose must not be reported; both hold {both}.")


PAPER = Comparison(train_limit=None, settings=Settings(epochs=10), seeds=tuple(range(10)))
LONG = replace(PAPER, settings=Settings(epochs=5), curve_points=0)

MNIST_THEN_FASHION = {
    "smoke": Comparison(
        sizes=(784, 32, 10), train_limit=2000, settings=SMOKE, seeds=(0, 1, 2, 3), choosing=(100,),
        ewc=(100.0, 1000.0), l2=(0.01, 0.1), curve_points=4,
    ),
    "laptop": Comparison(),
    "paper": replace(PAPER, sizes=(784, 400, 400, 400, 10)),
}  # fmt: skip

PERMUTED = {
    "smoke": replace(MNIST_THEN_FASHION["smoke"], tasks=3),
    "laptop": Comparison(
        sizes=(784, 100, 100, 10), choosing=(100,), tasks=3, curve_points=6,
        ewc=(10.0, 100.0, 1000.0), l2=(0.003, 0.01, 0.03),
    ),
    "paper": replace(PAPER, sizes=(784, 400, 400, 10), tasks=3, l2=(*L2_LADDER, 1.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """A strength and the validation accuracies that chose it."""

    method: str  #: Name.
    strengths: list[float]  #: Those tried.
    #: Accuracy on each task after the last one, mean over the choosing seeds, (strengths, tasks).
    validation: list[list[float]]
    best: float  #: The strength with the highest average over the tasks.

    @property
    def at_edge(self) -> bool:
        """Whether the best is the smallest or largest that was tried: then a better one may lie outside."""
        return self.best in (min(self.strengths), max(self.strengths))


@dataclass
class Compared:
    """Results of a comparison: what was chosen, and a `Record` a seed for each method."""

    setup: Comparison
    names: list[str]
    chosen: dict[str, Chosen]
    records: dict[str, list[Record]]

    def final(self, method: str, task: int) -> list[float]:
        """Test accuracy on one task after the last one, a number a seed."""
        return [record.accuracy[-1][task] for record in self.records[method]]

    def averages(self, method: str) -> list[float]:
        """Test accuracy averaged over all tasks after the last one, a number a seed."""
        return [sum(record.accuracy[-1]) / len(self.names) for record in self.records[method]]


def compare(
    setup: Comparison, tasks: Sequence[Task], network: Network = mlp, progress: Callable[[str], None] = lambda _: None
) -> Compared:
    """Choose each strength on validation data, then run every method on fresh seeds and look at the test data.

    `tasks` is the sequence, `network` maps (sizes, seed) -> model, `progress` is called with a line after each step.
    """
    chosen, methods = {}, [consolidation.none()]
    for name, family, strengths in (("EWC", consolidation.ewc, setup.ewc), ("L2", consolidation.l2, setup.l2)):
        chosen[name] = choose(name, family, strengths, setup, tasks, network)
        methods.append(family(chosen[name].best))
        progress(f"{name}: strength {chosen[name].best:g} chosen on validation data")
    records = report(setup, tasks, methods, network)
    progress(f"{len(methods)} methods, {len(setup.seeds)} seeds each: done")
    return Compared(setup, [task.name for task in tasks], chosen, records)


def choose(
    name: str,
    method: Callable[[float], Method],
    strengths: Sequence[float],
    setup: Comparison,
    tasks: Sequence[Task],
    network: Network = mlp,
) -> Chosen:
    """The strength with the best average validation accuracy after the last task, over the choosing seeds.

    All strengths of a seed go on from one fit of the first task, which they share because the prior is flat.
    """
    scores = torch.zeros(len(strengths), len(tasks))
    for seed in setup.choosing:
        model = network(setup.sizes, seed).to(device())
        go_on = partial(learn, model, tasks, settings=setup.settings, seed=seed, evaluate_on="validation")
        go_on(consolidation.none(), stop=1)
        mode = snapshot(model)
        belief = method(1.0).consolidate(model, tasks[0].train, method(1.0).prior(mode))
        for i, strength in enumerate(strengths):
            restore(model, mode)
            record = go_on(method(strength), start=1, belief=belief)
            scores[i] += torch.tensor(record.accuracy[-1]) / len(setup.choosing)
    best = int(scores.mean(1).argmax())
    return Chosen(name, list(strengths), scores.tolist(), strengths[best])


def report(
    setup: Comparison, tasks: Sequence[Task], methods: Sequence[Method], network: Network = mlp
) -> dict[str, list[Record]]:
    """Every method on the reported seeds, with curves, on the test data; a record a seed.

    The methods of one seed go on from one fit of the first task, which they share because the prior is flat.
    """
    records: dict[str, list[Record]] = {method.name: [] for method in methods}
    for seed in setup.seeds:
        model = network(setup.sizes, seed).to(device())
        common = (setup.settings, seed, setup.curve_points)
        first = learn(model, tasks, consolidation.none(), *common, stop=1)
        mode = snapshot(model)
        for method in methods:
            restore(model, mode)
            belief = method.consolidate(model, tasks[0].train, method.prior(mode))
            records[method.name].append(first + learn(model, tasks, method, *common, start=1, belief=belief))
    return records


def plain(setup: Comparison, tasks: Sequence[Task], network: Network = mlp) -> list[Record]:
    """The sequence without any protection, one record a seed."""
    return report(setup, tasks, [consolidation.none()], network)["plain"]


def joint(setup: Comparison, tasks: Sequence[Task], network: Network = mlp) -> list[list[float]]:
    """The ceiling: all tasks' examples at once, each seen as often as in the sequence; (seeds, tasks), test."""
    parts = [task.train for task in tasks]
    everything = Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    found = []
    for seed in setup.seeds:
        model = network(setup.sizes, seed).to(device())
        fit(model, everything, Diagonal.isotropic(snapshot(model)), 0.0, setup.settings, generator(seed))
        found.append([accuracy(model, task.test) for task in tasks])
    return found


@dataclass(frozen=True)
class Capacity:
    """Does a larger network forget less? Plain training, digits then clothes, two hidden layers of each width."""

    widths: tuple[int, ...] = (16, 64, 256)
    training: Comparison = Comparison(train_limit=6_000, seeds=(0, 1, 2), curve_points=0)


CAPACITY = {
    "smoke": Capacity((16, 64), Comparison(train_limit=2000, settings=SMOKE, seeds=(0, 1, 2), curve_points=0)),
    "laptop": Capacity(),
    "paper": Capacity((16, 64, 256, 1024, 2048), LONG),
}


def capacity(setup: Capacity) -> dict[int, list[Record]]:
    """Records by width, one a seed."""
    pair = mnist_then_fashion(setup.training.train_limit)
    return {width: plain(replace(setup.training, sizes=(784, width, width, 10)), pair) for width in setup.widths}


@dataclass(frozen=True)
class Similarity:
    """Does it matter how far the second task is from the first? MNIST, then MNIST turned by each angle, unprotected."""

    degrees: tuple[float, ...] = (15.0, 45.0, 90.0, 180.0)
    training: Comparison = Comparison((784, 100, 10), 6_000, seeds=(0, 1, 2), curve_points=0)


SIMILARITY = {
    "smoke": Similarity((15.0, 180.0), Comparison((784, 32, 10), 1000, SMOKE, (0, 1, 2), curve_points=0)),
    "laptop": Similarity(),
    "paper": Similarity(training=replace(LONG, sizes=(784, 400, 10))),
}


def similarity(setup: Similarity) -> dict[float, list[Record]]:
    """Records by angle, one a seed."""
    images = limited(load("MNIST"), setup.training.train_limit)
    return {angle: plain(setup.training, rotated(images, (0.0, angle))) for angle in setup.degrees}


@dataclass(frozen=True)
class Repairs:
    """The tutorial that this book grew from, repaired one thing at a time, on MNIST then Fashion-MNIST."""

    #: Network, data, training and seeds: those of the other curves, so that only the flaws differ.
    comparison: Comparison = Comparison()
    images: int = 200  #: Of the Fisher that is computed one image at a time.
    importance: float = 1000.0  #: The tutorial's factor of its penalty, which has no 1/2: strength = 2 importance.


def repairs(setup: Repairs) -> dict[str, list[Record]]:
    """Records by rung: as the tutorial had it, then with each repair on top of the ones before.

    The last repair, a strength from validation data, is what `compare` does.
    """
    pair = mnist_then_fashion(setup.comparison.train_limit)
    strength, images = 2 * setup.importance, setup.images
    # The tutorial goes image by image, which gives the same mean.
    argmax = lambda model, part: variants.argmax(model, part[:images])  # noqa: E731
    flawed = [_with_estimate("as in the tutorial", argmax, strength)]
    mended = [
        _with_estimate("no ReLU on the logits", argmax, strength),
        _with_estimate("Fisher over all classes", lambda model, part: fisher.diagonal(model, part[:images]), strength),
        replace(consolidation.ewc(strength), name="Fisher over all images"),
    ]
    short = replace(setup.comparison, curve_points=0)  # only the flawed run is drawn as curves
    return report(setup.comparison, pair, flawed, relu_logits_mlp) | report(short, pair, mended)


@dataclass(frozen=True)
class Wild:
    """What other estimates of the Fisher do to EWC, on MNIST then Fashion-MNIST."""

    #: Network, data, training and seeds; long enough to fit, because that is where the estimates part.
    comparison: Comparison = Comparison((784, 100, 10), 2500, Settings(epochs=6), (0, 1, 2, 3), (100,), curve_points=0)
    #: Strengths to try, each divided by the estimate's trace as a share of the exact one: so every estimate is offered
    #: the same choice, in its own units.
    relative: tuple[float, ...] = (30.0, 100.0, 300.0, 1000.0)
    batch_size: int = 128  #: Of the estimates that square a batch's mean gradient.
    images: int = 500  #: Of the estimates that go example by example.
    few: int = 100  #: Images of the exact Fisher from few images.


WILD = {
    "smoke": Wild(
        Comparison((784, 32, 10), 800, SMOKE, (0, 1, 2), (100,), curve_points=0), (100.0, 1000.0), 64, 200, 50
    ),
    "laptop": Wild(),
    "paper": Wild(
        replace(PAPER, sizes=(784, 400, 400, 10), curve_points=0),
        relative=(10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0), images=10_000,
    ),
}  # fmt: skip


@dataclass
class Varied:
    """EWC with each estimate."""

    shares: dict[str, float]  #: Trace over the exact one's, on the choosing seeds.
    chosen: dict[str, Chosen]  #: Strengths tried there, and the best.
    #: Records with the strength that is best for the exact Fisher, one a seed; also 'plain', without penalty.
    common: dict[str, list[Record]]
    own: dict[str, list[Record]]  #: Records with each estimate's own best strength.


def estimates(setup: Wild) -> dict[str, Callable[[nn.Module, Examples], Params]]:
    """Ways to compute something like the Fisher's diagonal, by name; the exact one first."""
    size, of_batches, few = setup.batch_size, variants.squared_batch_gradient, setup.images
    return {
        "exact": fisher.diagonal,
        "exact, few images": lambda model, part: fisher.diagonal(model, part[: setup.few]),
        "labels sampled": lambda model, part: fisher.diagonal(model, part, "sampled", generator(0)),
        "labels sampled, B × square of batch": lambda model, part: _times(
            size, of_batches(model, variants.drawn(model, part, generator(0)), size)
        ),
        "labels of the data": lambda model, part: fisher.diagonal(model, part, "data"),
        "most likely label": variants.argmax,
        "data, weighted by p": lambda model, part: variants.weighted_by_probability(model, part[:few]),
        "data, square of batch": lambda model, part: of_batches(model, part, size),
        "indexed, not gathered": lambda model, part: variants.indexed_not_gathered(model, part[:few], size),
    }


def wild(setup: Wild, progress: Callable[[str], None] = lambda _: None) -> Varied:
    """Choose each estimate's strength on validation data and seeds of their own, then report on the test data."""
    common, found = setup.comparison, estimates(setup)
    pair = mnist_then_fashion(common.train_limit)
    traces = dict.fromkeys(found, 0.0)
    for seed in common.choosing:
        model = mlp(common.sizes, seed).to(device())
        learn(model, pair, consolidation.none(), common.settings, seed, evaluate_on="validation", stop=1)
        for name, estimate in found.items():
            traces[name] += fisher.trace(estimate(model, pair[0].train))
    shares = {name: value / traces["exact"] for name, value in traces.items()}
    family = {name: partial(_with_estimate, name, estimate) for name, estimate in found.items()}
    tried = {name: [value / share for value in setup.relative] for name, share in shares.items()}
    chosen = {name: choose(name, family[name], tried[name], common, pair) for name in found}
    progress(f"{len(found)} estimates: strengths chosen on validation data")
    alike = [consolidation.none(), *(family[name](chosen["exact"].best) for name in found)]
    apart = [family[name](chosen[name].best) for name in found if name != "exact"]
    at_common, at_own = report(common, pair, alike), report(common, pair, apart)
    progress(f"{len(alike) + len(apart)} methods, {len(common.seeds)} seeds each: done")
    return Varied(shares, chosen, at_common, {"exact": at_common["exact"]} | at_own)


def _with_estimate(name: str, estimate: Callable[[nn.Module, Examples], Params], strength: float) -> Method:
    def consolidate(model: nn.Module, data: Examples, prior: Belief) -> Belief:
        assert isinstance(prior, Diagonal)
        return prior.moved(snapshot(model), _times(len(data), estimate(model, data)))

    return Method(name, Diagonal.isotropic, consolidate, strength)


def _times(factor: float, information: Params) -> Params:
    return {name: factor * value for name, value in information.items()}


def as_json(result: Any) -> str:
    """Any settings or result of the experiments as JSON text."""
    return json.dumps(asdict(result), indent=1)
