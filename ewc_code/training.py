r"""Learning: one task under a belief (`fit`), and a sequence of tasks (`learn`), which is the book in one loop."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ewc_code.consolidation import Method
from ewc_code.data import Examples
from ewc_code.environment import generator, products
from ewc_code.gaussian import Belief
from ewc_code.models import Params, evaluating, flatten, nll, outputs, snapshot
from ewc_code.tasks import Task

CHECK_EVERY = 50  # steps between looks at the loss on a GPU, which a look makes wait; on the CPU it is every step
CURVE_EXAMPLES = 1000  # enough for a curve (standard error at most 1.6 points), a tenth of the time


@dataclass(frozen=True)
class Settings:
    """How one task is fitted."""

    epochs: int = 2  #: Passes over the task's training examples.
    batch_size: int = 128  #: Examples a step.
    learning_rate: float = 3e-3  #: Of the optimiser, at the first step.
    #: Whether the learning rate falls linearly to zero. Without it the last steps' noise is as large as the first
    #: ones', and a stiff penalty turns that noise into lost accuracy on the old tasks.
    decay: bool = True
    #: 'adam' adapts to the penalty's curvature, which spans many orders of magnitude; 'sgd' is the paper's.
    optimiser: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.0  #: For 'sgd'.
    #: Rounding of training's products, as `torch.set_float32_matmul_precision`: 'high' is TF32 on a GPU, 'medium' also
    #: bfloat16 on a CPU that has it, None as torch is set. Curvature is not rounded with it.
    products: Literal["highest", "high", "medium"] | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"epochs and batch_size must be at least 1 and learning_rate positive; got {self}.")
        if self.optimiser not in ("adam", "sgd") or self.products not in (None, "highest", "high", "medium"):
            allowed = "optimiser must be 'adam' or 'sgd' and products 'highest', 'high', 'medium' or None"
            raise ValueError(f"{allowed}; got {self.optimiser!r} and {self.products!r}.")


@dataclass
class Record:
    """What happened while a sequence was learned."""

    names: list[str]  #: The tasks', in order.
    accuracy: list[list[float]] = field(default_factory=list)  #: R[i][j], on task j after task i, 0..1.
    steps: list[int] = field(default_factory=list)  #: Optimiser steps done in all at each point of `curves`.
    curves: list[list[float]] = field(default_factory=list)  #: Test accuracy at these steps, (points, tasks).
    losses: list[list[float]] = field(default_factory=list)  #: Mean training objective, nats, by task and epoch.

    @property
    def matrix(self) -> Float[Tensor, "tasks tasks"]:
        """The accuracy matrix R, as `metrics` takes it."""
        return torch.tensor(self.accuracy)


def learn(
    model: nn.Module,
    tasks: Sequence[Task],
    method: Method,
    settings: Settings | None = None,
    seed: int = 0,
    curve_points: int = 0,
    evaluate_on: Literal["test", "validation"] = "test",
    belief: Belief | None = None,
    first: int = 0,
    keep: Callable[[int, Belief], None] | None = None,
) -> Record:
    """Learn the tasks one after another; the belief is all that is carried from one to the next.

    Args:
        model: Trained in place, on the tasks in order, with `settings` for each.
        method: Which belief is kept (`consolidation`).
        seed: Of the order of the examples; task i (from 0) uses 1000 seed + i.
        curve_points: How often within a task all tasks' accuracy is recorded, on their first `CURVE_EXAMPLES`
            examples; 0 for only the rows of the accuracy matrix.
        evaluate_on: 'validation' while settings are being chosen, 'test' to report.
        belief: Held before task `first`, to go on where `keep` left off; None for the method's own prior.
        first: Number of tasks, from the first, that were learned already.
        keep: Called with the number of tasks learned and the belief, after each; `storage.save` may be called here.

    Raises:
        ValueError: no tasks, another `evaluate_on`, or as `fit`.
        FloatingPointError: as `fit`.
    """
    if not tasks:
        raise ValueError("there must be at least one task to learn; got none.")
    if evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on must be 'test' or 'validation'; got {evaluate_on!r}.")
    settings = settings or Settings()
    held_out = [getattr(task, evaluate_on) for task in tasks]
    record = Record([task.name for task in tasks])
    steps_before = 0

    def look(step: int, of: int) -> None:
        if curve_points and (step % max(1, of // curve_points) == 0 or step == of):
            record.steps.append(steps_before + step)
            record.curves.append([accuracy(model, part[:CURVE_EXAMPLES]) for part in held_out])

    belief = belief or method.prior(snapshot(model))
    for i, task in enumerate(tasks[first:], first):
        train, order, path = task.train, generator(1000 * seed + i), method.path(model)
        record.losses.append(fit(model, train, belief, method.strength, settings, order, look, task.name, path.work))
        with evaluating(model):  # curvature is that of the deterministic network
            belief = method.consolidate(model, train, belief, path)
        record.accuracy.append([accuracy(model, part) for part in held_out])
        steps_before += _steps(settings, len(train))
        if keep:
            keep(i + 1, belief)
    return record


def fit(
    model: nn.Module,
    data: Examples,
    prior: Belief,
    strength: float = 1.0,
    settings: Settings | None = None,
    draw: torch.Generator | None = None,
    observe: Callable[[int, int], None] | None = None,
    name: str = "the task",
    work: Params | None = None,
) -> list[float]:
    r"""Fit one task under a belief: the MAP estimate by minibatch descent, in place.

        minimise  L(theta) + strength / N * prior.energy(theta),     L = mean negative log likelihood, nats

    The model maps (n, ...) -> logits (n, k), or (n, t, k) where each of t positions has a label and N counts labels;
    the prior is the belief held before the N examples; `strength` is lambda, at least 0: Bayes' rule says 1 (chapter
    "EWC" says why practice uses more). Mode flags are used as they are: after curvature, which asks for model.eval(),
    call model.train(). `draw` generates the order of the examples (on the CPU); `observe(step, steps)` is called after
    every step, and with step 0 before the first; `name` is the task's, for errors. Returned is the mean objective of
    each epoch, nats. To `work`, where given, is added how much each parameter's moves lowered the loss alone, without
    the penalty (chapter "Beyond the diagonal"):

        work_i += -sum_steps g_i (theta_i after - theta_i before),   g = gradient of the batch's mean loss, nats

    Source: Kirkpatrick et al. 2017, eq. 3. Chapter "EWC".

    Raises:
        ValueError: a negative strength, labels or shapes that do not fit, inputs that are not finite.
        FloatingPointError: the loss became NaN or infinite.
        MemoryError: a step did not fit into an accelerator's memory.

    After any error the model is put back to where it started, buffers too.
    """
    settings, draw = settings or Settings(), draw or generator(0)
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and at least 0; got {strength}. Bayes' rule says 1.")
    outputs(model, data)
    # The sum is finite only if all inputs are; looking at each takes a tenth of a short fit's time.
    if not (data.x.sum().isfinite() or torch.isfinite(data.x).all()):
        raise ValueError(f"the inputs of {name} must be finite; got NaN or infinity. Clean or drop these examples.")
    theta: Params = {key: p for key, p in model.named_parameters() if p.requires_grad}
    start = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [p.grad for p in theta.values()]
    descent = optimiser(list(theta.values()), settings)
    n, steps = len(data), _steps(settings, len(data))
    step, per_epoch, means = 0, steps // settings.epochs, []
    check_every = 1 if data.x.device.type == "cpu" else CHECK_EVERY
    rounding = ExitStack()
    try:
        rounding.enter_context(products(settings.products))
        if observe:
            observe(0, steps)
        for _ in range(settings.epochs):
            order = torch.randperm(n, generator=draw).to(data.x.device)
            total = torch.zeros((), device=data.x.device)
            for index in order.split(settings.batch_size):
                loss = nll(model(data.x[index]), data.y[index])
                descent.zero_grad(set_to_none=True)
                loss.backward()
                if work is not None:
                    before = [(k, p.detach().clone(), p.grad.clone()) for k, p in theta.items() if p.grad is not None]
                if strength > 0:
                    penalty = strength / data.count * prior.energy(theta, data.x[index])
                    if penalty.requires_grad:
                        penalty.backward()
                    loss = loss.detach() + penalty.detach()
                if settings.decay:
                    for group in descent.param_groups:
                        group["lr"] = settings.learning_rate * (1 - step / steps)
                descent.step()
                if work is not None:
                    for k, was, g in before:
                        work[k] -= g * (theta[k].detach() - was)
                step += 1
                total += loss.detach() * len(index)
                look = step % check_every == 0 or step % per_epoch == 0
                # The last step can spoil the parameters after a finite loss, and no later loss would show it.
                if look and not (torch.isfinite(total) and (step < steps or torch.isfinite(flatten(theta)).all())):
                    raise FloatingPointError(
                        f"loss and parameters must stay finite; at step {step} of {name} the loss was {loss.item()} "
                        f"(seen within the last {check_every} steps; strength {strength:g}, {settings}). "
                        "The model was put back to its start. Use a smaller learning rate or strength."
                    )
                if observe:
                    observe(step, steps)
            means.append(total.item() / n)
    except Exception as error:
        model.load_state_dict(start)
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        shape = (min(n, settings.batch_size), *data.x.shape[1:])
        raise MemoryError(
            f"the memory of {data.x.device} must hold step {step + 1} of {name}, a batch {shape}; got: {error}. "
            "The model was put back to its start. Use a smaller batch_size."
        ) from error
    finally:
        rounding.close()
        for p, gradient in zip(theta.values(), gradients, strict=True):
            p.grad = gradient
    return means


def _steps(settings: Settings, n: int) -> int:
    return settings.epochs * math.ceil(n / settings.batch_size)


def accuracy(model: nn.Module, data: Examples, batch_size: int = 10_000) -> float:
    """Share of labels that are the most likely class, 0..1; the model's mode flags are left as they were."""
    if data.y.is_floating_point():
        raise ValueError("accuracy needs labels that are classes; got targets of a regression. Use models.nll.")
    batches = zip(data.x.split(batch_size), data.y.split(batch_size), strict=True)
    with evaluating(model), torch.no_grad():
        return sum((model(x).argmax(-1) == y).sum().item() for x, y in batches) / data.count


def optimiser(parameters: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """The optimiser that the settings ask for."""
    if settings.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)
    fused = parameters[0].device.type in ("cpu", "cuda")  # one kernel instead of a dozen passes over the parameters
    return torch.optim.Adam(parameters, lr=settings.learning_rate, fused=fused)
