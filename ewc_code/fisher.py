r"""Fisher information of a network: exact, sampled or from the data's labels; diagonal, Kronecker-factored or full.

The mean Fisher information per example, with the score s = d log p(y | x) / d theta (chapter "Fisher information"):

    F = 1/N sum_x E_{y ~ q(. | x)} [s s^T]

where q is the model itself (`labels="exact"`: the whole expectation; `labels="sampled"`: draws) or the data's own
labels (`labels="data"`: the "empirical Fisher", which is another matrix; Kunstner et al. 2019).

Everything is built from a few vectors r an example in the space of the outputs a, with J = d a / d theta:

    E[s s^T] = J^T (sum_m r_m r_m^T) J

    classes     exact: the k - 1 columns of L, L L^T = diag(p) - p p^T;   sampled, data: onehot(y) - p
    regression  exact: the k unit vectors;   sampled: standard normal draws;   data: y - a     (noise of variance 1)

Of sequences, with a label at each of t positions, N counts labels: F = 1/(n t) sum_x E[s s^T], s the score of all
labels of one sequence. Drawn labels do not depend on each other, so one vector r an example holds all positions, and
the cross terms between positions are zero in expectation. Chapter "Your own model".

Curvature is computed in the parameters' own precision, also inside of `torch.autocast` and where matrix products are to
be rounded. Where an accelerator's memory does not suffice, smaller batches are tried, with a warning.

Nothing here touches `.grad`, mode flags, torch's global random state, or buffers that forward() leaves alone.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.func import hessian as func_hessian
from torch.nn import functional as F

from ewc_code import layers
from ewc_code.data import Examples
from ewc_code.environment import products
from ewc_code.models import Params, flatten, nll, outputs, snapshot, unflatten

Labels = Literal["exact", "sampled", "data"]
Batch = tuple[Tensor, Tensor] | list[Tensor]  # inputs and labels, as loaders give them
LABELS = ("exact", "sampled", "data")
LARGEST_FULL = 20_000  # parameters; the matrix of this size takes 1.6 GB in float32
Found = TypeVar("Found")
LARGEST_EACH = 2**22  # numbers that the per-example gradients of one layer may take at a time: 17 MB in float32


def diagonal(
    model: nn.Module,
    data: Examples,
    labels: Labels = "exact",
    generator: torch.Generator | None = None,
    batch_size: int = 1000,
    draws: int = 1,
) -> Params:
    r"""Diagonal of the mean Fisher information.

        F_i = 1/N sum_x E_{y ~ q(. | x)} (d log p(y | x) / d theta_i)^2

    For a Linear layer a = W h + b the score of W is the outer product of g = d log p / d a and h, so its square needs
    no per-example gradient, only one matrix product a batch:

        F_W = 1/N sum_x (E g^2) (h^2)^T,     F_b = 1/N sum_x E g^2

    A Conv2d layer, and a Linear layer that sees an example as several rows, sums g h^T over its positions first. Any
    other parameter takes per-example gradients from autograd, with the same result.

    Args:
        model: (n, ...) -> outputs (n, k), in a deterministic mode.
        data: N examples: labels (n,) for classes, targets (n, k) for regression; used by 'data', checked by all.
        labels: Which q: 'exact' = the model's own distribution, 'sampled' = draws from it, 'data' = the labels.
            Sequences have no 'exact': it would take a way back for each class at each position.
        generator: Source of the draws; needed by 'sampled', on the CPU or on the data's device.
        batch_size: Examples at a time, at most; changes memory and speed, not the result.
        draws: Labels drawn an example by 'sampled'; their squares are averaged.

    Returns the parameters' shapes by name, mean over examples, in nats per squared unit of the parameter.

    Raises:
        ValueError: unknown `labels`, no generator for 'sampled', labels or shapes that do not fit, a module in training
            mode that makes the model random or batch-dependent, a parameter that the output does not depend on.

    Source: Kirkpatrick et al. 2017, before eq. 3; Kunstner et al. 2019, eqs. 2-3. Chapter "Fisher information".
    """
    noise = check(model, data, labels, generator, batch_size, draws)
    return _fitting(partial(_moments, model, data, labels, noise, second=False), model, batch_size)[0]


@dataclass(frozen=True)
class Estimate:
    """A diagonal Fisher from some of the examples, with what the choice of them leaves open."""

    mean: Params  #: As `diagonal` returns it.
    standard_error: Params  #: Of the mean, the same names and shapes.
    examples: int  #: Number used.


def estimate(
    model: nn.Module,
    data: Examples,
    examples: int,
    generator: torch.Generator,
    labels: Labels = "exact",
    batch_size: int = 1000,
    draws: int = 1,
) -> Estimate:
    r"""Diagonal Fisher of n examples drawn without replacement from the N, as an estimate of that of all.

        standard error_i^2 = (1 - n/N) / (n - 1) (mean of f_i^2 - (mean of f_i)^2),   f = one example's E[s^2]

    The factor 1 - n/N is what a choice without replacement from a finite set leaves. The noise of drawn labels does not
    go away with all examples seen: with 'sampled' the factor is left out, which errs on the safe side where n is large.
    `data` are the N examples, `examples` is n, from 2 to N, and `generator` is that of the choice and of the draws. All
    else is as for `diagonal`.
    Source: Cochran 1977, section 2.6 (simple random sampling). Chapter "Fisher in the wild".
    """
    if not 2 <= examples <= len(data):
        raise ValueError(f"examples must lie in 2..{len(data)}, the size of the data; got {examples}.")
    chosen = torch.randperm(len(data), generator=generator, device=generator.device)[:examples].to(data.x.device)
    left = 1 if labels == "sampled" else 1 - examples / len(data)
    data = data[chosen]
    noise = check(model, data, labels, generator, batch_size, draws)
    mean, square = _fitting(partial(_moments, model, data, labels, noise, second=True), model, batch_size)
    square = {n: value * len(data) / data.count for n, value in square.items()}  # f is a sequence's mean over positions
    error = {n: ((square[n] - mean[n] ** 2).clamp(min=0) * left / (examples - 1)).sqrt() for n in mean}
    return Estimate(mean, error, examples)


@dataclass(frozen=True)
class Factors:
    r"""Kronecker-factored mean Fisher of one layer, weight and bias together: [W b] as (out, in + 1), row by row.

        KFAC    F ~ G (x) A
        EKFAC   F ~ (U_G (x) U_A) diag(scale) (U_G (x) U_A)^T,   U the eigenvectors of G and A

    Without a bias there is no "+ 1".
    """

    inputs: Float[Tensor, "i i"]  #: A = 1/N sum h h^T, summed over positions, (in + 1, in + 1).
    outputs: Float[Tensor, "o o"]  #: G = 1/N sum E[g g^T], mean over positions, (out, out).
    scale: Float[Tensor, "o i"] | None = None  #: Second moments along the eigenvectors, (out, in + 1); None for KFAC.

    def dense(self) -> Float[Tensor, "oi oi"]:
        """The matrix, parameters in the order of the rows of [W b]."""
        if self.scale is None:
            return torch.kron(self.outputs, self.inputs)
        basis = torch.kron(*(torch.linalg.eigh(factor).eigenvectors for factor in (self.outputs, self.inputs)))
        return (basis * self.scale.reshape(-1)) @ basis.T


def kronecker(
    model: nn.Module,
    data: Examples,
    labels: Labels = "exact",
    generator: torch.Generator | None = None,
    batch_size: int = 1000,
    draws: int = 1,
    corrected: bool = False,
) -> dict[str, Factors]:
    r"""Kronecker factors of the mean Fisher by layer, a pair for each (KFAC), between layers nothing.

        Linear   G (x) A = (1/N sum E[g g^T]) (x) (1/N sum h h^T)
        Conv2d   A = 1/N sum_x sum_t h_t h_t^T,   G = 1/(N T) sum_x sum_t E[g_t g_t^T]     (T positions)

    Exact for one example, and where g and h are independent. `corrected` replaces the eigenvalues by the second moments
    of the gradients along the eigenvectors (EKFAC), which makes the diagonal in that basis exact; it takes a second
    pass over the data, with the same draws. All else is as for `diagonal`.

    A ValueError as of `diagonal`, and for a trainable parameter that is in no Linear or Conv2d layer that runs once an
    example, or layers frozen in part. Source: Martens & Grosse 2015, eq. 1; Grosse & Martens 2016, section 3.1; George
    et al. 2018, section 3. Chapter "Fisher in the wild".
    """
    noise = check(model, data, labels, generator, batch_size, draws)
    with _full_precision(model):
        whole = layers.closed_form(model, data.x).items()
    found = {name: layer for name, layer in whole if isinstance(layer, layers.Product)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad != (name in inside(found)):
            raise ValueError(
                f"Kronecker factors need whole Linear or Conv2d layers that run once an example; {name!r} is "
                f"{'not in one' if parameter.requires_grad else 'frozen in a layer that is not'}. Use fisher.diagonal."
            )
    return _fitting(partial(_factors, model, found, data, labels, noise, corrected=corrected), model, batch_size)


def _factors(
    model: nn.Module, found: layers.Products, data: Examples, labels: Labels, noise: Tensor, batch_size: int,
    corrected: bool,
) -> dict[str, Factors]:  # fmt: skip
    a, g, scale = ({name: torch.zeros((), device=data.x.device) for name in found} for _ in range(3))
    for _, seen, vectors in _passes(model, found, data, labels, noise, batch_size):
        for name, layer in found.items():
            h = layers.rows(layer, seen.inputs[name])  # (b, t, i)
            a[name] = a[name] + torch.einsum("bti,btj->ij", h, h) / data.count
        for arrived in map(seen.back, vectors):
            for name, layer in found.items():
                c = layers.columns(layer, arrived[name])  # (b, t, o)
                g[name] = g[name] + torch.einsum("bto,btp->op", c, c) / (len(data) * c.shape[1])
    if not corrected:
        return {name: Factors(a[name], g[name]) for name in found}
    bases = {name: [torch.linalg.eigh(factor[name]).eigenvectors for factor in (a, g)] for name in found}
    for _, seen, vectors in _passes(model, found, data, labels, noise, batch_size):
        turned = {name: layers.rows(layer, seen.inputs[name]) @ bases[name][0] for name, layer in found.items()}
        for arrived in map(seen.back, vectors):
            for name, layer in found.items():
                c, h = layers.columns(layer, arrived[name]) @ bases[name][1], turned[name]
                flat = layers.is_flat(layer, seen.inputs[name])
                squares = c[:, 0].square().T @ h[:, 0].square() if flat else (c.mT @ h).square().sum(0)
                scale[name] = scale[name] + squares / data.count
    return {name: Factors(a[name], g[name], scale[name]) for name in found}


def full(
    model: nn.Module,
    data: Examples,
    labels: Labels = "exact",
    generator: torch.Generator | None = None,
    batch_size: int = 100,
    draws: int = 1,
) -> Float[Tensor, "p p"]:
    r"""The whole mean Fisher information matrix, for models of up to `LARGEST_FULL` parameters.

        F = 1/N sum_x J^T (sum_m r_m r_m^T) J        ('exact', classes: the bracket is diag(p) - p p^T)

    Returned is (P, P), symmetric, positive semidefinite, in the order of `models.flatten`. As for `diagonal`, but
    `batch_size` counts the examples whose Jacobians (outputs x parameters each) are in memory at a time, and a model
    with too many parameters is a ValueError too.
    Source: Martens 2020, section 5. Chapter "Fisher information".
    """
    noise = check(model, data, labels, generator, batch_size, draws)
    _square_size(snapshot(model))
    return _fitting(partial(_matrix, model, data, labels, noise), model, batch_size)


def _matrix(model: nn.Module, data: Examples, labels: Labels, noise: Tensor, batch_size: int) -> Float[Tensor, "p p"]:
    size = _square_size(snapshot(model))
    total = torch.zeros(size, size, dtype=flatten(snapshot(model)).dtype, device=data.x.device)
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        with torch.no_grad():
            vectors = _vectors(model(batch.x), batch.y, labels, noise[start : start + batch_size])  # (m, b, *t, k)
        weighted = torch.einsum("mbk,bkp->mbp", vectors.flatten(2), logit_jacobian(model, batch)).reshape(-1, size)
        total += weighted.T @ weighted
    return (total + total.T) / (2 * data.count)


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Without autocast, TF32 or bfloat16 in matrix products, which would round what is squared."""
    exact = torch.autocast(next(model.parameters()).device.type, enabled=False)
    with exact, products("highest"), torch.inference_mode(False):
        yield


