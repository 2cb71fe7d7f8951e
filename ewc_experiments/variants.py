"""What public implementations of EWC compute where the Fisher's diagonal was meant. Chapter "Fisher in the wild".

Each function takes a model in a deterministic mode and classification data, and returns by name what `fisher.diagonal`
returns, with one thing changed. None is what EWC's derivation asks for; `fisher.diagonal(labels="data")`, the empirical
Fisher, is the variant that the package itself offers.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from ewc_code import fisher
from ewc_code.data import Examples
from ewc_code.models import Params, mlp, snapshot


def argmax(model: nn.Module, data: Examples) -> Params:
    """Squared score of the most likely class, not the mean over classes: 1/N sum_x s_c^2, c = argmax p(. | x)."""
    return fisher.diagonal(model, Examples(data.x, answers(model, data).argmax(1)), "data")


def drawn(model: nn.Module, data: Examples, generator: torch.Generator) -> Examples:
    """The same inputs with labels drawn from the model's own probabilities, one an example."""
    probs = answers(model, data).softmax(1).to(generator.device)
    return Examples(data.x, torch.multinomial(probs, 1, generator=generator)[:, 0].to(data.y.device))


def squared_batch_gradient(model: nn.Module, data: Examples, batch_size: int) -> Params:
    r"""Square of each batch's mean gradient, instead of the mean of the examples' squares.

        1/K sum_k (1/B sum_{x in batch k} s)^2,     expectation (1/B) E[s^2] + (1 - 1/B) (E s)^2

    With labels drawn from the model E s = 0 at every x, and B times this is unbiased; with the data's labels it is not.
    A last batch that is not full is left out.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    starts = range(0, len(data) - batch_size + 1, batch_size)
    if not starts:
        raise ValueError(f"batch_size must be at most the number of examples, {len(data)}; got {batch_size}.")
    for start in starts:
        batch = data[start : start + batch_size]
        gradients = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.y), list(named.values()))
        for name, g in zip(named, gradients, strict=True):
            total[name] += g.square() / len(starts)
    return total


def weighted_by_probability(model: nn.Module, data: Examples) -> Params:
    """One term of the exact sum over classes: 1/N sum_x p(y | x) s_y^2, y the data's label."""

    def weighted(theta: Params, x: Tensor, y: Tensor) -> Tensor:
        log_prob = -F.cross_entropy(functional_call(model, theta, (x[None],)), y[None])
        # The weight's root goes in front of the score, as a constant, so that the square carries the weight.
        return (0.5 * log_prob).exp().detach() * log_prob

    return _mean_square(model, data, weighted)


def indexed_not_gathered(model: nn.Module, data: Examples, batch_size: int) -> Params:
    """`output[:, target]`, a (B, B) matrix of every example with every label, where `gather` was meant.

    Row i holds log p(y_j | x_i) for all j of the batch; the mean of a row is taken for example i's log probability.
    """
    total = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        shares = F.one_hot(batch.y, answers(model, batch[:1]).shape[1]).to(batch.x.dtype).mean(0)  # of each label
        part = _mean_square(
            model, batch, lambda theta, x, _y, s=shares: functional_call(model, theta, (x[None],)).log_softmax(1)[0] @ s
        )
        for name, value in part.items():
            total[name] += value * len(batch) / len(data)
    return total


def dropout_left_on(model: nn.Sequential, data: Examples, rho: float, generator: torch.Generator, masks: int) -> Params:
    """The exact diagonal of thinned networks, mean over masks: dropout of rate `rho` after each ReLU, in training mode.

    One mask serves all examples of a pass, which changes the noise and not the mean.
    """
    total = {name: torch.zeros_like(value) for name, value in snapshot(model).items()}
    for _ in range(masks):
        parts: list[tuple[str, nn.Module]] = []
        for name, module in model.named_children():
            parts.append((name, module))
            if isinstance(module, nn.Linear):
                width, like = module.out_features, module.weight
            elif isinstance(module, nn.ReLU):
                kept = (torch.rand(width, generator=generator) > rho).to(like) / (1 - rho)
                parts.append((f"thinned {name}", _Times(kept)))
        for name, value in fisher.diagonal(nn.Sequential(OrderedDict(parts)), data).items():
            total[name] += value / masks
    return total


class _Times(nn.Module):
    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def answers(model: nn.Module, data: Examples, batch_size: int = 10_000) -> Tensor:
    """The model's logits for all inputs, (n, k), without gradients."""
    with torch.no_grad():
        return torch.cat([model(data.x[i : i + batch_size]) for i in range(0, len(data), batch_size)])


def _mean_square(model: nn.Module, data: Examples, function: Callable[..., Tensor]) -> Params:
    """Mean over the examples of the squared gradient of function(theta, x, y), a few examples at a time."""
    each, theta = vmap(grad(function), in_dims=(None, 0, 0)), snapshot(model)
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    step = max(1, fisher.LARGEST_EACH // sum(value.numel() for value in theta.values()))
    for start in range(0, len(data), step):
        batch = data[start : start + step]
        for name, g in each(theta, batch.x, batch.y).items():
            total[name] += g.square().sum(0) / len(data)
    return total


def relu_logits_mlp(sizes: tuple[int, ...] = (784, 400, 400, 400, 10), seed: int = 0) -> nn.Sequential:
    """`mlp` with one more ReLU, on the logits: the slip of the tutorial that this book grew from.

    A class whose logit is negative for every image gets no gradient, and cannot be learned any more. Chapter "EWC"
    shows what repairing this buys; do not use it for anything else.
    """
    return nn.Sequential(*mlp(sizes, seed), nn.ReLU())
