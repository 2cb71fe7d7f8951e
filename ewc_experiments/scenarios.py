r"""Split MNIST and split Fashion-MNIST as three problems, and what becomes of each method. Chapter "Where it fails".

One network, one protocol: trunk, optimiser, steps and data are the same for all methods; each method's strength is
chosen on validation data, on seeds that are not reported, for each data set and scenario anew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_code import consolidation, importance, metrics, storage
from ewc_code.consolidation import Method
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief
from ewc_code.models import evaluating, mlp, multi_head, restore, snapshot
from ewc_code.sweep import Outcome, Run, sweep
from ewc_code.tasks import SCENARIOS, Scenario, Task, split
from ewc_code.training import Record, Settings, fit, learn
from ewc_experiments.comparison import Chosen
from ewc_experiments.workers import one_thread, workers

Family = Callable[[float, int], Method]  # (strength, seed) -> method
PAIRS = 5  #: Tasks of two classes.
DECAY = 0.9  #: Of online EWC: what is ten tasks old counts for a third.


@dataclass(frozen=True)
class Split:
    """Settings of the comparison."""

    sets: tuple[str, ...] = ("MNIST", "FashionMNIST")  #: As `data.load` takes them.
    hidden: tuple[int, ...] = (24, 24)  #: Units of the hidden layers.
    train_limit: int | None = 400  #: Training examples a task, at most; None for all.
    held_limit: int | None = 400  #: Validation and test examples a task, at most.
    settings: Settings = Settings(epochs=6, batch_size=25, learning_rate=6e-3, decay=False)  #: On each task.
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  #: Of the reported runs: initial weights, order of examples, what is kept.
    choosing: tuple[int, ...] = (100,)  #: Of the runs that choose the strengths; none of `seeds`.
    kept: int = 40  #: Examples of each task that replay keeps.
    examples: int | None = 200  #: For the Fisher and MAS, of each task.
    damping: float = 1e-3  #: Of SI, squared units of a weight.
    # Strengths to choose from.
    l2: tuple[float, ...] = (0.1, 1.0)
    ewc: tuple[float, ...] = (1e3, 1e4, 1e5)  #: Of online EWC, too.
    kronecker: tuple[float, ...] = (30.0, 300.0)
    si: tuple[float, ...] = (0.3, 3.0)
    mas: tuple[float, ...] = (0.1, 1.0)
    lwf: tuple[float, ...] = (0.3, 1.0)
    replay: tuple[float, ...] = (0.3, 1.0)

    @property
    def small(self) -> bool:
        """Whether the networks are too small for two threads to share a step."""
        return max(self.hidden) <= 100

    def __post_init__(self) -> None:
        if both := set(self.seeds) & set(self.choosing):
            raise ValueError(f"seeds that choose must not be reported; both hold {both}.")


SPLIT = {
    "smoke": Split(
        hidden=(20, 20), train_limit=240, held_limit=200, seeds=(0, 1, 2), examples=100,
        settings=Settings(epochs=6, batch_size=20, learning_rate=6e-3, decay=False),
        l2=(0.1,), ewc=(1e4,), kronecker=(100.0,), si=(1.0,), mas=(0.3,), lwf=(0.3,), replay=(1.0,),
    ),
    "laptop": Split(),
    "paper": Split(
        hidden=(400, 400), train_limit=None, held_limit=None, kept=200, examples=1000,
        damping=0.1, settings=Settings(epochs=26, batch_size=128, learning_rate=1e-3, decay=False),
        l2=(0.01, 0.1, 1.0, 10.0), ewc=(1e3, 1e4, 1e5, 1e6), kronecker=(10.0, 100.0, 1000.0, 1e4),
        si=(1.0, 10.0, 100.0, 1e3), mas=(0.01, 0.1, 1.0, 10.0), lwf=(0.3, 1.0, 3.0),
    ),
}  # fmt: skip


def families(setup: Split) -> dict[str, tuple[Family, tuple[float, ...]]]:
    """Every method that has a strength: what makes it of a strength and a seed, and the strengths to choose from."""
    some = setup.examples
    fixed: dict[str, tuple[Callable[[float], Method], tuple[float, ...]]] = {
        "L2": (consolidation.l2, setup.l2),
        "EWC": (partial(consolidation.ewc, examples=some), setup.ewc),
        "online EWC": (partial(consolidation.online_ewc, decay=DECAY, examples=some), setup.ewc),
        "SI": (partial(consolidation.si, damping=setup.damping), setup.si),
        "MAS": (partial(consolidation.mas, examples=some), setup.mas),
        "Kronecker": (partial(consolidation.kronecker, examples=some), setup.kronecker),
        "LwF": (consolidation.lwf, setup.lwf),
    }
    found: dict[str, tuple[Family, tuple[float, ...]]] = {
        name: (partial(_any_seed, family), ladder) for name, (family, ladder) in fixed.items()
    }
    return found | {"replay": (partial(replayed, setup), setup.replay)}


def replayed(setup: Split, strength: float, seed: int, kept: int | None = None) -> Method:
    """Experience replay, in which the seed also says which examples are kept, `setup.kept` a task or so many."""
    return consolidation.replay(kept or setup.kept, strength, seed, setup.settings.batch_size)


def joint(setup: Split, _strength: float, seed: int) -> Method:
    """Everything is kept: what the others are compared with."""
    return consolidation.joint(seed, setup.settings.batch_size)


def _any_seed(family: Callable[[float], Method], strength: float, _seed: int) -> Method:
    return family(strength)


def _plain(_strength: float, _seed: int) -> Method:
    return consolidation.none()


def methods(setup: Split, strengths: dict[str, float]) -> dict[str, tuple[Family, float]]:
    """Each method with a strength given, plain training before them and joint training after them."""
    given = {name: (family, strengths[name]) for name, (family, _) in families(setup).items() if name in strengths}
    return {"plain": (_plain, 0.0)} | given | {"joint": (partial(joint, setup), 1.0)}


def network(scenario: Scenario, hidden: tuple[int, ...], seed: int) -> nn.Module:
    """The network of a scenario, always on the same trunk: a head of two for each task, one head of two, one of ten."""
    if scenario == "task":
        return multi_head((784, *hidden, 2), PAIRS, seed)
    return mlp((784, *hidden, 2 if scenario == "domain" else 2 * PAIRS), seed)


@dataclass
class Entry:
    """One method in one scenario on one data set."""

    method: str  #: Name.
    strength: float  #: lambda, chosen or given.
    chosen: Chosen | None  #: What was tried; None where there was nothing to choose.
    records: list[Record]  #: One a seed.

    def summary(self, measure: Callable[[Tensor], float] = metrics.average_accuracy) -> metrics.Interval:
        """Interval over the seeds of a measure of the accuracy matrix."""
        return metrics.interval([measure(record.matrix) for record in self.records])


#: By data set, scenario and method.
Table = dict[str, dict[str, dict[str, Entry]]]


#: What is recorded at paper scale: all methods in all scenarios would take a CPU a night.
RECORDED: dict[Scenario, tuple[str, ...]] = {"task": ("EWC", "online EWC", "SI"), "class": ("EWC", "replay")}


def compare(
    setup: Split,
    progress: Callable[[str], None] = lambda _: None,
    only: Mapping[Scenario, Sequence[str]] | None = None,
    folder: Path | None = None,
) -> Table:
    """Choose every strength on validation data, then every method on fresh seeds and the test data.

    `only` names scenarios and their methods; all by default. `folder`: as for `sweep.sweep`; with it each method is a
    piece of work, and no run waits for others to be kept.
    """
    every = ("plain", *families(setup), "joint")
    # Larger networks would do with two threads, too, but there are more than enough of them to give each its own.
    with workers(small=True) as pool:
        asked = [
            (name, scenario, pool(_entries, setup, name, scenario, lot, folder))
            for name in setup.sets
            for scenario, wanted in (only or dict.fromkeys(SCENARIOS, every)).items()
            for lot in ([(method,) for method in wanted] if folder else [wanted])
        ]
        found: Table = {}
        for name, scenario, result in asked:
            entries = result()
            found.setdefault(name, {}).setdefault(scenario, {}).update(entries)
            progress(f"{name}, {scenario}-incremental: {len(entries)} methods, {len(setup.seeds)} seeds each")
    return found


def _entries(
    setup: Split, name: str, scenario: Scenario, wanted: Sequence[str], folder: Path | None
) -> dict[str, Entry]:
    """All methods wanted in one scenario on one data set."""
    chosen = _choose(setup, name, scenario, wanted, folder)
    made = methods(setup, {method: picked.best for method, picked in chosen.items()})
    made = {method: value for method, value in made.items() if method in wanted}
    outcomes = learned(setup, name, scenario, list(made.values()), setup.seeds, folder=folder)
    return {
        method: Entry(method, strength, chosen.get(method), _records(method, row))
        for (method, (_, strength)), row in zip(made.items(), outcomes, strict=True)
    }


def _choose(
    setup: Split, name: str, scenario: Scenario, wanted: Sequence[str], folder: Path | None
) -> dict[str, Chosen]:
    """The best strength of each method on validation data; a run that diverged counts as none right.

    Where only one is offered there is nothing to choose.
    """
    every = {method: made for method, made in families(setup).items() if method in wanted}
    offered = [(method, family, s) for method, (family, ladder) in every.items() for s in ladder if len(ladder) > 1]
    tried = [(family, s) for _, family, s in offered]
    rows = learned(setup, name, scenario, tried, setup.choosing, "validation", folder)
    found: dict[str, Chosen] = {}
    for method, (_, ladder) in every.items():
        if len(ladder) == 1:
            found[method] = Chosen(method, list(ladder), [], ladder[0])
            continue
        own = [row for (other, _, _), row in zip(offered, rows, strict=True) if other == method]
        last = [[o.record.accuracy[-1] if o.record else [0.0] * PAIRS for o in row] for row in own]
        validation = torch.tensor(last).mean(1)  # (strengths, tasks)
        found[method] = Chosen(method, list(ladder), validation.tolist(), ladder[int(validation.mean(1).argmax())])
    return found


def learned(
    setup: Split,
    name: str,
    scenario: Scenario,
    made: Sequence[tuple[Family, float]],
    seeds: Sequence[int],
    evaluate_on: Literal["test", "validation"] = "test",
    folder: Path | None = None,
) -> list[list[Outcome]]:
    """A row of outcomes for each method and strength, one a seed.

    Diagonal Gaussians fill one stack, because one belief of another kind in it would have all asked one by one.
    """
    stack = 1 if folder else 60
    make = partial(split, name, scenario, setup.train_limit, setup.held_limit)
    build = partial(network, scenario, setup.hidden)
    runs = [
        Run(make, family(strength, seed), build, setup.settings, seed, 0, evaluate_on)
        for family, strength in made
        for seed in seeds
    ]
    other = {run.key: run.method.name in ("LwF", "replay", "joint", "Kronecker") for run in runs}
    found: dict[str, Outcome] = {}
    for group in ([r for r in runs if not other[r.key]], [r for r in runs if other[r.key]]):
        with one_thread(setup.small):
            found |= {run.key: outcome for run, outcome in zip(group, sweep(group, None, folder, stack), strict=True)}
    outcomes = [found[run.key] for run in runs]
    return [outcomes[i : i + len(seeds)] for i in range(0, len(runs), len(seeds))]


def _records(method: str, row: Sequence[Outcome]) -> list[Record]:
    if errors := [outcome.error for outcome in row if outcome.error]:
        raise FloatingPointError(f"every reported run of {method} must stay finite; got: {'; '.join(errors)}")
    return [outcome.record for outcome in row if outcome.record]


def as_markdown(table: dict[str, dict[str, Entry]], published: dict[str, tuple[str, str, str]]) -> str:
    """Average accuracies of one data set as a Markdown table, a row a method, with the strengths that were chosen.

    With published numbers (task, domain, class, by method) there is a column for them.
    """
    head = ["method", *(f"{scenario}-incremental" for scenario in table), *(["published"] if published else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    entries = [entry for by_method in table.values() for entry in by_method.values()]
    order = ["plain", *families(Split()), "joint"]
    for method in sorted({entry.method for entry in entries}, key=order.index):
        cells = [method]
        for entry in (by_method.get(method) for by_method in table.values()):
            cells.append(f"{entry.summary()}{f', λ = {entry.strength:g}' if entry.chosen else ''}" if entry else "–")
        if published:
            cells.append(" / ".join(published.get(method, ("–",))))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def stored(table: dict[str, dict[str, Entry]]) -> dict[str, Any]:
    """What a recording keeps of one data set, for JSON: strengths, what chose them, and the accuracy matrices."""
    return {
        scenario: {
            name: asdict(replace(entry, records=[Record(r.names, r.accuracy) for r in entry.records]))
            for name, entry in entries.items()
        }
        for scenario, entries in table.items()
    }


def restored(kept: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    """The inverse of `stored`."""
    found: dict[str, dict[str, Entry]] = {}
    for scenario, entries in kept.items():
        found[scenario] = {
            name: Entry(
                name,
                entry["strength"],
                entry["chosen"] and Chosen(**entry["chosen"]),
                [Record(**record) for record in entry["records"]],
            )
            for name, entry in entries.items()
        }
    return found


@dataclass
class Cost:
    """What a method takes."""

    numbers: int  #: Kept beside the network after the last task.
    seconds: float  #: For all tasks, one run alone on the device.


def costs(setup: Split, strengths: dict[str, float], name: str = "MNIST") -> dict[str, Cost]:
    """Memory and time of each method, one run each, class-incremental; the evaluations are not counted."""
    found = {}
    for method, (family, strength) in methods(setup, strengths).items():
        made, model = family(strength, 0), network("class", setup.hidden, 0).to(device())
        belief, started = made.prior(snapshot(model)), time.perf_counter()
        for i, task in enumerate(split(name, "class", setup.train_limit, setup.held_limit)):
            path = made.path(model)
            with one_thread(setup.small), evaluating(model):
                fit(model, task.train, belief, made.strength, setup.settings, generator(i), None, task.name, path.work)
                belief = made.consolidate(model, task.train, belief, path)
        found[method] = Cost(storage.numbers(belief), time.perf_counter() - started)
    return found


@dataclass
class Watched:
    """One run, looked at after every step of the later tasks; about the first task's test images."""

    steps: list[int] = field(default_factory=list)  #: Since the first task ended.
    accuracy: list[float] = field(default_factory=list)  #: On the first task.
    lost: list[float] = field(default_factory=list)  #: Share of its images that are put into a class of another task.
    within: list[float] = field(default_factory=list)  #: Its accuracy when only its own classes may be answered.
    lead: list[float] = field(default_factory=list)  #: Mean of its largest own logit minus the largest other one.


