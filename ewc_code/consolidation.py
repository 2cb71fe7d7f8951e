r"""The methods: each is a choice of belief, that is of what to write down about a task before the next one comes.

A method is a prior, a way to turn the fitted model into the next belief, and the strength lambda of the penalty:

    minimise  L_B(theta) + strength / N_B * belief.energy(theta)

Chapter "EWC" derives them; chapter "Many tasks" compares one merged penalty with one penalty a task.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ewc_code import fisher
from ewc_code.data import Examples
from ewc_code.environment import generator
from ewc_code.gaussian import Belief, Diagonal, Full, Penalties
from ewc_code.laplace import laplace
from ewc_code.models import Params, snapshot

Consolidate = Callable[[nn.Module, Examples, Belief], Belief]


@dataclass(frozen=True)
class Method:
    """One way to keep what was learned."""

    name: str  #: For tables.
    prior: Callable[[Params], Belief]  #: Belief before the first task, from the initial parameters.
    consolidate: Consolidate  #: (model at the task's mode, its training data, belief before) -> belief after.
    strength: float = 1.0  #: lambda, at least 0; Bayes says 1.

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0; got {self.strength}.")


def none() -> Method:
    """Plain training: the belief stays flat, nothing is kept."""
    return Method("plain", Diagonal.isotropic, _unchanged, 0.0)


def l2(strength: float) -> Method:
    r"""The same precision for all parameters: with equal task sizes the penalty is strength / 2 |theta - theta*|^2.

    precision = precision + N I, where EWC adds N F; so both strengths have the same meaning, and I is worth what F is
    worth where a parameter's mean Fisher is 1.
    Source: Kirkpatrick et al. 2017, Figure 3A (2A in the preprint), "L2". Chapter "EWC".
    """
    return Method("L2", Diagonal.isotropic, _identity_precision, strength)


def ewc(
    strength: float, labels: fisher.Labels = "exact", full: bool = False, seed: int = 0, examples: int | None = None
) -> Method:
    r"""EWC with one merged penalty: precision = precision + N F at the newest mode (Huszár 2018).

    `labels` says which Fisher, as in `fisher.diagonal`; `seed` is of the draws of `labels="sampled"`; `full` keeps the
    whole matrix instead of its diagonal, for models small enough; `examples` as in `laplace.laplace`.
    Source: Kirkpatrick et al. 2017, eq. 3; Huszár 2018. Chapter "EWC".
    """
    prior = Full.isotropic if full else Diagonal.isotropic
    return Method("EWC", prior, partial(_laplace, labels=labels, seed=seed, examples=examples), strength)


def ewc_per_task(strength: float, labels: fisher.Labels = "exact", seed: int = 0) -> Method:
    """EWC with a penalty a task, each at its own anchor, as Kirkpatrick et al. 2017 propose for a third task."""
    another = partial(_another, labels=labels, seed=seed)
    return Method("EWC, a penalty per task", _one_flat, another, strength)


def _unchanged(model: nn.Module, data: Examples, prior: Belief) -> Belief:
    return prior


def _one_flat(theta: Params) -> Penalties:
    return Penalties((Diagonal.isotropic(theta),))


def _identity_precision(model: nn.Module, data: Examples, prior: Belief) -> Belief:
    assert isinstance(prior, Diagonal)
    mode = snapshot(model)
    return prior.moved(mode, {name: torch.full_like(value, len(data)) for name, value in mode.items()})


def _laplace(
    model: nn.Module, data: Examples, prior: Belief, labels: fisher.Labels, seed: int, examples: int | None
) -> Belief:
    assert isinstance(prior, Diagonal | Full)
    return laplace(model, data, prior, labels, generator(seed), examples)


def _another(model: nn.Module, data: Examples, prior: Belief, labels: fisher.Labels, seed: int) -> Belief:
    assert isinstance(prior, Penalties)
    flat = Diagonal.isotropic(snapshot(model))
    return Penalties((*prior.parts, laplace(model, data, flat, labels, generator(seed))))
