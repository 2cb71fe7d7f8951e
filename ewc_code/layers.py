"""One pass through a network, layer by layer: what each layer received, and what comes back to its output.

The score of a layer's parameters is made of these two alone (chapter "Fisher information"), so the Fisher of Linear,
Conv2d, LayerNorm and Embedding layers needs no per-example gradient from autograd. Layers for which this would not hold
are left out, never guessed at: `closed_form` says which remain.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Product = nn.Linear | nn.Conv2d  # whose weight matrix multiplies what they receive
Layer = Product | nn.LayerNorm | nn.Embedding
Layers = Mapping[str, Layer]  # by name in the model
Products = Mapping[str, Product]
Room = dict[Any, Tensor]  # memory, by what it is for, that is used again batch after batch: new one takes time

# What acts on each number alone: the way back through it is one product with its derivative.
ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Identity)


@dataclass(frozen=True)
class Pass:
    """A forward pass over one batch."""

    outputs: Tensor  #: Of the model, (b, k), detached.
    inputs: dict[str, Tensor]  #: Of each layer, by name, (b, ...).
    #: Gradient at the outputs, (b, k) -> gradients at each layer's output, by name, (b, ...). They are good until the
    #: next call, which may write over them.
    back: Callable[[Tensor], dict[str, Tensor]]
    room: Room = field(default_factory=dict)  #: For what is made of it; kept for the next pass.


def closed_form(model: nn.Module, x: Tensor) -> Layers:
    """The layers whose per-example gradient is one of the formulas of `gradients`.

    These are plain layers of the four kinds that own their parameters and run once an example. A parameter that is
    used elsewhere too, or a layer that does not see example i in row i, would make the formula wrong without a sign;
    so its squares are compared with autograd's, example by example, on the first two of the inputs `x`, (n, ...). The
    model must be in a deterministic mode.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers = {name: module for name, module in model.named_modules() if _plain(module, owners)}
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, layer in layers.items():
            # Twice, for what does not see a row an example: then its squares are no sum over rows.
            seen = lambda _m, i, n=name: calls.update([n] * (1 if i and len(i[0]) == len(x[:2]) else 2))  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(seen).remove)
        with torch.no_grad():
            model(x[:2])
    layers = {name: layer for name, layer in layers.items() if calls[name] == 1}
    if not layers:
        return {}
    probe = run(model, layers, x[:2])
    # Not the score, which a well fitted example makes vanish: a direction that no fit can hide.
    one = probe.outputs[0]
    direction = torch.linspace(1, 2, one.numel(), dtype=one.dtype, device=x.device).view_as(one)
    back = probe.back(direction.expand_as(probe.outputs))
    with torch.enable_grad():
        heads = (model(x[:2]) * direction).flatten(1).sum(1).unbind()
    kept = {}
    for name, layer in layers.items():
        each = gradients(layer, probe.inputs[name])(back[name]).square().sum(0)  # (out, in + 1)
        own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        grads = [torch.autograd.grad(h, list(own.values()), retain_graph=True, materialize_grads=True) for h in heads]
        true = [torch.stack(column).square().sum(0) for column in zip(*grads, strict=True)]
        found = split(layer, each)
        least = torch.finfo(one.dtype).eps * max(t.norm() for t in true)  # attention's keys: a bias of rounding alone
        if all((found[n] - t).norm() <= 1e-3 * t.norm() + least for n, t in zip(own, true, strict=True)):
            kept[name] = layer
    return kept


def _plain(module: nn.Module, owners: Counter[int]) -> TypeGuard[Layer]:
    if type(module) is nn.Conv2d:
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return False
    elif type(module) is nn.LayerNorm:
        if module.weight is None or len(module.normalized_shape) != 1:
            return False
    elif type(module) is nn.Embedding:
        if module.max_norm is not None or module.padding_idx is not None or module.sparse:
            return False
    elif type(module) is not nn.Linear:
        return False
    own = list(module.parameters())
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and all(owners[id(p)] == 1 for p in own) and any(p.requires_grad for p in own)


def kept(room: Room, key: Any, like: Tensor) -> Tensor:
    """The memory for `key`, of the size of `like`."""
    return room.setdefault((key, like.shape), torch.empty_like(like))