def watch(
    setup: Split, scenario: Scenario, made: dict[str, tuple[Family, float]], tasks: int = 2
) -> dict[str, list[Watched]]:
    """Split MNIST: the first `tasks` tasks, with a look after every step from the second on; one a seed, by method."""
    sequence = split("MNIST", scenario, setup.train_limit, setup.held_limit)[:tasks]
    found: dict[str, list[Watched]] = {}
    for name, (family, strength) in made.items():
        with one_thread(setup.small):
            found[name] = [_watched(setup, scenario, sequence, family(strength, seed), seed) for seed in setup.seeds]
    return found


def _watched(setup: Split, scenario: Scenario, sequence: Sequence[Task], method: Method, seed: int) -> Watched:
    model = network(scenario, setup.hidden, seed).to(device())
    belief, seen, old, before = method.prior(snapshot(model)), Watched(), sequence[0].test, 0

    def look(step: int, steps: int) -> None:
        if step or not seen.steps:
            seen.steps.append(before + step)
            with evaluating(model), torch.no_grad():
                logits = model(old.x)
            seen.accuracy.append((logits.argmax(1) == old.y).float().mean().item())
            seen.within.append((logits[:, :2].argmax(1) == old.y).float().mean().item())
            others = logits[:, 2:].max(1).values if logits.shape[1] > 2 else logits.new_full((len(logits),), -torch.inf)
            ahead = logits[:, :2].max(1).values - others
            seen.lost.append((ahead < 0).float().mean().item())
            seen.lead.append(ahead.mean().item())

    for i, task in enumerate(sequence):
        path, order = method.path(model), generator(1000 * seed + i)
        looks = look if i else None
        fit(model, task.train, belief, method.strength, setup.settings, order, looks, task.name, path.work)
        with evaluating(model):
            belief = method.consolidate(model, task.train, belief, path)
        before = seen.steps[-1] if i else 0
    return seen