def _fitting(work: Callable[..., Found], model: nn.Module, batch_size: int) -> Found:
    """`work(batch_size=...)`, which does not depend on it but for memory: halved, visibly, as long as that runs out."""
    while True:
        try:
            with _full_precision(model), torch.no_grad():  # inputs may hang on a graph of their own
                return work(batch_size=batch_size)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
        # Outside of the except block, which would keep what the failed attempt holds.
        torch.cuda.empty_cache()
        warnings.warn(
            f"curvature of {batch_size} examples at a time did not fit into memory; {batch_size // 2} are tried. "
            f"The result is the same; batch_size={batch_size // 2} says so from the start.",
            stacklevel=3,
        )
        batch_size //= 2


def over_batches(
    estimate: Callable[[nn.Module, Examples], Any], model: nn.Module, batches: Iterable[Batch]
) -> tuple[Any, int]:
    """An estimate of this module over data that is not in memory whole, and the number of its examples.

    The mean of what `estimate` finds on each batch, weighted by the batch's size; one batch is in memory at a time, on
    the model's device. `batches` gives pairs (inputs, labels), as a `DataLoader` does; at least one. Chapter "Your own
    model".
    """
    where, found, n = next(model.parameters()).device, None, 0
    for pair in batches:
        if not (isinstance(pair, tuple | list) and [isinstance(part, Tensor) for part in pair] == [True, True]):
            got = [type(p).__name__ for p in pair] if isinstance(pair, tuple | list) else type(pair).__name__
            raise ValueError(f"batches must be pairs of tensors, (inputs, labels); got {got}. Make them pairs first.")
        batch = Examples(*(part.to(where) for part in pair))
        count, new = batch.count, estimate(model, batch)
        n += count
        del pair, batch  # before the next is made
        found = new if found is None else _running(found, new, count / n)
    if found is None:
        raise ValueError("there must be at least one batch; got none. An iterator can be gone through only once.")
    return found, n


