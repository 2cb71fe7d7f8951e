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

from ewc_code import consolidation, fisher
from ewc_code.consolidation import Method
from ewc_code.data import Examples, load
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal
from ewc_code.models import mlp, relu_logits_mlp, restore, snapshot
from ewc_code.tasks import Task, limited, mnist_then_fashion, rotated
from ewc_code.training import Record, Settings, accuracy, fit, learn

Network = Callable[[tuple[int, ...], int], nn.Module]

SMOKE = Settings(epochs=3, batch_size=50)
LADDER = (1.0, 100.0, 300.0, 1000.0, 3000.0)
L2_LADDER = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Comparison:
    """Plain training, L2 and EWC on one sequence of tasks.

    Args:
        sizes: Of the network.
        train_limit: Training examples a task, at most; None for all.
        settings: Of the training on each task.
        seeds: Of the reported runs: initial weights, order of examples.
        choosing: Seeds of the runs that choose the strengths; none of `seeds`.
        ewc: Strengths to choose from.
        l2: Strengths to choose from.
        tasks: Number of tasks, for permuted MNIST.
        curve_points: Looks at the test accuracy within a task.
    """

    sizes: tuple[int, ...] = (784, 200, 200, 10)
    train_limit: int | None = 8_000
    settings: Settings = Settings()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    choosing: tuple[int, ...] = (100, 101)
    ewc: tuple[float, ...] = LADDER
    l2: tuple[float, ...] = L2_LADDER
    tasks: int = 2
    curve_points: int = 8

    def __post_init__(self) -> None:
        if set(self.seeds) & set(self.choosing):
            raise ValueError(
                f"seeds that choose must not be reported; both hold {set(self.seeds) & set(self.choosing)}."
            )


MNIST_THEN_FASHION = {
    "smoke": Comparison(
        sizes=(784, 32, 10), train_limit=2000, seeds=(0, 1, 2, 3), choosing=(100,), ewc=(100.0, 1000.0), l2=(0.01, 0.1),
        settings=SMOKE, curve_points=4,
    ),
    "laptop": Comparison(),
    "paper": Comparison(
        sizes=(784, 400, 400, 400, 10), train_limit=None, seeds=tuple(range(10)), settings=Settings(epochs=10)
    ),
}  # fmt: skip

