"""What each process of the chapter "Scale" does: learn a task together, share the curvature, learn the next under it.

torchrun --nproc-per-node 2 -m ewc_experiments.scale_worker FOLDER SETTINGS
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ewc_code import distributed, fisher, storage
from ewc_code.data import Examples
from ewc_code.environment import generator
from ewc_code.gaussian import Diagonal
from ewc_code.models import mlp, nll, snapshot


@dataclass(frozen=True)
class Work:
    """Settings; everything is float64, so that only the order of sums can differ between one process and several."""

    sizes: tuple[int, ...] = (20, 50, 50, 5)
    examples: int = 600  #: Of each of the two tasks.
    batch: int = 60  #: Examples a step, of all processes together.
    steps: int = 20  #: A task.
    strength: float = 3.0
    uneven: bool = False  #: Whether rank 0 takes the curvature of twice its share.

    def as_json(self) -> str:
        """For the command line."""
        return json.dumps(dataclasses.asdict(self))


def place() -> torch.device:
    """This process's own GPU where each process of this machine has one, else the CPU; as torchrun counts them."""
    rank, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.device("cuda", rank) if torch.cuda.device_count() >= here else torch.device("cpu")


def network(setup: Work) -> nn.Sequential:
    """The model, with its initial weights."""
    return mlp(setup.sizes, seed=0).double()


def task(setup: Work, seed: int) -> Examples:
    """Inputs drawn uniformly, and the answers of a network with random weights."""
    x = torch.rand(setup.examples, setup.sizes[0], generator=generator(seed), dtype=torch.float64)
    return Examples(x, mlp(setup.sizes, seed=100 + seed).double()(x).argmax(1))


def work(setup: Work, rank: int = 0, world: int = 1, where: str | torch.device = "cpu") -> tuple[Diagonal, int]:
    """The belief after two tasks, and the number of examples whose curvature this rank computed."""
    model = network(setup).to(where)
    learner = DistributedDataParallel(model) if world > 1 else model
    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    belief = Diagonal.isotropic(snapshot(model))
    for seed in (0, 1):
        made, share = task(setup, seed), setup.batch // world
        data = Examples(made.x.to(where), made.y.to(where))
        for step in range(setup.steps):
            start = step * setup.batch % setup.examples + rank * share
            mine = data[start : start + share]
            loss = nll(learner(mine.x), mine.y)
            penalty = setup.strength / len(data) * belief.energy(dict(model.named_parameters()))
            descent.zero_grad()
            (loss + penalty).backward()
            descent.step()
        # Shares of the curvature need not be equal: where they are uneven, rank 0 counts as two.
        extra = int(setup.uneven)
        ends = [len(data) * (r + extra * (r > 0)) // (world + extra) for r in range(world + 1)]
        mine = data[ends[rank] : ends[rank + 1]]
        batches = list(zip(mine.x.split(50), mine.y.split(50), strict=True))
        found, n = fisher.over_batches(fisher.diagonal, model, batches)
        if world > 1:
            found, n = distributed.across(found, n)
        belief = belief.moved(snapshot(model), {name: n * value for name, value in found.items()})
    del learner  # its reducer must not outlive the process group
    return belief, len(mine)


def main() -> None:
    """What torchrun starts, once a process."""
    folder, setup = Path(sys.argv[1]), Work(**json.loads(sys.argv[2]))
    setup = dataclasses.replace(setup, sizes=tuple(setup.sizes))
    where = place()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    belief, n = work(setup, rank, world, where)
    storage.save(belief, folder / f"rank{rank}.safetensors")
    counts = [torch.zeros((), dtype=torch.int64, device=where) for _ in range(world)]
    dist.all_gather(counts, torch.tensor(n, device=where))
    flat, times = torch.cat([v.reshape(-1) for v in belief.mean.values()]), []
    for _ in range(20):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if rank == 0:
        about = {"examples": [count.item() for count in counts], "allreduce": statistics.median(times)}
        part = folder / f"about.{os.getpid()}.part"
        part.write_text(json.dumps(about))
        part.replace(folder / "about.json")
    # All are done before any leaves, and each leaves at once: where gloo's threads and the interpreter were taken down
    # one by one, a process was aborted now and then ("terminate called without an active exception").
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