def _running(old: Any, new: Any, share: float) -> Any:
    """The running mean, after one more batch that holds this share of all examples so far."""
    if isinstance(old, Factors):
        if old.scale is not None:
            raise ValueError(
                "batches must be of plain Kronecker factors; got corrected ones, each in a basis of its own."
            )
        return Factors(_running(old.inputs, new.inputs, share), _running(old.outputs, new.outputs, share))
    if isinstance(old, dict):
        return {name: _running(value, new[name], share) for name, value in old.items()}
    return old + share * (new - old)


def scores(model: nn.Module, x: Tensor, y: Tensor, params: Params | None = None) -> Params:
    """Per-example scores d log p(y | x) / d theta, by `vmap` over single examples; the plain way, and the oracle.

    The model maps inputs `x` (n, ...) -> outputs (n, k); `y` are class indices, (n,), or regression targets, (n, k).
    Scores are taken at `params`, on which `torch.func` transforms act; None for the model's own parameters. Returned
    are (n, *parameter shape) by name, nats per unit of the parameter.
    """

    def log_prob(theta: Params, xi: Tensor, yi: Tensor) -> Tensor:
        return -nll(functional_call(model, theta, (xi[None],)), yi[None])

    return vmap(grad(log_prob), in_dims=(None, 0, 0))(snapshot(model) if params is None else params, x, y)


