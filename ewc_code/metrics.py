r"""What an accuracy matrix says. R[i, j] is the test accuracy on task j after task i of T, counted from 1."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

Matrix = Float[Tensor, "tasks tasks"]


def average_accuracy(accuracy: Matrix) -> float:
    r"""Mean over all tasks after the last one: 1/T sum_j R[T, j]. Source: Lopez-Paz & Ranzato 2017, eq. 2."""
    return _checked(accuracy)[-1].mean().item()


def forgetting(accuracy: Matrix) -> float:
    r"""Mean drop from the best accuracy a task ever had: 1/(T-1) sum_{j<T} (max_{i<T} R[i, j] - R[T, j]).

    Others subtract from R[j, j], the accuracy right after the task; where later tasks help, the two differ.
    Source: Chaudhry et al. 2018, eq. 3.
    """
    _checked(accuracy, least=2)
    return (accuracy[:-1, :-1].max(0).values - accuracy[-1, :-1]).mean().item()


def backward_transfer(accuracy: Matrix) -> float:
    r"""Mean change since the task was learned: 1/(T-1) sum_{j<T} (R[T, j] - R[j, j]); negative when forgotten.

    Source: Lopez-Paz & Ranzato 2017, eq. 3.
    """
    _checked(accuracy, least=2)
    return (accuracy[-1, :-1] - accuracy.diagonal()[:-1]).mean().item()


def forward_transfer(accuracy: Matrix, untrained: Float[Tensor, " tasks"]) -> float:
    r"""Mean head start on a task not yet seen: 1/(T-1) sum_{j>1} (R[j-1, j] - untrained_j).

    `untrained` is the accuracy of the untrained network on each task. Source: Lopez-Paz & Ranzato 2017, eq. 4.
    """
    _checked(accuracy, least=2)
    if untrained.shape != accuracy.shape[:1]:
        raise ValueError(f"untrained must hold one accuracy a task, {len(accuracy)}; got {tuple(untrained.shape)}.")
    return (accuracy.diagonal(1) - untrained[1:]).mean().item()


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval, mean ± half."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f} %"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    r"""Mean of independent runs with Student's t interval: mean ± t_{n-1} s / sqrt(n).

    There must be at least two values, one a seed: one run says nothing about others.
    """
    if (n := len(values)) < 2:
        raise ValueError(f"an interval needs at least two runs; got {n}. Run more seeds, or report the run as single.")
    spread = float(np.std(values, ddof=1)) / n**0.5
    return Interval(float(np.mean(values)), float(special.stdtrit(n - 1, 0.5 + level / 2)) * spread, n)


def cosine(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Cosine of the angle between two diagonal Fishers seen as vectors; 1 when they agree up to a factor."""
    a, b = _paired(left, right)
    return (a @ b / (a.norm() * b.norm())).item()


def overlap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    r"""Overlap of two diagonal Fishers: 1 where they care about the same parameters, 0 where about different ones.

        1 - d^2 = sum_i sqrt(f_i g_i),    d^2 = 1/2 tr(f + g - 2 (f g)^1/2),    f and g with unit trace

    d is their Fréchet distance. Source: Kirkpatrick et al. 2017, appendix 4.3. Chapter "The paper, reproduced".
    """
    f, g = _paired(left, right)
    return (f.sqrt() @ g.sqrt() / (f.sum() * g.sum()).sqrt()).item()


def _paired(left: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both as vectors, in float64 and in one order."""
    if left.keys() != right.keys():
        raise ValueError(f"both must name the same parameters; got {sorted(left.keys() ^ right.keys())} in only one.")
    a, b = (torch.cat([p[name].reshape(-1).cpu().double() for name in left]) for p in (left, right))
    if not (a.any() and b.any()):
        raise ValueError("the angle to a Fisher that is zero everywhere, and its unit trace, are not defined; got one.")
    return a, b


def _checked(accuracy: Matrix, least: int = 1) -> Matrix:
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or not len(accuracy):
        raise ValueError(f"the accuracy matrix must be (tasks, tasks); got {tuple(accuracy.shape)}.")
    if len(accuracy) < least:
        raise ValueError("forgetting and transfer need at least two tasks; got one.")
    return accuracy
