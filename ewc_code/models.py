"""The small networks of the book, and the two ways in which parameters travel: as a dictionary and as one vector."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_code.data import Examples
from ewc_code.environment import generator

Params = dict[str, Tensor]


def mlp(sizes: tuple[int, ...] = (784, 400, 400, 10), seed: int = 0) -> nn.Sequential:
    """Fully connected network: affine maps with ReLU between them; the last layer's output are the logits.

        h_0 = x,   h_l = relu(W_l h_{l-1} + b_l),   logits = W_L h_{L-1} + b_L

    Args:
        sizes: Units per layer, input first, classes last. `(d, k)` is softmax regression.
        seed: Of the initial weights, uniform on ±1/sqrt(fan-in) (torch's own default); the global state is not used.

    Returns:
        A network (n, sizes[0]) -> (n, sizes[-1]) on the CPU; move it with `.to(device)`.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least input and output, each at least 1; got {sizes}.")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [_blank_linear(fan_in, fan_out), nn.ReLU()]
    return _initialise(nn.Sequential(*layers[:-1]), seed)


def relu_logits_mlp(sizes: tuple[int, ...] = (784, 400, 400, 400, 10), seed: int = 0) -> nn.Sequential:
    """`mlp` with one more ReLU, on the logits: the slip of the tutorial that this book grew from.

    A class whose logit is negative for every image gets no gradient, and cannot be learned any more. Chapter "EWC"
    shows what repairing this buys; do not use it for anything else.
    """
    return nn.Sequential(*mlp(sizes, seed), nn.ReLU())


class TwoParameters(nn.Module):
    """Logistic regression through the origin of the plane: two parameters, small enough to draw.

    logits = (0, w_1 x_1 + w_2 x_2),   p(y = 1 | x) = sigmoid(w . x)
    """

    def __init__(self, w: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.linear = _blank_linear(2, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([w]))

    def forward(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Logits of both classes; the first is 0, so that the second is the log odds."""
        logit = self.linear(x)  # (n, 1)
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


def _blank_linear(fan_in: int, fan_out: int, bias: bool = True) -> nn.Linear:
    """A Linear layer with no weights drawn yet: its own constructor would draw them from torch's global generator."""
    return nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=bias)


def _initialise(model: nn.Sequential, seed: int) -> nn.Sequential:
    """Draw every Linear layer's weights from a generator of our own, in order."""
    draw = generator(seed)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=draw)
                layer.bias.uniform_(-bound, bound, generator=draw)
    return model


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


def classes(model: nn.Module, data: Examples) -> int:
    """Number of classes, after checking that the model and the data fit together.

    Raises:
        ValueError: the model does not take these inputs, does not return (n, k) logits, or a label is outside 0..k-1.
    """
    first = data.x[:2]
    try:
        with evaluating(model), torch.no_grad():
            logits = model(first)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the model must accept inputs of shape {tuple(first.shape)}, {first.dtype} on {first.device}; "
            f"it answered: {error}. Check the input size, the dtype and the device."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(first):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model must return logits of shape (n, classes), here ({len(first)}, classes); got {got}. "
            f"Wrap it in a module that returns the logits alone."
        )
    low, high = int(data.y.min()), int(data.y.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{logits.shape[1] - 1} for this model; got {low}..{high}. "
            f"Renumber the labels, or give the model one output for each class."
        )
    return logits.shape[1]
