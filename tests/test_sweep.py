"""Many runs at once: the numbers of one run at a time, nothing lost and nothing done twice, whatever happens."""

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from ewc_code import consolidation, sweep
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal, Full, Kronecker, Penalties, stacked_penalty
from ewc_code.models import Params, mlp, snapshot
from ewc_code.sweep import Outcome, Run, described
from ewc_code.tasks import Task, limited, permuted
from ewc_code.training import Settings, learn


def small_tasks(count: int = 2, seed: int = 0) -> tuple[Task, ...]:
    from ewc_code.data import load

    images = limited(load("MNIST"), 200)
    return permuted(replace(images, validation=images.validation[:200], test=images.test[:200]), count, seed)


def batch_normed(seed: int) -> nn.Module:
    return nn.Sequential(mlp((784, 8), seed), nn.BatchNorm1d(8), nn.Linear(8, 10))


def with_dropout(seed: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), *mlp((784, 16, 10), seed))


def one_wrong_label() -> tuple[Task, ...]:
    """Three classes, and a seven far behind where a look at the first examples ends."""
    images = small_tasks()[0].images
    y = torch.arange(1500).to(device()) % 3
    x = images.train.x[:1].expand(1500, -1).contiguous()
    good, bad = Examples(x, y), Examples(x, torch.cat([y[:-1], torch.full((1,), 7).to(device())]))
    return tuple(Task(name, replace(images, train=part)) for name, part in (("good", good), ("bad", bad)))


def three_classes(seed: int) -> nn.Module:
    return mlp((784, 3), seed)


TINY = partial(mlp, (784, 16, 10))
SETTINGS = Settings(epochs=2, batch_size=50)


def runs() -> list[Run]:
    """Runs that differ in method, strength, learning rate, seed and permutation."""
    methods = (consolidation.none(), consolidation.ewc(10.0), consolidation.ewc(100.0), consolidation.l2(0.01))
    return [
        Run(partial(small_tasks, 3, seed=p), method, TINY, replace(SETTINGS, learning_rate=rate), seed, 2, "validation")
        for p, seed in ((0, 0), (7, 1))
        for rate in (3e-3, 1e-3)
        for method in methods
    ]


@pytest.fixture(autouse=True)
def _sample_unless_full_data_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("EWC_DATA"):
        monkeypatch.setenv("EWC_DATA", "sample")


def one_at_a_time(run: Run):
    model = run.network(run.seed).to(device())
    return learn(model, run.tasks(), run.method, run.settings, run.seed, run.curve_points, run.evaluate_on)


def assert_same(outcome: Outcome, record) -> None:
    assert outcome.error is None
    assert outcome.record.names == record.names
    assert outcome.record.steps == record.steps
    assert torch.allclose(torch.tensor(outcome.record.losses), torch.tensor(record.losses), rtol=1e-3)
    for part in ("accuracy", "curves"):  # rounding may turn single answers: 2 of 200
        found, true = (torch.tensor(getattr(r, part)) for r in (outcome.record, record))
        assert torch.allclose(found, true, rtol=0, atol=0.0101)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, optimiser="sgd", momentum=0.9, decay=False)])
def test_a_stack_gives_the_numbers_of_one_run_at_a_time(settings: Settings) -> None:
    todo = [replace(run, settings=replace(settings, learning_rate=run.settings.learning_rate)) for run in runs()]
    for run, outcome in zip(todo, sweep.sweep(todo, stack=24), strict=True):
        assert_same(outcome, one_at_a_time(run))


def per_task(mode: Params, precision: float) -> Penalties:
    """Two penalties with anchors of their own."""
    shifted = {name: value + 0.3 for name, value in mode.items()}
    return Penalties((Diagonal.isotropic(mode, precision), Diagonal.isotropic(shifted, 2.0)))


