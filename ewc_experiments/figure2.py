r"""Kirkpatrick et al.'s Figure 2 (3 in the journal), with seeds and intervals: settings, and functions of them.

    A   three permuted tasks: plain training, L2 and EWC on each task while the next ones are learned
    B   ten permuted tasks: the average over all tasks seen, EWC against training with dropout
    C   overlap of the Fishers of two tasks, layer by layer in a deep network, for a small and a large permutation

Strength, learning rate and width are searched for, for each method alone, on validation data and on seeds of their own.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ewc_code import consolidation, fisher, metrics
from ewc_code.consolidation import Method
from ewc_code.data import Images, load
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal
from ewc_code.laplace import laplace
from ewc_code.models import mlp, restore, snapshot
from ewc_code.tasks import Task, limited, permuted_mnist
from ewc_code.training import Record, Settings, accuracy, fit
from ewc_experiments.comparison import Chosen, Comparison, Network, Tasks, choose, report, together


@dataclass(frozen=True)
class Search:
    """Settings of panels A and B: permuted MNIST, a grid to choose from, and the runs to report."""

    common: Comparison  #: What `comparison.compare` needs; width and learning rate are searched for.
    widths: tuple[int, ...]  #: Of the two hidden layers.
    rates: tuple[float, ...]  #: Learning rates.
    search_tasks: int  #: Of the sequence, as many are learned while searching.
    held_limit: int | None  #: Validation and test examples a task, at most.
    fisher_images: int  #: That EWC's Fisher is taken from.
    epochs: tuple[int, ...] = ()  #: Tried for EWC beside those of `common`, at what the search found.
    dropout: tuple[float, float] = (0.2, 0.5)  #: Of inputs and hidden units, in panel B.

    def tasks(self, count: int) -> Tasks:
        """Makes that many tasks, for a keyword `seed` with permutations of its own."""
        return partial(permuted_mnist, count, self.common.train_limit, self.held_limit)


def _search(base: Search, widths: tuple[int, ...], rates: tuple[float, ...], **changes: Any) -> Search:
    """`base` with other widths and learning rates, and whatever else of it or of its `common` changes."""
    own = {name: changes.pop(name) for name in list(changes) if name in Search.__dataclass_fields__}
    return replace(base, widths=widths, rates=rates, common=replace(base.common, **changes), **own)


_LAPTOP = Search(
    Comparison((), 20_000, Settings(1, 128), (0, 1, 2), (100,), (30.0, 100.0, 300.0), (), 10, 0, own_tasks=True),
    widths=(125, 400), rates=(6e-3,), search_tasks=5, held_limit=1_000, fisher_images=1_000, epochs=(2,),
)  # fmt: skip
_SMALL = _search(
    _LAPTOP, (32,), (2e-3, 4e-3), train_limit=1_500, settings=Settings(4, 40), tasks=5, ewc=(10.0, 100.0),
    search_tasks=3, held_limit=300, fisher_images=300, epochs=(2,),
)  # fmt: skip
_PAPER = _search(
    _LAPTOP, (1000,), (1e-3, 3e-3), train_limit=None, settings=Settings(3, 128, products="medium"),
    seeds=(0, 1, 2, 3, 4), ewc=(100.0, 300.0, 1000.0), search_tasks=10, held_limit=5_000, fisher_images=5_000,
    epochs=(1,),
)  # fmt: skip
FIGURE_2B = {"smoke": _SMALL, "laptop": _LAPTOP, "paper": _PAPER}

_THREE: dict[str, Any] = {"tasks": 3, "search_tasks": 3, "epochs": ()}
_L2 = (0.003, 0.01, 0.03)
FIGURE_2A = {
    "smoke": _search(_SMALL, (32,), (4e-3,), l2=(0.01, 0.1), curve_points=3, **_THREE),
    "laptop": _search(_LAPTOP, (250,), (6e-3,), train_limit=15_000, l2=(0.001, *_L2), curve_points=6, **_THREE),
    "paper": _search(_PAPER, (400,), (1e-3, 2e-3), l2=_L2, curve_points=8, **_THREE),
}


@dataclass(frozen=True)
class Cell:
    """A point of the search grid, with the strengths tried there."""

    width: int
    rate: float  #: Learning rate.
    epochs: int
    chosen: Chosen
    best: float  #: Average validation accuracy with the best strength.


@dataclass
class Panel:
    """What was searched, what was chosen, and the reported runs."""

    setup: Search
    grids: dict[str, list[Cell]]  #: By method.
    chosen: dict[str, Cell]  #: By method, the best of its grid; joint training takes EWC's.
    records: dict[str, list[Record]]  #: By method, one a seed, on the test data.
    epochs: list[Cell]  #: EWC as chosen, by the number of epochs.
    seconds: float  #: Of all of it.
    #: EWC's reported runs again, with training's products rounded if `records` are not, and the other way round.
    otherwise: list[Record] = field(default_factory=list)

    def averages(self, method: str, after: int = -1) -> list[float]:
        """Average test accuracy over the tasks seen after task `after` (from 0; -1 for the last), a number a seed."""
        rows = [record.accuracy[after] for record in self.records[method]]
        return [sum(row[: after % len(row) + 1]) / (after % len(row) + 1) for row in rows]


def _plain(_strength: float) -> Method:
    return consolidation.none()


def figure_2a(setup: Search, **options: Any) -> Panel:
    """Panel A: plain training, L2 and EWC; `options` are `sweep.sweep`'s, its `progress` called after each method."""
    return _panel(setup, {"plain": mlp, "L2": mlp, "EWC": mlp}, options)