def run(model: nn.Module, layers: Layers, x: Tensor, room: Room | None = None) -> Pass:
    """A forward pass that keeps what `layers` received, with the way back to their outputs, in `room` where it can."""
    stack = _stack(model)
    if stack is not None and x.ndim == 2 and layers.keys() == stack.keys():
        return _run_stack(stack, x, {} if room is None else room)
    inputs: dict[str, Tensor] = {}
    edges: dict[str, torch.autograd.graph.GradientEdge] = {}
    names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}

    def keep(layer: nn.Module, received: tuple[Tensor, ...], returned: Tensor) -> None:
        if names[layer] in inputs or len(received[0]) != len(x):
            said = f"{names[layer]!r} must run once an example, as it did at first"
            raise ValueError(f"{said}; it did not on a batch of {len(x)}. Give batch_size=1, or freeze it.")
        inputs[names[layer]] = received[0].detach()
        # The place in the graph, not the tensor: what follows may work in place on that.
        edges[names[layer]] = torch.autograd.graph.get_gradient_edge(returned)

    with ExitStack() as hooks, torch.enable_grad():
        for layer in layers.values():
            hooks.callback(layer.register_forward_hook(keep).remove)
        outputs = model(x)

    def back(gradient: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(outputs, list(edges.values()), gradient, retain_graph=True, materialize_grads=True)
        return dict(zip(edges, found, strict=True))

    return Pass(outputs.detach(), inputs, back, {} if room is None else room)


def _stack(model: nn.Module) -> dict[str, tuple[nn.Linear, nn.Sequential]] | None:
    """Linear layers, each with the elementwise modules after it, when the model is nothing but these in a row."""
    if type(model) is not nn.Sequential or model._forward_hooks or model._forward_pre_hooks:
        return None
    stack: dict[str, tuple[nn.Linear, nn.Sequential]] = {}
    for name, module in model._modules.items():  # not named_children, which passes over an activation used again
        if type(module) is nn.Linear:
            stack[name] = (module, nn.Sequential())
        elif stack and type(module) in ELEMENTWISE and not getattr(module, "inplace", False):
            next(reversed(stack.values()))[1].append(module)
        else:
            return None
    return stack


def _run_stack(stack: dict[str, tuple[nn.Linear, nn.Sequential]], x: Float[Tensor, "b d"], room: Room) -> Pass:
    r"""Backpropagation by hand: g_l = slope_l * (g_{l+1} W_{l+1}), into the same memory for every gradient.

    Autograd would take the slopes anew, and new memory, at each of the k - 1 ways back of the exact Fisher.
    """
    inputs, slopes, h = {}, {}, x
    for name, (layer, after) in stack.items():
        inputs[name] = h
        room |= {} if h is x else {(("inputs", name), h.shape): h}  # all but the data may make room for their squares
        with torch.no_grad():
            h = layer(h)  # (b, out)
        if len(after) and all(type(module) is nn.ReLU for module in after):
            h = h.relu_()
            slopes[name] = torch.sign(h, out=kept(room, ("slope", name), h))
        elif len(after):
            with torch.enable_grad():
                end = after(h.requires_grad_())
                (slopes[name],) = torch.autograd.grad(end, h, torch.ones_like(end))
            h = end.detach()
    weights = {name: layer.weight.detach() for name, (layer, _) in stack.items()}
    names = list(stack)
    arrived = {name: kept(room, ("back", name), h.new_empty(len(x), len(weight))) for name, weight in weights.items()}

    def back(gradient: Tensor) -> dict[str, Tensor]:
        arrived[names[-1]].copy_(gradient)
        for i in range(len(names) - 1, -1, -1):
            g = arrived[names[i]]  # (b, out)
            if names[i] in slopes:
                g.mul_(slopes[names[i]])
            if i > 0:
                torch.mm(g, weights[names[i]], out=arrived[names[i - 1]])
        return arrived

    return Pass(h, inputs, back, room)


def is_flat(layer: Layer, received: Tensor) -> TypeGuard[nn.Linear]:
    """Whether each example is one row: then its gradient is one outer product, and the square of it factorises."""
    return isinstance(layer, nn.Linear) and received.ndim == 2


def gradients(layer: Layer, received: Tensor) -> Callable[[Tensor], Float[Tensor, "b o i"]]:
    r"""From the gradients g at the outputs to each example's own gradient, a matrix for weight and bias together.

    Linear, Conv2d   sum_t g_t h_t^T         h with a 1 appended for the bias
    LayerNorm        sum_t [g_t * z_t, g_t]  z the normalised input, so that a = w * z + b
    Embedding        row v: sum of g_t over the positions t that hold the token v
    """
    if isinstance(layer, Product):
        h = rows(layer, received)
        return lambda g: columns(layer, g).mT @ h
    if isinstance(layer, nn.LayerNorm):
        z = F.layer_norm(received, layer.normalized_shape, eps=layer.eps)
        z = z.reshape(len(z), -1, z.shape[-1])  # (b, t, d)

        def scaled(g: Tensor) -> Tensor:
            g = g.reshape(z.shape)
            parts = [(g * z).sum(1)] + ([g.sum(1)] if layer.bias is not None else [])
            return torch.stack(parts, dim=2)

        return scaled
    tokens, embedding = received.reshape(len(received), -1), layer

    def gathered(g: Tensor) -> Tensor:
        total = g.new_zeros(len(g), embedding.num_embeddings, embedding.embedding_dim)
        index = tokens[:, :, None].expand(-1, -1, embedding.embedding_dim)
        return total.scatter_add_(1, index, g.reshape(index.shape))

    return gathered


def rows(layer: Product, received: Tensor) -> Float[Tensor, "b t i"]:
    """The inputs as vectors that the weight matrix multiplies, one a position, with a 1 appended for the bias."""
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding if not isinstance(layer.padding, str) else 0  # strings were refused by `_plain`
        found = F.unfold(received, layer.kernel_size, layer.dilation, padding, layer.stride).mT  # (b, t, i)
    else:
        found = received.reshape(len(received), -1, received.shape[-1])
    return F.pad(found, (0, 1), value=1.0) if layer.bias is not None else found


def columns(layer: Product, g: Tensor) -> Float[Tensor, "b t o"]:
    """The gradients at the outputs as vectors, one a position."""
    return g.flatten(2).mT if isinstance(layer, nn.Conv2d) else g.reshape(len(g), -1, g.shape[-1])


def split(layer: Layer, whole: Float[Tensor, "o i"]) -> dict[str, Tensor]:
    """One matrix for weight and bias as the two parameters' own shapes; the inverse of appending the 1."""
    if getattr(layer, "bias", None) is None:
        return {"weight": whole.reshape(layer.weight.shape)}
    return {"weight": whole[:, :-1].reshape(layer.weight.shape), "bias": whole[:, -1]}
