r"""Beliefs about parameters: Gaussians, known by their mean and their precision (the inverse covariance).

Every belief answers one question for training: how surprising would these parameters be? Chapters "Bayes" (conjugate
updates), "Laplace" (where the precision comes from), "EWC" (the energy as a penalty).

    energy(theta) = 1/2 (theta - mean)^T precision (theta - mean)         [nats, up to a constant]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ewc_code.fisher import Factors
from ewc_code.models import Params, flatten, unflatten


@runtime_checkable
class Belief(Protocol):
    """What training needs of a belief; those that are not Gaussian stand in `rehearsal`."""

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """Negative log density of the parameters up to a constant, in nats; a scalar that autograd can follow.

        `x` are the inputs at hand, (b, ...), for beliefs about what the network answers; Gaussians do not look at them.
        """


@dataclass(frozen=True)
class Diagonal:
    """Independent Gaussians, one a parameter: N(theta_i; mean_i, 1 / precision_i), both by parameter name.

    Precisions are finite and at least 0; zero everywhere is the flat belief: it knows nothing and its energy is zero.
    Neither is to be changed in place: `moved` makes a new belief.
    """

    mean: Params
    precision: Params

    def __post_init__(self) -> None:
        if unpaired := self.mean.keys() ^ self.precision.keys():
            raise ValueError(f"mean and precision must name the same parameters; got {unpaired}.")
        _refuse_live(self.mean)
        _same_shapes(self.precision, self.mean, "precision of", "mean")
        for name, value in self.precision.items():
            mean = self.mean[name]
            if not (torch.isfinite(value).all() and torch.isfinite(mean).all() and value.min() >= 0):
                raise ValueError(
                    f"mean and precision of {name!r} must be finite and the precision at least 0; got precisions "
                    f"{value.min():g} to {value.max():g}, means {mean.min():g} to {mean.max():g}."
                )

    @classmethod
    def isotropic(cls, mean: Params, precision: float = 0.0) -> "Diagonal":
        """The same precision for every parameter; zero gives the flat belief."""
        return cls(mean, {name: torch.full_like(value, precision) for name, value in mean.items()})

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """1/2 sum_i precision_i (theta_i - mean_i)^2, nats; `theta` by name, the mean's shapes."""
        _same_shapes(theta, self.mean)
        # As vectors: with a call for each parameter, a small network's step would spend more on calls than on numbers.
        step = flatten({name: theta[name] for name in self.mean}) - self._vectors[0]  # (P,)
        return 0.5 * (step * (self._vectors[1] * step)).sum()  # no product of matrices, which autocast would round

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Mean and precision, (P,) each; kept, because making them anew costs a small network more than using them."""
        with torch.inference_mode(False):  # training will want them, even if an evaluation asks first
            return flatten(self.mean), flatten({name: self.precision[name] for name in self.mean})

    def moved(self, mode: Params, information: Params) -> "Diagonal":
        """The belief at a new mode with `information` (N times the mean Fisher) added to the precision."""
        _same_shapes(information, self.mean)
        return type(self)(mode, {name: self.precision[name] + value for name, value in information.items()})

    def sample(self, generator: torch.Generator) -> Params:
        """One draw, mean + precision^-1/2 noise; needs a positive precision everywhere."""
        _positive(self.precision)
        return {name: mean + _noise(mean, generator) * self.precision[name].rsqrt() for name, mean in self.mean.items()}

    def log_det(self) -> float:
        """Log determinant of the precision, sum_i log precision_i."""
        return _double(_positive(self.precision)).log().sum().item()


@dataclass(frozen=True)
class Full:
    """A Gaussian with every covariance: N(theta; mean, precision^-1), for models small enough to hold the matrix.

    The mean is by parameter name, P numbers in all; the precision symmetric, in the order of `models.flatten(mean)`.
    """

    mean: Params
    precision: Float[Tensor, "p p"]

    def __post_init__(self) -> None:
        _refuse_live(self.mean)
        size = sum(value.numel() for value in self.mean.values())
        if self.precision.shape != (size, size):
            raise ValueError(f"precision must be ({size}, {size}) for this mean; got {tuple(self.precision.shape)}.")
        if not all(torch.isfinite(value).all() for value in (self.precision, *self.mean.values())):
            raise ValueError("mean and precision must be finite; got NaN or infinity.")
        if (gap := (self.precision - self.precision.T).abs().max()) > 1e-4 * self.precision.abs().max():
            raise ValueError(f"precision must be symmetric; got entries that differ by up to {gap:g}.")
        if (smallest := self.precision.diagonal().min()) < 0:
            raise ValueError(f"precisions must be at least 0; got {smallest:g}.")

    @classmethod
    def isotropic(cls, mean: Params, precision: float = 0.0) -> "Full":
        """Precision times the identity matrix; zero gives the flat belief."""
        vector = flatten(mean)
        return cls(mean, precision * torch.eye(len(vector), dtype=vector.dtype, device=vector.device))

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """1/2 (theta - mean)^T precision (theta - mean), nats; `theta` as for `Diagonal`."""
        _same_shapes(theta, self.mean)
        step = flatten({name: theta[name] for name in self.mean}) - flatten(self.mean)  # (P,)
        with torch.autocast(step.device.type, enabled=False):
            return 0.5 * step @ (self.precision @ step)

    def moved(self, mode: Params, information: Float[Tensor, "p p"]) -> "Full":
        """As `Diagonal.moved`; the mode names the parameters in the mean's order, which is that of the matrix."""
        if list(mode) != list(self.mean):
            raise ValueError(f"the mode must name {list(self.mean)}, in this order; got {list(mode)}.")
        return type(self)(mode, self.precision + information)

    def sample(self, generator: torch.Generator) -> Params:
        """One draw, mean + L^-T noise with precision = L L^T; needs a positive definite precision."""
        noise = _noise(flatten(self.mean), generator)
        step = torch.linalg.solve_triangular(_cholesky(self.precision).mT, noise[:, None], upper=True)[:, 0]
        return unflatten(flatten(self.mean) + step, self.mean)

    def covariance(self) -> Float[Tensor, "p p"]:
        """Inverse of the precision, which must be positive definite."""
        return torch.cholesky_inverse(_cholesky(self.precision))

    def log_det(self) -> float:
        """Log determinant of the precision; it must be positive definite."""
        return 2 * _cholesky(_double(self.precision)).diagonal().log().sum().item()


