r"""A reader's own network: convolutions, BatchNorm, dropout, its own loaders and loop. Chapter "Your own model".

The loop is written as users write it, with EWC as the one line that adds `strength / n * belief.energy(theta)`.
"""

import copy
import statistics as statistics_
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ewc_code import metrics
from ewc_code.data import Examples, load
from ewc_code.environment import device, generator
from ewc_code.fisher import Batch
from ewc_code.gaussian import Belief, Diagonal
from ewc_code.laplace import laplace
from ewc_code.models import Params, multi_head, snapshot
from ewc_code.tasks import split
from ewc_code.training import accuracy
from ewc_experiments.workers import one_thread, workers


@dataclass(frozen=True)
class Own:
    """Settings of the comparison."""

    channels: tuple[int, int] = (8, 16)  #: Of the two convolutions.
    dropout: float = 0.25  #: Before the last layer.
    train_limit: int = 2000  #: Images of each task.
    held_limit: int = 1000  #: Validation and test images of each task.
    epochs: int = 3  #: On each task.
    batch_size: int = 50  #: Images a step.
    learning_rate: float = 3e-3  #: Of Adam, falling linearly to zero.
    examples: int = 1000  #: Images that the Fisher is taken from.
    few: int = 50  #: Images of the old task that are kept where most are gone.
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  #: Of the reported runs.
    choosing: tuple[int, ...] = (100,)  #: Of the runs that choose the strength.
    ewc: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3)  #: Strengths to choose from.

    @property
    def small(self) -> bool:
        """Whether the network is too small for two threads to share a step."""
        return max(self.channels) <= 16


OWN = {
    "smoke": Own((4, 8), train_limit=1000, held_limit=300, epochs=5, examples=200, seeds=(0, 1, 2), ewc=(30.0, 300.0)),
    "laptop": Own(),
    "paper": Own(
        (32, 64), train_limit=50_000, held_limit=10_000, epochs=10, batch_size=128, learning_rate=1e-3, examples=5000,
        seeds=tuple(range(5)), choosing=(100, 101), ewc=(1.0, 10.0, 100.0, 1e3, 1e4),
    ),
}  # fmt: skip
OLD, NEW = "FashionMNIST", "MNIST"


def network(setup: Own, seed: int) -> nn.Sequential:
    """Two convolutions with BatchNorm, dropout, a linear layer: images (n, 784) to logits (n, 10)."""
    one, two = setup.channels
    with torch.random.fork_rng():  # torch's own layers draw from the global generator
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, one, 5, stride=2, padding=2), nn.BatchNorm2d(one), nn.ReLU(),
            nn.Conv2d(one, two, 3, stride=2, padding=1), nn.BatchNorm2d(two), nn.ReLU(),
            nn.Flatten(), nn.Dropout(setup.dropout), nn.Linear(two * 49, 10),
        ).to(device())  # fmt: skip


@dataclass(frozen=True)
class Loaders:
    """One data set as loaders of (images, labels) on the CPU, in batches."""

    train: DataLoader
    validation: Examples
    test: Examples

    @property
    def n(self) -> int:
        """Training images."""
        return len(self.train.dataset)  # type: ignore[arg-type]


def loaders(setup: Own, name: str, seed: int) -> Loaders:
    """A data set as a reader has it: a shuffled DataLoader, whose order the seed draws."""
    images = load(name)
    some = images.train[: setup.train_limit]
    pairs = TensorDataset(some.x.cpu(), some.y.cpu())
    train = DataLoader(pairs, setup.batch_size, shuffle=True, generator=generator(seed))
    return Loaders(train, images.validation[: setup.held_limit], images.test[: setup.held_limit])


def train(
    setup: Own,
    model: nn.Module,
    loader: DataLoader,
    belief: Belief | None = None,
    strength: float = 0.0,
    n: int = 1,
    statistics: bool = True,
    seed: int = 0,
) -> None:
    """A training loop as readers have one; without `statistics` BatchNorm's running ones stay as they are."""
    steps, optimiser = setup.epochs * len(loader), torch.optim.Adam(model.parameters(), setup.learning_rate)
    theta: Params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    with torch.random.fork_rng(), one_thread(setup.small):
        torch.manual_seed(seed)  # of dropout
        for _ in range(setup.epochs):
            model.train()
            if not statistics:
                freeze_statistics(model)
            for x, y in loader:
                loss = F.cross_entropy(model(x.to(device())), y.to(device()))
                if belief is not None:
                    loss = loss + strength / n * belief.energy(theta)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                falling.step()
    model.eval()


