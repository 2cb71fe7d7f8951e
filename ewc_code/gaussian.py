r"""Beliefs about parameters: Gaussians, known by their mean and their precision (the inverse covariance).

Every belief answers one question for training: how surprising would these parameters be?

    energy(theta) = 1/2 (theta - mean)^T precision (theta - mean)         [nats, up to a constant]

Chapters "Bayes" (conjugate updates), "Laplace" (where the precision comes from), "EWC" (the energy as a penalty).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_code.models import Params, flatten, unflatten


@runtime_checkable
class Belief(Protocol):
    """What training needs of a belief."""

    def energy(self, theta: Params) -> Tensor:
        """Negative log density of the parameters up to a constant, in nats; a scalar that autograd can follow."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """Independent Gaussians, one a parameter: N(theta_i; mean_i, 1 / precision_i).

    A precision of zero everywhere is the flat belief: it knows nothing and its energy is zero.

    Args:
        mean: By parameter name.
        precision: Same names and shapes, finite, at least 0.
    """

    mean: Params
    precision: Params

    def __post_init__(self) -> None:
        if self.mean.keys() != self.precision.keys():
            raise ValueError(
                f"mean and precision must name the same parameters; got {set(self.mean) ^ set(self.precision)}."
            )
        for name, value in self.precision.items():
            if value.shape != self.mean[name].shape:
                raise ValueError(
                    f"precision of {name!r} must have the mean's shape {tuple(self.mean[name].shape)}; "
                    f"got {tuple(value.shape)}."
                )
            if not (torch.isfinite(value).all() and torch.isfinite(self.mean[name]).all() and value.min() >= 0):
                raise ValueError(
                    f"mean and precision of {name!r} must be finite and the precision at least 0; got precisions "
                    f"{value.min().item():g} to {value.max().item():g}, means {self.mean[name].min().item():g} to "
                    f"{self.mean[name].max().item():g}."
                )

    @classmethod
    def isotropic(cls, mean: Params, precision: float = 0.0) -> "Diagonal":
        """The same precision for every parameter; zero gives the flat belief."""
        return cls(mean, {name: torch.full_like(value, precision) for name, value in mean.items()})

    def energy(self, theta: Params) -> Tensor:
        """1/2 sum_i precision_i (theta_i - mean_i)^2, nats; `theta` by name, the mean's shapes."""
        _same_names(theta, self.mean)
        parts = [(value * (theta[name] - self.mean[name]).square()).sum() for name, value in self.precision.items()]
        return 0.5 * torch.stack(parts).sum()

    def moved(self, mode: Params, information: Params) -> "Diagonal":
        """The belief at a new mode with `information` (N times the mean Fisher) added to the precision."""
        _same_names(information, self.mean)
        return type(self)(mode, {name: self.precision[name] + value for name, value in information.items()})

    def sample(self, generator: torch.Generator) -> Params:
        """One draw, mean + precision^-1/2 noise; needs a positive precision everywhere."""
        _positive(flatten(self.precision).min())
        return {name: mean + _noise(mean, generator) * self.precision[name].rsqrt() for name, mean in self.mean.items()}

    def log_det(self) -> float:
        """Log determinant of the precision, sum_i log precision_i."""
        _positive(flatten(self.precision).min())
        return _double(flatten(self.precision)).log().sum().item()


