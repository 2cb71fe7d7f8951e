"""The small networks of the book, and the two ways in which parameters travel: as a dictionary and as one vector."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_code.data import Examples
from ewc_code.environment import generator

Params = dict[str, Tensor]


def mlp(
    sizes: tuple[int, ...] = (784, 400, 400, 10), seed: int = 0, dropout: tuple[float, float] = (0.0, 0.0)
) -> nn.Sequential:
    """Fully connected network: affine maps with ReLU between them; the last layer's output are the logits.

        h_0 = x,   h_l = relu(W_l h_{l-1} + b_l),   logits = W_L h_{L-1} + b_L

    The sizes are units per layer, input first, classes last; `(d, k)` is softmax regression. `seed` draws the initial
    weights, uniform on ±1/sqrt(fan-in) (torch's own default); the global state is not used. The network, (n, sizes[0])
    -> (n, sizes[-1]), is on the CPU. `dropout` is the share of the inputs and of the hidden units dropped in training.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least input and output, each at least 1; got {sizes}.")
    draw, layers = generator(seed), list[nn.Module]()
    for fan_in, fan_out in pairwise(sizes):
        layer, bound = _blank_linear(fan_in, fan_out), fan_in**-0.5
        with torch.no_grad():
            for parameter in (layer.weight, layer.bias):
                parameter.uniform_(-bound, bound, generator=draw)
        if (share := dropout[bool(layers)]) > 0:
            layers.append(nn.Dropout(share))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class MultiHead(nn.Module):
    r"""A shared trunk and a head a task, all heads in one layer; the last column of the inputs says which head answers.

        h = trunk(x without its last column),   logits = W_t h + b_t,   t = the last column

    Task-incremental learning: which task it is comes with the input, so that batches of several tasks, the Fisher and a
    stack of models need nothing special. The head that is not asked has no gradient.
    """

    def __init__(self, trunk: nn.Module, heads: nn.Linear, count: int) -> None:
        super().__init__()
        self.trunk, self.heads, self.count = trunk, heads, count

    def forward(self, x: Float[Tensor, "n d"], every: bool = False) -> Tensor:
        """Logits (n, k) of the head that each row asks; with `every`, those of all heads, (n, heads, k)."""
        out = self.heads(self.trunk(x[:, :-1])).unflatten(1, (self.count, -1))
        if every:
            return out
        return out.gather(1, x[:, -1].long()[:, None, None].expand(-1, 1, out.shape[2]))[:, 0]


def multi_head(sizes: tuple[int, ...], heads: int, seed: int = 0) -> MultiHead:
    """`mlp` with `heads` last layers, of `sizes[-1]` classes each, on a common trunk; weights drawn as `mlp`'s."""
    if len(sizes) < 3 or heads < 1:
        raise ValueError(f"a trunk needs a hidden layer, and there must be a head; got sizes {sizes}, {heads} heads.")
    whole = list(mlp((*sizes[:-1], heads * sizes[-1]), seed))
    last = whole.pop()
    assert isinstance(last, nn.Linear)
    return MultiHead(nn.Sequential(*whole), last, heads)


class Attention(nn.Module):
    r"""Causal self-attention: each position asks all before it, and itself, and takes the mean of their answers.

        out_t = W sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s,      [q, k, v] = [W_q, W_k, W_v] h,   by heads of d

    Source: Vaswani et al. 2017, section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask, self.out = _blank_linear(width, 3 * width), _blank_linear(width, width)

    def forward(self, h: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        """What each position gathered."""
        q, k, v = self.ask(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, t, d) each
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Gather from other positions, then think about it alone; each adds to what was there: h + f(norm(h))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.between = nn.LayerNorm(width)
        self.feed = nn.Sequential(_blank_linear(width, 4 * width), nn.GELU(), _blank_linear(4 * width, width))

    def forward(self, h: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
        """One layer."""
        h = h + self.attention(self.before(h))
        return h + self.feed(self.between(h))


class Transformer(nn.Module):
    """A language model: tokens (n, t), t at most `context`, to logits (n, t, vocabulary) of each one's successor.

    Tokens and places are embedded, go through the blocks, and each position's result is compared with every token.
    Source: Vaswani et al. 2017; Radford et al. 2019 (norms before, not after). Chapter "Your own model".
    """

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.context = context
        self.token, self.place = (nn.utils.skip_init(nn.Embedding, count, width) for count in (vocabulary, context))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), _blank_linear(width, vocabulary)

    def forward(self, x: Int64[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        """Logits of the next token at each position."""
        h = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device).expand_as(x))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def transformer(
    vocabulary: int, context: int = 48, width: int = 64, heads: int = 4, depth: int = 2, seed: int = 0
) -> Transformer:
    """A `Transformer` with all weights drawn, normal of standard deviation 0.02 as Radford et al. 2019; biases zero.

    What a block adds to is a sum over 2 depth terms: the matrices that end them are drawn smaller by sqrt(2 depth).
    """
    if min(vocabulary, context, width, heads, depth) < 1 or width % heads:
        raise ValueError(
            "vocabulary, context, width, heads and depth must be at least 1, the width a multiple of the heads; got "
            f"{vocabulary}, {context}, {width}, {heads}, {depth}."
        )
    model, draw = Transformer(vocabulary, context, width, heads, depth), generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                ends = name.endswith(("out.weight", "feed.2.weight"))
                parameter.normal_(0, 0.02 / (2 * depth) ** 0.5 if ends else 0.02, generator=draw)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def _blank_linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A Linear layer with no weights drawn yet: its own constructor would draw them from torch's global generator."""
    return nn.utils.skip_init(nn.Linear, fan_in, fan_out)


def snapshot(model: nn.Module) -> Params:
    """Detached copies of the trainable parameters, by name. Frozen parameters take no part in any belief."""
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("the model must have at least one parameter with requires_grad=True; it has none.")
    return found


def restore(model: nn.Module, params: Params) -> None:
    """Copy `params` into the model, in place; names and shapes must be those of its parameters."""
    own = dict(model.named_parameters())
    for name, value in params.items():
        if name not in own or own[name].shape != value.shape:
            have = tuple(own[name].shape) if name in own else "no such parameter"
            raise ValueError(f"parameter {name!r} must fit the model; got shape {tuple(value.shape)}, model: {have}.")
    with torch.no_grad():
        for name, value in params.items():
            own[name].copy_(value)


def flatten(params: Params) -> Float[Tensor, " p"]:
    """All parameters as one vector, in the dictionary's order, each in row-major order."""
    return torch.cat([value.reshape(-1) for value in params.values()])


def unflatten(vector: Float[Tensor, " p"], like: Params) -> Params:
    """The inverse of `flatten`, with the names and shapes of `like`."""
    sizes = [value.numel() for value in like.values()]
    if vector.numel() != sum(sizes):
        raise ValueError(f"vector must hold {sum(sizes)} numbers to fill {list(like)}; got {vector.numel()}.")
    return {name: part.view_as(like[name]) for name, part in zip(like, vector.split(sizes), strict=True)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside of the block; afterwards every module has its own mode flag again, frozen ones too."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def nll(out: Float[Tensor, "n *t k"], y: Tensor) -> Float[Tensor, ""]:
    """Mean negative log likelihood, nats: cross entropy for labels (n,); for targets (n, k), Gaussian of variance 1.

    L = -1/N sum log softmax(a)_y        or        L = 1/N sum |y - a|^2 / 2      (without the constant log 2 pi)

    Of sequences, outputs (n, t, k) with labels (n, t), it is the mean over all N = n t labels.
    """
    return 0.5 * (y - out).square().sum(1).mean() if y.is_floating_point() else F.cross_entropy(out.movedim(-1, 1), y)


def outputs(model: nn.Module, data: Examples) -> int:
    """Number of the model's outputs (classes, or regression targets), after checking that model and data fit together.

    ValueError: the model does not take these inputs, does not return (n, k), or (n, t, k) where there is a label at
    each of t positions, or y is not in 0..k-1 (labels) or (n, k).
    """
    first = data.x[:2]
    try:
        with evaluating(model), torch.no_grad():
            found = model(first)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the model must accept inputs of shape {tuple(first.shape)}, {first.dtype} on {first.device}; "
            f"it answered: {error}. Check the input size, the dtype and the device."
        ) from error
    each = () if data.y.is_floating_point() else tuple(data.y.shape[1:])  # positions, of sequences
    if not isinstance(found, Tensor) or found.shape[:-1] != (len(first), *each):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        expected = ", ".join(map(str, (len(first), *each)))
        raise ValueError(
            f"the model must return logits of shape {'(n, t, classes)' if each else '(n, classes)'}, here "
            f"({expected}, classes); got {got}. Wrap it in a module that returns the logits alone."
        )
    size = found.shape[-1]
    if data.y.is_floating_point():
        if data.y.shape[1] != size:
            raise ValueError(f"targets must be (n, {size}) for this model; got {tuple(data.y.shape)}.")
        return size
    if size > 1 and found.min() >= 0 and (found.sum(-1) - 1).abs().max() < 1e-4:
        raise ValueError("the model must return logits; its outputs sum to 1 as probabilities do. Leave out softmax.")
    fits(data.y, size)
    return size


def fits(labels: Tensor, size: int) -> None:
    """Refuse labels that are no places among `size` outputs, of which there must be two at least."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= size or size < 2:
        raise ValueError(
            f"labels must lie in 0..{size - 1} for this model; got {low}..{high} and {size} outputs. "
            "Renumber the labels, or give the model one output for each class, two for yes and no."
        )
