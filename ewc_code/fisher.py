r"""Fisher information of a classifier: exact, sampled or from the data's labels; diagonal or full.

The mean Fisher information per example, with the score s = d log p(y | x) / d theta (chapter "Fisher information"):

    F = 1/N sum_x E_{y ~ q(. | x)} [s s^T]

where q is the model itself (`labels="exact"`: the sum over all classes; `labels="sampled"`: one draw an example) or the
data's own labels (`labels="data"`: the "empirical Fisher", which is another matrix; Kunstner et al. 2019).

Nothing here touches `.grad`, buffers, mode flags or torch's global random state.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.func import hessian as func_hessian
from torch.nn import functional as F

from ewc_code.data import Examples
from ewc_code.models import Params, classes, flatten, snapshot, unflatten

Labels = Literal["exact", "sampled", "data"]
LABELS = ("exact", "sampled", "data")
LARGEST_FULL = 20_000  # parameters; the matrix of this size takes 1.6 GB in float32


def diagonal(
    model: nn.Module,
    data: Examples,
    labels: Labels = "exact",
    generator: torch.Generator | None = None,
    batch_size: int = 1000,
) -> Params:
    r"""Diagonal of the mean Fisher information.

        F_i = 1/N sum_x sum_c q(c | x) (d log p(c | x) / d theta_i)^2

    For a Linear layer a = W h + b the score of W is the outer product of g = d log p / d a and h, so its square needs
    no per-example gradient, only one matrix product a batch:

        F_W = 1/N sum_x (sum_c q(c | x) g_c^2) (h^2)^T,     F_b = 1/N sum_x sum_c q(c | x) g_c^2

    A model whose trainable parameters all sit in Linear layers that run once an example takes this way; any other
    module takes per-example gradients (`scores`), with the same result.

    Args:
        model: (n, ...) -> logits (n, k), in a deterministic mode.
        data: N examples; `data.y` is used only by `labels="data"` and for checking.
        labels: Which q: 'exact' = the model's probabilities, 'sampled' = one draw an example, 'data' = the labels.
        generator: Source of the draws; needed by 'sampled', on the CPU or on the data's device.
        batch_size: Examples at a time; changes memory and speed, not the result.

    Returns:
        By name, the shapes of the parameters; nats per squared unit of the parameter, mean over examples.

    Raises:
        ValueError: unknown `labels`, no generator for 'sampled', labels or shapes that do not fit, a module in training
            mode that makes the model random or batch-dependent, a parameter that the output does not depend on.

    Source: Kirkpatrick et al. 2017, before eq. 3; Kunstner et al. 2019, eqs. 2-3. Chapter "Fisher information".
    """
    _check(model, data, labels, generator, batch_size)
    if labels == "sampled":
        data, labels = _drawn(model, data, generator, batch_size), "data"
    total = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    layers = _linear_layers(model, data)
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        part = (
            _linear_squares(model, layers, batch, labels)
            if layers is not None
            else _score_squares(model, batch, labels)
        )
        for name, value in part.items():
            total[name] += value
    return {name: value / len(data) for name, value in total.items()}


def full(
    model: nn.Module,
    data: Examples,
    labels: Labels = "exact",
    generator: torch.Generator | None = None,
    batch_size: int = 100,
) -> Float[Tensor, "p p"]:
    r"""The whole mean Fisher information matrix, for models of up to `LARGEST_FULL` parameters.

    With J = d logits / d theta of one example and r_c = (one-hot c) - p, the score of class c is J^T r_c, so

        F = 1/N sum_x J^T (sum_c q(c | x) r_c r_c^T) J        ('exact': the bracket is diag(p) - p p^T)

    Args:
        model: As for `diagonal`.
        data: As for `diagonal`.
        labels: As for `diagonal`.
        generator: As for `diagonal`.
        batch_size: Examples whose Jacobians (classes x parameters each) are in memory at a time.

    Returns:
        (P, P), symmetric, positive semidefinite; rows and columns in the order of `models.flatten`.

    Raises:
        ValueError: as `diagonal`, and when the model has too many parameters.

    Source: Martens 2020, section 5. Chapter "Fisher information".
    """
    _check(model, data, labels, generator, batch_size)
    if labels == "sampled":
        data, labels = _drawn(model, data, generator, batch_size), "data"
    params = snapshot(model)
    size = _square_size(params)
    total = torch.zeros(size, size, dtype=flatten(params).dtype, device=data.x.device)
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        jacobian = logit_jacobian(model, batch)  # (b, k, P)
        probs = _logits(model, batch).softmax(1)  # (b, k)
        weights = _weights(probs, batch, labels)  # (b, k)
        # sum_c q_c r_c r_c^T written out: diag(q) - q p^T - p q^T + p p^T, since sum_c q_c = 1
        middle = (
            torch.diag_embed(weights)
            - weights[:, :, None] * probs[:, None, :]
            - probs[:, :, None] * weights[:, None, :]
            + probs[:, :, None] * probs[:, None, :]
        )  # (b, k, k)
        right = torch.einsum("bcd,bdp->bcp", middle, jacobian)
        total += jacobian.reshape(-1, size).T @ right.reshape(-1, size)
    return (total + total.T) / (2 * len(data))


def scores(model: nn.Module, x: Tensor, y: Tensor) -> Params:
    """Per-example scores d log p(y | x) / d theta, by `vmap` over single examples; the plain way, and the oracle.

    Args:
        model: (n, ...) -> logits (n, k).
        x: Inputs, (n, ...).
        y: Class indices, (n,).

    Returns:
        By name, (n, *parameter shape), nats per unit of the parameter.
    """

    def log_prob(params: Params, xi: Tensor, yi: Tensor) -> Tensor:
        logits = functional_call(model, params, (xi[None],))  # (1, k)
        return -F.cross_entropy(logits, yi[None])

    return vmap(torch.func.grad(log_prob), in_dims=(None, 0, 0))(snapshot(model), x, y)


def logit_jacobian(model: nn.Module, data: Examples) -> Float[Tensor, "n k p"]:
    """Jacobian of the logits in the parameters, d logits_c(x) / d theta, one matrix an example."""
    params = snapshot(model)

    def logits(vector: Tensor, xi: Tensor) -> Tensor:
        return functional_call(model, unflatten(vector, params), (xi[None],))[0]

    return vmap(jacrev(logits), in_dims=(None, 0))(flatten(params), data.x)


def hessian(model: nn.Module, data: Examples) -> Float[Tensor, "p p"]:
    """Hessian of the mean negative log likelihood at the model's parameters, d^2 L / d theta d theta^T.

    Equals the exact Fisher for softmax regression everywhere; elsewhere they differ by the residual's share of the
    curvature, and the Hessian need not be positive (chapter "Fisher information").
    """
    _check(model, data, "data", None, 1)
    params = snapshot(model)
    _square_size(params)

    def nll(vector: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, unflatten(vector, params), (data.x,)), data.y)

    return func_hessian(nll)(flatten(params)).detach()


def trace(fisher: Params) -> float:
    """Sum of a diagonal Fisher over all parameters."""
    return sum(value.sum().item() for value in fisher.values())


def _check(model: nn.Module, data: Examples, labels: str, generator: torch.Generator | None, batch_size: int) -> None:
    snapshot(model)  # refuses a model with nothing to train
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(map(repr, LABELS))}; got {labels!r}.")
    if labels == "sampled" and generator is None:
        raise ValueError(
            "labels='sampled' must come with a torch.Generator, so that the draws can be repeated; got None. "
            "Pass generator=environment.generator(seed)."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    for name, module in model.named_modules():
        batchwise = isinstance(module, nn.modules.batchnorm._BatchNorm)
        # Without running statistics the batch's own are used in either mode: then examples are never independent.
        if (module.training and (batchwise or _is_random(module))) or (batchwise and module.running_mean is None):
            raise ValueError(
                f"curvature needs a deterministic model that treats each example alone; {name!r} "
                f"({type(module).__name__}) is in training mode or has no running statistics. Call model.eval() first."
            )
    classes(model, data)
    _refuse_unstable(model, data)
    _refuse_unused(model, data)


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
        alone, beside = model(data.x[:1])[0], model(data.x[:2])[0]
    # Rounding differs with the batch size, by some units of the last place; dropout by the share that it drops.
    tolerance = max(0.01, 4 * torch.finfo(alone.dtype).eps) * beside.abs().max()
    if (alone - beside).abs().max() > tolerance:
        raise ValueError(
            f"curvature needs a deterministic model that treats each example alone; the first example's logits changed "
            f"by {(alone - beside).abs().max().item():g} between two calls, alone and beside the second. "
            f"Call model.eval() first."
        )


def _square_size(params: Params) -> int:
    size = sum(value.numel() for value in params.values())
    if size > LARGEST_FULL:
        raise ValueError(
            f"a full matrix needs at most {LARGEST_FULL:,} parameters; the model has {size:,}. Use fisher.diagonal."
        )
    return size


def _logits(model: nn.Module, batch: Examples) -> Tensor:
    with torch.no_grad():
        return model(batch.x)


def _drawn(model: nn.Module, data: Examples, generator: torch.Generator | None, batch_size: int) -> Examples:
    """The same inputs with labels drawn from the model: all in one draw, so that batches do not change them."""
    starts = range(0, len(data), batch_size)
    probs = torch.cat([_logits(model, data[start : start + batch_size]).softmax(1) for start in starts])
    assert generator is not None
    drawn = torch.multinomial(probs.to(generator.device), 1, generator=generator)[:, 0]
    return Examples(data.x, drawn.to(data.y.device))


def _weights(probs: Tensor, batch: Examples, labels: Labels) -> Tensor:
    """q(c | x), (b, k): the model's probabilities, or a one-hot row for the label."""
    return probs if labels == "exact" else F.one_hot(batch.y, probs.shape[1]).to(probs.dtype)