def logit_jacobian(model: nn.Module, data: Examples) -> Float[Tensor, "n k p"]:
    """Jacobian of the outputs (logits, for classes) in the parameters, one matrix an example; positions in a row."""
    params = snapshot(model)

    def answer(vector: Tensor, xi: Tensor) -> Tensor:
        return functional_call(model, unflatten(vector, params), (xi[None],))[0].flatten()

    def rows(xi: Tensor) -> Tensor:  # not jacrev, whose second vmap takes PReLU's examples for its channels
        out, back = vjp(lambda vector: answer(vector, xi), flatten(params))  # type: ignore[misc]
        return torch.stack([back(unit)[0] for unit in torch.eye(len(out), dtype=out.dtype, device=out.device)])

    return vmap(rows)(data.x)


def hessian(model: nn.Module, data: Examples) -> Float[Tensor, "p p"]:
    """Hessian of the mean negative log likelihood at the model's parameters, d^2 L / d theta d theta^T.

    Equals the exact Fisher for softmax regression everywhere; elsewhere they differ by the residual's share of the
    curvature, and the Hessian need not be positive (chapter "Fisher information").
    """
    check(model, data, "data", None, 1, 1)
    params = snapshot(model)
    _square_size(params)

    def loss(vector: Tensor) -> Tensor:
        return nll(functional_call(model, unflatten(vector, params), (data.x,)), data.y)

    return func_hessian(loss)(flatten(params)).detach()