@dataclass(frozen=True)
class Full:
    """A Gaussian with every covariance: N(theta; mean, precision^-1), for models small enough to hold the matrix.

    Args:
        mean: By parameter name, P numbers in all.
        precision: (P, P), symmetric, in the order of `models.flatten(mean)`.
    """

    mean: Params
    precision: Float[Tensor, "p p"]

    def __post_init__(self) -> None:
        size = sum(value.numel() for value in self.mean.values())
        if self.precision.shape != (size, size):
            raise ValueError(f"precision must be ({size}, {size}) for this mean; got {tuple(self.precision.shape)}.")
        if not all(torch.isfinite(value).all() for value in (self.precision, *self.mean.values())):
            raise ValueError("mean and precision must be finite; got NaN or infinity.")
        largest, gap = self.precision.abs().max(), (self.precision - self.precision.T).abs().max()
        if gap > 1e-4 * largest:
            raise ValueError(f"precision must be symmetric; got entries that differ by up to {gap.item():g}.")
        if self.precision.diagonal().min() < 0:
            raise ValueError(f"precisions must be at least 0; got {self.precision.diagonal().min().item():g}.")

    @classmethod
    def isotropic(cls, mean: Params, precision: float = 0.0) -> "Full":
        """Precision times the identity matrix; zero gives the flat belief."""
        vector = flatten(mean)
        return cls(mean, precision * torch.eye(len(vector), dtype=vector.dtype, device=vector.device))

    def energy(self, theta: Params) -> Tensor:
        """1/2 (theta - mean)^T precision (theta - mean), nats; `theta` by name, the mean's shapes."""
        _same_names(theta, self.mean)
        step = flatten({name: theta[name] for name in self.mean}) - flatten(self.mean)  # (P,)
        return 0.5 * step @ (self.precision @ step)

    def moved(self, mode: Params, information: Float[Tensor, "p p"]) -> "Full":
        """The belief at a new mode with `information` (N times the mean Fisher) added to the precision."""
        return type(self)(mode, self.precision + information)

    def sample(self, generator: torch.Generator) -> Params:
        """One draw, mean + L^-T noise with precision = L L^T; needs a positive definite precision."""
        factor = _cholesky(self.precision)
        noise = _noise(flatten(self.mean), generator)
        step = torch.linalg.solve_triangular(factor.mT, noise[:, None], upper=True)[:, 0]
        return unflatten(flatten(self.mean) + step, self.mean)

    def covariance(self) -> Float[Tensor, "p p"]:
        """Inverse of the precision, which must be positive definite."""
        return torch.cholesky_inverse(_cholesky(self.precision))

    def log_det(self) -> float:
        """Log determinant of the precision; it must be positive definite."""
        return 2 * _cholesky(_double(self.precision)).diagonal().log().sum().item()


@dataclass(frozen=True)
class Penalties:
    """Several Gaussians side by side, each with its own anchor: the energy is their sum.

    What Kirkpatrick et al. 2017 propose from the third task on; `merge` shows that it is again one Gaussian.
    """

    parts: tuple[Diagonal, ...]

    def energy(self, theta: Params) -> Tensor:
        """Sum of the parts' energies, nats."""
        return torch.stack([part.energy(theta) for part in self.parts]).sum()


def merge(beliefs: Sequence[Diagonal]) -> Diagonal:
    r"""Product of diagonal Gaussians: precisions add up, means average by precision.

        precision = sum_k precision_k,   mean = (sum_k precision_k mean_k) / precision

    The energies' sum equals the merged energy up to a constant (Kirkpatrick et al. 2017, after eq. 3). Where all
    precisions are zero nothing is known, and the last belief's mean is kept.
    """
    if not beliefs:
        raise ValueError("there must be at least one belief to merge; got none.")
    for belief in beliefs:
        _same_names(belief.mean, beliefs[0].mean)
    precision = {name: torch.stack([b.precision[name] for b in beliefs]).sum(0) for name in beliefs[0].mean}
    weighted = {name: torch.stack([b.precision[name] * b.mean[name] for b in beliefs]).sum(0) for name in precision}
    mean = {
        name: torch.where(
            total > 0, weighted[name] / total.clamp_min(torch.finfo(total.dtype).tiny), beliefs[-1].mean[name]
        )
        for name, total in precision.items()
    }
    return Diagonal(mean, precision)