@pytest.mark.parametrize(
    "kinds",
    [
        (Diagonal.isotropic, Diagonal.isotropic, Diagonal.isotropic),
        (Diagonal.isotropic, Full.isotropic, Kronecker.isotropic),
        (Diagonal.isotropic, per_task, per_task),
    ],
    ids=["alike", "mixed", "a penalty per task"],
)
def test_stacked_penalties_are_each_models_own_with_their_gradient(kinds: tuple[Callable[..., Belief], ...]) -> None:
    thetas = [snapshot(mlp((3, 2), seed)) for seed in (0, 1, 2)]
    modes = [snapshot(mlp((3, 2), seed)) for seed in (5, 6, 7)]
    weights = torch.tensor([2.0, 0.0, 0.5])
    beliefs = [kind(mode, k + 1.0) for k, (kind, mode) in enumerate(zip(kinds, modes, strict=True))]
    stacked = {name: torch.stack([theta[name] for theta in thetas]).requires_grad_() for name in thetas[0]}
    true = weights * torch.stack(
        [b.energy({name: value[m] for name, value in stacked.items()}) for m, b in enumerate(beliefs)]
    )
    gradients = dict(zip(stacked, torch.autograd.grad(true.sum(), list(stacked.values())), strict=True))
    values, pulls = stacked_penalty(beliefs, weights)(stacked, torch.zeros(3, 1, 3))
    assert torch.allclose(values, true)
    assert all(torch.allclose(pulls[name], g) for name, g in gradients.items())


def test_dropout_is_seeded_and_leaves_the_global_state_alone() -> None:
    todo = [Run(small_tasks, consolidation.none(), with_dropout, SETTINGS, seed) for seed in (0, 1)]
    state = torch.get_rng_state()
    first, again = sweep.learn_stacked(todo), sweep.learn_stacked(todo)
    assert torch.equal(state, torch.get_rng_state())
    assert [o.record for o in first] == [o.record for o in again]
    assert first[0].record != first[1].record
    without = replace(todo[0], network=TINY)
    assert sweep.learn_stacked([without])[0].record.losses != first[0].record.losses


def test_a_run_that_diverges_is_a_result_and_leaves_the_others_alone(tmp_path: Path) -> None:
    good = Run(partial(small_tasks, 2), consolidation.ewc(10.0), TINY, replace(SETTINGS, optimiser="sgd"))
    bad = replace(good, settings=replace(good.settings, learning_rate=1e30))
    said: list[str] = []
    found = sweep.sweep([bad, good], folder=tmp_path, progress=said.append)
    assert found[0].record is None
    assert "infinite at step 2 of permutation 1" in found[0].error
    assert "1e+30" in found[0].error
    assert any("failed" in line for line in said)
    assert_same(found[1], one_at_a_time(good))
    assert sweep.sweep([bad, good], folder=tmp_path) == found  # a failure is kept like any other result


def test_what_is_finished_is_kept_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo, calls, real = runs()[:4], [], sweep.learn_stacked

    def counted(group):
        calls.append(len(group))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(group)

    monkeypatch.setattr(sweep, "learn_stacked", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(todo, folder=tmp_path, stack=2)
    assert len(list(tmp_path.iterdir())) == 2
    found = sweep.sweep([*todo, todo[0]], folder=tmp_path, stack=2)
    assert calls == [2, 2, 2]  # the first two of the four were not done again
    assert found == [*found[:4], found[0]]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(run.key for run in todo)
    assert sweep.sweep(todo, folder=tmp_path) == found[:4]
    assert len(calls) == 3


def test_a_write_that_fails_leaves_nothing_that_would_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: Path, text: str, *_: object) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    run = runs()[0]
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"could not be kept.*No space left.*Free space"):
        patch.setattr(Path, "write_text", full_disk)
        sweep.sweep([run], folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert sweep.sweep([run], folder=tmp_path)[0].error is None


def test_the_key_follows_every_setting_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    todo = runs()
    changed = [
        todo[0],
        replace(todo[0], seed=9),
        replace(todo[0], curve_points=3),
        replace(todo[0], evaluate_on="test"),
        replace(todo[0], network=partial(mlp, (784, 17, 10))),
        replace(todo[0], settings=replace(SETTINGS, decay=False)),
        replace(todo[0], tasks=partial(small_tasks, 3, seed=1)),
    ]
    assert len({run.key for run in [*todo, *changed]}) == len(todo) + len(changed) - 1
    assert runs()[3].key == todo[3].key  # other objects, the same settings
    before = todo[0].key
    monkeypatch.setattr(sweep, "__version__", "0.0.0")
    assert todo[0].key != before


def test_what_has_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="module's own"):
        described(replace(runs()[0], network=lambda seed: TINY(seed)))
    with pytest.raises(ValueError, match="no buffers"):
        sweep.sweep([Run(small_tasks, consolidation.none(), batch_normed, SETTINGS)])


