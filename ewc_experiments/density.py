r"""Laplace's method for smooth densities of a few parameters; the same on a grid, and exact where it can be.

The mode is found by Newton's method, in float64; networks are fitted by `ewc_code.training` instead. Chapters "Laplace"
and, for the closed form, "Bayes".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, vmap

from ewc_code.data import Examples
from ewc_code.gaussian import Belief, Full, log_normaliser
from ewc_code.models import flatten, nll, restore, snapshot, unflatten


@dataclass(frozen=True)
class Approximation:
    """Laplace's approximation of one density: the Gaussian, and the log of the integral it implies."""

    mode: Float[Tensor, " p"]
    precision: Float[Tensor, "p p"]
    log_integral: float

    def log_density(self, theta: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """Log N(theta; mode, precision^-1) for each row."""
        step = theta - self.mode
        quadratic = torch.einsum("np,pq,nq->n", step, self.precision, step)
        constant = 0.5 * (torch.logdet(self.precision) - len(self.mode) * math.log(2 * math.pi))
        return constant - 0.5 * quadratic


def approximate(
    energy: Callable[[Tensor], Tensor], start: Float[Tensor, " p"], steps: int = 100, tolerance: float = 1e-14
) -> Approximation:
    r"""Laplace's method for any smooth density exp(-energy(theta)) of a few parameters, mode found by Newton's method.

        theta <- theta - H^-1 g (halved until the energy falls)
        log integral = -E(theta*) + P/2 log 2 pi - 1/2 log det H

    The energy is the negative log density up to a constant, (P,) -> scalar, differentiable twice; outside of the
    support it may be infinity or NaN. Give the start in float64. At most `steps` Newton steps are made, until the
    expected decrease g^T H^-1 g / 2 is below the tolerance, nats. A ValueError: the start is outside of the support,
    the mode at a boundary, or there is a ridge, where Laplace's method does not apply.
    Source: Tierney & Kadane 1986; MacKay 2003, chapter 27. Chapter "Laplace".
    """
    theta = start.detach().clone()
    for _ in range(steps):
        value, g, h = energy(theta), grad(energy)(theta), hessian(energy)(theta)
        if not (torch.isfinite(value) and torch.isfinite(g).all() and torch.isfinite(h).all()):
            raise ValueError(f"energy must be finite with finite derivatives at {theta.tolist()}; got {value.item()}.")
        curvature, basis = torch.linalg.eigh(h)
        # Where the energy bends down, walking by |curvature| still goes downhill; at the minimum both are the same.
        step = basis @ ((basis.T @ g) / curvature.abs().clamp_min(1e-12))
        # Nearer than rounding of the energy itself, no step could be seen to go down.
        if 0.5 * g @ step < max(tolerance, 4 * torch.finfo(value.dtype).eps * abs(value.item())):
            if curvature.min() <= len(theta) * torch.finfo(theta.dtype).eps * curvature.max():
                break
            theta = theta - step  # one more step squares the error that is left
            value, h = energy(theta), hessian(energy)(theta)
            log_integral = -value - 0.5 * torch.logdet(h) + 0.5 * len(theta) * math.log(2 * math.pi)
            return Approximation(theta, h, log_integral.item())
        size = 1.0
        while size > 1e-12 and not energy(theta - size * step) < value:
            size /= 2
        if size <= 1e-12:
            break
        theta = theta - size * step
    raise ValueError(
        f"a minimum with positive curvature must exist near the start {start.tolist()}; none was found within {steps} "
        f"Newton steps (last point {theta.tolist()}). The mode may lie on a boundary: change variables first."
    )


@dataclass(frozen=True)
class Grid:
    """A density of a few parameters, computed at every point of a regular grid: the reference for `Approximation`."""

    theta: Float[Tensor, "m p"]
    log_density: Float[Tensor, " m"]
    log_integral: float
    cell: float

    def total_variation(self, log_other: Float[Tensor, " m"]) -> float:
        """Half the integral of |p - q|, 0..1: by how much the two can differ on the probability of any event."""
        return 0.5 * self.cell * (self.log_density.exp() - log_other.exp()).abs().sum().item()

    def divergence(self, log_other: Float[Tensor, " m"]) -> float:
        """KL(p || q), the integral of p (log p - log q), nats."""
        p = self.log_density.exp()
        return self.cell * torch.where(p > 0, p * (self.log_density - log_other), 0.0).sum().item()


def on_grid(energy: Callable[[Tensor], Tensor], around: Approximation, reach: float = 8.0, points: int = 81) -> Grid:
    r"""The density exp(-energy(theta)) / Z by brute force, on a grid that follows the axes of a Gaussian.

        theta = mode + A u,   A A^T = precision^-1,   u in a regular grid on [-reach, reach]^P
        Z = sum exp(-energy) cell

    For smooth densities that have died out at the grid's edge this sum converges faster than any power of the spacing.
    The energy is as for `approximate`; `around` gives the place and the axes, `reach` the half width in standard
    deviations; points^P energies are computed. The result is normalised. Chapter "Laplace".
    """
    size = len(around.mode)
    line = torch.linspace(-reach, reach, points, dtype=around.mode.dtype, device=around.mode.device)
    u = torch.cartesian_prod(*[line] * size).reshape(-1, size)  # (points^P, P)
    factor = torch.linalg.cholesky(around.precision)
    theta = around.mode + torch.linalg.solve_triangular(factor.T, u.T, upper=True).T
    log_cell = size * (line[1] - line[0]).log() - factor.diagonal().log().sum()
    log_value = -vmap(energy)(theta)
    log_integral = log_value.logsumexp(0) + log_cell
    return Grid(theta, log_value - log_integral, log_integral.item(), log_cell.exp().item())


def find_mode(model: nn.Module, data: Examples, prior: Belief) -> Approximation:
    r"""Move a small model to the mode of its posterior by `approximate`, in place: gradient descent stops short of it.

        minimise  N L(theta) + prior.energy(theta)

    The model gives logits (n, k) and has a few hundred parameters; use float64. The Gaussian returned has the exact
    Hessian, in the order of `models.flatten`; its `log_integral` belongs to exp(-N L - prior.energy), without the
    prior's constant (`gaussian.log_normaliser`). Errors are those of `approximate`. Chapter "Laplace".
    """
    start = snapshot(model)

    def energy(vector: Tensor) -> Tensor:
        theta = unflatten(vector, start)
        return len(data) * nll(functional_call(model, theta, (data.x,)), data.y) + prior.energy(theta)

    found = approximate(energy, flatten(start))
    restore(model, unflatten(found.mode, start))
    return found


def next_term(energy: Callable[[Tensor], Tensor], at: Approximation) -> float:
    r"""What Laplace's method leaves out of the log integral, to leading order: to be added to `log_integral`, nats.

    With S = precision^-1 and all derivatives of the energy at the mode, sums over repeated indices:

        -1/8 E_ijkl S_ij S_kl + 1/8 E_ijk E_lmn S_ij S_kl S_mn + 1/12 E_ijk E_lmn S_il S_jm S_kn

    One parameter: 5 E'''^2 / (24 E''^3) - E'''' / (8 E''^2). With N examples the sum is of order 1/N.
    Source: Tierney & Kadane 1986. Chapter "Laplace".
    """
    second = hessian(energy)
    third, fourth = jacfwd(second)(at.mode), jacfwd(jacfwd(second))(at.mode)
    s = torch.linalg.inv(at.precision)
    inner = torch.einsum("ijk,ij->k", third, s)
    quartic = torch.einsum("ijkl,ij,kl->", fourth, s, s)
    cubic = torch.einsum("ijk,lmn,il,jm,kn->", third, third, s, s, s)
    return (-quartic / 8 + inner @ s @ inner / 8 + cubic / 12).item()


def condition_linear(prior: Full, x: Float[Tensor, "n p"], y: Float[Tensor, " n"], noise_variance: float) -> Full:
    r"""Exact posterior of linear regression y = x theta + noise: the case in which Bayes' rule can be carried out.

        precision = prior.precision + x^T x / noise_variance
        mean = precision^-1 (prior.precision prior.mean + x^T y / noise_variance)

    The prior is about the P weights (one named parameter of shape (P,)), x (N, P) holds the inputs, y (N,) the targets;
    the noise variance, target units squared, must be above 0, and prior and data together leave no direction open, else
    there is a ValueError. Source: Bishop 2006, eqs. 3.50-3.51. Chapter "Bayes".
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
            "precision. Start from a proper prior."
        ) from error
    return Full(unflatten(mean, prior.mean), (precision + precision.T) / 2)


def log_evidence_linear(prior: Full, x: Float[Tensor, "n p"], y: Float[Tensor, " n"], noise_variance: float) -> float:
    r"""Exact log evidence of linear regression, log p(y | x): how well the prior predicted the targets.

    Bayes' rule read backwards, log p(y) = log p(y | theta) + log p(theta) - log p(theta | y), at the posterior mean:

        -N/2 log(2 pi noise_variance) - |y - x mean|^2 / (2 noise_variance)
            + log_normaliser(prior) - prior.energy(mean) - log_normaliser(posterior)

    In nats, of all N targets together. As `condition_linear`; the prior must be proper too (positive definite).
    Source: Bishop 2006, eq. 3.86, for any Gaussian prior. Chapter "Bayes".
    """
    posterior = condition_linear(prior, x, y, noise_variance)
    residual = y - x @ flatten(posterior.mean)  # (N,)
    misfit = (residual @ residual).item() / noise_variance
    log_likelihood = -0.5 * (len(y) * math.log(2 * math.pi * noise_variance) + misfit)
    return log_likelihood + log_normaliser(prior) - prior.energy(posterior.mean).item() - log_normaliser(posterior)
