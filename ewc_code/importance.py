r"""Importances other than the Fisher's: what each parameter did on the way, or what it does to the answers.

Synaptic intelligence (SI), memory-aware synapses (MAS) and Riemannian walk (RWalk) put these where EWC puts the
diagonal of the mean Fisher. Chapter "Beyond the diagonal" says when they coincide with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ewc_code import fisher, layers
from ewc_code.data import Examples
from ewc_code.models import Params, flatten, snapshot


@dataclass(frozen=True)
class Path:
    """The way of the parameters through the training on one task."""

    start: Params  #: Where it began.
    work: Params | None = None  #: How much each parameter lowered the loss, nats, as `training.fit` adds it up.

    @classmethod
    def begin(cls, model: nn.Module, tracked: bool) -> "Path":
        """A path that begins at the model's parameters, with room for the work if it is tracked."""
        start = snapshot(model)
        return cls(start, {name: torch.zeros_like(value) for name, value in start.items()} if tracked else None)


def along_path(path: Path, end: Params, damping: float) -> Params:
    r"""SI: the curvature with which a quadratic would have fallen by each parameter's share of the work.

        importance_i = 2 max(work_i, 0) / ((end_i - start_i)^2 + damping)

    so that without damping 1/2 importance_i (end_i - start_i)^2 = max(work_i, 0) for all that moved. The damping,
    squared units, bounds it where a parameter hardly moved. The work must be that of the loss without the penalty.
    Source: Zenke et al. 2017, eqs. 3-5 (whose penalty has no 1/2, hence our 2). Chapter "Beyond the diagonal".
    """
    if damping < 0 or path.work is None:
        raise ValueError(
            f"SI needs a tracked path and a damping of at least 0; got {'no work' if path.work is None else damping}. "
            "Let training.learn call it, or give training.fit a `work` to fill."
        )
    tiny = torch.finfo(next(iter(end.values())).dtype).tiny
    return {
        name: 2 * path.work[name].clamp(min=0) / ((value - path.start[name]).square() + damping).clamp(min=tiny)
        for name, value in end.items()
    }


def walk(information: Params, path: Path, end: Params) -> Params:
    r"""RWalk: the Fisher, and the work for each nat that the answers moved; each as a share of its own largest.

        importance = F / max F + s / max s,   s_i = max(work_i, 0) / (1/2 F_i (end_i - start_i)^2 + e)

    with e the mean of F_i (end_i - start_i)^2 / 2, so that what hardly moved does not count most. The paper adds s up
    in pieces of a few steps, lets one running Fisher go on and halves older scores at each task; here there is one
    piece, the task, with the Fisher at its end, and tasks are added up.
    Source: Chaudhry et al. 2018, section 4. Chapter "Beyond the diagonal".
    """
    if path.work is None:
        raise ValueError("RWalk needs a tracked path; got one without work. Let training.learn call it.")
    moved = {name: 0.5 * information[name] * (value - path.start[name]).square() for name, value in end.items()}
    least = flatten(moved).mean().clamp(min=1e-30)
    scores = {name: path.work[name].clamp(min=0) / (value + least) for name, value in moved.items()}
    tops = [torch.stack([v.max() for v in side.values()]).max().clamp(min=1e-30) for side in (information, scores)]
    return {name: information[name] / tops[0] + scores[name] / tops[1] for name in moved}


def sensitivity(model: nn.Module, data: Examples, batch_size: int = 1000) -> Params:
    r"""MAS: how much the squared length of the answer hangs on each parameter; needs no labels.

        importance_i = 1/N sum_x |d |a(x)|^2 / d theta_i|,   a = outputs (logits, for classes)

    The absolute value is taken example by example: a batch's mean gradient would let examples cancel. For a Linear
    layer |g h^T| = |g| |h|^T, so that here, too, one matrix product a batch is enough.
    The model is in a deterministic mode; returned are the parameters' shapes by name, squared logits per unit.
    Source: Aljundi et al. 2018, eq. 2 with their squared norm. Chapter "Beyond the diagonal".
    """
    fisher.check(model, data, "data", None, batch_size, 1)
    found, params = layers.closed_form(model, data.x), snapshot(model)
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    rest = {name: value for name, value in params.items() if name not in fisher.inside(found)}

    def length(theta: Params, xi: Tensor) -> Tensor:
        return functional_call(model, theta, (xi[None],)).square().sum()

    each = vmap(grad(length), in_dims=(None, 0))
    for x in data.x.detach().split(batch_size):
        seen = layers.run(model, found, x)
        back = seen.back(2 * seen.outputs) if found else {}
        for name, layer in found.items():
            g, h = back[name], seen.inputs[name]
            if layers.is_flat(layer, h):
                whole = g.abs().T @ layers.rows(layer, h)[:, 0].abs()
            else:
                whole = layers.gradients(layer, h)(g).abs().sum(0)
            for part, value in layers.split(layer, whole).items():
                if (key := f"{name}.{part}".removeprefix(".")) in total:  # it may be frozen
                    total[key] += value
        for start in range(0, len(x) if rest else 0, 100):  # their gradients are kept an example each
            for name, g in each(rest, x[start : start + 100]).items():
                total[name] += g.detach().abs().sum(0)
    return {name: value / data.count for name, value in total.items()}
