r"""Many runs at once: stacked on one device, or spread over an executor's workers, each finished run kept on disk.

Runs that differ only in numbers (seed, strength, learning rate, permutation) are one computation: parameters get a
leading axis of models, so that M matrix products become one batched product, and one step moves all. Their losses are
summed, and no model's loss depends on another's parameters, so each gets the gradient that it would get alone:

    minimise  sum_m [ L_m(theta_m) + strength_m / N * belief_m.energy(theta_m) ]

The loop over tasks is that of `training.learn`. Chapter "The paper, reproduced".
"""

import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ewc_code import __version__
from ewc_code.consolidation import Method, none
from ewc_code.data import Examples
from ewc_code.environment import device, generator, products
from ewc_code.gaussian import Belief, stacked_penalty
from ewc_code.models import Params, evaluating, fits, flatten, nll, outputs, restore, snapshot
from ewc_code.tasks import Part, Task
from ewc_code.training import CURVE_EXAMPLES, Record, Settings, accuracy, optimiser


@dataclass(frozen=True)
class Run:
    """One run, and all that its numbers depend on; functions are a module's own or partials of them, to have a name."""

    tasks: Callable[[], Sequence[Task]]  #: Makes the tasks; runs whose keyword `seed` differs here may share a stack.
    method: Method  #: Which belief is kept.
    network: Callable[[int], nn.Module]  #: Seed -> model with its initial weights.
    settings: Settings = Settings()  #: For every task.
    seed: int = 0  #: Of the initial weights and, as in `training.learn`, of the order of the examples.
    curve_points: int = 0  #: As in `training.learn`.
    evaluate_on: Literal["test", "validation"] = "test"  #: 'validation' while settings are being chosen.

    @property
    def key(self) -> str:
        """Name of the run's file: a hash of all of its settings and of the package's version."""
        return hashlib.sha256(f"{__version__} {described(self)}".encode()).hexdigest()[:24]


@dataclass
class Outcome:
    """What became of a run: a record, or the reason why there is none."""

    record: Record | None
    error: str | None = None
    seconds: float = 0.0  #: Its share of its stack's time.


def sweep(
    runs: Iterable[Run],
    executor: Any = None,
    folder: Path | str | None = None,
    stack: int = 12,
    progress: Callable[[str], None] = lambda _: None,
    attempts: int = 3,
) -> list[Outcome]:
    """The outcome of every run, in the order given; what is given twice is done once.

    Args:
        executor: Anything whose `submit(function, *arguments)` returns something with `done()` and `result()`: a
            `concurrent.futures` pool, dask's `Client.get_executor()`, submitit's `AutoExecutor`, mpi4py's
            `MPIPoolExecutor`. None: here, one stack after another.
        folder: Where finished runs are kept, a file each, written at once and whole by this process alone; those found
            there as they were written are not done again.
        stack: Runs in one stacked computation, at most. More fill a device better and take more memory.
        progress: Called with a line whenever runs are finished.
        attempts: How often a stack is begun whose worker was lost, before its runs are given up.

    A ValueError: settings that do not fit together, a function without a name; a MemoryError, here: one run does not
    fit alone. A loss that becomes infinite is an outcome.
    """
    named = {run.key: run for run in runs}
    folder = Path(folder) if folder is not None else None
    kept = {key: _read(folder / f"{key}.json", run, progress) for key, run in named.items()} if folder else {}
    found = {key: outcome for key, outcome in kept.items() if outcome}
    if found:
        progress(f"{len(found)} of {len(named)} runs were there already")
    groups: dict[str, list[str]] = {}
    for key in [key for key in named if key not in found]:
        groups.setdefault(_alike(named[key]), []).append(key)
    waiting = [group[i : i + stack] for group in groups.values() for i in range(0, len(group), stack)]
    started, before = time.monotonic(), len(found)

    def finish(keys: Sequence[str], outcomes: Sequence[Outcome], keep: bool = True) -> None:
        for key, outcome in zip(keys, outcomes, strict=True):
            if folder and keep:
                _write(folder / f"{key}.json", named[key], outcome)
            found[key] = outcome
        spent = time.monotonic() - started
        left = spent / (len(found) - before) * (len(named) - len(found))
        errors = "".join(f"; failed: {outcome.error}" for outcome in outcomes if outcome.error)
        progress(f"{len(found)} of {len(named)} runs done, {spent:.0f} s, about {left:.0f} s left{errors}")

    for keys in waiting if executor is None else []:
        finish(keys, _attempt([named[key] for key in keys], 1))
    tries = {tuple(keys): 1 for keys in waiting if executor is not None}
    begin = lambda lot: executor.submit(_attempt, [named[key] for key in lot], tries[lot])  # noqa: E731
    futures = {lot: begin(lot) for lot in tries}
    while futures:
        for lot in [lot for lot, future in futures.items() if future.done()]:
            try:
                outcomes = futures.pop(lot).result()
            except (ValueError, TypeError):
                raise  # a wrong setting is wrong on every worker
            except Exception as error:
                tries[lot] += 1
                if tries[lot] <= attempts:
                    progress(f"a worker was lost ({error!r:.200}); its {len(lot)} runs begin anew")
                    futures[lot] = begin(lot)
                    continue
                lost = Outcome(None, f"given up after {attempts} attempts: {error!r:.200}")
                finish(lot, [lost] * len(lot), keep=False)  # another time they may be done
                continue
            finish(lot, outcomes)
        time.sleep(0.05)
    return [found[run.key] for run in runs]


