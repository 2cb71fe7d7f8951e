r"""Laplace's method: the Gaussian at the mode, with the curvature there as its precision. Chapter "Laplace".

Expand the negative log posterior E(theta) = -log p(D | theta) - log p(theta) to second order at its minimum theta*:

    E(theta) ~ E(theta*) + 1/2 (theta - theta*)^T H (theta - theta*)   =>   p(theta | D) ~ N(theta*, H^-1)
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call

from ewc_code import distributed, fisher
from ewc_code.data import Examples
from ewc_code.fisher import Factors, Labels
from ewc_code.gaussian import Diagonal, Full, Kronecker, log_normaliser
from ewc_code.models import nll, snapshot

Gaussian = TypeVar("Gaussian", Diagonal, Full, Kronecker, Diagonal | Full, Diagonal | Full | Kronecker)


def laplace(
    model: nn.Module,
    data: Examples | Iterable[fisher.Batch],
    prior: Gaussian,
    labels: Labels = "exact",
    generator: Generator | None = None,
    examples: int | None = None,
    group: Any = None,
) -> Gaussian:
    r"""Belief after a task: mean at the model's parameters, precision grown by N times the mean Fisher information.

        mean = theta*,   precision = prior.precision + N F(theta*)

    The Fisher stands for the Hessian of the negative log likelihood: it is never negative, and equals the Hessian where
    the model's probabilities fit (chapter "Fisher information"); `labels` says which, as in `fisher.diagonal`, and
    `generator` serves `labels="sampled"`. The model is at the mode theta*, fitted to the N examples of `data` under the
    `prior`, the belief before the task; each kind of belief gives one of its own kind. With `examples`, the
    mean Fisher is that of the first so many, which must be in random order (chapter "Fisher in the wild" says how many
    are enough); N stays the number of all. Data larger than memory come as batches, from a DataLoader say.
    With a process `group` (`torch.distributed.group.WORLD` for all) each of its processes brings its own share of the
    data, and all get the same belief (chapter "Scale").
    Source: MacKay 1992; Kirkpatrick et al. 2017, eq. 3 (without the prior's precision). Chapter "EWC".
    """
    mode = snapshot(model)
    ways: dict[type, Callable[..., Any]] = {Full: fisher.full, Kronecker: fisher.kronecker}
    estimate: Callable[..., Any] = partial(ways.get(type(prior), fisher.diagonal), labels=labels, generator=generator)
    if isinstance(data, Examples):
        found, n = estimate(model, data[:examples]), data.count
    elif examples is None:
        found, n = fisher.over_batches(estimate, model, data)
    else:
        raise ValueError(f"`examples` needs all data at hand, as Examples; got {type(data).__name__}. Leave it out.")
    if group is not None:
        found, n = distributed.across(found, n, group)
    if isinstance(prior, Full):
        return prior.moved(mode, n * found)
    if isinstance(prior, Kronecker):
        return prior.moved(mode, {name: Factors(f.inputs, n * f.outputs) for name, f in found.items()})
    return prior.moved(mode, {name: n * value for name, value in found.items()})


def log_evidence(model: nn.Module, data: Examples, prior: Diagonal | Full) -> float:
    r"""Laplace's estimate of the log marginal likelihood, nats.

        log p(D) ~ log p(D | theta*) + log p(theta*) + P/2 log 2 pi - 1/2 log det precision
                 = -N L(theta*) - prior.energy(theta*) + 1/2 log det prior.precision - 1/2 log det precision

    The model is at the mode of N examples under a proper prior (positive precision).
    Source: MacKay 1992; Daxberger et al. 2021. Chapter "Laplace".
    """
    posterior = laplace(model, data, prior)
    with torch.no_grad():
        constant = 0.5 * math.log(2 * math.pi) * data.y.numel() * data.y.is_floating_point()  # nll leaves it out
        log_likelihood = -data.count * nll(model(data.x), data.y).item() - constant
    log_prior = log_normaliser(prior) - prior.energy(posterior.mean).item()
    return log_likelihood + log_prior - log_normaliser(posterior)


def predictive(
    model: nn.Module, belief: Diagonal | Full, x: Tensor, draws: int, generator: Generator
) -> Float[Tensor, "n *t k"]:
    r"""Class probabilities averaged over the belief instead of taken at its mean.

        p(y | x, D) = E_{theta ~ belief} p_theta(y | x) ~ 1/S sum_s p_{theta_s}(y | x)

    The model, (n, ...) -> logits (n, k), is left as it is; `draws` is S, and the error falls as 1/sqrt(S).
    Source: Bishop 2006, section 5.7; Daxberger et al. 2021. Chapter "Laplace".
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}.")
    with torch.no_grad():
        parts = (functional_call(model, belief.sample(generator), (x,)).softmax(-1) for _ in range(draws))
        return torch.stack(list(parts)).mean(0)
