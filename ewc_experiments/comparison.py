r"""Methods compared on a sequence of tasks: plain training, L2 and EWC, and EWC with other Fishers.

Strengths are chosen by validation accuracy, on
seeds of their own, before any test example is looked at (`choose`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ewc_code import consolidation, fisher
from ewc_code.consolidation import Method
from ewc_code.data import Examples, Images, load
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal
from ewc_code.importance import Path
from ewc_code.models import Params, mlp, snapshot
from ewc_code.sweep import Outcome, Run, sweep
from ewc_code.tasks import Task, limited, mnist_then_fashion, rotated
from ewc_code.training import Record, Settings, accuracy, fit
from ewc_experiments import variants

Network = Callable[[tuple[int, ...], int], nn.Module]
Tasks = Callable[..., Sequence[Task]]
Estimate = Callable[[nn.Module, Examples], Params]

SMOKE = Settings(epochs=3, batch_size=50)
LADDER = (1.0, 100.0, 300.0, 1000.0, 3000.0)
L2_LADDER = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Comparison:
    """Plain training, L2 and EWC on one sequence of tasks."""

    sizes: tuple[int, ...] = (784, 200, 200, 10)  #: Of the network.
    train_limit: int | None = 6_000  #: Training examples a task, at most; None for all.
    settings: Settings = Settings()  #: Of the training on each task.
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  #: Of the reported runs: initial weights, order of examples.
    choosing: tuple[int, ...] = (100, 101)  #: Seeds of the runs that choose the strengths; none of `seeds`.
    ewc: tuple[float, ...] = LADDER  #: Strengths to choose from.
    l2: tuple[float, ...] = L2_LADDER  #: Strengths to choose from.
    tasks: int = 2  #: Number of tasks, for permuted MNIST.
    curve_points: int = 8  #: Looks at the test accuracy within a task.
    own_tasks: bool = False  #: Whether each seed has tasks of its own, made with that `seed`.

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
        ewc=(10.0, 100.0, 1000.0), l2=(0.001, 0.003, 0.01, 0.03),
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


def compare(setup: Comparison, tasks: Tasks, progress: Callable[[str], None] = lambda _: None) -> Compared:
    """Choose each strength on validation data, then run every method on fresh seeds and look at the test data.

    `tasks` makes the sequence; `progress` is called with a line after each step.
    """
    chosen, methods = {}, [consolidation.none()]
    for name, family, strengths in (("EWC", consolidation.ewc, setup.ewc), ("L2", consolidation.l2, setup.l2)):
        chosen[name] = choose(name, family, strengths, setup, tasks)
        methods.append(family(chosen[name].best))
        progress(f"{name}: strength {chosen[name].best:g} chosen on validation data")
    records = report(setup, tasks, methods)
    progress(f"{len(methods)} methods, {len(setup.seeds)} seeds each: done")
    return Compared(setup, records["plain"][0].names, chosen, records)


def choose(
    name: str,
    method: Callable[[float], Method],
    strengths: Sequence[float],
    setup: Comparison,
    tasks: Tasks,
    network: Network = mlp,
    **options: Any,
) -> Chosen:
    """The strength with the best average validation accuracy after the last task, over the choosing seeds.

    A run that diverged counts as none right; `options` are those of `sweep.sweep`.
    """
    methods = [method(strength) for strength in strengths]
    outcomes = _learned(setup, tasks, methods, network, "validation", options)
    last = [[outcome.record.accuracy[-1] if outcome.record else None for outcome in runs] for runs in outcomes]
    nothing = [0.0] * len(tasks())
    found = torch.tensor([[row or nothing for row in rows] for rows in last]).mean(1)  # (strengths, tasks)
    return Chosen(name, list(strengths), found.tolist(), strengths[int(found.mean(1).argmax())])


def report(
    setup: Comparison, tasks: Tasks, methods: Sequence[Method], network: Network = mlp, **options: Any
) -> dict[str, list[Record]]:
    """Every method on the reported seeds, with curves, on the test data; a record a seed. As `choose`."""
    outcomes = _learned(setup, tasks, methods, network, "test", options)
    if errors := [outcome.error for runs in outcomes for outcome in runs if outcome.error]:
        raise FloatingPointError(f"every reported run must stay finite; got: {'; '.join(errors)}")
    return {m.name: [o.record for o in runs if o.record] for m, runs in zip(methods, outcomes, strict=True)}


def _learned(
    setup: Comparison,
    tasks: Tasks,
    methods: Sequence[Method],
    network: Network,
    on: Literal["test", "validation"],
    options: dict[str, Any],
) -> list[list[Outcome]]:
    """A row of outcomes a method, one a seed."""
    seeds, points = (setup.seeds, setup.curve_points) if on == "test" else (setup.choosing, 0)
    own = {seed: partial(tasks, seed=seed) if setup.own_tasks else tasks for seed in seeds}
    make = partial(network, setup.sizes)
    runs = [Run(own[seed], m, make, setup.settings, seed, points, on) for m in methods for seed in seeds]
    outcomes = sweep(runs, **options)
    return [outcomes[i : i + len(seeds)] for i in range(0, len(runs), len(seeds))]


def plain(setup: Comparison, tasks: Tasks) -> list[Record]:
    """The sequence without any protection, one record a seed."""
    return report(setup, tasks, [consolidation.none()])["plain"]


def joint(setup: Comparison, tasks: Tasks) -> list[list[float]]:
    """The ceiling: all tasks' examples at once, each seen as often as in the sequence; (seeds, tasks), test."""
    everything, found = together(tasks)[0].train, []
    for seed in setup.seeds:
        model = mlp(setup.sizes, seed).to(device())
        fit(model, everything, Diagonal.isotropic(snapshot(model)), 0.0, setup.settings, generator(seed))
        found.append([accuracy(model, task.test) for task in tasks()])
    return found


