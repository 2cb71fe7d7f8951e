r"""The methods: each is a choice of belief, that is of what to write down about a task before the next one comes.

A method is a prior, a way to turn the fitted model into the next belief, and the strength lambda of the penalty:

    minimise  L_B(theta) + strength / N_B * belief.energy(theta)

Chapter "EWC" derives them, "Many tasks", "Beyond the diagonal" and "Where it fails" compare them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ewc_code import fisher, importance
from ewc_code.data import Examples
from ewc_code.environment import generator
from ewc_code.gaussian import Belief, Diagonal, Full, Kronecker, Penalties
from ewc_code.importance import Path
from ewc_code.laplace import laplace
from ewc_code.models import Params, snapshot
from ewc_code.rehearsal import Answers, Buffer

Consolidate = Callable[[nn.Module, Examples, Belief, Path | None], Belief]
How = Callable[[nn.Module, Examples, Any], Any]  # a Gaussian -> the same kind of Gaussian after the task


@dataclass(frozen=True)
class Method:
    """One way to keep what was learned."""

    name: str  #: For tables.
    prior: Callable[[Params], Belief]  #: Belief before the first task, from the initial parameters.
    #: (model at the task's mode, its training data, belief before, path through the training) -> belief after.
    update: Consolidate
    strength: float = 1.0  #: lambda, at least 0; Bayes says 1.
    tracks: bool = False  #: Whether the update needs the work along the path, which costs time at every step.

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0; got {self.strength}. Bayes' rule says 1.")

    def consolidate(self, model: nn.Module, data: Examples, belief: Belief, path: Path | None = None) -> Belief:
        """The belief after a task: the model is at its mode, the path that of the training, from `path`."""
        return self.update(model, data, belief, path)

    def path(self, model: nn.Module) -> Path:
        """The path of the training that is about to begin."""
        return Path.begin(model, self.tracks)


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
    return Method("EWC", prior, partial(_laplace, how=_how(labels, seed, examples)), strength)


def ewc_per_task(
    strength: float, labels: fisher.Labels = "exact", seed: int = 0, examples: int | None = None
) -> Method:
    """EWC with a penalty a task, each at its own anchor, as Kirkpatrick et al. 2017 propose for a third task."""
    another = partial(_another, how=_how(labels, seed, examples))
    return Method("EWC, a penalty per task", _one_flat, another, strength)


def online_ewc(
    strength: float, decay: float, labels: fisher.Labels = "exact", seed: int = 0, examples: int | None = None
) -> Method:
    r"""EWC that lets go of old tasks: precision = decay * precision + N F at the newest mode.

    The decay gamma lies in 0..1: 1 is `ewc`, 0 remembers the last task alone, and 1 / (1 - gamma) tasks is the memory.
    Source: Schwarz et al. 2018, section 4. Chapter "Many tasks".
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"the decay must lie in 0..1; got {decay}.")
    update = partial(_laplace, how=_how(labels, seed, examples), decay=decay)
    return Method("online EWC", Diagonal.isotropic, update, strength)


def kronecker(
    strength: float, labels: fisher.Labels = "exact", seed: int = 0, examples: int | None = None, merged: bool = True
) -> Method:
    r"""Laplace layer by layer: precision = precision + N G (x) A, for networks of Linear and Conv2d layers.

    `merged` keeps the Kronecker product nearest to the sum, `gaussian.nearest_kronecker`; else one a task is kept.
    Source: Ritter et al. 2018. Chapter "Beyond the diagonal".
    """
    update = partial(_kronecker, how=_how(labels, seed, examples), merged=merged)
    return Method("Kronecker", Kronecker.isotropic, update, strength)


def si(strength: float, damping: float = 0.1) -> Method:
    r"""Synaptic intelligence: precision = precision + N `importance.along_path`, from the work of the loss alone.

    `damping` is their xi, squared units of the parameters. Source: Zenke et al. 2017. Chapter "Beyond the diagonal".
    """
    return Method("SI", Diagonal.isotropic, partial(_si, damping=damping), strength, tracks=True)


def mas(strength: float, examples: int | None = None) -> Method:
    r"""Memory-aware synapses: precision = precision + N `importance.sensitivity`, of the first `examples`.

    Source: Aljundi et al. 2018. Chapter "Beyond the diagonal".
    """
    return Method("MAS", Diagonal.isotropic, partial(_mas, examples=examples), strength)


