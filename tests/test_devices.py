"""The package on a device that is not the CPU (`stand_in`): nothing is left behind on the host, and nothing is float64.

`make test-device` runs these and the package's other tests there. Beliefs that move between devices are tested here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in
import torch
from test_methods import METHODS, SETTINGS, small, three_tasks

from ewc_code import fisher, storage
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal, Full, Kronecker
from ewc_code.laplace import laplace
from ewc_code.models import flatten, mlp, snapshot
from ewc_code.training import fit, learn

pytestmark = pytest.mark.standin
BELIEFS = {"diagonal": Diagonal, "full": Full, "Kronecker": Kronecker}
# Adam divides by the size of gradients that may be rounding alone; steps along these differ by device.
PLAIN = replace(SETTINGS, optimiser="sgd", learning_rate=0.01)
WRONG = {
    "two devices": lambda: torch.ones(3, device=device()) + torch.ones(3),
    "weights on the host": lambda: mlp((3, 2))(torch.ones(1, 3, device=device())),
    "a generator of the host": lambda: torch.ones(3, device=device()).normal_(generator=generator(0)),
    "memory": lambda: torch.ones(3, device=device()).numpy(),
}


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Called with True, what is made from now on lies on the CPU; with False, on the device."""
    yield lambda host: monkeypatch.setenv("EWC_DEVICE", "cpu" if host else stand_in.NAME)


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_the_stand_in_refuses_what_an_accelerator_refuses(mistake: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|device type for generator|not supported"):
        mistake()


def test_the_stand_in_has_no_float64_where_it_is_told_to_have_none() -> None:
    with stand_in.without(torch.float64), pytest.raises(TypeError, match=r"no torch\.float64"):
        torch.ones(3, device=device()).double()


@pytest.mark.parametrize("heads", [False, True], ids=["one head", "heads"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_every_method_learns_there_what_it_learns_on_the_host(
    make: Callable, heads: bool, on_the_host: Callable[[bool], None]
) -> None:
    found = []
    for host in (True, False):
        on_the_host(host)
        model, tasks = small(heads), three_tasks(heads)
        with stand_in.without(torch.float64):  # as on Apple's MPS
            record = learn(model, tasks, make(), PLAIN, seed=3)
        assert all(p.device.type == device().type for p in model.parameters())
        found.append((flatten(snapshot(model)).cpu(), torch.tensor(record.losses)))
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", fisher.LABELS)
def test_draws_and_curvature_are_those_of_the_host(labels: str, on_the_host: Callable[[bool], None]) -> None:
    found = []
    for host in (True, False):
        on_the_host(host)
        data = three_tasks()[0].train
        with stand_in.without(torch.float64):
            diagonal = fisher.diagonal(small(), data, labels, generator(0))
            some = fisher.estimate(small(), data, 6, generator(0), labels).standard_error
            factors = fisher.kronecker(small(), data, labels, generator(0), corrected=True)
            whole = fisher.full(small(), data, labels, generator(0))
        parts = [flatten(diagonal), flatten(some), whole, *(f.dense() for f in factors.values())]
        assert all(part.device.type == device().type for part in parts)
        found.append([part.cpu() for part in parts])
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made_on_host", [True, False], ids=["host to device", "device to host"])
@pytest.mark.parametrize("kind", BELIEFS.values(), ids=BELIEFS)
def test_a_belief_is_used_on_another_device_than_it_was_made_on(
    kind: type, made_on_host: bool, tmp_path: Path, on_the_host: Callable[[bool], None]
) -> None:
    on_the_host(made_on_host)
    old, new, _ = three_tasks()
    model = small()
    belief = laplace(model, old.train, kind.isotropic(snapshot(model)))
    storage.save(belief, tmp_path / "belief")
    at = {name: p + 0.1 for name, p in snapshot(model).items()}
    energy = belief.energy(at).item()

    on_the_host(not made_on_host)
    other = small()
    loaded = storage.load(tmp_path / "belief", other)
    moved = {name: p.cpu().to(device()) for name, p in at.items()}
    assert loaded.energy(moved).item() == pytest.approx(energy, rel=1e-5)
    there = Examples(new.train.x.cpu().to(device()), new.train.y.cpu().to(device()))
    fit(other, there, loaded, settings=SETTINGS)
    laplace(other, there, loaded)