@dataclass(frozen=True)
class Variation:
    """Plain training on two tasks, for several values of one number."""

    values: tuple[float, ...]
    training: Comparison


_SHORT = Comparison(train_limit=6_000, seeds=(0, 1, 2), curve_points=0)
_SHORTEST = replace(_SHORT, sizes=(784, 32, 10), settings=SMOKE)

#: Does a larger network forget less? Digits then clothes, two hidden layers of each width.
CAPACITY = {
    "smoke": Variation((16, 64), replace(_SHORTEST, train_limit=2000)),
    "laptop": Variation((16, 64, 256), _SHORT),
    "paper": Variation((16, 64, 256, 1024, 2048), LONG),
}
#: Does it matter how far the second task is from the first? MNIST, then MNIST turned by each angle.
SIMILARITY = {
    "smoke": Variation((15, 180), replace(_SHORTEST, train_limit=1000)),
    "laptop": Variation((15, 45, 90, 180), replace(_SHORT, sizes=(784, 100, 10))),
    "paper": Variation((15, 45, 90, 180), replace(LONG, sizes=(784, 400, 10))),
}


def capacity(setup: Variation) -> dict[int, list[Record]]:
    """Records by width, one a seed."""
    common, widths = setup.training, map(int, setup.values)
    pair = partial(mnist_then_fashion, common.train_limit)
    return {width: plain(replace(common, sizes=(784, width, width, 10)), pair) for width in widths}


def similarity(setup: Variation) -> dict[float, list[Record]]:
    """Records by angle, one a seed."""
    common = setup.training
    return {angle: plain(common, partial(_turned, angle, common.train_limit)) for angle in setup.values}


def _turned(degrees: float, train_limit: int | None) -> tuple[Task, ...]:
    return rotated(limited(load("MNIST"), train_limit), (0.0, degrees))