def rwalk(strength: float, examples: int | None = None) -> Method:
    r"""Riemannian walk: precision = precision + N `importance.walk`, Fisher and path together.

    Source: Chaudhry et al. 2018. Chapter "Beyond the diagonal".
    """
    return Method("RWalk", Diagonal.isotropic, partial(_rwalk, examples=examples), strength, tracks=True)


def lwf(strength: float = 1.0, temperature: float = 2.0) -> Method:
    r"""Learning without forgetting: a belief about answers, `rehearsal.Answers`.

    Source: Li & Hoiem 2016. Chapter "Where it fails".
    """
    return Method("LwF", Diagonal.isotropic, partial(_answers, temperature=temperature), strength)


def replay(examples_per_task: int, strength: float = 1.0, seed: int = 0, batch_size: int = 128) -> Method:
    r"""Experience replay: so many random examples of each task are kept, `rehearsal.Buffer`; Bayes' strength is 1.

    Source: Robins 1995; Chaudhry et al. 2019. Chapter "Where it fails".
    """
    return Method("replay", Diagonal.isotropic, partial(_buffer, keep=(examples_per_task, seed, batch_size)), strength)


def joint(seed: int = 0, batch_size: int = 128) -> Method:
    """The ceiling: every example of every task is kept. Chapter "Where it fails"."""
    return Method("joint", Diagonal.isotropic, partial(_buffer, keep=(None, seed, batch_size)), 1.0)


def _unchanged(model: nn.Module, data: Examples, prior: Belief, path: Path | None) -> Belief:
    return prior


def _one_flat(theta: Params) -> Penalties:
    return Penalties((Diagonal.isotropic(theta),))


def _identity_precision(model: nn.Module, data: Examples, prior: Belief, path: Path | None) -> Belief:
    return _added(model, data, prior, {name: torch.ones_like(value) for name, value in snapshot(model).items()})


def _added(model: nn.Module, data: Examples, prior: Belief, importances: Params) -> Belief:
    """Precision grown by N times the importances, at the model's parameters."""
    assert isinstance(prior, Diagonal)
    return prior.moved(snapshot(model), {name: data.count * value for name, value in importances.items()})


def _laplace(model: nn.Module, data: Examples, prior: Belief, path: Path | None, how: How, decay: float = 1) -> Belief:
    assert isinstance(prior, Diagonal | Full)
    if decay < 1:
        assert isinstance(prior, Diagonal)
        prior = Diagonal(prior.mean, {name: decay * value for name, value in prior.precision.items()})
    return how(model, data, prior)


def _kronecker(model: nn.Module, data: Examples, prior: Belief, path: Path | None, how: How, merged: bool) -> Belief:
    belief = how(model, data, prior)
    return belief.merged() if merged else belief


def _another(model: nn.Module, data: Examples, prior: Belief, path: Path | None, how: How) -> Belief:
    assert isinstance(prior, Penalties)
    return Penalties((*prior.parts, how(model, data, Diagonal.isotropic(snapshot(model)))))


def _how(labels: fisher.Labels, seed: int, examples: int | None) -> How:
    return partial(_curvature, labels=labels, seed=seed, examples=examples)


def _curvature(
    model: nn.Module, data: Examples, prior: Any, labels: fisher.Labels, seed: int, examples: int | None
) -> Any:
    """`laplace` with a source of draws that is new for each task, and the same again in each run."""
    return laplace(model, data, prior, labels, generator(seed), examples)


def _si(model: nn.Module, data: Examples, prior: Belief, path: Path | None, damping: float) -> Belief:
    return _added(model, data, prior, importance.along_path(_needed(path), snapshot(model), damping))


def _mas(model: nn.Module, data: Examples, prior: Belief, path: Path | None, examples: int | None) -> Belief:
    return _added(model, data, prior, importance.sensitivity(model, data[:examples]))


def _rwalk(model: nn.Module, data: Examples, prior: Belief, path: Path | None, examples: int | None) -> Belief:
    information = fisher.diagonal(model, data[:examples])
    return _added(model, data, prior, importance.walk(information, _needed(path), snapshot(model)))


def _needed(path: Path | None) -> Path:
    if path is None:
        raise ValueError("this method needs the path through the training; got None. Use method.path(model) before it.")
    return path


def _answers(model: nn.Module, data: Examples, prior: Belief, path: Path | None, temperature: float) -> Belief:
    return Answers.extended(prior, model, data, temperature)


def _buffer(model: nn.Module, data: Examples, prior: Belief, path: Path | None, keep: tuple[Any, ...]) -> Belief:
    return Buffer.extended(prior, model, data, *keep)