def figure_2b(setup: Search, **options: Any) -> Panel:
    """Panel B: EWC, training with dropout, without it, and on all tasks at once; `options` are `sweep.sweep`'s."""
    dropped = partial(mlp, dropout=setup.dropout)
    found = _panel(setup, {"plain": mlp, "dropout": dropped, "EWC": mlp}, options)
    best, started = found.chosen["EWC"], time.monotonic()
    at, tasks = _at(setup, best.width, best.rate, best.epochs), setup.tasks(setup.common.tasks)
    one_copy = replace(at, own_tasks=False)  # of all images
    found.records["joint"] = report(one_copy, partial(together, tasks), [consolidation.none()], **options)["plain"]
    exact, rounded = replace(at.settings, products=None), replace(at.settings, products="medium")
    at = replace(at, settings=exact if at.settings.products else rounded)
    method = consolidation.ewc(best.chosen.best, examples=setup.fisher_images)
    (found.otherwise,) = report(at, tasks, [method], **options).values()
    found.chosen["joint"], found.seconds = best, found.seconds + time.monotonic() - started
    return found


def _at(setup: Search, width: int, rate: float, epochs: int) -> Comparison:
    settings = replace(setup.common.settings, learning_rate=rate, epochs=epochs)
    return replace(setup.common, sizes=(784, width, width, 10), settings=settings)


def _panel(setup: Search, networks: dict[str, Network], options: dict[str, Any]) -> Panel:
    started, common, say = time.monotonic(), setup.common, options.pop("progress", lambda _: None)
    methods: dict[str, tuple[Callable[[float], Method], tuple[float, ...]]]
    methods = {
        "L2": (consolidation.l2, common.l2),
        "EWC": (partial(consolidation.ewc, examples=setup.fisher_images), common.ewc),
    }
    plain = (_plain, (0.0,))

    def searched(name: str, width: int, rate: float, epochs: int, only: tuple[float, ...] = ()) -> Cell:
        method, strengths = methods.get(name, plain)
        tasks, at = setup.tasks(setup.search_tasks), _at(setup, width, rate, epochs)
        chosen = choose(name, method, only or strengths, at, tasks, networks[name], **options)
        best = max(sum(row) / len(row) for row in chosen.validation)
        say(f"{name}, width {width}, rate {rate:g}, epochs {epochs}: {best:.1%} on validation data")
        return Cell(width, rate, epochs, chosen, best)

    points = [(width, rate, common.settings.epochs) for width in setup.widths for rate in setup.rates]
    grids = {name: [searched(name, *point) for point in points] for name in networks}
    best = {name: max(cells, key=lambda cell: cell.best) for name, cells in grids.items()}
    ewc, records = best["EWC"], {}
    epochs = [searched("EWC", ewc.width, ewc.rate, epochs, (ewc.chosen.best,)) for epochs in setup.epochs]
    for name, cell in best.items():
        method = methods.get(name, plain)[0](cell.chosen.best)
        at = _at(setup, cell.width, cell.rate, cell.epochs)
        (records[name],) = report(at, setup.tasks(common.tasks), [method], networks[name], **options).values()
        say(f"{name}: {len(common.seeds)} seeds reported after {time.monotonic() - started:.0f} s")
    epochs = sorted([*epochs, ewc], key=lambda cell: cell.epochs)
    return Panel(setup, grids, best, records, epochs, time.monotonic() - started)


