"""Curvature over processes: the ranks' sums are one process's, with the same bits on all; what misfits stops all."""

from pathlib import Path

import pytest
import torch
from oracles import examples, network
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from ewc_code import distributed, fisher
from ewc_code.data import Examples
from ewc_code.fisher import Factors
from ewc_code.gaussian import Diagonal
from ewc_code.laplace import laplace
from ewc_code.models import nll, snapshot

RANKS = 2


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWC_DEVICE", "cpu")  # gloo's processes inherit it


N = 30


def model() -> torch.nn.Sequential:
    return network(4, 5, 3)


def data() -> Examples:
    return examples(N, 4, 3)


def joined(rank: int, folder: str, job: str) -> None:
    """What each process of a test does: it joins the others, works, and leaves what it found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.save(JOBS[job](rank), f"{folder}/{rank}")
    dist.destroy_process_group()


def on_ranks(folder: Path, job: str) -> list:
    multiprocessing.spawn(joined, (str(folder), job), nprocs=RANKS)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(RANKS)]


def share(rank: int) -> Examples:
    """Unequal: 20 and 10 of the 30."""
    return data()[:20] if rank == 0 else data()[20:]


def curvature(rank: int) -> tuple:
    mine = share(rank)
    batches = list(zip(mine.x.split(7), mine.y.split(7), strict=True))
    diagonal = distributed.across(*fisher.over_batches(fisher.diagonal, model(), batches))
    kronecker = distributed.across(fisher.kronecker(model(), mine), len(mine))
    full = distributed.across(fisher.full(model(), mine), len(mine))
    return diagonal, kronecker, full


def belief(rank: int) -> Diagonal:
    """One argument more than on one process."""
    return laplace(model(), share(rank), Diagonal.isotropic(snapshot(model()), 2.0), group=dist.group.WORLD)


def training(rank: int, world: int = RANKS) -> tuple[dict, dict]:
    """Steps under a belief, with the penalty's gradient in the same backward pass and in one of its own."""
    found = []
    for apart in (False, True):
        own = model()
        learner = DistributedDataParallel(own) if world > 1 else own
        belief = Diagonal({n: p + 0.1 for n, p in snapshot(own).items()}, {n: p**2 for n, p in snapshot(own).items()})
        descent = torch.optim.SGD(own.parameters(), lr=0.2, momentum=0.9)
        for step in range(6):
            size = 10 // world
            start = 10 * (step % 3) + rank * size
            loss = nll(learner(data().x[start : start + size]), data().y[start : start + size])
            penalty = 4 / N * belief.energy(dict(own.named_parameters()))
            descent.zero_grad()
            if apart:
                loss.backward()
                penalty.backward()
            else:
                (loss + penalty).backward()
            descent.step()
        found.append(snapshot(own))
    return found[0], found[1]


def refused(rank: int) -> list[str]:
    said = []
    good = {"w": torch.ones(3)}
    other = {"w": torch.ones(4)} if rank else good
    for found, n in ((good, rank), (other, 5), ({} if rank else good, 5)):
        with pytest.raises(ValueError, match="every rank must bring the same names and shapes") as error:
            distributed.across(found, n)
        said.append(str(error.value))
    return said


def one_rank_only(rank: int) -> tuple:
    """A group of one process has that process's numbers only."""
    groups = [dist.new_group([r]) for r in range(RANKS)]
    return distributed.across(torch.tensor([float(rank)]), rank + 1, groups[rank])


JOBS = {"curvature": curvature, "belief": belief, "training": training, "refused": refused, "alone": one_rank_only}


def test_shares_of_any_size_give_the_whole_curvature(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, "curvature")
    (diagonal, n), (kronecker, _), (full, _) = first
    assert n == N
    for name, value in fisher.diagonal(model(), data()).items():
        torch.testing.assert_close(diagonal[name], value, rtol=1e-10, atol=0)
    for name, value in fisher.kronecker(model(), data()).items():
        torch.testing.assert_close(kronecker[name].inputs, value.inputs, rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(kronecker[name].outputs, value.outputs, rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(full, fisher.full(model(), data()), rtol=1e-10, atol=1e-16)
    assert all(diagonal[name].equal(second[0][0][name]) for name in diagonal)  # the same bits on every rank
    assert full.equal(second[2][0])


def test_laplace_with_a_group_is_that_of_all_data(tmp_path: Path) -> None:
    whole = laplace(model(), data(), Diagonal.isotropic(snapshot(model()), 2.0))
    for found in on_ranks(tmp_path, "belief"):
        for name, value in whole.precision.items():
            torch.testing.assert_close(found.precision[name], value, rtol=1e-10, atol=0)
            assert found.mean[name].equal(whole.mean[name])


def test_the_unweighted_mean_would_be_seen() -> None:
    whole = fisher.diagonal(model(), data())
    parts = [fisher.diagonal(model(), share(rank)) for rank in range(RANKS)]
    gap = max(((parts[0][n] + parts[1][n]) / 2 - v).abs().max() / v.abs().max() for n, v in whole.items())
    assert gap > 1e-3


def test_training_under_a_belief_gives_one_processs_weights(tmp_path: Path) -> None:
    alone = training(0, world=1)
    for found in on_ranks(tmp_path, "training"):
        for mine, one in zip(found, alone, strict=True):
            for name, value in one.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_stops_every_rank(tmp_path: Path) -> None:
    said = on_ranks(tmp_path, "refused")
    assert "got examples (0, 1)" in said[0][0]
    assert "2 kinds" in said[1][1]


def test_a_group_is_all_that_counts(tmp_path: Path) -> None:
    for rank, (found, n) in enumerate(on_ranks(tmp_path, "alone")):
        assert found.item() == rank
        assert n == rank + 1


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        distributed.across({"w": torch.ones(2)}, 3)


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="EKFAC"):
        list(distributed._parts({"0": Factors(torch.eye(2), torch.eye(2), torch.ones(2, 2))}, ""))
    with pytest.raises(ValueError, match="must be a tensor"):
        list(distributed._parts("nothing", ""))