def repairs(setup: Comparison, images: int = 200, importance: float = 1000.0) -> dict[str, list[Record]]:
    """The tutorial that this book grew from, repaired one thing at a time, on MNIST then Fashion-MNIST.

    Records by rung: as the tutorial had it, with its Fisher of `images` images and its `importance` (a penalty without
    the 1/2: strength = 2 importance), then with each repair on top of the ones before. Network, data, training and
    seeds are those of the other curves, so that only the flaws differ; the last repair, a strength from validation
    data, is what `compare` does.
    """
    pair, strength = partial(mnist_then_fashion, setup.train_limit), 2 * importance
    # The tutorial goes image by image, which gives the same mean.
    argmax, classes = partial(_first, variants.argmax, images), partial(_first, fisher.diagonal, images)
    flawed = [_with_estimate("as in the tutorial", argmax, strength)]
    mended = [
        _with_estimate("no ReLU on the logits", argmax, strength),
        _with_estimate("Fisher over all classes", classes, strength),
        replace(consolidation.ewc(strength), name="Fisher over all images"),
    ]
    short = replace(setup, curve_points=0)  # only the flawed run is drawn as curves
    return report(setup, pair, flawed, variants.relu_logits_mlp) | report(short, pair, mended)


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


def estimates(setup: Wild) -> dict[str, Estimate]:
    """Ways to compute something like the Fisher's diagonal, by name; the exact one first."""
    size, few = setup.batch_size, setup.images
    return {
        "exact": fisher.diagonal,
        "exact, few images": partial(_first, fisher.diagonal, setup.few),
        "labels sampled": _sampled,
        "labels sampled, B × square of batch": partial(_sampled_batches, batch_size=size),
        "labels of the data": partial(fisher.diagonal, labels="data"),
        "most likely label": variants.argmax,
        "data, weighted by p": partial(_first, variants.weighted_by_probability, few),
        "data, square of batch": partial(variants.squared_batch_gradient, batch_size=size),
        "indexed, not gathered": partial(_first, partial(variants.indexed_not_gathered, batch_size=size), few),
    }


def _first(estimate: Estimate, images: int, model: nn.Module, data: Examples) -> Params:
    return estimate(model, data[:images])


def _sampled(model: nn.Module, data: Examples) -> Params:
    return fisher.diagonal(model, data, "sampled", generator(0))


def _sampled_batches(model: nn.Module, data: Examples, batch_size: int) -> Params:
    drawn = variants.drawn(model, data, generator(0))
    return _times(batch_size, variants.squared_batch_gradient(model, drawn, batch_size))


def wild(setup: Wild, progress: Callable[[str], None] = lambda _: None) -> Varied:
    """Choose each estimate's strength on validation data and seeds of their own, then report on the test data."""
    common, found = setup.comparison, estimates(setup)
    pair = partial(mnist_then_fashion, common.train_limit)
    traces, digits = dict.fromkeys(found, 0.0), pair()[0].train
    for seed in common.choosing:
        model = mlp(common.sizes, seed).to(device())
        fit(model, digits, Diagonal.isotropic(snapshot(model)), 0.0, common.settings, generator(1000 * seed))
        for name, estimate in found.items():
            traces[name] += fisher.trace(estimate(model, digits))
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


def _with_estimate(name: str, estimate: Estimate, strength: float) -> Method:
    return Method(name, Diagonal.isotropic, partial(_moved, estimate), strength)


def _moved(estimate: Estimate, model: nn.Module, data: Examples, prior: Belief, path: Path | None) -> Belief:
    assert isinstance(prior, Diagonal)
    return prior.moved(snapshot(model), _times(len(data), estimate(model, data)))


def _times(factor: float, information: Params) -> Params:
    return {name: factor * value for name, value in information.items()}


def as_json(result: Any) -> str:
    """Any settings or result of the experiments as JSON text."""
    return json.dumps(asdict(result), indent=1)


def together(make: Callable[[], Sequence[Task]]) -> tuple[Task]:
    """All of the tasks' examples as one task: joint training, the ceiling. Takes a copy of each."""
    tasks, whole = make(), []
    for part in ("train", "validation", "test"):
        y = torch.cat([getattr(task.images, part).y for task in tasks])
        x = tasks[0].images.train.x.new_empty(len(y), *tasks[0].images.train.x.shape[1:])
        for task, place in zip(tasks, x.split(len(y) // len(tasks)), strict=True):  # one copy, not two
            place.copy_(task.examples(part).x)
        whole.append(Examples(x, y))
    return (Task("all tasks", Images("all tasks", *whole)),)