def _attempt(runs: Sequence[Run], number: int) -> list[Outcome]:
    """A stack, halved as long as memory runs out; the number makes it new work for a scheduler that keeps failures."""
    try:
        return learn_stacked(runs)
    except torch.cuda.OutOfMemoryError as error:
        if len(runs) == 1:
            advice = f"Use a smaller batch_size in {described(runs[0])}."
            raise MemoryError(f"{device()} must hold a step of one run; got: {error}. {advice}") from error
    torch.cuda.empty_cache()
    warnings.warn(f"{len(runs)} runs at a time did not fit into memory; half as many are tried.", stacklevel=2)
    half = len(runs) // 2
    return _attempt(runs[:half], number) + _attempt(runs[half:], number)


def learn_stacked(runs: Sequence[Run]) -> list[Outcome]:
    """`training.learn` for many runs of one shape, at the same time; one that diverges leaves the others alone.

    The first task is fitted once for all runs that differ in their method only, where the prior is flat.
    With dropout the masks are drawn for the whole stack: the same again for the same stack, but not those of one run.
    """
    started, where = time.monotonic(), device()
    made = {name: run.tasks() for run in runs for name in [described(run.tasks)]}
    sequences = [made[described(run.tasks)] for run in runs]
    models = [run.network(run.seed).to(where) for run in runs]
    beliefs = [run.method.prior(snapshot(model)) for run, model in zip(runs, models, strict=True)]
    records = [Record([task.name for task in tasks]) for tasks in sequences]
    errors = [""] * len(runs)
    flat = [b.energy({n: p + 1 for n, p in snapshot(m).items()}) == 0 for m, b in zip(models, beliefs, strict=True)]
    alike = [described(replace(run, method=none()) if empty else run) for run, empty in zip(runs, flat, strict=True)]
    first = [alike.index(name) for name in alike]  # the run that fits the first task for this one
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(runs[0].seed)  # of dropout's masks
        for i in range(len(sequences[0])):
            if not (alive := [m for m in range(len(runs)) if not errors[m]]):
                break
            fitted = [m for m in alive if i > 0 or first[m] == m]
            # The first fit serves all runs that share it, so it is tracked if any of them needs that.
            paths = [runs[m].method.path(models[m]) for m in range(len(runs))]
            for m in alive if i == 0 else []:
                if paths[m].work and not paths[first[m]].work:
                    paths[first[m]] = paths[m]
            members = [(runs[m], models[m], beliefs[m], sequences[m], paths[m].work) for m in fitted]
            with products(runs[0].settings.products):
                losses, looks, reached = _fit_stack(i, members)
            for m in alive:
                source = m if i > 0 else first[m]
                restore(models[m], snapshot(models[source]))
                records[m].losses.append(losses[fitted.index(source)])
                records[m].steps += [i * looks[-1][0] + step for step, _ in looks]
                records[m].curves += [rows[fitted.index(source)] for _, rows in looks]
                if not torch.isfinite(flatten(snapshot(models[m]))).all():
                    at = f"at step {reached[fitted.index(source)]} of {sequences[m][i].name}"
                    errors[m] = f"loss or parameters became infinite {at}: {described(runs[m])}"
            alive = [m for m in alive if not errors[m]]
            kept = [m for m in alive if runs[m].method.strength > 0]
            for m, train in zip(kept, _parts([sequences[m][i] for m in kept], "train"), strict=True):
                path = paths[m if i > 0 else first[m]]
                with evaluating(models[m]):  # curvature is that of the deterministic network
                    beliefs[m] = runs[m].method.consolidate(models[m], train, beliefs[m], path)
            rows = _accuracies([(models[m], sequences[m]) for m in alive], runs[0].evaluate_on)
            for m, row in zip(alive, rows, strict=True):
                records[m].accuracy.append(row)
    seconds = (time.monotonic() - started) / len(runs)
    return [Outcome(None if e else r, e or None, seconds) for r, e in zip(records, errors, strict=True)]