@dataclass(frozen=True)
class Kronecker:
    r"""Gaussians layer by layer, each precision a sum of Kronecker products; between layers nothing.

        precision of a layer = sum_t G_t (x) A_t
        energy = 1/2 sum_layers sum_t tr(D^T G_t D A_t),   D = [W b] - its mean, (out, in + 1)

    The products of inputs and outputs of each `fisher.Factors`, by the layer's name in the model; no layers: the flat
    belief. Source: Ritter et al. 2018, section 3. Chapter "Beyond the diagonal".
    """

    mean: Params
    factors: dict[str, tuple[Factors, ...]]

    def __post_init__(self) -> None:
        _refuse_live(self.mean)
        known = _layers(self.mean)
        for layer, terms in self.factors.items():
            if layer not in known:
                raise ValueError(f"factors must belong to layers of the mean, {sorted(known)}; got {layer!r}.")
            size = tuple(_matrix(self.mean, known[layer]).shape)
            for term in terms:
                got = (len(term.outputs), len(term.inputs))
                if got != size or term.scale is not None:
                    raise ValueError(f"factors of {layer!r} must be of KFAC and sizes {size}; got {got}, {term.scale}.")
                if not (torch.isfinite(term.inputs).all() and torch.isfinite(term.outputs).all()):
                    raise ValueError(f"factors of {layer!r} must be finite; got NaN or infinity.")

    @classmethod
    def isotropic(cls, mean: Params, precision: float = 0.0) -> "Kronecker":
        """Precision times the identity; zero gives the flat belief, of any model."""
        if precision == 0:
            return cls(mean, {})
        sizes = {layer: _matrix(mean, names) for layer, names in _layers(mean).items()}
        eye = {layer: [torch.eye(n, dtype=m.dtype, device=m.device) for n in m.shape] for layer, m in sizes.items()}
        return cls(mean, {layer: (Factors(a, precision * g),) for layer, (g, a) in eye.items()})

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """The class's formula, nats; `theta` as for `Diagonal`."""
        _same_shapes(theta, self.mean)
        total = next(iter(self.mean.values())).new_zeros(())
        for _, step, pulled in self._pulled(theta):
            total = total + 0.5 * (pulled * step).sum()
        return total

    def pull(self, theta: Params) -> Params:
        """Gradient of the energy, precision (theta - mean), in half the time that autograd takes for it."""
        found = {name: torch.zeros_like(value) for name, value in self.mean.items()}
        for names, _, pulled in self._pulled(theta):
            found |= _parameters(pulled, names, self.mean)
        return found

    def _pulled(self, theta: Params) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Layer by layer: names of its parameters, the step from the mean, and precision times it, (out, in + 1)."""
        known = _layers(self.mean)
        for layer, terms in self.factors.items():
            step = _matrix(theta, known[layer]) - _matrix(self.mean, known[layer])
            with torch.autocast(step.device.type, enabled=False):
                pulled = sum(term.outputs @ (step @ term.inputs) for term in terms)
            yield known[layer], step, pulled  # type: ignore[misc]

    def moved(self, mode: Params, information: dict[str, Factors]) -> "Kronecker":
        """As `Diagonal.moved`: one term more in each layer."""
        added = {layer: (*self.factors.get(layer, ()), term) for layer, term in information.items()}
        return type(self)(mode, self.factors | added)

    def merged(self) -> "Kronecker":
        """One term a layer, the nearest to the sum: what has to be kept no longer grows with the tasks."""
        return type(self)(self.mean, {layer: (nearest_kronecker(terms),) for layer, terms in self.factors.items()})

    def sample(self, generator: torch.Generator) -> Params:
        """One draw, D = L_G^-T noise L_A^-1 a layer; one term a layer, positive definite."""
        drawn = dict(self.mean)
        for layer, names in _layers(self.mean).items():
            term, mean = self._one(layer), _matrix(self.mean, names)
            left, right = _cholesky(term.outputs), _cholesky(term.inputs)
            step = torch.linalg.solve_triangular(left.mT, _noise(mean, generator), upper=True)
            step = torch.linalg.solve_triangular(right, step, upper=False, left=False)
            drawn |= _parameters(mean + step, names, self.mean)
        return drawn

    def log_det(self) -> float:
        """Log determinant of the precision, sum over layers of (in + 1) log det G + out log det A."""
        found = 0.0
        for layer in _layers(self.mean):
            term = self._one(layer)
            g, a = (_cholesky(_double(part)).diagonal().log().sum().item() for part in (term.outputs, term.inputs))
            found += 2 * (len(term.inputs) * g + len(term.outputs) * a)
        return found

    def _one(self, layer: str) -> Factors:
        if len(terms := self.factors.get(layer, ())) != 1:
            raise ValueError(f"this needs one term a layer; {layer!r} has {len(terms)}. Call merged() first.")
        return terms[0]


def nearest_kronecker(terms: Sequence[Factors], steps: int = 100) -> Factors:
    r"""The Kronecker product nearest to a sum of them in the Frobenius norm, by alternating least squares.

        minimise |sum_t G_t (x) A_t - G (x) A|:   G = sum_t <A_t, A> G_t / <A, A>,   A = sum_t <G_t, G> A_t / <G, G>

    Both are sums of the terms' own factors with weights that are at least 0, and so stay symmetric and positive
    semidefinite; only the weights are iterated, on the factors' inner products.
    Source: Van Loan & Pitsianis 1993, section 3. Chapter "Beyond the diagonal".
    """
    if not terms or any(term.scale is not None for term in terms):
        raise ValueError(f"there must be at least one term, all of KFAC; got {len(terms)}.")
    a, g = (torch.stack([_double(getattr(term, side)) for term in terms]) for side in ("inputs", "outputs"))
    gram_a, gram_g = (torch.einsum("sij,tij->st", part, part) for part in (a, g))
    of_a = of_g = torch.ones(len(terms), dtype=a.dtype, device=a.device)
    for _ in range(steps):
        of_g = gram_a @ of_a / (of_a @ gram_a @ of_a).clamp(min=1e-300)
        of_a = gram_g @ of_g / (of_g @ gram_g @ of_g).clamp(min=1e-300)
    whole = [torch.einsum("t,tij->ij", weights, part) for weights, part in ((of_a, a), (of_g, g))]
    return Factors(*(part.to(terms[0].inputs) for part in whole))


@dataclass(frozen=True)
class Penalties:
    """Several Gaussians side by side, each with its own anchor: the energy is their sum.

    What Kirkpatrick et al. 2017 propose from the third task on; `merge` shows that it is again one Gaussian.
    """

    parts: tuple[Diagonal, ...]

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """Sum of the parts' energies, nats."""
        return torch.stack([part.energy(theta) for part in self.parts]).sum()