def put_back(setup: Split, family: Family, strength: float) -> dict[str, list[float]]:
    """Class by class, after two tasks: share of the first one's test images that are put into a class of the second.

    One a seed, by what of the network was put back to where it stood before the second task.
    """
    sequence = split("MNIST", "class", setup.train_limit, setup.held_limit)[:2]
    found: dict[str, list[float]] = {}
    for seed in setup.seeds:
        model = network("class", setup.hidden, seed).to(device())
        kept: list[dict[str, Tensor]] = []
        with one_thread(setup.small):
            learn(model, sequence, family(strength, seed), setup.settings, seed,
                  keep=lambda *_, model=model, kept=kept: kept.append(snapshot(model)))  # fmt: skip
        before, after = kept
        weight, bias = list(after)[-2:]
        for what, names in {"nothing": (), "biases": (bias,), "last layer": (weight, bias)}.items():
            restore(model, after | {name: before[name] for name in names})
            with evaluating(model), torch.no_grad():
                answers = model(sequence[0].test.x).argmax(1)
            found.setdefault(what, []).append((answers > 1).float().mean().item())
    return found


@dataclass
class Diagnosis:
    """What is wrong with a network that learned class by class, in accuracies over the test images of all tasks."""

    accuracy: float  #: As it is, among all classes.
    within: float  #: When the classes of the image's own task alone may be answered.
    newest: float  #: Share of all images that are put into a class of the last task.
    shifted: float  #: With one number a task added to its logits, the numbers fitted on validation images of all tasks.
    refitted: float  #: With a new last layer fitted to all tasks' training images, the rest left as it is.
    own_wins: float  #: Share whose task has the largest logit.