def condition_linear(prior: Full, x: Float[Tensor, "n p"], y: Float[Tensor, " n"], noise_variance: float) -> Full:
    r"""Exact posterior of linear regression y = x theta + noise: the case in which Bayes' rule can be carried out.

        precision = prior.precision + x^T x / noise_variance
        mean = precision^-1 (prior.precision prior.mean + x^T y / noise_variance)

    Args:
        prior: Belief about the P weights (one named parameter of shape (P,)).
        x: Inputs, (N, P).
        y: Targets, (N,).
        noise_variance: Variance of the noise, target units squared, above 0.

    Raises:
        ValueError: the noise variance is not above 0, or prior and data together leave a direction open.

    Source: Bishop 2006, eqs. 3.50-3.51. Chapter "Bayes".
    """
    if not 0 < noise_variance < math.inf:
        raise ValueError(f"noise_variance must be finite and above 0; got {noise_variance}.")
    precision = prior.precision + x.T @ x / noise_variance
    target = prior.precision @ flatten(prior.mean) + x.T @ y / noise_variance
    try:
        mean = torch.linalg.solve(precision, target)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"prior and data together must determine all {len(target)} weights; got {len(y)} examples and a singular "
            f"precision. Start from a proper prior."
        ) from error
    return Full(unflatten(mean, prior.mean), (precision + precision.T) / 2)


def log_evidence_linear(prior: Full, x: Float[Tensor, "n p"], y: Float[Tensor, " n"], noise_variance: float) -> float:
    r"""Exact log evidence of linear regression, log p(y | x): how well the prior predicted the targets.

    Bayes' rule read backwards, log p(y) = log p(y | theta) + log p(theta) - log p(theta | y), is the same number at
    every theta; here it is read at the posterior mean:

        -N/2 log(2 pi noise_variance) - |y - x mean|^2 / (2 noise_variance)
            + log_normaliser(prior) - prior.energy(mean) - log_normaliser(posterior)

    Args:
        prior: Belief before the data, positive definite.
        x: Inputs, (N, P).
        y: Targets, (N,).
        noise_variance: Variance of the noise, target units squared, above 0.

    Returns:
        Log density of all N targets together, nats.

    Raises:
        ValueError: the noise variance is not above 0, or the prior is not proper.

    Source: Bishop 2006, eq. 3.86, for any Gaussian prior. Chapter "Bayes".
    """
    posterior = condition_linear(prior, x, y, noise_variance)
    residual = y - x @ flatten(posterior.mean)  # (N,)
    log_likelihood = -0.5 * (
        len(y) * math.log(2 * math.pi * noise_variance) + (residual @ residual).item() / noise_variance
    )
    return log_likelihood + log_normaliser(prior) - prior.energy(posterior.mean).item() - log_normaliser(posterior)


def log_normaliser(belief: Diagonal | Full) -> float:
    """Log of the density's constant, (log det precision - P log 2 pi) / 2: log N(theta) = log_normaliser - energy."""
    size = sum(value.numel() for value in belief.mean.values())
    return 0.5 * (belief.log_det() - size * math.log(2 * math.pi))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def _positive(smallest: Tensor) -> None:
    if smallest <= 0:
        raise ValueError(
            f"the precision must be positive for this; got {smallest.item():g}. Start from a proper prior."
        )


def _cholesky(precision: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(precision)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the precision must be positive definite for this; got one that is not ({error}). "
            f"Start from a proper prior."
        ) from error


def _double(value: Tensor) -> Tensor:
    """In float64; by way of the CPU where the device has none (MPS)."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def _same_names(theta: Params, mean: Params) -> None:
    for name, value in mean.items():
        if name not in theta or theta[name].shape != value.shape:
            got = tuple(theta[name].shape) if name in theta else "no such parameter"
            raise ValueError(f"parameter {name!r} must have the belief's shape {tuple(value.shape)}; got {got}.")
    if len(theta) > len(mean):
        raise ValueError(
            f"the belief must know every parameter; it knows nothing of {sorted(theta.keys() - mean.keys())}. "
            f"Make it from the same model, with the same parameters frozen."
        )
