"""What the package's tests compare with: plain loops in float64, one example and one class at a time, and a witness."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import numpy as np
import torch
from torch import Tensor, nn

from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.models import mlp


def examples(n: int = 7, features: int = 4, classes: int = 3, seed: int = 0) -> Examples:
    """Standard normal inputs, uniform labels, float64, on the device of the tests."""
    draw = generator(seed)
    x = torch.randn(n, features, generator=draw, dtype=torch.float64)
    return Examples(x.to(device()), torch.randint(0, classes, (n,), generator=draw).to(device()))


def network(*sizes: int, seed: int = 0) -> nn.Sequential:
    """`mlp` in float64 on the device of the tests, logits spread enough for classes to differ."""
    model = mlp(sizes or (4, 5, 3), seed).to(device()).double()
    with torch.no_grad():
        model[-1].weight.mul_(3)
    return model


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def score(model: nn.Module, x: Tensor, label: int) -> Tensor:
    """Gradient of log p(label | x) for one example x, by plain autograd, as one vector."""
    log_prob = model(x[None]).log_softmax(1)[0, label]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(log_prob, trainable(model))]).detach()


def fisher_matrix(model: nn.Module, data: Examples, labels: str = "exact") -> Tensor:
    """1/N sum_x sum_c q(c | x) s s^T, with nothing cleverer than two loops."""
    size = sum(p.numel() for p in trainable(model))
    total = torch.zeros(size, size, dtype=torch.float64, device=data.x.device)
    for x, y in zip(data.x, data.y, strict=True):
        probs = model(x[None]).softmax(1)[0].detach()
        if labels == "data":
            probs = torch.eye(len(probs), dtype=probs.dtype, device=probs.device)[y]
        for c, p in enumerate(probs):
            s = score(model, x, c)
            total += p * torch.outer(s, s)
    return total / len(data)


def nll(model: nn.Module, data: Examples) -> Tensor:
    """Mean negative log likelihood, nats, differentiable."""
    log_probs = model(data.x).log_softmax(1)
    return -sum(row[y] for row, y in zip(log_probs, data.y, strict=True)) / len(data)


def _state(model: nn.Module | None, parameters: bool) -> dict[str, object]:
    # Python's own generator is missing: the type checker of the tests draws from it (see test_environment.py).
    state: dict[str, object] = {
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": repr(np.random.get_state()),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        state["CUDA's generator"] = torch.cuda.get_rng_state().cpu()
    if model is not None:
        for name, module in model.named_modules():
            state[f"mode of {name!r}"] = module.training
            state[f"hooks of {name!r}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, buffer in model.named_buffers():
            state[f"buffer {name}"] = buffer.clone()
        for name, p in model.named_parameters():
            state[f"grad of {name}"] = None if p.grad is None else p.grad.clone()
            state[f"requires_grad of {name}"] = p.requires_grad
            if parameters:
                state[f"value of {name}"] = p.detach().clone()
    return state


@contextmanager
def nothing_changes(model: nn.Module | None = None, parameters: bool = True) -> Iterator[None]:
    """Fails when the block leaves a trace: in gradients, flags, buffers, hooks, parameters or global generators."""
    if model is not None:
        for i, p in enumerate(model.parameters()):
            if p.requires_grad:
                p.grad = torch.full_like(p, float(i))
    before = _state(model, parameters)
    yield
    after = _state(model, parameters)
    assert before.keys() == after.keys()
    for what, value in before.items():
        same = torch.equal(value, after[what]) if isinstance(value, Tensor) else value == after[what]
        assert same, f"{what} was changed"


@contextmanager
def types_unchecked() -> Iterator[None]:
    """As a reader runs the package: without the type checker of the tests, which would refuse a wrong word first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def as_then(now: Any, recorded: Any) -> Any:
    """Settings as the code has them, without the fields that are newer than the recording and None: as it was then."""
    if isinstance(now, dict) and isinstance(recorded, dict):
        kept = {name: value for name, value in now.items() if name in recorded or value is not None}
        return {name: as_then(value, recorded.get(name)) for name, value in kept.items()}
    if isinstance(now, list) and isinstance(recorded, list) and len(now) == len(recorded):
        return [as_then(*pair) for pair in zip(now, recorded, strict=True)]
    return now