PERMUTED = {
    "smoke": Comparison(
        sizes=(784, 32, 10), train_limit=2000, seeds=(0, 1, 2, 3), choosing=(100,), ewc=(100.0, 1000.0), l2=(0.01, 0.1),
        settings=SMOKE, tasks=3, curve_points=4,
    ),
    "laptop": Comparison(
        sizes=(784, 100, 100, 10), train_limit=8_000, choosing=(100,), tasks=3, curve_points=6,
        ewc=(10.0, 100.0, 1000.0), l2=(0.003, 0.01, 0.03),
    ),
    "paper": Comparison(
        sizes=(784, 400, 400, 10), train_limit=None, seeds=tuple(range(10)), tasks=3,
        settings=Settings(epochs=10), l2=(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """A strength and the validation accuracies that chose it.

    Attributes:
        method: Name.
        strengths: Those tried.
        validation: Accuracy on each task after the last one, mean over the choosing seeds, (strengths, tasks).
        best: The strength with the highest average over the tasks.
    """

    method: str
    strengths: list[float]
    validation: list[list[float]]
    best: float

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
    setup: Comparison,
    tasks: Sequence[Task],
    network: Network = mlp,
    progress: Callable[[str], None] = lambda line: None,
) -> Compared:
    """Choose each strength on validation data, then run every method on fresh seeds and look at the test data.

    Args:
        setup: Settings.
        tasks: The sequence.
        network: (sizes, seed) -> model.
        progress: Called with one line after each step.
    """
    families: dict[str, tuple[Callable[[float], Method], tuple[float, ...]]] = {
        "EWC": (consolidation.ewc, setup.ewc),
        "L2": (consolidation.l2, setup.l2),
    }
    chosen = {}
    for name, (family, strengths) in families.items():
        chosen[name] = choose(name, family, strengths, setup, tasks, network)
        progress(f"{name}: strength {chosen[name].best:g} chosen on validation data")
    methods = [consolidation.none(), *(families[name][0](picked.best) for name, picked in chosen.items())]
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
        learn(model, tasks, consolidation.none(), setup.settings, seed, evaluate_on="validation", stop=1)
        mode = snapshot(model)
        belief = method(1.0).consolidate(model, tasks[0].train, method(1.0).prior(mode))
        for i, strength in enumerate(strengths):
            restore(model, mode)
            record = learn(
                model, tasks, method(strength), setup.settings, seed, 0, "validation", start=1, belief=belief
            )
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
    """Does a larger network forget less? Plain training on MNIST then Fashion-MNIST.

    Args:
        widths: Units in each of two hidden layers.
        train_limit: Training examples a task.
        settings: Of the training on each task.
        seeds: Of weights and order.
    """

    widths: tuple[int, ...] = (16, 64, 256)
    train_limit: int | None = 6_000
    settings: Settings = Settings()
    seeds: tuple[int, ...] = (0, 1, 2)


CAPACITY = {
    "smoke": Capacity(widths=(16, 64), train_limit=2000, settings=SMOKE, seeds=(0, 1, 2)),
    "laptop": Capacity(),
    "paper": Capacity((16, 64, 256, 1024, 2048), train_limit=None, settings=Settings(epochs=5), seeds=tuple(range(10))),
}


def capacity(setup: Capacity) -> dict[int, list[Record]]:
    """Records by width, one a seed."""
    pair = mnist_then_fashion(setup.train_limit)
    return {
        width: plain(Comparison((784, width, width, 10), None, setup.settings, setup.seeds, curve_points=0), pair)
        for width in setup.widths
    }


@dataclass(frozen=True)
class Similarity:
    """Does it matter how far the second task is from the first? MNIST, then MNIST turned by an angle, unprotected.

    Args:
        degrees: Angles of the second task.
        sizes: Of the network.
        train_limit: Training examples a task.
        settings: Of the training on each task.
        seeds: Of weights and order.
    """

    degrees: tuple[float, ...] = (15.0, 45.0, 90.0, 180.0)
    sizes: tuple[int, ...] = (784, 100, 10)
    train_limit: int | None = 6_000
    settings: Settings = Settings()
    seeds: tuple[int, ...] = (0, 1, 2)


SIMILARITY = {
    "smoke": Similarity(degrees=(15.0, 180.0), sizes=(784, 32, 10), train_limit=1000, settings=SMOKE, seeds=(0, 1, 2)),
    "laptop": Similarity(),
    "paper": Similarity(sizes=(784, 400, 10), train_limit=None, settings=Settings(epochs=5), seeds=tuple(range(10))),
}


def similarity(setup: Similarity) -> dict[float, list[Record]]:
    """Records by angle, one a seed."""
    images = limited(load("MNIST"), setup.train_limit)
    common = Comparison(setup.sizes, None, setup.settings, setup.seeds, curve_points=0)
    return {angle: plain(common, rotated(images, (0.0, angle))) for angle in setup.degrees}


@dataclass(frozen=True)
class Repairs:
    """The tutorial that this book grew from, repaired one thing at a time, on MNIST then Fashion-MNIST.

    Args:
        comparison: Network, data, training and seeds: those of the other curves, so that only the flaws differ.
        images: Of the Fisher that is computed one image at a time.
        importance: The tutorial's factor of its penalty, which has no 1/2: strength = 2 importance.
    """

    comparison: Comparison = Comparison()
    images: int = 200
    importance: float = 1000.0


def repairs(setup: Repairs) -> dict[str, list[Record]]:
    """Records by rung: as the tutorial had it, then with each repair on top of the ones before.

    The last repair, a strength from validation data, is what `compare` does.
    """
    pair = mnist_then_fashion(setup.comparison.train_limit)
    strength, flat = 2 * setup.importance, Diagonal.isotropic
    argmax = partial(_argmax_laplace, images=setup.images)
    few = partial(_few_laplace, images=setup.images)
    flawed = [Method("as in the tutorial", flat, argmax, strength)]
    mended = [
        Method("no ReLU on the logits", flat, argmax, strength),
        Method("Fisher over all classes", flat, few, strength),
        replace(consolidation.ewc(strength), name="Fisher over all images"),
    ]
    return report(setup.comparison, pair, flawed, relu_logits_mlp) | report(setup.comparison, pair, mended)


def _argmax_laplace(model: nn.Module, data: Examples, prior: Belief, images: int) -> Belief:
    """Belief from the squared score of the model's most likely class; one image at a time would give the same mean."""
    assert isinstance(prior, Diagonal)
    x = data.x[:images]
    with torch.no_grad():
        likely = Examples(x, model(x).argmax(1))
    squares = fisher.diagonal(model, likely, labels="data")
    return prior.moved(snapshot(model), {name: len(data) * value for name, value in squares.items()})


def _few_laplace(model: nn.Module, data: Examples, prior: Belief, images: int) -> Belief:
    """EWC's belief with the exact Fisher of the first images only."""
    assert isinstance(prior, Diagonal)
    mean_fisher = fisher.diagonal(model, data[:images])
    return prior.moved(snapshot(model), {name: len(data) * value for name, value in mean_fisher.items()})


def as_json(result: Any) -> str:
    """Any settings or result of the experiments as JSON text."""
    return json.dumps(asdict(result), indent=1)