class Flaky:
    """An executor whose workers are lost now and then."""

    def __init__(self, losses: int) -> None:
        self.left, self.begun = losses, 0

    def submit(self, function, *arguments: object) -> Future:
        future: Future = Future()
        self.begun += 1
        if self.left:
            self.left -= 1
            future.set_exception(BrokenProcessPool("killed"))
        else:
            future.set_result(function(*arguments))
        return future


def test_lost_workers_are_replaced_and_given_up_in_the_end(tmp_path: Path) -> None:
    todo, said = runs()[:3], []
    alone = sweep.sweep(todo)
    flaky = Flaky(2)
    found = sweep.sweep(todo, flaky, tmp_path, stack=1, progress=said.append)
    assert [o.record for o in found] == [o.record for o in alone]
    assert flaky.begun == 5
    assert sum("lost" in line for line in said) == 2
    hopeless = sweep.sweep(todo, Flaky(99), tmp_path / "later", stack=3, attempts=2)
    assert all(o.record is None and "given up after 2 attempts" in o.error for o in hopeless)
    healed = sweep.sweep(todo, None, tmp_path / "later", stack=3)  # nothing has to be deleted first
    assert [o.record for o in healed] == [o.record for o in alone]


def test_memory_that_ends_halves_the_stack_and_names_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    todo, alone, sizes = runs()[:4], sweep.sweep(runs()[:4]), []
    fit_stack = sweep._fit_stack

    def small(i: int, members: list) -> object:
        sizes.append(len(members))
        if len(members) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return fit_stack(i, members)

    monkeypatch.setattr(sweep, "_fit_stack", small)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    most = 2
    with pytest.warns(UserWarning, match="4 runs at a time did not fit into memory"):
        found = sweep.sweep(todo, stack=4)
    for one, other in zip(found, alone, strict=True):
        assert_same(one, other.record)
    assert [size for size in sizes if size > 2] == [4]
    most = 0
    with pytest.warns(UserWarning), pytest.raises(MemoryError, match=r"a step of one run.*smaller batch_size in Run\("):
        sweep.sweep(todo, stack=4)


def test_a_wrong_label_anywhere_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2 .* got 0\.\.7"):
        sweep.sweep([Run(one_wrong_label, consolidation.none(), three_classes, SETTINGS)])


def test_a_wrong_setting_is_raised_from_a_worker() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="no buffers"):
        sweep.sweep([Run(small_tasks, consolidation.none(), batch_normed, SETTINGS)], pool)


@pytest.mark.host
def test_processes_give_the_same_numbers(tmp_path: Path) -> None:
    todo = runs()[:4]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = sweep.sweep(todo, pool, tmp_path, stack=2)
    for run, outcome in zip(todo, found, strict=True):
        assert_same(outcome, one_at_a_time(run))
        assert json.loads((tmp_path / f"{run.key}.json").read_text())["run"] == described(run)


def test_the_order_of_the_examples_is_the_runs_own() -> None:
    """A stack must not share one order: then seeds would differ by their initial weights only."""
    todo = [Run(small_tasks, consolidation.none(), partial(same_weights), SETTINGS, seed) for seed in (0, 1)]
    first, second = sweep.learn_stacked(todo)
    assert first.record.losses != second.record.losses


def same_weights(seed: int) -> nn.Module:
    return TINY(int(generator(seed).initial_seed() * 0))


@pytest.mark.host
def test_a_dask_cluster_that_loses_a_worker_completes(tmp_path: Path) -> None:
    """Two real workers, one killed while it works; dask is told to give up at once, so that we must begin anew."""
    dask = pytest.importorskip("dask", reason="dask and distributed are not installed: make peers")
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: make peers")
    longer = replace(SETTINGS, epochs=40)
    todo = [replace(run, settings=replace(longer, learning_rate=run.settings.learning_rate)) for run in runs()[:6]]
    said: list[str] = []

    def kill_one(line: str) -> None:
        if not said:
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        said.append(line)

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = sweep.sweep(todo, client.get_executor(), tmp_path, stack=1, progress=kill_one)
    assert [o.error for o in found] == [None] * len(todo)
    assert len(list(tmp_path.glob("*.json"))) == len(todo)
    assert sum("runs done" in line for line in said) == len(todo)  # each is counted once
    for run, outcome in zip(todo[:2], found[:2], strict=True):
        assert outcome.record.losses == sweep.learn_stacked([run])[0].record.losses
