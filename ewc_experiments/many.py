r"""Many tasks, one after another: quadratic ones in closed form, and permuted MNIST. Chapter "Many tasks".

What a method keeps of the tasks so far is a precision Lambda and a pull r = Lambda times the point that it pulls to:

    theta*_k = (lambda Lambda + A_k)^-1 (lambda r + A_k m_k),      A_k = N_k H_k, m_k the optimum of task k alone

With networks the strengths are chosen on validation data, on seeds of their own, before any test example is looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ewc_code import consolidation, fisher, metrics
from ewc_code.consolidation import Method
from ewc_code.data import load
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal
from ewc_code.models import mlp, snapshot
from ewc_code.sweep import Run, sweep
from ewc_code.tasks import permuted_mnist
from ewc_code.training import Record, Settings, accuracy, fit
from ewc_experiments.comparison import together
from ewc_experiments.workers import Pool, one_thread, workers

Anchors = Literal["newest", "own"]


def quadratic(
    precisions: Float[Tensor, "k p p"],
    pulls: Float[Tensor, "k p"],
    anchors: Anchors = "newest",
    diagonal: bool = False,
    decay: float = 1.0,
    strength: float = 1.0,
    prior: Float[Tensor, "p p"] | None = None,
) -> Float[Tensor, "k p"]:
    r"""Modes after each of K quadratic tasks E_k = 1/2 (theta - m_k)^T A_k (theta - m_k), nats, learned one by one.

        theta*_k = (lambda Lambda_{k-1} + A_k)^-1 (lambda r_{k-1} + A_k m_k),    Lambda_k = decay Lambda_{k-1} + A_k,
        r_k = Lambda_k theta*_k ("newest": one penalty at the newest mode)  or
        r_k = decay r_{k-1} + A_k theta*_k ("own": a penalty per task, at its own mode)

    Args:
        precisions: A_k = N_k H_k, symmetric.
        pulls: A_k m_k, which is known also where A_k leaves some directions open.
        anchors: Where the penalties pull to.
        diagonal: Whether only the diagonal of A_k is kept of a task that is over.
        decay: gamma; 1 forgets nothing.
        strength: lambda, of the penalty.
        prior: Precision before any task, around zero; none by default, and then the first task must determine all.

    Source: Huszár 2018; Schwarz et al. 2018, eqs. 6-9, the last with strength = decay. Chapter "Many tasks".
    """
    kept = torch.zeros_like(precisions[0]) if prior is None else prior
    pull, modes = torch.zeros_like(pulls[0]), []
    for precision, own in zip(precisions, pulls, strict=True):
        mode = torch.linalg.solve(strength * kept + precision, strength * pull + own)
        share = precision.diagonal().diag() if diagonal else precision
        kept = decay * kept + share
        pull = kept @ mode if anchors == "newest" else decay * pull + share @ mode
        modes.append(mode)
    return torch.stack(modes)


def counts(
    tasks: int,
    precision: Float[Tensor, "p p"] | None = None,
    direction: Float[Tensor, " p"] | None = None,
    anchors: Anchors = "newest",
    diagonal: bool = False,
    decay: float = 1.0,
    strength: float = 1.0,
) -> Float[Tensor, " k"]:
    r"""How many times each of K equal tasks counts in the last mode, for every time that the newest does.

        theta*_K = sum_j w_j m_j  along an eigenvector of diag(A)^-1 A,     count_j = w_j / w_K

    Joint training counts all of them once. `precision` is A of every task (1 by default), `direction` the eigenvector;
    the rest is as for `quadratic`. Chapter "Many tasks".
    """
    precision = torch.ones(1, 1, dtype=torch.float64) if precision is None else precision
    direction = torch.ones_like(precision[0]) if direction is None else direction
    alike, weights = precision.expand(tasks, -1, -1), []
    for j in range(tasks):
        pulls = torch.zeros(tasks, len(direction), dtype=precision.dtype)
        pulls[j] = precision @ direction
        last = quadratic(alike, pulls, anchors, diagonal, decay, strength)[-1]
        weights.append(last @ direction / (direction @ direction))
    return torch.stack(weights) / weights[-1]


@dataclass(frozen=True)
class Linear:
    """Twenty small regressions: read the value of a digit off a coarse image, when a task shows two digits only."""

    tasks: int = 20  #: Each with a pair of digits of its own.
    examples: int = 200  #: Images a task, of both its digits together.
    side: int = 7  #: Of the coarse image, pixels.
    noise_variance: float = 4.0  #: Of the digit's value around the linear prediction, about what regression leaves.
    prior: float = 0.1  #: Precision of each weight before any task.
    seed: int = 0  #: Of the order of the pairs.


def linear_tasks(setup: Linear) -> list[tuple[Tensor, Tensor]]:
    """For each task inputs (n, side^2 + 1), the last a constant, and the digits as values (n,); float64, on the CPU."""
    images = load("MNIST", torch.device("cpu")).train
    pairs = torch.combinations(torch.arange(10))
    chosen = pairs[torch.randperm(len(pairs), generator=generator(setup.seed))[: setup.tasks]]
    found = []
    for pair in chosen:
        some = torch.isin(images.y, pair).nonzero()[: setup.examples, 0]
        coarse = F.adaptive_avg_pool2d(images.x[some].view(-1, 1, 28, 28), setup.side).flatten(1).double()
        found.append((torch.cat([coarse, torch.ones(len(some), 1).double()], 1), images.y[some].double()))
    return found


@dataclass(frozen=True)
class Many:
    """EWC with one penalty, with a penalty per task, and with decay, on a long sequence of permuted MNIST."""

    tasks: int = 20  #: Of the sequence.
    lengths: tuple[int, ...] = (10, 20)  #: After how many tasks results are reported, each with a strength of its own.
    sizes: tuple[int, ...] = (784, 64, 64, 10)  #: Of the network, small enough to be filled by so many tasks.
    train_limit: int | None = 2_000  #: Training examples a task, at most; None for all.
    held_limits: tuple[int, int] = (250, 300)  #: Validation examples, and test examples, a task, at most.
    settings: Settings = Settings(epochs=2, batch_size=100, learning_rate=5e-3)  #: Of the training on each task.
    fisher_images: int = 300  #: That each Fisher is taken from.
    strengths: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)  #: To choose from.
    #: To choose from where the decay remembers fewer than three tasks, so that each has to be held more tightly.
    fast_strengths: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0)
    decays: tuple[float, ...] = (0.9, 0.5)  #: Of online EWC.
    stiff: float = 100.0  #: A strength that all methods get beside their own, to compare at the same one.
    seeds: tuple[int, ...] = (0, 1, 2, 3)  #: Of the reported runs: permutations, initial weights, order of examples.
    choosing: tuple[int, ...] = (100,)  #: Seeds of the runs that choose the strengths; none of `seeds`.

    @property
    def small(self) -> bool:
        """Whether the networks are too small for two threads to share a step."""
        return max(self.sizes[1:-1]) <= 100

    def __post_init__(self) -> None:
        if both := set(self.seeds) & set(self.choosing):
            raise ValueError(f"seeds that choose must not be reported; both hold {both}.")
        if max(self.lengths) != self.tasks or min(self.lengths) < 1:
            raise ValueError(f"lengths must lie in 1..{self.tasks}, the last one included; got {self.lengths}.")


MANY = {
    "smoke": Many(
        8, (4, 8), (784, 24, 10), 1_000, (200, 200), Settings(3, 50, 5e-3), 200, (3.0, 30.0), (3.0, 30.0), (0.5,),
        stiff=300.0, seeds=(0, 1, 2),
    ),
    "laptop": Many(),
    "paper": Many(
        sizes=(784, 400, 400, 10), train_limit=None, held_limits=(2_000, 5_000), settings=Settings(3, 128, 2e-3),
        fisher_images=2_000, strengths=(10.0, 30.0, 100.0, 300.0),
        fast_strengths=(30.0, 100.0, 300.0, 1000.0), decays=(0.9, 0.7, 0.5), stiff=300.0, seeds=(0, 1, 2, 3, 4),
    ),
}  # fmt: skip

ONE, OWN = "one penalty", "a penalty per task"
LOT = 9  #: Runs in one piece of work, at most.
Family = Callable[[float], Method]


def families(setup: Many) -> dict[str, Family]:
    """From strength to method, by the names that tables and figures use."""
    few = setup.fisher_images
    fading = {f"γ = {decay:g}": partial(consolidation.online_ewc, decay=decay, examples=few) for decay in setup.decays}
    return {
        ONE: partial(consolidation.ewc, examples=few),
        OWN: partial(consolidation.ewc_per_task, examples=few),
        **fading,
    }


def ladders(setup: Many) -> dict[str, tuple[float, ...]]:
    """The strengths to choose from, by method: with anchors of its own a penalty wants a smaller one, by the theory."""
    fast = {f"γ = {decay:g}" for decay in setup.decays if 1 / (1 - decay) < 3}
    least = min(setup.strengths)
    found = {name: setup.fast_strengths if name in fast else setup.strengths for name in families(setup)}
    return found | {OWN: (least / 10, least / 3, *setup.strengths)}


@dataclass
class Sequences:
    """Records of all runs; the accuracy matrix of a run holds its averages after any number of tasks."""

    setup: Many
    tried: dict[str, dict[float, list[Record]]]  #: By method and strength, on validation data, one a choosing seed.
    chosen: dict[str, dict[int, float]]  #: By method and number of tasks, the strength with the best average then.
    reported: dict[str, dict[float, list[Record]]]  #: By method and strength, on test data, one a seed.
    joint: dict[int, list[float]]  #: All tasks' images at once: by number of tasks, average test accuracy, one a seed.

    def of(self, name: str, length: int | None = None) -> list[Record]:
        """The reported runs of a method at the strength chosen for so many tasks; for all, when not said."""
        return self.reported[name][self.chosen[name][length or self.setup.tasks]]

    def averages(self, name: str, length: int) -> list[float]:
        """Average test accuracy over the first `length` tasks right after them, strength chosen for it; one a seed."""
        return [seen(record, length) for record in self.of(name, length)]

    def validated(self, name: str, strength: float, length: int) -> float:
        """What a strength was chosen by: average validation accuracy over the first `length` tasks right after them.

        Mean over the choosing seeds; a run that diverged counts as none right.
        """
        return sum(seen(record, length) for record in self.tried[name][strength]) / len(self.setup.choosing)


def seen(record: Record, count: int) -> float:
    """Average accuracy on the first `count` tasks, after the last of them."""
    return sum(record.accuracy[count - 1][:count]) / count


def permuted(setup: Many, progress: Callable[[str], None] = lambda _: None) -> Sequences:
    """Choose each method's strength for each length on validation data, then run fresh seeds and look at the tests.

    A sequence that diverges while strengths are chosen counts as none right; a reported one is a FloatingPointError.
    """
    with workers(setup.small) as pool:
        found = _choose(setup, pool)
        tries = sum(len(by_strength) for by_strength in found.tried.values())
        progress(f"{tries} sequences of {setup.tasks} tasks: strengths chosen on validation data")
        joint = {n: [pool(_joint, setup, n, seed) for seed in setup.seeds] for n in setup.lengths}
        made = families(setup)
        wanted = [(name, strength) for name in made for strength in sorted({*found.chosen[name].values(), setup.stiff})]
        methods = [consolidation.none(), *(made[name](strength) for name, strength in wanted)]
        rows = _learned(setup, pool, methods, setup.seeds, "test")
        found.joint |= {length: [result() for result in each] for length, each in joint.items()}
    for (name, strength), records in zip([("plain", 0.0), *wanted], rows, strict=True):
        if None in records:
            raise FloatingPointError(f"every reported run must stay finite; {name} at strength {strength:g} did not.")
        found.reported[name][strength] = [record for record in records if record]
    progress(f"{len(methods)} methods, {len(setup.seeds)} seeds each: reported on test data")
    return found


def _choose(setup: Many, pool: Pool) -> Sequences:
    """The best strength of each method for each length, and nothing reported yet."""
    made, tries = families(setup), ladders(setup)
    trial = [(name, strength) for name in made for strength in tries[name]]
    outcomes = _learned(setup, pool, [made[name](strength) for name, strength in trial], setup.choosing, "validation")
    tried: dict[str, dict[float, list[Record]]] = {name: {} for name in made}
    for (name, strength), records in zip(trial, outcomes, strict=True):
        tried[name][strength] = [record for record in records if record]
    found = Sequences(setup, tried, {}, {"plain": {}, **{name: {} for name in made}}, {})
    for name in made:
        by = lambda strength, length, name=name: found.validated(name, strength, length)  # noqa: E731
        found.chosen[name] = {length: max(tried[name], key=partial(by, length=length)) for length in setup.lengths}
    found.chosen["plain"] = dict.fromkeys(setup.lengths, 0.0)
    return found


def _learned(
    setup: Many, pool: Pool, methods: Sequence[Method], seeds: Sequence[int], on: Literal["test", "validation"]
) -> list[list[Record | None]]:
    """A row a method, one a seed; each seed has permutations of its own.

    A seed's runs share their first task: they are one piece of work, or a few.
    """
    lots = [(seed, methods[i : i + LOT]) for seed in seeds for i in range(0, len(methods), LOT)]
    found = [record for result in [pool(_lot, setup, seed, lot, on) for seed, lot in lots] for record in result()]
    return [found[i :: len(methods)] for i in range(len(methods))]


def _lot(setup: Many, seed: int, methods: Sequence[Method], on: Literal["test", "validation"]) -> list[Record | None]:
    held, network = setup.held_limits[on == "test"], partial(mlp, setup.sizes)
    make = partial(permuted_mnist, setup.tasks, setup.train_limit, held, seed=seed)
    with one_thread(setup.small):
        return [
            outcome.record for outcome in sweep([Run(make, m, network, setup.settings, seed, 0, on) for m in methods])
        ]


def _joint(setup: Many, count: int, seed: int) -> float:
    """Average test accuracy on `count` tasks of one training on all of their images together."""
    make = partial(permuted_mnist, count, setup.train_limit, setup.held_limits[1], seed=seed)
    model, everything = mlp(setup.sizes, seed).to(device()), together(make)[0]
    with one_thread(setup.small):
        fit(model, everything.train, Diagonal.isotropic(snapshot(model)), 0.0, setup.settings, generator(1000 * seed))
    return accuracy(model, everything.test)


@dataclass
class Growth:
    """One sequence a method: how the penalty grows with the tasks, and how its oldest part ages."""

    trace: dict[str, list[float]]  #: By method, after each task: trace of the precision over that of the first task.
    size: dict[str, list[float]]  #: Trace of the first task's Fisher at each later mode, over that at its own.
    direction: dict[str, list[float]]  #: The cosine between the two.
    unsure: dict[str, list[float]]  #: Mean unsureness, 1 - sum_c p_c^2, of the first task's images at each mode.


def growth(setup: Many, strengths: Mapping[str, float], seed: int) -> Growth:
    """The loop of the book by hand, with a look at the belief after each task, for methods that keep one penalty."""
    made, found = families(setup), Growth({}, {}, {}, {})
    tasks = permuted_mnist(setup.tasks, setup.train_limit, setup.held_limits[1], seed=seed)
    probe = tasks[0].train[: setup.fisher_images]
    for name, strength in strengths.items():
        model, method = mlp(setup.sizes, seed).to(device()), made[name](strength)
        belief, traces, fishers, unsure = method.prior(snapshot(model)), [], [], []
        for i, task in enumerate(tasks):
            train = task.train
            fit(model, train, belief, strength, setup.settings, generator(1000 * seed + i), name=task.name)
            belief = method.consolidate(model, train, belief)
            assert isinstance(belief, Diagonal)
            traces.append(fisher.trace(belief.precision))
            fishers.append(fisher.diagonal(model, probe))
            with torch.no_grad():
                unsure.append((1 - model(probe.x).softmax(1).square().sum(1)).mean().item())
        found.trace[name] = [value / traces[0] for value in traces]
        found.size[name] = [fisher.trace(later) / fisher.trace(fishers[0]) for later in fishers]
        found.direction[name] = [metrics.cosine(later, fishers[0]) for later in fishers]
        found.unsure[name] = unsure
    return found