def stacked_penalty(beliefs: Sequence[Belief], weights: Float[Tensor, " m"]) -> Callable[..., tuple[Tensor, Params]]:
    r"""The energies of M models' beliefs, each times its weight, as one function of their stacked parameters.

    (M, ...) by name -> weight_m energy_m, nats, (M,), and its gradient weight_m precision_m (theta_m - mean_m),
                        in closed form because autograd would pass over all parameters twice as often

    `Penalties` are merged first, whose energy differs by a constant, so that they cost what one penalty costs. Beliefs
    of other kinds are asked one after the other, with the inputs at hand, (M, b, ...).
    """
    merged = [merge(belief.parts) if isinstance(belief, Penalties) else belief for belief in beliefs]
    diagonal = [belief for belief in merged if isinstance(belief, Diagonal)]
    if len(diagonal) < len(beliefs):
        return partial(_one_by_one, beliefs, weights)
    constant = weights * torch.stack([b.energy(own.mean) for b, own in zip(beliefs, diagonal, strict=True)])
    mean = {name: torch.stack([belief.mean[name] for belief in diagonal]) for name in diagonal[0].mean}
    weighted = {n: torch.stack([w * b.precision[n] for w, b in zip(weights, diagonal, strict=True)]) for n in mean}

    def penalty(theta: Params, x: Tensor | None = None) -> tuple[Tensor, Params]:
        steps = {name: theta[name].detach() - value for name, value in mean.items()}
        pulls = {name: weighted[name] * step for name, step in steps.items()}
        doubled = [torch.linalg.vecdot(pulls[name].flatten(1), steps[name].flatten(1)) for name in steps]
        return constant + 0.5 * torch.stack(doubled).sum(0), pulls

    return penalty