@dataclass(frozen=True)
class Depth:
    """Settings of panel C: a deep narrow network, MNIST, then MNIST with its central square permuted."""

    sizes: tuple[int, ...] = (784, *(100,) * 6, 10)  #: Six hidden layers of 100, as in the paper.
    squares: tuple[int, ...] = (8, 26)  #: Sides of the permuted squares, pixels.
    train_limit: int | None = 10_000  #: Training examples a task, at most.
    settings: Settings = Settings(epochs=2, batch_size=32, learning_rate=1e-3)  #: Of the training on each task.
    strength: float = 30.0  #: Of EWC on the second task.
    fisher_images: int | None = 2_000  #: That the Fishers are taken from.
    seeds: tuple[int, ...] = (0, 1, 2)  #: Initial weights, permutations, order of the examples.


_DEEP = Depth(train_limit=None, settings=Settings(epochs=10, batch_size=64, learning_rate=1e-3), fisher_images=None)
FIGURE_2C = {
    "smoke": Depth((784, *(32,) * 6, 10), train_limit=2_000, fisher_images=500),
    "laptop": Depth(),
    "paper": replace(_DEEP, seeds=(0, 1, 2, 3, 4)),
}


@dataclass
class Overlaps:
    """Panel C: by side of the square, overlap of both tasks' Fishers, (seeds, layers), input layer first."""

    setup: Depth
    apart: dict[int, list[list[float]]]  #: Each task's Fisher where that task had just been learned.
    at_end: dict[int, list[list[float]]]  #: Both Fishers at the parameters after the second task.
    accuracy: dict[int, list[list[float]]]  #: Test accuracy on both tasks after the second, (seeds, 2).


def figure_2c(setup: Depth, progress: Callable[[str], None] = lambda _: None) -> Overlaps:
    """Panel C: learn a task, then with EWC the same with a permuted square; compare the Fishers layer by layer."""
    images = limited(load("MNIST"), setup.train_limit)
    found = Overlaps(setup, {}, {}, {})
    for seed in setup.seeds:
        model = mlp(setup.sizes, seed).to(device())
        flat = Diagonal.isotropic(snapshot(model))
        fit(model, images.train, flat, 0.0, setup.settings, generator(1000 * seed))
        mode, first = snapshot(model), fisher.diagonal(model, images.train[: setup.fisher_images])
        belief = laplace(model, images.train, flat, examples=setup.fisher_images)
        for side in setup.squares:
            restore(model, mode)
            task = centrally_permuted(images, side, seed)
            fit(model, task.train, belief, setup.strength, setup.settings, generator(1000 * seed + 1))
            second = fisher.diagonal(model, task.train[: setup.fisher_images])
            again = fisher.diagonal(model, images.train[: setup.fisher_images])
            found.apart.setdefault(side, []).append(by_layer(first, second))
            found.at_end.setdefault(side, []).append(by_layer(again, second))
            found.accuracy.setdefault(side, []).append([accuracy(model, part) for part in (images.test, task.test)])
        progress(f"seed {seed}: done")
    return found


def by_layer(left: fisher.Params, right: fisher.Params) -> list[float]:
    """`metrics.overlap` of the weights and biases of each layer that has any, in the model's order."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in left)
    part = lambda side, layer: {n: value for n, value in side.items() if n.rpartition(".")[0] == layer}  # noqa: E731
    return [metrics.overlap(part(left, layer), part(right, layer)) for layer in layers]


def centrally_permuted(images: Images, side: int, seed: int = 0) -> Task:
    """The images with the pixels of their central square of `side` by `side` shuffled, the others in place.

    Source: Kirkpatrick et al. 2017, section 2.2 and Figure 3C (2C in the preprint).
    """
    whole = math.isqrt(images.train.x.shape[1])
    if not 1 <= side <= whole:
        raise ValueError(f"side must lie in 1..{whole}, the images' own; got {side}.")
    order, low = torch.arange(whole**2).view(whole, whole), (whole - side) // 2
    square = order[low : low + side, low : low + side]  # a view
    square.copy_(square.reshape(-1)[torch.randperm(side**2, generator=generator(seed))].view(side, side))
    where = order.reshape(-1).to(images.train.x.device)
    return Task(f"central {side} × {side} permuted", images, partial(_reordered, order=where))


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    return x.index_select(1, order)