def freeze_statistics(model: nn.Module) -> None:
    """BatchNorm in evaluation mode: its statistics are used and no longer moved; all else stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of BatchNorm's running means and variances, by name."""
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def with_statistics(model: nn.Module, found: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with these statistics in place of its own."""
    model = copy.deepcopy(model)
    model.load_state_dict(found, strict=False)
    return model


def passed_through(model: nn.Module, loader: DataLoader) -> nn.Module:
    """A copy of the model through which the data went in training mode, without a step: only statistics move."""
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for x, _ in loader:
            model(x.to(device()))
    return model.eval()


def some_batches(loader: Iterable[Batch], examples: int) -> list[Batch]:
    """The first batches that hold so many examples, or all."""
    found, n = list[Batch](), 0
    for x, y in loader:
        if n >= examples:
            break
        found.append((x, y))
        n += len(y)
    return found


@dataclass
class Story:
    """One seed: accuracies on the test data, old task and new."""

    before: float  #: On the old task, before the new one.
    after: dict[str, tuple[float, float]] = field(default_factory=dict)  #: By method, (old, new).
    put_back: dict[str, float] = field(default_factory=dict)  #: On the old task, with its own statistics put back.
    alike: dict[str, float] = field(default_factory=dict)  #: Cosine of each source's Fisher with the old data's.
    trace: dict[str, float] = field(default_factory=dict)  #: Of its trace over the old data's.


@dataclass
class Comparison:
    """What came out."""

    tried: dict[float, list[float]]  #: Mean validation accuracy of both tasks, by strength, one a choosing seed.
    strength: float  #: The best.
    stories: list[Story]  #: One a seed.

    def interval(self, method: str, which: int) -> metrics.Interval:
        """Test accuracy over the seeds, `which` 0 for the old task and 1 for the new one."""
        return metrics.interval([story.after[method][which] for story in self.stories])


#: What stands for the old data in the Fisher, by name.
SOURCES = ("old data", "few old images", "new images", "noise")


def compare(setup: Own, progress: Callable[[str], None] = lambda _: None) -> Comparison:
    """Choose EWC's strength on validation data; then each way of training on fresh seeds and test data."""
    with workers(setup.small) as pool:
        waiting = [(s, pool(_tried, setup, seed, s)) for s in setup.ewc for seed in setup.choosing]
        tried: dict[float, list[float]] = {}
        for strength, result in waiting:
            tried.setdefault(strength, []).append(result())
        best = max(tried, key=lambda s: sum(tried[s]))
        progress(f"strength {best:g}")
        stories = [result() for result in [pool(_story, setup, best, seed) for seed in setup.seeds]]
    return Comparison(tried, best, stories)


def learned_old(setup: Own, seed: int) -> tuple[nn.Module, Loaders, Loaders]:
    """A network that knows the old task, and both tasks."""
    old, new = loaders(setup, OLD, seed), loaders(setup, NEW, seed + 1000)
    model = network(setup, seed)
    train(setup, model, old.train, seed=seed)
    return model, old, new


def believed(setup: Own, model: nn.Module, old: Loaders) -> Diagonal:
    """The belief after the old task, from some of its batches; N counts all its images."""
    return _scaled(laplace(model, some_batches(old.train, setup.examples), flat(model)), old.n, setup)


def flat(model: nn.Module) -> Diagonal:
    """What is believed before anything is known."""
    return Diagonal.isotropic(snapshot(model))


def _scaled(belief: Diagonal, n: int, setup: Own, used: int | None = None) -> Diagonal:
    used = used or min(n, -(-setup.examples // setup.batch_size) * setup.batch_size)
    return Diagonal(belief.mean, {name: n / used * value for name, value in belief.precision.items()})


def stand_ins(setup: Own, model: nn.Module, old: Loaders, new: Loaders, seed: int) -> dict[str, Diagonal]:
    """Beliefs about the old task from what may be left of it, by `SOURCES`; all as if of its n images."""
    draw = generator(seed)
    x, y = next(iter(old.train))
    few: list[Batch] = [(x[: setup.few], y[: setup.few])]
    other = some_batches(new.train, setup.examples)
    noise: list[Batch] = [(torch.rand(x.shape, generator=draw), y) for x, y in other]
    made = {"old data": believed(setup, model, old)}
    for name, batches in zip(SOURCES[1:], (few, other, noise), strict=True):
        used = sum(len(y) for _, y in batches)
        made[name] = _scaled(laplace(model, batches, flat(model)), old.n, setup, used)
    return made


def _tried(setup: Own, seed: int, strength: float) -> float:
    model, old, new = learned_old(setup, seed)
    train(setup, model, new.train, believed(setup, model, old), strength, new.n, False, seed)
    return (accuracy(model, old.validation) + accuracy(model, new.validation)) / 2


def _story(setup: Own, strength: float, seed: int) -> Story:
    model, old, new = learned_old(setup, seed)
    own, beliefs = statistics(model), stand_ins(setup, model, old, new, seed)
    story, whole = Story(accuracy(model, old.test)), beliefs["old data"].precision
    ways: dict[str, tuple[Belief | None, bool]] = {
        "plain": (None, True),
        "plain, statistics frozen": (None, False),
        "EWC, statistics moving": (beliefs["old data"], True),
        "EWC": (beliefs["old data"], False),
    }
    ways |= {f"EWC, {name}": (beliefs[name], False) for name in SOURCES[1:]}
    for name, (belief, moving) in ways.items():
        after = copy.deepcopy(model)
        new = loaders(setup, NEW, seed + 1000)  # the same order of images for every way
        train(setup, after, new.train, belief, strength, new.n, moving, seed)
        story.after[name] = (accuracy(after, old.test), accuracy(after, new.test))
        story.put_back[name] = accuracy(with_statistics(after, own), old.test)
    total = sum(value.sum().item() for value in whole.values())
    for name, belief in beliefs.items():
        story.alike[name] = metrics.cosine(belief.precision, whole)
        story.trace[name] = sum(value.sum().item() for value in belief.precision.values()) / total
    return story


def absorbed(model: nn.Module, found: dict[str, Tensor]) -> Params:
    r"""Parameters with which the model answers, on its present statistics, as it does on the statistics `found`.

        gamma' = gamma s / s~,   beta' = beta + gamma (m - m~) / s~,    s^2 = variance + eps; m~, s~ those of `found`

    A move of BatchNorm's statistics is a move of its scale and shift, which a belief can weigh.
    """
    theta = snapshot(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            own = (module.running_var + module.eps).sqrt()
            other = (found[f"{name}.running_var"] + module.eps).sqrt()
            gamma, moved = theta[f"{name}.weight"], module.running_mean - found[f"{name}.running_mean"]
            theta[f"{name}.weight"] = gamma * own / other
            theta[f"{name}.bias"] = theta[f"{name}.bias"] + gamma * moved / other
    return theta


@dataclass(frozen=True)
class Heads:
    """A network with a head a task, clothes two classes at a time, learned with the reader's loop."""

    accuracy: dict[str, list[float]]  #: Mean over all tasks after the last one, by method, one a seed.
    first: dict[str, list[float]]  #: The same on the first task alone.
    strength: float  #: Chosen on validation data.


def heads(setup: Own, strengths: tuple[float, ...] = (1e2, 1e3, 1e4)) -> Heads:
    """Split Fashion-MNIST with the task told: plain training and EWC, whose strength is chosen on validation data."""
    with workers(small=True) as pool:
        offered = [(s, seed, pool(_heads, setup, seed, s, "validation")) for s in strengths for seed in setup.choosing]
        tried: dict[float, float] = {}
        for strength, _, result in offered:
            tried[strength] = tried.get(strength, 0.0) + sum(result())
        best = max(tried, key=lambda s: tried[s])
        runs = {name: [pool(_heads, setup, seed, s, "test") for seed in setup.seeds]
                for name, s in (("plain", 0.0), ("EWC", best))}  # fmt: skip
        found = {name: [result() for result in row] for name, row in runs.items()}
    return Heads(
        {name: [sum(row) / len(row) for row in rows] for name, rows in found.items()},
        {name: [row[0] for row in rows] for name, rows in found.items()},
        best,
    )


def one_pair(setup: Own) -> tuple[nn.Module, DataLoader]:
    """A fresh network with five heads, and the first pair of classes as a loader, whose last column asks the head."""
    task = split("FashionMNIST", "task", setup.train_limit // 4, setup.held_limit // 2)[0]
    pairs = TensorDataset(task.train.x.cpu(), task.train.y.cpu())
    return multi_head((784, 32, 2), 5).to(device()), DataLoader(pairs, setup.batch_size)


def _heads(setup: Own, seed: int, strength: float, part: Literal["validation", "test"]) -> list[float]:
    tasks = split("FashionMNIST", "task", setup.train_limit // 4, setup.held_limit // 2)
    model = multi_head((784, 32, 2), len(tasks), seed).to(device())
    belief = flat(model)
    for task in tasks:
        pairs = TensorDataset(task.train.x.cpu(), task.train.y.cpu())
        loader = DataLoader(pairs, setup.batch_size, shuffle=True, generator=generator(seed))
        train(setup, model, loader, belief, strength, len(pairs), seed=seed)
        belief = laplace(model, loader, belief)
    return [accuracy(model, getattr(task, part)) for task in tasks]


@dataclass(frozen=True)
class Overhead:
    """Median seconds of a training step, plain and with EWC, measured in turn in one run."""

    plain: float
    ewc: float

    @property
    def ratio(self) -> float:
        """Of a step with EWC to one without."""
        return self.ewc / self.plain


def overhead(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], repeats: int = 40, learning_rate: float = 1e-3
) -> Overhead:
    """Time steps of Adam with and without a diagonal belief's energy, in turn, so that both see the same machine.

    `loss` gives the mean loss of one batch, always the same. The model is left as it is.
    """
    model = copy.deepcopy(model).train()
    spent: tuple[list[float], list[float]] = ([], [])
    belief = Diagonal(snapshot(model), {name: torch.ones_like(value) for name, value in snapshot(model).items()})
    theta: Params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.Adam(model.parameters(), learning_rate)
    for step in range(2 * (repeats + 3)):
        begun = time.perf_counter()
        value = loss(model)
        if step % 2:
            value = value + 1e-3 * belief.energy(theta)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        value.item()  # waits for an accelerator
        spent[step % 2].append(time.perf_counter() - begun)
    plain, ewc = (statistics_.median(times[3:]) for times in spent)
    return Overhead(plain, ewc)