def _one_by_one(beliefs: Sequence[Belief], weights: Tensor, theta: Params, x: Tensor) -> tuple[Tensor, Params]:
    values, pulls = torch.zeros_like(weights), {name: torch.zeros_like(value) for name, value in theta.items()}
    for m, belief in enumerate(beliefs):
        if isinstance(belief, Kronecker):
            own = {name: value.detach()[m] for name, value in theta.items()}
            for name, pull in belief.pull(own).items():
                pulls[name][m] = weights[m] * pull
                values[m] += 0.5 * (pulls[name][m] * (own[name] - belief.mean[name])).sum()
            continue
        own = {name: value.detach()[m].requires_grad_() for name, value in theta.items()}
        energy = weights[m] * belief.energy(own, x[m])
        if energy.requires_grad:
            values[m] = energy.detach()
            for name, pull in zip(own, torch.autograd.grad(energy, list(own.values())), strict=True):
                pulls[name][m] = pull
    return values, pulls


def merge(beliefs: Sequence[Diagonal]) -> Diagonal:
    r"""Product of diagonal Gaussians: precisions add up, means average by precision.

        precision = sum_k precision_k,   mean = (sum_k precision_k mean_k) / precision

    The energies' sum equals the merged energy up to a constant (Kirkpatrick et al. 2017, after eq. 3). Where all
    precisions are zero nothing is known, and the last belief's mean is kept.
    """
    if not beliefs:
        raise ValueError("there must be at least one belief to merge; got none.")
    for belief in beliefs:
        _same_shapes(belief.mean, beliefs[0].mean)
    mean, precision = {}, {}
    for name in beliefs[0].mean:
        precisions = torch.stack([belief.precision[name] for belief in beliefs])
        means = torch.stack([belief.mean[name] for belief in beliefs])
        total = precision[name] = precisions.sum(0)
        mean[name] = torch.where(total > 0, (precisions * means).sum(0) / total, means[-1])
    return Diagonal(mean, precision)