def diagnose(setup: Split, made: dict[str, tuple[Family, float]], name: str = "MNIST") -> dict[str, list[Diagnosis]]:
    """Learn class by class, and take the network apart; one a seed, by method."""
    sequence = split(name, "class", setup.train_limit, setup.held_limit)
    found: dict[str, list[Diagnosis]] = {}
    for method, (family, strength) in made.items():
        for seed in setup.seeds:
            model = network("class", setup.hidden, seed).to(device())
            with one_thread(setup.small):
                learn(model, sequence, family(strength, seed), setup.settings, seed)
                found.setdefault(method, []).append(_diagnosed(model, sequence))
    return found


def _diagnosed(model: nn.Module, sequence: Sequence[Task]) -> Diagnosis:
    assert isinstance(model, nn.Sequential)
    train, held, test = (_whole([getattr(t, part) for t in sequence]) for part in ("train", "validation", "test"))
    with torch.no_grad():
        features = {part: model[:-1](part_.x) for part, part_ in (("train", train), ("test", test))}
        logits, held_logits = model(test.x), model(held.x)
    right = (logits.argmax(1) == test.y).float().mean().item()
    own = torch.stack([test.y // 2 * 2, test.y // 2 * 2 + 1], dim=1)  # the classes of each image's task
    within = logits.gather(1, own).argmax(1) == test.y % 2
    task_of = logits.argmax(1) // 2
    shifts = fit_shifts(held_logits, held.y)
    shifted = logits + shifts.repeat_interleave(2)
    weight = fit_layer(features["train"], train.y, 2 * PAIRS)
    refitted = _with_one(features["test"]) @ weight.T
    return Diagnosis(
        right,
        within.float().mean().item(),
        (task_of == PAIRS - 1).float().mean().item(),
        (shifted.argmax(1) == test.y).float().mean().item(),
        (refitted.argmax(1) == test.y).float().mean().item(),
        (task_of == test.y // 2).float().mean().item(),
    )


def fit_shifts(logits: Float[Tensor, "n k"], y: Tensor) -> Float[Tensor, " t"]:
    """One number a task, added to the logits of its two classes, that makes the labels most likely."""
    shifts = torch.zeros(logits.shape[1] // 2, device=logits.device, requires_grad=True)
    _minimise([shifts], lambda: F.cross_entropy(logits + shifts.repeat_interleave(2), y) + 1e-6 * shifts.square().sum())
    return shifts.detach()


def fit_layer(features: Float[Tensor, "n d"], y: Tensor, classes: int, decay: float = 1e-4) -> Float[Tensor, "k e"]:
    """Softmax regression on features, [W b] with a slight weight decay."""
    weight = torch.zeros(classes, features.shape[1] + 1, device=features.device, requires_grad=True)
    _minimise([weight], lambda: F.cross_entropy(_with_one(features) @ weight.T, y) + decay * weight.square().sum())
    return weight.detach()


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> None:
    descent = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        descent.zero_grad()
        value = loss()
        value.backward()
        return value

    descent.step(closure)


def _with_one(features: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


def _whole(parts: Sequence[Examples]) -> Examples:
    return Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def buffers(setup: Split, sizes: Sequence[int], name: str = "MNIST") -> dict[int, list[Record]]:
    """Class-incremental replay at Bayes' strength with so many examples of each task; records by size, one a seed."""
    made: list[tuple[Family, float]] = [(partial(replayed, setup, kept=size), 1.0) for size in sizes]
    rows = learned(setup, name, "class", made, setup.seeds)
    return {size: _records(f"replay of {size}", row) for size, row in zip(sizes, rows, strict=True)}


def one_step(setup: Split, made: dict[str, tuple[Family, float]], seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Parameters before ('start') and after ONE step of gradient descent on the second task, by method.

    Domain-incremental split MNIST; the step is on all of the second task's examples at once. The first task is fitted
    as far as the settings go, so its own gradient has not quite vanished, which replay and joint training see.
    """
    first, second = split("MNIST", "domain", setup.train_limit, setup.held_limit)[:2]
    model = network("domain", setup.hidden, seed).to(device())
    flat = consolidation.none().prior(snapshot(model))
    path = importance.Path.begin(model, tracked=True)  # for SI, whose belief is the work of this training
    with one_thread(setup.small):
        fit(model, first.train, flat, 0.0, setup.settings, generator(seed), work=path.work)
    start = snapshot(model)
    found = {"start": start}
    once = Settings(epochs=1, batch_size=len(second.train), learning_rate=0.1, decay=False, optimiser="sgd")
    for name, (family, strength) in made.items():
        restore(model, start)
        method = family(strength, seed)
        belief: Belief = method.consolidate(model, first.train, method.prior(snapshot(model)), path)
        fit(model, second.train, belief, strength, once, generator(seed))
        found[name] = snapshot(model)
    return found