def trace(fisher: Params) -> float:
    """Sum of a diagonal Fisher over all parameters."""
    return sum(value.sum().item() for value in fisher.values())


def _vectors(out: Float[Tensor, "b *t k"], y: Tensor, labels: Labels, noise: Tensor) -> Float[Tensor, "m b *t k"]:
    """The vectors r_m of the module's formula; `noise` are this batch's rows of what `check` drew."""
    if y.is_floating_point():
        if labels == "exact":
            return torch.eye(out.shape[1], dtype=out.dtype, device=out.device)[:, None].expand(-1, len(out), -1)
        return (y - out)[None] if labels == "data" else noise.permute(1, 0, 2) / noise.shape[1] ** 0.5
    probs, k = out.softmax(-1), out.shape[-1]
    if labels == "exact":
        return covariance_root(probs).permute(2, 0, 1).contiguous()
    if labels == "data":
        return (F.one_hot(y, k) - probs)[None]
    # The class in whose part of 0..1 a uniform number falls; rounding may leave the last part a little short of 1.
    drawn = torch.searchsorted(probs.cumsum(-1), noise.movedim(1, -1).contiguous()).clamp(max=k - 1)  # (b, *t, draws)
    return (F.one_hot(drawn, k) - probs[..., None, :]).movedim(-2, 0) / noise.shape[1] ** 0.5


def covariance_root(probs: Float[Tensor, "b k"]) -> Float[Tensor, "b k j"]:
    r"""Cholesky factor of a softmax's covariance in closed form: L L^T = diag(p) - p p^T, with j = k - 1 columns.

        L_jj = sqrt(p_j t_j / t_{j-1}),   L_ij = -(p_i / t_j) L_jj for i > j,   t_j = sum of p_i over i > j

    One column less than there are classes: what the probabilities gain somewhere they lose elsewhere.
    Source: Tanabe & Sagae 1992. Chapter "Fisher in the wild".
    """
    after = probs.flip(1).cumsum(1).flip(1)  # t_{j-1} at j
    before, after = after[:, :-1], after[:, 1:]
    tiny = torch.finfo(probs.dtype).tiny
    corner = (probs[:, :-1] * (after / before.clamp(min=tiny))).sqrt()  # (b, j)
    below = -(probs[:, :, None] / after[:, None].clamp(min=tiny)) * corner[:, None]
    return torch.diagonal_scatter(torch.tril(below, -1), corner, 0, 1, 2)


def _passes(
    model: nn.Module, found: layers.Layers, data: Examples, labels: Labels, noise: Tensor, batch_size: int
) -> Iterator[tuple[Examples, layers.Pass, Float[Tensor, "m b *t k"]]]:
    """Batch by batch: the examples, a pass through the network, and the vectors to send back through it."""
    room: layers.Room = {}
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        seen = layers.run(model, found, batch.x, room)
        handed: list[Any] = [_vectors(seen.outputs, batch.y, labels, noise[start : start + batch_size]), seen]
        del seen  # whoever takes it may let go of it
        yield batch, handed.pop(), handed.pop()