def log_normaliser(belief: Diagonal | Full | Kronecker) -> float:
    """Log of the density's constant, (log det precision - P log 2 pi) / 2: log N(theta) = log_normaliser - energy."""
    size = sum(value.numel() for value in belief.mean.values())
    return 0.5 * (belief.log_det() - size * math.log(2 * math.pi))


def _refuse_live(mean: Params) -> None:
    if live := [name for name, value in mean.items() if value.requires_grad]:
        raise ValueError(f"a belief needs values of its own; training moves {live[0]!r}. Use models.snapshot(model).")


def _layers(params: Params) -> dict[str, list[str]]:
    """Names of each layer's parameters, the weight first."""
    found: dict[str, list[str]] = {}
    for name in sorted(params, key=lambda name: name.endswith("bias")):
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return {layer: found[layer] for layer in dict.fromkeys(name.rpartition(".")[0] for name in params)}


def _matrix(params: Params, names: list[str]) -> Float[Tensor, "o i"]:
    """[W b], a row an output."""
    return torch.cat([params[name].reshape(len(params[name]), -1) for name in names], dim=1)


def _parameters(matrix: Float[Tensor, "o i"], names: list[str], like: Params) -> Params:
    """The inverse of `_matrix`."""
    parts = matrix.split([like[name].numel() // len(matrix) for name in names], dim=1)
    return {name: part.reshape(like[name].shape) for name, part in zip(names, parts, strict=True)}


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def _positive(precision: Params) -> Tensor:
    """The precisions as one vector, after checking that a density with them can be normalised."""
    vector = flatten(precision)
    if vector.min() <= 0:
        raise ValueError(f"the precision must be positive for this; got {vector.min():g}. Start from a proper prior.")
    return vector


def _cholesky(precision: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(precision)
    except torch.linalg.LinAlgError as error:
        why = f"the precision must be positive definite for this; got one that is not ({error})."
        raise ValueError(f"{why} Start from a proper prior.") from error


def _double(value: Tensor) -> Tensor:
    """In float64; by way of the CPU where the device has none, as MPS says by a TypeError."""
    try:
        return value.double()
    except TypeError:
        return value.cpu().double()


def _same_shapes(given: Params, like: Params, what: str = "parameter", whose: str = "belief") -> None:
    for name, value in like.items():
        got = tuple(given[name].shape) if name in given else "no such parameter"
        if got != (want := tuple(value.shape)):
            raise ValueError(f"{what} {name!r} must have the {whose}'s shape {want}; got {got}. Use one model.")
    if unknown := given.keys() - like.keys():
        raise ValueError(
            f"the belief must know every parameter; it knows nothing of {sorted(unknown)}. "
            "Make it from the same model, with the same parameters frozen."
        )
