"""Sequences of tasks: other inputs in the same ten places for labels, or other classes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ewc_code.data import Examples, Images, load, root
from ewc_code.environment import device, generator

Transform = Callable[[Tensor], Tensor]
Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Task:
    """One task: images seen through a transform, applied when a part is asked for, so that only one copy is in memory.

    The name is for tables and errors; the transform maps (n, d) -> (n, d), or is None for the images as they are.
    """

    name: str
    images: Images
    transform: Transform | None = None

    def examples(self, part: Part, which: int | Tensor | None = None) -> Examples:
        """Examples of a part: the first `which`, or those at these indices, or all."""
        found: Examples = getattr(self.images, part)
        if which is not None:
            found = found[which if isinstance(which, Tensor) else slice(which)]
        return found if self.transform is None else Examples(self.transform(found.x), found.y)

    @property
    def train(self) -> Examples:
        """Examples to fit on."""
        return self.examples("train")

    @property
    def validation(self) -> Examples:
        """Examples to choose settings on."""
        return self.examples("validation")

    @property
    def test(self) -> Examples:
        """Examples to report on, and for nothing else."""
        return self.examples("test")


def mnist_then_fashion(train_limit: int | None = None) -> tuple[Task, Task]:
    """Digits, then clothes, in the same ten output places: the experiment of the tutorial that this book grew from.

    With `train_limit`, at most so many training examples a task.
    """
    digits, clothes = (_images(name, train_limit, None, root(), device()) for name in ("MNIST", "FashionMNIST"))
    return Task("MNIST", digits), Task("Fashion-MNIST", clothes)


def permuted(images: Images, count: int, seed: int = 0) -> tuple[Task, ...]:
    """`count` tasks (at least 1) that differ by a fixed shuffle of the pixels; the first keeps them in place.

    Equally hard for a fully connected network, and nothing learned of one task's pixels holds for the next
    (Goodfellow et al. 2013; Kirkpatrick et al. 2017). The images are usually `data.load("MNIST")`.
    """
    _at_least_one(count)
    draw, x = generator(seed), images.train.x
    orders = [torch.randperm(x.shape[1], generator=draw).to(x.device) for _ in range(count - 1)]
    moved = [Task(f"permutation {i}", images, partial(_permute, order=order)) for i, order in enumerate(orders, 2)]
    return Task("permutation 1", images), *moved


def permuted_mnist(
    count: int, train_limit: int | None = None, held_limit: int | None = None, seed: int = 0
) -> tuple[Task, ...]:
    """`permuted` MNIST, with at most so many training and so many held-out examples a task; one copy of the images."""
    return permuted(_images("MNIST", train_limit, held_limit, root(), device()), count, seed)


Scenario = Literal["task", "domain", "class"]
SCENARIOS: tuple[Scenario, ...] = ("task", "domain", "class")


def split(
    name: str, scenario: Scenario, train_limit: int | None = None, held_limit: int | None = None, pairs: int = 5
) -> tuple[Task, ...]:
    """Split MNIST or Fashion-MNIST: the ten classes two by two, as one of three problems.

    'task': which pair it is comes with the image, as one more column of x, for `models.multi_head`; labels 0 and 1.
    'domain': the pair is not told and not asked for, only whether it is its first or second class; labels 0 and 1.
    'class': which of the ten classes; labels 0 to 9, and no class comes again after its task.

    With limits, at most so many training and held-out examples a task. `name` is 'MNIST' or 'FashionMNIST'.
    Source: van de Ven & Tolias 2019; van de Ven et al. 2022. Chapter "Where it fails".
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(map(repr, SCENARIOS))}; got {scenario!r}.")
    if not 1 <= pairs <= 5:
        raise ValueError(f"pairs must lie in 1..5, for ten classes; got {pairs}.")
    return tuple(_pair(name, i, scenario, train_limit, held_limit, root(), device()) for i in range(pairs))


@lru_cache(maxsize=30)  # a sweep makes the same tasks many times
def _pair(
    name: str, i: int, scenario: Scenario, train: int | None, held: int | None, _root: Path, on: torch.device
) -> Task:
    images, parts = load(name, on), []
    for part, limit in ((images.train, train), (images.validation, held), (images.test, held)):
        index = (part.y // 2 == i).nonzero()[:, 0]
        # The published test images are not in random order.
        some = part[index[torch.randperm(len(index), generator=generator(i)).to(on)[:limit]]]
        x = torch.cat([some.x, torch.full_like(some.x[:, :1], i)], dim=1) if scenario == "task" else some.x
        parts.append(Examples(x, some.y if scenario == "class" else some.y % 2))
    return Task(f"{2 * i} and {2 * i + 1}", Images(f"{name}, {2 * i} and {2 * i + 1}", *parts))


@lru_cache(maxsize=2)  # a sweep makes the same tasks many times
def _images(name: str, train_limit: int | None, held_limit: int | None, _root: Path, on: torch.device) -> Images:
    images = limited(load(name, on), train_limit)
    # The published test images are not in random order: the first thousands are harder than the rest.
    some = torch.randperm(len(images.test), generator=generator(0))[:held_limit].to(on)
    return replace(images, validation=images.validation[:held_limit], test=images.test[some])


def rotated(images: Images, degrees: tuple[float, ...]) -> tuple[Task, ...]:
    """A task an angle: square images, flattened, turned counter-clockwise about the centre, bilinear, black outside."""
    _at_least_one(len(degrees))
    return tuple(Task(f"{angle:g} degrees", images, partial(_rotate, degrees=angle)) for angle in degrees)


def limited(images: Images, train_limit: int | None) -> Images:
    """The same images with at most `train_limit` training examples (they are in random order already)."""
    if train_limit is not None:
        _at_least_one(train_limit)
    return replace(images, train=images.train[:train_limit])


def _at_least_one(count: int) -> None:
    if count < 1:
        raise ValueError(f"the count must be at least 1; got {count}.")


def _permute(x: Float[Tensor, "n d"], order: Int64[Tensor, " d"]) -> Float[Tensor, "n d"]:
    return x.index_select(1, order)  # a third of the time of x[:, order], at every step


def _rotate(x: Float[Tensor, "n d"], degrees: float) -> Float[Tensor, "n d"]:
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f"rotation needs square images, flattened; got {x.shape[1]} pixels.")
    angle = math.radians(degrees)
    # grid_sample asks where each output pixel comes from, with y pointing down: the inverse turn.
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(turn[None], [1, 1, side, side], align_corners=False).to(x)  # (1, side, side, 2)
    images = x.view(1, -1, side, side)  # every image is a channel: one grid for all
    return F.grid_sample(images, grid, align_corners=False).view(len(x), -1)