def _moments(
    model: nn.Module, data: Examples, labels: Labels, noise: Tensor, batch_size: int, second: bool
) -> tuple[Params, ...]:
    """Sums over the examples of f = E[s^2] and, if asked for, of f^2, by N."""
    found = layers.closed_form(model, data.x)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    totals = [{name: torch.zeros_like(value) for name, value in params.items()} for _ in range(1 + second)]
    rest = {name: value for name, value in params.items() if name not in inside(found)}
    batch_size = min(batch_size, max(1, LARGEST_EACH // max(1, _numbers(model, found, rest, data.x[:1]))))
    for batch, seen, vectors in _passes(model, found, data, labels, noise, batch_size):
        flat = {name for name, layer in found.items() if layers.is_flat(layer, seen.inputs[name])}
        each = _squares_by_layer(found, flat, seen, vectors) if found else {}
        others = _squares(model, rest, batch.x, vectors) if rest else {}
        kept = {name: layers.kept(seen.room, ("inputs", name), seen.inputs[name]) for name in flat}
        inputs = {name: torch.mul(seen.inputs[name], seen.inputs[name], out=out) for name, out in kept.items()}
        del seen, vectors  # their memory is as much again as what is still needed
        for sums, up in zip(totals, (lambda value: value, torch.square), strict=False):
            for name, squares in others.items():
                sums[name] += up(squares).sum(0)
            for name, squares in each.items():
                own = {key.rpartition(".")[2]: sums[key] for key in inside({name: found[name]}) if key in sums}
                if name not in flat:
                    parts = layers.split(found[name], up(squares).sum(0))
                    for part, total in own.items():
                        total += parts[part]
                    continue
                if "weight" in own:  # it may be frozen
                    own["weight"].addmm_(up(squares).T, up(inputs[name]))
                if "bias" in own:
                    own["bias"] += up(squares).sum(0)
        del inputs, kept, each, others, squares  # before the next pass
    return tuple({name: value.div_(data.count) for name, value in sums.items()} for sums in totals)


def _squares_by_layer(
    found: layers.Layers, flat: set[str], seen: layers.Pass, vectors: Float[Tensor, "m b *t k"]
) -> dict[str, Tensor]:
    """By layer: E[g^2], (b, out), where each example is one row; else E[s^2] itself, (b, out, in + 1)."""
    each: dict[str, Tensor] = {}
    place = "back" if len(vectors) == 1 else "squares"  # the gradients of a single way back are needed no more
    ways = {name: layers.gradients(layer, seen.inputs[name]) for name, layer in found.items() if name not in flat}
    for vector in vectors:
        for name, g in seen.back(vector).items():
            part = g if name in flat else ways[name](g)
            if name in each:
                each[name].addcmul_(part, part)
            else:
                each[name] = torch.mul(part, part, out=layers.kept(seen.room, (place, name), part))
    return each


def inside(found: layers.Layers) -> set[str]:
    """Names of the parameters of these layers, in the model."""
    return {f"{name}.{own}" if name else own for name, layer in found.items() for own, _ in layer.named_parameters()}


def _numbers(model: nn.Module, found: layers.Layers, rest: Params, x: Tensor) -> int:
    """Numbers an example that the squares of one layer need, where they do not factorise."""
    seen = layers.run(model, found, x)
    needed = [2 * sum(value.numel() for value in rest.values())]
    for name, layer in found.items():
        if not layers.is_flat(layer, seen.inputs[name]):
            rows = layers.rows(layer, seen.inputs[name]).numel() if isinstance(layer, layers.Product) else 0
            needed.append(rows + 2 * sum(p.numel() for p in layer.parameters()))
    return max(needed)


def _squares(model: nn.Module, rest: Params, x: Tensor, vectors: Float[Tensor, "m b *t k"]) -> Params:
    """E[s^2] of the parameters `rest`, from per-example gradients by autograd: (b, *shape) each."""

    def along(theta: Params, xi: Tensor, vector: Tensor) -> Tensor:
        return (functional_call(model, theta, (xi[None],))[0] * vector).sum()

    each = vmap(grad(along), in_dims=(None, 0, 0))
    total = {name: value.new_zeros(len(x), *value.shape) for name, value in rest.items()}
    with torch.no_grad():  # acts on what is around `grad`: the other parameters, whose graph nobody needs
        for vector in vectors:
            try:
                found = each(rest, x, vector)
            except RuntimeError as error:  # what vmap cannot do: recurrent layers, functions with their own backward
                if isinstance(error, torch.cuda.OutOfMemoryError) or "random operation" in str(error):
                    raise
                found = _one_by_one(model, rest, x, vector)
            for name, g in found.items():
                total[name] += g.square()
    return total


def _one_by_one(model: nn.Module, rest: Params, x: Tensor, vector: Tensor) -> Params:
    """What `vmap` would give, (b, *shape) each, by a way back for each example."""
    own = [model.get_parameter(name) for name in rest]
    with torch.enable_grad():
        heads = ((model(xi[None])[0] * v).sum() for xi, v in zip(x, vector, strict=True))
        each = [torch.autograd.grad(head, own, materialize_grads=True) for head in heads]
    return {name: torch.stack(column) for name, column in zip(rest, zip(*each, strict=True), strict=True)}


def check(
    model: nn.Module, data: Examples, labels: str, generator: torch.Generator | None, batch_size: int, draws: int
) -> Float[Tensor, "n ..."]:
    """Refuse what has no Fisher, and draw what the labels of all examples are made from.

    At once for all: so the size of the batches does not change the draws.
    """
    if not isinstance(data, Examples):
        raise ValueError(f"data must be Examples; got {type(data).__name__}. Batches go through fisher.over_batches.")
    dtype = next(iter(snapshot(model).values())).dtype  # of what is trained; refuses a model with nothing to train
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(map(repr, LABELS))}; got {labels!r}.")
    if labels == "sampled" and generator is None:
        raise ValueError("labels='sampled' needs a torch.Generator; got None. Pass generator=environment.generator(0).")
    if labels == "exact" and data.count > len(data):
        raise ValueError(
            f"labels='exact' needs one label an example; got sequences of {data.y.shape[1]}. Use labels='sampled' with "
            "a generator: its one draw an example costs one way back, not one for each class at each position."
        )
    for name, number in (("batch_size", batch_size), ("draws", draws)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}.")
    for name, module in model.named_modules():
        batchwise = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # Without running statistics the batch's own are used in either mode: then examples are never independent.
        if (module.training and (batchwise or _is_random(module))) or (batchwise and module.running_mean is None):
            raise ValueError(
                f"curvature needs a deterministic model that treats each example alone; {name!r} "
                f"({type(module).__name__}) is in training mode or has no running statistics. Call model.eval() first."
            )
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    if halves := [name for name, kind in trained.items() if kind not in (torch.float32, torch.float64)]:
        raise ValueError(
            f"curvature needs parameters in float32 or float64, for squares lose too much in less; {halves[0]!r} is "
            f"{trained[halves[0]]}. Train under torch.autocast, or use copy.deepcopy(model).float()."
        )
    with _full_precision(model):
        outputs(model, data)
        _refuse_unstable(model, data)
        _refuse_unused(model, data)
    if labels != "sampled" or generator is None:
        return next(model.parameters()).new_empty(len(data), 0)
    draw = torch.randn if data.y.is_floating_point() else torch.rand
    shape = (len(data), draws, *data.y.shape[1:])
    return draw(shape, generator=generator, device=generator.device, dtype=dtype).to(data.x.device)


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RReLU)