def _fit_stack(
    i: int, members: Sequence[tuple[Run, nn.Module, Belief, Sequence[Task], Params | None]]
) -> tuple[list[list[float]], list[tuple[int, list[list[float]]]], list[int]]:
    """`training.fit` of task i for all; objectives by epoch, looks as (step, accuracies), first bad step or last."""
    runs, models, beliefs, sequences, works = zip(*members, strict=True)
    tracked = [m for m, work in enumerate(works) if work]
    tasks, settings, base = [tasks[i] for tasks in sequences], runs[0].settings, models[0]
    if list(base.buffers()):
        raise ValueError("a stack's models must have no buffers (BatchNorm has); got some. Use training.learn.")
    n, where = len(tasks[0].images.train), next(base.parameters()).device
    if len(sizes := {len(task.images.train) for task in tasks}) > 1:
        raise ValueError(f"tasks of one stack must have as many examples each; got {sorted(sizes)}.")
    together = tasks[0].train if len({id(task) for task in tasks}) == 1 else None
    for task in {id(task.images): task for task in tasks}.values():
        fits(task.images.train.y, outputs(base, task.examples("train", 2)))
    theta, _ = stack_module_state(list(models))  # (M, ...) each
    weights = torch.tensor([run.method.strength / n for run in runs], device=where)
    penalty, penalised = stacked_penalty(beliefs, weights), bool(weights.any())
    # One optimiser for each learning rate; a model's parameters are views of the stack's.
    rates: dict[float, list[int]] = {}
    for m, run in enumerate(runs):
        rates.setdefault(run.settings.learning_rate, []).append(m)
    views = {rate: [(p.detach()[m], name, m) for m in own for name, p in theta.items()] for rate, own in rates.items()}
    optimisers = {rate: optimiser([p for p, _, _ in own], settings) for rate, own in views.items()}

    def loss(theta: Params, x: Tensor, y: Tensor) -> Tensor:
        return nll(functional_call(base, theta, (x,)), y)

    steps, step, means, looks = settings.epochs * math.ceil(n / settings.batch_size), 0, [], []
    every = max(1, steps // runs[0].curve_points) if runs[0].curve_points else 0

    def write_back() -> None:
        for m, model in enumerate(models):
            restore(model, {name: value.detach()[m] for name, value in theta.items()})

    def look() -> None:
        if every and (step % every == 0 or step == steps):
            write_back()
            found = _accuracies(list(zip(models, sequences, strict=True)), runs[0].evaluate_on, CURVE_EXAMPLES)
            looks.append((step, found))

    look()
    draws, sound = [generator(1000 * run.seed + i) for run in runs], torch.zeros(len(runs), device=where)
    for _ in range(settings.epochs):
        orders = torch.stack([torch.randperm(n, generator=draw) for draw in draws]).to(where)  # (M, n)
        total = torch.zeros(len(runs), device=where)
        for index in orders.split(settings.batch_size, dim=1):  # (M, b)
            given = zip(tasks, index, strict=True)
            parts = [together[own] if together else task.examples("train", own) for task, own in given]
            x, y = torch.stack([part.x for part in parts]), torch.stack([part.y for part in parts])
            objective = vmap(loss, randomness="different")(theta, x, y)  # (M,)
            objective.sum().backward()  # not autograd.grad: fused Adam needs gradients laid out as the parameters are
            objective = objective.detach()
            if tracked:
                before = {name: (p.detach()[tracked], p.grad[tracked]) for name, p in theta.items()}  # copies
            if penalised:
                values, pulls = penalty(theta, x)
                objective = objective + values
                for name, pull in pulls.items():
                    theta[name].grad += pull
            for rate, own in views.items():
                for p, name, m in own:
                    p.grad = theta[name].grad[m]
                for group in optimisers[rate].param_groups:
                    group["lr"] = rate * (1 - step / steps) if settings.decay else rate
                optimisers[rate].step()
            if tracked:
                for name, (was, g) in before.items():
                    for m, moved in zip(tracked, -g * (theta[name].detach()[tracked] - was), strict=True):
                        works[m][name] += moved
            for p in theta.values():
                p.grad = None
            sound += objective.isfinite() & (sound == step)
            step += 1
            total += objective * index.shape[1]
            look()
        means.append(total / n)
    write_back()
    return torch.stack(means, 1).tolist(), looks, [min(int(count) + 1, steps) for count in sound.tolist()]


def _parts(tasks: Sequence[Task], part: Part, which: int | None = None) -> list[Examples]:
    """Examples of each task, made once where models share a task."""
    made = {key: task.examples(part, which) for key, task in {id(task): task for task in tasks}.items()}
    return [made[id(task)] for task in tasks]


def _accuracies(members: Sequence[tuple[nn.Module, Any]], part: Part, which: int | None = None) -> list[list[float]]:
    """A row a model, on all of its tasks."""
    if not members:
        return []
    models, sequences = zip(*members, strict=True)
    columns = [_parts(tasks, part, which) for tasks in zip(*sequences, strict=True)]
    return [[accuracy(model, column[m]) for column in columns] for m, model in enumerate(models)]


def described(value: Any) -> str:
    """A text that says all about a setting, and is the same on every machine: fields and functions by their names."""
    if isinstance(value, partial):
        named = [f"{name}={described(given)}" for name, given in sorted(value.keywords.items())]
        return f"{described(value.func)}({', '.join([*map(described, value.args), *named])})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = [f"{field.name}={described(getattr(value, field.name))}" for field in dataclasses.fields(value)]
        return f"{type(value).__qualname__}({', '.join(named)})"
    if callable(value):
        if "<" in (name := getattr(value, "__qualname__", "<")):
            raise ValueError(f"a run's functions must be a module's own, or partials of them; got {value!r}.")
        return f"{value.__module__}.{name}"
    if not isinstance(value, tuple | list | str | Number | None | range | Path | torch.dtype | torch.device):
        raise ValueError(f"a run's settings must be numbers, texts or tuples of them; got {type(value).__name__}.")
    return f"({', '.join(map(described, value))})" if isinstance(value, tuple | list) else repr(value)


def _alike(run: Run) -> str:
    """What runs of one stack have in common."""
    if isinstance(tasks := run.tasks, partial):
        tasks = partial(tasks.func, *tasks.args, **{k: v for k, v in tasks.keywords.items() if k != "seed"})
    common = replace(run, tasks=tasks, seed=0, settings=replace(run.settings, learning_rate=1.0), method=none())
    return described(common) + described(run.method.prior)


def _read(path: Path, run: Run, progress: Callable[[str], None]) -> Outcome | None:
    """A kept run; None where there is none, or only one that was damaged, which is said."""
    if not path.exists():
        return None
    try:
        whole = json.loads(path.read_bytes())
        if whole != _sealed(described(run), whole["outcome"]):
            raise ValueError("it was altered, or is another run's")
        record = whole["outcome"]["record"]
        return Outcome(**whole["outcome"] | {"record": record and Record(**record)})
    except (ValueError, KeyError, TypeError) as error:
        progress(f"{path} must hold a finished run as it was written; got: {error!r}. The run is done again.")
        return None


def _sealed(run: str, outcome: dict[str, Any]) -> dict[str, Any]:
    """A finished run with a checksum of all of it."""
    checksum = hashlib.sha256(json.dumps([run, outcome]).encode()).hexdigest()
    return {"run": run, "outcome": outcome, "sha256": checksum}


def _write(path: Path, run: Run, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(_sealed(described(run), dataclasses.asdict(outcome))))
        part.replace(path)
    except OSError as error:
        raise OSError(f"a finished run could not be kept in {path}: {error}. Free space, or choose a folder") from error
    finally:
        part.unlink(missing_ok=True)