def _linear_layers(model: nn.Module, data: Examples) -> dict[str, nn.Linear] | None:
    """The Linear layers, if they hold every trainable parameter and each runs once an example; else None.

    A parameter used twice, or outside of its layer, or a layer that sees an example as several rows, would make the
    closed form wrong without a sign. So its squares are compared with autograd's, example by example, on the first two.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    held = [f"{layer}.{name}" if layer else name for layer, m in layers.items() for name in ("weight", "bias")]
    every = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not set(every) <= set(held) or any(not p.requires_grad for m in layers.values() for p in m.parameters()):
        return None
    if any(hook for m in layers.values() for hook in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)):
        return None
    probe = data[:2]
    with torch.enable_grad():
        inputs, outputs, logits = _run(model, layers, probe.x)
        # Not the score, which a well fitted example makes vanish: a direction that no fit can hide.
        heads = logits @ torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype, device=logits.device)  # (b,)
        singles, together = heads.unbind(), heads.sum()
    shapes = [part[name][0].shape[:-1] for part in (inputs, outputs) for name in layers if len(part[name]) == 1]
    if shapes != [heads.shape] * (2 * len(layers)):
        return None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = [torch.autograd.grad(head, list(parameters.values()), retain_graph=True) for head in singles]
    squares = {name: sum(g.square() for g in parts) for name, *parts in zip(parameters, *found, strict=True)}
    back = torch.autograd.grad(together, [outputs[name][0] for name in layers], allow_unused=True)
    if any(g is None for g in back):
        return None
    for name, value in _layer_squares(layers, inputs, [g.square() for g in back]).items():
        true = squares.get(name)
        if true is None or (value - true).norm() > 1e-3 * true.norm():
            return None
    return layers


def _run(
    model: nn.Module, layers: dict[str, nn.Linear], x: Tensor
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], Tensor]:
    """Forward pass that keeps what each layer received and returned."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, received: tuple[Tensor, ...], returned: Tensor) -> Tensor:
            inputs[name].append(received[0].detach())
            outputs[name].append(returned)
            return returned.clone()  # what follows may work in place; what was kept must stay the layer's own output

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(keep(name)).remove)
        logits = model(x)
    return inputs, outputs, logits