def _refuse_unstable(model: nn.Module, data: Examples) -> None:
    """The same for what no module's type tells, such as `F.dropout` inside of forward(): look at the outputs."""
    devices = [data.x.device] if data.x.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad():
        state = lambda: torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)])  # noqa: E731
        before, alone, beside = state(), model(data.x[:1])[0], model(data.x[:2])[0]
        # A block left out now and then shows only in many calls, if anything was drawn. Equal -inf: masked classes.
        again = [model(data.x[:1])[0] for _ in range(0 if torch.equal(before, state()) else 32)]
        changed = torch.stack([(alone - o).where(alone != o, 0).abs().max() for o in (beside, *again)]).max()
    # Rounding differs with the batch size, by some units of the last place; dropout by the share that it drops.
    tolerance = max(0.01, 4 * torch.finfo(alone.dtype).eps) * beside.nan_to_num(neginf=0).abs().max()
    if not changed <= tolerance:
        raise ValueError(
            f"curvature needs a deterministic model that treats each example alone; outputs changed by {changed:g} "
            f"between calls. Call model.eval() first; nan means that parameters or inputs are not finite."
        )


def _square_size(params: Params) -> int:
    size = sum(value.numel() for value in params.values())
    if size > LARGEST_FULL:
        raise ValueError(
            f"a full matrix needs at most {LARGEST_FULL:,} parameters; the model has {size:,}. Use fisher.diagonal."
        )
    return size


def _refuse_unused(model: nn.Module, data: Examples) -> None:
    with torch.enable_grad():
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(model(data.x[:1]).sum(), [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(named, found, strict=True):
        if gradient is None:
            raise ValueError(
                f"every trainable parameter must take part in the model's output; {name!r} has no gradient. "
                f"Use it in forward(), or freeze it with requires_grad_(False)."
            )