def _linear_squares(model: nn.Module, layers: dict[str, nn.Linear], batch: Examples, labels: Labels) -> Params:
    """Sum over the batch of the expected squared scores, by the closed form for Linear layers."""
    with torch.enable_grad():
        inputs, outputs, logits = _run(model, layers, batch.x)
    probs = logits.detach().softmax(1)  # (b, k)
    k = probs.shape[1]
    if labels == "exact":
        # Class c carries sqrt(p_c) in its backward pass, so that the squares come out weighted by p_c.
        eye = torch.eye(k, dtype=probs.dtype, device=probs.device)
        residuals = [probs[:, c, None].sqrt() * (eye[c] - probs) for c in range(k)]  # k of (b, k)
    else:
        residuals = [_weights(probs, batch, labels) - probs]
    ends = [outputs[name][0] for name in layers]
    squares = [torch.zeros_like(end) for end in ends]
    for i, residual in enumerate(residuals):
        back = torch.autograd.grad(logits, ends, residual, retain_graph=i + 1 < len(residuals))
        for square, g in zip(squares, back, strict=True):
            square.addcmul_(g, g)  # (b, out)
    return _layer_squares(layers, inputs, squares)


def _layer_squares(layers: dict[str, nn.Linear], inputs: dict[str, list[Tensor]], squares: list[Tensor]) -> Params:
    """Squares of outer products, summed over rows: (g h^T)^2 = g^2 (h^2)^T, from each layer's g^2 and h."""
    found = {}
    for (name, layer), square in zip(layers.items(), squares, strict=True):
        prefix = f"{name}." if name else ""
        found[f"{prefix}weight"] = square.T @ inputs[name][0].square()  # (out, in)
        if layer.bias is not None:
            found[f"{prefix}bias"] = square.sum(0)  # (out,)
    return found


def _score_squares(model: nn.Module, batch: Examples, labels: Labels) -> Params:
    """The same for any module, from per-example gradients: classes x examples x parameters numbers at a time."""
    probs = _logits(model, batch).softmax(1)
    weights = _weights(probs, batch, labels)  # (b, k)
    total: Params = {}
    for start in range(0, len(batch), 16):  # small chunks: each example's gradient is as large as the model
        x, q = batch.x[start : start + 16], weights[start : start + 16]
        for c in range(q.shape[1]):
            rows = q[:, c].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            score = scores(model, x[rows], torch.full_like(rows, c))
            for name, value in score.items():
                part = torch.einsum("b,b...->...", q[rows, c], value.square())
                total[name] = total[name] + part if name in total else part
    return total


def _refuse_unused(model: nn.Module, data: Examples) -> None:
    with torch.enable_grad():
        loss = F.cross_entropy(model(data.x[:1]), data.y[:1])
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(named, found, strict=True):
        if gradient is None:
            raise _unused(name)


def _unused(name: str) -> ValueError:
    return ValueError(
        f"every trainable parameter must take part in the model's output; {name!r} has no gradient. "
        f"Use it in forward(), or freeze it with requires_grad_(False)."
    )
